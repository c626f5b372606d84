"""Energies of single precision, evaluated in double precision.

Planted and seen to fail: the clean graph converted, whose constants are rounded, limits
of single precision left in ``clamp``, a copy of the parameters made once.
"""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_ebm.core.errors import CompilationWarning
from pyro_ebm.energies import (
    CompiledEnergy,
    DistributionEnergy,
    FunctionEnergy,
    HopfieldEnergy,
    IsingEnergy,
    MixtureEnergy,
    NeuralEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
    unconstrained,
)
from pyro_ebm.energies.graphs.batching import CastFunction, TracedFunction
from pyro_ebm.energies.views.double import DoubleEnergy, in_double

SINGLE = pytest.mark.parametrize("dtype", [torch.float32])
ROWS = torch.arange(20).sin().float().reshape(10, 2)
DATA = (1000 + torch.arange(10).cos()).float()


def elementwise(x, y):
    a, b = (pyro.sample(n, dist.Normal(0.0, 10.0)) for n in "ab")
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b * x[:, 0], 1.0), obs=y)


def product(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    counts = torch.arange(10) / 4
    pyro.sample("y", dist.Normal(x @ w + counts, 0.75).to_event(1), obs=y)


def edges(x, y):
    p = pyro.sample("p", dist.Beta(2.0, 0.5).expand([2]).to_event(1))
    q = pyro.sample("q", dist.Dirichlet(torch.ones(3)))
    L = pyro.sample("L", dist.LKJCholesky(3, 2.0))
    logits = (x @ p).unsqueeze(-1) + q @ L
    pyro.sample("k", dist.Categorical(logits=logits).to_event(1), obs=(y % 3).long())


def classes(x, y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("classes", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 8.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event())

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


MODELS = [elementwise, product, edges, classes]


@SINGLE
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_as_if_written_in_double(model):
    """Far out too, where bijections saturate."""
    double = in_double(PyroModelEnergy(model, ROWS, DATA))
    u = 6 * torch.randn(20, *double.event_shape, dtype=torch.float64)
    got, prior = double.value_and_grad(u), double.prior.log_prob(u)
    torch.set_default_dtype(torch.float64)
    exact = PyroModelEnergy(model, ROWS.double(), DATA.double())
    torch.testing.assert_close(got, exact.value_and_grad(u), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(prior, exact.prior.log_prob(u), rtol=1e-10, atol=1e-9)
    values = exact.constrain(u)
    for name, value in double.constrain(u).items():
        torch.testing.assert_close(value, values[name])


@SINGLE
def test_a_models_parameters_are_live_and_the_energy_stays_as_it_was():
    model = Regression()
    energy = PyroModelEnergy(model, ROWS, DATA)
    u = torch.randn(3, 2)
    before = energy(u)
    double = in_double(energy)
    assert double.prior.sample((4,)).dtype == torch.float64
    bias = model.linear.bias
    assert any(p is bias for p in double.parameters())
    (grad,) = torch.autograd.grad(double(u.double()).sum(), bias)
    (single,) = torch.autograd.grad(energy(u).sum(), bias)
    torch.testing.assert_close(grad, single)
    for _ in range(3):  # by vmap, then by the graph of three points
        with torch.no_grad():
            bias.add_(1.0)
        value = double(u.double())
        assert value.dtype == torch.float64
        torch.testing.assert_close(value.float(), energy(u))
    with torch.no_grad():
        bias.sub_(3.0)
    assert energy.origin.dtype == energy(u).dtype == torch.float32
    torch.testing.assert_close(energy(u), before)


@SINGLE
def test_a_model_is_not_run_again():
    runs = []

    def counted(x, y):
        runs.append(1)
        product(x, y)

    energy = PyroModelEnergy(counted, ROWS, DATA)
    num_runs = len(runs)
    double = in_double(energy)
    for _ in range(3):
        double.value_and_grad(torch.randn(5, 2, dtype=torch.float64))
    assert len(runs) == num_runs


@SINGLE
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda e: pickle.loads(dumped(e))])
def test_a_copy_is_in_double_too(clone):
    double = in_double(PyroModelEnergy(product, ROWS, DATA))
    u = torch.randn(3, 2, dtype=torch.float64)
    assert clone(double)(u).equal(double(u))


def dumped(energy):
    return pickle.dumps(energy)


@SINGLE
def test_what_cannot_be_traced_is_evaluated_in_its_own_precision():
    def branching():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = ROWS[:2] @ x if x[0] > 0 else x
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones(2))

    with pytest.warns(CompilationWarning):
        energy = PyroModelEnergy(branching)
    double = in_double(energy)
    u = torch.randn(3, 2)
    value, grad = double.value_and_grad(u.double())
    assert value.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(value.float(), energy(u))
    assert not double.is_traced


def test_double_precision_stays_as_it_is():
    model = PyroModelEnergy(product, ROWS.double(), DATA.double())
    assert in_double(model) is model
    quadratic = QuadraticEnergy(torch.zeros(3))
    assert in_double(quadratic) is quadratic


PRECISION = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float32)


def read(x):
    return (x @ PRECISION * x).sum(-1) if x.sum() > -1e9 else x.sum(-1)


ENERGIES = {
    "function": lambda: FunctionEnergy(lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,)),
    "closure": lambda: FunctionEnergy(lambda x: (x @ PRECISION * x).sum(-1), (2,)),
    "network": lambda: NeuralEnergy((2,), hidden_sizes=(8,)),
    "normal": lambda: DistributionEnergy(dist.Normal(torch.zeros(2), 0.7).to_event()),
    "dirichlet": lambda: DistributionEnergy(dist.Dirichlet(torch.ones(3))),
    "gamma": lambda: DistributionEnergy(dist.Gamma(torch.tensor(2.0), 0.3)),
    "unconstrained": lambda: unconstrained(
        DistributionEnergy(dist.Dirichlet(torch.ones(3)))
    )[0],
    "sum": lambda: ENERGIES["network"]() + 2 * QuadraticEnergy(torch.zeros(2)),
    "model": lambda: (
        QuadraticEnergy(torch.zeros(2)) + PyroModelEnergy(product, ROWS, DATA)
    ),
    "mixture": lambda: MixtureEnergy(
        [QuadraticEnergy(torch.zeros(2)), ENERGIES["closure"]()]
    ),
    "compiled": lambda: CompiledEnergy(QuadraticEnergy(torch.zeros(2))),
    "prior": lambda: DistributionEnergy(PyroModelEnergy(product, ROWS, DATA).prior),
    "memory": lambda: HopfieldEnergy(torch.randn(3, 2)),
}


@SINGLE
@pytest.mark.parametrize("name", ENERGIES)
def test_other_energies(name):
    energy = ENERGIES[name]()
    double = in_double(energy)
    x = torch.rand(2, 5, *energy.event_shape)
    x = x / x.sum(-1, keepdim=True) if name == "dirichlet" else x
    expected = energy.value_and_grad(x)
    assert double.event_shape == energy.event_shape
    assert double.tensor_options()["dtype"] == torch.float64
    for _ in range(3):
        got = double.value_and_grad(x.double())
        assert {part.dtype for part in got} == {torch.float64}
        torch.testing.assert_close(
            got, expected, check_dtype=False, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(double(x.double()).detach(), got[0])
    assert double(x[:0].double()).shape == (0, 5)
    # More than double rounding of single results: no number is one of float32.
    assert not isinstance(getattr(double, "_function", None), CastFunction)
    assert not got[0].float().double().equal(got[0]) or name == "dirichlet"
    parameters = list(energy.parameters())
    if parameters and name != "model":
        with torch.no_grad():
            parameters[0].mul_(3.0).add_(1.0)
        torch.testing.assert_close(double(x.double()).float(), energy(x))
        grads = torch.autograd.grad(double(x.double()).sum(), parameters)
        wanted = torch.autograd.grad(energy(x).sum(), parameters)
        torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-3)


@SINGLE
def test_the_ways_that_are_tried():
    assert isinstance(in_double(ENERGIES["closure"]())._function, TracedFunction)
    energy = FunctionEnergy(read, (2,))  # which branches on a value
    double = in_double(energy)
    assert isinstance(double._function, CastFunction)
    x = torch.randn(4, 2)
    torch.testing.assert_close(double(x.double()).float(), energy(x))


@SINGLE
def test_finite_energies():
    energy = IsingEnergy((3, 3), 0.3)
    double = in_double(energy)
    x = torch.randint(2, (5, 3, 3)).float() * 2 - 1
    torch.testing.assert_close(double(x.double()).float(), energy(x))
    assert isinstance(double, DoubleEnergy)


def half_model():
    x = pyro.sample("x", dist.Normal(torch.zeros(2).half(), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.zeros(2).half())


@pytest.mark.parametrize(
    "build",
    [
        lambda: PyroModelEnergy(half_model),
        lambda: DistributionEnergy(dist.Normal(torch.zeros((), dtype=torch.half), 1.0)),
        lambda: FunctionEnergy(nn.Linear(2, 1).bfloat16(), (2,)),
        lambda: FunctionEnergy(torch.sum, ())(torch.zeros((), dtype=torch.half)),
        lambda: QuadraticEnergy(torch.zeros(2).bfloat16()),
    ],
)
def test_half_precision_is_refused(build):
    with pytest.raises(ValueError, match="must be of single or double precision"):
        build()
