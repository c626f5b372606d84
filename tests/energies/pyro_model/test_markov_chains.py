"""Chains of enumerated sites, against Pyro's own elimination and the recursion."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.indexing import Vindex

from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.pyro_model import model_sites as module

T, K = 7, 3


NUMBERS = torch.randn(64, generator=torch.Generator().manual_seed(3)).double()


def data(*shape):
    return NUMBERS[: torch.Size(shape).numel()].reshape(shape)


def chain(name, length, transition, loc, y, first=None):
    """Hidden states with a normal emission each."""
    z = None
    for t in pyro.markov(range(length)):
        start = torch.ones(K) / K if first is None else first
        probs = start if z is None else Vindex(transition)[..., z, :]
        enumerate_it = {"enumerate": "parallel"}
        z = pyro.sample(f"{name}z{t}", dist.Categorical(probs), infer=enumerate_it)
        pyro.sample(f"{name}y{t}", dist.Normal(Vindex(loc)[..., z], 1.0), obs=y[t])


def parameters():
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(K, K)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(K), 2.0).to_event(1))
    return transition, loc


def one():
    chain("", T, *parameters(), data(T))


def in_a_plate():
    transition, loc = parameters()
    with pyro.plate("sequences", 4):
        chain("", T, transition, loc, data(T, 4))


def two():
    transition, loc = parameters()
    chain("a", T, transition, loc, data(T))
    chain("b", 5, transition, loc + 1, data(5))


def left_to_right():
    """Transitions that cannot be have a log-probability of -inf."""
    transition, loc = parameters()
    upper = transition.triu()
    upper = upper / upper.sum(-1, keepdim=True)
    chain("", T, upper, loc, data(T), first=torch.tensor([1.0, 0.0, 0.0]))


def second_order():
    """No chain: each state depends on the last two."""
    transition, loc = parameters()
    y, states = data(T), []
    for t in pyro.markov(range(T), history=2):
        probs = torch.ones(K) / K
        if len(states) > 1:
            probs = Vindex(transition)[states[-1]] * Vindex(transition)[states[-2]]
        enumerate_it = {"enumerate": "parallel"}
        z = pyro.sample(f"z{t}", dist.Categorical(probs), infer=enumerate_it)
        pyro.sample(f"y{t}", dist.Normal(loc[z], 1.0), obs=y[t])
        states = [*states[-1:], z]


def with_a_class():
    """Every state depends on one discrete site: no chain, as all have a third near."""
    transition, loc = parameters()
    enumerate_it = {"enumerate": "parallel"}
    c = pyro.sample("c", dist.Bernoulli(0.3), infer=enumerate_it)
    chain("", T, transition, loc + c[..., None], data(T))


MODELS = [one, in_a_plate, two, left_to_right, second_order, with_a_class]


@pytest.mark.parametrize("model", MODELS)
def test_the_sum_is_that_of_pyro(model, monkeypatch):
    energy = PyroModelEnergy(model)
    u = data(5, *energy.event_shape)
    mine = energy.value_and_grad(u)
    monkeypatch.setattr(module, "ChainEvaluator", lambda evaluator: evaluator)
    theirs = PyroModelEnergy(model).value_and_grad(u)
    for part, wanted in zip(mine, theirs, strict=True):
        assert wanted.isfinite().all()
        torch.testing.assert_close(part, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", [one, left_to_right])
def test_the_sum_is_that_of_the_forward_recursion(model):
    energy = PyroModelEnergy(model)
    u = data(1, *energy.event_shape)
    values = energy.constrain(u[0])
    transition, loc = values["transition"], values["loc"]
    first = torch.full((K,), 1 / K)
    if model is left_to_right:
        transition = transition.triu() / transition.triu().sum(-1, keepdim=True)
        first = torch.tensor([1.0, 0.0, 0.0])
    emission = dist.Normal(loc, 1.0).log_prob(data(T)[:, None])
    a = first.log() + emission[0]
    for t in range(1, T):
        a = torch.logsumexp(a[:, None] + transition.log(), 0) + emission[t]
    prior = dist.Normal(torch.zeros(K), 2.0).log_prob(loc).sum()
    prior = prior + dist.Dirichlet(torch.ones(K)).log_prob(values["transition"]).sum()
    wanted = -(a.logsumexp(0) + prior) - energy.log_abs_det(u)[0]
    torch.testing.assert_close(energy(u)[0], wanted)


@pytest.mark.parametrize(("model", "is_chain"), [(one, True), (second_order, False)])
def test_only_chains_are_taken_from_pyro(model, is_chain, monkeypatch):
    """Meant to catch: chains that are not seen, and go to Pyro after all."""
    taken = []
    summed = module.ChainEvaluator.log_prob.__globals__["_summed"]

    def spy(chain, plates):
        taken.append(len(chain.symbols))
        return summed(chain, plates)

    monkeypatch.setitem(module.ChainEvaluator.log_prob.__globals__, "_summed", spy)
    PyroModelEnergy(model)
    assert bool(taken) == is_chain
    assert not is_chain or set(taken) == {T}
    assert issubclass(module.ChainEvaluator, TraceEinsumEvaluator)
