"""Independent sites against Pyro's own distributions, and by enumeration."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.energies import DistributionEnergy, spins
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.energies.discrete.independent import IndependentSites

BITS = constraints.independent(constraints.boolean, 2)


def test_two_values_are_bernoulli():
    logits = torch.randn(2, 3)
    sites = IndependentSites(BITS, torch.stack([torch.zeros(2, 3), logits]))
    bernoulli = dist.Bernoulli(logits=logits).to_event(2)
    x = bernoulli.sample((5,))
    torch.testing.assert_close(sites.log_prob(x), bernoulli.log_prob(x))
    assert sites.expand((4,)).log_prob(x[:, None]).shape == (5, 4)


@pytest.mark.parametrize(
    "support",
    [spins, constraints.integer_interval(-1, torch.tensor([0, 1, 2]))],
    ids=["spins", "ragged"],
)
def test_probabilities_add_up_and_draws_have_them(support):
    """Seen to fail with the counts of the wrong value, and without the mask of the
    states that a site lacks."""
    support = constraints.independent(support, 1)
    number = torch.arange(num_points(support, (3,)))
    points = finite_points(support, (3,), number, torch.empty(0))
    sites = IndependentSites.fitted(support, points[torch.randint(len(points), (40,))])
    p = sites.log_prob(points).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    draws = sites.sample((20_000,))
    assert support.check(draws).all()
    mean, own = p @ points, draws.mean(0)
    assert (own - mean).abs().max() < 4 * (draws.std(0) / 20_000**0.5).max()
    assert DistributionEnergy(sites)(torch.full((3,), 7.0)) == torch.inf


def test_smoothed_counts():
    data = torch.tensor([[1.0], [1.0], [-1.0]])
    sites = IndependentSites.fitted(constraints.independent(spins, 1), data)
    torch.testing.assert_close(
        sites.log_probs.exp(), torch.tensor([[1.5 / 4], [2.5 / 4]])
    )


def test_wrong_arguments():
    with pytest.raises(ValueError, match="a row for each of its values"):
        IndependentSites(BITS, torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="2 event dimensions"):
        IndependentSites(BITS, torch.zeros(2, 2))
