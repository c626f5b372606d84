"""Operators that repeat are applied at once, with the same values and gradients."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.graphs import batching as module
from pyro_ebm.energies.graphs.recording import record
from pyro_ebm.energies.graphs.simplification import clean, grouped

N = 40
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)).double()


def regression():
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    for i in range(N):
        pyro.sample(f"y{i}", dist.Normal((X[i] * b).sum(), s), obs=X[i, 0])


def random_walk():
    s = pyro.sample("s", dist.HalfNormal(1.0))
    x = torch.zeros(())
    for t in range(N):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, s))
        pyro.sample(f"y{t}", dist.StudentT(4.0, x, 0.3), obs=X[t, 1])


def groups_of_several_sizes():
    """Other shapes are other groups, and are summed apart."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    for i in range(20):
        rows = X[: 1 + i % 2, :2]
        with pyro.plate(f"rows{i}", len(rows)):
            obs = dist.MultivariateNormal(loc[:2] + i, torch.eye(2) * loc[4].exp())
            pyro.sample(f"y{i}", obs, obs=rows)


def pairs():
    """Operators with several results, and arguments in other orders."""
    u = pyro.sample("u", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    best = [u[[i, N - 1 - i]].max(0) for i in range(N // 2)]
    for i, (value, _) in enumerate(reversed(best)):
        pyro.factor(f"f{i}", -(value - best[i // 2].values).square() / 2)


MODELS = [regression, random_walk, groups_of_several_sizes, pairs]


@pytest.mark.parametrize("model", MODELS)
def test_values_and_gradients_stay(model, monkeypatch):
    energy = PyroModelEnergy(model)
    u = torch.randn(6, *energy.event_shape)
    mine = energy.value_and_grad(u)
    monkeypatch.setattr(module, "grouped", lambda *given: None)
    theirs = PyroModelEnergy(model).value_and_grad(u)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def calls(graph):
    return sum(node.op == "call_function" for node in graph.graph.nodes)


@pytest.mark.parametrize(("model", "most"), [(regression, 0.1), (random_walk, 0.35)])
def test_there_are_fewer_calls(model, most, monkeypatch):
    """Of a graph of value at one point. Meant to catch: terms added one by one."""
    before = []

    def spy(graph, *inputs):
        before.append(calls(graph))
        return grouped(graph, *inputs)

    monkeypatch.setattr(module, "grouped", spy)
    energy = PyroModelEnergy(model)
    (one_point,) = energy._function._one_points.values()
    assert calls(one_point.graph) < most * before[0]


def test_parameters_stay_live():
    weight = nn.Parameter(torch.tensor(1.0))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for i in range(N):
                pyro.sample(f"y{i}", dist.Normal(self.weight * z, 1.0), obs=X[i, 0])

    energy = PyroModelEnergy(Model())
    u = torch.ones(2, 1)
    first = energy(u)
    (grad,) = torch.autograd.grad(first.sum(), weight)
    wanted = 2 * (1.0 - X[:, 0]).sum()
    torch.testing.assert_close(grad, wanted)
    with torch.no_grad():
        weight.add_(1.0)
    assert (energy(u) != first).all()


def test_little_that_repeats_is_left_alone():
    def depth(x):
        for _ in range(60):
            x = (x + 0.1).sin()
        return x.sum()

    x = torch.randn(3)
    graph = clean(record(depth, x), differentiable=True)
    assert grouped(graph, x) is None


def test_other_numbers_are_other_operators():
    """Equal operators on equal shapes with other constants do not go together."""

    def powers(x):
        return sum((x[i] ** (1 + i % 3)).sin() * (0.5 + i % 2) for i in range(N))

    x = torch.rand(N) + 0.5
    graph = clean(record(powers, x), differentiable=True)
    function = grouped(graph, x)
    torch.testing.assert_close(function(x), powers(x))


def signs_and_scales(u):
    """Each rule on signs at least once, with a minus that stays."""
    scale = torch.tensor([0.5, 3.0]).double()
    first, second = -(u[:2] ** 2) / scale, u[2:4] * (2.0 * u[:2])
    sums = [first - second, -first + second, -first - -second, -(first + -second)]
    sums += [-u[:2] - 3.0, -(scale * u[2:4]), -(scale / u[:2].exp())]
    odd = torch.stack([(part * (-second)).sum() for part in sums])
    return (odd.exp() * -0.01).sum() - (-odd).tanh().sum()


def checks_of_exponentials(u):
    """Those that always hold, and the same of numbers that may be negative."""
    s, x = u[:3].exp(), u[3:6]
    held = torch.where(s >= 0, -(s**2), -torch.inf).masked_fill(s < 0, 5.0)
    mine = torch.where(x >= 0, x**2, 7.0 * x).masked_fill(x < -0.5, 1.5)
    return held.sum() + mine.sum() + (u[:3].exp() < 1).sum()


def rows_of_a_plate(u):
    """Constants and repeated numbers, in a sum and in a product."""
    mean, scale = X @ u[:3], u[3].exp().expand(N)
    error = -((X[:, 0] - mean) ** 2) / (2 * scale**2) - scale.log() - 0.9
    weights = (torch.ones(N).double() / scale)[:, None] * u[:3].expand(N, 3)
    other = (X[:, 1] / scale).square() + X[:, 1] * mean - 0.5
    return error.sum() + other.sum(-1) + weights.tanh().sum()


def matrices(u):
    """Products under vmap, whose transposes meet constants."""
    scores = X @ u[:3]
    likelihood = nn.functional.logsigmoid(scores) - X[:, 0] * scores
    return likelihood.sum() + (X @ u[3:]).square().mean()


def small_slopes(u):
    """Hyperbolic tangents whose logarithm is taken, and those that are summed."""
    wide = u[:, None] * X[:, 0].abs() * 1e-12
    return wide.tanh().log().mean() + (X[:, :1] * u).tanh().sum()


RULES = [signs_and_scales, checks_of_exponentials, rows_of_a_plate, matrices]


@pytest.mark.parametrize("function", [*RULES, small_slopes])
def test_recorded_gradients_are_those_of_autograd(function):
    u = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)).double()
    u = u if function is small_slopes else 2 * u - 1
    traced = module.TracedFunction(function)
    for _ in range(6):  # recorded only after some uses
        value, grad = traced.value_and_grad(u)
    (batch,) = traced._batches.values()
    assert isinstance(batch, functools.partial), "the graph gives other numbers"
    for row, mine, slope in zip(u, value, grad, strict=True):
        row.requires_grad_()
        wanted = function(row)
        torch.testing.assert_close(mine, wanted.detach(), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(wanted, row)
        torch.testing.assert_close(slope, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("function", "most"),
    [
        (signs_and_scales, {"neg": 11}),
        (checks_of_exponentials, {"ge": 1, "lt": 2, "masked_fill": 2}),
        (rows_of_a_plate, {"neg": 3, "mul": 18}),
        (matrices, {"permute": 3, "t": 0}),
        (small_slopes, {"tanh": 1}),
    ],
)
def test_rules_leave_few_operators(function, most, monkeypatch):
    names = []
    rebound = module._rebound

    def watched(graph, *inputs):
        packets = (getattr(n.target, "overloadpacket", "") for n in graph.graph.nodes)
        names.extend(str(packet).removeprefix("aten.") for packet in packets)
        return rebound(graph, *inputs)

    monkeypatch.setattr(module, "_rebound", watched)
    traced = module.TracedFunction(function)
    for _ in range(6):
        traced.value_and_grad(torch.rand(70, 6).double())
    assert {name: names.count(name) for name in most} == most
