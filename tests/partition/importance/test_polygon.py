"""Densities of single coordinates: polygons with Pareto tails.

Faults that a test is meant to catch are named with it.
"""

import math

import pyro.distributions as dist
import torch

from pyro_ebm.partition.importance.polygon import Polygons, fit_polygons


def columns(num):
    """Two wells, heavy tails, and an edge."""
    wells = torch.where(torch.rand(num) < 0.3, -3.0, 1.0) + 0.4 * torch.randn(num)
    heavy = dist.StudentT(2.0).sample((num,))
    return torch.stack([wells, heavy, dist.Exponential(1.0).sample((num,))], 1)


def fitted(num=5000):
    return fit_polygons(columns(num), torch.full((num,), 1 / num))


def test_each_density_integrates_to_one():
    """Fault: the area of a hat at the end."""
    found = fitted()
    middle = torch.linspace(-20, 20, 100_001)
    # Beyond, by the logarithm of the distance.
    log_far = torch.linspace(math.log(20), math.log(1e9), 20_001)
    inside = torch.trapezoid(
        found.log_prob(middle[:, None].expand(-1, 3)).exp(), middle, dim=0
    )
    for sign in (-1, 1):
        x = (sign * log_far.exp())[:, None].expand(-1, 3)
        density = (found.log_prob(x) + log_far[:, None]).exp()
        inside = inside + torch.trapezoid(density, log_far, dim=0)
    torch.testing.assert_close(inside, torch.ones(3), atol=2e-3, rtol=0)


def test_draws_follow_the_density():
    """By the ratio to a wide density, cell by cell. Fault: a tail on the
    wrong side."""
    found, num = fitted(), 200_000
    draws = found.sample(num)
    assert draws.shape == (num, 3)
    wide = dist.StudentT(1.0, torch.zeros(3), 2.0)
    x = wide.sample((num,))
    weights = (found.log_prob(x) - wide.log_prob(x)).exp()
    for low, high in [(-1e9, -4.0), (-4.0, -2.9), (-2.9, 0.1), (0.1, 0.9), (2.0, 1e9)]:
        share = ((draws > low) & (draws < high)).double().mean(0)
        weighted = weights * ((x > low) & (x < high))
        error = (weighted.var(0) + share * (1 - share)) / num
        z = (share - weighted.mean(0)) / error.sqrt().clamp(min=1e-9)
        assert (z.abs() < 4.5).all(), (low, high, z)


def test_draws_of_a_few_hats():
    """In narrow cells. Fault: the triangle the wrong way round."""
    tails = torch.tensor([[[0.05], [0.1]], [[1.0], [0.5]], [[0.2], [0.3]]])
    found = Polygons(
        torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.2, 0.5, 0.15]]), tails
    )
    draws, step = found.sample(100_000), 0.25
    for low in torch.arange(-1.0, 4.0, step).tolist():
        cell = torch.linspace(low + 1e-9, low + step - 1e-9, 101)
        share = torch.trapezoid(found.log_prob(cell[:, None]).exp()[:, 0], cell)
        seen = ((draws > low) & (draws < low + step)).double().mean()
        assert abs(seen - share) < 4.5 * math.sqrt(share / len(draws)), low


def test_it_is_near_the_density_of_the_draws():
    """Each within a tenth of a nat, and a tail no lighter than the truth. Fault: the
    shares are not divided by the areas of the hats."""
    x = columns(20_000)
    truth = [
        (
            dist.Normal(-3.0, 0.4).log_prob(x[:, 0]) + math.log(0.3),
            dist.Normal(1.0, 0.4).log_prob(x[:, 0]) + math.log(0.7),
        ),
        (dist.StudentT(2.0).log_prob(x[:, 1]),),
        (dist.Exponential(1.0).log_prob(x[:, 2]),),
    ]
    truth = torch.stack([torch.stack(parts).logsumexp(0) for parts in truth], 1)
    ratio = truth - fitted().log_prob(x)
    assert (ratio.mean(0) < 0.05).all(), ratio.mean(0)
    chi_squared = ratio.exp().mean(0) - 1  # of the weights of draws of the density
    assert (chi_squared < 0.1).all(), chi_squared
    assert ratio.max() < 5


def test_weights_stand_for_draws():
    """Draws of a wide density, weighed. Fault: weights in the order of the draws."""
    wide, target = dist.Normal(0.0, 3.0), dist.Normal(1.0, 0.7)
    x = wide.sample((20_000, 1))
    weights = (target.log_prob(x) - wide.log_prob(x))[:, 0].softmax(0)
    found = fit_polygons(x, weights)
    fresh = target.sample((20_000, 1))
    loss = (target.log_prob(fresh) - found.log_prob(fresh)).mean()
    assert loss < 0.05


def test_draws_on_top_of_each_other_make_no_spike():
    """Half of them at zero. Fault: knots at the same place."""
    x = torch.cat([torch.zeros(2000, 1), torch.randn(2000, 1)])
    found = fit_polygons(x, torch.full((4000,), 1 / 4000))
    assert found.knots.diff().min() > 0
    assert found.log_prob(x).isfinite().all()
    assert found.sample(1000).isfinite().all()
