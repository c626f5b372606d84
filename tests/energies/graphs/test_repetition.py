"""What repeats is applied at once, with the same values and gradients.

Linear recurrences against loops: values, gradients, and what is none.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.graphs import batching as module
from pyro_ebm.energies.graphs.batching import TracedFunction
from pyro_ebm.energies.graphs.recording import record
from pyro_ebm.energies.graphs.repetition import grouped
from pyro_ebm.energies.graphs.simplification import clean

N = 40
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)).double()
solve = torch.ops.pyro_ebm.linear_recurrence
SIZE = 37


def loop(a, b):
    """States along the first axis."""
    states = [b[0]]
    for factor, shift in zip(a.expand(SIZE - 1, *a.shape[1:]), b[1:], strict=True):
        states.append(factor * states[-1] + shift)
    return torch.stack(torch.broadcast_tensors(*states))


def double(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("steps", [1, SIZE - 1])
@pytest.mark.parametrize(("own", "other"), [((3,), (3,)), ((1,), (3,)), ((3,), (1,))])
@pytest.mark.parametrize("backwards", [False, True])
def test_states_and_their_gradients_are_those_of_a_loop(steps, own, other, backwards):
    a, b = double(steps, *own), double(SIZE, *other)
    turn = (lambda x: x.flip(0)) if backwards else (lambda x: x)
    results = [solve(a, b, 0, backwards), turn(loop(turn(a), turn(b)))]
    weights = torch.randn_like(results[0])
    grads = [torch.autograd.grad((x * weights).sum(), (a, b)) for x in results]
    for mine, wanted in zip(
        (results[0], *grads[0]), (results[1], *grads[1]), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


def test_many_recurrences_at_once_and_their_second_derivatives():
    a, b = double(5, 1), double(5, SIZE)
    many = torch.vmap(lambda a, b: solve(a, b, 0, backwards=False))(a, b)
    torch.testing.assert_close(many, loop(a.T, b.T).T)
    shared = torch.vmap(lambda b: solve(a[0], b, 0, backwards=False))(b)
    torch.testing.assert_close(shared, loop(a[:1].T, b.T).T)
    few = (a[0, :1].detach().requires_grad_(), b[0, :6].detach().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda a, b: solve(a, b, 0, False), few)


def test_growth_beyond_all_bounds_is_not_finite():
    a = torch.full((1,), 1e10, dtype=torch.float64)
    assert not solve(a, torch.ones(60, dtype=torch.float64), 0, False).isfinite().all()


@pytest.mark.parametrize("steps", [1, SIZE - 1])
@pytest.mark.parametrize("backwards", [False, True])
def test_products_of_slopes_that_overflow_do_no_harm(steps, backwards):
    a = torch.full((steps, 1), 1e30, dtype=torch.float64).requires_grad_()
    b = torch.zeros(SIZE, 2, dtype=torch.float64)
    b[3 if backwards else -4, 1] = 2.0  # of which three states follow
    b.requires_grad_()
    turn = (lambda x: x.flip(0)) if backwards else (lambda x: x)
    results = [solve(a, b, 0, backwards), turn(loop(turn(a), turn(b)))]
    assert results[1].max().item() == pytest.approx(2e90)
    assert results[0].equal(results[1])
    ends = [x[-4:] if backwards else x[:4] for x in results]  # zeros with slopes
    mine, wanted = (torch.autograd.grad(x.sum(), (a, b)) for x in ends)
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other)


def assert_as_one_by_one(function, u, value, grad):
    for k, point in enumerate(u):
        point = point.detach().requires_grad_()
        wanted = function(point)
        torch.testing.assert_close(value[k], wanted.detach(), rtol=1e-10, atol=1e-10)
        (slope,) = torch.autograd.grad(wanted, point)
        torch.testing.assert_close(grad[k], slope, rtol=1e-10, atol=1e-10)


def garch(u):
    state, values = u[3].exp(), []
    for y in torch.linspace(-1, 1, 40):
        state = u[0].exp() + u[1].sigmoid() * (y - u[3]) ** 2 + u[2].sigmoid() * state
        values.append(state)
    variances = torch.stack(values)
    return (variances.log() + u[4:44] ** 2 / variances).sum()


def moving_average(u):
    error, total = 0.2 - u[0], 0.0
    for y in torch.linspace(-1, 1, 40):
        mean = u[0] + u[1] * y + u[2].tanh() * error
        error = y - mean
        total = total + error**2 * u[3].exp()
    return total


def decay(u):
    """Divided and negated, of which the last one only is used."""
    state = u[:3]
    for _ in range(20):
        state = -(state / (1 + u[3:6].exp())) - 0.1
    return state.square().sum()


def vectors(u):
    """Two autoregressions, one driven by the other, and factors that change."""
    first, second, total = u[:2], u[2:4], 0.0
    for k in range(24):
        first = u[4].sigmoid() * first + 0.1 * u[k : k + 2]
        second = u[k : k + 1].tanh() * second + first
        total = total + (second**2).sum() - (first * u[5]).sum()
    return total


def with_alpha(u):
    """One loop that has another factor, beside one that can be solved."""
    state = u[5]
    for _ in range(20):
        state = torch.rsub(state * u[4].tanh(), 1.0, alpha=0.5)
    return decay(u) + state


@pytest.mark.parametrize(
    ("function", "count"),
    [(garch, 1), (moving_average, 1), (decay, 1), (vectors, 2), (with_alpha, 1)],
)
def test_a_traced_loop_is_solved_with_its_values_and_gradients(function, count):
    traced = TracedFunction(function)
    u = torch.randn(6, 44, dtype=torch.float64)
    value, grad = traced.value_and_grad(u)
    (one_point,) = traced._one_points.values()
    targets = [node.target for node in one_point.graph.graph.nodes]
    assert targets.count(solve.default) == count
    assert targets.count(torch.ops.aten.div.Tensor) < 2
    assert_as_one_by_one(function, u, value, grad)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_numbers_are_as_exact_as_the_points_whatever_the_default(dtype):
    u = torch.randn(3, 6, dtype=torch.float64)
    assert_as_one_by_one(decay, u, *TracedFunction(decay).value_and_grad(u))


def squared(u):
    state = u[0]
    for k in range(30):
        state = 0.1 * state**2 + u[k]
    return state


def feedback(u):
    state, other, total = u[0], u[1], 0.0
    for k in range(30):
        state = 0.5 * state + u[k] * state.sin()
        other = 0.8 * other + u[k]
        total = total + state + other.square()
    return total


def coupled(u):
    first, second = u[0], u[1]
    for k in range(30):
        new = 0.5 * first + 0.2 * second + u[k]
        first, second = new, 0.3 * second - 0.4 * first
    return first * second


@pytest.mark.parametrize(
    ("function", "count"), [(squared, 0), (feedback, 1), (coupled, 0)]
)
def test_what_feeds_back_otherwise_keeps_its_values_and_gradients(function, count):
    traced = TracedFunction(function)
    u = torch.randn(3, 30, dtype=torch.float64)
    assert_as_one_by_one(function, u, *traced.value_and_grad(u))
    (one_point,) = traced._one_points.values()
    targets = [node.target for node in one_point.graph.graph.nodes]
    assert targets.count(solve.default) == count


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_model_with_a_loop_is_traced_in_both_precisions(dtype):
    y = torch.randn(60)

    def model():
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("times", len(y)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        state, states = drift, []
        for k in range(len(y)):
            state = phi * state + scale * noise[k]
            states.append(state)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.stack(states), 1.0), obs=y)

    energy = PyroModelEnergy(model)
    twin = energy.in_double()
    u = torch.randn(5, 63)
    single, exact = energy(u), twin(u.double())
    torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=1e-3)
    (one_point,) = twin._function._one_points.values()
    assert solve.default in [node.target for node in one_point.graph.graph.nodes]


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


def test_states_are_stacked_with_what_they_begin_with_as_they_are():
    """Planted: all taken apart where one of them is of no recurrence."""

    def function(u):
        states = [u[3]]
        for _ in range(40):
            states.append(u[0] + u[1].tanh() * states[-1])
        return (torch.stack(states) * u[2:43]).sum()

    traced, u = TracedFunction(function), torch.randn(6, 43, dtype=torch.float64)
    assert_as_one_by_one(function, u, *traced.value_and_grad(u))
    (one_point,) = traced._one_points.values()
    assert calls(one_point.graph) < 30


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
