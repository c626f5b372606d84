"""Particles that travel a path of which everything is known.

The path leads from a standard normal to an unnormalised Gaussian, so that it is
Gaussian everywhere, and a mover can draw afresh. Faults that a
test is meant to catch are named with it.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.mcmc import HMC
from pyro_ebm.partition.bridge.bennett import bennett, solve
from pyro_ebm.partition.particles.engine import travel
from pyro_ebm.partition.particles.movers import with_metric, with_step_size

PRECISION, CENTRE = 9.0, 1.0
#: Of exp(-9 (x - 1)^2 / 2).
TRUTH = math.log(2 * math.pi / PRECISION) / 2


class State(NamedTuple):
    """Particles, chain shape ``(M, N)``."""

    x: Tensor

    def log_weight(self, low, high):
        base = self.x.square() / 2 + math.log(2 * math.pi) / 2
        target = PRECISION * (self.x - CENTRE).square() / 2
        return (high - low) * (base - target)

    def select(self, chains):
        return State(self.x[chains])


def drawn(beta, num_islands, num):
    """Exact draws at a temperature."""
    precision = 1 - beta + beta * PRECISION
    loc = beta * PRECISION * CENTRE / precision
    return State(loc + torch.randn(num_islands, num) / math.sqrt(precision))


def fresh(num):
    """A mover that draws so many anew, and keeps what it was given."""

    def move(population, log_weights, ancestors, beta):
        move.calls.append((population, log_weights, ancestors, beta))
        return drawn(beta, len(population.x), num)

    move.calls = []
    return move


def assert_mean(values, truth, largest_error=0.02):
    error = values.std().item() / math.sqrt(len(values))
    assert error < largest_error
    assert abs(values.mean().item() - truth) < 4 * error


def test_all_three_sums_find_the_truth():
    """Fault: the sign within ``reverse``; its weights those of the particles before;
    Bennett's ratio with its two sides exchanged."""
    journey = travel(drawn(0.0, 32, 2000), fresh(2000), ess_threshold=0.8)
    assert journey.has_arrived
    assert journey.inverse_temperatures[0] == 0
    assert journey.inverse_temperatures[-1] == 1
    for values in (journey.forward, journey.bennett, journey.reverse):
        assert values.shape == (32,)
        assert values.dtype == torch.float64
        assert_mean(values, TRUTH)


def test_forward_errs_downwards_and_reverse_upwards():
    """Of ten particles, over four thousand islands. Fault: as above."""
    betas = [0.0, 0.1, 0.4, 1.0]
    journey = travel(drawn(0.0, 4000, 10), fresh(10), inverse_temperatures=betas)
    below, between, above = (
        (values - TRUTH).mean().item()
        for values in (journey.forward, journey.bennett, journey.reverse)
    )
    assert below < -0.05
    assert above > 0.05
    assert abs(between) < 0.5 * min(-below, above)


@pytest.mark.parametrize("first", [8000, 250])
def test_populations_of_unequal_sizes(first):
    """Fault: sums for means in Bennett's ratio, which is off by the log of 4."""
    betas = [0.0, 0.05, 0.2, 0.5, 1.0]
    move = fresh(2000 if first > 2000 else 1000)
    start = drawn(0.0, 32, first)
    journey = travel(start, move, inverse_temperatures=betas, num_ancestors=100)
    for values in (journey.forward, journey.bennett, journey.reverse):
        assert_mean(values, TRUTH, 0.04)


def test_a_fixed_schedule_in_either_direction():
    """Fault: backwards, the steps begin from 0."""
    betas = [0.0, 0.05, 0.2, 0.5, 1.0]
    up, down = fresh(1000), fresh(1000)
    there = travel(drawn(0.0, 32, 1000), up, inverse_temperatures=betas)
    back = travel(drawn(1.0, 32, 1000), down, inverse_temperatures=betas[::-1])
    assert there.inverse_temperatures == betas
    assert back.inverse_temperatures == betas[::-1]
    assert [call[3] for call in up.calls] == betas[1:]
    assert [call[3] for call in down.calls] == betas[-2::-1]
    assert there.has_arrived
    assert back.has_arrived
    for values in (back.forward, back.bennett, back.reverse):
        assert_mean(values, -TRUTH, 0.04)


def test_weights_add_up_where_none_is_resampled():
    """As in annealed importance sampling: their mean is Z. Fault: they are those of
    the last step; the particles are moved after the last one too."""
    betas = [0.0, 0.05, 0.2, 0.5, 1.0]
    start, move = drawn(0.0, 100, 1000), fresh(1000)
    journey = travel(start, move, inverse_temperatures=betas, moves_last=False)
    assert len(move.calls) == 3
    assert_mean((log_mean_exp(journey.log_weights) - TRUTH).exp(), 1.0)
    populations = [call[0] for call in move.calls] + [journey.state]
    steps = zip(populations, betas, betas[1:], strict=False)
    total = sum(state.log_weight(low, high) for state, low, high in steps)
    torch.testing.assert_close(journey.log_weights, total)


def test_ancestors_are_resampled_by_weight():
    """To the next Gaussian of the path. Fault: uniform weights; the same ancestors
    in all islands; weights that are kept after resampling."""
    betas, move = [0.0, 0.2, 1.0], fresh(5000)
    start = drawn(0.0, 16, 5000)
    journey = travel(start, move, inverse_temperatures=betas, num_ancestors=500)
    _, weights, ancestors, beta = move.calls[0]
    torch.testing.assert_close(weights, start.log_weight(0.0, 0.2))
    assert ancestors.x.shape == (16, 500)
    precision = 1 - beta + beta * PRECISION
    assert_mean(ancestors.x.mean(1), beta * PRECISION * CENTRE / precision)
    assert_mean(ancestors.x.var(1), 1 / precision)
    for island, old in zip(ancestors.x, start.x, strict=True):
        assert torch.isin(island, old).all()
    _, weights, _, _ = move.calls[1]
    torch.testing.assert_close(weights, move.calls[1][0].log_weight(0.2, 1.0))
    assert (journey.log_weights == 0).all()
    assert journey.log_weights.shape == (16, 5000)


def test_steps_are_as_long_as_the_worst_island_allows():
    """Fault: the mean over islands for the worst."""
    seen = []
    journey = travel(
        drawn(0.0, 8, 400), fresh(400), ess_threshold=0.7, look=seen.append
    )
    betas = journey.inverse_temperatures
    assert len(seen) == len(betas) == len(set(betas))
    for state, low, high in zip(seen, betas, betas[1:], strict=False):
        worst = effective_sample_fraction(state.log_weight(low, high)).min()
        assert worst > 0.69
        assert high == 1.0 or worst < 0.71
    assert 0.69 < journey.ess < 0.71


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_run_that_is_over_ends_where_it_is(num_steps):
    """Fault: the end of the path is not compared with where the run is."""
    move = fresh(100)
    journey = travel(
        drawn(0.0, 4, 100),
        move,
        ess_threshold=0.9,
        is_over=lambda: len(move.calls) >= num_steps,
    )
    assert not journey.has_arrived
    assert len(journey.inverse_temperatures) == num_steps + 1
    assert journey.inverse_temperatures[-1] < 1
    assert journey.forward.isfinite().all()
    assert num_steps or (journey.bennett == 0).all()


def test_a_path_that_does_not_end():
    with pytest.raises(DivergenceError, match="not ended after 3 temperatures"):
        travel(drawn(0.0, 4, 100), fresh(100), ess_threshold=0.99, max_temperatures=3)


def test_weights_without_any_spread_go_there_at_once():
    """And where they are extreme, a step is never none at all."""
    same = State(torch.ones(2, 50))
    journey = travel(same, lambda population, *_: population)
    assert journey.inverse_temperatures == [0.0, 1.0]
    torch.testing.assert_close(
        journey.forward, same.log_weight(0.0, 1.0)[:, 0], atol=1e-9, rtol=0
    )
    wide = State(1e160 * torch.randn(2, 50).abs())
    journey = travel(wide, lambda *_: drawn(1.0, 2, 50), max_temperatures=50)
    assert 0 < journey.inverse_temperatures[1] < 1e-300


# Bennett's ratio -------------------------------------------------------------------


def test_bennett_agrees_with_the_one_that_takes_samples_of_any_size():
    """Fault: the clamp of the weights before the difference is taken."""
    first, second = drawn(0.2, 6, 1000), drawn(0.5, 6, 1000)
    there, back = (state.log_weight(0.2, 0.5) for state in (first, second))
    found = solve(there, back)
    for value, one, other in zip(found, there, back, strict=True):
        assert value.item() == pytest.approx(bennett(one, other).log_ratio, abs=1e-6)
    moved = solve(there + 500, back + 500)
    torch.testing.assert_close(moved, found + 500)


def test_bennett_of_points_without_weight():
    """Half of the first have none: the ratio is 1 / 2. Fault: no clamp."""
    first = torch.tensor([[0.0, -math.inf] * 500])
    found = solve(first, torch.zeros(1, 1000))
    assert found.item() == pytest.approx(-math.log(2), abs=1e-6)


# Movers ----------------------------------------------------------------------------


def test_the_metric_is_that_of_the_weighted_population():
    """Fault: the weights are left out; the mean is."""
    factor = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    u = 5 + torch.randn(4, 20_000, 2) @ factor.mT
    # Weights that shift the first whitened coordinate leave the covariance as it is.
    z = torch.linalg.solve_triangular(factor, (u - 5).mT, upper=False)
    kernel = with_metric(HMC(0.3, 5), u, z[:, 0])
    assert (kernel.step_size, kernel.num_leapfrog, kernel.scale) == (0.3, 5, None)
    covariance = kernel.scale_tril @ kernel.scale_tril.mT
    torch.testing.assert_close(covariance, factor @ factor.mT, atol=0.1, rtol=0.05)


def test_points_of_a_vague_prior_do_not_set_the_scale():
    """Two of a hundred are at 1e6; a second mode at 50 scales is no outlier."""
    u = torch.randn(2, 5000, 3)
    u[:, ::50, 0] *= 1e6
    u[:, ::2, 1] = 50 + 0.1 * u[:, ::2, 1]
    scale = with_metric(HMC(), u, torch.zeros(2, 5000)).scale_tril.norm(dim=-1)
    assert 0.9 < scale[0] < 1.5
    assert 24 < scale[1] < 26
    assert abs(scale[2] - 1) < 0.05


def test_few_points_have_a_diagonal_metric():
    """Too few to tell correlations, or an event of some other shape."""
    few = with_metric(HMC(), torch.randn(1, 12, 6), torch.zeros(1, 12))
    assert few.scale_tril is None
    assert few.scale.shape == (6,)
    wide = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    image = with_metric(HMC(), wide * torch.randn(2, 5000, 2, 3), torch.zeros(2, 5000))
    torch.testing.assert_close(image.scale, wide, atol=0.0, rtol=0.05)


@pytest.mark.parametrize(("step_size", "number"), [(10.0, 1), (0.4, 4), (1e-3, 16)])
def test_a_trajectory_is_a_quarter_period(step_size, number):
    kernel = with_step_size(HMC(), torch.tensor(step_size))
    assert kernel.num_leapfrog == number
