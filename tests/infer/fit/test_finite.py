"""Fits over finite supports, told nothing but the model and the data."""

import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyModel, fit
from pyro_ebm.energies import (
    BoltzmannEnergy,
    FunctionEnergy,
    IsingEnergy,
    RBMEnergy,
)
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.infer import ContrastiveDivergence, MaximumLikelihood, ObjectiveLoss
from pyro_ebm.partition import estimate
from pyro_ebm.partition.exact.enumeration import enumeration

settling = sys.modules["pyro_ebm.infer.fit.settling"]
estimating = sys.modules["pyro_ebm.partition.estimate"]
BITS = dist.constraints.independent(dist.constraints.boolean, 1)


def machine(num_hidden=5):
    return RBMEnergy(0.01 * torch.randn(40, num_hidden))


def stripes(number):
    """Forty bits that agree in groups of ten, but for a tenth of them."""
    groups = torch.randint(2, (number, 4)).repeat_interleave(10, -1)
    return groups ^ (torch.rand(number, 40) < 0.1).long()


def test_a_machine_is_learned_by_chains(monkeypatch):
    """log Z of the chains' fit is that of the sum over the hidden units, and the
    likelihood on its way from 27.7, that of coins, to the entropy of 15.8."""
    monkeypatch.setattr(RBMEnergy, "closed_form", lambda self: None)
    pyro.set_rng_seed(0)
    model = EnergyModel(machine())
    result = fit(model, stripes(1500).bool(), num_steps=400, progress_bar=False)
    assert isinstance(model.base, IndependentSites)
    assert result.stages[0][0] == "MaximumLikelihood"
    exact = enumeration(result.distribution.energy, progress_bar=False)
    tracked = result.history[-1].log_partition
    assert abs(result.log_partition.value - exact.value) < 1e-3
    assert abs(tracked.value - exact.value) < 0.5
    assert result.validation.value > -25
    assert model().sample((3,)).shape == (3, 40)
    again = EnergyModel(machine())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.base.log_probs, model.base.log_probs)


def test_an_exact_energy_is_learned_exactly():
    pyro.set_rng_seed(0)
    data = IsingEnergy((3, 3), 0.4).closed_form().distribution.sample((2000,))
    model = EnergyModel(IsingEnergy((3, 3), 0.0))
    result = fit(model, data, num_steps=300, progress_bar=False)
    assert result.stages[0][0] == "ExactMaximumLikelihood"
    assert result.log_partition.status == "exact"
    assert abs(model.energy.coupling.item() - 0.4) < 0.05


@pytest.mark.parametrize(
    "objective",
    [MaximumLikelihood(num_steps=3), ContrastiveDivergence(num_steps=3)],
    ids=lambda o: type(o).__name__,
)
def test_gradients_are_those_of_the_likelihood(objective):
    """At the truth the data have the law of the model: both gradients vanish within
    their error; away from it that of the likelihood is that by enumeration. Seen to
    fail with chains of another energy."""
    pyro.set_rng_seed(0)
    energy = RBMEnergy(torch.randn(8, 3), torch.randn(8), torch.randn(3))
    data = energy.closed_form().distribution.sample((4000,))
    loss = ObjectiveLoss(energy, objective)
    total = [torch.zeros_like(p) for p in energy.parameters()]
    for _ in range(40):
        loss.zero_grad()
        loss(data).backward()
        total = [
            t + p.grad / 40 for t, p in zip(total, energy.parameters(), strict=True)
        ]
    assert max(t.abs().max() for t in total) < 0.04


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(17))

    def forward(self, x):
        return -(x @ self.weight)


@pytest.mark.slow
def test_bits_of_which_no_blocks_are_known(monkeypatch):
    monkeypatch.setattr(settling, "_MAX_SECONDS", 0.5)
    monkeypatch.setattr(estimating, "_MAX_STATES", 0)
    pyro.set_rng_seed(0)
    energy = FunctionEnergy(Linear(), (17,), BITS)
    data = (torch.rand(500, 17) < 0.8).float()
    optim = pyro.optim.Adam({"lr": 0.05})
    model = EnergyModel(energy)
    result = fit(model, data, num_steps=120, optim=optim, progress_bar=False)
    assert result.validation.value > -9.5  # the entropy is 8.5, that of coins 11.8
    assert result.log_partition.is_reliable
    weight = result.distribution.energy.fn.weight
    exact = torch.nn.functional.softplus(weight).sum().item()
    assert abs(result.log_partition.value - exact) < 0.1


def test_states_that_there_are_not():
    with pytest.raises(ValueError, match="must lie in the support"):
        fit(EnergyModel(machine()), 2 * torch.ones(100, 40), progress_bar=False)


def test_tracked_and_annealed_agree():
    pyro.set_rng_seed(0)
    energy = IsingEnergy((4, 4), 0.3)
    model = EnergyModel(FunctionEnergy(energy, (4, 4), energy.support))
    model.log_partition.refresh(model.energy, progress_bar=False)
    exact = enumeration(energy, progress_bar=False).value
    assert abs(model.log_partition.value.item() - exact) < 0.1
    assert model.log_partition.status == "ok"
    found = estimate(model, method="gibbs", budget=100_000, progress_bar=False)
    assert abs(found.value - exact) < 4 * found.std_error


@pytest.mark.parametrize("spin", [False, True])
def test_machines_without_a_bias_start_as_the_base(spin):
    """So that a fit is no worse than its base. Seen to fail without, by 2 nats: the
    units of a new machine are fair coins; and with the logit for the field of spins."""
    pyro.set_rng_seed(0)
    data = (torch.rand(400, 8) < 0.95).to(torch.get_default_dtype())
    data = 2 * data - 1 if spin else data
    energy = BoltzmannEnergy(torch.zeros(8, 8), spins=spin)
    for started in (energy,) if spin else (energy, RBMEnergy(torch.zeros(8, 4))):
        model = EnergyModel(started)
        base = IndependentSites.fitted(started.support, data)
        model.use_base(base, data)
        torch.testing.assert_close(model().log_prob(data), base.log_prob(data))
