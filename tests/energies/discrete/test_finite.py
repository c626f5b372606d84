"""Finite supports."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    UnconstrainedEnergy,
    spins,
)
from pyro_ebm.energies.discrete.finite import (
    finite_points,
    finite_values,
    num_points,
    num_states,
)
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.views.unconstrained import same_support
from pyro_ebm.mcmc import HMC


@pytest.mark.parametrize(
    ("support", "expected"),
    [
        (constraints.boolean, (0, 1)),
        (constraints.independent(constraints.boolean, 2), (0, 1)),
        (constraints.integer_interval(-1, 2), (-1, 0, 1, 2)),
        (constraints.integer_interval(torch.tensor(0), torch.tensor(2.0)), (0, 1, 2)),
        (constraints.integer_interval(0, torch.tensor([2, 2])), (0, 1, 2)),
        (constraints.independent(spins, 1), (-1, 1)),
        (dist.Categorical(torch.ones(4, 3)).to_event(1).support, (0, 1, 2)),
        (dist.Bernoulli(torch.ones(4)).to_event(1).support, (0, 1)),
        (constraints.integer_interval(0, torch.tensor([2, 3])), (0, 1, 2, 3)),
        (constraints.integer_interval(torch.tensor([0, 1]), torch.tensor(3)), None),
        (constraints.nonnegative_integer, None),
        (constraints.real, None),
        (constraints.unit_interval, None),
        (constraints.simplex, None),
    ],
    ids=str,
)
def test_values(support, expected):
    assert finite_values(support) == expected


def test_spins():
    x = torch.tensor([-1.0, 1.0, 0.0, 2.0, torch.nan])
    assert spins.check(x).tolist() == [True, True, False, False, False]
    assert spins.is_discrete
    assert same_support(spins, type(spins)())
    assert not same_support(spins, constraints.boolean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform(dtype):
    support = constraints.independent(constraints.integer_interval(0, 2), 2)
    uniform = IndependentSites.uniform(support, (2, 3), torch.empty(0, dtype=dtype))
    x = uniform.sample((4000,))
    assert x.dtype == dtype
    assert support.check(x).all()
    # Each of 6 sites has each of 3 values a third of the time, |z| < 4.
    count = torch.stack([(x == value).sum(0) for value in range(3)])
    z = (count - 4000 / 3) / math.sqrt(4000 * 2 / 9)
    assert z.abs().max() < 4
    expected = torch.full((4000,), -6 * math.log(3), dtype=dtype)
    torch.testing.assert_close(uniform.log_prob(x), expected)
    assert uniform.expand((5,)).sample((4,)).shape == (4, 5, 2, 3)
    assert uniform.expand((5,)).log_prob(x[0]).shape == (5,)


def uneven(*number):
    """The support of sites with these numbers of states."""
    number = torch.tensor(number)
    return constraints.independent(
        constraints.integer_interval(0, number - 1), number.dim()
    )


def test_sites_with_their_own_numbers_of_states():
    """Seen to fail where every site has the states of the largest."""
    support = uneven(2, 3, 1)
    assert num_states(support, (3,)).tolist() == [2, 3, 1]
    assert num_points(support, (3,)) == 6
    points = finite_points(support, (3,), torch.arange(6), torch.empty(0))
    assert len({tuple(point) for point in points.tolist()}) == 6
    assert support.check(points).all()
    uniform = IndependentSites.uniform(support, (3,))
    x = uniform.sample((6000,))
    count = torch.stack([(x == point).all(-1).sum() for point in points])
    assert ((count - 1000) / math.sqrt(1000 * 5 / 6)).abs().max() < 4
    torch.testing.assert_close(uniform.log_prob(x[0]).exp(), torch.tensor(1 / 6))
    assert num_states(uneven(3, 3), (2,)) is None


@pytest.mark.parametrize("support", [constraints.boolean, spins], ids=str)
def test_points_are_all_there_are(support):
    support = constraints.independent(support, 2)
    points = finite_points(support, (2, 2), torch.arange(16), torch.empty(0))
    assert num_points(support, (2, 2)) == 16
    assert len({tuple(point.flatten().tolist()) for point in points}) == 16
    assert num_points(constraints.real, ()) is None


def test_uniform_is_a_distribution_of_pyro():
    uniform = IndependentSites.uniform(constraints.independent(spins, 1), (3,))
    assert pyro.sample("x", uniform).shape == (3,)
    energy = DistributionEnergy(uniform)
    assert energy(torch.ones(3)).item() == pytest.approx(3 * math.log(2))
    assert energy(torch.zeros(3)) == math.inf
    with pytest.raises(ValueError, match="support"):
        uniform.log_prob(torch.zeros(3))


@pytest.mark.parametrize(
    ("support", "event"), [(constraints.real, ()), (spins, (3,))], ids=str
)
def test_uniform_over_what_is_not_finite(support, event):
    with pytest.raises(ValueError, match="support must be finite, with event_dim"):
        IndependentSites.uniform(support, event)


def test_gradient_kernels_refuse_a_discrete_support():
    energy = FunctionEnergy(
        lambda x: x.sum(-1), (2,), constraints.independent(constraints.boolean, 1)
    )
    with pytest.raises(ValueError, match=r"continuous support.*mcmc\.Gibbs"):
        HMC(0.1).init(energy, torch.ones(3, 2))
    with pytest.raises(NotImplementedError, match=r"continuous support.*Gibbs"):
        UnconstrainedEnergy(energy)
