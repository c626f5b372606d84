"""Ising and Potts lattices against sums written out bond by bond."""

import itertools
import math

import pytest
import torch

from pyro_ebm.energies import IsingEnergy, PottsEnergy
from pyro_ebm.energies.discrete.independent import IndependentSites

SHAPES = [(3,), (4, 4), (2, 5), (3, 5), (5, 3, 4), (1, 6)]


def lattices(shape, periodic):
    field = torch.randn(shape)
    return [
        IsingEnergy(shape, 0.4, periodic=periodic),
        IsingEnergy(shape, -0.7, field, periodic=periodic),
        IsingEnergy(shape, 0.7, 0.3, periodic=periodic),
        PottsEnergy(shape, 3, 0.9, periodic=periodic),
    ]


def draw(energy, *batch):
    return IndependentSites.uniform(energy.support, energy.event_shape).sample(batch)


def bonds(shape, periodic):
    """Pairs of neighbouring sites, each bond once."""
    for site in itertools.product(*map(range, shape)):
        for dim, length in enumerate(shape):
            other = list(site)
            other[dim] += 1
            if other[dim] == length:
                if not periodic:
                    continue
                other[dim] = 0
            yield site, tuple(other)


@pytest.fixture(params=[(s, p) for s in SHAPES for p in (True, False)], ids=str)
def shape(request):
    shape, periodic = request.param
    if periodic and min(shape) < 2:
        pytest.skip("no torus")
    return shape, periodic


def test_energy_is_the_sum_over_bonds(shape):
    shape, periodic = shape
    for energy in lattices(shape, periodic):
        x = draw(energy)
        if isinstance(energy, PottsEnergy):
            terms = [float(x[i] == x[j]) for i, j in bonds(shape, periodic)]
        else:
            terms = [(x[i] * x[j]).item() for i, j in bonds(shape, periodic)]
        expected = -energy.coupling.item() * sum(terms)
        if getattr(energy, "field", None) is not None:
            expected -= (energy.field * x).sum().item()
        assert energy(x).item() == pytest.approx(expected)


def test_site_logits_are_differences_of_energies(shape):
    shape, periodic = shape
    for energy in lattices(shape, periodic):
        x = draw(energy, 2)
        logits = energy.site_logits(x)
        assert logits.shape == (len(energy.values), 2, *shape)
        for site in itertools.product(*map(range, shape)):
            changed = x.expand(len(energy.values), *x.shape).clone()
            changed[(slice(None), slice(None), *site)] = energy.values[:, None]
            expected = (-energy(changed)).log_softmax(0)
            found = logits[(slice(None), slice(None), *site)].log_softmax(0)
            torch.testing.assert_close(found, expected)


def test_blocks_part_the_sites_and_hold_no_bond(shape):
    """Seen to fail with two colours for a torus of odd side."""
    shape, periodic = shape
    blocks = IsingEnergy(shape, 0.4, periodic=periodic).blocks
    assert (blocks.sum(0) == 1).all()
    odd = periodic and any(length % 2 for length in shape)
    assert len(blocks) == (3 if odd else 2)
    for i, j in bonds(shape, periodic):
        assert not any(block[i] and block[j] for block in blocks)


def test_two_categories_are_spins():
    spin = torch.where(torch.rand(10, 4, 4) < 0.5, -1.0, 1.0)
    ising, potts = IsingEnergy((4, 4), 0.4), PottsEnergy((4, 4), 2, 0.8)
    # [a = b] = (1 + s t) / 2, over 32 bonds.
    torch.testing.assert_close(potts((spin + 1) / 2), ising(spin) - 0.4 * 32)


def test_annealing_path():
    for energy in lattices((4, 3), periodic=True):
        path = energy.annealing_path()
        x = path.start.distribution.sample((5,))
        torch.testing.assert_close(path.at(0.0)(x), torch.zeros(5))
        torch.testing.assert_close(path.at(0.3)(x), 0.3 * energy(x))
        torch.testing.assert_close(path.at(1.0)(x), energy(x))
        torch.testing.assert_close(
            path.start.log_partition.expand(5), -path.start.distribution.log_prob(x)
        )


def test_wrong_arguments():
    for shape, periodic in [((), True), ((4, 1), True), ((0, 2), False)]:
        with pytest.raises(ValueError, match="shape must hold at least one side"):
            IsingEnergy(shape, 0.4, periodic=periodic)
    with pytest.raises(ValueError, match=r"field must be a number .*got shape \(3,\)"):
        IsingEnergy((4, 4), 0.4, torch.zeros(3))
    with pytest.raises(ValueError, match=r"coupling must be one floating.*\(2,\)"):
        IsingEnergy((4, 4), torch.zeros(2))
    for number in (1, 2.5):
        with pytest.raises(ValueError, match=f"whole number from 2 on, got {number}"):
            PottsEnergy((4, 4), number, 0.4)


def test_what_carries_a_graph_stays_live():
    """Seen to fail where the constructor detaches."""
    latent = torch.tensor(0.4, requires_grad=True)
    field = torch.zeros(3, 3, requires_grad=True)
    energy = IsingEnergy((3, 3), 2 * latent, field)
    assert not list(energy.parameters())
    grads = torch.autograd.grad(energy(torch.ones(3, 3)), (latent, field))
    torch.testing.assert_close(grads[0], torch.tensor(-36.0))
    torch.testing.assert_close(grads[1], -torch.ones(3, 3))
    shared = torch.nn.Parameter(torch.tensor(0.4))
    assert PottsEnergy((3, 3), 3, shared).coupling is shared
    assert isinstance(IsingEnergy((3, 3), 0.4).coupling, torch.nn.Parameter)


@pytest.mark.parametrize("coupling", [math.nan, math.inf])
def test_a_coupling_that_is_no_number(coupling):
    with pytest.raises(ValueError, match="coupling must be finite"):
        IsingEnergy((3, 3), coupling)
