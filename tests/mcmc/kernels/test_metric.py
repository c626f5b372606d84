"""Moments by groups, the metrics made from them, and the scale matrix.

Faults that a test is meant to catch are named with it, and were seen to be caught.
"""

import pytest
import torch

from pyro_ebm.mcmc.kernels.metric import (
    DrawRows,
    GroupMoments,
    LowRank,
    dense_metric,
    diagonal_metrics,
    geometric_mean,
    low_rank_metric,
    times_scale,
    times_transposed,
    typical,
    whiten,
)


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("event", [(), (3,), (2, 2)])
def test_moments_are_those_of_all_draws_together(event, num_groups):
    """Fault: groups of every fourth chain in place of chains side by side."""
    moments = GroupMoments(event, num_groups)
    parts = [torch.randn(num_groups, n, *event) + n for n in (1, 5, 30)]
    for part in parts:
        moments.update(part.flatten(0, 1))
    draws = torch.cat(parts, 1).reshape(num_groups, 36, -1)
    assert (moments.count == 36).all()
    torch.testing.assert_close(moments.mean, draws.mean(1))
    torch.testing.assert_close(moments.covariance(), draws.var(1, correction=0))


def test_weights_are_those_of_the_draws():
    """Fault: the weight left out of the mean."""
    draws, weight = torch.randn(2, 60, 3), 2.0 ** torch.randint(4, (2, 60))
    for is_dense in (False, True):
        moments = GroupMoments((3,), 2, is_dense=is_dense)
        for x, w in zip(draws.split(15, 1), weight.split(15, 1), strict=True):
            moments.update(x.flatten(0, 1), w.flatten())
        want = [
            d.mT.cov(correction=0, aweights=w)
            for d, w in zip(draws, weight, strict=True)
        ]
        want = torch.stack(want)
        want = want if is_dense else want.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(moments.covariance(), want)


def test_dense_covariance():
    moments = GroupMoments((3,), 2, is_dense=True)
    draws = torch.randn(4, 2, 50, 3) @ torch.randn(3, 3)
    for part in draws:
        moments.update(part.flatten(0, 1))
    want = [draws[:, g].flatten(0, 1).mT.cov(correction=0) for g in range(2)]
    torch.testing.assert_close(moments.covariance(), torch.stack(want))


def test_moments_far_from_the_origin_in_single_precision():
    """Seen to fail where the scatter was taken about zero."""
    moments = GroupMoments((2,)).to(torch.float32)
    for _ in range(20):
        moments.update(1000 + 0.01 * torch.randn(100, 2))
    deviation = moments.covariance().sqrt().double()
    torch.testing.assert_close(deviation, torch.full((1, 2), 0.01), rtol=0.1, atol=0.0)


def test_moments_can_be_reset_and_saved():
    first, second = GroupMoments((2,)), GroupMoments((2,))
    first.update(torch.randn(5, 2))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.covariance(), first.covariance())
    first.reset()
    assert first.count == 0
    assert second.count == 5


def covariance(size=4):
    factor = torch.randn(size, size).tril() + torch.eye(size)
    return factor @ factor.mT


def of_gaussian(target, groups=6, count=20):
    """Covariances of any draws, here of narrow ones, and of the gradients there."""
    x = 0.1 * torch.randn(groups, count, len(target)) * torch.rand(groups, 1, 1)
    grad = x @ target.inverse()
    centred = (v - v.mean(1, keepdim=True) for v in (x, grad))
    return tuple(c.mT @ c / count for c in centred)


def test_the_geometric_mean_solves_its_equation():
    """Fault: the square root of the product, which is not symmetric."""
    a, b = covariance(), covariance()
    mean = geometric_mean(a, b)
    torch.testing.assert_close(mean @ a @ mean, b)
    torch.testing.assert_close(mean, mean.mT)
    assert (torch.linalg.eigvalsh(mean) > 0).all()
    assert geometric_mean(-a, b).isnan().all()


def test_a_dense_metric_is_exact_on_a_gaussian_from_any_draws():
    """Fault: groups with weights of their own for draws and gradients."""
    target = covariance()
    x, grad = of_gaussian(target)
    scales = diagonal_metrics(*(c.diagonal(dim1=1, dim2=2) for c in (x, grad)))
    factor = dense_metric(x, grad, typical(scales))
    torch.testing.assert_close(factor @ factor.mT, target)
    torch.testing.assert_close(factor, factor.tril())


def test_a_diagonal_metric_is_exact_on_independent_coordinates():
    """Fault: the square root of the ratio, which is a variance."""
    target = torch.tensor([1e-4, 1.0, 25.0]).diag()
    x, grad = of_gaussian(target)
    scales = diagonal_metrics(*(c.diagonal(dim1=1, dim2=2) for c in (x, grad)))
    want = target.diagonal().sqrt()
    torch.testing.assert_close(scales, want.expand(6, 3))
    torch.testing.assert_close(typical(scales), want)
    assert dense_metric(x, grad, want) is None  # which would change nothing


def test_a_stray_group_sets_no_metric():
    """Fault: the mean over the groups, of variances or of covariances."""
    target = covariance()
    x, grad = of_gaussian(target)
    x[0] = 1e8 * torch.eye(4)
    scales = diagonal_metrics(*(c.diagonal(dim1=1, dim2=2) for c in (x, grad)))
    factor = dense_metric(x, grad, typical(scales))
    torch.testing.assert_close(factor @ factor.mT, target)


def test_scales_without_a_gradient_or_a_move():
    variance = torch.tensor([[4.0, 4.0, 0.0], [0.0, 4.0, 0.0]])
    grad_variance = torch.tensor([[0.25, 0.0, 0.0], [0.0, 0.0, 0.0]])
    scales = diagonal_metrics(variance, grad_variance)
    assert scales.tolist() == [[2.0, 2.0, 0.0], [0.0, 2.0, 0.0]]
    assert typical(scales)[:2].tolist() == [2.0, 2.0]
    assert typical(scales)[2].isnan()
    dense = variance[:, :, None] * torch.eye(3)
    assert dense_metric(dense, dense, torch.ones(3)) is None


def test_whitening_undoes_the_scale():
    z, tril = torch.randn(5, 3), torch.randn(3, 3).tril() + 2 * torch.eye(3)
    torch.testing.assert_close(whiten(times_scale(z, tril), None, tril), z)
    scale = torch.rand(3) + 0.5
    torch.testing.assert_close(whiten(z * scale, scale, None), z)
    assert whiten(z, None, None) is z
    torch.testing.assert_close(times_transposed(z, tril), z @ tril)


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


def test_a_stray_group_sets_no_low_rank_metric():
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
