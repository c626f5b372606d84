"""Annealed importance sampling: unbiased, and bounds that hold."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core import Reason
from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC, MALA, ULA
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition.particles.annealed import (
    Schedule,
    _Annealing,
    annealed_importance_sampling,
    bidirectional,
    guaranteed_lower,
    plan_schedule,
)
from pyro_ebm.testing import CountingEnergy, targets

BETAS = [0.0, 0.1, 0.3, 0.6, 1.0]
FINE = [0.0, 0.02, 0.05, 0.1, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0]
KERNEL = HMC(step_size=0.5, num_leapfrog=2)


def normal(dim, scale=1.0):
    return dist.Normal(torch.zeros(dim), scale).to_event(1)


def shifted(dim=2):
    """N(1, 0.5^2) unnormalised, with its log Z and draws."""
    energy = QuadraticEnergy(torch.ones(dim), 4 * torch.eye(dim))
    truth = dim * (math.log(2 * math.pi) / 2 - math.log(2))
    return energy, truth, lambda count: 1 + torch.randn(count, dim) / 2


# --- the guaranteed bound ------------------------------------------------------------


WEIGHTS = {
    "log-normal": lambda n: 2 * torch.randn(n) - 2,
    "heavy": lambda n: 0.9 * torch.empty(n).exponential_() + math.log(0.1),
    "rare": lambda n: torch.where(torch.rand(n) < 0.01, math.log(100.0), -torch.inf),
    "light": lambda n: torch.rand(n).log() + math.log(2),
    "two": lambda n: torch.where(torch.rand(n) < 0.5, math.log(1.5), math.log(0.5)),
}


@pytest.mark.parametrize("delta", [0.1, 0.5])
@pytest.mark.parametrize("count", [1, 30, 256])
@pytest.mark.parametrize("name", WEIGHTS)
def test_bound_holds(name, count, delta):
    """Weights of mean 1: at most a share ``delta`` of the bounds is above 0.

    Planted fault: the sum of the products for their average.
    """
    runs = [guaranteed_lower(WEIGHTS[name](count), delta) for _ in range(200)]
    failures = sum(bound > 0 for bound in runs) / 200
    assert failures <= delta + 4 * math.sqrt(delta * (1 - delta) / 200)


def test_bound_is_nearly_attained_by_a_rare_event():
    """Two-point weights that make Markov's inequality an equality."""
    delta, count = 0.25, 1
    failures = 0
    for _ in range(2000):
        hit = torch.rand(count) < delta / 2
        log_weights = torch.where(hit, math.log(2 / delta), -torch.inf)
        failures += guaranteed_lower(log_weights, delta) > -1e-6
    assert failures / 2000 < delta


def test_bound_is_tight_for_light_weights():
    """Close to the central limit theorem, and never below that of Markov."""
    log_weights = WEIGHTS["light"](1000)
    bound = guaranteed_lower(log_weights, 0.05)
    log_mean = log_weights.exp().mean().log()
    std_error = log_weights.exp().std() / math.sqrt(1000)
    assert log_mean - 4.5 * std_error < bound < log_mean - 1.6 * std_error
    for name in WEIGHTS:
        log_weights = WEIGHTS[name](300)
        mean = torch.logsumexp(log_weights, 0) - math.log(300)
        if mean > -torch.inf:
            assert guaranteed_lower(log_weights, 0.05) >= mean - math.log(40) - 1e-6


def test_bound_moves_with_the_weights():
    log_weights = torch.randn(100)
    bound = guaranteed_lower(log_weights)
    assert guaranteed_lower(log_weights + 500) == pytest.approx(bound + 500)
    assert guaranteed_lower(torch.full((100,), -torch.inf)) == -math.inf


# --- the two runs --------------------------------------------------------------------


def test_forward_is_unbiased():
    """First and second moment of Z-hat / Z, with a frozen schedule of 4 steps.

    Planted faults: one transition more before the weights (so that they are those of
    the temperature after); a kernel without its acceptance test.
    """
    energy, truth, _ = shifted()
    runs = [
        annealed_importance_sampling(
            energy,
            normal(2),
            num_chains=100,
            inverse_temperatures=BETAS,
            kernel=KERNEL,
        )
        for _ in range(200)
    ]
    ratio = torch.tensor([r.value - truth for r in runs]).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(200)
    assert ratio.std() < 0.4


def test_reverse_is_unbiased_for_the_reciprocal():
    """Planted fault: the forward order of temperatures."""
    energy, truth, draw = shifted()
    runs = [
        annealed_importance_sampling(
            energy,
            normal(2),
            num_chains=100,
            inverse_temperatures=FINE,
            kernel=KERNEL,
            direction="reverse",
            draws=draw(100),
        )
        for _ in range(200)
    ]
    ratio = torch.tensor([truth - r.value for r in runs]).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(200)
    assert ratio.std() < 0.3


def test_the_reverse_run_takes_the_steps_of_the_forward_run_backwards(monkeypatch):
    """The same kernel at the same temperature: Bennett's ratio needs that, while the
    weights of either run alone have their mean with any kernel.

    Planted fault: in reverse the kernel of the temperature above.
    """
    energy, _, draw = shifted()
    run, steps = _Annealing(energy, normal(2), 32, 0.05), []
    kernels = [HMC(step_size=0.1 * t) for t in range(1, len(FINE) + 1)]

    def step(kernel, state):
        steps.append((kernel.step_size, run.path.inverse_temperature))
        return state, None

    run.schedule = Schedule(FINE, kernels)
    monkeypatch.setattr(run.path, "step", step)
    run.forward()
    there = steps.copy()
    steps.clear()
    run.reverse(draw(32))
    assert steps == there[::-1]
    assert [beta for _, beta in there] == FINE[1:-1]


CASES = [
    (targets.gamma, 20),
    (targets.trap, 40),
    (lambda: targets.student_t_product(10), 15),
    (lambda: targets.neals_funnel(4), 30),
    (lambda: targets.hybrid_rosenbrock(3), 30),
]


@pytest.mark.parametrize(("target", "num_temperatures"), CASES)
def test_bounds_hold(target, num_temperatures):
    """Forward below, reverse above, both ways around log Z, on easy and on hard."""
    target = target()
    for _ in range(2):
        settings = {"num_chains": 100, "num_temperatures": num_temperatures}
        forward = annealed_importance_sampling(target.energy, target.base, **settings)
        reverse = annealed_importance_sampling(
            target.energy,
            target.base,
            direction="reverse",
            draws=target.sample((100,)),
            **settings,
        )
        both = bidirectional(
            target.energy, target.base, target.sample((100,)), **settings
        )
        truth = target.log_partition
        assert forward.lower < truth < reverse.upper
        assert forward.upper == math.inf
        assert reverse.lower == -math.inf
        assert both.lower < truth < both.upper
        for estimate in (forward, reverse):
            assert estimate.status == "unreliable"
            assert estimate.reason.startswith("one-sided only")
        assert both.upper - both.lower < 6
        assert abs(both.value - truth) < 5 * both.std_error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "num_temperatures"),
    [
        (targets.gaussian, 60),
        (targets.trap, 30),
        (targets.neals_funnel, 60),
        (targets.hybrid_rosenbrock, 40),
        (lambda: targets.gaussian_mixture(5), 30),
        (lambda: targets.many_well(2), 60),
    ],
)
def test_bounds_hold_over_many_seeds(target, num_temperatures):
    target, failures = target(), 0
    for _ in range(60):
        estimate = bidirectional(
            target.energy,
            target.base,
            target.sample((256,)),
            num_temperatures=num_temperatures,
        )
        failures += not estimate.lower < target.log_partition < estimate.upper
    assert failures <= 3 + 6


def test_value_is_right_where_it_is_easy():
    energy, truth, draw = shifted()
    forward = annealed_importance_sampling(energy, normal(2), num_temperatures=50)
    assert abs(forward.value - truth) < 4 * forward.std_error
    assert forward.std_error < 0.05
    both = bidirectional(energy, normal(2), draw(300), num_temperatures=50)
    assert both.status == "ok"
    assert abs(both.value - truth) < 4 * both.std_error
    assert both.upper - both.lower < 0.3


def test_draws_that_lack_a_mode_make_the_bounds_contradict_each_other():
    def energy(x):
        modes = torch.stack([2 - 2 * (x + 4) ** 2, -((x - 4) ** 2) / 2])
        return -torch.logsumexp(modes, 0)

    energy, base = FunctionEnergy(energy, ()), dist.Normal(0.0, 4.0)
    settings = {"num_chains": 500, "num_temperatures": 40}
    first, second = 4 + torch.randn(500), -4 + torch.randn(500) / 2
    estimate = bidirectional(energy, base, first, **settings)
    assert estimate.status == "unreliable"
    assert "contradict each other" in estimate.reason
    share = 1 / (1 + math.exp(2) / 2)
    both = torch.where(torch.rand(500) < share, first, second)
    estimate = bidirectional(energy, base, both, **settings)
    assert estimate.status == "ok"
    truth = math.log(2 * math.pi) / 2 - math.log(share)
    assert estimate.lower < truth < estimate.upper


def test_a_biased_kernel_voids_the_bounds():
    energy, _, draw = shifted()
    settings = {"inverse_temperatures": FINE, "kernel": ULA(0.01), "num_chains": 64}
    both = bidirectional(energy, normal(2), draw(64), **settings)
    forward = annealed_importance_sampling(energy, normal(2), **settings)
    for estimate in (both, forward):
        assert Reason.BIASED_KERNEL in [found.reason for found in estimate.reasons]
        assert estimate.status == "unreliable"


def test_too_few_temperatures_are_seen():
    """The trap of 30 temperatures: an error bar that is too small is not "ok"."""
    target = targets.trap()
    estimate = annealed_importance_sampling(
        target.energy,
        target.base,
        num_chains=64,
        inverse_temperatures=torch.linspace(0, 1, 31).tolist(),
        kernel=HMC(step_size=0.3, num_leapfrog=3),
    )
    assert "effective sample size" in estimate.reason
    assert estimate.lower < target.log_partition


def test_no_partition_function(monkeypatch):
    """The schedule never arrives; with one of its own the reason is in the weights."""
    monkeypatch.setattr("pyro_ebm.partition.particles.annealed._MAX_RUNGS", 40)
    target = targets.unnormalizable()
    with pytest.raises(DivergenceError, match="path from the base has not ended"):
        annealed_importance_sampling(target.energy, target.base)
    estimate = annealed_importance_sampling(
        target.energy,
        target.base,
        inverse_temperatures=torch.linspace(0, 1, 60).tolist(),
        kernel=KERNEL,
    )
    assert estimate.status == "unreliable"
    assert "effective sample size" in estimate.reason


@pytest.mark.parametrize("kernel", [None, KERNEL, MALA(0.1)])
@pytest.mark.parametrize("betas", [None, BETAS])
def test_evaluations_are_counted(kernel, betas):
    energy, _, draw = shifted()
    counting = CountingEnergy(energy)
    settings = {
        "num_chains": 32,
        "num_temperatures": 10,
        "kernel": kernel,
        "inverse_temperatures": betas,
    }
    estimate = annealed_importance_sampling(counting, normal(2), **settings)
    assert estimate.num_evaluations == counting.num_gradients
    assert counting.num_values == 0
    if kernel is not None and betas is not None:
        # The base draws, then one transition at each temperature within.
        assert estimate.num_evaluations == 32 * (1 + 3 * kernel.num_gradients)
    counting.reset()
    estimate = bidirectional(counting, normal(2), draw(32), **settings)
    assert estimate.num_evaluations == counting.num_gradients


def test_energy_that_is_infinite_in_places():
    """A half normal as a truncated energy: proposals outside are rejected."""
    energy = FunctionEnergy(
        lambda x: torch.where(x[..., 0] > 0, x.square().sum(-1) / 2, torch.inf), (2,)
    )
    draws = torch.randn(256, 2)
    draws[:, 0] = draws[:, 0].abs()
    estimate = bidirectional(energy, normal(2, 1.5), draws, num_temperatures=30)
    truth = math.log(math.pi)
    assert estimate.lower < truth < estimate.upper
    assert abs(estimate.value - truth) < 4 * estimate.std_error
    nowhere = FunctionEnergy(lambda x: x.sum(-1) * 0 + torch.inf, (2,))
    with pytest.raises(DivergenceError, match="finite at none of 128 draws"):
        annealed_importance_sampling(nowhere, normal(2))
    with pytest.raises(ValueError, match="draws must have finite energy"):
        bidirectional(energy, normal(2), torch.randn(256, 2))


# --- the schedule --------------------------------------------------------------------


def test_schedule():
    target = targets.trap()
    path = GeometricPath(target.energy, target.base)
    schedule = plan_schedule(path, 50)
    betas = schedule.inverse_temperatures
    assert betas[0] == 0
    assert betas[-1] == 1
    assert all(a < b for a, b in zip(betas[:-1], betas[1:], strict=True))
    assert 51 <= len(betas) < 80
    assert len(schedule.kernels) == len(betas)
    # The target is narrow: the metric shrinks on the way, the step does not.
    first, last = (schedule.kernels[k].scale_tril.diagonal().mean() for k in (1, -1))
    assert last < 0.6 * first
    assert last == pytest.approx(0.3, rel=0.4)


def test_schedule_of_images_has_a_diagonal_metric():
    energy = FunctionEnergy(lambda x: x.square().sum((-2, -1)) * 2, (2, 3))
    base = dist.Normal(torch.zeros(2, 3), 1.0).to_event(2)
    estimate = annealed_importance_sampling(energy, base, num_temperatures=20)
    truth = 3 * math.log(math.pi / 2)
    assert abs(estimate.value - truth) < 4 * estimate.std_error


def test_given_schedule_is_kept():
    energy, *_ = shifted()
    path = GeometricPath(energy, normal(2))
    schedule = plan_schedule(path, 10, BETAS)
    assert schedule.inverse_temperatures == BETAS
    assert len({id(k) for k in schedule.kernels}) > 1
    before = path.num_evaluations
    schedule = plan_schedule(path, 10, BETAS, KERNEL)
    assert path.num_evaluations == before
    assert schedule.kernels == [KERNEL] * 5


@pytest.mark.parametrize(
    "betas", [[0.0], [0.1, 1.0], [0.0, 0.9], [0.0, 0.5, 0.5, 1.0], [1.0, 0.0]]
)
def test_bad_schedule_is_refused(betas):
    energy, *_ = shifted()
    with pytest.raises(ValueError, match="must rise from 0 to 1, got"):
        annealed_importance_sampling(energy, normal(2), inverse_temperatures=betas)


def test_other_bad_input_is_refused():
    energy, *_ = shifted()
    run = annealed_importance_sampling
    with pytest.raises(ValueError, match="'sideways'"):
        run(energy, normal(2), direction="sideways")
    with pytest.raises(ValueError, match='draws must be given with direction="rev'):
        run(energy, normal(2), direction="reverse")
    with pytest.raises(ValueError, match=r"draws \(50, 2\)"):
        run(energy, normal(2), draws=torch.zeros(50, 2))
    with pytest.raises(ValueError, match="num_chains must be at least 25"):
        run(energy, normal(2), num_chains=8)
    with pytest.raises(ValueError, match="delta must be between 0 and 1, got 1.0"):
        run(energy, normal(2), delta=1.0)
    with pytest.raises(ValueError, match="num_temperatures must be at least 1"):
        run(energy, normal(2), num_temperatures=0)
    with pytest.raises(ValueError, match=r"N at least num_chains = 256, got \(50, 2\)"):
        bidirectional(energy, normal(2), torch.zeros(50, 2))
    with pytest.raises(ValueError, match="base must have event_shape"):
        run(energy, normal(3))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_float32():
    energy, truth, draw = shifted()
    estimate = bidirectional(energy, normal(2), draw(256), num_temperatures=30)
    assert estimate.lower < truth < estimate.upper
    assert estimate.status == "ok"
