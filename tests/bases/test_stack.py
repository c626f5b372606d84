"""Mixtures of fitted densities, weighted by held-out rows."""

import numpy as np
import pyro.distributions as dist
import torch
from scipy import stats

from pyro_ebm.bases.stack import Stack, stacked


def parts():
    wide = dist.Normal(torch.zeros(1), 3.0).to_event(1)
    return [wide, dist.Laplace(torch.full((1,), 4.0), 0.5).to_event(1)]


def test_the_density_integrates_to_one_and_is_that_of_the_draws():
    """Faults: unnormalised weights; draws that are not shuffled or of one part."""
    mixture = Stack(parts(), torch.tensor([0.3, 0.7]))
    x = torch.linspace(-30, 30, 20001)
    density = mixture.log_prob(x[:, None]).exp()
    assert abs(torch.trapezoid(density, x) - 1) < 1e-4
    draws = mixture.sample((4000,))[:, 0]
    cumulative = torch.cumulative_trapezoid(density, x).numpy()
    found = stats.kstest(
        draws.numpy(), lambda at: np.interp(at, x[1:].numpy(), cumulative)
    )
    assert found.pvalue > 1e-3
    near = (draws - 4).abs() < 1
    assert abs(near[:2000].float().mean() - near[2000:].float().mean()) < 0.06


def test_the_weights_are_those_of_the_largest_likelihood():
    """Of (1), by a search over all weights."""
    rows = torch.cat([torch.randn(300, 1) * 3, 4 + 0.5 * torch.randn(500, 1)])
    found = stacked(parts(), rows)
    shares = torch.linspace(0.01, 0.99, 99)
    scores = torch.stack(
        [Stack(parts(), torch.stack([1 - s, s])).log_prob(rows).mean() for s in shares]
    )
    assert abs(found.probs[1] - shares[scores.argmax()]) < 0.011
    assert found.log_prob(rows).mean() >= scores.max() - 1e-6


def test_parts_of_little_weight_are_left_out():
    far = dist.Normal(torch.full((1,), 50.0), 0.1).to_event(1)
    found = stacked([*parts(), far], 3 * torch.randn(500, 1))
    assert far not in found.parts
    assert abs(found.probs.sum() - 1) < 1e-6


def test_rows_that_no_part_can_have_say_nothing():
    inside = dist.Uniform(torch.zeros(1), 1.0, validate_args=False).to_event(1)
    other = dist.Uniform(torch.zeros(1), 2.0, validate_args=False).to_event(1)
    rows = torch.cat([torch.rand(50, 1), torch.full((3, 1), 5.0)])
    assert stacked([inside, other], rows).probs.isfinite().all()
