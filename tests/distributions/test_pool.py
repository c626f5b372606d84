"""One draw at a time: from a pool that lives as long as the energy stands."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Importance
from torch import nn

from pyro_ebm import EnergyDistribution, EnergyModel
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.distributions import MixtureOfExperts, pool
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import IndependentChains
from pyro_ebm.testing import CountingEnergy, assert_moments

LOC = torch.tensor([1.0, -2.0])


class Bowl(nn.Module):
    """No closed form that the library knows."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(LOC.clone())
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x):
        return ((x - self.loc) / self.scale).square().sum(-1) / 2


def bowl():
    return CountingEnergy(FunctionEnergy(Bowl(), (2,)))


def one_by_one(energy, num_draws, **settings):
    """As in a model that builds its distribution at each call."""
    return torch.stack(
        [EnergyDistribution(energy, 0.0, **settings).sample() for _ in range(num_draws)]
    )


def test_draws_are_right_different_and_cheap():
    """Moments of draws that were made one at a time; each is handed out once.

    Planted: the first draw of the pool at each call; no pool at all.
    """
    energy = bowl()
    x = one_by_one(energy, 1000)
    assert_moments(x, LOC.to(x), torch.ones(2))
    assert len(x.unique(dim=0)) == 1000
    per_chain = 2 * 200 * 10  # gradients of a run of chains, each a few steps long
    assert energy.num_gradients < (32 + 1024) * per_chain


def test_no_draw_costs_more_than_before():
    """Of the chains that are run at least, 31 were thrown away at each draw."""
    energy, sampler = bowl(), IndependentChains(warmup_steps=3, num_steps=3)
    num_runs = []
    for _ in range(34):
        one_by_one(energy, 1, sampler=sampler)
        num_runs.append(energy.num_gradients)
    assert num_runs[0] == num_runs[31] < num_runs[32] == num_runs[33]
    assert num_runs[32] < 34.5 * num_runs[0]
    EnergyDistribution(energy, 0.0, sampler=sampler).sample((32,))
    assert num_runs[33] < energy.num_gradients < num_runs[33] + 1.5 * num_runs[0]


def closure_changed(energy, q):
    SHIFT[0] = 3.0


SHIFT = [0.0]


def shifted(x):
    return (x - SHIFT[0]).square().sum(-1) / 2


@pytest.mark.parametrize("how", ["step", "data", "buffer", "new", "closure", "sampler"])
def test_draws_of_a_changed_energy_are_new(how):
    """Planted: ``_version`` of parameters only, no look at the energy's values."""
    SHIFT[0] = 0.0
    energy = FunctionEnergy(shifted if how == "closure" else Bowl(), (2,))
    sampler = IndependentChains(warmup_steps=40, num_steps=40)
    one_by_one(energy, 3, sampler=sampler)
    with torch.no_grad():
        if how == "step":
            energy.fn.loc.add_(100.0)
        elif how == "data":
            energy.fn.loc.data += 100.0
        elif how == "buffer":
            energy.fn.scale.mul_(1e-3)
        elif how == "new":
            energy.fn.loc = nn.Parameter(LOC + 100)
        elif how == "closure":
            SHIFT[0] = 100.0
    base = dist.Normal(LOC if how == "buffer" else LOC + 100, 1.0).to_event(1)
    other = IndependentChains(base, warmup_steps=40, num_steps=40)
    stale = pool.Pool.last_diagnostics(energy, sampler)
    assert (stale is None) == (how not in ("closure", "data", "sampler"))
    x = one_by_one(
        energy, 3, sampler=other if how in ("buffer", "sampler") else sampler
    )
    if how == "buffer":
        assert (x - LOC).abs().max() < 0.1
    elif how != "sampler":
        assert (x - 100).abs().max() < 20


def test_draws_are_kept_from_model_call_to_model_call():
    model = EnergyModel(bowl(), dist.Normal(torch.zeros(2), 3.0).to_event(1))
    model().sample()
    before = model.energy.num_gradients
    model().expand([3]).sample((5,))
    assert model.energy.num_gradients == before
    assert model().sampling_diagnostics().status == "ok"


def test_a_seed_repeats_the_draws():
    """As if there were no pool. Planted: a pool that outlives its seed."""
    energy, runs = bowl(), []
    for seed in (5, 5, 6, 5):
        pyro.set_rng_seed(seed)
        runs.append(torch.cat([one_by_one(energy, 2), torch.rand(1, 2)]))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[3])
    assert not (runs[0] == runs[2]).any()
    pyro.set_rng_seed(6)
    assert torch.equal(one_by_one(bowl(), 2), runs[2][:2])


def test_a_seed_within_a_block_changes_nothing_outside():
    energy = bowl()
    with torch.random.fork_rng(devices=[]):
        first = one_by_one(energy, 1)
    assert torch.equal(one_by_one(energy, 1), first)
    assert not torch.equal(one_by_one(energy, 1), first)


def test_copies_and_states_hold_no_draws():
    energy = FunctionEnergy(Bowl(), (2,))
    keys = set(vars(energy)), set(energy.state_dict())
    q = EnergyDistribution(energy)
    size = len(pickle.dumps(q))
    q.sample()
    assert (set(vars(energy)), set(energy.state_dict())) == keys
    assert len(pickle.dumps(q)) == size
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        with pytest.raises(RuntimeError, match="call sample first"):
            other.sampling_diagnostics()
    count = len(pool._POOLS)
    del q, energy, other
    assert len(pool._POOLS) < count


def test_draws_belong_to_the_caller():
    """Planted: views of the pool."""
    energy = bowl()
    q = EnergyDistribution(energy, 0.0)
    q.sample().fill_(1e6)
    before = energy.num_gradients
    q.sample()
    assert q.sample((20,)).abs().max() < 10
    assert energy.num_gradients == before
    energy.to(torch.float32)
    assert q.sample().dtype == torch.float32


def test_importance_takes_its_draws_from_the_pool():
    """The posterior mean of a Gaussian prior, 1,000 draws in two runs of chains."""
    energy = bowl()

    def model():
        x = pyro.sample("x", EnergyDistribution(energy, 1.837877066))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(2))

    importance = Importance(model, num_samples=1000).run()
    weights = importance.get_normalized_weights().to(LOC)
    x = torch.stack([t.nodes["x"]["value"] for t in importance.exec_traces])
    error = (weights[:, None] ** 2 * (x - LOC / 2) ** 2).sum(0).sqrt()
    assert (((weights @ x.to(LOC)) - LOC / 2).abs() < 4 * error).all()


def test_verdict_of_a_closed_form():
    q = EnergyDistribution(QuadraticEnergy(torch.zeros(2)))
    assert str(q.sampling_diagnostics()) == "draws by closed form [exact]"


def test_before_the_first_draw_there_is_no_verdict():
    energy = FunctionEnergy(Bowl(), (2,))
    q = EnergyDistribution(energy)
    with pytest.raises(RuntimeError, match="no draws of the energy as it is now"):
        q.sampling_diagnostics()
    q.sample()
    assert q.sampling_diagnostics().is_reliable
    with torch.no_grad():
        energy.fn.loc += 1
    with pytest.raises(RuntimeError, match="no draws of the energy as it is now"):
        q.sampling_diagnostics()


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.distance = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        return (x.abs() - self.distance) ** 2 / 2


def test_chains_that_have_not_converged_are_told_once():
    """Once as long as the energy stands. Planted: a warning at each draw."""
    energy = FunctionEnergy(Modes(), ())
    q = EnergyDistribution(energy)
    with pytest.warns(UnreliableWarning, match="or in modes that they do not leave"):
        q.sample()
    for shape in ((), (100,), (20,)):
        q.sample(shape)  # warnings are errors
    found = q.sampling_diagnostics()
    assert (found.status, found.r_hat > 1.5) == ("unreliable", True)
    with torch.no_grad():
        energy.fn.distance.add_(1.0)
    with pytest.warns(UnreliableWarning, match="R-hat of the chains of the draws"):
        q.sample((100,))


class Exact:
    def __call__(self, energy, num_draws):
        return LOC + torch.randn(num_draws, 2)

    start = __call__


def test_a_sampler_of_ones_own_is_not_judged_and_not_asked_for_more():
    energy = bowl()
    x = one_by_one(energy, 3, sampler=Exact())
    assert len(x.unique(dim=0)) == 3
    q = EnergyDistribution(energy, sampler=Exact())
    q.sample()
    assert q.sampling_diagnostics().reason == (
        "Exact does not say how good its draws are"
    )


def test_a_mixture_is_as_good_as_its_experts():
    normal = QuadraticEnergy(torch.zeros(2))
    learned = EnergyDistribution(FunctionEnergy(Bowl(), (2,)), 1.837877066)
    mixture = MixtureOfExperts([learned, EnergyDistribution(normal)])
    mixture.sample((50,))
    assert mixture.sampling_diagnostics().status == "ok"
    exact = MixtureOfExperts([EnergyDistribution(normal)])
    exact.sample((50,))
    assert exact.sampling_diagnostics().status == "exact"
