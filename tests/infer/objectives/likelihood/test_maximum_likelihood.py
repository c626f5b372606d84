"""Persistent contrastive divergence finds the maximum-likelihood parameters."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ebm import EnergyModel
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy
from pyro_ebm.infer import Learn, MaximumLikelihood
from pyro_ebm.mcmc import HMC, MALA, ChainState, Kernel, StepInfo
from pyro_ebm.testing import CountingEnergy


class Gaussian(nn.Module):
    """A Gaussian that does not know its log Z."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.log_precision = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return ((x - self.loc) ** 2 * self.log_precision.exp()).sum(-1) / 2


@dataclass(frozen=True)
class UnadjustedLangevin(Kernel):
    """A fault: every proposal of MALA is accepted, at a step that does not adapt."""

    epsilon: float = 0.19
    step_size: float | torch.Tensor = 1.0
    target_accept_prob: float = 0.5
    num_gradients = 1

    @torch.no_grad()
    def step(self, energy, state):
        noise = (2 * self.epsilon) ** 0.5 * torch.randn_like(state.x)
        x = state.x - self.epsilon * state.grad + noise
        probability = torch.ones_like(state.energy)
        new = ChainState(x, *energy.value_and_grad(x))
        return new, StepInfo(probability, probability > 0, probability > 0)


def fitted_precision_ratio(kernel, num_steps=500):
    """Fitted over maximum-likelihood precision, for data from N(mu, 0.49 I)."""
    pyro.set_rng_seed(1)
    data = torch.tensor([0.3, -0.8]) + 0.7 * torch.randn(2000, 2)
    network = Gaussian()
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    energy_model = EnergyModel(FunctionEnergy(network, (2,)), base)

    def model():
        pyro.module("gaussian", energy_model)
        with pyro.poutine.scale(scale=1 / len(data)), pyro.plate("data", len(data)):
            pyro.sample("x", energy_model(), obs=data)

    settings = {} if kernel is None else {"kernel": kernel}
    objective = MaximumLikelihood(num_chains=512, **settings)
    optim = pyro.optim.Adam({"lr": 0.02})
    svi = SVI(Learn(model, objective), lambda: None, optim, Trace_ELBO())
    tail = []
    for step in range(num_steps):
        svi.step()
        if step >= num_steps / 2:
            tail.append(network.log_precision.detach().clone())
    precision = torch.stack(tail).mean(0).exp()
    return precision * data.var(0, correction=0), energy_model, data


def test_recovers_the_maximum_likelihood_precision():
    """Unadjusted Langevin at a step of 0.36: seen to fail in the next test."""
    ratio, energy_model, data = fitted_precision_ratio(None)
    assert (ratio - 1).abs().max() < 0.03, ratio
    fitted = energy_model.log_partition.averaged_energy.fn
    torch.testing.assert_close(fitted.loc, data.mean(0), atol=0.03, rtol=0)
    assert energy_model.log_partition.status == "ok"


def test_unadjusted_langevin_does_not():
    """At precision a and step e its chains have variance 1 / (a - e a^2 / 2): they
    match variance v at a = (1 - sqrt(1 - 2 e / v)) / e, 35 % above 1 / v."""
    kernel = UnadjustedLangevin()
    ratio, *_ = fitted_precision_ratio(kernel, 300)
    root = (1 - 2 * kernel.epsilon / 0.49) ** 0.5
    expected = 0.49 * (1 - root) / kernel.epsilon
    assert expected > 1.3
    assert (ratio - expected).abs().max() < 0.08, ratio
    with pytest.raises(AssertionError):  # the requirement of the test above
        assert (ratio - 1).abs().max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [HMC(num_leapfrog=3), MALA(max_drift=None)])
def test_other_kernels_recover_it_too(kernel):
    ratio, *_ = fitted_precision_ratio(kernel, 300)
    assert (ratio - 1).abs().max() < 0.04, ratio


def counted(num_restarts=0.0, kernel=None):
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    energy = CountingEnergy(NeuralEnergy((2,), (8,), base=base))
    energy_model = EnergyModel(energy, base)
    data = torch.randn(256, 2)

    def model():
        pyro.module("energy", energy_model)
        with pyro.plate("data", 256):
            pyro.sample("x", energy_model(), obs=data)

    objective = MaximumLikelihood(
        num_chains=1024,
        num_steps=20,
        restart_fraction=num_restarts,
        kernel=MALA() if kernel is None else kernel,
    )
    optim = pyro.optim.Adam({"lr": 1e-3})
    learned = Learn(model, objective)
    return energy, energy_model, SVI(learned, lambda: None, optim, Trace_ELBO())


@pytest.mark.parametrize("restart_fraction", [0.0, 0.02])
@pytest.mark.parametrize("kernel", [MALA(), HMC(num_leapfrog=3)])
def test_cost_of_a_step(kernel, restart_fraction):
    """At most 1.35 times 20 bare gradients, by count: here exactly 21 gradients a chain
    and one value a chain and a point; and 10 steps of tracking bring a known number."""
    energy, energy_model, svi = counted(restart_fraction, kernel)
    for _ in range(2):
        svi.step()
    energy.reset()
    svi.step()
    num_moves = 20 * kernel.num_gradients
    assert energy.num_gradients == 1024 * (num_moves + 1)
    assert energy.num_values == 1024 + 256
    assert energy.num_gradients + energy.num_values < 1.35 * 1024 * num_moves
    before = energy_model.log_partition.num_evaluations
    energy.reset()
    for _ in range(10):
        svi.step()
    tracking = energy_model.log_partition.num_evaluations - before
    # One update: the new weights, three leapfrog steps, and log Z of the iterate.
    assert tracking == 512 * (1 + 3 + 1)
    # The walkers have an energy of their own, but for the iterate's values.
    assert energy.num_gradients == 10 * 1024 * (num_moves + 1)
    assert energy.num_values == 10 * (1024 + 256) + 512
    assert tracking < 0.15 * energy.num_gradients


def test_restarts_are_a_part_of_the_chains():
    energy, energy_model, svi = counted(0.25)
    svi.step()
    restarted = []
    original = energy_model.chains.restart
    energy_model.chains.restart = lambda energy, x: (
        restarted.append(len(x)),
        original(energy, x),
    )
    svi.step()
    assert restarted == [256]
    assert energy_model.chains.u.shape == (1024, 2)
