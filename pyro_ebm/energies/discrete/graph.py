"""Edges of graphs: lattices, and graphs of other libraries.

Sites are numbered from 0; those of a lattice row by row, as ``x.flatten()`` does.
"""

__all__ = [
    "colouring",
    "couplings_from",
    "edges_from",
    "grid_edges",
    "lattice_edges",
    "torus_edges",
]

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def grid_edges(shape: Sequence[int]) -> Tensor:
    """Pairs of neighbours on a lattice with a free boundary.

    Args:
        shape: Sites along each dimension, at least 1.

    Returns:
        Integers of shape ``(E, 2)``.

    Example:
        >>> grid_edges((2, 2)).tolist()
        [[0, 2], [1, 3], [0, 1], [2, 3]]
    """
    _require_sides(shape, 1)
    return lattice_edges(shape, periodic=False)


def torus_edges(shape: Sequence[int]) -> Tensor:
    """Pairs of neighbours on a lattice that closes to a torus.

    Args:
        shape: Sites along each dimension, at least 3: a side of two would have each of
            its edges twice.

    Returns:
        Integers of shape ``(E, 2)``.

    Example:
        >>> torus_edges((3,)).tolist()
        [[0, 1], [1, 2], [2, 0]]
    """
    _require_sides(shape, 3)
    return lattice_edges(shape, periodic=True)


def lattice_edges(shape: Sequence[int], *, periodic: bool) -> Tensor:
    """Each bond of a lattice once, those of a periodic side of two twice.

    Args:
        shape: Sites along each dimension.
        periodic: Whether it closes to a torus.
    """
    sites = torch.arange(torch.Size(shape).numel()).reshape(tuple(shape))
    ends = []
    for dim, length in enumerate(shape):
        count = length if periodic else length - 1
        first, second = sites.narrow(dim, 0, count), sites.roll(-1, dim)
        ends.append(
            torch.stack([first, second.narrow(dim, 0, count)], -1).reshape(-1, 2)
        )
    return torch.cat(ends)


def edges_from(graph: Any, num_sites: int | None = None) -> tuple[Tensor, int]:
    """The edges of a graph, each once, of which there must be one.

    Args:
        graph: Pairs of sites, as a tensor of shape ``(E, 2)`` or a list; a sparse
            matrix of scipy, symmetric or with one triangle, of which the entries that
            are not zero are edges; or an undirected graph of networkx, whose nodes are
            numbered in their order.
        num_sites: At least as many as ``graph`` has; further ones have no edge.
            Default: those of ``graph``, of pairs the largest number and one more.

    Returns:
        Integers of shape ``(E, 2)``, and the number of sites.

    Raises:
        TypeError: If it is none of these.
        ValueError: If an edge joins a site to itself or is there twice, there is none,
            it has a direction, or ``num_sites`` is too small.

    Example:
        >>> edges_from([(0, 1), (1, 2)])
        (tensor([[0, 1],
                [1, 2]]), 3)
    """
    if hasattr(graph, "tocoo"):
        edges, number = _of_matrix(graph.tocoo())
    elif hasattr(graph, "nodes") and hasattr(graph, "edges"):
        _require_undirected(graph)
        place = {node: i for i, node in enumerate(graph.nodes)}
        pairs = [(place[a], place[b]) for a, b, *_ in graph.edges]
        edges, number = torch.tensor(pairs).reshape(-1, 2), len(place)
    elif isinstance(graph, Tensor | Iterable):
        is_array = isinstance(graph, Tensor) or hasattr(graph, "__array__")
        edges = torch.as_tensor(graph) if is_array else _of_pairs(list(graph))
        number = int(edges.max()) + 1 if edges.numel() else 0
    else:
        raise TypeError(
            "graph must be pairs of sites, a sparse matrix of scipy or a graph of "
            f"networkx, got {type(graph).__name__}."
        )
    if not edges.numel():
        raise ValueError(
            "graph must have at least one edge, got none. Sites without edges are "
            "independent: a FactorGraphEnergy of one potential for each."
        )
    _require_simple(edges)
    # Bytes would be taken for masks; a tensor of the caller's is not to be a buffer.
    edges = edges.long().clone()
    if num_sites is None:
        return edges, number
    if num_sites < number:
        raise ValueError(
            f"num_sites must be at least {number}, as many as graph has, got "
            f"{num_sites}."
        )
    return edges, num_sites


def couplings_from(graph: Any, coupling: Any) -> Any:
    """A coupling as it is, or what a graph has for each edge under this name.

    Args:
        graph: Of networkx, if ``coupling`` is a name.
        coupling: Numbers, or the name of an attribute of the edges.

    Raises:
        ValueError: If it is a name, and the graph or one of its edges has none such.
    """
    if not isinstance(coupling, str):
        return coupling
    try:
        return torch.tensor([float(d[coupling]) for _, _, d in graph.edges(data=True)])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            "coupling must be numbers, or the name of an attribute that all edges of a "
            f"graph of networkx have as a number; got {coupling!r}."
        ) from None


def colouring(num_sites: int, scopes: Iterable[Sequence[int]]) -> Tensor:
    """Blocks of sites without a common potential, by greedy colouring.

    Args:
        num_sites: Number of sites.
        scopes: The sites of each potential.

    Returns:
        Masks of shape ``(B, D)``; each site is in one of them.

    Example:
        >>> colouring(3, [(0, 1), (1, 2)])
        tensor([[False,  True, False],
                [ True, False,  True]])
    """
    near: list[set[int]] = [set() for _ in range(num_sites)]
    for scope in scopes:
        for i, j in itertools.permutations(scope, 2):
            near[i].add(j)
    colour = [-1] * num_sites
    # From site to site along edges: two colours then do for what two can colour.
    for start in sorted(range(num_sites), key=lambda i: -len(near[i])):
        front = [start] if colour[start] < 0 else []
        while front:
            i = front.pop()
            if colour[i] >= 0:
                continue
            taken = {colour[j] for j in near[i]}
            colour[i] = next(c for c in itertools.count() if c not in taken)
            front += sorted(near[i], reverse=True)
    colours = torch.tensor(colour)
    return colours == torch.arange(max(colour) + 1)[:, None]


def _of_pairs(pairs: list[Any]) -> Tensor:
    try:
        return torch.tensor(pairs)
    except (ValueError, TypeError):
        raise ValueError(
            "graph must hold pairs of numbers of sites, from 0 on, got "
            f"{str(pairs[:3])[1:-1]}. Sites with names come as a graph of networkx."
        ) from None


def _of_matrix(matrix: Any) -> tuple[Tensor, int]:
    """Each pair of a matrix once, whichever triangle it stands in."""
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"graph must be a square matrix, got shape {tuple(matrix.shape)}."
        )
    kept = matrix.data != 0
    rows, columns = matrix.row[kept].tolist(), matrix.col[kept].tolist()
    pairs = sorted({(min(e), max(e)) for e in zip(rows, columns, strict=True)})
    return torch.tensor(pairs).reshape(-1, 2), matrix.shape[0]


def _require_undirected(graph: Any) -> None:
    is_directed = getattr(graph, "is_directed", None)
    if is_directed is not None and is_directed():
        raise ValueError(
            "graph must be undirected, as a potential of two sites has no direction; "
            f"got {type(graph).__name__}. Take graph.to_undirected()."
        )


def _require_simple(edges: Tensor) -> None:
    if edges.dim() != 2 or edges.shape[1] != 2 or edges.is_floating_point():
        raise ValueError(
            f"edges must be pairs of integers, shape (E, 2), got {edges.dtype} of "
            f"shape {tuple(edges.shape)}. A matrix of neighbours comes as "
            "scipy.sparse.csr_array(matrix)."
        )
    if (edges < 0).any():
        raise ValueError(
            f"edges must name sites by numbers from 0 on, got {edges.min().item()}."
        )
    loops = edges[edges[:, 0] == edges[:, 1]]
    if len(loops):
        raise ValueError(
            f"edges must join two sites each, got a loop at site {loops[0, 0].item()}. "
            "What a site has for itself is its field."
        )
    pairs, counts = edges.sort(-1).values.unique(dim=0, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"edges must be there once, and {tuple(pairs[counts > 1][0].tolist())} is "
            "there more than once. Add up the couplings of double edges."
        )


def _require_sides(shape: Sequence[int], least: int) -> None:
    if not shape or min(shape) < least:
        raise ValueError(
            f"shape must hold at least one side, of at least {least} sites, got "
            f"{tuple(shape)}."
        )
