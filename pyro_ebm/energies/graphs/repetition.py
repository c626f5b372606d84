r"""Apply operators that a recorded graph repeats all at once.

A model with a loop, over data or over time, has the same few operators again and again,
each on small tensors, and costs so many calls. Those at the same depth of the graph
that differ in their tensors only are one operator on stacked tensors; a chain of
additions is one sum; and linear recurrences are solved in a few operators.

A variance that follows the last one, an autoregressive mean or residuals of a moving
average are computed by a loop over time. Recorded, it is one long path of additions and
multiplications, which no stacking shortens, as each step waits for the last. But a step
is affine in the state, and so the path is

.. math::
    x_0 = b_0, \qquad x_t = a_t\, x_{t-1} + b_t                            \tag{1}

which doubling solves in :math:`\log_2 T` passes: with :math:`d = 1, 2, 4, \dots`

.. math::
    x_t \leftarrow x_t + a_t\, x_{t-d}, \qquad
    a_t \leftarrow a_t\, a_{t-d}                                           \tag{2}

Nothing is divided, and nothing is added that a loop would not add, so it is as exact.
Where the products of the slopes overflow, (1) is followed step by step.
With :math:`g = \partial f / \partial x` the adjoint is one too, backwards:

.. math::
    \frac{\partial f}{\partial b_t} = \lambda_t = g_t + a_{t+1} \lambda_{t+1}, \qquad
    \frac{\partial f}{\partial a_t} = \lambda_t\, x_{t-1}                  \tag{3}

References:
    Hillis & Steele (1986), Data parallel algorithms. Commun. ACM 29(12), 1170-1183.
"""

__all__ = ["grouped"]

import operator
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pyro_ebm.energies.graphs.recording import is_random, same_key

aten = torch.ops.aten

#: What affine operators do to a state and another value.
_OPERATORS: dict[Any, Callable[[Any, Any], Any]] = {
    aten.add.Tensor: operator.add,
    aten.div.Tensor: operator.truediv,
    aten.mul.Tensor: operator.mul,
    aten.neg.default: lambda state, _: -state,
    aten.rsub.Scalar: lambda state, side: side - state,
    aten.sub.Tensor: operator.sub,
}
#: Those that take the state in either place; the others take it first.
_EITHER = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor}
_SCALINGS = {aten.div.Tensor, aten.mul.Tensor}
#: Operator and place of the state that leave its slope as it is.
_SHIFTS = {(aten.add.Tensor, 0), (aten.add.Tensor, 1), (aten.sub.Tensor, 0)}

#: Steps from which on a path is worth it.
_MIN_STEPS = 16
#: Most operators of one step.
_MAX_PERIOD = 12

_library = torch.library.Library("pyro_ebm", "FRAGMENT")
_library.define(
    "linear_recurrence(Tensor a, Tensor b, int dim, bool backwards) -> Tensor"
)


def _linear_recurrence(a: Tensor, b: Tensor, dim: int, backwards: bool) -> Tensor:  # noqa: FBT001
    """The solution of (1) along ``dim``, where ``a`` has one fewer, or the only one.

    Args:
        a: From :math:`a_1` on, of as many axes as ``b``; the others broadcast.
        b: From :math:`b_0` on.
        dim: The axis of time, not negative.
        backwards: Whether each state follows from the next instead of the last.
    """
    x = torch.empty(_solved_shape(a, b, dim), dtype=b.dtype, device=b.device).copy_(b)
    y, size, distance, slopes = torch.empty_like(x), b.shape[dim], 1, a
    while distance < size:  # (2)
        left = size - distance
        to, source, done = (0, distance, left) if backwards else (distance, 0, 0)
        last, new = x.narrow(dim, source, left), y.narrow(dim, to, left)
        torch.addcmul(x.narrow(dim, to, left), a, last, out=new)
        y.narrow(dim, done, distance).copy_(x.narrow(dim, done, distance))
        x, y = y, x
        distance *= 2
        if a.shape[dim] == 1:
            a = a * a
        elif distance < size:
            left = size - distance
            a = a.narrow(dim, 0, left) * a.narrow(dim, distance // 2, left)
    # Slopes may overflow where the states do not.
    return x if x.isfinite().all() else _one_by_one(slopes, x.copy_(b), dim, backwards)


def _one_by_one(a: Tensor, x: Tensor, dim: int, backwards: bool) -> Tensor:  # noqa: FBT001
    """The same by (1) itself, in place, where ``x`` is ``b`` at first."""
    last, states = x.shape[dim] - 1, x.unbind(dim)
    slopes = a.unbind(dim) * (last if a.shape[dim] == 1 else 1)
    for k in range(last - 1, -1, -1) if backwards else range(last):
        to, source = (k, k + 1) if backwards else (k + 1, k)
        states[to].addcmul_(slopes[k], states[source])  # (1)
    return x


def _solved_shape(a: Tensor, b: Tensor, dim: int) -> list[int]:
    # Torch's own broadcast_shapes takes longer than the recurrence.
    shape = [max(pair) for pair in zip(a.shape, b.shape, strict=True)]
    shape[dim] = b.shape[dim]
    return shape


def _shape(a: Tensor, b: Tensor, dim: int, backwards: bool) -> Tensor:  # noqa: FBT001
    return b.new_empty(_solved_shape(a, b, dim))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.dim, ctx.backwards = inputs
    ctx.shape = b.shape
    ctx.save_for_backward(a, output)


def _adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    a, x = ctx.saved_tensors
    size, dim, backwards = x.shape[ctx.dim], ctx.dim, ctx.backwards
    costate = torch.ops.pyro_ebm.linear_recurrence(a, grad, dim, not backwards)  # (3)
    late, early = (0, 1) if backwards else (1, 0)
    slope = costate.narrow(dim, late, size - 1) * x.narrow(dim, early, size - 1)
    return slope.sum_to_size(a.shape), costate.sum_to_size(ctx.shape), None, None


def _many(
    info: Any,
    in_dims: Any,
    a: Tensor,
    b: Tensor,
    dim: int,
    backwards: bool,  # noqa: FBT001
) -> tuple[Tensor, int]:
    a, b = (
        value.unsqueeze(0) if axis is None else value.movedim(axis, 0)
        for value, axis in zip((a, b), in_dims, strict=False)
    )
    return torch.ops.pyro_ebm.linear_recurrence(a, b, dim + 1, backwards), 0


_NAME = "pyro_ebm::linear_recurrence"
_library.impl("linear_recurrence", _linear_recurrence, "CompositeExplicitAutograd")
_library.impl("linear_recurrence", _shape, "Meta")
torch.library.register_autograd(_NAME, _adjoint, setup_context=_keep, lib=_library)
torch.library.register_vmap(_NAME, _many, lib=_library)


class Recurrence(NamedTuple):
    """A path of a graph along which a state moves by steps of the same operators.

    Attributes:
        start: What gives the first state.
        steps: The operators of each step, alike in all but their tensors.
        sides: Of each operator, the place of the state among its arguments, and what it
            is combined with: a node, a number or ``None``.
    """

    start: fx.Node
    steps: list[list[fx.Node]]
    sides: dict[fx.Node, tuple[int, Any]]

    @property
    def last(self) -> fx.Node:
        """The last operator, after which all states are known."""
        return self.steps[-1][-1]

    @property
    def arguments(self) -> list[fx.Node]:
        """What the states follow from."""
        sides = (self.sides[node][1] for step in self.steps for node in step)
        return [self.start, *(side for side in sides if isinstance(side, fx.Node))]

    def solved(
        self,
        value: Callable[[fx.Node], Tensor],
        stacked: Callable[[Sequence[fx.Node]], Tensor],
    ) -> list[Tensor]:
        """The values of all steps' first operators, of their second ones, and so on.

        Args:
            value: Gives that of a node.
            stacked: Gives those of some nodes, along a first axis.
        """
        start = value(self.start).unsqueeze(0)
        count, firsts = len(self.steps), self.steps[0]
        columns = [
            [step[number] for step in self.steps] for number in range(len(firsts))
        ]
        sides = [self._side(nodes, start.dim(), value, stacked) for nodes in columns]
        a: Any = 1.0
        b: Any = 0.0
        for node, side in zip(firsts, sides, strict=True):
            a, b = self._sloped(node, a, side), self._moved(node, b, side)
        b = b if isinstance(b, Tensor) else torch.full_like(start, b)
        b = torch.cat([start, b.expand(count, *start.shape[1:])])
        if isinstance(a, float) and a == 1.0:
            x = b.cumsum(0)
        else:
            a = a if isinstance(a, Tensor) else torch.full_like(start, a)
            x = torch.ops.pyro_ebm.linear_recurrence(a, b, 0, backwards=False)
        values = [x[:-1]]
        for node, side in zip(firsts[:-1], sides[:-1], strict=True):
            values.append(self._moved(node, values[-1], side))
        return [*values[1:], x[1:]]

    def _side(
        self,
        nodes: list[fx.Node],
        num_axes: int,
        value: Callable[[fx.Node], Tensor],
        stacked: Callable[[Sequence[fx.Node]], Tensor],
    ) -> Any:
        """What the state is combined with in each step, steps along the first axis."""
        sides = [self.sides[node][1] for node in nodes]
        if not isinstance(sides[0], fx.Node):
            return sides[0]
        is_same = all(side is sides[0] for side in sides)
        side = value(sides[0]).unsqueeze(0) if is_same else stacked(sides)
        return side.reshape(len(side), *[1] * (num_axes - side.dim()), *side.shape[1:])

    def _moved(self, node: fx.Node, state: Any, side: Any) -> Any:
        """The state after an operator."""
        if node.target in _SCALINGS and isinstance(state, float) and not state:
            return state  # as multiplying a zero would be an operator
        pair = (side, state) if self.sides[node][0] else (state, side)
        return _OPERATORS[node.target](*pair)

    def _sloped(self, node: fx.Node, slope: Any, side: Any) -> Any:
        """The derivative of that in the state at the step's beginning."""
        if node.target in _SCALINGS:
            return self._moved(node, slope, side)
        return slope if (node.target, self.sides[node][0]) in _SHIFTS else -slope


def recurrences(
    operators: Sequence[fx.Node], layouts: Mapping[fx.Node, Any]
) -> list[Recurrence]:
    """The long linear recurrences among operators, none of which share any.

    Args:
        operators: In an order in which they can be applied.
        layouts: Shape and type of each tensor.
    """
    sides = {node: _sides(node, layouts) for node in operators}
    sides = {node: found for node, found in sides.items() if found}
    found = []
    while len(path := _longest_path(sides)) > _MIN_STEPS:
        recurrence = _periodic(path, sides, layouts)
        if recurrence is not None:
            found.append(recurrence)
            path = [path[0], *(n for step in recurrence.steps for n in step)]
        for node in path[1:]:
            del sides[node]
    return found


_Sides: TypeAlias = dict[fx.Node, tuple[int, Any]]


def _sides(node: fx.Node, layouts: Mapping[fx.Node, Any]) -> _Sides:
    """In which arguments a node is affine: of each, its place and the other one."""
    if node.target not in _OPERATORS or node.kwargs or len(node.args) > 2:
        return {}  # with a factor alpha
    arguments = node.args if len(node.args) == 2 else (*node.args, None)
    found: _Sides = {}
    for place in (0, 1) if node.target in _EITHER else (0,):
        state, side = arguments[place], arguments[1 - place]
        is_like = isinstance(state, fx.Node) and layouts.get(state) == layouts[node]
        if not is_like or side is state or not layouts[node][1].is_floating_point:
            continue
        if isinstance(side, fx.Node) and layouts[side][1] != layouts[node][1]:
            continue
        found[cast(fx.Node, state)] = (place, side)
    return found


def _longest_path(sides: Mapping[fx.Node, _Sides]) -> list[fx.Node]:
    """Nodes of which each is affine in the one before."""
    length: dict[fx.Node, int] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node, found in sides.items():
        last[node] = max(found, key=lambda state: length.get(state, 0))
        length[node] = 1 + length.get(last[node], 0)
    path = [max(length, key=length.__getitem__)] if length else []
    while path and path[-1] in last:
        path.append(last[path[-1]])
    return path[::-1]


def _periodic(
    path: list[fx.Node],
    sides: Mapping[fx.Node, _Sides],
    layouts: Mapping[fx.Node, Any],
) -> Recurrence | None:
    """The longest part of a path that repeats its operators, if that is long."""
    moves = {now: sides[now][last] for last, now in zip(path, path[1:], strict=False)}
    keys = [
        (node.target, place, layouts.get(side, (type(side), side)))
        for node, (place, side) in moves.items()
    ]
    covered, negative, begin = max(
        _longest_repetition(keys, period) for period in range(1, _MAX_PERIOD + 1)
    )
    period, nodes = -negative, path[1 + begin : 1 + begin + covered]
    # Best ends a step where others use its result.
    ends = [n for n in nodes[period - 1 : 2 * period - 1] if len(n.users) > 1]
    first = nodes.index(ends[0]) + 1 - period if ends else 0
    steps = [nodes[k : k + period] for k in range(first, covered - period + 1, period)]
    later = _later(nodes[first]) if steps else set()
    is_free = [not any(moves[n][1] in later for n in step) for step in steps]
    steps = steps[: [*is_free, False].index(False)]
    if len(steps) < _MIN_STEPS:
        return None
    start = path[path.index(steps[0][0]) - 1]
    return Recurrence(start, steps, {n: moves[n] for step in steps for n in step})


def _longest_repetition(keys: Sequence[Any], period: int) -> tuple[int, int, int]:
    """How many keys are whole periods in a row, the period, negative, and where."""
    run, best = 0, (0, -period, 0)
    for number in range(period, len(keys)):
        run = run + 1 if keys[number] == keys[number - period] else 0
        covered = (run // period + 1) * period if run else 0
        if covered > best[0]:
            best = (covered, -period, number + 1 - run - period)
    return best


def _later(node: fx.Node) -> set[Any]:
    """A node and all that follow from it."""
    found, queue = {node}, [node]
    while queue:
        new = [user for user in queue.pop().users if user not in found]
        found.update(new)
        queue += new
    return found


#: Operators of a graph below which nothing is gained.
_MIN_OPERATORS = 50
#: Share of the calls that may be left for it to be worth it.
_MAX_LEFT = 0.7
#: Terms of a sum that are added at once.
_MIN_TERMS = 4

_Group: TypeAlias = list[fx.Node]


@torch.no_grad()
def grouped(graph: fx.GraphModule, *inputs: Tensor) -> Callable[..., Any] | None:
    """The function of a graph, with fewer calls of operators.

    Args:
        graph: Without operators that write into their arguments.
        *inputs: Some inputs, for the shapes that tensors have.

    Returns:
        The function, to be recorded anew; ``None`` where little is repeated.
    """
    operators = [node for node in graph.graph.nodes if node.op == "call_function"]
    if len(operators) < _MIN_OPERATORS or any(is_random(n.target) for n in operators):
        return None
    layouts = _Layouts(graph)
    layouts.run(*inputs)
    terms = _terms(operators, layouts.of)
    inner = _inner(terms)
    outer = [node for node in operators if node not in inner]
    paths = recurrences([node for node in outer if node not in terms], layouts.of)
    try:
        groups = _groups(outer, terms, paths, layouts.of)
    except CycleError:  # two of them wait for each other
        paths = []
        groups = _groups(outer, terms, paths, layouts.of)
    if len(groups) > _MAX_LEFT * len(operators):
        return None
    solved = {path.last: path for path in paths}
    return lambda *inputs: _Run(graph, terms, solved, inputs).outputs(groups)


class _Layouts(fx.Interpreter):
    """Shape and type of every tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.of[n] = tree_map(
            lambda part: (part.shape, part.dtype) if isinstance(part, Tensor) else part,
            result,
        )
        return result


def _terms(
    operators: Sequence[fx.Node], layouts: dict[fx.Node, Any]
) -> dict[fx.Node, list[fx.Node]]:
    """What additions add, where one feeds the next: the terms of each last one."""
    terms: dict[fx.Node, list[fx.Node]] = {}
    for node in operators:
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        if not all(isinstance(a, fx.Node) for a in node.args):
            continue
        if any(layouts[a] != layouts[node] for a in node.all_input_nodes):
            continue
        found: list[fx.Node] = []
        for argument in (node.args[0], node.args[1]):
            assert isinstance(argument, fx.Node)
            is_own = argument in terms and len(argument.users) == 1
            found += terms[argument] if is_own else [argument]
        terms[node] = found
    used = {a for node in terms for a in node.all_input_nodes}
    last = [n for n in terms if not (n in used and len(n.users) == 1)]
    return {n: terms[n] for n in last if len(terms[n]) >= _MIN_TERMS}


def _inner(terms: dict[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    """The additions before the last of each sum."""
    inner: set[fx.Node] = set()
    for node, found in terms.items():
        outside, queue = set(found), [node]
        while queue:
            for argument in queue.pop().all_input_nodes:
                if argument not in outside and argument not in inner:
                    inner.add(argument)
                    queue.append(argument)
    return inner


def _groups(
    operators: Sequence[fx.Node],
    terms: dict[fx.Node, list[fx.Node]],
    paths: Sequence[Recurrence],
    layouts: dict[fx.Node, Any],
) -> list[_Group]:
    """Operators that can be applied at once, in an order in which they can be.

    Raises:
        CycleError: If they cannot while each recurrence is one operator.
    """
    known = {n: path.last for path in paths for step in path.steps for n in step}
    before = {n: terms.get(n, n.all_input_nodes) for n in operators if n not in known}
    before |= {path.last: path.arguments for path in paths}
    waits = {n: {known.get(a, a) for a in some} for n, some in before.items()}
    depth: dict[fx.Node, int] = {}
    for node in TopologicalSorter(waits).static_order():
        depth[node] = 1 + max((depth[a] for a in waits.get(node, ())), default=-1)
    found: dict[Any, _Group] = {}
    for node in operators:
        if node not in before:
            continue
        key: Any = None
        if node not in terms and node not in known:
            arguments = fx.node.map_arg((node.args, node.kwargs), layouts.__getitem__)
            key = same_key(node.target, *arguments)
        found.setdefault((depth[node], node if key is None else key), []).append(node)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


class _Run:
    """One evaluation of a graph by groups."""

    def __init__(
        self,
        graph: fx.GraphModule,
        terms: dict[fx.Node, list[fx.Node]],
        paths: dict[fx.Node, Recurrence],
        inputs: Sequence[Tensor],
    ) -> None:
        self.graph, self.terms, self.paths = graph, terms, paths
        self.values: dict[fx.Node, Any] = {}
        self.place: dict[fx.Node, tuple[Any, int]] = {}  # group, and which of it
        self.stacked: dict[Any, Any] = {}
        given = iter(inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(given)
            elif node.op == "get_attr":
                self.values[node] = getattr(graph, str(node.target))

    def outputs(self, groups: list[_Group]) -> Any:
        """What the graph returns."""
        for number, group in enumerate(groups):
            if group[0] in self.paths:
                path = self.paths[group[0]]
                columns = path.solved(self.value, self.side_by_side)
                for nodes, values in zip(
                    zip(*path.steps, strict=True), columns, strict=True
                ):
                    self.hold(nodes, values, (number, nodes[0]))
            elif len(group) == 1:
                self.values[group[0]] = self.one(group[0])
            else:
                self.hold(group, self.many(group), number)
        output = next(iter(reversed(self.graph.graph.nodes)))
        return fx.node.map_arg(output.args[0], self.value)

    def hold(self, nodes: Sequence[fx.Node], stacked: Any, number: Any) -> None:
        """Keep the values of some operators, stacked."""
        self.stacked[number] = stacked
        self.place.update({node: (number, k) for k, node in enumerate(nodes)})

    def value(self, node: fx.Node) -> Any:
        """The value of one operator."""
        if node not in self.values:
            number, k = self.place[node]
            self.values[node] = tree_map(lambda part: part[k], self.stacked[number])
        return self.values[node]

    def one(self, node: fx.Node) -> Any:
        """Apply one operator, or sum up many terms."""
        if node in self.terms:
            return self.side_by_side(self.terms[node]).sum(0)
        if node.target is aten.stack.default and not node.kwargs:
            parts, *dim = cast(Any, node.args)
            if any(part in self.place for part in parts):
                return self.side_by_side(parts).movedim(0, *dim or [0])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
        target: Any = node.target
        return target(*args, **kwargs)

    def many(self, group: _Group) -> Any:
        """Apply the operator of a group to all of its arguments at once."""
        target: Any = group[0].target
        if target is operator.getitem:
            parents = [node.all_input_nodes[0] for node in group]
            return self.side_by_side(parents)[group[0].args[1]]
        flat = [tree_flatten((node.args, node.kwargs)) for node in group]
        leaves, spec = flat[0][0], flat[0][1]
        columns: list[Any] = list(zip(*(part for part, _ in flat), strict=True))
        is_tensor = [isinstance(leaf, fx.Node) for leaf in leaves]
        tensors: list[Any] = []
        in_dims: list[int | None] = []
        for column, is_node in zip(columns, is_tensor, strict=True):
            if not is_node:
                continue
            if all(node is column[0] for node in column):
                tensors.append(self.value(column[0]))
                in_dims.append(None)
            else:
                tensors.append(self.side_by_side(column))
                in_dims.append(0)

        def apply(*parts: Tensor) -> Any:
            given = iter(parts)
            mixed = [
                next(given) if is_node else leaf
                for leaf, is_node in zip(leaves, is_tensor, strict=True)
            ]
            args, kwargs = tree_unflatten(mixed, spec)
            return target(*args, **kwargs)

        return torch.vmap(apply, tuple(in_dims))(*tensors)

    def side_by_side(self, nodes: Sequence[fx.Node]) -> Any:
        """The values of some operators, stacked."""
        sources: dict[Any, list[int]] = {}
        which: dict[Any, list[int]] = {}
        for position, node in enumerate(nodes):
            number, k = self.place.get(node, (node, 0))
            sources.setdefault(number, []).append(position)
            which.setdefault(number, []).append(k)
        parts = [self.part(number, which[number]) for number in sources]
        order = [position for positions in sources.values() for position in positions]
        back = sorted(range(len(order)), key=order.__getitem__)
        if len(parts) == 1:
            return parts[0]
        return tree_map(lambda *some: _chosen(torch.cat(some), back), *parts)

    def part(self, source: Any, which: list[int]) -> Any:
        """Some of the values of a group, or the value of one operator."""
        if isinstance(source, fx.Node):
            return tree_map(
                lambda part: part.expand(len(which), *part.shape), self.value(source)
            )
        return tree_map(lambda part: _chosen(part, which), self.stacked[source])


def _chosen(stacked: Tensor, which: list[int]) -> Tensor:
    first, count = which[0], len(which)
    if which == list(range(first, first + count)):
        return stacked if count == len(stacked) else stacked.narrow(0, first, count)
    return stacked.index_select(0, torch.tensor(which, device=stacked.device))
