"""Weights of bounded spectral norm: the bound, and an energy that is made of them."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import EnergyModel, fit
from pyro_ebm.energies import NeuralEnergy
from pyro_ebm.energies.neural.spectral import BoundedLinear, spectral_norm_bound
from pyro_ebm.infer import MaximumLikelihood


def steep(activation=nn.SiLU, spectral_norm=1.5):
    """Weights that the bound holds down."""
    f = NeuralEnergy((3,), (16, 8), activation=activation, spectral_norm=spectral_norm)
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.normal_(std=2.0)
    return f


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 30), (40, 7), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_bound_and_a_tight_one(shape, dtype):
    for weight in (
        torch.randn(shape, dtype=dtype),
        torch.eye(*shape, dtype=dtype),  # the flattest spectrum there is
        1e-4 * torch.randn(shape, dtype=dtype),
        1e4 * torch.ones(shape, dtype=dtype),
    ):
        exact = torch.linalg.matrix_norm(weight, 2)
        bound = spectral_norm_bound(weight)
        assert bound > exact * (1 - 1e-5)
        assert bound < exact * min(shape) ** (1 / 64) * (1 + 1e-5)


def test_gradient_of_the_bound():
    weight = torch.randn(4, 3, requires_grad=True)
    assert torch.autograd.gradcheck(spectral_norm_bound, weight)
    layer = BoundedLinear(3, 4, 0.5)
    assert torch.autograd.gradcheck(
        lambda x: layer(x), torch.randn(2, 3).requires_grad_()
    )
    with torch.no_grad():
        layer.weight.zero_()
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_small_weights_stay_as_they_are():
    free, bounded = NeuralEnergy((2,), (8,)), NeuralEnergy((2,), (8,), spectral_norm=99)
    bounded.load_state_dict(free.state_dict())  # the same names
    x = torch.randn(5, 2)
    torch.testing.assert_close(free(x), bounded(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "activation", [nn.SiLU, nn.Tanh, nn.GELU, nn.Softplus, nn.ReLU]
)
def test_value_and_grad(activation):
    f, x = steep(activation), torch.randn(6, 3).requires_grad_()
    value, grad = f.value_and_grad(x)
    (wanted,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(value, f(x).detach())
    torch.testing.assert_close(grad, wanted)
    # The same point twice is the same energy: nothing is remembered.
    assert torch.equal(f.value_and_grad(x)[0], value)


def test_the_slope_is_bounded():
    """Without the bound it is some hundred times as steep."""
    x = 3 * torch.randn(500, 3)
    for activation, slope in ((nn.SiLU, 1.1), (nn.Tanh, 1.0)):
        limit = 1.5**3 * slope**2
        assert steep(activation).value_and_grad(x)[1].norm(dim=-1).max() <= limit
        free = steep(activation, 1e6).value_and_grad(x)[1]
        assert free.norm(dim=-1).max() > 10 * limit


def test_copies():
    f, x = steep(), torch.randn(4, 3)
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f)), steep()):
        other.load_state_dict(f.state_dict())
        assert torch.equal(other(x), f(x))
    calls = []
    f.network[0].register_forward_hook(lambda *_: calls.append(1))
    f.value_and_grad(x)
    assert calls == [1]


def test_a_fit_with_it():
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    energy = NeuralEnergy((2,), (8,), base=base, spectral_norm=2.0)
    model = EnergyModel(energy, base)
    objective = MaximumLikelihood(num_chains=32, num_steps=2)
    data = torch.randn(100, 2)
    result = fit(model, data, objective, num_steps=20, progress_bar=False)
    # Walkers, average and chains see the energy that is returned.
    torch.testing.assert_close(model.energy(data), result.distribution.energy(data))
    assert result.log_partition.is_reliable


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan")])
def test_wrong_bound(bound):
    with pytest.raises(ValueError, match="spectral norm must be positive and finite"):
        NeuralEnergy((2,), (8,), spectral_norm=bound)
