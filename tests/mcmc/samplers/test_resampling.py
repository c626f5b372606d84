"""Draws by importance resampling."""

import copy

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.mcmc import ImportanceResampling
from pyro_ebm.mcmc.samplers.resampling import is_corrected, weighted_draws
from pyro_ebm.testing import assert_moments

WIDE = dist.StudentT(5.0, torch.zeros(2), 2.0).to_event(1)


def test_the_draws_are_those_of_the_energy():
    """Both moments. Fault: the density of the proposal left out of the weights."""
    energy = QuadraticEnergy(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 4.0]).diag())
    draws = ImportanceResampling(WIDE)(energy, 4000)
    wanted = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.25])
    assert_moments(draws, *wanted, fourth_central_moment=3 * wanted[1].square())


def test_modes_are_as_likely_as_they_are_heavy():
    def energy(x):
        first = -(x + 4).square().sum(-1) / 2
        second = -(x - 4).square().sum(-1) / 2 + torch.tensor(0.25).log()
        return -torch.logaddexp(first, second)

    wide = dist.Normal(torch.zeros(2), 5.0).to_event(1)
    draws = ImportanceResampling(wide)(FunctionEnergy(energy, (2,)), 4000)
    assert (draws[:, 0] > 0).double().mean().item() == pytest.approx(0.2, abs=0.03)


def test_a_proposal_that_is_too_far_leaves_it_to_chains():
    """Fault: a few points, again and again."""
    far = dist.Normal(torch.full((2,), 6.0), 1.0).to_event(1)
    found = ImportanceResampling(far).draw_diagnosed(
        QuadraticEnergy(torch.zeros(2)), 500
    )
    assert found.diagnostics.num_chains > 0
    assert len(found.x.unique(dim=0)) == 500
    assert found.x.mean(0).abs().max() < 0.3


def test_one_draw_at_a_time_is_of_a_pool():
    count = [0]

    def energy(x):
        count[0] += x.shape[:-1].numel()
        return x.square().sum(-1) / 2

    q = EnergyDistribution(
        FunctionEnergy(energy, (2,)), sampler=ImportanceResampling(WIDE)
    )
    draws = torch.stack([q.sample() for _ in range(100)])
    assert count[0] < 20_000
    assert len(draws.unique(dim=0)) > 95
    assert q.sampling_diagnostics().method == "ImportanceResampling"


def test_the_density_of_a_proposal_drops_out_of_its_correction():
    """Faults: what cancels is evaluated; it is taken to cancel for any proposal."""
    count = [0]

    class Counted(dist.MultivariateNormal):
        def log_prob(self, value):
            count[0] += len(value)
            return super().log_prob(value)

    base = Counted(torch.ones(2), 0.5 * torch.eye(2))
    energy = NeuralEnergy((2,), (8,), base=base)
    torch.nn.init.normal_(energy.network[-1].weight)
    x, log_weights = weighted_draws(energy, base, 1000)
    assert count[0] < 200
    expected = -energy(x) - base.log_prob(x)
    assert torch.allclose(log_weights, expected, atol=1e-4)
    assert is_corrected(copy.deepcopy(energy), base)
    assert not is_corrected(energy, WIDE)
    count[0] = 0
    ImportanceResampling(base)(energy, 500)
    assert count[0] < 200
