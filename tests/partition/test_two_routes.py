"""The default estimate of log Z, on kinds of problems whose log Z is known."""

import functools
import math
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core import Reason
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.errors import UnreliableWarning
from pyro_ebm.partition import estimate
from pyro_ebm.partition.two_routes import Limits
from pyro_ebm.testing import CountingEnergy
from pyro_ebm.testing.evidence_problems import boxes, problems, variants

BUILDERS = {**problems(), **variants()}
#: Under a second or so each, and among them one of every kind that was once wrong.
FAST = [
    "ball_3d",
    "coin",
    "correlated_gaussian_2d",
    "dirichlet_edge",
    "lkj_3",
    "narrow_mode_4d",
    "rare_events",
    "straight_line",
    "two_modes_6d",
    "von_mises_1",
]


MARKS = {name: pytest.mark.slow for name in BUILDERS if name not in FAST}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in BUILDERS]
)
def test_the_interval_holds_the_truth(name):
    """One seed and one dtype each: half of the problems are in single precision."""
    dtype = (torch.float64, torch.float32)[list(BUILDERS).index(name) % 2]
    torch.set_default_dtype(dtype)
    problem = BUILDERS[name](dtype)
    found = estimate(problem.target, problem.base, progress_bar=False)
    assert found.status in ("exact", "ok"), found
    slack = problem.truth_error
    assert found.lower - slack <= problem.truth <= found.upper + slack, found


def gaussian(dim):
    return FunctionEnergy(lambda x: x.square().sum(-1) / 2, (dim,))


def normal(dim, scale=1.5, loc=0.0):
    return dist.Normal(torch.full((dim,), loc), scale).to_event(1)


sampled = functools.partial(estimate, method="sampling", progress_bar=False)


@pytest.mark.parametrize(
    ("dim", "weights", "scales", "loc"),
    [
        (3, (0.1, 0.9), (0.3, 1.0), 4.0),
        (3, (0.5, 0.5), (0.1, 1.0), 4.0),
        (5, (0.5, 0.5), (0.4, 1.2), 5.0),
        (8, (0.3, 0.7), (0.5, 1.0), 6.0),
    ],
)
def test_a_narrow_mode_beside_a_wide_one(dim, weights, scales, loc):
    """The kind that particles alone lose. Meant to catch: few descents, or none."""
    settings = {"weights": weights, "locs": (0.0, loc), "scales": scales}
    problem = boxes.gaussian_modes(dim, torch.float64, name="modes", **settings)
    found = sampled(problem.target)
    assert found.status == "ok", found
    assert found.lower <= problem.truth <= found.upper, found
    assert found.std_error < 0.03


def test_a_shift_of_the_energy_moves_log_z_alone():
    energy, values = gaussian(4), []
    for shift in (0.0, 1000.0):
        pyro.set_rng_seed(3)
        values.append(sampled(energy + shift, normal(4), budget=30_000).value)
    assert values[1] == pytest.approx(values[0] - 1000, abs=1e-6)


def test_all_evaluations_are_counted():
    """Besides those few that look at the energy first. Meant to catch: those with a
    gradient are not."""
    energy = CountingEnergy(gaussian(4))
    found = sampled(energy, normal(4), budget=30_000)
    spent = energy.num_values + energy.num_gradients
    assert 0.7 * spent <= found.num_evaluations <= spent


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.UnreliableWarning")
@pytest.mark.parametrize("budget", [50_000, 200_000])
def test_the_budget_is_kept(budget):
    """Nearly: a step of the particles is finished. Meant to catch: one never over."""
    found = sampled(gaussian(6), normal(6, 3.0), budget=budget, tolerance=1e-4)
    assert found.num_evaluations < 1.3 * budget


@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.UnreliableWarning")
def test_seconds_are_kept():
    """By the processor, as others may share it. Meant to catch: a run is never over."""

    def slow(x):
        start = time.process_time()
        while time.process_time() < start + 2e-5 * x.shape[:-1].numel():
            pass
        return x.square().sum(-1) / 2

    start = time.process_time()
    found = sampled(FunctionEnergy(slow, (6,)), normal(6), max_seconds=1.0)
    assert time.process_time() - start < 3.0
    assert abs(found.value - 3 * math.log(2 * math.pi)) < 0.3 or not found.is_reliable


def test_limits_share_out_what_is_left():
    class Energy:
        num_evaluations, seconds_each = 400, 1e-3

    limits = Limits(0.02, 1000.0, 1000)
    assert limits.affordable(Energy, 0.5) == pytest.approx(300)
    assert not limits.is_over(Energy)
    Energy.num_evaluations = 1000
    assert limits.is_over(Energy)
    assert limits.affordable(Energy, 0.5) == 0
    free = Limits(0.02, 1000.0, None)
    assert 490_000 < free.affordable(Energy, 0.5) <= 500_000
    assert not free.is_over(Energy)
    assert Limits(0.02, 1e-9, None).is_over(Energy)
    assert Limits(0.02, 1e-9, None).affordable(Energy, 1.0) == 0


def test_a_looser_tolerance_costs_less():
    wide = sampled(gaussian(5), normal(5, 3.0), tolerance=0.1)
    narrow = sampled(gaussian(5), normal(5, 3.0), tolerance=0.002)
    truth = 2.5 * math.log(2 * math.pi)
    for found, tolerance in ((wide, 0.1), (narrow, 0.002)):
        assert found.status == "ok"
        assert found.std_error < tolerance
        assert found.lower <= truth <= found.upper
    assert wide.num_evaluations < narrow.num_evaluations


# Targets that have no estimate -----------------------------------------------------


def test_what_has_no_integral_is_not_normalizable():
    """A density that grows as exp(|x|^2 / 2). Meant to catch: the ray test left out."""
    hill = FunctionEnergy(lambda x: -x.square().sum(-1) / 2, (4,))
    with pytest.warns(UnreliableWarning, match="not_normalizable"):
        found = sampled(hill, normal(4))
    assert found.status == "not_normalizable"
    assert found.value == math.inf
    assert found.reasons


def test_a_base_that_misses_the_support_is_named():
    far = FunctionEnergy(
        lambda x: torch.where(x[..., 0] > 1000, x.square().sum(-1), math.inf), (4,)
    )
    with pytest.warns(UnreliableWarning):
        found = sampled(far, normal(4))
    assert found.status == "unreliable"
    assert "finite at none of" in found.reason


def test_an_improper_prior_has_no_evidence():
    def model():
        real = dist.constraints.real
        x = pyro.sample("x", dist.ImproperUniform(real, (), (4,)))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(4))

    with pytest.raises(NotImplementedError, match="site 'x' is improper"):
        sampled(model)


def test_a_base_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="event_shape"):
        sampled(gaussian(4), normal(3))
    unit = dist.Uniform(torch.zeros(4), 1.0).to_event(1)
    with pytest.raises(ValueError, match="support"):
        sampled(gaussian(4), unit)
    with pytest.raises(TypeError, match="base must be a Pyro distribution"):
        sampled(gaussian(4), 3.0)


def test_a_base_whose_draws_are_not_of_its_density_is_not_believed():
    """Meant to catch: the draws are not checked."""

    class Wrong(dist.Normal):
        def sample(self, sample_shape=()):
            return 1.2 * super().sample(sample_shape)

    base = Wrong(torch.zeros(4), 1.5).to_event(1)
    with pytest.warns(UnreliableWarning, match="not those of its density"):
        found = sampled(gaussian(4), base)
    assert any(finding.reason is Reason.BASE_INCONSISTENT for finding in found.reasons)


def test_a_default_base_is_named():
    """And one that was given is not. Meant to catch: never named."""
    found = sampled(gaussian(3))
    assert found.method.endswith("base: standard normal")
    assert found.status == "ok"
    assert abs(found.value - 1.5 * math.log(2 * math.pi)) < 0.05
    assert "base:" not in sampled(gaussian(3), normal(3)).method


def test_an_energy_that_is_no_function_of_one_point():
    """A mean over the batch: the same point has another energy among others."""
    mixed = FunctionEnergy(lambda x: (x - x.mean(0)).square().sum(-1), (4,))
    with pytest.raises(ValueError, match="batch"):
        sampled(mixed, normal(4))


def test_no_warning_for_what_is_good():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sampled(QuadraticEnergy(torch.ones(5)), normal(5))
    assert found.is_reliable
    assert found.ess > 200
    assert 0 < found.num_seconds < 60
