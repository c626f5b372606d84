"""Graphs of gradients that are rearranged, against autograd."""

import functools

import pytest
import torch
from torch import nn

from pyro_ebm.energies.graphs import batching as module

N = 40
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)).double()


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


def parts_of_a_vector(u):
    """Neighbours in either order, one apart, one in steps."""
    whole = (u[4:] ** 3).sum() + u[3].exp() * u[1:3].sin().sum() + u[0] ** 4
    return whole + (u[:2] * u[4:]).sum() + u[:4:2].cos().prod() + u[-1] * u[2]


RULES = [
    parts_of_a_vector,
    signs_and_scales,
    checks_of_exponentials,
    rows_of_a_plate,
    matrices,
]


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
