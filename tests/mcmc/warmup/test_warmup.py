"""Warm-up: what it finds, what it reports, that it ends, and that it resumes."""

import dataclasses
import io
import math
from dataclasses import dataclass

import pytest
import torch

from pyro_ebm.energies import Energy, FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC, MALA, ULA, ChEES, Kernel
from pyro_ebm.mcmc.base import StepInfo, accept
from pyro_ebm.mcmc.warmup.adaptation import KernelAdaptation
from pyro_ebm.mcmc.warmup.warmup import Warmup
from pyro_ebm.testing import CountingEnergy, assert_moments

KERNELS = {
    "mala": MALA(),
    "ula": ULA(),
    "hmc": HMC(num_leapfrog=3),
    "chees": ChEES(),
}
DEVIATION = torch.logspace(-2, 0.5, 6, dtype=torch.float64)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def skewed(deviation=DEVIATION):
    """A Gaussian of unequal deviations, far from the origin in some coordinates."""
    loc = 30 * deviation
    return QuadraticEnergy(loc, (deviation**-2).diag_embed()), loc


def exact_start(kernel, num_chains):
    energy, loc = skewed()
    x = loc + DEVIATION * torch.randn(num_chains, len(loc))
    return energy, kernel.init(energy, x)


def run(warmup, energy, state, num_steps):
    for _ in range(num_steps):
        state, info = warmup.kernel.step(energy, state)
        state = warmup.update(state, info)
    return state


def mean_acceptance(kernel, energy, state, num_steps=20):
    total = 0.0
    for _ in range(num_steps):
        state, info = kernel.step(energy, state)
        total += info.accept_prob.mean().item() / num_steps
    return total


@pytest.mark.parametrize("num_chains", [256, 8])
@pytest.mark.parametrize("name", ["mala", "hmc", "chees"])  # ULA's steps are too small
def test_finds_scale_and_step_size_from_a_poor_start(name, num_chains):
    kernel, (energy, loc) = KERNELS[name], skewed()
    state = kernel.init(energy, loc + torch.rand(num_chains, len(loc)) - 0.5)
    num_steps = 200 if num_chains > 8 else 400
    warmup = Warmup(kernel, energy, state, num_steps)
    state = run(warmup, energy, state, num_steps)
    ratio = warmup.kernel.scale / DEVIATION
    assert (ratio.log().abs() < (0.2 if num_chains > 8 else 0.6)).all()
    reached = mean_acceptance(warmup.kernel, energy, state)
    assert abs(reached - kernel.target_accept_prob) < 0.1
    assert warmup.num_stuck == 0


@pytest.mark.parametrize("name", ["hmc", "chees"])
def test_one_chain(name):
    kernel = KERNELS[name]
    energy, state = exact_start(kernel, 1)
    warmup = Warmup(kernel, energy, state, 500)
    state = run(warmup, energy, state, 500)
    ratio = warmup.kernel.scale / DEVIATION
    assert (ratio.log().abs() < 1.0).all()
    reached = mean_acceptance(warmup.kernel, energy, state, 300)
    assert abs(reached - kernel.target_accept_prob) < 0.15


def test_a_dense_metric_is_taken_where_it_helps(kernel):
    """Where coordinates are correlated, and not where they are not."""
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    energy = QuadraticEnergy(torch.zeros(2), covariance.inverse())
    state = kernel.init(energy, torch.randn(256, 2))
    warmup = Warmup(kernel, energy, state, 100)
    run(warmup, energy, state, 100)
    factor = warmup.kernel.scale_tril
    assert warmup.kernel.scale is None
    torch.testing.assert_close(factor @ factor.mT, covariance)

    energy, state = exact_start(kernel, 64)
    warmup = Warmup(kernel, energy, state, 100)
    run(warmup, energy, state, 100)
    assert warmup.kernel.scale_tril is None
    torch.testing.assert_close(warmup.kernel.scale, DEVIATION)


def correlated_in_a_few_directions(size=200, loading=2.0):
    """A Gaussian of long vectors with two factors, and where chains start."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loadings = loading * torch.randn(size, 2)
    covariance = torch.eye(size) + loadings @ loadings.mT
    energy = QuadraticEnergy(torch.zeros(size), covariance.inverse())
    return energy, covariance


@pytest.mark.parametrize("name", ["hmc", "chees"])
def test_long_vectors_have_a_metric_of_low_rank(name):
    """Where it helps, and none where coordinates are independent.

    Seen to fail with the factor left out of the metric in use.
    """
    kernel = KERNELS[name]
    energy, covariance = correlated_in_a_few_directions()
    state = kernel.init(energy, torch.randn(32, 200))
    warmup = Warmup(kernel, energy, state, 100, num_groups=8)
    run(warmup, energy, state, 100)
    metric = warmup.kernel.low_rank
    assert warmup.kernel.scale is warmup.kernel.scale_tril is None
    white = metric.whiten(metric.whiten(covariance).mT)
    values = torch.linalg.eigvalsh(white)
    assert values[-1] / values[0] < 10  # of the covariance: 1,700

    energy = QuadraticEnergy(torch.zeros(200))
    state = kernel.init(energy, torch.randn(32, 200))
    warmup = Warmup(kernel, energy, state, 50, num_groups=8)
    run(warmup, energy, state, 50)
    assert warmup.kernel.low_rank is warmup.kernel.scale_tril is None


def test_trajectories_start_as_long_as_the_draws_are_wide():
    """On a ring these are twice as wide as the metric.

    Seen to fail with the spread left out of the start: 2 of 3 runs ended at half of
    that length, where draws are worth a third.
    """
    energy = FunctionEnergy(lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,))
    kernel = ChEES()
    x = 2 * torch.nn.functional.normalize(torch.randn(128, 2), dim=-1)
    state = kernel.init(energy, x)
    warmup = Warmup(kernel, energy, state, 300)
    run(warmup, energy, state, 210)
    spread = (warmup.spread * warmup.scale).square().mean().sqrt()
    assert 1.2 < spread < 1.5  # the standard deviation is the root of 2
    start = warmup.kernel.trajectory_length
    torch.testing.assert_close(start, math.pi / 2 * warmup.spread.to(start))


def test_a_scale_that_is_given_is_where_to_begin():
    energy, state = exact_start(HMC(), 16)
    for setting in ({"scale": DEVIATION}, {"scale_tril": DEVIATION.diag_embed()}):
        warmup = Warmup(HMC(**setting), energy, state, 100)
        ((name, value),) = setting.items()
        assert torch.equal(getattr(warmup.kernel, name), value)
        run(warmup, energy, state, 100)
        assert getattr(warmup.kernel, name) is not value


@pytest.mark.parametrize("name", ["hmc", "chees", "mala"])
def test_chains_that_have_not_arrived_have_no_say(name):
    """Three groups of sixteen 1,000 deviations out, in a place 100 times as steep.

    Faults: the harmonic mean over all chains; moments of all draws together.
    """
    deviation = torch.tensor([1.0, 0.1, 3.0])

    def energy(x):
        z = x / deviation
        inside = z.square().sum(-1) / 2
        far = z[..., 0] > 500
        return torch.where(far, 1e6 + 5e3 * ((z - 1000) * 1.0).square().sum(-1), inside)

    target, kernel = FunctionEnergy(energy, (3,)), KERNELS[name]
    x = torch.randn(64, 3) * deviation
    x[:12] = 1000 * deviation + 0.01 * torch.randn(12, 3)
    state = kernel.init(target, x)
    warmup = Warmup(kernel, target, state, 40, num_groups=16)
    for number in range(40):
        state, info = warmup.kernel.step(target, state)
        state = warmup.update(state, info)
        if number == 3:
            assert warmup.num_moved == 12
            torch.testing.assert_close(warmup.scale, deviation, rtol=0.3, atol=0)
    assert (state.x[:, 0].abs() < 10).all()
    torch.testing.assert_close(warmup.kernel.scale, deviation, rtol=0.1, atol=0)


def test_chains_in_a_neck_without_mass_are_moved():
    """The energy there is low, and the volume lower still: e^-30 of the mass.

    Fault: the energy for the free energy, by which those chains look the best.
    """
    size, width = 5, 1e-4

    def energy(x):
        wide = x.square().sum(-1) / 2
        neck = ((x - 8) / width).square().sum(-1) / 2 - 16
        return -torch.logaddexp(-wide, -neck)

    target, kernel = FunctionEnergy(energy, (size,)), ChEES()
    x = torch.randn(64, size)
    x[:8] = 8 + width * torch.randn(8, size)
    state = kernel.init(target, x)
    assert state.energy[:8].max() < state.energy[8:].min() - 5
    warmup = Warmup(kernel, target, state, 100, num_groups=16)
    state = run(warmup, target, state, 100)
    assert (state.x[:, 0] < 6).all()
    assert warmup.num_moved == 8
    _, info = warmup.kernel.step(target, state)
    assert warmup.kernel.step_size > 0.3


def test_frozen_kernel_leaves_the_target_invariant(kernel):
    """Mean and variance of 4,000 chains; seen to fail for ULA, which is biased."""
    energy, state = exact_start(kernel, 4000)
    warmup = Warmup(kernel, energy, state, 20)
    run(warmup, energy, state, 20)
    frozen = warmup.kernel
    _, state = exact_start(kernel, 4000)
    for _ in range(10):
        state, _ = frozen.step(energy, state)
    loc = 30 * DEVIATION

    def check():
        assert_moments((state.x - loc) / DEVIATION, 0.0, 1.0, fourth_central_moment=3.0)

    if isinstance(kernel, ULA):
        with pytest.raises(AssertionError, match="variance"):
            check()
    else:
        check()


def test_is_frozen_after_its_steps(kernel):
    energy, state = exact_start(kernel, 8)
    warmup = Warmup(kernel, energy, state, 10)
    assert not warmup.is_done
    state = run(warmup, energy, state, 10)
    assert warmup.is_done
    frozen, saved = warmup.kernel, str(warmup.state_dict())
    assert isinstance(frozen.step_size, float)
    _, info = frozen.step(energy, state)
    assert warmup.update(state, info) is state
    assert str(warmup.state_dict()) == saved


def test_no_steps_leave_the_kernel_as_given_at_no_cost(kernel):
    energy = CountingEnergy(skewed()[0])
    state = kernel.init(energy, torch.randn(4, 6))
    energy.reset()
    assert Warmup(kernel, energy, state, 0).kernel is kernel
    assert energy.num_gradients == 0


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20])
def test_short_warm_ups(kernel, num_steps):
    energy, state = exact_start(kernel, 4)
    warmup = Warmup(kernel, energy, state, num_steps)
    run(warmup, energy, state, num_steps)
    assert warmup.is_done
    assert warmup.kernel.step_size > 0
    assert (warmup.kernel.scale > 0).all()


@pytest.mark.parametrize("chains", [(), (3,), (2, 4)])
@pytest.mark.parametrize("event", [(), (2, 3)])
def test_any_shape(kernel, chains, event):
    energy = FunctionEnergy(
        lambda x: x.square().reshape(*x.shape[: x.dim() - len(event)], -1).sum(-1),
        event,
    )
    state = kernel.init(energy, torch.randn(chains + event))
    warmup = Warmup(kernel, energy, state, 30)
    state = run(warmup, energy, state, 30)
    assert state.x.shape == chains + event
    assert warmup.kernel.scale.shape == event


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
def test_any_dtype(kernel, dtype, model_dtype):
    energy = QuadraticEnergy(torch.zeros(2, dtype=model_dtype))
    state = kernel.init(energy, torch.randn(16, 2, dtype=model_dtype))
    warmup = Warmup(kernel, energy, state, 20)
    state = run(warmup, energy, state, 20)
    assert state.x.dtype == warmup.kernel.scale.dtype == model_dtype


def trap_energy():
    """A narrow well, of which no step of the wide one's size is ever accepted."""

    def energy(x):
        narrow = (x[..., 0] + 1000).abs() < 10
        wide = x.square().sum(-1) / 2
        deep = ((x - torch.tensor([-1000.0, 0.0])) / 1e-5).square().sum(-1) / 2
        return torch.where(narrow, deep, wide)

    return FunctionEnergy(energy, (2,))


@pytest.mark.parametrize(("name", "number"), [("hmc", 5), ("chees", 1)])
def test_stuck_chains_are_counted_and_moved(name, number):
    kernel, energy = KERNELS[name], trap_energy()
    x = torch.randn(64, 2)
    x[:number] = torch.tensor([-1000.0, 0.0]) + 1e-5 * torch.randn(number, 2)
    start = kernel.init(energy, x)
    warmup = Warmup(dataclasses.replace(kernel, step_size=0.5), energy, start, 50)
    state, counts = start, []
    for _ in range(50):
        state, info = warmup.kernel.step(energy, state)
        state = warmup.update(state, info)
        counts.append(int(warmup.num_stuck))
    assert max(counts) == number  # as soon as all have one step
    assert counts[-1] == 0
    assert (state.x[:number, 0] > -900).all()
    torch.testing.assert_close(energy(state.x), state.energy)

    warmup, state = Warmup(kernel, energy, start, 50), start
    for _ in range(50):  # the chains go on from where they are
        state, info = warmup.kernel.step(energy, state)
        warmup.update(state, info)
    assert warmup.num_stuck == number


def test_chees_takes_the_step_of_a_narrow_mode_that_a_tenth_of_the_chains_is_in():
    """Seen to fail by the arithmetic mean: those chains get stuck, and are moved away.

    A standard normal, and another with a thirtieth of its standard deviation.
    """

    def energy(x):
        wide, narrow = (
            ((x - m) / s).square().sum(-1) / 2 for m, s in ((4, 1), (-4, w))
        )
        return -torch.logaddexp(-wide, -narrow - 2 * math.log(w))

    w, target = 1 / 30, FunctionEnergy(energy, (2,))
    x = torch.cat([4 + torch.randn(115, 2), -4 + w * torch.randn(13, 2)])
    state = ChEES().init(target, x)
    warmup = Warmup(ChEES(), target, state, 200)
    state = run(warmup, target, state, 200)
    is_narrow = state.x[:, 0] < 0
    assert is_narrow.sum() == 13
    accept_probs = []
    for _ in range(20):  # all chains share the length of a trajectory
        _, info = warmup.kernel.step(target, state)
        accept_probs.append(info.accept_prob[is_narrow])
    assert torch.stack(accept_probs).mean() > 0.3


def test_nonfinite_proposals_count_as_rejections(kernel):
    energy = FunctionEnergy(lambda x: torch.where(x > 0, x**2 / 2, torch.nan), ())
    state = kernel.init(energy, torch.randn(500).abs())
    warmup = Warmup(kernel, energy, state, 60)
    state = run(warmup, energy, state, 60)
    assert (state.x > 0).all()
    assert warmup.kernel.scale.isfinite()
    reached = mean_acceptance(warmup.kernel, energy, state)
    assert abs(reached - kernel.target_accept_prob) < 0.17


def test_an_energy_that_is_finite_nowhere_else_poisons_nothing(kernel):
    energy = FunctionEnergy(
        lambda x: torch.where(x == 0, 0.0, torch.nan * x).sum(-1), (2,)
    )
    state = kernel.init(energy, torch.zeros(8, 2))
    warmup = Warmup(kernel, energy, state, 30)
    state = run(warmup, energy, state, 30)
    assert (state.x == 0).all()
    assert warmup.num_stuck == 8
    assert torch.equal(warmup.kernel.scale, torch.ones(2))


def correlated_start(kernel):
    energy = QuadraticEnergy(torch.zeros(3), 0.05 * torch.eye(3) + 1)
    return energy, kernel.init(energy, torch.randn(8, 3))


def long_start(kernel):
    energy, _ = correlated_in_a_few_directions(loading=0.4)
    return energy, kernel.init(energy, torch.randn(32, 200))


@pytest.mark.parametrize("start_of", [exact_start, correlated_start, long_start])
def test_resumes_to_the_bit(kernel, start_of):
    """With a diagonal metric, and from a time before it was another to one after."""
    start_args = (8,) if start_of is exact_start else ()
    num_steps = 120 if start_of is long_start else 40
    energy, start = start_of(kernel, *start_args)
    torch.manual_seed(1)
    whole = Warmup(kernel, energy, start, num_steps)
    state = start
    for step in range(num_steps + 10):
        if step in (3, 16, 39, num_steps + 5):
            random = torch.get_rng_state()
            other = Warmup(kernel, energy, start, num_steps)
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
            torch.set_rng_state(random)
            whole = other
        state = run(whole, energy, state, 1)
    is_dense = whole.kernel.scale_tril is not None
    assert is_dense == (start_of is correlated_start)
    is_low = getattr(whole.kernel, "low_rank", None) is not None
    assert is_low == (start_of is long_start and hasattr(whole.kernel, "low_rank"))
    torch.manual_seed(1)
    unbroken = Warmup(kernel, energy, start, num_steps)
    assert torch.equal(run(unbroken, energy, start, num_steps + 10).x, state.x)


def test_a_saved_state_is_not_changed_by_going_on(kernel):
    energy, state = exact_start(kernel, 8)
    warmup = Warmup(kernel, energy, state, 20)
    state = run(warmup, energy, state, 3)
    saved = warmup.state_dict()
    before = str(saved)
    run(warmup, energy, state, 17)
    assert str(saved) == before
    assert str(warmup.state_dict()) != before


def test_the_energy_is_no_part_of_it():
    energy = NeuralEnergy((2,), (4,))
    kernel = HMC()
    warmup = Warmup(kernel, energy, kernel.init(energy, torch.randn(4, 2)), 5)
    assert not list(warmup.parameters())
    assert not any("energy" in name for name in warmup.state_dict())


@pytest.mark.parametrize(
    ("kernel", "event", "settings", "argument"),
    [
        (HMC(), (2,), {"num_steps": -1}, "num_steps"),
        (HMC(), (2,), {"num_steps": 5, "num_groups": 2}, "num_groups"),
        (HMC(), (), {"num_steps": 5, "num_groups": 0}, "num_groups"),
    ],
)
def test_invalid_settings(kernel, event, settings, argument):
    energy = FunctionEnergy(lambda x: x.reshape(3, -1).square().sum(-1), event)
    state = kernel.init(energy, torch.randn(3, *event))
    with pytest.raises(ValueError, match=argument):
        Warmup(kernel, energy, state, **settings)


@dataclass(frozen=True)
class RandomWalk(Kernel):
    """What a newcomer writes: a kernel with a setting of its own to adapt."""

    step_size: float | torch.Tensor = 1.0
    target_accept_prob: float = 0.3
    skew: float = 0.0

    @property
    def num_gradients(self):
        return 1

    @torch.no_grad()
    def step(self, energy: Energy, state):
        x = state.x + self.step_size * torch.randn_like(state.x)
        new = state._replace(x=x, energy=energy(x), grad=torch.zeros_like(x))
        return accept(state.energy - new.energy, state, new)

    def adaptation(self):
        return SkewAdaptation()


class SkewAdaptation(KernelAdaptation[RandomWalk]):
    def __init__(self):
        super().__init__()
        self.register_buffer("skew", torch.tensor(0.0))
        self.num_resets = 0

    def reset(self):
        self.num_resets += 1

    def current(self, kernel):
        return dataclasses.replace(kernel, skew=self.skew)

    def frozen(self, kernel):
        return dataclasses.replace(kernel, skew=self.skew.item())

    def update(self, kernel, info):
        self.skew = self.skew + 1


def test_a_newcomer_plugs_in_what_it_adapts():
    kernel, energy = RandomWalk(), QuadraticEnergy(torch.zeros(2))
    state = kernel.init(energy, torch.randn(64, 2))
    warmup = Warmup(kernel, energy, state, 100)
    state = run(warmup, energy, state, 100)
    assert warmup.kernel.skew == 100.0
    assert warmup.own.num_resets == 5
    reached = mean_acceptance(warmup.kernel, energy, state)
    assert abs(reached - 0.3) < 0.05


@dataclass(frozen=True)
class Settled(Kernel):
    """A kernel without anything to adapt."""

    @property
    def num_gradients(self):
        return 0

    def step(self, energy, state):
        yes = torch.ones_like(state.energy, dtype=torch.bool)
        return state, StepInfo(yes.to(state.energy), yes, yes)


def test_a_kernel_without_settings_passes_through():
    kernel, energy = Settled(), QuadraticEnergy(torch.zeros(2))
    state = kernel.init(energy, torch.randn(4, 2))
    warmup = Warmup(kernel, energy, state, 10)
    assert run(warmup, energy, state, 10) is state
    assert warmup.kernel is kernel


@pytest.mark.gpu
def test_on_cuda(kernel):
    energy = QuadraticEnergy(torch.zeros(3)).cuda()
    state = kernel.init(energy, torch.randn(64, 3, device="cuda"))
    warmup = Warmup(kernel, energy, state, 30)
    state = run(warmup, energy, state, 40)
    assert state.x.is_cuda
    assert warmup.kernel.scale.is_cuda
