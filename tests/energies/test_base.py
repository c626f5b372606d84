"""What the base class of energies does for all of them."""

import pyro
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from pyro.nn.module import to_pyro_module_
from torch import nn

from pyro_ebm.energies import Energy, FunctionEnergy, NeuralEnergy
from pyro_ebm.energies.base import live_or_parameter


def test_a_tensor_with_a_graph_stays_live():
    """Seen to fail with a copy of the value instead of the tensor itself."""
    module, latent = nn.Module(), torch.ones(2, requires_grad=True)
    live_or_parameter(module, "value", 2 * latent)
    module.double().value.sum().backward()
    assert latent.grad.equal(torch.full((2,), 2.0))
    assert not list(module.parameters())
    assert not module.state_dict()


def test_a_leaf_that_is_no_parameter_of_a_module_stays_live():
    """``pyro.param`` gives such."""
    module, leaf = nn.Module(), torch.ones(2, requires_grad=True)
    live_or_parameter(module, "value", leaf)
    assert module.value is leaf


def test_a_parameter_is_shared_and_a_plain_tensor_copied():
    module, parameter, plain = nn.Module(), nn.Parameter(torch.ones(2)), torch.ones(2)
    live_or_parameter(module, "shared", parameter)
    live_or_parameter(module, "own", plain)
    assert module.shared is parameter
    assert isinstance(module.own, nn.Parameter)
    plain.zero_()
    assert module.own.detach().equal(torch.ones(2))
    assert list(module.state_dict()) == ["shared", "own"]


# With PyroModule ----------------------------------------------------------------------


def scaled(x, w):
    return w * x.square().sum(-1)


class Mixed(PyroModule, Energy):
    def __init__(self):
        super().__init__()
        Energy.__init__(self, (2,))
        self.w = PyroParam(torch.tensor(2.0), constraints.positive)

    def forward(self, x):
        return scaled(x, self.w)


class MixedInOneCall(Mixed):
    def __init__(self):
        Energy.__init__(self, (2,))
        self.w = PyroParam(torch.tensor(2.0), constraints.positive)


class EnergyFirst(Energy, PyroModule):
    def __init__(self):
        super().__init__((2,))
        self.w = PyroParam(torch.tensor(2.0), constraints.positive)

    def forward(self, x):
        return scaled(x, self.w)


class ByPyro(PyroModule[Energy]):
    def __init__(self):
        super().__init__((2,))
        self.w = PyroParam(torch.tensor(2.0), constraints.positive)

    def forward(self, x):
        return scaled(x, self.w)


@pytest.mark.parametrize("kind", [Mixed, MixedInOneCall, EnergyFirst, ByPyro])
def test_an_energy_may_be_a_pyro_module(kind):
    """A metaclass of its own on ``Energy`` made each of them a TypeError."""
    energy = kind()
    assert energy(torch.ones(3, 2)).tolist() == [4.0] * 3
    assert list(pyro.get_param_store()) == ["w"]
    with pytest.raises(ValueError, match="x must have shape"):
        energy(torch.ones(3))


def test_pyro_module_of_an_energy():
    energy = PyroModule[NeuralEnergy]((2,), (4,))
    assert isinstance(energy, NeuralEnergy)
    assert energy(torch.zeros(3, 2)).shape == (3,)


def test_to_pyro_module():
    energy = NeuralEnergy((2,), (4,))
    expected = energy(torch.ones(3, 2))
    to_pyro_module_(energy)
    assert isinstance(energy, PyroModule)
    assert torch.equal(energy(torch.ones(3, 2)), expected)


def test_an_energy_without_forward_is_an_error():
    class Empty(Energy):
        pass

    with pytest.raises(TypeError, match="Empty must define forward to be an energy"):
        Empty(())
    with pytest.raises(TypeError, match="Energy must define forward"):
        Energy((2,))


def test_the_event_shape_is_needed():
    class Flat(Energy):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match=r"Flat must call super\(\).__init__\(event"):
        Flat()


def test_points_of_another_precision_are_named():
    """Those of numpy, say. Fault: torch's error of two matrices."""
    energy = NeuralEnergy((2,), (4,)).float()
    with pytest.raises(ValueError, match=r"dtype torch.float32 .*got torch.float64"):
        energy(torch.zeros(3, 2, dtype=torch.float64))
    three = torch.zeros(3, dtype=torch.float64)
    other = FunctionEnergy(lambda x: x.sum(-1) @ three, (2,))
    with pytest.raises(RuntimeError, match="dtype"):  # which has none of its own
        other(torch.zeros(3, 2, dtype=torch.float32))
