"""Moments by groups, the metrics made from them, and the scale matrix.

Faults that a test is meant to catch are named with it, and were seen to be caught.
"""

import pytest
import torch

from pyro_ebm.mcmc.kernels.metric import (
    GroupMoments,
    dense_metric,
    diagonal_metrics,
    geometric_mean,
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
