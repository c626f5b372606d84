"""What site energies have in common: their path from uniform sites."""

import pytest
import torch

from pyro_ebm.energies import BoltzmannEnergy, ChainEnergy, FactorGraphEnergy
from pyro_ebm.energies.discrete.finite import finite_points, num_points


def uneven():
    table = torch.randn(2, 3)
    table[0, 2] = -torch.inf
    return FactorGraphEnergy([2, 3, 1], [((0, 1), table), ((1, 2), torch.randn(3, 1))])


CASES = {
    "chain": lambda: ChainEnergy(torch.randn(3, 2), torch.randn(2, 2)),
    "machine": lambda: BoltzmannEnergy(torch.randn(4, 4).triu(1), spins=True),
    "uneven": uneven,
}


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_annealing_path(build):
    """Planted fault: zero times infinity at the start."""
    energy = build()
    path = energy.annealing_path()
    count = num_points(energy.support, energy.event_shape)
    number = torch.arange(count)
    x = finite_points(energy.support, energy.event_shape, number, energy.values)
    log_prob = path.start.distribution.log_prob(x)
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(path.start.log_partition.expand(count), -log_prob)
    torch.testing.assert_close(path.at(0.0)(x), torch.zeros(count))
    allowed, between = energy(x).isfinite(), path.at(0.3)(x)
    torch.testing.assert_close(between[allowed], 0.3 * energy(x[allowed]))
    if not allowed.all():  # at a price
        assert between[~allowed].isfinite().all()
        assert (between[~allowed] > between[allowed].max()).all()
    torch.testing.assert_close(path.at(1.0)(x), energy(x))
    for beta in (0.0, 0.3, 1.0):
        between = path.at(beta)
        assert between.blocks.equal(energy.blocks)
        probs = between.site_logits(x).softmax(0)
        index = torch.searchsorted(energy.values, x)
        inside = energy(x).isfinite()
        assert (probs.gather(0, index[None])[0, inside] > 0).all()
    missing = torch.tensor([2, 3, 1]) if build is uneven else None
    if missing is not None:
        logits = path.at(0.0).site_logits(x)
        has = torch.arange(3)[:, None] < missing
        assert logits.eq(0).equal(has[:, None].expand_as(logits))
