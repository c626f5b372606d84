"""Which models are energies, how their sites lie in a vector, and sums over chains.

Chains of enumerated sites are compared with Pyro's own elimination and the recursion.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.indexing import Vindex

from pyro_ebm.energies import FunctionEnergy, PyroModelEnergy
from pyro_ebm.energies.pyro_model import sites as module


def observe(name, fn, value):
    return pyro.sample(name, fn, obs=torch.as_tensor(value))


def no_latent():
    observe("y", dist.Normal(0.0, 1.0), 1.0)


def only_discrete():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    observe("y", dist.Normal(z, 1.0), 1.0)


def poisson():
    z = pyro.sample("z", dist.Poisson(2.0))
    x = pyro.sample("x", dist.Normal(z, 1.0))
    observe("y", dist.Normal(x, 1.0), 1.0)


def changing_sites():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    for i in range(int((8 + 3 * x).clamp(0, 20))):
        pyro.sample(f"y{i}", dist.Normal(0.0, 1.0))


def changing_shape():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    size = int((50 + 20 * x).clamp(1, 100))
    pyro.sample("y", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def changing_support():
    x = pyro.sample("x", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Uniform(0.0, x))


def support_of_a_discrete_site():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Uniform(0.0, 1.0 + z))


def nan_data():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        observe("y", dist.Normal(x, 1.0), [0.0, torch.nan, 1.0])


def no_bijection():
    support = constraints.positive_definite
    pyro.sample("precision", dist.ImproperUniform(support, (), (2, 2)))


def uniform_mixture(low):
    parts = dist.Uniform(low, torch.tensor(2.0))
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))


def components_apart():
    uniform_mixture(torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3.0, TypeError, "model must be a Pyro model, got float"),
        (FunctionEnergy(torch.sum, (2,)), TypeError, "got FunctionEnergy"),
        (no_latent, ValueError, "at least one continuous latent site"),
        (only_discrete, ValueError, r"only discrete ones, \['z'\]"),
        (poisson, NotImplementedError, "'z' is discrete and cannot be enumerated"),
        (changing_sites, ValueError, "the same sites at each run"),
        (changing_shape, ValueError, "'y' must have the same shape at each run"),
        (changing_support, NotImplementedError, "support of site 'y' depends"),
        (
            support_of_a_discrete_site,
            NotImplementedError,
            "support of site 'y' depends",
        ),
        (nan_data, ValueError, "site 'y' must not contain nan, got 1 in 3"),
        (no_bijection, NotImplementedError, "'precision' has no bijection"),
        (components_apart, NotImplementedError, "'x' has no .* the same support"),
    ],
)
def test_models_that_are_no_energies(model, error, message):
    with pytest.raises(error, match=message):
        PyroModelEnergy(model)


def latent_mixture():
    gammas = dist.Gamma(torch.tensor([1.0, 5.0]), 1.0)
    weights = dist.Categorical(logits=torch.zeros(2))
    pyro.sample("x", dist.MixtureSameFamily(weights, gammas))


def test_a_latent_mixture_has_the_support_of_its_components():
    """torch has no bijection for it, and Pyro's HMC refuses it."""
    energy = PyroModelEnergy(latent_mixture)
    u = torch.linspace(-8, 4, 2001).unsqueeze(-1)
    x = energy.constrain(u)["x"]
    torch.testing.assert_close(x, u.squeeze(-1).exp())
    total = (-energy(u)).logsumexp(0) + (u[1] - u[0]).log()
    torch.testing.assert_close(total, torch.zeros(1), atol=2e-3, rtol=0)


def log_normals(*batch):
    parts = dist.LogNormal(torch.linspace(-0.5, 0.5, 2).expand(*batch, 2), 0.5)
    weights = dist.Categorical(torch.tensor([0.3, 0.7]).expand(*batch, 2))
    return dist.MixtureSameFamily(weights, parts)


@pytest.mark.parametrize(
    "mixture",
    [
        lambda: log_normals(2).to_event(1),
        lambda: log_normals().expand([2]).to_event(1),
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(3)),
            dist.LogNormal(torch.zeros(3, 2), 0.5).to_event(1),
        ),
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Uniform(torch.tensor([[-1.0, 0.0]] * 2), 3.0).to_event(1),
        ),
    ],
    ids=["batch", "expanded", "of vectors", "of boxes"],
)
def test_a_mixture_within_an_event_and_of_events(mixture):
    """Its density integrates to one, and the constrained values lie inside.

    Planted fault: the bounds of a box keep the dimension of the components.
    """

    def model():
        pyro.sample("x", mixture())

    energy = PyroModelEnergy(model)
    assert energy.event_shape == (2,)
    line = torch.linspace(-9, 9, 301)
    u = torch.cartesian_prod(line, line)
    assert mixture().log_prob(energy.constrain(u)["x"]).isfinite().all()
    total = (-energy(u)).logsumexp(0) + 2 * (line[1] - line[0]).log()
    torch.testing.assert_close(total, torch.zeros(()), atol=2e-3, rtol=0)
    assert energy.prior.sample((5,)).shape == (5, 2)


def test_what_is_masked_may_be_nan():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        fn = (
            dist.Normal(torch.zeros(2), 1.0)
            .mask(torch.tensor([True, False]))
            .to_event(1)
        )
        pyro.sample("y", fn, obs=torch.tensor([1.0, torch.nan]))
        observe("z", dist.Normal(x, 1.0), 0.0)

    with pyro.validation_enabled(is_validate=False):
        energy = PyroModelEnergy(model)
    assert energy(torch.zeros(1)).isfinite()


def two_sites():
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        pyro.sample("eta", dist.Normal(0.0, tau))


def test_no_points_of_one_constrained_number():
    def coin():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        observe("k", dist.Bernoulli(p), 1.0)

    energy = PyroModelEnergy(coin)
    u = torch.zeros(0, 6, 1)
    assert energy.unconstrain(energy.constrain(u)).shape == (0, 6, 1)
    assert energy._sites.log_abs_det(u, energy.constrain(u)).shape == (0, 6)


def test_unconstrain_names_what_is_wrong():
    energy = PyroModelEnergy(two_sites)
    sites = energy.constrain(torch.zeros(4, 9))
    with pytest.raises(
        ValueError, match=r"site 'eta' must have shape \(\*batch, \*\(8,"
    ):
        energy.unconstrain({**sites, "eta": torch.zeros(4, 7)})
    del sites["tau"]
    with pytest.raises(ValueError, match="'tau' is missing"):
        energy.unconstrain(sites)


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
    monkeypatch.setattr(module, "_ChainEvaluator", lambda evaluator: evaluator)
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
    summed = module._ChainEvaluator.log_prob.__globals__["_summed"]

    def spy(chain, plates):
        taken.append(len(chain.symbols))
        return summed(chain, plates)

    monkeypatch.setitem(module._ChainEvaluator.log_prob.__globals__, "_summed", spy)
    PyroModelEnergy(model)
    assert bool(taken) == is_chain
    assert not is_chain or set(taken) == {T}
    assert issubclass(module._ChainEvaluator, TraceEinsumEvaluator)
