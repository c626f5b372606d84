"""The metric of few directions: its matrix, and what it learns from rows.

Faults that a test is meant to catch are named with it, and were seen to be caught.
"""

import pytest
import torch

from pyro_ebm.mcmc.kernels.metric import (
    DrawRows,
    LowRank,
    low_rank_metric,
    times_scale,
    times_transposed,
    whiten,
)


def orthonormal(size, rank):
    return torch.linalg.qr(torch.randn(size, rank)).Q


def example(size=6, rank=2):
    stretch = torch.tensor([4.0, 0.2])[:rank]
    return LowRank(torch.rand(size) + 0.5, orthonormal(size, rank), stretch)


def matrix_of(metric):
    """``diag(scale) (I + U (Lambda - I) U^T)`` written out."""
    inner = torch.eye(len(metric.scale))
    inner = inner + metric.directions * (metric.stretch - 1) @ metric.directions.mT
    return metric.scale[:, None] * inner


def test_products_are_those_of_the_matrix():
    """Fault: the scale after the stretch in the transposed product."""
    metric, z = example(), torch.randn(5, 6)
    matrix = matrix_of(metric)
    torch.testing.assert_close(times_scale(z, metric), z @ matrix.mT)
    torch.testing.assert_close(times_transposed(z, metric), z @ matrix)
    torch.testing.assert_close(whiten(times_scale(z, metric), None, metric), z)


def rows_of_gaussian(covariance, groups=4, count=60):
    """Narrow draws of groups, of a size of their own, and the gradients there."""
    x = torch.randn(groups, count, len(covariance)) * (0.1 + torch.rand(groups, 1, 1))
    x = x - x.mean(1, keepdim=True)
    return x, x @ covariance.inverse()


def stretched(size, values):
    """A covariance of independent coordinates but for a few directions."""
    axes = orthonormal(size, len(values))
    return torch.eye(size) + axes * (torch.tensor(values) - 1) @ axes.mT


@pytest.mark.parametrize("count", [60, 20])
def test_exact_on_a_gaussian_from_any_draws(count):
    """With fewer rows than coordinates too, as draw and gradient share their noise.

    Faults: the directions of the draws alone; groups with weights of their own.
    """
    size = 100
    covariance = stretched(size, [25.0, 9.0, 0.01])
    x, grad = rows_of_gaussian(covariance, count=count)
    metric = low_rank_metric(x, grad, torch.ones(size))
    want = torch.tensor([0.01, 9.0, 25.0])
    torch.testing.assert_close(metric.stretch.square(), want, rtol=0.15, atol=0.0)
    assert len(metric.stretch) == 3
    white = metric.whiten(metric.whiten(covariance).mT)
    values = torch.linalg.eigvalsh(white)
    assert values[-1] / values[0] < 12  # of the covariance: 2,500


def test_the_scale_is_that_of_the_diagonal_metric():
    """Fault: gradients divided by the scale, as the draws are."""
    inner = stretched(50, [30.0, 20.0])
    scale = torch.logspace(-3, 3, 50)
    covariance = inner * scale[:, None] * scale
    x, grad = rows_of_gaussian(inner)
    x, grad = x * scale, grad / scale
    metric = low_rank_metric(x, grad, scale)
    assert torch.equal(metric.scale, scale)
    matrix = matrix_of(metric) / scale[:, None]
    torch.testing.assert_close(
        matrix @ matrix.mT, covariance / scale / scale[:, None], atol=0.05, rtol=0.05
    )


def test_noise_stretches_nothing():
    """Independent coordinates whose gradients have noise of their own.

    Faults: a cutoff of 1.2; one that does not know how few the rows are.
    """
    for count in (100, 400):
        x, grad = torch.randn(2, 4, count, 60)
        noisy = x - x.mean(1, keepdim=True), grad - grad.mean(1, keepdim=True)
        assert low_rank_metric(*noisy, torch.ones(60)) is None


def test_a_stray_group_sets_no_metric():
    """Fault: all groups are taken as they are."""
    covariance = stretched(40, [16.0])
    x, grad = rows_of_gaussian(covariance)
    x[0] = 1e6 * torch.randn_like(x[0])
    metric = low_rank_metric(x, grad, torch.ones(40))
    torch.testing.assert_close(metric.stretch, torch.tensor([4.0]), rtol=1e-3, atol=0.0)


def test_nothing_is_learned_from_draws_that_are_not_finite_or_do_not_move():
    zeros = torch.zeros(2, 10, 30)
    assert low_rank_metric(zeros, zeros, torch.ones(30)) is None
    assert low_rank_metric(zeros * torch.nan, zeros, torch.ones(30)) is None


def test_rows_are_spread_over_the_window_and_centred_by_group():
    """Faults: the first draws only; a mean over all groups; weights not their roots."""
    kept = DrawRows(num_chains=4, size=3, num_draws=90).to(torch.float64)
    kept.rows, kept.weights = kept.rows[:, :5], kept.weights[:5]
    rows, weights = torch.randn(20, 2, 4, 3) + 5, torch.rand(20, 4)
    for number in range(20):
        kept.update(rows[number], weights[number], number, expected=20)
    assert int(kept.count) == 5
    torch.testing.assert_close(kept.rows, rows[::4].transpose(0, 1))
    draws, _ = kept.by_group(2)
    own, w = rows[::4, 0, :2].reshape(-1, 3), weights[::4, :2].reshape(-1, 1)
    want = own.mT.cov(correction=0, aweights=w.flatten()) * w.sum()
    torch.testing.assert_close(draws[0].mT @ draws[0], want)
    kept.reset()
    assert int(kept.count) == 0


def test_saved_rows_are_not_changed_by_going_on():
    """Fault: rows written into the buffer that a saved state shares."""
    kept = DrawRows(num_chains=4, size=3, num_draws=90).to(torch.float64)
    kept.update(torch.randn(2, 4, 3), torch.rand(4), 0, expected=2)
    saved = kept.state_dict()
    before = str(saved)
    kept.update(torch.randn(2, 4, 3), torch.rand(4), 1, expected=2)
    assert str(saved) == before != str(kept.state_dict())
