"""Double precision where it can be had, and what rounding is left."""

import pytest
import torch

from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.partition.exact.precision import PreciseEnergy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_precision_whatever_the_energy_was_written_in(dtype):
    matrix = torch.randn(2, 2)
    for energy in (
        QuadraticEnergy(torch.zeros(2)),
        NeuralEnergy((2,), (8,)),
        FunctionEnergy(lambda x: (x @ matrix).square().sum(-1), (2,)),
    ):
        precise = PreciseEnergy(energy, torch.randn(8, 2))
        value, grad = precise.value_and_grad(torch.randn(5, 2).double())
        assert value.dtype == grad.dtype == torch.float64
        assert precise.is_double
        assert precise.eps == torch.finfo(torch.float64).eps
        assert precise.num_evaluations == 13


@pytest.mark.parametrize("dtype", [torch.float32])
def test_what_insists_on_single_precision(dtype):
    def insists(x):
        return torch.from_numpy(x.detach().numpy().astype("float32") ** 2).sum(-1)

    precise = PreciseEnergy(FunctionEnergy(insists, (2,)), torch.randn(8, 2))
    assert not precise.is_double
    assert precise.eps == torch.finfo(torch.float32).eps


def test_rounding_is_the_scatter_of_large_terms_that_cancel():
    def energy(x):
        return (1e9 + x.square()).sum(-1) - 2e9

    precise = PreciseEnergy(FunctionEnergy(energy, (2,)), torch.randn(8, 2))
    x = torch.randn(100, 2)
    rounding = precise.rounding(x, torch.full_like(x, 1e-6))
    error = (precise(x) - x.square().sum(-1)).abs()
    assert error.max() < 8 * rounding.median()
    assert rounding.median() < 1e-6
    smooth = PreciseEnergy(QuadraticEnergy(torch.zeros(2)), torch.randn(8, 2))
    assert smooth.rounding(x, torch.full_like(x, 1e-6)).max() < 1e-14
