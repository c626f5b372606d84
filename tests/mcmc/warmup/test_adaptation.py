"""Step-size adaptation: it arrives, it resumes, and nothing non-finite poisons it."""

import dataclasses

import pytest
import torch

from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC, MALA, ChEES, StepInfo
from pyro_ebm.mcmc.warmup.adaptation import StepSizeAdaptation, find_step_size
from pyro_ebm.testing import CountingEnergy

KERNELS = {"mala": MALA(), "hmc": HMC(num_leapfrog=3)}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def narrow():
    """A Gaussian of 10 dimensions with standard deviations from 0.05 to 0.1."""
    deviation = torch.linspace(0.05, 0.1, 10)
    return QuadraticEnergy(torch.zeros(10), (deviation**-2).diag_embed()), deviation


def start(kernel, num_chains=256):
    energy, deviation = narrow()
    return energy, kernel.init(energy, torch.randn(num_chains, 10) * deviation)


def info_of(accept_prob):
    accept_prob = torch.as_tensor(accept_prob).reshape(-1)
    yes = torch.ones_like(accept_prob, dtype=torch.bool)
    return StepInfo(accept_prob, yes, yes)


def adapt(adaptation, kernel, energy, state, num_steps):
    for _ in range(num_steps):
        adapted = dataclasses.replace(kernel, step_size=adaptation.step_size)
        state, info = adapted.step(energy, state)
        adaptation.update(kernel, info)
    return state


def mean_acceptance(kernel, step_size, energy, state):
    kernel = dataclasses.replace(kernel, step_size=step_size)
    return torch.stack(
        [kernel.step(energy, state)[1].accept_prob.mean() for _ in range(30)]
    ).mean()


@pytest.mark.parametrize("target_accept_prob", [0.6, 0.9])
@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_reaches_the_target(kernel, factor, target_accept_prob):
    kernel = dataclasses.replace(kernel, target_accept_prob=target_accept_prob)
    energy, state = start(kernel)
    adaptation = StepSizeAdaptation(factor * find_step_size(kernel, energy, state))
    state = adapt(adaptation, kernel, energy, state, 150)
    averaged = mean_acceptance(kernel, adaptation.averaged_step_size, energy, state)
    assert abs(averaged - target_accept_prob) < 0.05
    last = mean_acceptance(kernel, adaptation.step_size, energy, state)
    assert abs(last - target_accept_prob) < 0.1


@pytest.mark.parametrize("name", KERNELS)
def test_settles_within_a_few_updates(name):
    """Seen to fail with Pyro's gain, by which HMC's acceptance swings by 0.06."""
    kernel = KERNELS[name]
    energy, state = start(kernel, num_chains=2000)
    adaptation = StepSizeAdaptation(find_step_size(kernel, energy, state))
    reached = []
    for _ in range(40):
        state = adapt(adaptation, kernel, energy, state, 1)
        reached.append(mean_acceptance(kernel, adaptation.step_size, energy, state))
    errors = torch.stack(reached)[20:] - kernel.target_accept_prob
    assert errors.abs().max() < 0.05


def test_several_transitions_count_as_their_mean(kernel):
    one, many = StepSizeAdaptation(0.1), StepSizeAdaptation(0.1)
    accept_prob = torch.rand(4, 8)
    one.update(kernel, info_of(accept_prob.mean()))
    many.update(kernel, StepInfo(accept_prob, accept_prob > 0, accept_prob > 0))
    torch.testing.assert_close(one.step_size, many.step_size)


def test_stays_where_the_target_is_met():
    """A step size that was found already is not left: unlike with a tenfold centre."""
    kernel = MALA(target_accept_prob=0.5)
    adaptation = StepSizeAdaptation(0.3)
    for _ in range(5):
        adaptation.update(kernel, info_of(0.5))
        torch.testing.assert_close(adaptation.step_size, torch.tensor(0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_continues_to_the_bit(kernel):
    first = StepSizeAdaptation(0.1)
    for _ in range(7):
        first.update(kernel, info_of(torch.rand(5)))
    second = StepSizeAdaptation(33.0)
    second.load_state_dict(first.state_dict())
    for _ in range(7):
        info = info_of(torch.rand(5))
        first.update(kernel, info)
        second.update(kernel, info)
        assert torch.equal(first.step_size, second.step_size)
        assert torch.equal(first.averaged_step_size, second.averaged_step_size)


def test_a_saved_state_is_not_changed_by_going_on(kernel):
    """Seen to fail while Pyro's ``t += 1`` reached the buffer."""
    adaptation = StepSizeAdaptation(0.1)
    saved = adaptation.state_dict()
    before = {name: value.clone() for name, value in saved.items()}
    adaptation.update(kernel, info_of(0.1))
    assert not torch.equal(adaptation.state_dict()["_state"], before["_state"])
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    assert isinstance(dict(adaptation.named_buffers())["_state"], torch.Tensor)


def test_follows_the_dtype_of_the_module(kernel):
    adaptation = StepSizeAdaptation(0.1).to(torch.float32)
    adaptation.update(kernel, info_of(torch.rand(5, dtype=torch.float64)))
    assert adaptation.step_size.dtype in (torch.float32, torch.float64)
    adaptation.reset(0.2)
    torch.testing.assert_close(adaptation.step_size.item(), 0.2, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("begin", [1e-8, 1e-3, 1.0, 1e6])
def test_find_step_size_from_far_off(kernel, begin):
    far = dataclasses.replace(kernel, step_size=begin)
    energy, state = start(far)
    step_size = find_step_size(far, energy, state)
    assert step_size.shape == ()
    # It straddles the target with the size on its other side.
    around = [
        mean_acceptance(kernel, factor * step_size, energy, state)
        for factor in (0.4, 2.5)
    ]
    assert around[0] > kernel.target_accept_prob > around[1]


def test_find_step_size_costs_a_transition_a_doubling(kernel):
    energy, state = start(kernel)
    counting = CountingEnergy(energy)
    far = dataclasses.replace(kernel, step_size=1e12)
    find_step_size(far, counting, state, max_doublings=5)
    assert counting.num_gradients == 5 * kernel.num_gradients * len(state.x)


def test_find_step_size_probes_long_trajectories_by_one_step():
    kernel = ChEES(step_size=1e-9)
    energy, state = start(kernel)
    counting = CountingEnergy(energy)
    step_size = find_step_size(kernel, counting, state)
    assert counting.num_gradients <= 30 * len(state.x)
    one = dataclasses.replace(kernel, max_leapfrog=1)
    assert mean_acceptance(one, step_size / 2, energy, state) > 0.8


def test_find_step_size_leaves_the_chains(kernel):
    energy, state = start(kernel)
    before = [part.clone() for part in state]
    find_step_size(kernel, energy, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_find_step_size_shrinks_until_the_energy_is_finite(kernel, bad):
    energy = FunctionEnergy(
        lambda x: torch.where(x.abs() < 1, 50 * x**2, bad + 0 * x), ()
    )
    far = dataclasses.replace(kernel, step_size=1e6)
    state = far.init(energy, torch.randn(256) / 10)
    step_size = find_step_size(far, energy, state)
    assert 0 < step_size < 1
    assert mean_acceptance(far, step_size, energy, state) > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_from_a_time_of_nonfinite_energies(kernel):
    """Step sizes of zero and of infinity are left again."""
    energy, state = start(kernel)
    adaptation = StepSizeAdaptation(find_step_size(kernel, energy, state))
    for accept_prob in (0.0, 1.0):
        for _ in range(100):
            adaptation.update(kernel, info_of(torch.full((5,), accept_prob)))
            assert not adaptation.step_size.isnan()
    state = adapt(adaptation, kernel, energy, state, 800)
    reached = mean_acceptance(kernel, adaptation.step_size, energy, state)
    assert abs(reached - kernel.target_accept_prob) < 0.1


def test_half_the_space_nonfinite_reaches_the_target(kernel):
    """Rejections at a wall count as what they are: a reason for shorter steps."""
    energy = FunctionEnergy(lambda x: torch.where(x > 0, x**2 / 2, torch.nan), ())
    state = kernel.init(energy, torch.randn(2000).abs())
    adaptation = StepSizeAdaptation(find_step_size(kernel, energy, state))
    state = adapt(adaptation, kernel, energy, state, 200)
    reached = mean_acceptance(kernel, adaptation.averaged_step_size, energy, state)
    assert abs(reached - kernel.target_accept_prob) < 0.1
    assert (state.x > 0).all()
