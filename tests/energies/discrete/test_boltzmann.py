"""Boltzmann machines against sums over all of their states."""

import pytest
import torch

from pyro_ebm.energies import BoltzmannEnergy, RBMEnergy
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.mcmc.tempering.site_path import SitePath
from pyro_ebm.partition import enumeration, estimate


def machine(size=6, spins=False):
    upper = torch.randn(size, size).triu(1)
    return BoltzmannEnergy(upper + upper.mT, torch.randn(size), spins=spins)


@pytest.mark.parametrize("spins", [False, True])
def test_energy_and_site_logits(spins):
    """Planted fault: each pair counted twice."""
    energy = machine(spins=spins)
    x = energy.closed_form().distribution.sample((5,))
    pairs = [(i, j) for i in range(6) for j in range(i)]
    expected = -sum(energy.weight[i, j] * x[:, i] * x[:, j] for i, j in pairs)
    torch.testing.assert_close(energy(x), expected - x @ energy.bias)
    logits = energy.site_logits(x)
    for site in range(6):
        changed = x.expand(2, *x.shape).clone()
        changed[..., site] = energy.values[:, None]
        expected = (-energy(changed)).log_softmax(0)
        torch.testing.assert_close(logits[..., site].log_softmax(0), expected)


@pytest.mark.parametrize("spins", [False, True])
def test_closed_form(spins):
    energy = machine(spins=spins)
    known = energy.closed_form()
    value = enumeration(energy).value
    assert known.log_partition.item() == pytest.approx(value, abs=1e-9)
    assert estimate(energy).status == "exact"
    (grad,) = torch.autograd.grad(known.log_partition, energy.bias)
    torch.testing.assert_close(grad, known.distribution.mean)
    assert machine(40).closed_form() is None


@pytest.mark.parametrize("spins", [False, True])
def test_the_path_from_data_stays_in_the_family(spins):
    """Units as often on as in data at the start, the energy at the end, and what lies
    between linear. Planted fault: the logit for the field of spins."""
    energy = machine(spins=spins)
    log_probs = torch.rand(2, 6).log_softmax(0)
    path = energy.annealing_path(log_probs)
    x = energy.closed_form().distribution.sample((50,))
    assert all(isinstance(path.at(beta), BoltzmannEnergy) for beta in (0.0, 0.3))
    start = IndependentSites(energy.support, log_probs)
    torch.testing.assert_close(
        start.log_prob(x), -path.at(0.0)(x) - path.start.log_partition
    )
    torch.testing.assert_close(path.start.distribution.log_probs, log_probs)
    torch.testing.assert_close(path.at(1.0)(x), energy(x))
    mixed = torch.lerp(path.at(0.0)(x), energy(x), 0.3)
    torch.testing.assert_close(path.at(0.3)(x), mixed)
    found = SitePath(energy, start)
    assert isinstance(found.at(0.3), BoltzmannEnergy)
    assert found.log_start == pytest.approx(path.start.log_partition.item())


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"weight must have shape \(D, D\)"):
        BoltzmannEnergy(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="diagonal of zeros"):
        BoltzmannEnergy(torch.eye(2))
    with pytest.raises(ValueError, match="symmetric or upper triangular"):
        BoltzmannEnergy(torch.tensor([[0.0, 1], [2, 0]]))
    with pytest.raises(ValueError, match=r"bias must have shape \(2,\)"):
        BoltzmannEnergy(torch.zeros(2, 2), torch.zeros(3))


@pytest.mark.parametrize("of_points", [torch.long, torch.bool, torch.float64])
@pytest.mark.parametrize("kind", [BoltzmannEnergy, RBMEnergy])
def test_points_of_any_dtype(kind, of_points):
    energy = kind(torch.ones(3, 3).triu(1))
    x = torch.tensor([[1, 0, 1], [1, 1, 1]])
    own = x.to(energy.weight)
    assert torch.equal(energy(x.to(of_points)), energy(own))
    exact = energy.closed_form().distribution
    assert torch.equal(exact.log_prob(x.to(of_points)), exact.log_prob(own))
