r"""A function of one point, traced once and evaluated at many.

Running a Pyro model costs some milliseconds in effect handlers, whatever the size of
its tensors. Here the model runs once; the operators that it applies to the point are
kept as a graph, which is then batched and differentiated:

#. ``make_fx`` records the value at one point, parameters being inputs of the graph;
#. the graph is cleaned: see :mod:`pyro_ebm.energies.graph`;
#. ``make_fx(vmap(graph))`` gives the graph for a number of points, and ``make_fx`` of
   its autograd gradient the graph of value and gradient.
"""

__all__ = ["LoopedFunction", "TracedFunction"]

import contextlib
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_ebm.energies.graph import (
    UntraceableError,
    clean,
    make_functional,
    poison_failures,
    require_deterministic,
)

#: Numbers of points for which a graph is kept.
_MAX_SIZES = 8
#: Points at which tracing is tried, where a matrix may be singular.
_MAX_TRIES = 10


class _OnePoint(NamedTuple):
    """The graph of the value at one point.

    Attributes:
        graph: Maps a point and the live tensors to the value.
        live: How to read each live tensor, a parameter or buffer, as it is now.
    """

    graph: fx.GraphModule
    live: tuple[Callable[[], Tensor], ...]

    def inputs(self) -> list[Tensor]:
        return [read() for read in self.live]


class TracedFunction:
    """A scalar function of one vector, evaluated at many by traced graphs.

    Args:
        function: Maps shape ``(D,)`` to ``()``, by torch operators.
        root: A module whose parameters and buffers stay live, as do those of all
            modules called and Pyro's parameter store.
        compile: Whether to pass graphs of value and gradient through ``torch.compile``.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        root: nn.Module | None = None,
        *,
        compile: bool = False,
    ) -> None:
        self.function = function
        self.root = root
        self.compile = compile
        self._modules: list[nn.Module] = []
        self._one_point: dict[Any, _OnePoint] = {}
        self._batched: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._num_uses: Counter[Any] = Counter()

    def trace(self, u: Tensor) -> None:
        """Trace the function for points like ``u``, shape ``(D,)``.

        Raises:
            UntraceableError: If a graph of operators cannot hold the function.
            ValueError: If the function is random.
        """
        self._trace(u, self._key(u))

    def value(self, u: Tensor) -> Tensor:
        """Values at ``u`` of shape ``(B, D)``, shape ``(B,)``, differentiable."""
        one_point = self._trace(u[:1].squeeze(0), self._key(u))
        graph = self._graph(u, one_point, "value")
        return graph(u, *one_point.inputs())

    @torch.no_grad()
    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients at ``u`` of shape ``(B, D)``, without their graph."""
        u = u.detach()
        one_point = self._trace(u[:1].squeeze(0), self._key(u))
        graph = self._graph(u, one_point, "value_and_grad")
        value, grad = graph(u, *(live.detach() for live in one_point.inputs()))
        return value, grad

    def _key(self, u: Tensor) -> tuple[Any, ...]:
        training = tuple(module.training for module in self._modules)
        return u.dtype, u.device, training

    def _graph(self, u: Tensor, one_point: _OnePoint, kind: str) -> Callable[..., Any]:
        """The graph for as many points as ``u`` holds."""
        key = (len(u), kind, *self._key(u))
        if key in self._batched:
            self._batched.move_to_end(key)
            return self._batched[key]
        in_dims = (0, *(None for _ in one_point.live))
        batched = torch.func.vmap(one_point.graph, in_dims=in_dims)
        if kind == "value_and_grad":
            batched = _with_gradient(batched)
        self._num_uses[key] += 1
        if self._num_uses[key] < 2:  # a size that may not come again
            return batched
        live = [tensor.detach() for tensor in one_point.inputs()]
        graph = _trace_batch(batched, u, live, differentiable=kind == "value")
        if self.compile and kind == "value_and_grad":
            graph = _compiled(graph, u, live)
        self._batched[key] = graph
        if len(self._batched) > _MAX_SIZES:
            self._batched.popitem(last=False)
        return graph

    def _trace(self, u: Tensor, key: tuple[Any, ...]) -> _OnePoint:
        if key not in self._one_point:
            one_point = self._trace_somewhere(u.detach())
            self._one_point[self._key(u)] = one_point
            return one_point
        return self._one_point[key]

    def _trace_somewhere(self, u: Tensor) -> _OnePoint:
        """Trace at a random point like ``u``, where no matrix is singular."""
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                return self._trace_at(torch.empty_like(u).uniform_(-2, 2))
            except torch.linalg.LinAlgError:
                if attempt == _MAX_TRIES:
                    raise
        raise AssertionError

    @torch.no_grad()
    def _trace_at(self, u: Tensor) -> _OnePoint:
        with _called_modules() as called, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.function(u)
            roots = [*([] if self.root is None else [self.root]), *called]
            # A dict, as a set would not keep the order.
            self._modules = list(dict.fromkeys(m for r in roots for m in r.modules()))
            live = _live_tensors(self._modules)
            tensors = [read() for read in live]
            # Tensors are known by identity, so that the inputs need not be used here.
            try:
                graph = make_fx(lambda u, *live: self.function(u))(u, *tensors)
            except torch.linalg.LinAlgError:
                raise
            except Exception as error:
                raise UntraceableError(_first_line(error)) from error
        inputs = (u, *(tensor.detach() for tensor in tensors))
        poison_failures(graph, *inputs)
        graph = clean(make_functional(graph, *inputs), *inputs, differentiable=True)
        require_deterministic(graph)
        _, *placeholders = graph.graph.find_nodes(op="placeholder")
        used = []
        for node, read in zip(placeholders, live, strict=True):
            if node.users:
                used.append(read)
            else:
                graph.graph.erase_node(node)
        graph.recompile()
        return _OnePoint(graph, tuple(used))


class LoopedFunction:
    """The same methods without tracing: the function is called once a point.

    Args:
        function: Maps shape ``(D,)`` to ``()``.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def value(self, u: Tensor) -> Tensor:
        """See :meth:`TracedFunction.value`."""
        return torch.stack([self._value(point) for point in u])

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TracedFunction.value_and_grad`."""
        pairs = [_with_gradient(self._value)(point) for point in u]
        values, grads = zip(*pairs, strict=True)
        return torch.stack(values), torch.stack(grads)

    def _value(self, u: Tensor) -> Tensor:
        try:
            return self.function(u)
        except torch.linalg.LinAlgError:  # one chain must not stop the others
            return u.sum() * torch.nan


def _trace_batch(
    function: Callable[..., Any], u: Tensor, live: list[Tensor], *, differentiable: bool
) -> fx.GraphModule:
    inputs = (u.detach(), *live)
    with torch.no_grad():
        graph = make_fx(lambda *args: function(*args))(*inputs)
        graph = make_functional(graph, *inputs)
        return clean(graph, *inputs, differentiable=differentiable)


def _with_gradient(values: Callable[..., Tensor]) -> Callable[..., Any]:
    """Value and gradient in the first argument, of a function of independent points."""

    def value_and_grad(u: Tensor, *live: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = values(u, *live)
            if not value.requires_grad:  # a flat density
                return value, torch.zeros_like(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    return value_and_grad


def _compiled(
    graph: fx.GraphModule, u: Tensor, live: list[Tensor]
) -> Callable[..., Any]:
    """The graph through ``torch.compile``, or the graph itself where that fails."""
    try:
        compiled = torch.compile(graph, fullgraph=True, dynamic=False)
        compiled(u, *live)
    except Exception as error:  # noqa: BLE001 (compilers fail in many ways)
        warnings.warn(
            f"the compiler failed ({type(error).__name__}: {_first_line(error)}); the "
            "traced graph runs eagerly. Give compile=False, or see whether a C++ "
            "compiler works and its cache is intact (TORCHINDUCTOR_CACHE_DIR).",
            stacklevel=2,
        )
        return graph
    return compiled


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _called_modules() -> Iterator[list[nn.Module]]:
    """Collect the modules that are called, wherever the caller got them from."""
    called: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        yield called
    finally:
        handle.remove()


def _live_tensors(modules: list[nn.Module]) -> list[Callable[[], Tensor]]:
    """How to read each parameter and buffer, so that it is never read stale."""
    readers: dict[int, Callable[[], Tensor]] = {}
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    # From its dict, as .to() puts another buffer in its place.
                    readers[id(tensor)] = _item_reader(tensors, name)
    store = pyro.get_param_store()
    for name, tensor in store.named_parameters():
        readers.setdefault(id(tensor), _store_reader(store, name, tensor))
    return list(readers.values())


def _item_reader(tensors: Any, name: str) -> Callable[[], Tensor]:
    return lambda: tensors[name]


def _store_reader(store: Any, name: str, tensor: Tensor) -> Callable[[], Tensor]:
    # A store that was cleared lends its last tensors.
    return lambda: store._params.get(name, tensor)
