"""The default estimate of log Z: a pilot run, a proposal fitted to it, a verdict."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy, FunctionEnergy, unconstrained
from pyro_ebm.errors import DivergenceError, UnreliableWarning
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition import estimate
from pyro_ebm.partition.importance.adaptive import Adaptation
from pyro_ebm.partition.importance.proposal import Proposal
from pyro_ebm.partition.importance.refit import RefittedBase, fit_student_t
from pyro_ebm.partition.particles import refined
from pyro_ebm.partition.particles.refined import refined_smc
from pyro_ebm.testing import CountingEnergy, held_out, targets


def test_the_fit_recovers_a_student_t():
    """Location and scale; seen to fail with weights of one, which fit a Gaussian."""
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    truth = dist.MultivariateStudentT(torch.tensor(5.0), torch.ones(2), factor)
    fitted = fit_student_t(truth.sample((20_000,)), degrees=5.0)
    torch.testing.assert_close(fitted.loc, truth.loc, rtol=0, atol=0.05)
    scale = fitted.scale_tril @ fitted.scale_tril.mT
    torch.testing.assert_close(scale, factor @ factor.mT, rtol=0.05, atol=0.05)


def test_the_fit_keeps_strong_correlations():
    """Seen to fail with the covariance shrunk towards its diagonal by D / N."""
    rotation = torch.linalg.qr(torch.randn(10, 10)).Q
    scales = torch.logspace(-2, 0, 10)
    draws = torch.randn(640, 10) * scales @ rotation.mT
    fitted = fit_student_t(draws)
    smallest = torch.linalg.svdvals(fitted.scale_tril).min()
    assert smallest < 1.5 * scales.min()


def test_the_refitted_base_is_normalised():
    """Its draws and its density belong together: the mean of p / q is one."""
    base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    path = GeometricPath(DistributionEnergy(base), base)
    refitted = RefittedBase(torch.randn(500, 2) + 1, path, base_weight=0.2)
    wide = dist.Normal(torch.zeros(2), 4.0).to_event(1)
    x = wide.sample((50_000,))
    ratio = (refitted.log_prob(x) - wide.log_prob(x)).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / len(x) ** 0.5
    draws = refitted.sample((50_000,))
    back = (wide.log_prob(draws) - refitted.log_prob(draws)).exp()
    assert (back.mean() - 1).abs() < 4 * back.std() / len(draws) ** 0.5


EASY = [
    "beta_product",
    "dirichlet",
    "eight_schools",
    "gamma",
    "gaussian",
    "laplace_product",
    "log_gamma_product",
    "multivariate_student_t",
    "product_of_gaussians",
    "shell",
    "student_t_product",
    "trap",
]
HARD = [
    "banana",
    "gaussian_mixture",
    "hybrid_rosenbrock",
    "many_well",
    "neals_funnel",
    "two_modes",
]


def build(name):
    return getattr(held_out if name in held_out.__all__ else targets, name)()


def test_no_target_is_forgotten():
    known = {*targets.__all__, *held_out.__all__} - {"Target", "unnormalizable"}
    assert known == {*EASY, *HARD}


@pytest.mark.parametrize("name", EASY)
def test_easy_targets_are_right(name):
    """Planted: the base left out of the density of the proposal, the Jacobian of the
    support left out of the target; seen to fail."""
    target = build(name)
    found = refined_smc(target.energy, target.base, budget=10_000)
    assert found.is_reliable
    assert abs(found.value - target.log_partition) < 4 * found.std_error
    assert found.lower < found.value < found.upper


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_hard_targets_are_right_or_flagged(name):
    target = build(name)
    found = refined_smc(target.energy, target.base)
    error = abs(found.value - target.log_partition)
    assert error < 4 * found.std_error or not found.is_reliable


def test_no_partition_function_is_no_number():
    target = targets.unnormalizable()
    found = refined_smc(target.energy, target.base)
    assert found.status == "not_normalizable"
    assert not found.is_reliable
    assert found.value == torch.inf
    assert found.reason
    with pytest.warns(UnreliableWarning, match="not_normalizable"):
        estimate(target.energy, target.base, method="smc")


def test_an_energy_that_is_finite_nowhere_raises():
    energy = FunctionEnergy(lambda x: x.sum(-1) * 0 + torch.inf, (3,))
    with pytest.raises(DivergenceError, match="finite at none"):
        refined_smc(energy, targets.trap(3).base)


def test_the_default_estimate_is_this_one():
    """In three dimensions, where quadrature is no longer tried."""
    target = targets.trap(3)
    pyro.set_rng_seed(1)
    expected = refined_smc(target.energy, target.base, budget=8_000)
    for method in ("auto", "smc"):
        pyro.set_rng_seed(1)
        assert estimate(target.energy, target.base, method, 8_000) == expected


def test_the_estimate_is_unbiased_and_its_error_true():
    """Mean and mean square of the error in units of the standard error, over 30 runs.
    Planted: the pool to which the proposal was fitted measured again in place of new
    draws; seen to fail with a mean square of 4 for 1. In many dimensions the easy
    targets above fail too."""
    target, z = targets.gamma(), []
    for seed in range(30):
        pyro.set_rng_seed(seed)
        found = refined_smc(target.energy, target.base, budget=6_000)
        ratio = torch.tensor(found.value - target.log_partition).exp()
        z.append((ratio - 1) / found.std_error)
    z = torch.stack(z)
    assert abs(z.mean()) < 4 / 30**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / 30) ** 0.5


@pytest.mark.parametrize("budget", [5_000, 12_000])
@pytest.mark.parametrize("name", ["gamma", "trap", "two_modes", "hybrid_rosenbrock"])
def test_a_small_budget_is_exceeded_by_what_cannot_be_less(name, budget, monkeypatch):
    """The pilot run, the rays and 1,000 draws each in six rounds and to measure; and
    what is reported is what was spent, but for draws of the base at which rays start.
    Planted: the draws that measure left out of the count; seen to fail."""
    least = [7 * 1000]

    def recording(function, cost):
        def call(*args):
            result = function(*args)
            least.append(cost(result))
            return result

        return call

    for part, cost in [
        ("run_islands", lambda run: run.cost),
        ("check_normalizability", lambda rays: rays.num_evaluations),
    ]:
        original = getattr(refined, part)
        monkeypatch.setattr(refined, part, recording(original, cost))
    target = build(name)
    energy = CountingEnergy(target.energy)
    found = refined_smc(energy, target.base, budget=budget)
    spent = energy.num_values + energy.num_gradients
    assert abs(spent - found.num_evaluations) < 300
    assert found.num_evaluations <= max(budget, sum(least)) + 300


def test_a_mode_that_only_smc_has_seen_is_flagged(monkeypatch):
    """The proposal is at the lighter of two modes, its weights are even, and what it
    lacks is 1.2 nats. Planted: the pilot run not asked; the wrong number is ok."""
    target = held_out.two_modes()
    lighter = dist.Normal(-target.mean / 0.4, 1.1).to_event(1)

    def adapt_to_one_mode(path, *_, num_draws, **__):
        weights = torch.tensor([1.0, 1e-12])
        proposal = Proposal([lighter], path, weights, torch.float64)
        return Adaptation(proposal, [0.9], num_draws)

    monkeypatch.setattr(refined, "adapt_proposal", adapt_to_one_mode)
    found = refined_smc(target.energy, target.base, budget=80_000)
    assert found.value < target.log_partition - 1
    assert found.status == "unreliable"
    assert found.reason.startswith("SMC found")


@pytest.mark.parametrize("name", ["gaussian", "trap", "shell", "dirichlet"])
def test_without_a_proposal_the_islands_measure(name, monkeypatch):
    """What is done in many dimensions, here in few."""
    monkeypatch.setattr(refined, "_MAX_ADAPTIVE_DIM", 0)
    target = build(name)
    found = refined_smc(target.energy, target.base, budget=20_000)
    assert found.method.startswith("SMC from the")
    inside = found.lower <= target.log_partition <= found.upper
    assert inside or not found.is_reliable
    assert abs(found.value - target.log_partition) < 0.5


@pytest.mark.parametrize(
    ("option", "match"),
    [({"budget": 4_999}, "budget"), ({"num_replicates": 3}, "num_replicates")],
)
def test_too_little_is_refused(option, match):
    target = targets.gamma()
    with pytest.raises(ValueError, match=match):
        refined_smc(target.energy, target.base, **option)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_single_precision_is_enough(dtype):
    for name in ("trap", "dirichlet"):
        target = build(name)
        found = refined_smc(target.energy, target.base, budget=8_000)
        error = abs(found.value - target.log_partition)
        assert error < 4 * found.std_error or not found.is_reliable


@pytest.mark.slow
def test_a_thousand_dimensions_run():
    precision = torch.logspace(-1, 1, 1000)
    energy = DistributionEnergy(
        dist.Normal(torch.zeros(1000), precision.rsqrt()).to_event(1)
    )
    base = dist.Normal(torch.zeros(1000), 3.5).to_event(1)
    assert unconstrained(energy)[0].event_shape == (1000,)
    found = refined_smc(energy, base, budget=5_000)
    assert abs(found.value) < 3 * found.std_error + 5 or not found.is_reliable
