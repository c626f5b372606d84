"""The referee of the statistical tests."""

import pytest
import torch

from pyro_ebm.testing import assert_moments


def test_true_moments_pass():
    x = 3 + 2 * torch.randn(5000, 4)
    assert_moments(x, 3.0, 4.0)
    assert_moments(x, torch.full((4,), 3.0), torch.full((4,), 4.0))
    assert_moments(x, 3.0, 4.0, fourth_central_moment=3 * 4.0**2)
    assert_moments(x[:, 0], 3.0, 4.0)


@pytest.mark.parametrize(
    ("mean", "variance", "message"),
    [
        (torch.tensor([3.0, 3.2]), 4.0, "mean of coordinate 1 is .* true 3.2"),
        (3.0, torch.tensor([4.0, 5.0]), "variance of coordinate 1 is .* true 5"),
    ],
)
def test_wrong_moments_fail(mean, variance, message):
    with pytest.raises(AssertionError, match=message):
        assert_moments(3 + 2 * torch.randn(5000, 2), mean, variance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_draws_fail(bad):
    x = torch.randn(5000, 2)
    x[7, 1] = bad
    with pytest.raises(AssertionError, match="mean of coordinate 1"):
        assert_moments(x, 0.0, 1.0)


def test_statistics_are_standard_normal():
    """The share of false alarms at |z| < 4 is far below one in a hundred, and both
    statistics have unit variance."""
    means, variances = [], []
    for _ in range(300):
        x = torch.randn(400)
        means.append(x.mean() * 20)
        variances.append((x.square().mean() - 1) / (2 / 400) ** 0.5)
        assert_moments(x, 0.0, 1.0, fourth_central_moment=3.0)
    for z in (torch.stack(means), torch.stack(variances)):
        assert 0.8 < z.std() < 1.2
