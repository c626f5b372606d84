"""The default estimate of log Z, on kinds of problems whose log Z is known."""

import functools
import math
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks.evidence_problems import boxes, problems, variants
from pyro_ebm.core import Reason
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition import estimate
from pyro_ebm.partition.agreement import (
    Value,
    disagreement,
    is_settled,
    judge_weights,
    settled,
)
from pyro_ebm.partition.importance.pool import FlatBase, Proposal
from pyro_ebm.partition.importance.student_mixture import StudentMixture
from pyro_ebm.partition.particles.engine import Journey
from pyro_ebm.partition.progress import CountedEnergy, Limits
from pyro_ebm.partition.two_routes import _BY_DRAWS, _BY_PARTICLES, _TwoRoutes
from pyro_ebm.testing import CountingEnergy, targets

BUILDERS = {**problems(), **variants()}
#: A few seconds at most each, and among them one of every kind that was once wrong;
#: modes of two widths are below.
FAST = [
    "ball_3d",
    "coin",
    "correlated_gaussian_2d",
    "dirichlet_edge",
    "lkj_3",
    "narrow_mode_4d",
    "rare_events",
    "straight_line",
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


def test_a_small_box_in_which_alone_there_is_mass():
    """One draw of the base in three thousand. Fault: an island without any of them."""

    def slope(x):
        is_inside = ((x - 1.5).abs() < 0.5).all(-1)
        return torch.where(is_inside, x.sum(-1), math.inf)

    energy = FunctionEnergy(slope, (4,))
    found = estimate(energy, tolerance=0.1, progress_bar=False)
    assert found.status == "ok", found
    assert found.lower < 4 * math.log(math.exp(-1) - math.exp(-2)) < found.upper


@pytest.mark.parametrize(
    ("dim", "weights", "scales", "loc"),
    [
        (3, (0.1, 0.9), (0.3, 1.0), 4.0),
        (3, (0.5, 0.5), (0.1, 1.0), 4.0),
        (5, (0.5, 0.5), (0.4, 1.2), 5.0),
        pytest.param(8, (0.3, 0.7), (0.5, 1.0), 6.0, marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    ("seed", "dim", "spread", "scales"),
    [(1, 5, 8.0, (1.0,)), (3, 3, 20.0, (0.3, 1.0, 2.0)), (5, 10, 4.0, (0.7, 1.0))],
)
def test_modes_far_from_a_base_that_nobody_chose(seed, dim, spread, scales):
    """Meant to catch: looks at the base alone, where modes hide behind others; high
    descents given up that have arrived.
    """
    make = torch.Generator().manual_seed(seed)
    loc = spread * torch.randn(6, dim, generator=make, dtype=torch.float64)
    scale = torch.tensor(scales).double()
    scale = scale[torch.randint(len(scale), (6, 1), generator=make)]
    weights = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.1, 0.05]).double()
    parts = dist.Normal(loc, scale).to_event(1)
    density = dist.MixtureSameFamily(dist.Categorical(weights), parts)
    found = sampled(FunctionEnergy(lambda x: 2 - density.log_prob(x), (dim,)))
    assert found.status == "ok", found
    assert found.lower <= -2 <= found.upper, found
    assert found.std_error < 0.02


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


@pytest.mark.filterwarnings("ignore::pyro_ebm.core.errors.UnreliableWarning")
@pytest.mark.parametrize("budget", [50_000, 200_000])
def test_the_budget_is_kept(budget):
    """Nearly: a step of the particles is finished. Meant to catch: one never over."""
    found = sampled(gaussian(6), normal(6, 3.0), budget=budget, tolerance=1e-4)
    assert found.num_evaluations < 1.3 * budget


@pytest.mark.filterwarnings("ignore::pyro_ebm.core.errors.UnreliableWarning")
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


# What is made of the numbers -------------------------------------------------------


def routes(energy, base):
    """The state of an estimate that has not begun."""
    path = GeometricPath(energy, base, is_double=True)
    path.target = CountedEnergy(path.target)
    return _TwoRoutes(path, path.target, Limits(0.02, 60.0, None))


def at(path, *loc, scale=1.0):
    """A proposal of Student components at points of two numbers."""
    weights = torch.full((len(loc),), 1 / len(loc))
    factor = (scale * torch.eye(2)).expand(len(loc), 2, 2)
    return Proposal(path, StudentMixture(weights, torch.tensor(loc), factor), 0.04)


def reasons(findings):
    return [finding.reason for finding in findings]


def test_particles_that_found_more_speak_against_a_value():
    """By more than three standard errors and a slack, and never the other way round.
    Fault: the sign."""
    assert Value(0.0, 0.03).shortfall(Value(0.19, 0.04)) == []
    found = Value(0.0, 0.03).shortfall(Value(0.21, 0.04))
    assert reasons(found) == [Reason.ROUTES_DISAGREE]
    assert Value(9.0, 0.03).shortfall(Value(0.0, 0.04)) == []


def test_two_values_are_pooled_by_their_variances():
    """With half of what they differ by as the least error. Fault: without that."""
    assert Value.pooled([Value(1.0, 0.1), Value(1.0, 0.1)]) == (
        1.0,
        pytest.approx(0.1 / math.sqrt(2)),
    )
    value, std_error = Value.pooled([Value(0.0, 0.1), Value(1.0, 0.2)])
    assert (value, std_error) == (pytest.approx(0.2), pytest.approx(0.5))
    assert Value.pooled([Value(0.0, math.inf), Value(1.0, 0.2)]) == (1.0, 0.2)


@pytest.mark.parametrize(
    ("runs", "gap", "first", "wanted"),
    [
        ([0.0], 0.4, 0.0, []),
        ([0.0], 0.6, 0.0, [Reason.DIRECTIONS_DISAGREE]),
        ([0.0], 0.0, -0.5, [Reason.ROUTES_DISAGREE]),
        ([0.0], 0.0, None, [Reason.ROUTES_DISAGREE]),
        ([0.0, 0.0], 0.0, None, []),  # a smaller run agrees
        ([5.0], 0.0, 0.0, []),  # the weights do
        ([5.0], 0.0, 9.0, [Reason.ROUTES_DISAGREE]),  # from the base there is more
    ],
)
def test_what_speaks_against_a_run_from_the_proposal(runs, gap, first, wanted):
    """Of weights that say 5. Faults: no gap; no other look has to agree; the first
    run may have found more."""
    weighed = Value(5.0, 0.01)
    first = None if first is None else Value(first, 0.01)
    found = disagreement([Value(v, 0.01) for v in runs], gap, first, weighed)
    assert reasons(found) == wanted


def test_the_gap_is_that_of_forwards_and_backwards():
    """Of means of Z there, and of 1 / Z back."""
    forward, reverse = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    journey = Journey(None, [], forward, forward, forward, reverse, 1.0, True)
    there = math.log((1 + math.e) / 2)
    back = -math.log((math.exp(-2) + math.exp(-3)) / 2)
    assert journey.gap == pytest.approx(back - there)


def test_what_weights_say_against_themselves():
    """Faults: no bound on the tail, or on the number."""
    tail = torch.distributions.Exponential(1.0).sample((20_000,))
    assert reasons(judge_weights(0.3 * tail)) == []
    assert Reason.HEAVY_WEIGHTS in reasons(judge_weights(1.2 * tail))
    assert reasons(judge_weights(0.1 * torch.randn(150))) == [Reason.FEW_EFFECTIVE]


def two_gaussians():
    loc = torch.tensor([[-6.0, 0.0], [6.0, 0.0]])
    energy = FunctionEnergy(
        lambda x: -(-(x[..., None, :] - loc).square().sum(-1) / 2).logsumexp(-1), (2,)
    )
    return energy, loc[:, None] + torch.randn(2, 4000, 2)


def test_particles_where_the_proposal_is_thin_speak_against_it():
    """Fault: any share of them is let pass."""
    energy, particles = two_gaussians()
    state = routes(energy, normal(2, 1.0))
    u = particles.flatten(0, 1)
    one, both = at(state.path, (6.0, 0.0)), at(state.path, (6.0, 0.0), (-6.0, 0.0))
    (_, of_one), (_, of_both) = state.weigh(one, 4000), state.weigh(both, 4000)
    found = state.coverage(one, u, of_one)
    assert reasons(found) == [Reason.NOT_COVERED]
    assert state.coverage(both, u, of_both) == []
    assert state.coverage(one, particles[1], of_one) == []


def test_good_weights_are_enough_only_with_particles_that_agree():
    """Fault: without any."""
    energy, particles = two_gaussians()
    state = routes(energy, normal(2, 4.0))
    proposal, u = at(state.path, (6.0, 0.0), (-6.0, 0.0)), particles.flatten(0, 1)
    truth = Value(math.log(4 * math.pi), 0.01)
    found = state.weighed(proposal, truth, u)
    assert is_settled([found], truth)
    assert abs(found.value.value - truth.value) < 4 * found.value.std_error < 0.08
    assert not is_settled([found], None)
    more = Value(truth.value + 1, 0.01)
    assert not is_settled([state.weighed(proposal, more, u)], more)


def test_a_ridge_beyond_the_particles_takes_two_looks_that_agree():
    """Faults: one look is enough; a value that still rises; a map that is rough where
    weights have a tail; looks that differ, and particles that fell short, at no cost.
    """
    energy, particles = two_gaussians()
    state, u = routes(energy, normal(2, 4.0)), particles.flatten(0, 1)
    proposal = at(state.path, (6.0, 0.0), (-6.0, 0.0))
    truth = Value(math.log(4 * math.pi), 0.01)
    look = state.weighed(proposal, truth, u)._replace(is_bent=True)
    assert is_settled([look], truth)
    assert not is_settled([look._replace(k=0.5)], truth)
    short = Value(truth.value - 0.1, 0.01)
    assert not is_settled([look], short)
    assert is_settled([look, look], short)
    low = look._replace(value=Value(look.value.value - 0.1, 0.01))
    assert not is_settled([low, look], short)
    rough, heavy = look._replace(efficiency=0.5, k=0.1), look._replace(k=0.3)
    assert is_settled([rough, rough], short)
    assert not is_settled([heavy, rough], short)
    assert not is_settled([rough, rough._replace(k=0.3)], short)
    assert settled([low, look, look], truth) == (look.value, pytest.approx(0.1))
    for missed, gap in ((0.3, 0.03), (2.0, 0.05)):
        far = Value(look.value.value - missed, 0.1)
        assert settled([look, look], far) == (look.value, pytest.approx(gap))
    assert settled([look._replace(is_bent=False)] * 2, far) == (look.value, 0)


@pytest.mark.parametrize(
    "name",
    ["hybrid_rosenbrock", pytest.param("neals_funnel", marks=pytest.mark.slow)],
)
def test_the_end_of_a_ridge_is_found_or_the_interval_says_so(name):
    """Fault: a map of the ridge given up for ellipsoids, whose particles do not come
    to its end: -.063 +- .005.
    """
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(3003)
    target = getattr(targets, name)()
    found = sampled(target.energy, target.base)
    assert found.status == "ok", found
    assert found.lower <= target.log_partition <= found.upper, found
    assert abs(found.value - target.log_partition) < 0.02


def test_error_bars_and_what_is_too_wide():
    """Faults: no caution where particles have the last word; no widest error."""
    state = routes(gaussian(2), normal(2))
    narrow = state.estimate([Value(1.0, 0.01)], [], 500.0, _BY_DRAWS)
    wide = state.estimate([Value(1.0, 0.01)], [], 500.0, _BY_PARTICLES)
    apart = state.estimate([Value(1.0, 0.01)], [], 500.0, _BY_PARTICLES, 0.1)
    assert apart.upper - wide.upper == pytest.approx(0.1)
    assert narrow.upper - 1 == pytest.approx(0.03182, abs=1e-4)
    assert wide.upper - 1 == pytest.approx(3 * 0.03182, abs=3e-4)
    assert narrow.status == wide.status == "ok"
    for value, reason in (
        (Value(1.0, 0.2), Reason.NOT_CONVERGED),
        (Value(math.inf, 0.0), Reason.NOT_FINITE),
    ):
        found = state.estimate([value], [], 500.0, _BY_DRAWS)
        assert found.status == "unreliable"
        assert reasons(found.reasons) == [reason]


def test_islands_from_a_proposal_have_their_part_of_each_component():
    """Fault: the draws in the order of the proposal, those of its base last."""
    path = GeometricPath(gaussian(2), normal(2, 1.0, 50.0), is_double=True)
    mixture = at(path, (0.0, 0.0)).mixture
    base = FlatBase(Proposal(path, mixture, 0.5), torch.Size((2,)))
    u = base.sample((8, 500))
    share = (u[..., 0] > 25).double().mean(1)
    assert ((share - 0.5).abs() < 5 * math.sqrt(0.25 / 500)).all()
    expected = base.proposal.log_prob(u.reshape(-1, 2)).reshape(8, 500)
    torch.testing.assert_close(base.log_prob(u), expected)


@pytest.mark.parametrize(("concentration", "is_lost"), [(0.1, True), (0.5, False)])
def test_mass_nearer_to_an_end_than_numbers_are(concentration, is_lost):
    """Each factor of Beta(.1, .1) has 2.5 % of its mass within 1e-16 of 1, where no
    double precision number is: -.04 nats of three of them, and more precise than that.

    Seen to fail without a look at the particles' way to the support and back."""
    support = dist.constraints.independent(dist.constraints.unit_interval, 1)
    energy = FunctionEnergy(
        lambda x: ((1 - concentration) * (x.log() + torch.log1p(-x))).sum(-1),
        (3,),
        support,
    )
    a = concentration
    truth = 3 * (2 * math.lgamma(a) - math.lgamma(2 * a))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        found = estimate(energy, progress_bar=False)
    assert (Reason.NUMERICAL in {finding.reason for finding in found.reasons}) == (
        is_lost
    )
    if not is_lost:
        assert found.is_reliable
        assert found.lower <= truth <= found.upper
