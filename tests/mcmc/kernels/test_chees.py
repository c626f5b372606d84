"""ChEES-HMC: the length of its trajectories, and what it is worth."""

import dataclasses
import math

import pyro.ops.stats
import pytest
import torch

from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import ChEES
from pyro_ebm.mcmc.base import StepInfo
from pyro_ebm.mcmc.kernels.chees import (
    TrajectoryAdaptation,
    TrajectoryInfo,
    _criterion_grad,
)
from pyro_ebm.mcmc.warmup.warmup import Warmup
from pyro_ebm.testing import CountingEnergy


def standard(dim=5):
    return QuadraticEnergy(torch.zeros(dim))


def rotated(dim, condition_number=1000.0):
    """A Gaussian with random axes, so that no diagonal scale helps."""
    axes, _ = torch.linalg.qr(torch.randn(dim, dim))
    precision = (axes * torch.logspace(0, math.log10(condition_number), dim)) @ axes.mT
    return FunctionEnergy(lambda x: ((x @ precision) * x).sum(-1) / 2, (dim,))


def warm_up(kernel, energy, state, num_steps, **settings):
    warmup = Warmup(kernel, energy, state, num_steps, **settings)
    for _ in range(num_steps):
        state, info = warmup.kernel.step(energy, state)
        state = warmup.update(state, info)
    return warmup, state


@pytest.mark.parametrize(
    ("quantile", "jitter", "num_leapfrog"),
    [(0.5, 0.5, 10), (0.0, 0.5, 5), (1.0, 0.5, 15), (0.0, 1.0, 1), (1.0, 1.0, 20)],
)
def test_number_of_leapfrog_steps(quantile, jitter, num_leapfrog):
    kernel = ChEES(0.1, trajectory_length=0.99, jitter=jitter, quantile=quantile)
    energy = CountingEnergy(standard())
    state = kernel.init(energy, torch.randn(3, 5))
    energy.reset()
    _, info = kernel.step(energy, state)
    assert energy.num_gradients == 3 * num_leapfrog == 3 * kernel.num_gradients
    assert info.length == pytest.approx(0.1 * num_leapfrog)


@pytest.mark.parametrize("step_size", [1e-3, torch.tensor(0.0)])
def test_number_of_leapfrog_steps_is_bounded(step_size):
    kernel = ChEES(step_size, max_leapfrog=7, quantile=0.5)
    assert kernel.num_gradients == 7


def test_drawn_lengths_are_uniform():
    """Mean and variance of the number of steps, |z| < 4 with 400 draws.

    Seen to fail with twice the jitter, and with its quantile halved.
    """
    kernel = ChEES(0.05, trajectory_length=1.0)
    numbers = []
    energy = CountingEnergy(standard(1))
    state = kernel.init(energy, torch.zeros(1, 1))
    for _ in range(400):
        energy.reset()
        kernel.step(energy, state)
        numbers.append(float(energy.num_gradients))
    numbers = torch.tensor(numbers)
    mean, variance = 20.5, (20**2 - 1) / 12  # of the integers from 11 to 30
    assert abs(numbers.mean() - mean) < 4 * (variance / 400) ** 0.5
    spread = (0.8 * variance**2 / 400) ** 0.5  # a uniform has kurtosis 1.8
    assert abs(((numbers - mean) ** 2).mean() - variance) < 4 * spread


def parts_of_steps(kernel, num_chains=4000):
    state = kernel.init(standard(1), torch.zeros(num_chains, 1))
    return kernel._part_of_step(state)


@pytest.mark.parametrize("small_steps", [0.1, 1.0])
def test_small_steps_have_their_law(small_steps):
    """Their number is binomial, the log of their size uniform; |z| < 4.

    Seen to fail with the share squared, and with sizes that are uniform themselves.
    """
    part = parts_of_steps(ChEES(small_steps=small_steps))
    depth, is_small = -part.log() / math.log(4), part < 1
    count = is_small.sum()
    spread = (4000 * small_steps * (1 - small_steps)) ** 0.5
    assert abs(count - 4000 * small_steps) <= 4 * spread + 1
    depth = depth[is_small]
    assert depth.min() > 0
    assert depth.max() <= 1
    for power in (1, 2):
        mean = 1 / (power + 1)
        variance = 1 / (2 * power + 1) - mean**2
        assert abs((depth**power).mean() - mean) < 4 * (variance / count) ** 0.5


def test_steps_of_the_warm_up_are_never_small():
    """Else the trajectories would not have the length that it learns from."""
    energy, kernel = standard(), ChEES(0.3, quantile=0.5, small_steps=1.0)
    state = kernel.init(energy, torch.randn(50, 5))
    runs = []
    for change in ({}, {"small_steps": 0.0}):
        torch.manual_seed(3)
        new, _ = dataclasses.replace(kernel, **change).step(energy, state)
        runs.append(new.x)
    assert torch.equal(*runs)


def ridge():
    """Narrower the farther out: it needs a step of a third at the tips of the draws."""
    return FunctionEnergy(
        lambda x: x[..., 0] ** 2 / 200 + (x[..., 1] + 0.1 * x[..., 0] ** 2) ** 2 / 2,
        (2,),
    )


def test_warm_up_raises_the_share_of_small_steps_only_where_steps_are_hopeless():
    """Seen to fail where the frozen kernel keeps the share that was given."""
    z = torch.randn(64, 2)
    x = torch.stack([10 * z[:, 0], z[:, 1] - 10 * z[:, 0] ** 2], -1)
    for energy, start, is_raised in ((ridge(), x, True), (standard(2), z, False)):
        kernel = ChEES()
        warmup, _ = warm_up(kernel, energy, kernel.init(energy, start), 200)
        share = warmup.kernel.small_steps
        assert share > 0.11 if is_raised else share == 0.1


@pytest.mark.parametrize(("part", "share"), [(1.0, 0.1), (0.01, 1.0)])
def test_one_step_too_large_for_all_is_no_narrow_place(part, share):
    """Of 50 transitions of all chains, or of one chain in a hundred in all of them.

    Seen to fail without the bound on what a transition counts for.
    """
    energy, kernel = standard(2), ChEES()
    state = kernel.init(energy, torch.randn(100, 2))
    adaptation = kernel.adaptation()
    _, info = adaptation.current(kernel).step(energy, state)
    bad = torch.full((100,), -1e3).where(torch.arange(100) < 100 * part, 0.0)
    good = info.trajectory._replace(log_ratio=torch.zeros(100))
    for number in range(50):
        is_good = part == 1.0 and number
        info.trajectory = good if is_good else good._replace(log_ratio=bad)
        adaptation.update(adaptation.current(kernel), info)
    found = adaptation.frozen(kernel).small_steps
    assert found == pytest.approx(share, abs=1e-6)


def test_the_tips_of_a_curved_ridge_are_not_closed():
    """Chains at the tips get away, which no step of the common size lets them.

    The part of them that 20 transitions move; it is under a tenth without small steps.
    """
    torch.manual_seed(0)
    x = torch.tensor([[32.0, -102.4]]) + torch.randn(200, 2) * torch.tensor([0.0, 1.0])
    moved = {}
    for small_steps in (0.0, 1.0):
        kernel = ChEES(0.16, trajectory_length=1.6, small_steps=small_steps)
        kernel = dataclasses.replace(kernel, scale=torch.tensor([5.0, 5.0]))
        state = kernel.init(ridge(), x)
        for _ in range(20):
            state, _ = kernel.step(ridge(), state)
        moved[small_steps] = (state.x != x).any(-1).double().mean()
    assert moved[0.0] < 0.1 < 0.9 < moved[1.0]


def criterion(kernel, energy, state, length):
    """(2) and its gradient at a length, at the same momenta for all lengths."""
    torch.manual_seed(5)
    kernel = dataclasses.replace(
        kernel, trajectory_length=length, step_size=length / 40, jitter=0.0
    )
    _, info = kernel.step(energy, state)
    distances = []
    for x in (info.start.x, info.trajectory.end.x):
        z = x if kernel.scale is None else x / kernel.scale
        distances.append((z - z.mean(0)).square().sum(-1))
    median = distances[0].median()
    change = (median + distances[1]).log() - (median + distances[0]).log()
    return change.square().mean(), _criterion_grad(kernel, info)


@pytest.mark.parametrize("length", [0.5, 1.2, 2.0])
@pytest.mark.parametrize("scale", [None, [0.5, 1.0, 1.5]])
def test_gradient_is_that_of_the_criterion(length, scale):
    """Against a central difference, with common random numbers.

    Seen to fail without the length in (3), and with the momenta turned round.
    """
    energy = QuadraticEnergy(torch.zeros(3), torch.diag(torch.tensor([1.0, 3.0, 9.0])))
    kernel = ChEES(0.1, quantile=0.5, scale=scale and torch.tensor(scale))
    state = kernel.init(energy, torch.randn(4000, 3))
    _, grad = criterion(kernel, energy, state, length)
    high, low = (
        criterion(kernel, energy, state, length * math.exp(d))[0] for d in (0.01, -0.01)
    )
    torch.testing.assert_close(4 * grad, (high - low) / 0.02, rtol=0.03, atol=0.02)


def test_rejected_proposals_have_no_weight():
    kernel = ChEES(0.1, quantile=0.5)
    energy = standard(3)
    state = kernel.init(energy, torch.randn(50, 3))
    _, info = kernel.step(energy, state)
    bad = torch.arange(50) >= 30
    worse = TrajectoryInfo(
        info.accept_prob.where(~bad, 0.0), info.accepted & ~bad, ~bad
    )
    end, momentum, ratio = info.trajectory
    end = end._replace(x=end.x.where(~bad[:, None], torch.nan))
    momentum = momentum.where(~bad[:, None], torch.inf)
    worse.start, worse.length = state, info.length
    worse.trajectory = info.trajectory._replace(end=end, momentum=momentum)
    grad = _criterion_grad(kernel, worse)
    # Only the mean and the median of the starting points know of the other chains.
    assert grad.isfinite()
    adaptation = TrajectoryAdaptation(kernel)
    adaptation.update(kernel, worse)
    assert adaptation.log_length.isfinite()
    none = TrajectoryInfo(*(torch.zeros_like(part) for part in info))
    none.start, none.trajectory, none.length = state, worse.trajectory, info.length
    before = adaptation.log_length
    adaptation.update(kernel, none)
    assert adaptation.log_length == before


@pytest.mark.parametrize("start", [0.4, math.pi / 2, 6.0])
def test_length_settles_from_both_sides(start):
    """In a round Gaussian at a quarter of the period, where (2) is largest."""
    energy = standard(10)
    kernel = ChEES(0.2, trajectory_length=start)
    state = kernel.init(energy, torch.randn(256, 10))
    adaptation = kernel.adaptation()
    for _ in range(60):
        current = adaptation.current(kernel)
        state, info = current.step(energy, state)
        adaptation.update(current, info)
    length = adaptation.frozen(kernel).trajectory_length / adaptation.STRETCH
    # From far above, the criterion is periodic: one of its other maxima will do.
    assert 1.0 < length < 2.0 or (start == 6.0 and length < 6.0)


def test_one_chain_keeps_the_length_that_it_was_given():
    energy = standard(3)
    kernel = ChEES(trajectory_length=1.3)
    state = kernel.init(energy, torch.randn(1, 3))
    warmup, _ = warm_up(kernel, energy, state, 50)
    assert warmup.kernel.trajectory_length == pytest.approx(1.3)


@pytest.mark.parametrize("num_chains", [2, 4, 8])
def test_few_chains_stay_sensible(num_chains):
    energy = QuadraticEnergy(torch.zeros(3), torch.diag(torch.tensor([1.0, 9.0, 99.0])))
    kernel = ChEES()
    state = kernel.init(energy, torch.randn(num_chains, 3))
    warmup, _ = warm_up(kernel, energy, state, 200)
    assert 0.5 < warmup.kernel.trajectory_length < 5
    assert 0.4 < warmup.kernel.step_size < 1.8


def test_length_is_held_to_half_of_the_most_steps():
    energy = QuadraticEnergy(torch.zeros(2), torch.diag(torch.tensor([1.0, 1e6])))
    kernel = ChEES(1e-3, max_leapfrog=20)
    state = kernel.init(energy, torch.randn(64, 2) * torch.tensor([1.0, 1e-3]))
    adaptation = kernel.adaptation()
    for _ in range(30):
        current = adaptation.current(kernel)
        assert current.num_gradients <= 20
        state, info = current.step(energy, state)
        adaptation.update(current, info)
        assert adaptation.current(kernel).trajectory_length <= 1e-3 * 10 * (1 + 1e-6)


def test_frozen_kernel_carries_no_trajectories():
    energy, kernel = standard(), ChEES()
    state = kernel.init(energy, torch.randn(64, 5))
    warmup, state = warm_up(kernel, energy, state, 10)
    _, info = warmup.kernel.step(energy, state)
    assert type(info) is StepInfo
    assert isinstance(warmup.kernel.trajectory_length, float)
    assert isinstance(warmup.kernel.step_size, float)


def test_adaptation_wants_the_info_of_the_warm_up():
    kernel, energy = ChEES(), standard()
    _, info = kernel.step(energy, kernel.init(energy, torch.randn(4, 5)))
    with pytest.raises(TypeError, match="TrajectoryInfo"):
        kernel.adaptation().update(kernel, info)


@pytest.mark.parametrize(
    "settings",
    [
        {"trajectory_length": 0.0},
        {"trajectory_length": math.inf},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"max_leapfrog": 0},
        {"quantile": 1.5},
        {"quantile": math.nan},
        {"small_steps": -0.1},
        {"small_steps": 1.1},
    ],
)
def test_invalid_settings(settings):
    (argument,) = settings
    with pytest.raises(ValueError, match=argument):
        ChEES(**settings)


def effective_per_1000_gradients(energy, num_chains, num_steps, num_draws):
    """Least effective draws of a chain for 1,000 of its gradients, over coordinates."""
    counting, kernel = CountingEnergy(energy), ChEES()
    (dim,) = energy.event_shape
    state = kernel.init(energy, 4 * torch.rand(num_chains, dim) - 2)
    warmup, state = warm_up(kernel, energy, state, num_steps)
    kernel, draws = warmup.kernel, []
    for _ in range(num_draws):
        state, _ = kernel.step(counting, state)
        draws.append(state.x)
    ess = pyro.ops.stats.effective_sample_size(
        torch.stack(draws), chain_dim=1, sample_dim=0
    )
    return 1000 * ess.min() / counting.num_gradients


def test_effective_draws_on_an_ill_conditioned_gaussian():
    """At least 12; 15 to 28 were seen, and 2.5 with a tenth of the adapted length."""
    energy = rotated(10)
    assert effective_per_1000_gradients(energy, 64, 150, 150) > 12


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "least"), [(10, 14), (100, 12)])
@pytest.mark.parametrize("num_chains", [64, 1024])
def test_effective_draws_at_length(dim, least, num_chains):
    energy = rotated(dim)
    assert effective_per_1000_gradients(energy, num_chains, 150, 150) > least
