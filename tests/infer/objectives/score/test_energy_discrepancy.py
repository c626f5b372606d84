"""Energy discrepancy over finite supports, against sums over all states."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.energies.discrete.finite import finite_points
from pyro_ebm.infer import EnergyDiscrepancy

COUNTS = torch.tensor([2, 3, 4])
RAGGED = dist.constraints.independent(
    dist.constraints.integer_interval(0, COUNTS - 1), 1
)
TIME = 0.7


def ragged_energy():
    return FunctionEnergy(lambda x: (x.cumsum(-1) - 1.5).square().sum(-1), (3,), RAGGED)


def heat(points):
    """Equation (2) between all points, shape (24, 24)."""
    same = (points[:, None] == points).double()
    stay = math.exp(-TIME)
    return (stay * same + (1 - stay) / COUNTS).prod(-1)


def test_value_is_that_of_the_sum_over_all_states():
    """E_y log E_x' exp(f(x) - f(x')), without the stabiliser and for many copies.
    Planted fault, seen to fail: sites with two states drawn from all four."""
    pyro.set_rng_seed(0)
    energy = ragged_energy()
    points = finite_points(RAGGED, (3,), torch.arange(24), torch.empty(0))
    kernel, values = heat(points), energy(points).double()
    logs = torch.log(kernel @ (-values).exp())  # of the mean over x' given y
    exact = -(values + kernel @ logs)
    objective = EnergyDiscrepancy(TIME, num_copies=500, stabilizer=0.0)
    surrogate = objective.surrogate(EnergyDistribution(energy, 0.0), None)
    found = surrogate(points.expand(200, 24, 3)).objective.double()
    error = found.std(0) / 200**0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * error + 0.02).all()


def test_counts_without_end_are_refused():
    energy = FunctionEnergy(
        lambda x: x.sum(-1),
        (2,),
        dist.constraints.independent(dist.constraints.nonnegative_integer, 1),
    )
    with pytest.raises(NotImplementedError, match="is discrete"):
        EnergyDiscrepancy().check(EnergyDistribution(energy, 0.0), torch.zeros(2, 2))
