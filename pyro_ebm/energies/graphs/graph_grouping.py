"""Apply operators that a graph repeats all at once.

A model with a loop, over data or over time, has the same few operators again and again,
each on small tensors, and costs so many calls. Those at the same depth of the graph
that differ in their tensors only are one operator on stacked tensors; and a chain of
additions is one sum.
"""

__all__ = ["grouped"]

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pyro_ebm.energies.graphs.graph_cleaning import _key
from pyro_ebm.energies.graphs.graph_recording import is_random

aten = torch.ops.aten

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
    groups = _groups([n for n in operators if n not in inner], terms, layouts.of)
    if len(groups) > _MAX_LEFT * len(operators):
        return None
    return lambda *inputs: _Run(graph, terms, inputs).outputs(groups)


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
    layouts: dict[fx.Node, Any],
) -> list[_Group]:
    """Operators that can be applied at once, in an order in which they can be."""
    depth: dict[fx.Node, int] = {}
    found: dict[Any, _Group] = {}
    for node in operators:
        before = terms.get(node, node.all_input_nodes)
        depth[node] = 1 + max((depth.get(a, 0) for a in before), default=0)
        key: Any = None
        if node not in terms:
            arguments = fx.node.map_arg((node.args, node.kwargs), layouts.__getitem__)
            key = _key(node.target, *arguments)
        found.setdefault((depth[node], node if key is None else key), []).append(node)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


class _Run:
    """One evaluation of a graph by groups."""

    def __init__(
        self,
        graph: fx.GraphModule,
        terms: dict[fx.Node, list[fx.Node]],
        inputs: Sequence[Tensor],
    ) -> None:
        self.graph, self.terms = graph, terms
        self.values: dict[fx.Node, Any] = {}
        self.place: dict[fx.Node, tuple[int, int]] = {}  # group, and which of it
        self.stacked: dict[int, Any] = {}
        given = iter(inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(given)
            elif node.op == "get_attr":
                self.values[node] = getattr(graph, str(node.target))

    def outputs(self, groups: list[_Group]) -> Any:
        """What the graph returns."""
        for number, group in enumerate(groups):
            if len(group) == 1:
                self.values[group[0]] = self.one(group[0])
            else:
                self.stacked[number] = self.many(group)
                self.place.update({n: (number, k) for k, n in enumerate(group)})
        output = next(iter(reversed(self.graph.graph.nodes)))
        return fx.node.map_arg(output.args[0], self.value)

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
    if which == list(range(len(stacked))):
        return stacked
    return stacked.index_select(0, torch.tensor(which, device=stacked.device))
