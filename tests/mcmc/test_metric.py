"""Pooled moments, and the scale matrix."""

import pytest
import torch

from pyro_ebm.mcmc.metric import PooledMoments, times_scale, times_transposed, whiten


@pytest.mark.parametrize("event", [(), (3,), (2, 2)])
def test_moments_are_those_of_all_draws_together(event):
    moments = PooledMoments(event)
    parts = [torch.randn(n, *event) + n for n in (1, 5, 30)]
    for part in parts:
        moments.update(part)
    draws = torch.cat(parts).flatten(1) if event else torch.cat(parts)[:, None]
    assert moments.count == 36
    torch.testing.assert_close(moments.mean, draws.mean(0))
    torch.testing.assert_close(moments.covariance(), draws.var(0, correction=0))


def test_dense_covariance():
    moments = PooledMoments((3,), is_dense=True)
    draws = torch.randn(4, 50, 3) @ torch.randn(3, 3)
    for part in draws:
        moments.update(part)
    want = draws.flatten(0, 1).mT.cov(correction=0)
    torch.testing.assert_close(moments.covariance(), want)


def test_moments_far_from_the_origin_in_single_precision():
    """Seen to fail where the scatter was taken about zero."""
    moments = PooledMoments((2,)).to(torch.float32)
    for _ in range(20):
        moments.update(1000 + 0.01 * torch.randn(100, 2))
    deviation = moments.covariance().sqrt().double()
    torch.testing.assert_close(deviation, torch.full((2,), 0.01), rtol=0.1, atol=0.0)


def test_moments_can_be_reset_and_saved():
    first, second = PooledMoments((2,)), PooledMoments((2,))
    first.update(torch.randn(5, 2))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.covariance(), first.covariance())
    first.reset()
    assert first.count == 0
    assert second.count == 5


def test_whitening_undoes_the_scale():
    z, tril = torch.randn(5, 3), torch.randn(3, 3).tril() + 2 * torch.eye(3)
    torch.testing.assert_close(whiten(times_scale(z, tril), None, tril), z)
    scale = torch.rand(3) + 0.5
    torch.testing.assert_close(whiten(z * scale, scale, None), z)
    assert whiten(z, None, None) is z
    torch.testing.assert_close(times_transposed(z, tril), z @ tril)
