r"""Functions of one point, recorded once and evaluated at many.

Running a Pyro model costs some milliseconds in effect handlers, whatever the size of
its tensors. Here the model runs once; the operators that it applies to the point are
kept as a graph, which is then batched and differentiated:

#. the value at one point is recorded, parameters being inputs of the graph, and
   cleaned: see :mod:`pyro_ebm.energies.graphs.simplification`;
#. that graph under ``vmap`` and ``autograd.grad`` is recorded and cleaned again: the
   graph of value and gradient for a number of points, with no autograd left.
"""

__all__ = ["CastFunction", "LoopedFunction", "PointFunction", "TracedFunction"]

import contextlib
import functools
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeAlias

import pyro
import torch
from torch import Tensor, fx, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from pyro_ebm.core.errors import CompilationWarning
from pyro_ebm.core.validation import without_validation
from pyro_ebm.energies.graphs.precision import (
    in_double_precision,
    is_single_precision,
)
from pyro_ebm.energies.graphs.recording import (
    Recording,
    UntraceableError,
    first_line,
    is_random,
    record,
)
from pyro_ebm.energies.graphs.repetition import grouped
from pyro_ebm.energies.graphs.simplification import clean

#: Numbers of points for which a graph is kept.
_MAX_SIZES = 24
#: Times that a number of points must have come for a graph of its own.
_MIN_USES = 4
#: Points at which tracing is tried, where a matrix may be singular.
_MAX_TRIES = 10


_Reader: TypeAlias = Callable[[], Tensor]


class _OnePoint(NamedTuple):
    """The graph of the value at one point.

    Attributes:
        graph: Maps a point and the live tensors to the value.
        live: How to read each live tensor, a parameter or buffer, as it is now.
        recording: What the graph was made from.
        recorded: The live tensors in it, some of which nothing depends on.
    """

    graph: fx.GraphModule
    live: tuple[_Reader, ...]
    recording: Recording
    recorded: tuple[_Reader, ...]

    def inputs(self) -> list[Tensor]:
        """The live tensors."""
        return [read() for read in self.live]

    def batch(self, *, differentiable: bool) -> Callable[..., Any]:
        """The value at many points, or value and gradient if not differentiable."""
        values = torch.func.vmap(self.graph, in_dims=(0, *(None for _ in self.live)))
        return values if differentiable else _with_gradient(values)


class PointFunction(Protocol):
    """A scalar function of a vector, evaluated at many."""

    def value(self, u: Tensor) -> Tensor:
        """Values at ``u`` of shape ``(B, D)``, shape ``(B,)``, differentiable."""

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients at ``u`` of shape ``(B, D)``, without their graph."""


class TracedFunction:
    """A scalar function of one vector, evaluated at many by traced graphs.

    Args:
        function: Maps shape ``(D,)`` to ``()``, by torch operators.
        root: A module whose parameters and buffers stay live, as do those of all
            modules called and Pyro's parameter store.
        compile: Whether torch's inductor compiles the graphs of value and gradient.
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
        self._narrow: tuple[TracedFunction, torch.dtype] | None = None
        self._modules: list[nn.Module] = []
        self._one_points: dict[Any, _OnePoint] = {}
        self._batches: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._num_uses: Counter[Any] = Counter()

    def value(self, u: Tensor) -> Tensor:
        """Values at ``u`` of shape ``(B, D)``, shape ``(B,)``, differentiable."""
        key = ("value", *self._key(u))
        one_point = self._traced(u, key[1:])
        live = one_point.inputs()
        try:
            value: Tensor = self._batch(u, key, one_point)(u, *live)
        except LinAlgError:
            batch = one_point.batch(differentiable=True)
            value = _apart(lambda u: (batch(u, *live),), u)[0]
        return value

    @torch.no_grad()
    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients at ``u`` of shape ``(B, D)``, without their graph.

        Raises:
            UntraceableError: If a graph of operators cannot hold the function.
            ValueError: If the function is random.
        """
        u = u.detach().contiguous()
        key = ("value_and_grad", *self._key(u))
        one_point = self._traced(u, key[1:])
        live = [tensor.detach() for tensor in one_point.inputs()]
        try:
            value, grad = self._batch(u, key, one_point)(u, *live)
        except LinAlgError:
            batch = one_point.batch(differentiable=False)
            value, grad = _apart(lambda u: batch(u, *live), u)
        return value, grad

    def in_double(self, like: Tensor) -> "TracedFunction":
        """The same function in double precision; itself if it is that already.

        It needs no run of the function where this one was recorded.

        Args:
            like: A point ``(D,)`` of the type in which the function can be run.

        Raises:
            UntraceableError: If the operators cannot be repeated in that precision.
        """
        one_point = self._traced(like.unsqueeze(0), self._key(like))
        if not is_single_precision(one_point.recording):
            return self
        twin = TracedFunction(self.function, self.root, compile=self.compile)
        twin._narrow = self, like.dtype
        twin._traced(like.double().unsqueeze(0), self._key(like.double()))
        return twin

    def _key(self, u: Tensor) -> tuple[Any, ...]:
        training = tuple(module.training for module in self._modules)
        return u.dtype, u.device, training

    def _batch(
        self, u: Tensor, key: tuple[Any, ...], one_point: _OnePoint
    ) -> Callable[..., Any]:
        """The function of as many points as ``u`` holds."""
        key = (u.shape[0], *key)  # len(u) takes longer than a small operator
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        batch = one_point.batch(differentiable=key[1] == "value")
        if torch._C._functorch.is_functorch_wrapped_tensor(u):  # has no one value
            return batch
        self._num_uses[key] += 1
        # A number of points that may not come again; compiling was asked for.
        if self._num_uses[key] < (2 if self.compile else _MIN_USES):
            return batch
        live = [tensor.detach() for tensor in one_point.inputs()]
        self._batches[key] = self._recorded(batch, key[1] == "value", u.detach(), live)
        if len(self._batches) > _MAX_SIZES:
            self._batches.popitem(last=False)
        return self._batches[key]

    def _traced(self, u: Tensor, key: tuple[Any, ...]) -> _OnePoint:
        if key not in self._one_points:
            one_point = self._trace_somewhere(u[0].detach())
            # Only now are the modules known, whose modes are part of the key.
            self._one_points[self._key(u)] = one_point
            return one_point
        return self._one_points[key]

    @torch.no_grad()
    def _recorded(
        self,
        batch: Callable[..., Any],
        differentiable: bool,  # noqa: FBT001
        u: Tensor,
        live: list[Tensor],
    ) -> Callable[..., Any]:
        """The graph of a batched function, or the function where that goes wrong."""
        wanted = batch(u, *live)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recording = record(batch, u, *live)
                graph = clean(recording, differentiable=differentiable)
        except UntraceableError:
            return batch
        if not _agree(graph(u, *live), wanted):
            return batch
        if differentiable or not self.compile:
            return _rebound(graph, u, *live)
        return _compiled(graph, u, live)

    def _trace_somewhere(self, u: Tensor) -> _OnePoint:
        """Trace at a random point like ``u``, where no matrix is singular."""
        if self._narrow is not None:
            function, dtype = self._narrow
            narrow = u.to(dtype).unsqueeze(0)
            one_point = function._traced(narrow, function._key(narrow))
            self._modules = function._modules
            return _widened(one_point, u)
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                return self._trace_at(torch.empty_like(u).uniform_(-2, 2))
            except LinAlgError:
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
            # Tensors are known by identity, so the live ones need no passing.
            recording = record(lambda u, *live: self.function(u), u, *tensors)
            learned = [c for c in recording.constants() if c.requires_grad]
            if learned:  # tensors that are neither in a module nor in the store
                live += [functools.partial(_itself, tensor) for tensor in learned]
                tensors += learned
                recording = record(lambda u, *live: self.function(u), u, *tensors)
        return _one_point(recording, live, u, tensors)


def _one_point(
    recording: Recording, live: Sequence[_Reader], u: Tensor, tensors: Sequence[Tensor]
) -> _OnePoint:
    graph = clean(recording, differentiable=True)
    _require_deterministic(graph)
    recording, graph = _with_groups(recording, graph, u, *tensors)
    _, *placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    used = []
    for node, read in zip(placeholders, live, strict=True):
        if node.users:
            used.append(read)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return _OnePoint(graph, tuple(used), recording, tuple(live))


@torch.no_grad()
def _widened(one_point: _OnePoint, u: Tensor) -> _OnePoint:
    """The same graph in double precision, recorded at ``u``."""
    live = one_point.recorded
    function = in_double_precision(one_point.recording)
    tensors = [read() for read in live]
    with torch.random.fork_rng(devices=[]):  # of operators that nothing depends on
        recording = record(function, u.double(), *tensors)
    return _one_point(recording, live, u.double(), tensors)


def _with_groups(
    recording: Recording, graph: fx.GraphModule, *inputs: Tensor
) -> tuple[Recording, fx.GraphModule]:
    """What was recorded, with operators that it repeats applied at once."""
    try:
        function = grouped(graph, *inputs)
        if function is None:
            return recording, graph
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fewer = record(function, *inputs)
        cleaned = clean(fewer, differentiable=True)
    except (RuntimeError, ValueError):  # an operator that knows no stacked tensors
        return recording, graph
    if len(cleaned.graph.nodes) >= len(graph.graph.nodes):  # vmap took one by one
        return recording, graph
    is_same = _agree(cleaned(*inputs), graph(*inputs))
    return (fewer, cleaned) if is_same else (recording, graph)


def _require_deterministic(graph: fx.GraphModule) -> None:
    """Refuse random numbers drawn outside of sample sites."""
    for node in graph.graph.nodes:
        if is_random(node.target):
            raise ValueError(
                f"model draws random numbers ({node.target}) that are no sample site, "
                "so its density is not a function of its sites. Draw them with "
                "pyro.sample, or switch them off: dropout by module.eval()."
            )


def _apart(
    function: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor
) -> tuple[Tensor, ...]:
    """A function of many points that fails at some: nan there, values elsewhere.

    Where a decomposition does not converge at one point, torch gives up on all.
    """
    try:
        return function(u)
    except LinAlgError:
        if len(u) == 1:
            return u.sum(-1) * torch.nan, u * torch.nan
        first, second = (_apart(function, half) for half in u.chunk(2))
        # The function of a value only has no gradient to go with it.
        return tuple(map(torch.cat, zip(first, second, strict=False)))


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
        except (ValueError, LinAlgError):  # one chain must not stop the others
            return u.sum() * torch.nan


class CastFunction:
    """A function of single precision, whose points and values are converted.

    Args:
        function: What is evaluated.
        dtype: Of the points that it takes.
    """

    def __init__(self, function: PointFunction, dtype: torch.dtype) -> None:
        self.function = function
        self.dtype = dtype

    def value(self, u: Tensor) -> Tensor:
        """See :meth:`TracedFunction.value`."""
        return self.function.value(u.to(self.dtype)).to(u.dtype)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TracedFunction.value_and_grad`."""
        value, grad = self.function.value_and_grad(u.to(self.dtype))
        return value.to(u.dtype), grad.to(u.dtype)


def _with_gradient(values: Callable[..., Tensor]) -> Callable[..., Any]:
    """Value and gradient in the first argument, of a function of independent points."""

    def value_and_grad(u: Tensor, *live: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = values(u, *live)
            if not value.requires_grad:  # a flat density
                return value, torch.zeros_like(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad.contiguous()  # autograd may expand it

    return value_and_grad


def _rebound(graph: fx.GraphModule, *inputs: Tensor) -> Callable[..., Any]:
    """The graph as a function, of torch's functions where these do the same.

    They take half the time of small operators to be called, and a module longer than
    any to be called or to find its constants.
    """
    functions = _Functions(graph)
    functions.run(*inputs)
    for node, function in functions.of.items():
        node.target = function
    graph.recompile()
    names = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    constants = SimpleNamespace(**{name: getattr(graph, name) for name in names})
    return functools.partial(type(graph).forward, constants)


class _Functions(fx.Interpreter):
    """The function of each operator that gives the same numbers, to the bit."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.of: dict[fx.Node, Callable[..., Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = getattr(getattr(n.target, "overloadpacket", None), "__name__", "")
        function = getattr(torch, name, None)
        if not isinstance(function, BuiltinFunctionType) or n.kwargs:
            return result
        args, _ = self.fetch_args_kwargs_from_env(n)
        try:
            other = function(*args)
        except (RuntimeError, TypeError):  # of another signature
            return result
        if all(map(_is_same, tree_leaves(result), tree_leaves(other))):
            self.of[n] = function
        return result


def _is_same(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor):  # a number or nothing, beside tensors
        return bool(first == second)
    layouts = [(x.shape, x.stride(), x.dtype, x.device) for x in (first, second)]
    return layouts[0] == layouts[1] and torch.allclose(
        first, second, rtol=0, atol=0, equal_nan=True
    )


def _compiled(
    graph: fx.GraphModule, u: Tensor, live: list[Tensor]
) -> Callable[..., Any]:
    """The graph through ``torch.compile``, or the graph itself where that fails."""
    wanted = graph(u, *live)
    try:
        with warnings.catch_warnings(), without_validation():
            warnings.simplefilter("ignore")  # torch's own, of no use to the caller
            # torch.compile checks guards at each call, which takes as long as a graph.
            compiled: Any = torch._inductor.compile(graph, [u, *live])
            if not _agree(compiled(u, *live), wanted):
                raise RuntimeError("the compiled graph gives other numbers")
    except Exception as error:  # compilers fail in many ways
        warnings.warn(
            f"the compiler failed ({type(error).__name__}: {first_line(error)}); the "
            "traced graph runs eagerly. Give compile=False, or see whether a C++ "
            "compiler works and its cache is intact (TORCHINDUCTOR_CACHE_DIR).",
            CompilationWarning,
            stacklevel=2,
        )
        return graph
    return lambda *inputs: compiled(*inputs)


def _agree(first: Any, second: Any) -> bool:
    """Whether two results are equal up to rounding, and finite in the same places."""
    return all(map(_is_close, tree_leaves(first), tree_leaves(second)))


def _is_close(first: Tensor, second: Tensor) -> bool:
    is_finite = second.isfinite()
    if first.shape != second.shape or not first.isfinite().equal(is_finite):
        return False
    tolerance = torch.finfo(second.dtype).eps ** 0.5
    scale = second.where(is_finite, 0.0).abs().max().item()
    difference = (first - second).where(is_finite, 0.0).abs().max().item()
    return difference <= tolerance * (1 + scale)


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


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _item_reader(tensors: Any, name: str) -> Callable[[], Tensor]:
    return lambda: tensors[name]


def _store_reader(store: Any, name: str, tensor: Tensor) -> Callable[[], Tensor]:
    # A store that was cleared lends its last tensors.
    return lambda: store._params.get(name, tensor)
