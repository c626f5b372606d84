"""Counting evaluations, and changing nothing else."""

import copy

import pytest
import torch
from torch import nn

from pyro_ebm.energies import Energy, NeuralEnergy, QuadraticEnergy, UnconstrainedEnergy
from pyro_ebm.testing import CountingEnergy, targets


@pytest.fixture
def counted():
    return CountingEnergy(QuadraticEnergy(torch.zeros(2)))


def test_rows_are_counted(counted):
    counted(torch.zeros(2))
    counted(torch.zeros(3, 4, 2))
    assert (counted.num_values, counted.num_gradients) == (13, 0)
    counted.value_and_grad(torch.zeros(5, 2))
    assert (counted.num_values, counted.num_gradients) == (13, 5)
    counted.reset()
    assert (counted.num_values, counted.num_gradients) == (0, 0)


def test_autograd_counts_as_gradient_only(counted):
    x = torch.zeros(5, 2, requires_grad=True)
    Energy.value_and_grad(counted, x)
    with torch.no_grad():
        counted(x)
    assert (counted.num_values, counted.num_gradients) == (5, 5)
    inside = CountingEnergy(targets.gamma().energy)
    UnconstrainedEnergy(inside).value_and_grad(torch.zeros(7))
    assert (inside.num_values, inside.num_gradients) == (0, 7)


def test_the_energy_is_unchanged(counted):
    x = torch.randn(5, 2)
    inner = counted.energy
    assert torch.equal(counted(x), inner(x))
    for here, there in zip(
        counted.value_and_grad(x), inner.value_and_grad(x), strict=True
    ):
        assert torch.equal(here, there)
    assert counted.closed_form().log_partition == inner.closed_form().log_partition
    assert counted.support is inner.support
    assert counted.event_shape == inner.event_shape


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: nn.ModuleDict({"f": f})])
def test_state_dict_is_that_of_the_energy(wrap):
    bare, inner = (NeuralEnergy((2,), (4,)) for _ in range(2))
    plain, counted = wrap(bare), wrap(CountingEnergy(inner))
    assert list(counted.state_dict()) == list(plain.state_dict())
    counted.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(inner(x), bare(x))
    plain.load_state_dict(counted.state_dict())


def test_a_wrong_state_dict_is_still_an_error(counted):
    with pytest.raises(RuntimeError, match="Missing key"):
        counted.load_state_dict({})


def test_wrong_shape_is_an_error(counted):
    for call in (counted, counted.value_and_grad):
        with pytest.raises(ValueError, match="x must have shape"):
            call(torch.zeros(5, 3))
    assert (counted.num_values, counted.num_gradients) == (0, 0)


def test_deepcopy_counts_apart(counted):
    twin = copy.deepcopy(counted)
    twin(torch.zeros(5, 2))
    assert (twin.num_values, counted.num_values) == (5, 0)
