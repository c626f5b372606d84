"""Record the operators that a function applies to its tensors, as a graph.

A graph is what ``make_fx`` makes of a function: one node for each operator on plain
tensors, with everything else, effect handlers and branches, gone.
"""

__all__ = [
    "LinAlgError",
    "Recorder",
    "UntraceableError",
    "aten",
    "first_line",
    "is_random",
    "record",
    "require_deterministic",
    "tags",
]

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    make_fx,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class UntraceableError(RuntimeError):
    """The function does something that a fixed graph of operators cannot hold."""


def record(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The graph of a function, without operators that write into their arguments.

    Args:
        function: Applies torch operators to its arguments, or to the same tensors
            wherever it has them from: they are known by identity.
        *inputs: Where it is recorded.

    Raises:
        UntraceableError: If what it does depends on the values of the inputs.
        torch.linalg.LinAlgError: If a factorisation fails there.
    """
    try:
        return _record(function, inputs, contextlib.nullcontext())
    except UntraceableError as error:
        # Constants may be looked into, and written into, when they are not recorded.
        try:
            return _record(function, inputs, _RunConstants(inputs))
        except UntraceableError:
            raise error from None


def _record(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    mode: contextlib.AbstractContextManager[Any],
) -> fx.GraphModule:
    def run(*inputs: Tensor) -> Any:
        with mode:
            return function(*inputs)

    try:
        graph = make_fx(run)(*inputs)
    except (LinAlgError, UntraceableError):
        raise
    except Exception as error:
        reason = first_line(error)
        if "get value out of a tracing tensor" in reason:
            reason = (
                "it branches on a value that depends on latent values or parameters, "
                "or turns one into a number, as .item() does"
            )
        raise UntraceableError(reason) from error
    example = tuple(tensor.detach() for tensor in inputs)
    _poison_failures(graph, *example)
    return _functional(graph, *example)


class _RunConstants(TorchDispatchMode):
    """Runs operators on constants for good, instead of having them recorded."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        # Tensors that depend on the inputs, by identity; held, so that it stays theirs.
        self.dependent = {id(tensor): tensor for tensor in inputs}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        depends = [id(a) in self.dependent for a in _tensors((args, kwargs))]
        if not any(depends) and not is_random(func):
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        if _is_mutating(func) and not depends[0]:
            raise UntraceableError("it writes latent values into a constant tensor")
        result = func(*args, **kwargs)
        self.dependent.update((id(r), r) for r in _tensors(result))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _functional(graph: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """The same graph without operators that write into their arguments."""
    if not any(_is_mutating(node.target) for node in graph.graph.nodes):
        return graph
    functional = torch.func.functionalize(graph, remove="mutations")
    pure: fx.GraphModule = make_fx(lambda *args: functional(*args))(*inputs)
    if any(_is_mutating(node.target) for node in pure.graph.nodes):
        raise UntraceableError(
            "it writes into a tensor that outlives the call, such as the running mean "
            "of a batch norm; put modules in eval() mode"
        )
    return pure


def require_deterministic(graph: fx.GraphModule) -> None:
    """Refuse random numbers drawn outside of sample sites.

    Raises:
        ValueError: If there are any that the result depends on.
    """
    for node in graph.graph.nodes:
        if is_random(node.target):
            raise ValueError(
                f"model draws random numbers ({node.target}) that are no sample site, "
                "so its density is not a function of its sites. Draw them with "
                "pyro.sample, or switch them off: dropout by module.eval()."
            )


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of each node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)

    @torch.no_grad()
    def record(self, *inputs: Tensor) -> dict[fx.Node, Any]:
        """Run at ``inputs``; the value of each node."""
        self.run(*inputs, enable_io_processing=False)
        return dict(self.env)


def _poison_failures(graph: fx.GraphModule, *inputs: Tensor) -> None:
    """Let a failed factorisation give nan, where the operators recorded would raise.

    One chain at a singular matrix must not stop the others.
    """
    nodes = graph.graph
    if not nodes.find_nodes(
        op="call_function", target=aten._linalg_check_errors.default
    ):
        return
    values = Recorder(graph).record(*inputs)
    for check in list(nodes.nodes):
        if check.target is not aten._linalg_check_errors.default:
            continue
        info = check.args[0]
        for part in list(info.args[0].users):
            if part is info or not values[part].is_floating_point():
                continue
            trailing = [1] * (values[part].dim() - values[info].dim())
            shape = [*values[info].shape, *trailing]
            with nodes.inserting_after(max(part, info)):
                wide = nodes.call_function(aten.reshape.default, (info, shape))
            with nodes.inserting_after(wide):
                failed = nodes.call_function(aten.ne.Scalar, (wide, 0))
            with nodes.inserting_after(failed):
                filled = nodes.call_function(
                    aten.masked_fill.Scalar, (part, failed, torch.nan)
                )
            part.replace_all_uses_with(filled, lambda user, own=filled: user is not own)
        nodes.erase_node(check)
    graph.recompile()


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def tags(operator: Any) -> Sequence[torch.Tag]:
    """Torch's tags of an operator; of another function none."""
    return getattr(operator, "tags", ())


def is_random(operator: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in tags(operator)


def _is_mutating(operator: Any) -> bool:
    schema = getattr(operator, "_schema", None)
    return bool(schema is not None and schema.is_mutable)
