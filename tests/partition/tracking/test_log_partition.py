"""log Z of an energy that drifts as it would while it is learned."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_ebm
from pyro_ebm.energies import Energy, FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.partition import LogPartition, quadrature
from pyro_ebm.partition.tracking.log_partition import _pooled
from pyro_ebm.partition.tracking.walkers import FollowedEnergy
from pyro_ebm.testing import CountingEnergy


class Gaussian(nn.Module):
    """A Gaussian that does not know its log Z."""

    def __init__(self, dim=2):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_precision = nn.Parameter(torch.zeros(dim))
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        square = (x - self.loc) ** 2 * self.log_precision.exp()
        return square.sum(-1) / 2 + self.offset


def truth(energy):
    network = energy.fn
    half = (math.log(2 * math.pi) - network.log_precision).sum() / 2
    return (half - network.offset).item()


def base(scale=2.0):
    return dist.Normal(torch.zeros(2), scale).to_event(1)


def drifting(num_steps, tracker, energy, shake=0.01):
    """Steps of an optimiser: a drift and noise."""
    drift = {"loc": 0.002, "log_precision": 0.002, "offset": -0.01}
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            for name, parameter in energy.fn.named_parameters():
                parameter += drift[name] + shake * torch.randn_like(parameter)
        tracker.follow(energy)
        yield step


def started(**settings):
    energy = FunctionEnergy(Gaussian(), (2,))
    tracker = LogPartition(energy, base(), **settings)
    tracker.follow(energy)
    return energy, tracker


def test_follows_a_drifting_energy():
    """At six times, for the average and for the iterate, and 95 % intervals. With the
    update of the weights left out: seen to fail, as asserted."""
    inside, planted, start = 0, 0, None
    for seed in range(3):
        pyro.set_rng_seed(seed)
        energy, tracker = started()
        start = tracker.averaged().value
        for step in drifting(600, tracker, energy):
            if step % 100:
                continue
            estimate = tracker.averaged()
            exact = truth(tracker.averaged_energy)
            assert estimate.status == tracker.status == "ok"
            inside += estimate.lower <= exact <= estimate.upper
            planted += abs(start - exact) <= estimate.upper - estimate.value
            assert abs(estimate.value - exact) < 0.15
            # The value of the iterate is read at every interval, of which this is one.
            assert abs(tracker.value.item() - truth(energy)) < 0.2
            assert 0 < tracker.std_error < 0.1
        assert abs(truth(energy) - start) > 2  # there was something to follow
    assert inside >= 15  # of 18
    assert planted < 9


def test_large_steps_are_taken_in_halves():
    energy, tracker = started(interval=1)
    with torch.no_grad():
        energy.fn.loc.add_(5.0)
        tracker.followed.mean.copy_(tracker.followed._flatten(energy))
    before = int(tracker.walkers.num_updates)
    tracker.follow(energy)
    assert int(tracker.walkers.num_updates) > before + 4
    estimate = tracker.averaged()
    exact = truth(tracker.averaged_energy)
    assert abs(estimate.value - exact) < 4 * estimate.std_error + 0.02


def test_a_shift_of_the_energy_moves_log_partition_exactly():
    energy, tracker = started(interval=1)
    before = tracker.averaged().value
    with torch.no_grad():
        energy.fn.offset.add_(3.0)
        tracker.followed.mean.copy_(tracker.followed._flatten(energy))
    tracker.follow(energy)
    assert tracker.averaged().value == pytest.approx(before - 3.0)
    assert tracker.value.item() == pytest.approx(before - 3.0)


def test_before_it_is_started():
    tracker = LogPartition(FunctionEnergy(Gaussian(), (2,)), base())
    estimate = tracker.averaged()
    assert math.isnan(estimate.value)
    assert estimate.status == tracker.status == "unreliable"
    assert "not estimated yet" in tracker.reason
    assert tracker.num_evaluations == 0


def test_refresh_starts_anew():
    energy, tracker = started()
    for _ in drifting(50, tracker, energy, shake=0.0):
        pass
    tracker.refresh(energy)
    assert tracker.num_steps == 0
    assert abs(tracker.averaged().value - truth(energy)) < 0.2
    torch.testing.assert_close(tracker.averaged_energy.fn.loc, energy.fn.loc.detach())


def test_finish_makes_the_average_the_energy():
    energy, tracker = started()
    for _ in drifting(95, tracker, energy):
        pass
    iterate = energy.fn.loc.detach().clone()
    tracker.adopt_average(energy)
    torch.testing.assert_close(tracker.averaged_energy.fn.loc, energy.fn.loc.detach())
    assert not torch.equal(energy.fn.loc, iterate)
    estimate = tracker.averaged()
    assert tracker.value.item() == pytest.approx(estimate.value)
    assert tracker.std_error.item() == pytest.approx(estimate.std_error)
    assert abs(estimate.value - truth(energy)) < 0.1


def two_modes():
    locs = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    return FunctionEnergy(
        lambda x: -torch.logsumexp(-2 * (x[..., None, :] - locs).square().sum(-1), -1),
        (2,),
    )


def test_the_check_sees_a_mode_that_all_walkers_have_lost():
    """The spread of the islands does not: the interval excludes the truth by far."""
    energy = two_modes()
    tracker = LogPartition(energy, base(3.0))
    tracker.refresh(energy)
    exact = quadrature(energy).value
    assert tracker.check()
    assert tracker.averaged().status == "ok"
    # Planted: all walkers in the right mode, with the weights that they would have.
    walkers = tracker.walkers
    walkers.u = torch.stack([walkers.u[..., 0].abs(), walkers.u[..., 1]], -1)
    with torch.no_grad():
        walkers.energy, walkers.grad = energy.value_and_grad(walkers.u)
    walkers.log_weights = torch.zeros_like(walkers.log_weights)
    walkers.log_offset = exact - math.log(2) + 0.01 * torch.randn(8)
    lost = tracker.averaged()
    assert lost.upper < exact - 0.5
    assert lost.status == "ok"
    assert not tracker.check()
    assert tracker.averaged().status == tracker.status == "unreliable"
    assert "fresh run" in tracker.averaged().reason
    # The fresh run, which has found more, is where the walkers go on.
    assert abs(tracker.averaged().value - exact) < 0.3
    assert tracker.check()
    assert tracker.averaged().status == "ok"


def test_a_check_that_agrees_mends_what_the_walkers_have_gained():
    """An error of .2, of which the spread of the islands knows, is nearly undone by a
    run that is more precise, and the walkers stay where they are.

    Planted fault: a check that agrees and leaves the walkers as they were.
    """
    energy, tracker = started()
    exact, walkers = truth(tracker.averaged_energy), tracker.walkers
    walkers.anchor(exact + 0.2, 0.15)
    u, weights = walkers.u.clone(), walkers.log_weights.softmax(-1)
    assert tracker.check()
    estimate = tracker.averaged()
    assert abs(estimate.value - exact) < 0.1
    assert estimate.std_error < 0.06
    assert torch.equal(walkers.u, u)
    torch.testing.assert_close(walkers.log_weights.softmax(-1), weights)


def test_checks_pool_with_an_honest_error():
    """Five runs from the base are worth more than one, in 24 trackers; and the error in
    standard errors has the mean square of Student's t with 7 degrees of freedom, 1.4,
    give or take.

    Planted faults: as above; the standard error of the walkers left as it was.
    """
    energy = FunctionEnergy(Gaussian(), (2,))
    first, last, scores = [], [], []
    for seed in range(24):
        pyro.set_rng_seed(seed)
        tracker = LogPartition(energy, base(), num_walkers=32, check_interval=50)
        tracker.refresh(energy)
        first.append(tracker.averaged().value - truth(energy))
        for _ in range(4):
            assert tracker.check()
        estimate = tracker.averaged()
        last.append(estimate.value - truth(energy))
        scores.append(last[-1] / estimate.std_error)
    square = torch.tensor([first, last, scores]).square().mean(-1)
    assert square[1] < 0.6 * square[0]
    assert 0.4 < square[2] < 3.0


def test_pooled_estimates_by_hand():
    """Weights 4 to 1; the factor of the error is 1 + 8 * .16 / 7 for eight islands."""
    value, error = _pooled(1.0, 0.2, 2.0, 0.1, 8)
    assert value == pytest.approx(1.8)
    assert error**2 == pytest.approx(0.04 * 0.01 / 0.05 * (1 + 1.28 / 7))
    assert _pooled(1.0, 0.0, 2.0, 0.1, 8) == (1.0, 0.0)
    assert _pooled(1.0, 0.0, 1.0, 0.0, 8) == (1.0, 0.0)


def test_a_run_from_the_base_costs_no_more_than_the_walkers():
    """The more it costs, the fewer particles it has, and never fewer than walkers."""
    energy, tracker = started()
    walkers = 8 * 64 * (500 // 10) * 5  # evaluations until the next check
    before = tracker.num_evaluations
    tracker.check()
    assert 0.1 * walkers < tracker.num_evaluations - before < 1.2 * walkers
    sizes = []
    for cost in (1.0, 100.0, 200.0, 1e6, math.inf):
        tracker.check_cost.fill_(cost)
        sizes.append(tracker._num_particles())
    assert sizes == [512, 128, 64, 64, 64]
    assert tracker.walkers.u.shape == (8, 64, 2)


def test_an_estimate_from_elsewhere_moves_no_walker_that_agrees():
    energy, tracker = started()
    tracker.adopt_average(energy)
    exact, u = truth(energy), tracker.walkers.u.clone()
    found = tracker.averaged()._replace(value=exact, std_error=0.001)
    tracker.set_log_partition(energy, found)
    assert torch.equal(tracker.walkers.u, u)
    assert tracker.averaged().value == pytest.approx(exact)
    assert tracker.averaged().std_error == pytest.approx(0.001)
    tracker.walkers.log_offset = tracker.walkers.log_offset + 5.0
    tracker.set_log_partition(energy, found)  # now they are of no use
    assert tracker.is_settled
    assert tracker.averaged().value == tracker.value == pytest.approx(exact)
    tracker.follow(energy)  # they begin anew, from the estimate
    assert not tracker.is_settled
    assert not torch.equal(tracker.walkers.u, u)
    assert tracker.averaged().value == pytest.approx(exact, abs=0.05)


def test_walkers_that_have_found_more_are_kept():
    """A check that errs downwards makes the estimate unreliable, and takes nothing."""
    energy = two_modes()
    tracker = LogPartition(energy, base(3.0))
    tracker.refresh(energy)
    tracker.walkers.log_offset = tracker.walkers.log_offset + 2.0
    value = tracker.averaged().value
    assert not tracker.check()
    assert tracker.averaged().value == value
    assert tracker.status == "unreliable"


def test_islands_that_disagree_are_unreliable():
    energy, tracker = started(interval=1)
    tracker.walkers.log_offset = tracker.walkers.log_offset + 3 * torch.arange(8)
    tracker.follow(energy)
    assert tracker.status == "unreliable"
    assert "disagree by more than 0.5 nats" in tracker.reason


def test_an_iterate_far_from_its_average_is_unreliable_alone():
    energy, tracker = started(interval=1)
    with torch.no_grad():
        energy.fn.log_precision.add_(9.0)
    tracker.follow(energy)
    assert tracker.status == "unreliable"
    assert "too far from their average" in tracker.reason
    assert tracker.averaged().status == "ok"


def test_nan_parameters_are_unreliable_and_no_number():
    energy, tracker = started(interval=1)
    with torch.no_grad():
        energy.fn.loc.mul_(math.nan)
    tracker.follow(energy)
    assert tracker.status == tracker.averaged().status == "unreliable"
    assert "not finite" in tracker.reason
    assert not math.isfinite(tracker.value)


def test_a_closed_form_is_exact_and_free():
    energy = CountingEnergy(QuadraticEnergy(torch.zeros(2)))
    tracker = LogPartition(energy, base())
    for step in range(30):
        with torch.no_grad():
            energy.energy.log_diagonal.add_(0.1)
        tracker.follow(energy)
        exact = energy.closed_form().log_partition.item()
        if step % 10 == 0:
            assert tracker.value.item() == pytest.approx(exact)
    assert tracker.status == tracker.averaged().status == "exact"
    assert tracker.check()
    tracker.adopt_average(energy)
    exact = energy.closed_form().log_partition.item()
    assert tracker.value.item() == tracker.averaged().value == pytest.approx(exact)
    assert energy.num_gradients + energy.num_values + tracker.num_evaluations == 0


def test_evaluations_are_counted_and_few():
    energy, tracker = started(check_interval=10**9)
    before = tracker.num_evaluations
    for _ in drifting(100, tracker, energy):
        pass
    spent = tracker.num_evaluations - before
    # 10 updates of 512 walkers: weights, three leapfrog steps and the iterate.
    assert 10 * 512 * 5 <= spent <= 10 * 512 * 7
    assert spent < 0.13 * 100 * 256 * 11  # of PCD with 256 chains and 10 moves


def test_state_dict_continues_to_the_bit():
    energy, tracker = started()
    for _ in drifting(25, tracker, energy):
        pass
    other_energy = copy.deepcopy(energy)
    other = LogPartition(FunctionEnergy(Gaussian(), (2,)), base())
    other.load_state_dict(copy.deepcopy(tracker.state_dict()))
    for pair in ((tracker, energy), (other, other_energy)):
        pyro.set_rng_seed(4)
        for _ in drifting(25, *pair):
            pass
    one, two = tracker.state_dict(), other.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


# The average -------------------------------------------------------------------------


def test_the_average_is_that_of_the_equation():
    energy, tracker = started()
    expected = energy.fn.loc.detach().clone()
    for step in drifting(200, tracker, energy):
        weight = min(0.01, 9 / (step + 8))
        expected += weight * (energy.fn.loc.detach() - expected)
    tracker._advance()
    torch.testing.assert_close(tracker.averaged_energy.fn.loc, expected)


def test_followed_energy_holds_buffers_and_keeps_ties():
    energy = NeuralEnergy((2,), (4, 4))
    energy.network[2].weight = energy.network[2].weight
    tied = nn.Module()
    tied.first = tied.second = nn.Linear(2, 2)
    energy.more = tied
    followed = FollowedEnergy(energy)
    assert not list(followed.parameters())
    x = torch.randn(3, 2)
    torch.testing.assert_close(followed.energy(x), energy(x))
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter += 0.3
    assert not torch.allclose(followed.energy(x), energy(x))  # a copy
    followed.reset(energy)
    torch.testing.assert_close(followed.energy(x), energy(x))
    fresh = NeuralEnergy((2,), (4, 4))
    fresh.more = copy.deepcopy(tied)
    with torch.no_grad():
        followed.write(fresh)
    torch.testing.assert_close(fresh(x), energy(x))


def test_followed_energy_takes_over_buffers():
    class WithBuffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0))
            self.register_buffer("centre", torch.zeros(2))

        def forward(self, x):
            return self.weight * (x - self.centre).square().sum(-1)

    energy = FunctionEnergy(WithBuffer(), (2,))
    followed = FollowedEnergy(energy)
    energy.fn.centre += 2.0
    followed.average(energy, 0.5)
    assert torch.equal(followed.energy.fn.centre, torch.full((2,), 2.0))


class Bowl(Energy):
    """``w |x|^2``, without a closed form: no partition function where ``w < 0``."""

    def __init__(self, weight):
        super().__init__((2,))
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return self.weight * x.square().sum(-1)


def test_no_partition_function_is_no_number():
    """Seen to fail without the ray test: a log Z of 8.9 +- .1, called ok."""
    energy = Bowl(-0.5)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = pyro_ebm.EnergyModel(energy, base)
    tracked = model.log_partition
    tracked.refresh(energy)
    tracked.follow(energy)
    estimate = tracked.averaged()
    assert (estimate.status, tracked.status) == ("unreliable", "unreliable")
    assert math.isnan(estimate.value)
    assert "no partition function" in estimate.reason
    assert not model().is_normalized
    assert not model.averaged().is_normalized
    result = pyro_ebm.fit(
        model, torch.randn(50, 2), num_steps=3, record_interval=1, progress_bar=False
    )
    assert result.log_partition.status == "unreliable"
    assert not result.history[-1].train.is_normalized


def test_a_partition_function_that_appears_is_found():
    energy = Bowl(-0.5)
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    tracked = LogPartition(energy, base)
    tracked.refresh(energy)
    energy.weight.data.fill_(0.5)
    tracked.followed.reset(energy)
    assert tracked.check()
    tracked.read(energy)
    estimate = tracked.averaged()
    assert estimate.status == "ok"
    assert estimate.lower < math.log(2 * math.pi) < estimate.upper
