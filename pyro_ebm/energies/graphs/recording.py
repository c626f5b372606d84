"""Record the operators that a function applies to its tensors, as a graph.

One node for each operator on plain tensors; everything else, effect handlers and Python
branches, is gone. Tensors are known by identity. It is what ``make_fx`` does with real
tensors, without the metadata that it keeps of each node and that takes it longest.
"""

__all__ = [
    "Recording",
    "UntraceableError",
    "first_line",
    "holds",
    "is_random",
    "is_variable",
    "record",
    "same_key",
    "tags",
]

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


# Operators that vmap would run one by one.
_DECOMPOSED: dict[Any, Callable[..., Any]] = get_decompositions(
    [
        aten._native_batch_norm_legit_no_training,
        aten.binary_cross_entropy_with_logits,
        aten.native_batch_norm,
    ]
)
_FILLS = {aten.masked_fill_.Scalar, aten.masked_fill_.Tensor}


class UntraceableError(RuntimeError):
    """The function does something that a fixed graph of operators cannot hold."""


class Recording(NamedTuple):
    """The operators of a function as a graph, with its constants.

    Attributes:
        graph: Its operators; the placeholders are inputs and constants.
        inputs: The placeholders of the inputs.
        values: What each constant was; of other nodes a tensor without memory, of the
            same shape and type.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    values: dict[fx.Node, Any]

    def constants(self) -> list[Tensor]:
        """The tensors that came from elsewhere, in the order of their placeholders."""
        return [self.values[node] for node in self._constants()]

    def _constants(self) -> list[fx.Node]:
        nodes = (node for node in self.graph.nodes if node.op == "placeholder")
        return [node for node in nodes if node not in self.inputs]

    def replay(
        self, *tensors: Tensor, call: Callable[[fx.Node, Any, Any], Any] | None = None
    ) -> Any:
        """Apply the operators to inputs, and to constants after them.

        Args:
            *tensors: As many as there are placeholders.
            call: What to do for a node, given its arguments; default: call its target.
        """
        env: dict[fx.Node, Any] = dict(
            zip([*self.inputs, *self._constants()], tensors, strict=True)
        )
        last_use = {a: node for node in self.graph.nodes for a in node.all_input_nodes}
        for node in self.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.get)
            if node.op == "output":
                return args[0]
            if node.op == "call_function":
                env[node] = (call or _call)(node, args, kwargs)
            for argument in node.all_input_nodes:
                if last_use[argument] is node:
                    del env[argument]
        return None


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    operator: Any = node.target
    return operator(*args, **kwargs)


def record(function: Callable[..., Any], *inputs: Tensor) -> Recording:
    """The operators of a function, without any that write into their arguments.

    Args:
        function: Applies torch operators to its arguments, or to the same tensors
            wherever it has them from.
        *inputs: Where it is recorded.

    Raises:
        UntraceableError: If what it does depends on the values of the inputs.
        torch.linalg.LinAlgError: If a factorisation fails there.
    """
    try:
        recording = _record(function, inputs, [])
        if not _is_mutating(recording):
            return recording
        pure = torch.func.functionalize(recording.replay, remove="mutations")
        recording = _record(
            pure, [tensor.detach() for tensor in inputs], recording.constants()
        )
    except (LinAlgError, UntraceableError):
        raise
    except Exception as error:
        raise UntraceableError(first_line(error)) from error
    if _is_mutating(recording):
        raise UntraceableError(
            "it writes into a tensor that outlives the call, such as the running mean "
            "of a batch norm; put modules in eval() mode"
        )
    return recording


def _record(
    function: Callable[..., Any], inputs: Sequence[Tensor], constants: Sequence[Tensor]
) -> Recording:
    tape, outer = _Tape(inputs), _Tape.current
    _Tape.current = tape
    try:
        with tape:
            result = function(*inputs, *constants)
    finally:
        _Tape.current = outer
    tape.graph.output(tree_map_only(Tensor, tape.node_of, result))
    return Recording(tape.graph, tape.inputs, tape.values)


class _Tape(TorchDispatchMode):
    """Sees every operator that is run, below autograd and vmap."""

    #: That of the recording under way, if there is one.
    current: "ClassVar[_Tape | None]" = None

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.nodes = WeakTensorKeyDictionary()  # by identity
        self.variable: set[fx.Node] = set()  # what depends on the inputs
        self.written: dict[int, Tensor] = {}  # by the memory of tensors, held for that
        self.inputs = [self._placeholder(tensor, is_variable=True) for tensor in inputs]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not, for that loads torch's compiler, which takes longer than the rest."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            result = _decomposed(func)(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if any(isinstance(a, torch.Generator) for a in tree_leaves((args, kwargs))):
            raise UntraceableError("it draws from a generator of its own")
        varies = is_random(func) or any(map(self._is_variable, tensors))
        if torch.Tag.data_dependent_output in tags(func):
            if varies:
                raise UntraceableError(
                    "it branches on a value that depends on latent values or "
                    "parameters, or turns one into a number, as .item() does"
                )
            return func(*args, **kwargs)
        arguments = tree_map_only(Tensor, self.node_of, (args, kwargs))
        result = func(*args, **kwargs)
        if func is aten._linalg_check_errors.default:
            self._poison(*tensors)
        elif func is aten.detach.default and not varies:
            # torch detaches new tensors; as a view it would detach what is written.
            self.nodes[result] = self.node_of(*tensors)
        else:
            node = self.graph.call_function(func, *arguments)
            self._note(node, result, is_variable=varies)
            if varies and func._schema.is_mutable:
                self.written[_memory(tensors[0])] = tensors[0]
        return result

    def _is_variable(self, tensor: Tensor) -> bool:
        return (
            self.nodes.get(tensor) in self.variable or _memory(tensor) in self.written
        )

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that a tensor came from; a new placeholder if from elsewhere."""
        node: fx.Node | None = self.nodes.get(tensor)
        if node is not None:
            return node
        return self._placeholder(tensor, is_variable=False)

    def _placeholder(self, tensor: Tensor, *, is_variable: bool) -> fx.Node:
        node = self.graph.placeholder(f"tensor_{len(self.values)}")
        self._note(node, tensor, is_variable=is_variable)
        return node

    def _note(self, node: fx.Node, value: Any, *, is_variable: bool) -> None:
        """Remember what a node gave."""
        if is_variable:
            self.variable.add(node)
        if isinstance(value, Tensor):
            self.nodes[value] = node
            is_constant = node.op == "placeholder" and not is_variable
            like = value if is_constant else value.new_empty(()).expand(value.shape)
            self.values[node] = like  # not to hold every tensor until the end
        elif isinstance(value, tuple | list):
            for number, part in enumerate(value):
                item = self.graph.call_function(operator.getitem, (node, number))
                self._note(item, part, is_variable=is_variable)

    def _poison(self, info: Tensor) -> None:
        """Let a factorisation give nan where it fails, instead of raising an error.

        One chain at a singular matrix must not stop the others.
        """
        results: Any = self.nodes[info].args[0]
        for factor, node in list(self.nodes.items()):
            if node in results.users and factor.is_floating_point():
                trailing = (1,) * (factor.dim() - info.dim())
                with self:
                    failed = (info != 0).reshape(info.shape + trailing)
                    filled = factor.masked_fill(failed, torch.nan)
                self.nodes[factor] = self.nodes[filled]


def _decomposed(operator: Any) -> Callable[..., Any]:
    """What to record for an operator; gives ``NotImplemented`` for the operator."""
    name, overload = operator.__name__.split(".")
    is_in_place = name.endswith("_") and torch.Tag.pointwise in tags(operator)
    if not is_in_place and operator not in _FILLS:
        return _DECOMPOSED.get(operator, operator.decompose)
    # To check the shapes, torch would load its compiler, in a third of a second.
    pure = getattr(getattr(aten, name[:-1]), overload)
    return lambda x, *args, **kwargs: x.copy_(pure(x, *args, **kwargs))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_variable(tensor: Tensor) -> bool:
    """Whether a tensor depends on the inputs of the recording under way."""
    return _Tape.current is not None and _Tape.current._is_variable(tensor)


def holds(condition: Tensor) -> bool:
    """Whether it holds everywhere; while values are recorded, which may be any, yes."""
    try:
        return bool(condition.all())
    except UntraceableError:
        return True


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def tags(operator: Any) -> Sequence[torch.Tag]:
    """Torch's tags of an operator; of another function none."""
    return getattr(operator, "tags", ())


def is_random(operator: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in tags(operator)


def _is_mutating(recording: Recording) -> bool:
    schemas = (getattr(n.target, "_schema", None) for n in recording.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def same_key(target: Any, args: Any, kwargs: Any) -> Any:
    """What makes two nodes the same computation; ``None`` if it cannot be told."""

    def frozen(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return (type(value).__name__, *map(frozen, value))
        if isinstance(value, dict):
            return tuple((name, frozen(part)) for name, part in value.items())
        # 1, 1.0 and True are equal and hash alike, but promote otherwise.
        return (type(value), value)

    key = (target, frozen(args), frozen(kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key
