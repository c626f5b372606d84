"""Compiled energies: the same numbers, live parameters, and honesty where it fails.

Compiling takes seconds, so few tests do; the others let the traced graph run as it is.
"""

import copy
import os
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.core.errors import CompilationWarning
from pyro_ebm.energies import CompiledEnergy, FunctionEnergy, QuadraticEnergy
from pyro_ebm.energies.graphs.compiled import _PRODUCTS
from pyro_ebm.mcmc import HMC, MALA
from pyro_ebm.mcmc.kernels.metric import LowRank

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"
)
FACTOR = torch.tensor([[1.0, 0.0], [0.5, 0.8]], dtype=torch.float64)
LOW_RANK = LowRank(
    torch.tensor([0.7, 1.1], dtype=torch.float64),
    torch.tensor([[0.6], [0.8]], dtype=torch.float64),
    torch.tensor([1.5], dtype=torch.float64),
)


class Network(nn.Module):
    """A small network with every kind of tensor that an energy may hold."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(2, 20, generator=generator))
        self.second = nn.Parameter(torch.randn(20, generator=generator))
        self.register_buffer("centre", torch.tensor([0.5, -0.5]))
        self.outside = [torch.tensor(0.3)]  # in no state_dict
        self.double()
        self.outside[0] = self.outside[0].double()

    def forward(self, x):
        x = x - self.centre
        well = self.outside[0] * x.square().sum(-1)
        return (x @ self.first).tanh() @ self.second + well


def build():
    """A compiled energy, and the energy that it wraps."""
    energy = FunctionEnergy(Network(), (2,))
    return CompiledEnergy(energy), energy


def points(num_chains=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_chains, 2, generator=generator, dtype=torch.float64)


def run(kernel, energy, num_steps=3):
    torch.manual_seed(2)
    state = kernel.init(energy, points())
    for _ in range(num_steps):
        state, info = kernel.step(energy, state)
    assert 0 < info.accepted.sum()
    return state


@pytest.fixture(scope="module")
def compiled():
    """One energy for all tests that compile: three graphs in all."""
    return build()[0]


@pytest.fixture
def no_machine_code(monkeypatch):
    """Trace, but run the traced graph as it is; gives the list of graphs."""
    graphs = []

    def compile(graph, inputs, options=None):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    return graphs


@pytest.fixture
def must_not_compile(monkeypatch):
    def compile(graph, inputs, options=None):
        raise AssertionError("compiled again")

    return lambda: monkeypatch.setattr(torch._inductor, "compile", compile)


@needs_compiler
@pytest.mark.parametrize(
    "kernel",
    [
        MALA(0.2),
        HMC(0.4, num_leapfrog=4),
        HMC(0.4, num_leapfrog=4, scale=FACTOR.diagonal()),
        HMC(0.4, num_leapfrog=4, scale_tril=FACTOR),
        HMC(0.4, num_leapfrog=4, low_rank=LOW_RANK),
    ],
    ids=["mala", "hmc", "hmc-scale", "hmc-scale-tril", "hmc-low-rank"],
)
def test_draws_are_those_of_the_energy_for_the_same_seed(kernel, compiled):
    """Seen to fail with a full step at the end, and with ``S`` for its transpose."""
    torch.testing.assert_close(run(kernel, compiled), run(kernel, compiled.energy))


@needs_compiler
def test_neither_length_nor_step_nor_parameters_compile_again(
    compiled, must_not_compile
):
    for _ in range(2):  # the second call of each function compiles it
        run(HMC(0.4, num_leapfrog=2), compiled)
    must_not_compile()
    network = compiled.energy.fn
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    before = run(HMC(0.1, num_leapfrog=7), compiled)
    compiled(points()).sum().backward()
    optimizer.step()
    network.outside[0].mul_(2.0)  # a tensor in no state_dict, written into
    network.first = nn.Parameter(network.first.detach() * 1.1)
    kernel = HMC(0.1, num_leapfrog=7)
    after = run(kernel, compiled)
    assert not torch.allclose(before.energy, after.energy)
    torch.testing.assert_close(after, run(kernel, compiled.energy))


@needs_compiler
def test_non_finite_points_do_not_touch_others(compiled):
    x = points()
    for _ in range(2):
        compiled.value_and_grad(x)
    clean = compiled.value_and_grad(x)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1] = bad
        value, grad = compiled.value_and_grad(x)
        assert not value[1].isfinite()
        for got, wanted in zip((value, grad), clean, strict=True):
            torch.testing.assert_close(got[2:], wanted[2:])


@needs_compiler
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_copies_are_equal_and_apart(copied, compiled):
    x = points()
    run(HMC(0.4, num_leapfrog=2), compiled)
    twin = copied(compiled)
    wanted = compiled.value_and_grad(x)
    torch.testing.assert_close(twin.value_and_grad(x), wanted)
    with torch.no_grad():
        twin.energy.fn.second.zero_()
    torch.testing.assert_close(compiled.value_and_grad(x), wanted)
    assert not torch.allclose(twin.value_and_grad(x)[0], wanted[0])


def test_compiles_at_the_second_use_of_a_layout(no_machine_code):
    compiled, energy = build()
    for uses in ((points(), 0), (points(), 1), (points(), 1)):
        x, num_graphs = uses
        torch.testing.assert_close(compiled.value_and_grad(x), energy.value_and_grad(x))
        assert len(no_machine_code) == num_graphs
    other = points(65)
    compiled.value_and_grad(other)
    assert len(no_machine_code) == 1
    compiled.float()
    energy.fn.outside[0] = energy.fn.outside[0].float()
    for num_graphs in (1, 2, 2):
        value, _ = compiled.value_and_grad(points().float())
        assert value.dtype == torch.float32
        assert len(no_machine_code) == num_graphs


def test_strided_points_need_no_graph_of_their_own(no_machine_code):
    compiled, energy = build()
    x = points()
    for _ in range(2):
        compiled.value_and_grad(x)
    strided = x.mT.contiguous().mT
    torch.testing.assert_close(
        compiled.value_and_grad(strided), energy.value_and_grad(x)
    )
    assert len(no_machine_code) == 1


def test_number_of_layouts_kept_is_bounded(no_machine_code):
    compiled, _ = build()
    for num_chains in range(1, 100):
        compiled.value_and_grad(points(num_chains))
    assert len(compiled._value_and_grad._functions) <= 16


def test_own_gradient_is_traced_not_autograds(no_machine_code):
    """A closed form has no operator of a backward pass."""
    compiled = CompiledEnergy(QuadraticEnergy(torch.zeros(2)))
    for _ in range(3):
        value, grad = compiled.value_and_grad(points())
    torch.testing.assert_close(grad, points())
    targets = {str(node.target) for node in no_machine_code[0].graph.nodes}
    assert not any("backward" in target or "ones_like" in target for target in targets)
    assert compiled.closed_form() is not None


def branching(x):
    return x.square().sum(-1) if x.sum() > 0 else x.abs().sum(-1)


def random(x):
    return x.square().sum(-1) + 0 * torch.rand(())


def opaque(x):
    return x.square().sum(-1) + float(x.detach().numpy().max())


@pytest.mark.parametrize(
    ("function", "reason"),
    [(branching, "data-dependent"), (random, "random numbers"), (opaque, "")],
)
def test_what_no_graph_can_hold_runs_eagerly_and_says_so(
    function, reason, no_machine_code
):
    energy = FunctionEnergy(function, (2,))
    compiled, x = CompiledEnergy(energy), points()
    compiled.value_and_grad(x)
    with pytest.warns(CompilationWarning, match=f"{reason}.*runs eagerly"):
        compiled.value_and_grad(x)
    for y in (x, -x):  # once is enough
        torch.testing.assert_close(compiled.value_and_grad(y), energy.value_and_grad(y))


def test_compiler_that_fails(monkeypatch):
    def compile(graph, inputs, options=None):
        raise OSError("kernel.so: file too short")

    monkeypatch.setattr(torch._inductor, "compile", compile)
    compiled, energy = build()
    kernel = HMC(0.4)
    with pytest.warns(CompilationWarning, match="OSError: kernel.so.*delete its cache"):
        state = run(kernel, compiled)
    torch.testing.assert_close(state, run(kernel, energy))


def test_compiler_that_errs(monkeypatch):
    monkeypatch.setattr(
        torch._inductor,
        "compile",
        lambda graph, *_, options: lambda *inputs: [1.001 * y for y in graph(*inputs)],
    )
    compiled, energy = build()
    compiled.value_and_grad(points())
    with pytest.warns(CompilationWarning, match="other numbers"):
        compiled.value_and_grad(points())
    torch.testing.assert_close(
        compiled.value_and_grad(points()), energy.value_and_grad(points())
    )


@pytest.mark.parametrize(
    ("num_rows", "num_columns"), [(2, 2), (16, 3), (3, 16), (128, 2), (128, 128)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_torch(num_rows, num_columns, dtype, transposed):
    x = torch.randn(300, num_rows, dtype=dtype)
    y = torch.randn(num_rows, num_columns, dtype=dtype)
    y = y.mT.contiguous().mT if transposed else y
    bias = torch.randn(num_columns, dtype=dtype)

    def product(x, y, bias):
        return x @ y, torch.addmm(bias, x, y), torch.addmm(bias, x, y, alpha=2.0)

    graph = make_fx(product, decomposition_table=_PRODUCTS)(x, y, bias)
    torch.testing.assert_close(graph(x, y, bias), product(x, y, bias))
    targets = {node.target for node in graph.graph.nodes}
    is_large = (num_rows, num_columns, dtype) == (128, 128, torch.float32)
    has_onednn = torch.backends.mkldnn.is_available()
    assert (torch.ops.pyro_ebm.linear.default in targets) == (is_large and has_onednn)


def test_wrong_energy():
    with pytest.raises(TypeError, match="energy must be an Energy, got function"):
        CompiledEnergy(lambda x: x)
