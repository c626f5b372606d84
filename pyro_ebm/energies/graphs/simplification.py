"""Simplify a recorded graph of operators: fewer of them, with a batched form.

Constants are folded, what has no effect is dropped and what is equal shared; the value
stays the same at every input, and so does its gradient where that is asked for. In a
graph that is not differentiated any more, signs and factors of two meet, products under
``vmap`` lose their transposes, and what is constant or repeated is summed apart.
"""

__all__ = ["clean"]

import math
from typing import Any, cast

import torch
from torch import Tensor, fx

from pyro_ebm.energies.graphs.recording import (
    Recording,
    UntraceableError,
    is_random,
    same_key,
    tags,
)

aten = torch.ops.aten

# The result follows from the shape of the argument alone.
_SHAPE_ONLY = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
#: Numbers from which on it takes time to do the same to each of them.
_MANY = 64
_IDENTITIES = {aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SUMS = {aten.sum.default, aten.sum.dim_IntList}
_SCATTERS = {
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.diagonal_scatter.default,
}
# The identity where the result has the shape and type of the argument.
_CASTS = _VIEWS | {aten.expand.default, aten.squeeze.dim, aten._to_copy.default}


def clean(recording: Recording, *, differentiable: bool) -> fx.GraphModule:
    """Fold constants, drop operators without effect, and share equal ones.

    Args:
        recording: Without operators that write into their arguments.
        differentiable: Whether gradients through the graph must stay as they are.

    Returns:
        The graph, which takes the inputs that were recorded.

    Raises:
        UntraceableError: If a shape depends on the inputs.
    """
    _prune(recording.graph)
    return _Cleaner(recording, differentiable=differentiable).cleaned()


def _prune(graph: fx.Graph) -> None:
    """Remove every node that no output depends on."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


class _Cleaner:
    """One pass over a graph that builds the clean one node by node."""

    def __init__(self, recording: Recording, *, differentiable: bool) -> None:
        self.recording = recording
        self.values = recording.values
        self.differentiable = differentiable
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        # What stands for each old node: a node of the new graph, or a constant.
        self.new: dict[fx.Node, Any] = {
            node: self.graph.placeholder(node.name) for node in recording.inputs
        }
        self.seen: dict[Any, fx.Node] = {}

    def cleaned(self) -> fx.GraphModule:
        """The clean graph."""
        for node in self.recording.graph.nodes:
            if node.op == "call_function":
                new = self.new[node] = self._replace(node)
                if isinstance(new, fx.Node):
                    new.meta["shape"] = getattr(self.values.get(node), "shape", ())
            elif node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], self._own))
            elif node not in self.new:
                self.new[node] = self.values[node]
        _prune(self.graph)
        return fx.GraphModule(self._used_constants(), self.graph)

    def _own(self, old: fx.Node) -> fx.Node:
        """An output, in memory that neither the inputs nor the constants share."""
        node = self._as_node(old)
        is_new = node.op == "call_function" and not (
            node.target is aten.reshape.default or node.target.is_view
        )
        contiguous = {"memory_format": torch.contiguous_format}
        return node if is_new else self._call(aten.clone.default, (node,), contiguous)

    def _replace(self, node: fx.Node) -> Any:
        if node.target in _SHAPE_ONLY:
            return self._evaluated(node, self.values)
        if not is_random(node.target) and self._is_constant(node):
            return self._evaluated(node, self.new)
        same = self._same_as_argument(node)
        if same is not None:
            return same
        self._require_static_shape(node)
        if node.target in _SUMS and self._is_of_one(node):
            shape = list(self.values[node].shape)
            argument = self._mapped(node.args[0])
            return self._call(aten.reshape.default, (argument, shape), {})
        if node.target in (aten.index.Tensor, aten.index_put.default):
            return self._index(node)
        if node.target is aten.copy.default:
            return self._copy(node)
        if node.target in _SCATTERS:
            return self._scatter(node)
        narrow = self._before_expansion(node)
        if narrow is not None:
            return narrow
        # Without clones and expansions a view may no longer be one of memory.
        target = aten.reshape.default if node.target in _VIEWS else node.target
        args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
        if self.differentiable or kwargs:
            return self._call(target, args, kwargs)
        return self._rearranged(node, target, args)

    def _rearranged(self, node: fx.Node, target: Any, args: Any) -> Any:
        """What takes fewer or faster operators, where no gradient is to follow."""
        known = self._known_choice(node)
        if known is not None:
            return known
        if _is_transpose(target, args):
            users = node.all_input_nodes[0].users
            if all(_is_transpose(user.target, user.args) for user in users):
                return self._transposed(args[0])
        if target is aten.tanh.default and self._is_slow_tanh(node):
            inner = self._call(aten.mul.Scalar, (args[0], 2.0), {})
            inner = self._call(aten.sigmoid.default, (inner,), {})
            doubled = self._call(aten.mul.Scalar, (inner, 2.0), {})
            return self._call(aten.sub.Scalar, (doubled, 1.0), {})
        is_plain = target is aten.sum.dim_IntList and len(args) == 2
        if is_plain and self.values[node].dtype is torch.float64:
            shape = self.values[node.all_input_nodes[0]].shape
            dims = [dim % len(shape) for dim in args[1]] or [*range(len(shape))]
            return self._sum(args[0], dims, shape)
        both = self._side_by_side(*args) if target is aten.add.Tensor else None
        return (
            both or self._across_transpose(target, args) or self._signed(target, args)
        )

    def _side_by_side(self, *args: Any) -> fx.Node | None:
        """A sum with gradients of two slices that meet, as one of both."""
        for rest, last in (args, args[::-1]):
            terms: list[Any] = [(None, rest)]
            if isinstance(rest, fx.Node) and rest.target is aten.add.Tensor:
                terms += [rest.args, rest.args[::-1]]
            for others, term in terms:
                parts = [self._slice_gradient(part) for part in (term, last)]
                if None in parts:
                    continue
                (shape, dim, start, middle, before), second = sorted(
                    parts, key=lambda p: p[2]
                )
                if second[:3] != (shape, dim, middle):
                    continue
                both = self._call(aten.cat.default, (before + second[4], dim), {})
                if (start, second[3]) != (0, shape[dim]):
                    where = (list(shape), dim, start, second[3], 1)
                    both = self._call(aten.slice_backward.default, (both, *where), {})
                return (
                    both
                    if others is None
                    else self._call(aten.add.Tensor, (others, both), {})
                )
        return None

    def _slice_gradient(self, x: Any) -> Any:
        """Its shape, axis, start and end, and what it consists of; else ``None``."""
        if not isinstance(x, fx.Node):
            return None
        args: Any = x.args
        if x.target is aten.slice_backward.default and args[5] == 1:
            piece, shape, dim, *ends, _ = args
            start, end, _ = slice(*ends).indices(shape[dim])
            is_cat = piece.target is aten.cat.default and piece.args[1:] == (dim,)
            return (
                tuple(shape),
                dim,
                start,
                end,
                list(piece.args[0]) if is_cat else [piece],
            )
        if x.target is aten.select_backward.default:
            piece, shape, dim, start = args
            start %= shape[dim]
            row = self._call(aten.unsqueeze.default, (piece, dim), {})
            return tuple(shape), dim, start, start + 1, [row]
        return None

    def _is_slow_tanh(self, node: fx.Node) -> bool:
        """Whether it takes thrice as long as by a sigmoid, which errs by 1e-16.

        That matters where numbers next to 0 are divided by, or their logarithm taken.
        """
        value = self.values[node]
        is_double = value.dtype is torch.float64 and value.device.type == "cpu"
        is_large = value.numel() > _MANY
        return is_double and is_large and all(n.target in _LINEAR for n in node.users)

    def _known_choice(self, node: fx.Node) -> Any:
        """What checks for negative numbers come to, where these are exponentials."""
        value: Any = self.values.get(node)
        args = node.args
        if node.target in (aten.lt.Scalar, aten.ge.Scalar):
            checked: Any = self.new[node.all_input_nodes[0]]
            is_known = checked.target is aten.exp.default and args[1] == 0
            answer = node.target is aten.ge.Scalar
            return torch.full_like(value, answer) if is_known else None
        if node.target is aten.masked_fill.Scalar:
            kept, is_known = args[0], self._is_full_of(args[1], element=False)
        elif node.target is aten.where.self:
            kept, is_known = args[1], self._is_full_of(args[0], element=True)
        else:
            return None
        assert isinstance(kept, fx.Node)
        is_same = is_known and _layout(self.values[kept]) == _layout(value)
        return self.new[kept] if is_same else None

    def _signed(self, target: Any, args: Any) -> fx.Node:
        """An operator that takes in signs and factors of two, or passes on a sign.

        It gives the same numbers, to the bit.
        """
        if target is aten.neg.default:
            return self._negated(args[0])
        plain = [_operand(a, aten.neg.default) or a for a in args[:2]]
        signs = [a is b for a, b in zip(plain, args, strict=False)]  # False for minus
        if target is aten.sub.Tensor and not (signs[0] or isinstance(args[1], fx.Node)):
            return self._negated(self._call(aten.add.Tensor, (plain[0], args[1]), {}))
        if target in _SIGNED_SUMS and all(isinstance(a, fx.Node) for a in args):
            is_added = signs[1] == (target is aten.add.Tensor)
            if signs[0] or is_added:
                to = aten.add.Tensor if signs[0] == is_added else aten.sub.Tensor
                return self._call(to, tuple(plain if signs[0] else plain[::-1]), {})
            return self._negated(self._call(aten.add.Tensor, tuple(plain), {}))
        if target in _ODD and not all(signs):
            result = self._signed(target, (*plain, *args[2:]))
            return result if sum(signs) == len(signs) - 2 else self._negated(result)
        if target is aten.mul.Tensor:
            for x, constant in (args, args[::-1]):
                doubled = _operand(x, aten.mul.Scalar)
                scaled = doubled and x.args[1] == 2 and self._scaled(constant, 2.0)
                if scaled:
                    return self._call(target, (doubled, scaled), {})
        return self._call(target, args, {})

    def _negated(self, x: fx.Node) -> fx.Node:
        operand: Any = _operand(x, aten.neg.default)
        if operand:
            return operand
        args: Any = x.args
        if x.kwargs:
            return self._call(aten.neg.default, (x,), {})
        if x.target is aten.sub.Tensor and all(isinstance(a, fx.Node) for a in args):
            return self._call(x.target, args[::-1], {})
        if x.target in (aten.mul.Tensor, aten.div.Tensor):
            first, second = (self._scaled(a, -1.0) for a in args)
            if first or second:
                return self._call(
                    x.target, (first or args[0], args[1] if first else second), {}
                )
        return self._call(aten.neg.default, (x,), {})

    def _scaled(self, argument: Any, factor: float) -> fx.Node | None:
        """The multiple of what is constant or repeated; ``None`` if it is neither."""
        source = _operand(argument, aten.expand.default)
        if source:
            if factor == -1:
                narrow = self._negated(source)
            else:
                narrow = self._call(aten.mul.Scalar, (source, factor), {})
            narrow.meta["shape"] = source.meta.get("shape", ())
            return self._call(argument.target, (narrow, argument.args[1]), {})
        constant = self._known(argument)
        if constant is None or not constant.is_floating_point():
            return None
        return self._constant(factor * constant, (argument, factor))

    def _sum(self, x: fx.Node, dims: list[int], shape: torch.Size) -> fx.Node:
        """A sum over some axes, of what is constant or repeated there apart."""
        target: Any = x.target
        if target is aten.neg.default:
            return self._negated(self._sum(cast(fx.Node, x.args[0]), dims, shape))
        if target in _SIGNED_SUMS and not x.kwargs:
            for place, part in enumerate(x.args):
                other: Any = x.args[1 - place]
                total = self._sum_of_repeats(part, dims, shape)
                is_number = not isinstance(part, fx.Node)
                if total is None or not isinstance(other, fx.Node):
                    continue
                if is_number or other.meta.get("shape") == shape:
                    both = [self._sum(other, dims, shape), total]
                    return self._signed(target, tuple(both[:: 1 if place else -1]))
        return self._signed(aten.sum.dim_IntList, (x, dims))

    def _sum_of_repeats(self, part: Any, dims: list[int], shape: torch.Size) -> Any:
        """The sum of a number, a constant or a plate's scale; else ``None``."""
        length = math.prod(shape[dim] for dim in dims)
        if not isinstance(part, fx.Node):
            return part * length
        constant = self._known(part)
        if constant is not None:
            return self._constant(constant.expand(shape).sum(dims))
        source = _operand(part, aten.expand.default)
        narrow = [1 if dim in dims else size for dim, size in enumerate(shape)]
        if not source or list(source.meta.get("shape", ())) != narrow:
            return None
        kept = [size for dim, size in enumerate(shape) if dim not in dims]
        flat = self._call(aten.reshape.default, (source, kept), {})
        return self._call(aten.mul.Scalar, (flat, length), {})

    def _known(self, argument: Any) -> Tensor | None:
        is_known = isinstance(argument, fx.Node) and argument.op == "get_attr"
        return self.constants[argument.target] if is_known else None

    def _transposed(self, x: fx.Node) -> fx.Node:
        """The transpose of a matrix, of the factors if it is a product.

        Products under vmap have their points in columns, which is slow to go through.
        """
        if _is_transpose(x.target, x.args):
            return cast(fx.Node, x.args[0])
        if x.target is aten.mm.default:
            first, second = map(self._transposed, cast(Any, x.args))
            return self._call(x.target, (second, first), {})
        constant = self._known(x)
        if constant is not None:
            return self._constant(constant.mT, (x, "transposed"))
        return self._call(aten.permute.default, (x, [1, 0]), {})

    def _across_transpose(self, target: Any, args: Any) -> fx.Node | None:
        """A sum or product with constants, taken before a matrix is transposed."""
        if target not in _SIGNED_SUMS and target is not aten.mul.Tensor:
            return None
        for place, x in enumerate(args):
            constant = self._known(args[1 - place])
            if constant is None or constant.dim() != 2:
                continue
            if isinstance(x, fx.Node) and _is_transpose(x.target, x.args):
                both = [x.args[0], self._transposed(args[1 - place])]
                inner = self._call(target, tuple(both[:: -1 if place else 1]), {})
                return self._transposed(inner)
        return None

    def _before_expansion(self, node: fx.Node) -> fx.Node | None:
        """What does the same to each number, done before these are repeated.

        A plate repeats the scale of its rows, of which one logarithm is enough.
        """
        value = self.values.get(node)
        wide = [n for n in node.all_input_nodes if isinstance(self.new[n], fx.Node)]
        if len(wide) != 1 or not isinstance(value, Tensor) or value.numel() < _MANY:
            return None
        source = _operand(self.new[wide[0]], aten.expand.default)
        if source is None or not self._is_blind_to_repeats(node, source):
            return None
        numbers = {n: self.new[n] for n in node.all_input_nodes if n is not wide[0]}
        dtype = self.values[wide[0]].dtype
        if any(c.dtype is not dtype or not _is_uniform(c) for c in numbers.values()):
            return None
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: (
                self._constant(numbers[n].flatten()[0]) if n in numbers else source
            ),
        )
        narrow = self._call(node.target, args, kwargs)
        narrow.meta["shape"] = source.meta.get("shape", ())
        return self._call(aten.expand.default, (narrow, list(value.shape)), {})

    def _is_blind_to_repeats(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether it takes numbers one by one, or rows that are not repeated along."""
        if node.target is aten._log_softmax.default:
            narrow, wide = source.meta.get("shape", ()), self.values[node].shape
            return bool(node.args[1] == -1 and narrow[-1:] == wide[-1:])
        return torch.Tag.pointwise in tags(node.target) and not is_random(node.target)

    @torch.no_grad()
    def _evaluated(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        operator: Any = node.target
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return operator(*args, **kwargs)

    def _call(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        key = None if is_random(target) else same_key(target, args, kwargs)
        if key is None:
            return self.graph.call_function(target, args, kwargs)
        if key not in self.seen:
            self.seen[key] = self.graph.call_function(target, args, kwargs)
        return self.seen[key]

    def _copy(self, node: fx.Node) -> fx.Node:
        """What is left of writing a tensor into another, whose values are lost."""
        value, written = self.values[node], node.all_input_nodes[-1]
        source = self._mapped(written)
        if self.values[written].dtype is not value.dtype:
            dtype = {"dtype": value.dtype}
            source = self._call(aten._to_copy.default, (source,), dtype)
        return self._call(aten.expand.default, (source, list(value.shape)), {})

    def _scatter(self, node: fx.Node) -> fx.Node:
        """Writing into a part of a tensor, as a choice between two tensors.

        Gradients through torch's own batched form are wrong.
        """
        source: Any
        target, source, *where = node.args
        value, shape = self.values[node], list(self.values[node].shape)
        number = torch.arange(self.values[source].numel(), device=value.device)
        nowhere = torch.full(shape, -1, device=value.device)
        # For each entry, which one of the source it takes; -1 for none.
        place: Any = node.target
        taken = place(nowhere, number.reshape(self.values[source].shape), *where)
        flat = self._call(aten.reshape.default, (self._mapped(source), [-1]), {})
        order = self._constant(taken.flatten().clamp(min=0))
        new = self._call(aten.index_select.default, (flat, 0, order), {})
        new = self._call(aten.reshape.default, (new, shape), {})
        args = (self._constant(taken >= 0), new, self._mapped(target))
        return self._call(aten.where.self, args, {})

    def _require_static_shape(self, node: fx.Node) -> None:
        is_indexing = node.target is aten.index.Tensor  # tagged for the sake of masks
        if torch.Tag.dynamic_output_shape in tags(node.target) and not is_indexing:
            raise UntraceableError(f"a shape depends on latent values ({node.target})")

    def _index(self, node: fx.Node) -> fx.Node:
        """Indexing, with masks as indices where they are known."""
        masks_and_indices: Any
        target, masks_and_indices, *rest = node.args
        indices: list[Any] = []
        for index in masks_and_indices:
            if index is None or self.values[index].dtype is not torch.bool:
                indices.append(self._mapped(index))
            elif not isinstance(self.new[index], fx.Node):
                known = self.new[index].nonzero(as_tuple=True)
                indices.extend(self._constant(part) for part in known)
            else:
                return self._masked_fill(node)
        args = (self._mapped(target), indices, *self._mapped(rest))
        return self._call(node.target, args, self._mapped(node.kwargs))

    def _masked_fill(self, node: fx.Node) -> fx.Node:
        """``target[mask] = number`` for a mask that depends on latent values."""
        if node.target is aten.index.Tensor:
            raise UntraceableError("a tensor is indexed by a mask of latent values")
        arguments: Any = node.args
        target, (mask, *others), value, *accumulate = arguments
        if others or any(accumulate) or self.values[value].numel() != 1:
            raise UntraceableError("a tensor is filled through a mask of latent values")
        trailing = self.values[target].dim() - self.values[mask].dim()
        shape = [*self.values[mask].shape, *[1] * trailing]
        wide = self._call(aten.reshape.default, (self._mapped(mask), shape), {})
        number = self._call(aten.reshape.default, (self._mapped(value), []), {})
        return self._call(aten.where.self, (wide, number, self._mapped(target)), {})

    def _is_constant(self, node: fx.Node) -> bool:
        return not any(
            isinstance(self.new[argument], fx.Node) for argument in node.all_input_nodes
        )

    def _same_as_argument(self, node: fx.Node) -> Any:
        """What stands for an argument that the result equals, or ``None``."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        new: Any = self.new[first]
        if node.target is aten.detach.default:
            return None if self.differentiable else new
        if node.target in _IDENTITIES:
            return new
        if node.target in _CASTS or node.target in _SUMS:
            is_same = _layout(self.values[node]) == _layout(self.values[first])
            return new if is_same else None
        if node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:
            return new
        if node.target is aten.permute.default and node.args[1] == [
            *range(self.values[first].dim())
        ]:
            return new
        if node.target is aten.neg.default:
            is_negated = isinstance(new, fx.Node) and new.target is aten.neg.default
            return new.args[0] if is_negated else None
        neutral = self._neutral(node)
        return None if neutral is None else self.new[neutral]

    def _is_of_one(self, node: fx.Node) -> bool:
        """Whether a sum has one term for each of its results."""
        argument, result = self.values[node.all_input_nodes[0]], self.values[node]
        is_like = argument.dtype is result.dtype and argument.device == result.device
        return is_like and argument.numel() == result.numel() > 0

    def _neutral(self, node: fx.Node) -> fx.Node | None:
        """The other argument, where one is added 0 or multiplied by 1."""
        neutral = _NEUTRAL.get(node.target)
        if neutral is None or len(node.args) != 2 or node.kwargs:
            return None
        element, is_commutative = neutral
        pairs = [node.args, node.args[::-1]] if is_commutative else [node.args]
        for kept, other in pairs:
            if (
                isinstance(kept, fx.Node)
                and self._is_full_of(other, element)
                and _layout(self.values[kept])[:2] == _layout(self.values[node])[:2]
            ):
                return kept
        return None

    def _is_full_of(self, argument: Any, element: float) -> bool:
        if isinstance(argument, fx.Node):
            argument = self.new[argument]
            if isinstance(argument, fx.Node):
                return False
            return bool((argument == element).all())
        return bool(argument == element)

    def _mapped(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, self._as_node)

    def _as_node(self, old: fx.Node) -> Any:
        new = self.new[old]
        return self._constant(new) if isinstance(new, Tensor) else new

    def _constant(self, value: Tensor, of: Any = None) -> fx.Node:
        key = ("constant", of or id(value))
        if key not in self.seen:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value  # which keeps its id its own
            with self.graph.inserting_before(self._first_operator()):
                self.seen[key] = self.graph.get_attr(name)
        return self.seen[key]

    def _first_operator(self) -> fx.Node | None:
        nodes = (node for node in self.graph.nodes if node.op != "placeholder")
        return next(nodes, None)

    def _used_constants(self) -> dict[str, Tensor]:
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        return {name: _lean(c) for name, c in self.constants.items() if name in used}


# Operator -> (the neutral second argument, whether it may also stand first).
_NEUTRAL: dict[Any, tuple[float, bool]] = {
    aten.add.Tensor: (0.0, True),
    aten.sub.Tensor: (0.0, False),
    aten.mul.Tensor: (1.0, True),
    aten.mul.Scalar: (1.0, False),
    aten.div.Tensor: (1.0, False),
    aten.add.Scalar: (0.0, False),
}

_SIGNED_SUMS = {aten.add.Tensor, aten.sub.Tensor}
#: Operators whose result changes its sign with the first argument; products and
#: quotients with the second too.
_ODD = (
    _VIEWS
    | _SUMS
    | {
        aten.div.Tensor,
        aten.expand.default,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.permute.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
    }
)


def _is_uniform(constant: Tensor) -> bool:
    return bool(constant.numel() and (constant == constant.flatten()[0]).all())


def _is_transpose(target: Any, args: Any) -> bool:
    return target is aten.t.default or (
        target is aten.permute.default and args[1] == [1, 0]
    )


#: Operators that a rounding of their arguments does no more to than to 1.
_LINEAR = (
    _IDENTITIES
    | _ODD
    | _SIGNED_SUMS
    | {
        aten.addmm.default,
        aten.bmm.default,
        aten.detach.default,
        aten.mm.default,
        aten.tanh_backward.default,
    }
) - {aten.div.Tensor}


def _operand(argument: Any, target: Any) -> fx.Node | None:
    """What an operator was applied to, if an argument is its result."""
    is_result = isinstance(argument, fx.Node) and argument.target is target
    return argument.args[0] if is_result else None


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.dtype, value.device


def _lean(constant: Tensor) -> Tensor:
    """A constant that repeats itself along an axis needs no memory there."""
    constant = lean = constant.detach()
    for axis, size in enumerate(constant.shape):
        first = lean.narrow(axis, 0, min(size, 1))
        if size > 1 and lean.equal(first.expand_as(lean)):
            lean = first
    return lean.clone().expand_as(constant)
