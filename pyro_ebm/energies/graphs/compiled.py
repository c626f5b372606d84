r"""An energy whose value, gradient and leapfrog step are machine code.

With a step :math:`\epsilon`, a scale matrix :math:`S` and :math:`h = 1` or
:math:`\tfrac12`, one graph computes

.. math::
    x &\leftarrow x + \epsilon S r                                     \tag{1} \\
    r &\leftarrow r - h\, \epsilon S^\top \nabla f(x)                  \tag{2}

together with :math:`f` and :math:`\nabla f` at the new point, all that a Hamiltonian
kernel does in its inner loop. It is one step, not a trajectory, so that another number
of steps needs no other graph.

The graph has no Python in it: a call of it is one call of machine code, where eager
torch pays for every operator and for autograd. ``torch.compile`` would find the same
graph, but checks its guards at each call, which takes as long as a small energy; here
only the layouts of the inputs are compared.

Matrix products are given to the compiler in the form that it makes most of:

* Small ones become sums, which fuse with what is around them.
* Onto few columns the second factor is stored transposed: five times faster in MKL.
* Large ones in single precision go to oneDNN on a CPU: as fast as MKL on Intel's
  processors, and twice as fast on others.

The other products stay as they are.
"""

__all__ = ["CompiledEnergy"]

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.core.errors import CompilationWarning
from pyro_ebm.core.validation import without_validation
from pyro_ebm.energies.base import ClosedForm, Energy, require_no_batch

aten = torch.ops.aten

#: A product is small up to this number of rows and columns of its second factor,
_SMALL = 16
#: narrow up to this number of columns,
_NARROW = 4
#: and large from this number of multiplications on.
_LARGE = 2**22

# Inductor takes only constant weights to oneDNN; through an operator of our own they
# may be learned.
_library = torch.library.Library("pyro_ebm", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight) -> Tensor")


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _linear_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear_shape, "Meta")


def _mm(first: Tensor, second: Tensor) -> Tensor:
    num_rows, num_columns = second.shape
    if max(num_rows, num_columns) <= _SMALL:
        if not second.is_contiguous():
            # As a sum it is computed once; as a view it would be gathered each time.
            second = (second[:, :, None] * torch.eye(num_columns).to(second)).sum(1)
        return (first[:, :, None] * second).sum(1)
    if num_columns <= _NARROW and not second.mT.is_contiguous():
        transposed = second.mT.clone(memory_format=torch.contiguous_format)
        return aten.mm.default(first, transposed.mT)
    if _is_for_onednn(first) and first.numel() * num_columns >= _LARGE:
        linear: Tensor = torch.ops.pyro_ebm.linear(first, second.mT.contiguous())
        return linear
    return NotImplemented


def _addmm(
    bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = _mm(first, second) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else product + bias


def _is_for_onednn(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and x.dtype is torch.float32


#: An operator, and what ``make_fx`` traces instead, unless NotImplemented.
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
}


_Outputs: TypeAlias = tuple[Tensor, ...]
_Function: TypeAlias = Callable[..., _Outputs]

#: Layouts of the inputs for which a compiled function is kept.
_MAX_LAYOUTS = 16


class _CompiledFunction:
    """A function of tensors, compiled for each layout of its inputs.

    The first call with a layout runs eagerly, as it may be the last. The second
    compiles, in a second or more. What cannot be compiled, or gives other numbers then,
    runs eagerly for good, and a :class:`~pyro_ebm.core.errors.CompilationWarning` says
    why.

    Args:
        function: Maps tensors to a tuple of tensors, by torch operators.
        module: Whose parameters and buffers the function reads, at each call.
            Everything else is as it was when it was compiled, but tensors may be
            written into.
        options: Of inductor.
    """

    def __init__(
        self,
        function: _Function,
        module: nn.Module,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.function = function
        self.module = module
        self.options = options
        self._live: list[tuple[dict[str, Any], str]] | None = None
        # None for a layout that was seen once.
        self._functions: OrderedDict[Any, _Function | None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without machine code, which can be neither copied nor pickled."""
        return {**vars(self), "_live": None, "_functions": OrderedDict()}

    def __call__(self, *args: Tensor) -> _Outputs:
        """Evaluate the function at ``args``, without gradient."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(*args)
        inputs = (*self._tensors(), *[argument.contiguous() for argument in args])
        # The only check of shapes: a layout that is known has once run eagerly.
        key = (self.module.training, *map(_layout, inputs))
        compiled = self._functions.get(key)
        if compiled is not None:
            self._functions.move_to_end(key)
            return compiled(*inputs)
        wanted = self.function(*args)
        if key in self._functions:
            num_tensors = len(inputs) - len(args)
            self._functions[key] = self._compile(inputs, num_tensors, wanted)
        else:
            self._functions[key] = None
        if len(self._functions) > _MAX_LAYOUTS:
            self._functions.popitem(last=False)
        return wanted

    def _tensors(self) -> list[Tensor]:
        """The parameters and buffers as they are now."""
        if self._live is None:
            # By their dicts, as walking a module takes longer than a small energy.
            found = {
                id(tensor): (tensors, name)
                for module in self.module.modules()
                for tensors in (module._parameters, module._buffers)
                for name, tensor in tensors.items()
                if tensor is not None
            }
            self._live = list(found.values())
        return [tensors[name] for tensors, name in self._live]

    def _compile(
        self, inputs: _Outputs, num_tensors: int, wanted: _Outputs
    ) -> _Function:
        try:
            with warnings.catch_warnings(), without_validation():
                warnings.simplefilter("ignore")  # torch's own, of no use to the caller
                graph, constants = self._trace(inputs, num_tensors)
                # Imported by this line only: that takes as long as torch itself.
                compiled: Any = torch._inductor.compile(
                    graph, [*constants, *inputs], options=self.options
                )
                got = compiled(*constants, *inputs)
            if not all(map(_agree, got, wanted)):
                raise RuntimeError("the graph gives other numbers than the energy")
        except Exception as error:  # compilers fail in many ways
            warnings.warn(_message(error), CompilationWarning, stacklevel=2)
            return lambda *inputs: self.function(*inputs[num_tensors:])
        return lambda *inputs: compiled(*constants, *inputs)

    def _trace(
        self, inputs: _Outputs, num_tensors: int
    ) -> tuple[fx.GraphModule, list[Tensor]]:
        """The graph, and the tensors that it takes before its inputs.

        They are those that are reached in other ways than as parameters or buffers.
        """
        # At other points than the caller's: a number that is read out of them and so
        # becomes part of the graph is then found out by the caller's results.
        elsewhere = [0.9 * argument + 0.123 for argument in inputs[num_tensors:]]
        graph = make_fx(
            # Parameters are known to the tracer by identity, so they need no passing.
            lambda *inputs: self.function(*inputs[num_tensors:]),
            decomposition_table=_PRODUCTS,
        )(*inputs[:num_tensors], *elsewhere)
        for node in graph.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise RuntimeError(f"it draws random numbers by {node.target}")
        return graph, _lift_constants(graph)


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds its first inputs, and return them."""
    first, *others = graph.graph.nodes
    lifted: dict[str, fx.Node] = {}
    for node in others:
        if node.op == "get_attr":
            name = node.target
            if name not in lifted:
                with graph.graph.inserting_before(first):
                    lifted[name] = graph.graph.placeholder(name)
            node.replace_all_uses_with(lifted[name])
            graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name) for name in lifted]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results are equal up to rounding, and finite in the same places."""
    is_finite = second.isfinite()
    if first.shape != second.shape or not first.isfinite().equal(is_finite):
        return False
    first, second = first[is_finite], second[is_finite]
    tolerance = torch.finfo(second.dtype).eps ** 0.5
    scale = second.abs().max() if second.numel() else 0.0
    return bool(((first - second).abs() <= tolerance * scale).all())


def _message(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"the energy could not be compiled ({type(error).__name__}: {reason}), so it "
        "runs eagerly: right, but slower. See whether its Python code branches on "
        "values, whether a C++ compiler is installed, and, where a compiler was once "
        "interrupted, delete its cache, the directory TORCHINDUCTOR_CACHE_DIR or "
        "torchinductor_<user> among the temporary files."
    )


@final
class CompiledEnergy(Energy):
    r"""An energy that is traced and compiled by torch's inductor.

    Kernels take it in place of the energy that it wraps, and give the same draws for
    the same seed, up to rounding. It pays most where calling an operator costs more
    than its arithmetic. On one core with 1,024 chains, HMC took 4.4 times as many
    leapfrog steps in a second as there were bare autograd gradients of the same energy
    for a ring in two dimensions, 3.0 times for a dense Gaussian in ten and 1.9 times
    for a network 2-128-128-1.

    Each shape, dtype and device of ``x`` is compiled at its second use (the first runs
    eagerly): a second or two each, and some seconds more for the first ever. So keep
    the number of chains. Parameters and buffers stay live: after a step of an optimiser
    the values are the new ones. Python numbers are read when compiling, and submodules
    must not be replaced afterwards.

    Where compiling fails, as for an energy that branches on values or without a C++
    compiler, a :class:`~pyro_ebm.core.errors.CompilationWarning` says so, and the
    energy runs eagerly.

    Kernels work in unconstrained space: where the support is a smaller one, compile
    ``unconstrained(energy)[0]``.

    Args:
        energy: What to compile: its own ``value_and_grad`` is traced, whether in closed
            form or by autograd.
        cuda_graphs: Whether to record CUDA graphs on a GPU. Not tested.

    Raises:
        TypeError: If ``energy`` is no energy.

    Example:
        >>> energy = pyro_ebm.energies.NeuralEnergy((2,), hidden_sizes=(32,))
        >>> compiled = CompiledEnergy(energy)
        >>> kernel = pyro_ebm.mcmc.HMC(step_size=0.1)
        >>> state = kernel.init(compiled, torch.randn(64, 2))
        >>> state.x.shape
        torch.Size([64, 2])
    """

    def __init__(self, energy: Energy, *, cuda_graphs: bool = False) -> None:
        if not isinstance(energy, Energy):
            raise TypeError(
                f"energy must be an Energy, got {type(energy).__name__}. Wrap a "
                "callable in FunctionEnergy."
            )
        require_no_batch(energy)
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self.cuda_graphs = cuda_graphs
        options = {"triton.cudagraphs": True} if cuda_graphs else None
        self._value_and_grad = _CompiledFunction(energy.value_and_grad, energy, options)
        self._leapfrog = _CompiledFunction(
            functools.partial(_leapfrog, energy), energy, options
        )

    def forward(self, x: Tensor) -> Tensor:
        """The wrapped energy, not compiled and differentiable in its parameters."""
        return self.energy(x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient by the compiled graph."""
        value, grad = self._new(self._value_and_grad(x.detach()))
        return value, grad

    def leapfrog(
        self,
        x: Tensor,
        r: Tensor,
        eps: Tensor,
        half: float,
        factor: Tensor | tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The leapfrog step (1) and (2), by one compiled graph.

        Args:
            x: Points, shape ``(*chains, *event)``.
            r: Momenta, shape of ``x``.
            eps: Step sizes, broadcast to the shape of ``x``.
            half: The number :math:`h`.
            factor: The matrix :math:`S` for vectors, shape ``(D, D)``, or the scale,
                directions and stretch of one of low rank.

        Returns:
            New points, their energies and gradients, and new momenta.
        """
        metric = () if factor is None else factor
        metric = (metric,) if isinstance(metric, Tensor) else metric
        h = _scalar(half, x.dtype, x.device)  # a number would be part of the graph
        x, value, grad, r = self._new(self._leapfrog(x, r, eps, h, *metric))
        return x, value, grad, r

    def closed_form(self) -> ClosedForm | None:
        """That of the wrapped energy. Exactness: *exact* where it is not ``None``."""
        return self.energy.closed_form()

    def _new(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The next replay of a CUDA graph writes its results into the same memory.
        return tuple(map(torch.clone, results)) if self.cuda_graphs else results


@functools.cache
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def _leapfrog(
    energy: Energy, x: Tensor, r: Tensor, eps: Tensor, half: Tensor, *metric: Tensor
) -> tuple[Tensor, ...]:
    x = x + eps * _times(r, *metric)  # (1)
    value, grad = energy.value_and_grad(x)
    return x, value, grad, r - half * eps * _transposed(grad, *metric)  # (2)


def _times(z: Tensor, *metric: Tensor) -> Tensor:
    """:math:`S z` of each row."""
    if len(metric) < 2:
        return z @ metric[0].mT if metric else z
    scale, directions, stretch = metric
    return scale * (z + (z @ directions * (stretch - 1)) @ directions.mT)


def _transposed(grad: Tensor, *metric: Tensor) -> Tensor:
    r""":math:`S^\top \nabla f` of each row."""
    if len(metric) < 2:
        return grad @ metric[0] if metric else grad
    scale, directions, stretch = metric
    force = scale * grad
    return force + (force @ directions * (stretch - 1)) @ directions.mT
