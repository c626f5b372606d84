"""Mixtures of Student t distributions, fitted to one coordinate at a time."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.partition.importance.marginals import fit_marginals, spread_of


def bimodal(*shape):
    """A third of the mass at -3 with scale 0.5, the rest at 4 with scale 1."""
    left = torch.rand(shape) < 1 / 3
    return torch.where(left, torch.randn(shape) / 2 - 3, torch.randn(shape) + 4)


def log_bimodal(x):
    left = dist.Normal(-3.0, 0.5).log_prob(x) - math.log(3)
    return torch.logaddexp(left, dist.Normal(4.0, 1.0).log_prob(x) + math.log(2 / 3))


def components(fitted):
    """Of the mixture over coordinates, shape ``(D, K)``."""
    mixture = fitted.base_dist
    return mixture.component_distribution, mixture.mixture_distribution.probs


def on_line(fitted, low, high, num=20_001):
    """Density of a fit to one coordinate on a grid, and the step of the grid."""
    line = torch.linspace(low, high, num)
    return line, fitted.log_prob(line[:, None]), line[1] - line[0]


def test_both_modes_are_recovered():
    """Within 0.01 nats of the truth. Planted: all components started at the median,
    where they stay together; seen to fail with 0.8 nats."""
    fitted = fit_marginals(bimodal(4000, 1))
    x = bimodal(20_000, 1)
    loss = log_bimodal(x[:, 0]) - fitted.log_prob(x)
    assert loss.mean() < 0.01
    line, log_density, step = on_line(fitted, -30, 30)
    left = log_density[line < 0].exp().sum() * step
    assert abs(left - 1 / 3) < 4 * math.sqrt(2 / 9 / 4000)


@pytest.mark.parametrize(
    ("draws", "degrees"),
    [
        (lambda: dist.StudentT(2.5).sample((4000,)), 2.5),
        (lambda: dist.StudentT(2.0).sample((4000,)), 2.5),
        (lambda: torch.randn(4000), 30.0),
        (lambda: torch.rand(4000), 30.0),
        (lambda: bimodal(4000), 30.0),
    ],
    ids=["t(2.5)", "t(2)", "normal", "uniform", "two modes"],
)
def test_each_tail_has_its_degrees_of_freedom(draws, degrees):
    """Planted: the least likely degrees for the most likely; all five fail."""
    fitted = fit_marginals(draws()[:, None])
    assert components(fitted)[0].df.unique().tolist() == [degrees]


def test_coordinates_are_fitted_apart():
    """Together as alone, wherever they are and of whatever size."""
    z = torch.stack([bimodal(1000), 1e3 + 1e-3 * torch.randn(1000)], -1)
    together = fit_marginals(z)
    alone = [fit_marginals(z[:, [k]]) for k in range(2)]
    x = torch.stack([bimodal(50), 1e3 + 1e-3 * torch.randn(50)], -1)
    parts = [fit.log_prob(x[:, [k]]) for k, fit in enumerate(alone)]
    torch.testing.assert_close(together.log_prob(x), sum(parts))


@pytest.mark.parametrize("wide", [False, True])
def test_the_density_integrates_to_one(wide):
    """By quadrature in asinh(x), so that tails are seen; what is left is below 1e-4.
    Planted: the scale left out of the density of a component; seen to fail."""
    z = dist.StudentT(2.5).sample((500, 1))
    fitted = fit_marginals(z, 9 * torch.randn(256, 1) if wide else None)
    y = torch.linspace(-16, 16, 20_001)
    density = fitted.log_prob(y.sinh()[:, None]) + y.cosh().log()
    total = density.exp().sum() * (y[1] - y[0])
    assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_draws_have_the_density():
    """The mean of p / q is one for draws of q; ``wide`` makes it a proposal for p."""
    z = bimodal(1000, 2)
    fitted = fit_marginals(z, 6 * torch.randn(256, 2), wide_weight=0.2)
    x = fitted.sample((50_000,))
    ratio = (log_bimodal(x).sum(-1) - fitted.log_prob(x)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(x) ** 0.5


def test_a_wide_component_has_the_share_asked_for():
    """Planted: the others not made smaller for it; seen to fail with 0.065 for 0.07."""
    z = torch.stack([torch.randn(2000), 5 + torch.randn(2000)], -1)
    wide = torch.stack([7 + 20 * torch.randn(5000), 40 * torch.randn(5000)], -1)
    fitted = fit_marginals(z, wide, wide_weight=0.07)
    parts, shares = components(fitted)
    torch.testing.assert_close(shares[:, -1], torch.tensor([0.07, 0.07]))
    torch.testing.assert_close(shares.sum(-1), torch.ones(2))
    middle, spread = parts.loc[:, -1], parts.scale[:, -1]
    torch.testing.assert_close(middle, wide.median(0).values)
    torch.testing.assert_close(spread, spread_of(wide))
    # Nothing else reaches so far.
    far = (fitted.sample((50_000,))[:, 0] - 7).abs() > 20
    share = 0.07 * 2 * dist.StudentT(30.0).rsample((200_000,)).gt(1).double().mean()
    assert abs(far.double().mean() - share) < 4 * math.sqrt(share / 50_000)


def test_no_component_collapses():
    """Ties, a coordinate that does not move, and a handful of draws."""
    tied = torch.randn(300, 1).round()
    still = torch.zeros(300, 1)
    for z in (tied, still, torch.randn(8, 1)):
        fitted = fit_marginals(z)
        parts, _ = components(fitted)
        assert (parts.scale > 0).all()
        assert fitted.log_prob(z).isfinite().all()


def test_the_spread_is_that_of_a_normal():
    """The interquartile range has a standard error of 1.36 / sqrt(n) of it."""
    z = torch.tensor([0.1, 3.0]) * torch.randn(20_000, 2)
    seen = spread_of(z) / torch.tensor([0.1, 3.0])
    assert (seen - 1).abs().max() < 4 * 1.36 / 20_000**0.5
