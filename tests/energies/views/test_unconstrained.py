"""The change of variables, by quadrature."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    QuadraticEnergy,
    UnconstrainedEnergy,
    unconstrained,
)
from pyro_ebm.energies.views.unconstrained import is_unconstrained, same_support
from pyro_ebm.partition.default_base import default_base

GAMMA = FunctionEnergy(lambda x: x - 2 * x.log(), (), constraints.positive)
BETA = FunctionEnergy(
    lambda x: -x.log() - 2 * (1 - x).log(), (), constraints.unit_interval
)


@pytest.mark.parametrize(
    ("energy", "log_partition", "mean"),
    [
        (GAMMA, math.log(2), 3.0),
        (BETA, math.lgamma(2) + math.lgamma(3) - math.lgamma(5), 0.4),
    ],
    ids=["gamma(3, 1)", "beta(2, 3)"],
)
def test_log_partition_and_mean_are_kept(energy, log_partition, mean):
    """The Jacobian with the wrong sign, or left out: both planted in
    ``UnconstrainedEnergy.forward``, and seen to fail by 0.7 to 6 nats."""
    pulled_back, to_support = unconstrained(energy)
    u = torch.linspace(-40, 40, 8001)
    log_density = -pulled_back(u)
    log_sum = torch.logsumexp(log_density, 0) + (u[1] - u[0]).log()
    assert log_sum.item() == pytest.approx(log_partition, abs=1e-8)
    average = (log_density.softmax(0) * to_support(u)).sum()
    assert average.item() == pytest.approx(mean, abs=1e-8)


def test_simplex_loses_a_dimension():
    dirichlet = DistributionEnergy(dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])))
    pulled_back, to_support = unconstrained(dirichlet)
    assert pulled_back.event_shape == (2,)
    assert to_support(torch.randn(5, 2)).shape == (5, 3)
    line = torch.linspace(-20, 20, 401)
    log_density = -pulled_back(torch.cartesian_prod(line, line))
    log_sum = torch.logsumexp(log_density, 0) + 2 * (line[1] - line[0]).log()
    assert log_sum.item() == pytest.approx(0.0, abs=1e-6)


def test_real_energy_is_returned_as_it_is():
    energy = QuadraticEnergy(torch.zeros(2))
    same, identity = unconstrained(energy)
    x = torch.randn(3, 2)
    assert same is energy
    assert identity(x) is x


def test_mixture_is_unconstrained_where_its_components_are():
    """torch wraps the support of a mixture in a constraint that nothing knows."""
    gaussians = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(3)), gaussians)
    energy = DistributionEnergy(mixture)
    assert unconstrained(energy)[0] is energy
    gammas = dist.Gamma(torch.tensor([1.0, 3.0]), 1.0)
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), gammas)
    assert isinstance(
        unconstrained(DistributionEnergy(mixture))[0], UnconstrainedEnergy
    )


PARTS = constraints.cat(
    [
        constraints.independent(constraints.unit_interval, 1),
        constraints.independent(constraints.positive, 1),
    ],
    dim=-1,
)


@pytest.mark.parametrize(
    ("base", "far"),
    [
        (dist.Gamma(torch.tensor(2.0), 1.0), 1e4),
        (dist.Gamma(torch.tensor(2.0), 1.0), -1e4),
        (dist.Beta(torch.tensor(2.0), 3.0), torch.inf),
        (default_base(FunctionEnergy(abs, (2,), PARTS)), 1e4),
    ],
)
def test_a_distribution_that_refuses_a_point_refuses_that_point_alone(base, far):
    """Far out a bijection rounds to the edge of the support or overflows."""
    fn = FunctionEnergy(lambda x: -base.log_prob(x), base.event_shape, base.support)
    flat, _ = unconstrained(fn)
    near = torch.zeros(1, *flat.event_shape)
    u = torch.cat([near, near + far])
    value = flat(u)
    assert value[0] == flat(near)[0]
    assert not value[1].isfinite()
    _, grad = flat.value_and_grad(u)
    assert torch.equal(grad[:1], flat.value_and_grad(near)[1])
    with pytest.raises(ValueError, match="support"):
        FunctionEnergy(
            lambda x: -dist.Gamma(2.0, 1.0).log_prob(-x), (), constraints.positive
        )(torch.ones(2))


def test_support_without_a_bijection_is_an_error():
    energy = FunctionEnergy(lambda x: x.float(), (), constraints.boolean)
    with pytest.raises(NotImplementedError, match="Boolean"):
        UnconstrainedEnergy(energy)


@pytest.mark.parametrize(
    ("support", "expected"),
    [
        (constraints.real, True),
        (constraints.real_vector, True),
        (constraints.independent(constraints.real, 3), True),
        (constraints.positive, False),
        (constraints.interval(-1e9, 1e9), False),
        (constraints.simplex, False),
    ],
    ids=str,
)
def test_is_unconstrained(support, expected):
    assert is_unconstrained(support) is expected


def test_same_support():
    interval = constraints.interval
    assert same_support(constraints.positive, constraints.nonnegative)
    assert same_support(interval(0.0, 1.0), constraints.unit_interval)
    assert not same_support(interval(0.0, 1.0), interval(0.0, 2.0))
    assert not same_support(constraints.real, constraints.real_vector)
    assert not same_support(constraints.boolean, constraints.real)
