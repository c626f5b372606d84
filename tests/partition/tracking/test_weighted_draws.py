"""Log Z and its gradient from a pool of weighted draws."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import NeuralEnergy, QuadraticEnergy
from pyro_ebm.partition.tracking.log_partition import LogPartition
from pyro_ebm.partition.tracking.weighted_draws import WeightedDraws

NORMAL = dist.Normal(torch.zeros(2), 1.5).to_event(1)


def started(energy, number=40_000, proposal=NORMAL):
    draws = WeightedDraws()
    draws.start(energy, proposal, number)
    return draws


def test_the_value_and_the_gradient():
    """By closed form. Faults: the proposal's density left out; weights detached."""
    energy = QuadraticEnergy(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 1.5]).diag())
    draws = started(energy)
    exact = math.log(2 * math.pi) - math.log(1.5) / 2
    found = draws.estimate(energy)
    assert found.status == "ok"
    assert abs(found.value - exact) < 4 * found.std_error
    values = []
    for _ in range(50):
        log_weights = draws.some(energy, 4000)
        values.append(log_weights.logsumexp(0) - math.log(4000))
    value = torch.stack(values).mean()
    assert abs(value.item() - exact) < 0.02
    value.backward()
    parameters = [p for p in energy.parameters() if p.grad is not None]
    assert parameters
    loc = next(p for p in parameters if p.shape == (2,))
    assert loc.grad.abs().max() < 0.05  # log Z does not depend on the location


def test_the_base_inside_an_energy_is_evaluated_once():
    """Fault: the energy of the base left out of the weights."""
    base = dist.Normal(torch.ones(2), 0.7).to_event(1)
    energy = NeuralEnergy((2,), (8,), base=base)
    draws = started(energy)
    assert abs(draws.estimate(energy).value) < 0.05
    expected = -energy(draws.x) - NORMAL.log_prob(draws.x)
    assert torch.allclose(draws.log_weights(energy), expected, atol=1e-4)
    count = [0]
    log_prob = base.log_prob
    energy.base_energy.distribution.log_prob = lambda x: count.append(0) or log_prob(x)
    draws.some(energy, 100)
    draws.estimate(energy)
    assert count == [0]


def test_a_proposal_that_is_not_the_base_inside_is_weighed():
    """Fault: its density is taken to drop out."""
    base = dist.Normal(torch.ones(2), 0.7).to_event(1)
    energy = NeuralEnergy((2,), (8,), base=base)
    assert started(energy, 1000, proposal=base).known.abs().max() == 0
    draws = started(energy, 1000)
    expected = -energy(draws.x) - NORMAL.log_prob(draws.x)
    assert torch.allclose(draws.log_weights(energy), expected, atol=1e-4)


def test_draws_serve_a_few_times_and_values_are_those_of_the_parameters():
    """Faults: a pool that is never renewed; weights of parameters that have moved."""
    energy = NeuralEnergy((2,), (8,), base=NORMAL)
    draws = started(energy, 1000)
    first = draws.x
    for _ in range(10):  # five times each
        draws.some(energy, 500)
    assert draws.x is first
    draws.some(energy, 500)
    assert not torch.isin(draws.x, first).any()
    before = draws.estimate(energy).value
    with torch.no_grad():
        energy.network[-1].bias.add_(1.0)
    assert draws.estimate(energy).value == pytest.approx(before - 1.0, abs=1e-5)
    second = draws.x
    draws.renew(energy)
    assert draws.x is not second
    third = draws.x
    draws.renew(energy)  # none was used
    assert draws.x is third


def test_moments_of_the_model():
    energy = QuadraticEnergy(torch.tensor([1.0, 0.0]))
    draws = started(energy)
    again = draws.resampled(energy, 20_000)
    assert (again.mean(0) - torch.tensor([1.0, 0.0])).abs().max() < 0.05
    assert (again.std(0) - 1).abs().max() < 0.05


def test_few_effective_draws_are_said():
    energy = QuadraticEnergy(torch.full((2,), 7.0), 25 * torch.eye(2))
    draws = started(energy, 2000)
    assert draws.effective_fraction(energy) < 0.01
    assert draws.estimate(energy).status == "unreliable"


def test_a_tracker_follows_by_draws_and_goes_back_to_walkers():
    energy = NeuralEnergy((2,), (8,), base=NORMAL)
    tracker = LogPartition(energy, NORMAL)
    draws = started(energy)
    tracker.follow_by(energy, draws)
    assert tracker.draws is draws
    assert tracker.averaged().method == "importance sampling"
    with torch.no_grad():
        energy.network[-1].bias.fill_(-2.0)
    for _ in range(2000):  # log Z of the average moves with the parameters
        tracker.follow(energy)
    assert tracker.averaged().value == pytest.approx(2.0, abs=0.05)
    assert not tracker.walkers.is_started
    assert tracker.value == pytest.approx(2.0, abs=0.05)
    tracker.follow_by(energy, None)
    assert tracker.draws is None
    assert tracker.walkers.is_started
    tracker.adopt_average(energy)
    assert tracker.averaged().method == "walkers"
    assert tracker.averaged().value == pytest.approx(2.0, abs=0.1)
