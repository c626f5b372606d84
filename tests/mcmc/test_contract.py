"""What every kernel owes to the library, whatever its algorithm."""

import dataclasses

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import mcmc
from pyro_ebm.energies import (
    DistributionEnergy,
    Energy,
    FunctionEnergy,
    unconstrained,
)
from pyro_ebm.mcmc import HMC, MALA, ULA, ChEES, Kernel
from pyro_ebm.mcmc.kernels.metric import LowRank
from pyro_ebm.testing import CountingEnergy

LOW_RANK = LowRank(torch.ones(3), torch.eye(3)[:, :1], torch.tensor([2.0]))

KERNELS = {
    "mala": MALA(step_size=0.2),
    "mala-unbounded": MALA(step_size=0.2, max_drift=None),
    "mala-tight": MALA(step_size=0.2, max_drift=0.1),
    "ula": ULA(step_size=0.05),
    "ula-unbounded": ULA(step_size=0.05, max_drift=None),
    "hmc": HMC(step_size=0.4, num_leapfrog=3),
    "hmc-one-leapfrog": HMC(step_size=0.4, num_leapfrog=1, jitter=0.0),
    "chees": ChEES(step_size=0.4, trajectory_length=0.8),
    "chees-in-warm-up": ChEES(step_size=0.4, trajectory_length=1.2, quantile=0.3),
}
CHAINS = [(5,), (2, 3), ()]
EVENTS = [(), (2,), (2, 3)]


def test_every_public_kernel_is_covered():
    public = (getattr(mcmc, name) for name in mcmc.__all__)
    classes = {c for c in public if isinstance(c, type) and issubclass(c, Kernel)}
    # Those for finite supports, and for parts, have laws of their own to keep.
    classes -= {Kernel, mcmc.Gibbs, mcmc.DiscreteLangevin, mcmc.SwendsenWang}
    classes -= {mcmc.Alternating}
    assert {type(kernel) for kernel in KERNELS.values()} == classes


class Quartic(nn.Module):
    """A parameter, and only elementwise operations: bit-equal in any batch."""

    def __init__(self, event_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.event_dim = event_dim

    def forward(self, x):
        terms = self.weight * x**4 + x**2 / 2
        return terms.sum(tuple(range(-self.event_dim, 0))) if self.event_dim else terms


def quartic(event):
    return FunctionEnergy(Quartic(len(event)), event)


class Trap(Energy):
    """Finite at the origin, where the chains start, and ``bad`` anywhere else."""

    def __init__(self, bad_energy, bad_grad, event=(2,)):
        super().__init__(event)
        self.bad_energy, self.bad_grad = bad_energy, bad_grad

    def forward(self, x):
        return torch.where((x == 0).all(-1), 0.0, self.bad_energy)

    def value_and_grad(self, x):
        inside = (x == 0).all(-1, keepdim=True)
        return self(x), torch.where(inside, torch.zeros_like(x), self.bad_grad)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("chains", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtype(kernel, chains, event, dtype):
    energy = quartic(event)
    state = kernel.init(energy, torch.randn(chains + event))
    for _ in range(3):
        state, info = kernel.step(energy, state)
    assert state.x.shape == state.grad.shape == chains + event
    for value in (state.energy, *info):
        assert value.shape == chains
    for value in (*state, info.accept_prob):
        assert value.dtype == dtype
    assert info.accepted.dtype == info.is_finite.dtype == torch.bool
    assert ((info.accept_prob >= 0) & (info.accept_prob <= 1)).all()


@pytest.mark.parametrize("chains", CHAINS)
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_models_not_the_default(kernel, chains, model_dtype, dtype):
    energy = quartic((2,)).to(model_dtype)
    adapted = dataclasses.replace(kernel, step_size=torch.tensor(0.1))
    state = adapted.init(energy, torch.randn(*chains, 2, dtype=model_dtype))
    state, info = adapted.step(energy, state)
    assert {v.dtype for v in (*state, info.accept_prob)} == {model_dtype}


@pytest.mark.parametrize("event", EVENTS)
def test_state_is_consistent(kernel, event):
    energy = quartic(event)
    state = kernel.init(energy, torch.randn(100, *event))
    before = state
    for _ in range(4):
        state, info = kernel.step(energy, state)
        value, grad = energy.value_and_grad(state.x)
        assert torch.equal(state.energy, value)
        assert torch.equal(state.grad, grad)
    moved = (state.x != before.x).reshape(100, -1).any(-1)
    assert moved.any()
    assert (moved | ~info.accepted).all()


def test_rejected_chains_stay_exactly(kernel):
    if not kernel.is_exact:
        pytest.skip("rejects nothing that is finite")
    energy = quartic((2,))
    large = dataclasses.replace(kernel, step_size=3 * kernel.step_size)
    state = kernel.init(energy, torch.randn(500, 2))
    new, info = large.step(energy, state)
    assert 0 < info.accepted.sum() < 500
    assert torch.equal(new.x[~info.accepted], state.x[~info.accepted])
    assert (new.x[info.accepted] != state.x[info.accepted]).any(-1).all()


@pytest.mark.parametrize("chains", CHAINS)
def test_cost(kernel, chains):
    energy = CountingEnergy(quartic((2,)))
    state = kernel.init(energy, torch.randn(*chains, 2))
    num_chains = torch.Size(chains).numel()
    assert (energy.num_gradients, energy.num_values) == (num_chains, 0)
    energy.reset()
    kernel.step(energy, state)
    if kernel == KERNELS["chees"]:  # of drawn length; for the mean see test_chees
        assert num_chains <= energy.num_gradients <= 3 * num_chains
    else:
        assert energy.num_gradients == kernel.num_gradients * num_chains
    assert energy.num_values == 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_leaves_no_graph(kernel, mode):
    energy = quartic((2,))
    x = torch.randn(5, 2, requires_grad=True)
    with mode():
        state, info = kernel.step(energy, kernel.init(energy, x))
    assert not any(value.requires_grad for value in (*state, *info))
    assert all(p.grad is None for p in energy.parameters())
    assert x.grad is None


def test_same_seed_same_step_and_a_constant_moves_nothing(kernel):
    energy = quartic((2,))
    x = torch.randn(50, 2)
    results = []
    for f in (energy, energy, energy + 3.0):
        torch.manual_seed(1)
        results.append(kernel.step(f, kernel.init(f, x))[0])
    first, again, shifted = results
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first.x, shifted.x)
    torch.testing.assert_close(first.energy + 3.0, shifted.energy)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("bad_energy", "bad_grad"),
    [(NAN, 0.0), (INF, 0.0), (-INF, 0.0), (0.0, NAN), (0.0, INF), (-INF, INF)],
)
def test_nonfinite_proposals_are_rejected_and_counted(kernel, bad_energy, bad_grad):
    energy = Trap(bad_energy, bad_grad)
    state = kernel.init(energy, torch.zeros(6, 2))
    new, info = kernel.step(energy, state)
    assert not info.is_finite.any()
    assert not info.accepted.any()
    assert (info.accept_prob == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(new, state, strict=True))


def test_nonfinite_proposals_do_not_touch_other_chains(kernel):
    wall = FunctionEnergy(
        lambda x: torch.where(x > 0, x.square() / 2, torch.nan), (), None
    )
    x = torch.cat([torch.full((200,), 1e-3), torch.full((200,), 50.0)])
    state, info = kernel.step(wall, kernel.init(wall, x))
    near, far = info.is_finite.split(200)
    assert 0 < near.sum() < 200
    assert far.all()
    assert state.energy.isfinite().all()
    assert not info.accepted[~info.is_finite].any()


@pytest.mark.parametrize(
    ("build", "settings", "argument"),
    [
        (kind, {name: value}, name)
        for kind in (MALA, ULA, HMC, ChEES)
        for name, values in {
            "step_size": [0.0, -1.0, NAN, INF],
            "target_accept_prob": [0.0, 1.0, NAN],
        }.items()
        for value in values
    ]
    + [
        (MALA, {"max_drift": 0.0}, "max_drift"),
        (ULA, {"max_drift": NAN}, "max_drift"),
        (HMC, {"num_leapfrog": 0}, "num_leapfrog"),
        (HMC, {"jitter": 1.0}, "jitter"),
        (HMC, {"jitter": -0.1}, "jitter"),
    ]
    + [
        (kind, {"scale": torch.ones(2), "scale_tril": torch.eye(2)}, "scale_tril")
        for kind in (MALA, ULA, HMC, ChEES)
    ]
    + [
        (kind, {"scale": torch.ones(3), "low_rank": LOW_RANK}, "low_rank")
        for kind in (HMC, ChEES)
    ],
)
def test_invalid_settings(build, settings, argument):
    with pytest.raises(ValueError, match=argument):
        build(**settings)


def test_constrained_support_is_refused_with_the_way_out(kernel):
    energy = DistributionEnergy(dist.Gamma(3.0, 1.0))
    with pytest.raises(ValueError, match=r"energies\.unconstrained\(energy\)"):
        kernel.init(energy, torch.ones(5))


@pytest.mark.parametrize(
    "discrete",
    [dist.Bernoulli(0.5), dist.Poisson(3.0), dist.Bernoulli(torch.ones(3)).to_event(1)],
)
def test_discrete_support_is_refused_with_the_way_out(kernel, discrete):
    energy = DistributionEnergy(discrete)
    with pytest.raises(ValueError, match=r"discrete .* pyro_ebm\.mcmc\.Gibbs"):
        kernel.init(energy, torch.ones(5, *energy.event_shape))
    if not isinstance(discrete, dist.Poisson):  # finite, where chains move as they are
        assert unconstrained(energy)[0] is energy
        return
    with pytest.raises(NotImplementedError, match=r"discrete .* pyro_ebm\.mcmc\.Gibbs"):
        unconstrained(energy)


def test_settings_are_frozen(kernel):
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernel.step_size = 1.0
    assert dataclasses.replace(kernel, step_size=7.0).step_size == 7.0


PRECONDITIONED = {
    "mala": MALA(0.1),
    "mala-unbounded": MALA(0.1, max_drift=None),
    "ula": ULA(0.1),
    "hmc": HMC(0.3),
    "chees": ChEES(0.3),
}


@pytest.mark.parametrize("chains", [(3,), (3, 3), (4,)])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", PRECONDITIONED)
def test_scale_is_a_change_of_variables(name, chains, dense):
    """``x = S z``, to the bit of randomness, also with as many chains as dimensions.

    Seen to fail with ``S`` in place of its transpose on the gradient, and on momentum.
    """
    factor = torch.randn(3, 3).tril()
    factor.diagonal().abs_().add_(0.5)
    if not dense:
        factor = factor.diagonal().diag_embed()
    setting = {"scale_tril": factor} if dense else {"scale": factor.diagonal()}
    energy, plain = quartic((3,)), PRECONDITIONED[name]
    whitened = FunctionEnergy(lambda z: energy(z @ factor.mT), (3,))
    z = torch.randn(*chains, 3)

    torch.manual_seed(1)
    want, want_info = plain.step(whitened, plain.init(whitened, z))
    torch.manual_seed(1)
    scaled = dataclasses.replace(plain, **setting)
    got, info = scaled.step(energy, scaled.init(energy, z @ factor.mT))
    torch.testing.assert_close(got.x, want.x @ factor.mT)
    torch.testing.assert_close(info.accept_prob, want_info.accept_prob)


@pytest.mark.parametrize("name", PRECONDITIONED)
@pytest.mark.parametrize(
    ("setting", "event"),
    [
        ({"scale_tril": torch.eye(3)}, ()),
        ({"scale_tril": torch.eye(3)}, (2,)),
        ({"scale_tril": torch.eye(3)}, (3, 3)),
        ({"scale_tril": torch.ones(3)}, (3,)),
        ({"scale": torch.ones(3)}, ()),
        ({"scale": torch.ones(3, 1)}, (2,)),
        ({"scale": torch.ones(3)}, (2, 3)),
    ],
)
def test_scale_of_another_shape(name, setting, event):
    energy = quartic(event)
    kernel = dataclasses.replace(PRECONDITIONED[name], **setting)
    state = kernel.init(energy, torch.zeros(3, *event))
    (setting_name,) = setting
    with pytest.raises(ValueError, match=rf"{setting_name} must have"):
        kernel.step(energy, state)


@pytest.mark.parametrize("kind", [HMC, ChEES])
@pytest.mark.parametrize("event", [(), (2,), (3, 3)])
def test_low_rank_of_another_shape(kind, event):
    energy, kernel = quartic(event), kind(low_rank=LOW_RANK)
    with pytest.raises(ValueError, match="low_rank must be"):
        kernel.step(energy, kernel.init(energy, torch.zeros(3, *event)))


def test_mala_is_hmc_with_one_leapfrog_step(monkeypatch):
    """One law, two derivations: ``HMC`` of step ``sqrt(2 eps)``."""
    energy, x = quartic((2,)), torch.randn(50, 2)
    noise, uniform = torch.randn(50, 2), torch.rand(50)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    monkeypatch.setattr(torch, "rand_like", lambda _: uniform)
    mala, hmc = MALA(0.3, max_drift=None), HMC(0.6**0.5, num_leapfrog=1, jitter=0.0)
    a, a_info = mala.step(energy, mala.init(energy, x))
    b, b_info = hmc.step(energy, hmc.init(energy, x))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a_info.accept_prob, b_info.accept_prob)


@pytest.mark.parametrize("max_drift", [None, 1.0, 0.2])
def test_mala_ratio_is_that_of_the_two_normal_densities(max_drift, monkeypatch):
    """The short form of (3) against :class:`Normal`, proposal by proposal."""
    energy, x, eps = quartic((2,)), 2 * torch.randn(50, 2), 0.3
    noise = torch.randn(50, 2)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)

    def centre(start):
        grad = energy.value_and_grad(start)[1]
        if max_drift is not None:
            bound = max_drift * (2 * eps) ** 0.5 / eps
            assert (grad.abs() > bound).any()
            grad = grad.clip(-bound, bound)
        return start - eps * grad

    def log_q(to, start):
        return dist.Normal(centre(start), (2 * eps) ** 0.5).to_event(1).log_prob(to)

    x_new = centre(x) + (2 * eps) ** 0.5 * noise
    log_ratio = energy(x) - energy(x_new) + log_q(x, x_new) - log_q(x_new, x)
    kernel = MALA(eps, max_drift=max_drift)
    info = kernel.step(energy, kernel.init(energy, x))[1]
    torch.testing.assert_close(info.accept_prob, log_ratio.clamp(max=0).exp().detach())


def test_bounded_drift_returns_from_where_plain_mala_is_stuck():
    energy, x = quartic((2,)), torch.full((100, 2), 40.0)

    def distance(kernel):
        state = kernel.init(energy, x)
        for _ in range(100):
            state, _ = kernel.step(energy, state)
        return state.x.norm(dim=-1)

    assert (distance(MALA(0.5, max_drift=None)) > 50).all()
    assert (distance(MALA(0.5)) < 5).all()


@pytest.mark.gpu
def test_on_cuda(kernel):
    energy = quartic((2,)).cuda()
    state = kernel.init(energy, torch.randn(5, 2, device="cuda"))
    state, info = kernel.step(energy, state)
    assert all(value.is_cuda for value in (*state, *info))
