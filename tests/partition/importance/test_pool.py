"""Draws of several proposals, weighed as one mixture."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.partition.importance.pool import (
    Pool,
    difference,
    log_density,
    tempered,
)

ENERGY = QuadraticEnergy(torch.ones(2).double())
TRUTH = math.log(2 * math.pi)


class Normal:
    """A proposal."""

    def __init__(self, loc, scale):
        self.base = dist.Normal(torch.full((2,), loc), scale).to_event(1)

    def sample(self, num):
        return self.base.sample((num,))

    def log_prob(self, u):
        return self.base.log_prob(u)


def test_the_mean_weight_is_the_partition_function():
    """Over 500 pools of two rounds, the first far too wide and the second too narrow
    alone. Fault: the number of proposals left out; each draw weighed by its own
    proposal, whose mean of so few draws is off by the tail of the second."""
    values = []
    for _ in range(500):
        pool = Pool(ENERGY)
        first = Normal(0.0, 3.0)
        own = pool.add(first, 50)
        torch.testing.assert_close(own, pool.log_weights())
        pool.add(Normal(1.0, 0.4), 50)
        values.append(log_mean_exp(pool.log_weights()) - TRUTH)
    ratio = torch.stack(values).exp()
    error = ratio.std() / math.sqrt(500)
    assert error < 0.01
    assert abs(ratio.mean() - 1) < 4 * error


def test_weights_are_under_the_mixture_of_all_rounds():
    """Fault: a proposal is not evaluated at the draws before it."""
    proposals = [Normal(0.0, 2.0), Normal(1.0, 1.0), Normal(3.0, 0.5)]
    pool = Pool(ENERGY)
    for number, proposal in zip((10, 20, 30), proposals, strict=True):
        own = pool.add(proposal, number)
        assert own.shape == (number,)
    assert pool.num_rounds == 3
    u = pool.draws()
    assert u.shape == (60, 2)
    mixture = torch.stack([q.log_prob(u) for q in proposals]).logsumexp(0) - math.log(3)
    torch.testing.assert_close(pool.log_weights(), -ENERGY(u) - mixture)
    torch.testing.assert_close(own, -ENERGY(u[30:]) - proposals[2].log_prob(u[30:]))


def test_where_the_target_is_nothing_there_is_no_weight():
    """Whatever the proposal says. Fault: nan for the difference of infinities."""
    energy = FunctionEnergy(
        lambda x: torch.stack([-x[:, 0].log(), x[:, 1]]).sum(0), (2,)
    )
    u = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [0.0, 0.0], [1.0, -math.inf]])
    found = log_density(energy, u)
    torch.testing.assert_close(found, torch.tensor([-2.0, *[-math.inf] * 3]))
    weights = difference(found, torch.tensor([1.0, -math.inf, math.inf, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([-3.0, *[-math.inf] * 3]))


def test_events_of_any_shape():
    energy = FunctionEnergy(lambda x: x.sum((-1, -2)), (2, 3))
    u = torch.randn(5, 6)
    torch.testing.assert_close(log_density(energy, u), -u.sum(-1))


@pytest.mark.parametrize("wanted", [10, 100, 900])
def test_tempered_weights_leave_as_many_effective(wanted):
    """Fault: the power that leaves fewer."""
    log_weights = 20 * torch.randn(1000)
    log_weights[:50] = -math.inf
    found = tempered(log_weights, wanted)
    assert not found.isnan().any()
    left = effective_sample_fraction(found).item() * 1000
    assert wanted <= left < 1.01 * wanted + 1
    ratio = (found / log_weights)[50:]
    torch.testing.assert_close(ratio, ratio[:1].expand(950))
    assert 0 < ratio[0] < 1


def test_good_weights_stay_as_they_are():
    log_weights = 0.1 * torch.randn(1000)
    assert tempered(log_weights, 500) is log_weights
