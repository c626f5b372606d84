"""Kernels of parts in turn leave a known mixed target invariant, and adapt.

The target is a mixture of normals with its label as a column: its log Z, the law of
label and coin, and all moments are known. Chains start from exact draws and must stay
there; a kernel that moves a part given where the others were is seen to fail.
"""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_ebm.energies import (
    FactorGraphEnergy,
    FunctionEnergy,
    QuadraticEnergy,
    unconstrained,
)
from pyro_ebm.mcmc import (
    HMC,
    MALA,
    MCMC,
    ULA,
    Alternating,
    ChEES,
    DiscreteLangevin,
    Gibbs,
    IndependentChains,
    PersistentChains,
)
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for

C = dist.constraints
SUPPORT = C.cat(
    [C.real, C.integer_interval(0, 2), C.boolean], dim=-1, lengths=[2, 1, 1]
)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[0.0, 0.0], [1.5, -1.0], [-1.0, 1.0]], dtype=torch.float64)
SCALES = torch.tensor([1.0, 0.5], dtype=torch.float64)


def cost(x):
    label, coin = x[..., 2].long(), x[..., 3]
    z = (x[..., :2] - MEANS[label] - coin[..., None]) / SCALES
    odds = (label + 1) / 4
    chance = torch.where(coin == 1, odds, 1 - odds)
    return z.square().sum(-1) / 2 - SHARES[label].log() - chance.log()


def draws(number):
    label = torch.multinomial(SHARES, number, replacement=True)
    coin = torch.bernoulli((label + 1) / 4).to(SHARES)
    real = MEANS[label] + coin[:, None] + SCALES * torch.randn(number, 2)
    return torch.cat([real, torch.stack([label.to(real), coin], 1)], 1)


def target():
    return FunctionEnergy(cost, (4,), SUPPORT)


def counts(x):
    found = torch.zeros(3, 2)
    ones = torch.ones(len(x))
    return found.index_put_((x[:, 2].long(), x[:, 3].long()), ones, accumulate=True)


def expected(number):
    odds = torch.arange(1.0, 4.0) / 4
    return SHARES[:, None] * torch.stack([1 - odds, odds], 1) * number


def excess(kernel, num_steps=8, number=20_000):
    """The least p-value of label and coin, and the largest z of four moments."""
    energy = target()
    state = kernel.init(energy, draws(number))
    for _ in range(num_steps):
        state, info = kernel.step(energy, state)
    assert torch.allclose(state.energy, energy(state.x))
    assert info.accept_prob.shape == (number,)
    chance = stats.chisquare(
        counts(state.x).flatten(), expected(number).flatten()
    ).pvalue
    far = draws(400_000)[:, :2]
    moments, sizes = [], []
    for power in (1, 2):
        here, there = state.x[:, :2] ** power, far**power
        moments.append(here.mean(0) - there.mean(0))
        sizes.append((here.var(0) / number + there.var(0) / len(far)).sqrt())
    z = (torch.cat(moments) / torch.cat(sizes)).abs().max()
    return chance, z.item()


KERNELS = {
    "hmc": lambda: {"real": HMC(0.3), "finite": Gibbs()},
    "mala": lambda: {"finite": Gibbs(), "real": MALA(0.1)},
    "chees": lambda: {"real": ChEES(0.3), "finite": Gibbs(num_sweeps=2)},
    "columns": lambda: {0: HMC(0.5), 1: HMC(0.3), 2: Gibbs(), 3: Gibbs()},
}


@pytest.mark.parametrize("name", KERNELS)
def test_exact_draws_stay_exact(name):
    chance, z = excess(Alternating(KERNELS[name]()))
    assert chance > 1e-3
    assert z < 4


def test_many_flips_move_the_finite_part():
    """Differentiable in the states, as a network is."""
    bits = C.cat([C.real, C.boolean], dim=-1, lengths=[1, 3])

    def pull(x):
        return (x[..., 0] - x[..., 1:].sum(-1)).square() / 2 + x[..., 1] * x[..., 2] / 2

    kernel = Alternating({"real": HMC(0.7), "finite": DiscreteLangevin(0.5)})
    energy = FunctionEnergy(pull, (4,), bits)
    state = kernel.init(energy, torch.zeros(5_000, 4))
    for _ in range(40):
        state, _ = kernel.step(energy, state)
    both = (state.x[:, 1] * state.x[:, 2]).mean().item()
    share = math.exp(-0.5) / (3 + math.exp(-0.5))
    assert abs(both - share) < 4 * math.sqrt(share / 5_000)


def test_a_part_that_is_moved_given_where_the_others_were_fails(monkeypatch):
    """The planted fault: each part sees the state before the step."""
    from pyro_ebm.mcmc.kernels import alternating as module

    whole, seen = module._Conditional.__init__, {}

    def stale(self, energy, x, place):
        whole(self, energy, seen.setdefault("x", x), place)

    step = Alternating.step

    def forgetful(self, energy, state):
        seen.clear()
        return step(self, energy, state)

    monkeypatch.setattr(module._Conditional, "__init__", stale)
    monkeypatch.setattr(Alternating, "step", forgetful)
    kernel = Alternating({"real": HMC(0.3, 20), "finite": Gibbs()})
    energy, x = target(), draws(20_000)
    for _ in range(8):
        _, info = kernel.step(energy, kernel.init(energy, x))
        x = torch.cat([info.moves[0].end.x, info.moves[1].end.x], 1)
    far, same = draws(400_000), (x[:, 2] == 1) * x[:, 0]
    shift = same.mean() - ((far[:, 2] == 1) * far[:, 0]).mean()
    assert abs(shift) > 8 * same.std() / math.sqrt(20_000)


@pytest.mark.parametrize(
    "kernel", [HMC(), pytest.param(ChEES(), marks=pytest.mark.slow)]
)
def test_the_warm_up_adapts_each_part(kernel):
    """Columns of scales 100 and .01 are found in the metric."""
    sizes = torch.tensor([100.0, 0.01])

    def scaled(x):
        return cost(torch.cat([x[..., :2] / sizes, x[..., 2:]], -1))

    energy = FunctionEnergy(scaled, (4,), SUPPORT)
    parts = {"real": kernel, "finite": Gibbs()}
    run = MCMC(Alternating(parts), 50, 100, 128, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too short to be ok
        run.run(energy)
    assert run.diagnostics().r_hat("x").max() < 1.1
    moved = run._run.warmup.kernel.kernels[0]
    assert 2e3 < moved.scale[0] / moved.scale[1] < 5e4
    x = run.get_samples()
    own = counts(x).flatten() / len(x)
    assert (own - expected(1).flatten()).abs().max() < 0.05
    assert abs((x[:, 0] / 100).mean() - draws(100_000)[:, 0].mean()) < 0.2


def test_it_is_the_default_on_a_mixed_event():
    run = MCMC(None, 10, 10, 16, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.run(target())
    kernels = run._run.warmup.kernel.kernels
    assert [type(kernel) for kernel in kernels] == [ChEES, Gibbs]
    assert run.get_samples().shape == (160, 4)


def test_a_run_is_saved_and_resumed():
    kernel = Alternating({"real": HMC(), "finite": Gibbs()})
    first, second = (MCMC(kernel, 20, 40, 8, progress_bar=False) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first.run(target())
        saved = first.state_dict()
        second.load_state_dict(saved)
        second.resume(20, target())
        first.load_state_dict(saved)
        first.resume(20, target())
    assert torch.equal(first.get_samples(), second.get_samples())


def test_samplers_that_know_nothing_of_parts_adapt_the_common_factor():
    energy = target()
    x = IndependentChains(warmup_steps=60, num_steps=60)(energy, 1000)
    assert (counts(x).flatten() / 1000 - expected(1).flatten()).abs().max() < 0.08
    chains = PersistentChains()
    kernel = kernel_for(energy, MALA())
    chains.start(energy, draws(500), kernel)
    x = chains.advance(energy, kernel, 20)
    assert x.shape == (500, 4)
    assert 0.3 < chains.accept_prob < 0.9


def test_real_columns_on_an_interval_go_through_their_bijection():
    support = C.cat([C.positive, C.boolean], dim=-1, lengths=[1, 1])
    energy = FunctionEnergy(lambda x: x[..., 0] * (1 + x[..., 1]), (2,), support)
    flat, to_support = unconstrained(energy)
    kernel = Alternating({"real": HMC(0.5), "finite": Gibbs()})
    state = kernel.init(flat, torch.zeros(5_000, 2))
    for _ in range(40):
        state, _ = kernel.step(flat, state)
    x = to_support(state.x)
    # The coin is 0 with chance 2/3; then the column is Exponential(1).
    assert abs(x[:, 1].mean() - 1 / 3) < 4 * math.sqrt(2 / 9 / 5_000)
    assert stats.kstest(x[x[:, 1] == 0, 0].numpy(), "expon").pvalue > 1e-3


def test_parts_of_a_real_and_of_a_finite_event():
    precision = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 2.0]])
    energy = QuadraticEnergy(torch.zeros(3), precision)
    kernel = Alternating([((slice(0, 2)), HMC(0.5)), (2, MALA(0.3))])
    state = kernel.init(energy, torch.zeros(5_000, 3))
    for _ in range(40):
        state, _ = kernel.step(energy, state)
    wanted = torch.linalg.inv(precision)
    assert (state.x.mT.cov() - wanted).abs().max() < 0.08
    graph = FactorGraphEnergy(
        {"rain": 2, "grass": 3}, [(("rain", "grass"), torch.eye(2, 3))]
    )
    kernel = Alternating({"rain": Gibbs(), "grass": Gibbs()})
    state = kernel.init(graph, torch.zeros(5_000, 2))
    for _ in range(20):
        state, _ = kernel.step(graph, state)
    table = torch.eye(2, 3).exp()
    same = (state.x[:, 0] == state.x[:, 1]).double().mean()
    assert abs(same - (2 * math.e / table.sum())) < 0.03


def test_what_a_kernel_of_parts_says_of_itself():
    kernel = Alternating({"real": ULA(0.1), "finite": Gibbs()})
    assert not kernel.is_exact
    assert kernel.has_step_size
    assert not Alternating({0: Gibbs()}).has_step_size
    assert (
        Alternating({"real": HMC(num_leapfrog=7), "finite": Gibbs()}).num_gradients
        == 10
    )


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"real": HMC(), 2: Gibbs()}, "exactly one part"),
        ({"real": HMC(), "finite": Gibbs(), 0: HMC()}, "exactly one part"),
        ({"real": Gibbs(), "finite": Gibbs()}, "finite support for Gibbs"),
        ({"real": HMC(), "finite": HMC()}, "continuous support for HMC"),
        ({"real": HMC(), "finite": MALA()}, "continuous support for MALA"),
        ({7: HMC()}, "not in an event"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, match):
    with pytest.raises(ValueError, match=match):
        Alternating(parts).init(target(), draws(3))


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match="kernel such as"):
        Alternating({"real": HMC})
    with pytest.raises(ValueError, match="at least one"):
        Alternating({})
    with pytest.raises(ValueError, match="factor"):
        Alternating({"real": HMC()}, factor=0.0)
    with pytest.raises(ValueError, match="mixed event"):
        Alternating({"real": HMC()}).init(
            QuadraticEnergy(torch.zeros(2)), torch.zeros(3, 2)
        )
    with pytest.raises(ValueError, match=r"named 'real' and 'finite'.* got 'reel'"):
        Alternating({"reel": HMC(), "finite": Gibbs()}).init(target(), draws(3))
    for kernel in (HMC(), Gibbs(), DiscreteLangevin()):
        with pytest.raises(ValueError, match="Alternating"):
            kernel.init(target(), draws(3))
        with pytest.raises(ValueError, match="Alternating"):
            MCMC(kernel, 5, 5, 4, progress_bar=False).run(target())
    x = draws(3)
    x[0, 2] = 0.5
    with pytest.raises(ValueError, match="support"):
        Alternating({"real": HMC(), "finite": Gibbs()}).init(target(), x)
