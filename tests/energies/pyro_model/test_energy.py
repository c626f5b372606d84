"""Every Pyro model as an energy, against Pyro's own potential and closed forms."""

import contextlib
import copy
import functools
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_ebm import EnergyDistribution, mcmc
from pyro_ebm.core.errors import CompilationWarning, DivergenceError, UnreliableWarning
from pyro_ebm.energies import (
    BoltzmannEnergy,
    ChainEnergy,
    FactorGraphEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
    RBMEnergy,
)

ROOT = Path(__file__).resolve().parents[2]
DOUBLE = {"dtype": torch.float64}
TREATMENT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], **DOUBLE)
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], **DOUBLE)
X = torch.arange(8.0, **DOUBLE).reshape(4, 2).sin()
Y = torch.arange(4.0, **DOUBLE).cos()


def observe(name, fn, value):
    return pyro.sample(name, fn, obs=torch.as_tensor(value))


def noncentred(y=TREATMENT, sigma=ERROR):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        observe("y", dist.Normal(mu + tau * eta, sigma), y)


def centred():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        observe("y", dist.Normal(theta, ERROR), TREATMENT)


def nested_plates():
    columns, rows = pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 2, dim=-2)
    with columns:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with rows:
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
    with columns, rows:
        observe("y", dist.Normal(x * z, 1.0), torch.arange(6.0).reshape(2, 3))


def sequential_plate():
    x = [pyro.sample(f"x{i}", dist.Normal(0.0, 1.0)) for i in pyro.plate("all", 3)]
    observe("y", dist.Normal(sum(x), 1.0), 1.0)


def factor():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("quartic", -x.pow(4).sum())


def scaled_and_masked():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=3.0):
        observe("y", dist.Normal(x, 1.0), 1.0)
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        observe("z", dist.Normal(x, 2.0), [0.0, 100.0, 4.0])


def lkj():
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    normal = dist.MultivariateNormal(
        torch.zeros(3), scale_tril=scale.unsqueeze(-1) * factor
    )
    with pyro.plate("data", 5):
        observe("y", normal, torch.arange(15.0).reshape(5, 3).sin())


def hmm(num_steps=4):
    rows = torch.ones(2, 2) + torch.eye(2)
    moves = pyro.sample("moves", dist.Dirichlet(rows).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    x = 0
    for t in pyro.markov(range(num_steps)):
        x = pyro.sample(f"x{t}", dist.Categorical(moves[x]))
        observe(f"y{t}", dist.Normal(loc[x], 1.0), math.sin(t))


def mixture():
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Categorical(weights))
        observe("y", dist.Normal(loc[z], 1.0), torch.arange(5.0))


def latent_switch():
    z = pyro.sample("z", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Normal(4 * z, 1.0))
    observe("y", dist.Normal(x, 1.0), 2.0)


def gaussian_process():
    x = torch.linspace(0, 1, 5)
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    kernel = 1.0 * (-0.5 * ((x[:, None] - x) / length) ** 2).exp()
    kernel.view(-1)[::6] += 0.1  # in place, as in pyro.contrib.gp
    observe("y", dist.MultivariateNormal(torch.zeros(5), kernel), x.sin())


class Regression(PyroModule):
    """Bayesian weights, and a noise scale that is learned."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        prior = dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2)
        self.linear.weight = PyroSample(prior)
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def network_model(net, x=X, y=Y):
    pyro.module("net", net)
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(net(x + shift).squeeze(-1), scale), obs=y)


def network():
    layers = [nn.Linear(2, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1)]
    return nn.Sequential(*layers).eval()


def supports():
    x = [
        pyro.sample("half_normal", dist.HalfNormal(1.0)),
        pyro.sample("gamma", dist.Gamma(2.0, 1.0)),
        pyro.sample("beta", dist.Beta(2.0, 3.0)),
        pyro.sample("interval", dist.Uniform(-1.0, 3.0)),
        pyro.sample("log_normal", dist.LogNormal(0.0, 1.0)),
        pyro.sample("circle", dist.VonMises(0.0, 1.0)),
        pyro.sample("pareto", dist.Pareto(1.0, 2.0)),
        pyro.sample(
            "intervals",
            dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])).to_event(
                1
            ),
        ).sum(),
    ]
    observe("y", dist.StudentT(4.0, sum(x), 1.0), 3.0)


def ordered():
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    ordering = dist.transforms.OrderedTransform()
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, ordering))
    with pyro.plate("data", 4):
        observe("y", dist.OrderedLogistic(torch.arange(4.0) - 1, cuts), [0, 1, 2, 3])


def recursion():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    state = torch.zeros(3)
    for t in range(3):
        state[t] = z[t] + (0.5 * state[t - 1] if t else 0.0)
    state[state > 1] = 1.0
    seen = state[torch.tensor([True, False, True])]
    observe("y", dist.Normal(seen, 1.0).to_event(1), torch.ones(2))


# Made, and validated, outside of the model.
OUTSIDE = dist.Normal(torch.zeros(3, **DOUBLE), 1.0, validate_args=True)


def outside():
    x = pyro.sample("x", OUTSIDE.to_event(1))
    observe("y", dist.Normal(x.sum(), 1.0), 1.0)


def data_dependent():
    """Looks into its data, and into nothing latent."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    lengths = torch.tensor([1, 2])
    for i in range(int(lengths.max())):
        if X[i, 0] > -2:
            observe(f"y{i}", dist.Normal(x, 1.0), X[i, 0])


# Built in each test, in its dtype.
MODELS = {
    "eight schools": lambda: noncentred,
    "centred": lambda: centred,
    "nested plates": lambda: nested_plates,
    "sequential plate": lambda: sequential_plate,
    "factor": lambda: factor,
    "scale and mask": lambda: scaled_and_masked,
    "reparam": lambda: poutine.reparam(centred, config={"theta": LocScaleReparam(0.3)}),
    "lkj": lambda: lkj,
    "hmm": lambda: hmm,
    "mixture": lambda: mixture,
    "latent switch": lambda: latent_switch,
    "gaussian process": lambda: gaussian_process,
    "regression": lambda: functools.partial(Regression(), X, Y),
    "network": lambda: functools.partial(network_model, network()),
    "supports": lambda: supports,
    "ordered": lambda: ordered,
    "recursion": lambda: recursion,
    "outside": lambda: outside,
    "data-dependent": lambda: data_dependent,
    "conditioned": lambda: poutine.condition(noncentred, {"tau": torch.tensor(2.0)}),
}


def circle_log_abs_det(sites):
    """Of the bijection to a circle, which is the real line for torch."""
    if "circle" not in sites:
        return 0.0
    share = (sites["circle"] + math.pi) / (2 * math.pi)
    return (2 * math.pi * share * (1 - share)).log()


def pyro_value_and_grad(model, energy, u):
    """Pyro's own potential, one point at a time."""
    with pyro.validation_enabled(False):
        _, potential, transforms, _ = initialize_model(model, initial_params={})
        values, grads = [], []
        for point in u:
            point = point.detach().requires_grad_()
            sites = energy.constrain(point)
            value = potential({n: transforms[n](v) for n, v in sites.items()})
            value = value - circle_log_abs_det(sites)
            values.append(value.detach())
            grads.append(torch.autograd.grad(value, point)[0])
    return torch.stack(values), torch.stack(grads)


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_pyros(name):
    """Faults planted, and seen to fail: two sites swapped in ``ModelSites.split``,
    validation left on, ``select_scatter`` left to vmap."""
    model = MODELS[name]()
    energy = PyroModelEnergy(model)
    assert energy.is_traced
    u = energy.initial_points(3)
    assert u.shape == (3, *energy.event_shape)
    expected = pyro_value_and_grad(model, energy, u)
    for _ in range(2):  # by vmap, then by the graph for three points
        torch.testing.assert_close(energy.value_and_grad(u), expected)
        torch.testing.assert_close(energy(u).detach(), expected[0])
    for _ in range(2):
        torch.testing.assert_close(
            energy.value_and_grad(u[0]), (expected[0][0], expected[1][0])
        )
    sites = energy.constrain(u.reshape(3, 1, -1))
    assert {n: v.shape[2:] for n, v in sites.items()} == energy.site_shapes
    torch.testing.assert_close(energy.unconstrain(sites), u.unsqueeze(1))


@pytest.mark.parametrize("name", MODELS)
def test_prior_is_the_priors_density_and_draws(name):
    """The density at draws of the prior, against that of a trace of the model."""
    model = MODELS[name]()
    energy = PyroModelEnergy(model)
    prior = energy.prior
    u = prior.sample((5,))
    assert u.shape == (5, *energy.event_shape) == prior.sample((1, 5)).shape[1:]
    assert prior.energy.is_traced
    value, grad = prior.energy.value_and_grad(u)
    torch.testing.assert_close(prior.log_prob(u), -value)
    assert grad.isfinite().all()
    if name in ("hmm", "mixture", "latent switch"):
        return  # a trace of a run holds one discrete value of many
    for point, log_prob in zip(u, prior.log_prob(u), strict=True):
        torch.testing.assert_close(trace_log_prior(model, energy, point), log_prob)


def trace_log_prior(model, energy, point):
    sites = energy.constrain(point)
    trace = poutine.trace(poutine.condition(model, sites)).get_trace()
    _, _, transforms, _ = initialize_model(model, initial_params={})
    total = 0.0
    for name, value in sites.items():
        total = total + trace.nodes[name]["fn"].log_prob(value).sum()
        flat = transforms[name](value)
        volume = transforms[name].inv.log_abs_det_jacobian(flat, value).sum()
        total = total + volume
    return total + circle_log_abs_det(sites)


def test_shapes_of_batches():
    energy = PyroModelEnergy(noncentred)
    u = torch.randn(2, 3, 10)
    value, grad = energy.value_and_grad(u)
    assert value.shape == energy(u).shape == (2, 3)
    torch.testing.assert_close(energy.value_and_grad(u[1])[1], grad[1])
    strided = torch.randn(10, 6).mT
    torch.testing.assert_close(energy(strided), energy(strided.contiguous()))
    empty = energy.value_and_grad(torch.empty(0, 10))
    assert (empty[0].shape, empty[1].shape) == ((0,), (0, 10))
    assert energy.initial_points(0).shape == (0, 10)


def test_many_batch_sizes_agree():
    """More than are kept, each twice; the sizes of a resampled population."""
    energy = PyroModelEnergy(noncentred)
    u = torch.randn(12, 10)
    expected = energy.value_and_grad(u)
    for _ in range(2):
        for size in range(1, 13):
            for got, want in zip(
                energy.value_and_grad(u[:size]), expected, strict=True
            ):
                torch.testing.assert_close(got, want[:size])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_models(dtype):
    energy = PyroModelEnergy(noncentred, TREATMENT.to(dtype), ERROR.to(dtype))
    u = energy.initial_points(5)
    value, grad = energy.value_and_grad(u)
    draws = energy.prior.sample((2,))
    assert {t.dtype for t in (u, value, grad, draws, energy(u))} == {dtype}
    exact = PyroModelEnergy(noncentred, TREATMENT, ERROR).value_and_grad(u.double())
    torch.testing.assert_close(
        (value, grad), exact, check_dtype=False, rtol=1e-4, atol=1e-4
    )


def test_data_move_with_the_energy():
    energy = PyroModelEnergy(noncentred, TREATMENT, sigma=ERROR)
    u = energy.initial_points(3)
    expected = energy(u)
    energy.to(torch.float32)
    assert energy.initial_points(2).dtype == torch.float32
    assert energy.prior.sample((2,)).dtype == torch.float32
    torch.testing.assert_close(
        energy(u.float()).double(), expected, rtol=1e-4, atol=1e-4
    )


def learned_models():
    net = network()
    module = Regression()
    free = torch.tensor(0.3, requires_grad=True)

    def with_free_tensor():
        x = pyro.sample("x", dist.Normal(free, 1.0))
        observe("y", dist.Normal(x, 1.0), 0.0)

    yield functools.partial(network_model, net), [*net.parameters(), "scale"]
    yield functools.partial(module, X, Y), list(module.parameters())
    yield with_free_tensor, [free]


@pytest.mark.parametrize("number", range(2))
def test_parameters_stay_live(number):
    """Seen to fail with all tensors folded into the graph as constants."""
    model, parameters = list(learned_models())[number]
    energy = PyroModelEnergy(model)
    store = pyro.get_param_store()
    parameters = [store._params[p] if isinstance(p, str) else p for p in parameters]
    u = energy.initial_points(3)
    for _ in range(3):
        energy.value_and_grad(u)
        energy(u)
    optimizer = torch.optim.SGD(parameters, 0.01)
    before = energy(u)
    before.sum().backward()
    assert all(p.grad is not None for p in parameters)
    expected = autograd_of_potential(model, energy, u, parameters)
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    optimizer.step()
    after = energy(u).detach()
    assert not torch.allclose(after, before)
    wanted = pyro_value_and_grad(model, energy, u)
    torch.testing.assert_close(after, wanted[0])
    torch.testing.assert_close(energy.value_and_grad(u), wanted)


def autograd_of_potential(model, energy, u, parameters):
    _, potential, transforms, _ = initialize_model(model, initial_params={})
    total = 0.0
    for point in u:
        sites = energy.constrain(point)
        total = total + potential({n: transforms[n](v) for n, v in sites.items()})
    return torch.autograd.grad(total, parameters)


def test_a_parameter_found_through_a_closure_stays_live():
    model, (free,) = list(learned_models())[2]
    energy = PyroModelEnergy(model)
    u = torch.zeros(2, 1)
    energy.value_and_grad(u), energy.value_and_grad(u)
    with torch.no_grad():
        free.fill_(2.0)
    value, grad = energy.value_and_grad(u)
    torch.testing.assert_close(grad, torch.full((2, 1), -2.0))
    (grad,) = torch.autograd.grad(energy(u).sum(), free)
    torch.testing.assert_close(grad, torch.tensor(4.0))


def test_buffers_and_modes_stay_live():
    net = network()
    energy = PyroModelEnergy(functools.partial(network_model, net))
    u = energy.initial_points(2)
    before = energy(u), energy(u)
    net[2].running_mean.fill_(0.5)
    assert not torch.allclose(energy(u), before[0])
    net.to(torch.float32).to(torch.float64)  # another tensor in the buffer's place
    net[2].running_mean.zero_()
    torch.testing.assert_close(energy(u), before[0], rtol=1e-5, atol=1e-5)


def test_a_cleared_param_store_is_no_error():
    model = functools.partial(network_model, network())
    energy = PyroModelEnergy(model)
    u = energy.initial_points(2)
    expected = energy(u).detach()
    pyro.clear_param_store()
    torch.testing.assert_close(energy(u).detach(), expected)


@pytest.fixture
def local_params():
    """Modules that do not share their parameters by name, through the store."""
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.mark.usefixtures("local_params")
def test_parameters_of_a_module_belong_to_the_energy():
    model = Regression()
    own = {id(parameter) for parameter in model.parameters()}
    for part in (model, model.forward, functools.partial(model, y=Y)):
        args = (X,) if isinstance(part, functools.partial) else (X, Y)
        energy = PyroModelEnergy(part, *args)
        assert {id(parameter) for parameter in energy.parameters()} == own
        u = energy.initial_points(2)
        twin = copy.deepcopy(energy)
        expected = energy(u).detach()
        torch.testing.assert_close(twin(u).detach(), expected)
        for parameter in twin.parameters():
            nn.init.constant_(parameter, 1.0)
        assert not torch.allclose(twin(u), expected)
        torch.testing.assert_close(energy(u).detach(), expected)


def test_pickling_traces_anew():
    energy = PyroModelEnergy(centred)
    u = energy.initial_points(2)
    expected = energy.prior.log_prob(u), energy(u)
    twin = pickle.loads(pickle.dumps(energy))
    assert twin.is_traced
    torch.testing.assert_close((twin.prior.log_prob(u), twin(u)), expected)


def branching():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    observe("y", dist.Normal(-1.0 if x < 0 else 1.0, 1.0), 1.0)


def reading():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    observe("y", dist.Normal(x, abs(x.item()) + 0.1), 1.0)


def selecting():
    x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    pyro.factor("positive", x[x > 0].sum())


def training():
    torch.manual_seed(0)  # else another network, hence another density, at each run
    net = network().train()
    x = pyro.sample("x", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
    pyro.factor("network", net(x).sum())


def chain(u, v):
    return ChainEnergy(u.reshape(3, 2), v.expand(2, 2) * torch.eye(2))


def machine(u, v):
    weight = torch.zeros(3, 3).index_put((torch.arange(2), torch.arange(1, 3)), u[:2])
    return BoltzmannEnergy(weight, v * u[2:5])


def layers(u, v):
    return RBMEnergy(u.reshape(3, 2), v.expand(3), u[:2])


def forbidding(u, v):
    off = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    return FactorGraphEnergy(
        [2] * 3, [([0, 1], off), ([1, 2], v * u[:4].reshape(2, 2))]
    )


@pytest.mark.parametrize("build", [chain, machine, layers, forbidding])
def test_energies_of_latent_sites_are_traced(build):
    """Planted faults: latent values that become parameters, or checks that read them;
    a sum with a gradient of nan where it is over what is forbidden."""

    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        found = EnergyDistribution(build(u, v))
        with pyro.plate("rows", 2):
            pyro.sample("x", found, obs=torch.tensor([[1.0, 0, 0], [0, 1, 1]]))

    energy = PyroModelEnergy(model)
    assert energy.is_traced
    u = energy.initial_points(3)
    expected = pyro_value_and_grad(model, energy, u)
    torch.testing.assert_close(energy.value_and_grad(u), expected)


EDGES = torch.tensor([[0, 1], [1, 2]])  # the same tensor in all runs


@pytest.mark.parametrize(
    "build",
    [
        lambda z: QuadraticEnergy(z, 2 * torch.eye(3)),
        lambda z: QuadraticEnergy(torch.zeros(3), torch.eye(3) + z[:, None] * z),
        lambda z: FactorGraphEnergy.ising(EDGES, z[:2]),
    ],
    ids=["mean", "precision", "edges"],
)
def test_gaussians_and_graphs_of_latent_sites_are_traced(build):
    """Planted faults, seen to fail: a precision that is looked at; edges that were a
    buffer of the first run, and counted as live in the next."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", 4):
            pyro.sample("x", EnergyDistribution(build(z)), obs=torch.ones(4, 3))

    energy = PyroModelEnergy(model)
    assert energy.is_traced
    u = energy.initial_points(3)
    expected = pyro_value_and_grad(model, energy, u)
    torch.testing.assert_close(energy.value_and_grad(u), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (branching, "branches on a value"),
        (reading, r"\.item\(\)"),
        (selecting, "mask of latent values"),
        (training, r"put modules in eval\(\)"),
    ],
)
def test_what_cannot_be_traced_is_run_by_pyro(model, reason):
    with pytest.warns(UserWarning, match=f"cannot be traced: .*{reason}"):
        energy = PyroModelEnergy(model)
    assert not energy.is_traced
    u = energy.initial_points(3)
    expected = pyro_value_and_grad(model, energy, u)
    torch.testing.assert_close(energy.value_and_grad(u), expected)
    torch.testing.assert_close(energy(u).detach(), expected[0])


def test_random_numbers_outside_of_sites_are_an_error():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        observe("y", dist.Normal(nn.functional.dropout(x.expand(3)).sum(), 1.0), 1.0)

    with pytest.raises(ValueError, match=r"draws random numbers .*module\.eval"):
        PyroModelEnergy(model)


def test_random_numbers_are_refused_where_the_model_is_not_traced():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        scale = 1.0 if x > 0 else 1.5
        noise = nn.functional.dropout(x.expand(8)).sum()
        observe("y", dist.Normal(noise, scale), 1.0)

    with (
        pytest.warns(CompilationWarning, match="cannot be traced"),
        pytest.raises(ValueError, match="same density for the same values"),
    ):
        PyroModelEnergy(model)


def test_arguments_may_have_any_name():
    def model(x, target, model):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        observe("y", dist.Normal(slope * x, model), target)

    data = torch.ones(3)
    energy = PyroModelEnergy(model, data, target=data, model=2.0)
    assert energy.event_shape == (1,)
    chains = mcmc.MCMC(num_chains=8, num_samples=5, progress_bar=False)
    with pytest.warns(UnreliableWarning):  # as it is short
        chains.run(model, data, target=data, model=2.0)
    assert chains.get_samples()["slope"].shape == (40,)


@pytest.mark.parametrize("is_traced", [True, False])
def test_one_singular_matrix_does_not_stop_the_others(is_traced):
    """A Cholesky factor that fails would raise an error, or worse, give a number."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if not is_traced:
            x = x + 0 * float(x.detach())
        rows = [torch.stack([torch.ones(()), x]), torch.stack([x, torch.ones(())])]
        normal = dist.MultivariateNormal(torch.zeros(2), torch.stack(rows))
        observe("y", normal, torch.ones(2))

    with contextlib.ExitStack() as stack:
        if not is_traced:
            stack.enter_context(pytest.warns(UserWarning, match="cannot be traced"))
        energy = PyroModelEnergy(model)
    u = torch.tensor([[0.5], [3.0], [-0.2]])
    for _ in range(2):
        for value in (energy.value_and_grad(u)[0], energy(u)):
            assert value.isfinite().tolist() == [True, False, True]
    assert (energy.initial_points(20).abs() < 1).all()


def test_one_decomposition_that_fails_does_not_stop_the_others():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        eigenvalues = torch.linalg.eigvalsh(x.exp().diag() + 0.1)
        pyro.factor("eigenvalues", -eigenvalues.sum())

    energy = PyroModelEnergy(model)
    u = torch.randn(5, 2)
    expected = energy.value_and_grad(u)
    u[3] = torch.nan
    for _ in range(2):
        value, grad = energy.value_and_grad(u)
        assert value.isfinite().tolist() == [True, True, True, False, True]
        torch.testing.assert_close(value[:3], expected[0][:3])
        torch.testing.assert_close(grad[:3], expected[1][:3])
        assert energy(u).isfinite().tolist() == value.isfinite().tolist()


def test_building_does_not_move_the_random_stream_nor_outer_handlers():
    state = torch.get_rng_state()
    with poutine.trace() as outer:
        energy = PyroModelEnergy(noncentred)
        energy.prior.log_prob(torch.zeros(2, 10))
        energy(torch.zeros(2, 10))
    assert torch.get_rng_state().equal(state)
    assert set(outer.trace.nodes) <= {"_INPUT", "_RETURN"}
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)  # validation is on again


def test_compiled_is_the_same():
    energy = PyroModelEnergy(factor)
    compiled = PyroModelEnergy(factor, compile=True)
    u = energy.initial_points(16)
    expected = energy.value_and_grad(u)
    for _ in range(3):
        torch.testing.assert_close(compiled.value_and_grad(u), expected)


def test_a_compiler_that_fails_is_no_error(monkeypatch):
    def fail(*args):
        raise OSError("no compiler found\nand more")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    energy = PyroModelEnergy(factor, compile=True)
    u = torch.randn(5, 2)
    expected = energy.value_and_grad(u)
    with pytest.warns(UserWarning, match=r"OSError: no compiler found\); the traced"):
        torch.testing.assert_close(energy.value_and_grad(u), expected)
    torch.testing.assert_close(energy.value_and_grad(u), expected)


def test_no_finite_start_is_an_error_that_names_the_site():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(x, 1.0))
        pyro.factor("impossible", x - torch.inf)

    energy = PyroModelEnergy(model)
    with pytest.raises(DivergenceError, match=r"\{'impossible': -inf\} of"):
        energy.initial_points(4)


def test_some_finite_starts_are_enough():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(x > 1, 0.0, -torch.inf))

    energy = PyroModelEnergy(model)
    for num_chains in (1, 50):
        u = energy.initial_points(num_chains)
        assert u.shape == (num_chains, 1)
        assert ((u > 1) & (u < 2)).all()
    assert len(u.unique()) == 50


def test_starts_that_are_rare_are_repeated():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("rare", torch.where(x > 1.999, 0.0, -torch.inf))

    u = PyroModelEnergy(model).initial_points(200)
    assert u.shape == (200, 1)
    assert (u > 1.999).all()
    assert 1 < len(u.unique()) < 100


@pytest.mark.gpu
def test_on_a_gpu():
    energy = PyroModelEnergy(noncentred, TREATMENT, ERROR)
    u = energy.initial_points(6)
    expected = energy.value_and_grad(u), energy.prior.log_prob(u)
    energy.to("cuda")
    on_gpu = u.cuda()
    for _ in range(2):
        got = energy.value_and_grad(on_gpu), energy.prior.log_prob(on_gpu)
        torch.testing.assert_close(got, expected, check_device=False)
    assert energy.prior.sample((3,)).is_cuda
    assert energy.initial_points(2).is_cuda


def test_tracing_does_not_load_the_compiler():
    """It would take several times as long as tracing itself. Seen to fail with torch's
    default for modes, which is to load it at the first operator."""
    source = """
import sys
import pyro
import pyro.distributions as dist
from pyro_ebm.energies import PyroModelEnergy

def model():
    with pyro.plate("plate", 3):
        pyro.sample("x", dist.Gamma(2.0, 1.0))

assert PyroModelEnergy(model).is_traced
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)
