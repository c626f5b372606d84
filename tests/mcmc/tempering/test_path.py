"""The two ends of a path at what a kernel leads to."""

import dataclasses
import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC, MALA, Kernel
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition import bidirectional
from pyro_ebm.testing import CountingEnergy

TRUTH = math.log(2 * math.pi) - 2 * math.log(2)


def path(energy):
    return GeometricPath(energy, dist.Normal(torch.zeros(2), 2.0).to_event(1))


def target():
    return QuadraticEnergy(torch.ones(2), 4 * torch.eye(2))


@dataclasses.dataclass(frozen=True)
class Twice(Kernel):
    """Two moves a step: what was evaluated last is not always where the chain is."""

    step_size: float = 0.3
    target_accept_prob: float = 0.574

    @property
    def num_gradients(self):
        return 2

    def step(self, energy, state):
        one = MALA(self.step_size, max_drift=None)
        state, _ = one.step(energy, state)
        return one.step(energy, state)


@dataclasses.dataclass(frozen=True)
class Peeks(Kernel):
    """Evaluates a further point after the move."""

    step_size: float = 0.3
    target_accept_prob: float = 0.574

    @property
    def num_gradients(self):
        return 2

    def step(self, energy, state):
        new = MALA(self.step_size).step(energy, state)
        energy.value_and_grad(torch.zeros_like(state.x))
        return new


@dataclasses.dataclass(frozen=True)
class Silent(Kernel):
    """Draws afresh, and evaluates the energy without its gradient."""

    step_size: float = 1.0
    target_accept_prob: float = 0.5

    @property
    def num_gradients(self):
        return 0

    def step(self, energy, state):
        _, info = MALA(0.1).step(target(), state)
        x = torch.randn_like(state.x)
        return state._replace(x=x, energy=energy(x)), info


@pytest.mark.parametrize(
    "kernel", [MALA(0.5), HMC(0.5, 3), Twice(), Peeks(0.3), Silent()], ids=repr
)
def test_the_ends_are_those_of_where_the_chains_are(kernel):
    """Fault: the last evaluation, accepted or not; that of the chains accepted."""
    p = path(target())
    p.inverse_temperature = 0.4
    state = p.sample_base(2, 50)
    for _ in range(5):
        state, _ = p.step(kernel, state)
        for part, expected in zip(state, p.evaluate(state.u), strict=True):
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    ("kernel", "cost"), [(MALA(0.5), 1), (HMC(0.5, 3), 3), (Peeks(0.3), 3)], ids=repr
)
def test_a_kernel_that_ends_at_its_proposal_costs_no_more(kernel, cost):
    """Fault: the outcome is always evaluated anew."""
    counting = CountingEnergy(target())
    p = path(counting)
    state = p.sample_base(50)
    counting.reset()
    p.step(kernel, state)
    assert counting.num_gradients == 50 * cost
    assert counting.num_values == 0


@pytest.mark.parametrize("kernel", [MALA(0.3), Twice(), Peeks(0.3)], ids=repr)
def test_bounds_with_a_kernel_of_the_users_enclose_the_truth(kernel):
    """Fault: the ends of the proposal evaluated last are taken where the chain has
    moved, which once made (3.04, 3.14) of 3.676."""
    draws = 1 + torch.randn(256, 2) / 2
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    found = bidirectional(
        target(), base, draws, num_temperatures=20, kernel=kernel, progress_bar=False
    )
    assert found.status == "ok"
    assert found.lower < TRUTH < found.upper
    assert found.upper - found.lower < 1
    assert abs(found.value - TRUTH) < 4 * found.std_error


def test_weights_along_the_path():
    """A point where the target is infinite has no weight upwards, all downwards.

    Fault: the sign of the step left out of it.
    """
    state = path(target()).sample_base(4)
    state = state._replace(target=torch.tensor([1.0, math.inf, math.nan, 0.0]))
    up, down = state.log_weight(0.2, 0.5), state.log_weight(0.5, 0.2)
    torch.testing.assert_close(up[0], 0.3 * (state.base[0] - 1.0))
    assert up[1] == up[2] == -math.inf
    assert down[1] == down[2] == math.inf
    assert (state.log_weight(0.3, 0.3) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_path_in_double_precision_draws_so(dtype):
    """Fault: draws of the base in its own precision, and then converted."""
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    single = GeometricPath(target(), base)
    double = GeometricPath(target(), base, is_double=True)
    assert single.draw_base(100).dtype == torch.float32
    u = double.draw_base(100)
    assert u.dtype == torch.float64
    assert (u != u.float()).all()
    assert double.sample_base(5).target.dtype == torch.float64


def test_a_base_draws_from_its_density():
    """The squared last diagonal of LKJ's factor of three numbers is uniform; torch has
    .4 for its mean. Fault: the base as it is."""
    base = dist.LKJCholesky(3, 1.0)
    p = GeometricPath(DistributionEnergy(base), base)
    factor = p.transform(p.draw_base(4000))
    squares = factor[..., 2, 2].square()
    assert abs(squares.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)


def test_a_temperature_for_each_chain():
    """As for one number, and at the end without the base, which may be infinite there.
    Fault: the temperatures along the coordinates."""
    state = path(target()).sample_base(3, 2)
    for part, column in (
        (state.at(torch.tensor([0.3, 1.0])), 1),
        (state.at(torch.tensor([1.0, 0.3])), 0),
    ):
        for got, end, between in zip(part, state.at(1.0), state.at(0.3), strict=True):
            torch.testing.assert_close(got[:, column], end[:, column])
            torch.testing.assert_close(got[:, 1 - column], between[:, 1 - column])
    nowhere = state._replace(base=torch.full_like(state.base, torch.inf))
    ends = nowhere.at(torch.ones(2))
    torch.testing.assert_close(ends.energy, state.target)
    betas = torch.tensor([0.2, 0.5]), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(
        state.log_weight(*betas),
        torch.stack([state.log_weight(0.2, 0.5)[:, 0], torch.zeros(3)], 1),
    )
