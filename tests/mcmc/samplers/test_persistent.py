"""Persistent chains: cost, resumption, supports and failures."""

import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import DistributionEnergy, FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC, MALA, PersistentChains
from pyro_ebm.mcmc.samplers.persistent import StatefulModule
from pyro_ebm.testing import CountingEnergy, assert_moments

KERNELS = {"mala": MALA(), "hmc": HMC(num_leapfrog=3)}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def gaussian():
    return QuadraticEnergy(torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 1], [1, 2]]))


def started(kernel, energy=None, num_chains=64):
    energy = gaussian() if energy is None else energy
    chains = PersistentChains()
    chains.start(energy, torch.randn(num_chains, *energy.event_shape), kernel)
    return chains


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x).squeeze(-1) + x.square().sum(-1) / 2


@pytest.mark.parametrize("num_steps", [1, 10, 25])
def test_cost(kernel, num_steps):
    energy = CountingEnergy(gaussian())
    chains = started(kernel, energy)
    energy.reset()
    chains.advance(energy, kernel, num_steps)
    assert energy.num_gradients == 64 * (num_steps * kernel.num_gradients + 1)
    assert energy.num_values == 0


def test_reaches_the_energy_from_far_away(kernel):
    chains = PersistentChains()
    energy = gaussian()
    chains.start(energy, 20 + torch.randn(4000, 2), kernel)
    for _ in range(2):
        x = chains.advance(energy, kernel, num_steps=200)
    precision = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert_moments(x, torch.tensor([1.0, -1.0]), precision.inverse().diagonal())
    assert abs(chains.accept_prob - kernel.target_accept_prob) < 0.1


def test_follows_a_changing_energy(kernel):
    """The step size is 100 times too long after the change, and adapts."""
    chains = started(kernel, num_chains=4000)
    for scale in (1.0, 1e-4, 1.0):
        precision = torch.eye(2) / scale
        energy = QuadraticEnergy(torch.zeros(2), precision)
        for _ in range(15):
            x = chains.advance(energy, kernel, num_steps=20)
    assert abs(chains.accept_prob - kernel.target_accept_prob) < 0.15
    assert_moments(x, 0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_continues_to_the_bit_in_fresh_chains(kernel):
    energy = gaussian()
    first = started(kernel, energy)
    first.advance(energy, kernel, 13)
    second = PersistentChains()
    assert not second.is_started
    assert second.u.shape != first.u.shape
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.is_started
    draws = []
    for chains in (first, second):
        torch.manual_seed(7)
        draws.append([chains.advance(energy, kernel, 13) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_state_dict_inside_a_larger_module(kernel):
    """As an energy model holds them, over chains of another number."""
    first = nn.ModuleDict({"energy": gaussian(), "chains": started(kernel)})
    fresh = {"energy": gaussian(), "chains": started(kernel, num_chains=3)}
    second = nn.ModuleDict(fresh)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second["chains"].u, first["chains"].u)


def test_loading_names_missing_and_unexpected_keys(kernel):
    state = started(kernel).state_dict()
    without = {name: value for name, value in state.items() if name != "u"}
    with pytest.raises(RuntimeError, match=r"Missing key.*\"u\""):
        PersistentChains().load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"more\""):
        PersistentChains().load_state_dict({**state, "more": torch.ones(2)})
    result = PersistentChains().load_state_dict({"u": state["u"]}, strict=False)
    assert "num_stuck" in result.missing_keys


def test_saved_state_is_not_changed_by_going_on(kernel):
    """Seen to fail while a counter and Pyro's ``t`` were added to in place."""
    wall = FunctionEnergy(
        lambda x: torch.where(x[..., 0] > 0, x.square().sum(-1) / 2, torch.nan), (2,)
    )
    chains = PersistentChains()
    chains.start(wall, torch.rand(64, 2), kernel)
    saved = chains.state_dict()
    before = copy.deepcopy(saved)
    chains.advance(wall, kernel, 20)
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    assert chains.num_rejected_nonfinite > before["num_rejected_nonfinite"]


def test_what_is_returned_is_the_callers(kernel):
    energy = gaussian()
    chains = started(kernel, energy)
    x = chains.advance(energy, kernel, 5)
    assert not x.requires_grad
    u = chains.u.clone()
    x.requires_grad_()
    with torch.no_grad():
        x += 1
    assert torch.equal(chains.u, u)
    assert not chains.u.requires_grad


def test_all_state_is_in_buffers(kernel):
    energy = gaussian()
    chains = started(kernel, energy)
    chains.advance(energy, kernel, 5)
    names = {"u", "accept_prob", "num_rejected_nonfinite", "num_stuck"}
    assert set(chains.state_dict()) == names | {"adaptation._state"}
    assert not list(chains.parameters())


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_energy(kernel, model_dtype, dtype):
    energy = FunctionEnergy(Network().to(model_dtype), (2,))
    chains = PersistentChains()
    chains.start(energy, torch.randn(8, 2), kernel)
    for _ in range(2):
        assert chains.advance(energy, kernel, 3).dtype == model_dtype
    fresh = PersistentChains()
    fresh.load_state_dict(chains.state_dict())
    other = torch.float32 if model_dtype == torch.float64 else torch.float64
    assert fresh.advance(energy.to(other), kernel, 3).dtype == other


def test_module_of_chains_changes_dtype_with_its_energy(kernel):
    module = nn.ModuleDict(
        {"energy": FunctionEnergy(Network(), (2,)), "chains": PersistentChains()}
    )
    module["chains"].start(module["energy"], torch.randn(8, 2), kernel)
    module.float()
    x = module["chains"].advance(module["energy"], kernel, 3)
    assert x.dtype == module["chains"].u.dtype == torch.float32


def test_stays_in_a_constrained_support(kernel):
    gamma = dist.Gamma(torch.tensor(3.0), 2.0)
    chains = PersistentChains()
    chains.start(DistributionEnergy(gamma), torch.ones(4000), kernel)
    x = chains.advance(DistributionEnergy(gamma), kernel, 200)
    assert (x > 0).all()
    assert_moments(x, 1.5, 0.75)


def test_simplex_has_a_smaller_unconstrained_event(kernel):
    energy = DistributionEnergy(dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    chains = PersistentChains()
    chains.start(energy, torch.full((32, 3), 1 / 3), kernel)
    x = chains.advance(energy, kernel, 5)
    assert chains.u.shape == (32, 2)
    torch.testing.assert_close(x.sum(-1), torch.ones(32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_at_all_starts(kernel, bad):
    energy = FunctionEnergy(lambda x: x.sum(-1) * 0 + bad, (2,))
    with pytest.raises(DivergenceError, match="not at any of the 64 chains"):
        started(kernel, energy)


def test_outside_the_support_at_all_starts(kernel):
    energy = DistributionEnergy(dist.Gamma(3.0, 1.0, validate_args=False))
    with pytest.raises(DivergenceError, match="overlaps the support"):
        PersistentChains().start(energy, -torch.ones(5), kernel)


def half_line():
    return FunctionEnergy(lambda x: torch.where(x > 0, x**2 / 2, torch.nan), ())


def test_chains_with_nonfinite_starts_join_the_others(kernel):
    """Left alone they never move, and hold the mean acceptance below any target."""
    chains = PersistentChains()
    chains.start(half_line(), torch.randn(4000), kernel)
    x = chains.advance(half_line(), kernel, 200)
    assert (x > 0).all()
    assert abs(chains.accept_prob - kernel.target_accept_prob) < 0.15
    assert_moments(x, (2 / torch.pi) ** 0.5, 1 - 2 / torch.pi)


def test_chains_that_a_new_energy_strands_join_the_others(kernel):
    energy = FunctionEnergy(lambda x: x**2 / 2, ())
    chains = started(kernel, energy, num_chains=1000)
    chains.advance(energy, kernel, 10)
    assert (chains.advance(half_line(), kernel, 1) > 0).all()


def test_an_energy_that_became_nonfinite_everywhere(kernel):
    energy = gaussian()
    chains = started(kernel, energy)
    with torch.no_grad():
        energy.loc.fill_(torch.nan)
    with pytest.raises(DivergenceError, match="learning rate"):
        chains.advance(energy, kernel, 5)


def test_every_chain_stuck(kernel):
    """Seen to fail while a step rounded to nothing, always accepted, was a move."""
    chains = started(kernel, gaussian(), num_chains=8)
    points = chains.u.clone()

    def trap(x):
        inside = (x[..., None, :] == points).all(-1).any(-1)
        return torch.where(inside, 0.0, torch.nan) + 0 * x.sum(-1)

    trapped = FunctionEnergy(trap, (2,))
    for _ in range(chains.MAX_STUCK // 20 - 1):
        chains.advance(trapped, kernel, 20)
    assert torch.equal(chains.u, points)
    with pytest.raises(DivergenceError, match=r"none of the 8 chains .* proposals had"):
        chains.advance(trapped, kernel, 20)
    assert 8 * 20 < chains.num_rejected_nonfinite <= 8 * chains.MAX_STUCK


def test_a_move_resets_the_count_of_stuck_transitions(kernel):
    chains = started(kernel)
    chains.num_stuck = torch.tensor(chains.MAX_STUCK - 1)
    chains.advance(gaussian(), kernel, 20)
    assert chains.num_stuck == 0


def test_bad_arguments(kernel):
    energy = gaussian()
    with pytest.raises(RuntimeError, match="start"):
        PersistentChains().advance(energy, kernel, 1)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        started(kernel).advance(energy, kernel, 0)
    for shape in [(2,), (0, 2), (4, 3), (2, 4, 2)]:
        with pytest.raises(ValueError, match=r"^x must"):
            PersistentChains().start(energy, torch.zeros(shape), kernel)


def test_stateful_module_takes_the_shape_of_what_is_loaded():
    class Holder(StatefulModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("values", torch.empty(0))

    holder, other = Holder(), Holder()
    holder.values = torch.arange(6.0).reshape(2, 3)
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other.values, holder.values)
    assert other.values is not holder.values
    assert "values" in dict(other.named_buffers())


@pytest.mark.gpu
def test_on_cuda(kernel):
    """The chains follow the energy, whether or not they were moved themselves."""
    energy = FunctionEnergy(Network(), (2,)).cuda()
    chains = PersistentChains()
    chains.start(energy, torch.randn(8, 2), kernel)
    assert chains.advance(energy, kernel, 25).is_cuda
    fresh = PersistentChains().cuda()
    fresh.load_state_dict(chains.state_dict())
    assert fresh.advance(energy, kernel, 25).is_cuda
