"""Energies that are no function of one point are found, and stay as they were."""

import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_ebm
from pyro_ebm import EnergyDistribution, EnergyModel
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.energies.views.pointwise import check_pointwise

ROWS = torch.arange(8.0)


def network(*layers):
    net = nn.Sequential(nn.Linear(2, 4), *layers, nn.Linear(4, 1), nn.Flatten(-2))
    return FunctionEnergy(net, (2,))


def spectral():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 16))
    return FunctionEnergy(lambda x: 100 * layer(x).square().sum(-1), (2,)), layer


WRONG = {
    "batch norm": lambda: network(nn.BatchNorm1d(4)),
    "dropout": lambda: network(nn.Dropout(0.5)),
    "noise": lambda: FunctionEnergy(lambda x: x.sum(-1) + torch.rand(()), (2,)),
    "mean": lambda: FunctionEnergy(lambda x: (x - x.mean(0)).square().sum(-1), (2,)),
    "closure": lambda: FunctionEnergy(lambda x: x.sum(-1) * ROWS.to(x), (2,)),
    "rank": lambda: FunctionEnergy(lambda x: x.sum(-1).argsort().to(x), (2,)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_function_of_a_point(name):
    energy = WRONG[name]()
    state, before = torch.get_rng_state(), copy.deepcopy(energy.state_dict())
    with pytest.raises(ValueError, match="must be a function of one point.*eval"):
        check_pointwise(energy, torch.randn(8, 2))
    torch.set_rng_state(state)
    for key, value in energy.state_dict().items():
        assert value.equal(before[key])


def test_a_spectral_norm_that_improves():
    energy, layer = spectral()
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(16, 2))
    with pytest.raises(ValueError, match="evaluated twice"):
        check_pointwise(energy, torch.randn(8, 2))
    layer.eval()
    check_pointwise(energy, torch.randn(8, 2))


@pytest.mark.parametrize(
    "energy",
    [
        network(nn.BatchNorm1d(4)).eval(),
        network(nn.Dropout(0.5)).eval(),
        NeuralEnergy((2,)),
        QuadraticEnergy(1e4 * torch.ones(2)),
        FunctionEnergy(lambda x: x[..., 0].log() + x.sum(-1), (2,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_a_point(energy, dtype):
    energy = copy.deepcopy(energy).to(dtype)
    state = torch.get_rng_state()
    check_pointwise(energy, 100 * torch.randn(4, 5, 2))
    check_pointwise(energy, torch.randn(2))
    torch.set_rng_state(state)


NORMAL = dist.Normal(torch.zeros(2), 1.0).to_event(1)


@pytest.mark.parametrize(
    "use",
    [
        lambda energy: EnergyDistribution(energy).sample(),
        lambda energy: pyro_ebm.mcmc.MCMC(
            num_samples=2, warmup_steps=2, num_chains=8, progress_bar=False
        ).run(energy),
        lambda energy: pyro_ebm.partition.estimate(energy, NORMAL),
        lambda energy: pyro_ebm.fit(
            EnergyModel(energy, NORMAL), torch.randn(50, 2), progress_bar=False
        ),
    ],
    ids=["sample", "MCMC", "estimate", "fit"],
)
@pytest.mark.parametrize("name", ["batch norm", "dropout", "mean"])
def test_whatever_evaluates_in_batches_refuses_it(use, name):
    with pytest.raises(ValueError, match="must be a function of one point"):
        use(WRONG[name]())


def test_a_tensor_with_a_graph_is_left_alone():
    """Writing to it, though under ``no_grad``, made its backward pass an error."""
    latent = torch.ones(2, requires_grad=True)
    energy = QuadraticEnergy(latent.exp())
    value = energy(torch.zeros(2))
    check_pointwise(energy, torch.randn(8, 2))
    value.backward()
    assert latent.grad.isfinite().all()
