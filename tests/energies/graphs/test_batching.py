"""Recording, cleaning and batching of functions, each against the function itself."""

import functools

import pytest
import torch
from torch import fx, nn

from pyro_ebm.energies.graphs.batching import LoopedFunction, TracedFunction, _rebound
from pyro_ebm.energies.graphs.recording import UntraceableError, record
from pyro_ebm.energies.graphs.repetition import _Layouts
from pyro_ebm.energies.graphs.simplification import clean

MATRIX = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.5, 0.2], [0.1, 0.2, 1.0]])


def in_place_recursion(u):
    state = torch.zeros(3, dtype=u.dtype)
    for t in range(3):
        state[t] = u[t] + (0.5 * state[t - 1] if t else 0.0)
    return (state**2).sum()


def in_place_slices(u):
    matrix = torch.zeros(3, 3, dtype=u.dtype)
    matrix[:, 1] = u
    matrix[0, ::2] += u[:2]
    matrix.view(-1)[::4] += u
    matrix.diagonal().mul_(2.0)
    matrix[1:, 1:].copy_(u[0].expand(2, 2))
    return (matrix.sin() * torch.arange(9.0).reshape(3, 3)).sum()


def masks(u):
    known = torch.tensor([True, False, True])
    x = u.clone()
    x[known] = x[known] * 2
    x[x > 1] = 0.5
    x[known] += u[:2]
    return (x**3).sum() + u.masked_fill(u < 0, 0.0).sum()


def neutral(u):
    zero, one = torch.zeros(3), torch.ones(())
    x = (u + 0) * 1 - zero
    x = -((-(x / one)) ** 1)
    wide = x[:1] + torch.zeros(3)  # not neutral: it broadcasts
    cast = x + torch.zeros(3, dtype=torch.float64)
    both = x.exp() + x.exp() * wide + cast.pow(1.0) * (zero - x).sin()
    return both.sum() + wide.sum() + 0.0


def constants(u):
    data = torch.arange(6.0).reshape(2, 3)
    total = 0.0
    for row in data:  # read as numbers: nothing latent is in them
        if row[0].item() > 1:
            total = total + (u * row).sum().square()
    return total + torch.ones_like(u).sum() * u.sum()


def linear_algebra(u):
    matrix = torch.as_tensor(MATRIX, dtype=u.dtype) + u.exp().diag()
    factor = torch.linalg.cholesky(matrix)
    solved = torch.linalg.solve(matrix, u)
    return torch.logdet(matrix) + solved @ u + (factor @ factor.mT).inverse().sum()


def detached(u):
    return (u.detach() * u**2).sum()


def dynamic_programming(u):
    alpha = u[:2]
    for _ in range(3):
        alpha = torch.logsumexp(alpha.unsqueeze(-1) + u[1:].outer(u[:2]), 0)
    return alpha.logsumexp(0)


def promotion(u):
    steps = (u > 0).int() + 1
    wrapped, exact = steps * 2_000_000_000, steps * 2_000_000_000.0
    return (u * (wrapped / exact)).sum()


def repeated(u):
    rows, one = u.exp().expand(4, 3), u[:1].expand(3)
    x = rows.log() * rows**2 + rows.log_softmax(-1) + rows.log_softmax(0)
    columns = u.unsqueeze(-1).exp().expand(3, 4).log_softmax(-1).mT * u.sin()
    y = one.sin().expand(4, 3).log_softmax(-1) + columns
    return ((x + y) * torch.arange(12.0).reshape(4, 3)).sum()


FUNCTIONS = [
    in_place_recursion,
    in_place_slices,
    masks,
    neutral,
    constants,
    linear_algebra,
    detached,
    promotion,
    dynamic_programming,
    repeated,
]


@pytest.mark.parametrize("num_points", [1, 5])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_traced_is_the_function(function, num_points):
    """Faults planted, and seen to fail: ``select_scatter`` left to vmap, ``-`` among
    the commutative neutral operators, neutral elements that broadcast, equal nodes
    shared without regard to the types of numbers, ``detach`` always dropped, a softmax
    taken before its axis is repeated."""
    u = torch.randn(num_points, 3)
    expected = LoopedFunction(function).value_and_grad(u)
    traced = TracedFunction(function)
    for _ in range(3):
        torch.testing.assert_close(traced.value_and_grad(u), expected)
        point = u.clone().requires_grad_()
        value = traced.value(point)
        (grad,) = torch.autograd.grad(value.sum(), point)
        torch.testing.assert_close((value.detach(), grad), expected)
    # Not the batched function, which stands in for a graph that cannot be had.
    assert all(isinstance(g, fx.GraphModule) for g in traced._batches.values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_run_once(function):
    """After the first evaluations no Python of the function runs again."""
    calls = []

    def counted(u):
        calls.append(1)
        return function(u)

    traced = TracedFunction(counted)
    u = torch.randn(4, 3)
    traced.value_and_grad(u)
    num_calls = len(calls)
    for size in (1, 2, 3, 4, 4, 4):
        traced.value_and_grad(u[:size])
        traced.value(u[:size])
    assert len(calls) == num_calls


def test_cleaning_leaves_few_operators():
    recording = record(neutral, torch.randn(3))
    graph = clean(recording, differentiable=True)
    operators = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert operators.count(torch.ops.aten.exp.default) == 1
    assert torch.ops.aten.neg.default not in operators
    assert len(operators) <= 13
    u = torch.randn(3)
    torch.testing.assert_close(graph(u), neutral(u))


def test_what_is_repeated_is_computed_once():
    """Meant to catch: a logarithm of the scale for each row of a plate."""

    def function(u):
        scale, weights = u[0].exp().expand(1000), u[1:].expand(1000, 2)
        x = -(scale**2).log() * 3 + weights.tanh().log_softmax(-1)[:, 0]
        return x.sum()

    graph = clean(record(function, torch.randn(3)), differentiable=True)
    layouts = _Layouts(graph)
    layouts.run(torch.randn(3))
    large = [
        node.target
        for node, (shape, _) in layouts.of.items()
        if node.op == "call_function" and shape.numel() > 100
    ]
    aten = torch.ops.aten
    assert set(large) <= {aten.expand.default, aten.select.int, aten.add.Tensor}


def test_constants_are_folded_and_live_tensors_are_not():
    weight, data = torch.tensor(2.0), torch.arange(3.0)

    def function(u):
        return (weight.exp() * data.exp() * u).sum()

    u = torch.randn(3)
    recording = record(lambda u, *live: function(u), u, weight)
    graph = clean(recording, differentiable=True)
    expected = function(u)
    torch.testing.assert_close(graph(u, weight), expected)
    torch.testing.assert_close(graph(u, torch.tensor(0.0)), (data.exp() * u).sum())
    operators = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert operators.count(torch.ops.aten.exp.default) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda u: u.sum(),
        lambda u: (u**2).sum() / 2,
        lambda u: u[0],
        lambda u: torch.zeros(()),
        lambda u: u.sum() * 0 + 3,
    ],
)
def test_results_share_no_memory(function):
    """With the points, with the graph's constants, or with an earlier result."""
    traced = TracedFunction(function)
    u = torch.randn(4, 3)
    before = u.clone()
    results = [traced.value_and_grad(u) for _ in range(4)]
    expected = [part.clone() for part in results[0]]
    for result in results:
        for part in result[1:]:
            part.mul_(2.0)
    assert u.equal(before)
    for got, want in zip(traced.value_and_grad(u), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_factor_that_fails_is_nan_and_no_number():
    """What is left in memory then looks like a number: seen without ``_poison``."""
    traced = TracedFunction(lambda u: torch.linalg.cholesky(MATRIX + u.diag()).sum())
    u = torch.tensor([[0.0, 0.0, 0.0], [0.0, -3.0, 0.0], [1.0, 2.0, 3.0]])
    for _ in range(2):
        value, _ = traced.value_and_grad(u)
        assert value.isnan().tolist() == [False, True, False]


def branch(u):
    return u.sum() if u[0] > 0 else -u.sum()


def read(u):
    return u.sum() * u[0].item()


def hidden_write(u):
    state = torch.zeros(2, dtype=u.dtype)
    state[0] = u[0]
    return u.sum() * float(state.sum())


def count(u):
    return u.sum() * len(u[u > 0])


OUTER = torch.zeros(3)


def outer_write(u):
    OUTER.add_(u.detach())
    return (u * OUTER).sum()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (branch, "branches on a value"),
        (read, "turns one into a number"),
        (hidden_write, "turns one into a number"),
        (outer_write, "outlives the call"),
        (lambda u: u.unique().sum(), "shape depends on latent values"),
        (lambda u: u[u > 0].sum(), "mask of latent values"),
    ],
)
def test_what_no_graph_holds_is_refused(function, reason):
    with pytest.raises(UntraceableError, match=reason):
        TracedFunction(function).value_and_grad(torch.ones(2, 3))


def test_random_numbers_are_refused_unless_unused():
    def unused(u):
        torch.randn(3)
        return u.sum()

    TracedFunction(unused).value_and_grad(torch.ones(2, 3))
    with pytest.raises(ValueError, match="draws random numbers"):
        TracedFunction(lambda u: (u * torch.rand(3)).sum()).value_and_grad(
            torch.ones(2, 3)
        )


def test_a_flat_function_has_gradient_zero():
    for traced in (TracedFunction(lambda u: torch.tensor(2.0)),):
        for _ in range(2):
            value, grad = traced.value_and_grad(torch.randn(3, 2))
            assert value.tolist() == [2.0] * 3
            assert not grad.any()


def test_dropout_follows_the_mode():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).eval()
    traced = TracedFunction(lambda u: net(u).sum(), net)
    traced.value_and_grad(torch.ones(2, 3))
    net.train()
    with pytest.raises(ValueError, match="draws random numbers"):
        traced.value_and_grad(torch.ones(2, 3))
    net.eval()
    traced.value_and_grad(torch.ones(2, 3))


def test_modules_are_found_where_they_are_called():
    net = nn.Linear(3, 1)
    traced = TracedFunction(lambda u: functools.partial(net)(u).squeeze())
    u = torch.randn(2, 3)
    for _ in range(3):
        with torch.no_grad():
            net.weight.add_(1.0)
        value, grad = traced.value_and_grad(u)
        torch.testing.assert_close(value, net(u).squeeze(-1).detach())
        torch.testing.assert_close(grad, net.weight.detach().expand(2, 3))


def test_memory_of_a_few_sizes_is_kept():
    traced = TracedFunction(lambda u: (u**2).sum())
    u = torch.randn(30, 2)
    for size in range(1, 31):
        for _ in range(4):
            traced.value_and_grad(u[:size])
    assert len(traced._batches) == 24
    assert 30 in {key[0] for key in traced._batches}


def test_operators_that_return_no_tensor_are_compared_too():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.is_nonzero.default, (x,)))
    assert _rebound(fx.GraphModule({}, graph), torch.ones(()))(torch.zeros(())) is False
