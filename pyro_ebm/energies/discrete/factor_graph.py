r"""Energies of factor graphs: sums of potentials of few finite sites each.

.. math::
    f(x) = -\sum_c t_c(x_c), \qquad x_i \in \{0, \dots, q_i - 1\}          \tag{1}

with a log potential :math:`t_c` of the sites :math:`c`, larger where their states are
favoured. Given the others, a site has the logits

.. math::
    \ell_{iv}(x) = \sum_{c \ni i} t_c(x_{c \setminus i}, x_i = v)          \tag{2}

References:
    Kschischang, Frey & Loeliger (2001), IEEE Transactions on Information Theory 47,
    498-519.
"""

__all__ = ["FactorGraphEnergy"]

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_ebm.energies.base import live_or_parameter, require_precision
from pyro_ebm.energies.discrete.exact.distribution import (
    ExactClosedForm,
    ExactDistribution,
)
from pyro_ebm.energies.discrete.exact.elimination import (
    MAX_COST,
    Factors,
    elimination_cost,
    exact_sums,
)
from pyro_ebm.energies.discrete.finite import AnnealingPath, spins
from pyro_ebm.energies.discrete.graph import colouring, couplings_from, edges_from
from pyro_ebm.energies.discrete.sites import SiteEnergy, path_through, softened
from pyro_ebm.energies.graphs.recording import holds


class _Group(NamedTuple):
    """Potentials of one shape.

    Attributes:
        sites: Shape ``(F, k)``.
        states: How many states the ``k`` sites have.
        table: Shape ``(*batch, F, *states)``, or ``(*batch, 1, *states)`` if all have
            the same; or a function that gives it.
        batch_shape: Of the table.
        is_many: Whether the table, as it was given, has an axis for the factors.
    """

    sites: Tensor
    states: tuple[int, ...]
    table: Any
    batch_shape: torch.Size
    is_many: bool


@final
class FactorGraphEnergy(SiteEnergy):
    r"""The energy (1) of a graph of finite sites, exact where its treewidth is low.

    Points are vectors of states, written as floating-point numbers. Tensors that carry
    a graph stay live, a ``nn.Parameter`` is shared, and any other tensor becomes a
    parameter. Of single and double precision together the sums are of double.

    Where messages along a tree or elimination are cheap, ``closed_form()`` has
    :math:`\log Z` with its gradient, and a distribution with exact draws,
    ``marginals()``, ``mode`` and ``condition()``.

    Args:
        num_states: :math:`q_i`, a sequence with one number for each site, or a mapping
            from the names of the sites, in their order.
        factors: Pairs of sites and their log potential :math:`t_c`. The sites are one
            site, a tuple of them, or integers of shape ``(F, k)`` for as many
            potentials of ``k`` sites. The potential is a tensor of shape ``(*states)``,
            or ``(F, *states)``, or a function of the states of the sites: it is called
            with tensors that broadcast to ``(*states)``. A module is learned. ``-inf``
            forbids states. A batch of graphs, say one for each row of data, has
            tensors of shape ``(*batch, *states)`` for a tuple of sites and ``(*batch,
            F, *states)`` for integers of shape ``(F, k)``; batches broadcast.
        spins: Whether sites have the two states -1 and +1.

    Raises:
        TypeError: If a potential is neither a tensor nor a function.
        ValueError: If a site is unknown or twice in a potential, or a shape does not
            fit.

    Example:
        >>> energy = FactorGraphEnergy(
        ...     {"rain": 2, "grass": 3},
        ...     [
        ...         ("rain", torch.tensor([0.0, -1.0])),
        ...         (("rain", "grass"), torch.eye(2, 3)),
        ...     ],
        ... )
        >>> energy(torch.tensor([1.0, 1.0])).item()
        -0.0
        >>> energy.closed_form().distribution.mode
        tensor([0., 0.])
    """

    def __init__(
        self,
        num_states: "Sequence[int] | Mapping[Hashable, int]",
        factors: Sequence[tuple[Any, Any]],
        *,
        spins: bool = False,
    ) -> None:
        names = list(num_states) if isinstance(num_states, Mapping) else None
        numbers = num_states.values() if isinstance(num_states, Mapping) else num_states
        self_states = _whole_numbers(tuple(numbers), spins=spins)
        place = {name: i for i, name in enumerate(names or range(len(self_states)))}
        groups = _grouped([_read(f, place, self_states) for f in factors])
        if not groups:
            raise ValueError("factors must hold at least one pair, got none.")
        scopes = [tuple(s) for group in groups for s in group.sites.tolist()]
        super().__init__(
            (len(self_states),),
            constraints.independent(_support(self_states, spins=spins), 1),
            colouring(len(self_states), scopes),
            _like(groups),
            _batch_shape(groups),
        )
        self.names, self._num_states = names, self_states
        self._groups = [group._replace(table=None) for group in groups]
        for number, group in enumerate(groups):
            name = f"table_{number}"
            if isinstance(group.table, Tensor):
                live_or_parameter(self, name, group.table)
            else:
                setattr(self, name, group.table)
            # Its own: what is given may be a constant of a model that is recorded.
            own = group.sites.clone()
            self.register_buffer(f"sites_{number}", own, persistent=False)

    @classmethod
    def ising(
        cls,
        graph: Any,
        coupling: float | Tensor | str,
        field: float | Tensor | None = None,
        *,
        num_sites: int | None = None,
    ) -> "FactorGraphEnergy":
        r"""Spins on any graph: :math:`-\sum_{ij} J_{ij} s_i s_j - \sum_i h_i s_i`.

        Args:
            graph: Edges of shape ``(E, 2)`` or a list of pairs, a sparse matrix of
                scipy, or a graph of networkx; see :func:`grid_edges`.
            coupling: :math:`J`, a number or shape ``(*batch, E)``; or the name that it
                has at the edges of a graph of networkx, such as ``"weight"``: unnamed,
                these do not count.
            field: :math:`h`, a number or shape ``(*batch, D)``; default: none.
            num_sites: :math:`D`, where the last sites have no edge; default: as many
                as ``graph`` has.

        Raises:
            TypeError: If ``graph`` is none of these.
            ValueError: If an edge is a loop, there twice or has a direction, there is
                no edge, or a shape does not fit.

        Example:
            >>> ring = FactorGraphEnergy.ising([(0, 1), (1, 2), (2, 0)], 0.5)
            >>> ring(torch.ones(3)).item()
            -1.5
        """
        edges, number = edges_from(graph, num_sites)
        own_coupling = couplings_from(graph, coupling)
        factors: list[tuple[Any, Any]] = [
            (edges, _Scaled(own_coupling, "coupling", len(edges), _product))
        ]
        if field is not None:
            own = torch.arange(number)[:, None]
            factors.append((own, _Scaled(field, "field", number, _itself)))
        return cls([2] * number, factors, spins=True)

    @classmethod
    def potts(
        cls,
        graph: Any,
        num_categories: int,
        coupling: float | Tensor | str,
        *,
        num_sites: int | None = None,
    ) -> "FactorGraphEnergy":
        r"""Categories on any graph: :math:`-\sum_{ij} J_{ij} [x_i = x_j]`.

        Args:
            graph: See :meth:`ising`.
            num_categories: :math:`q`.
            coupling: See :meth:`ising`.
            num_sites: See :meth:`ising`.

        Raises:
            TypeError: If ``graph`` is no graph.
            ValueError: As of :meth:`ising`.
        """
        edges, number = edges_from(graph, num_sites)
        own_coupling = couplings_from(graph, coupling)
        table = _Scaled(own_coupling, "coupling", len(edges), _equal)
        return cls([num_categories] * number, [(edges, table)])

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, D)``."""
        index, is_outside = self._index(x)
        total = self.values.new_zeros(())
        for sites, table in self.factors():
            flat, place = _flat_index(table, index[..., sites])
            total = total + _look_up(flat, place[..., None]).squeeze(-1).sum(-1)  # (1)
        # What is no number is no state: without this it would have an energy.
        return (-total).where(~is_outside, torch.inf) + 0 * x.sum(-1)

    def site_logits(self, x: Tensor) -> Tensor:
        """Logits (2) of the states of each site, shape ``(q, *batch, D)``."""
        index, _ = self._index(x)
        number = torch.arange(len(self.values), device=x.device)
        states = torch.tensor(self._num_states, device=x.device)
        missing = torch.zeros(len(states), len(number)).to(self.values)
        missing = missing.masked_fill(number >= states[:, None], -torch.inf)
        logits = missing.expand(*x.shape, -1).clone()
        for sites, table in self.factors():
            at = index[..., sites]
            sizes = table.shape[-sites.shape[1] :]
            for k, size in enumerate(sizes):
                only = at.clone()
                only[..., k] = 0
                flat, place = _flat_index(table, only)
                stride = math.prod(sizes[k + 1 :])
                own = place[..., None] + stride * number[:size]
                terms = _look_up(flat, own)
                logits[..., :size].index_add_(-2, sites[:, k], terms)
        return logits.movedim(-1, 0)  # (2)

    @functools.cached_property
    def cost(self) -> float:
        """How many terms the exact sums have: seconds for a hundred million."""
        one = elimination_cost(self._num_states, [g.sites for g in self._groups])
        return one * self.batch_shape.numel()

    def exact(self, max_cost: float = MAX_COST) -> ExactDistribution:
        r"""The normalised distribution, by messages or elimination.

        Args:
            max_cost: Largest number of terms of all sums; sixteen bytes each.

        Raises:
            ValueError: If the sums have more terms than that.

        Exactness: *exact*.

        Example:
            >>> edges = pyro_ebm.energies.torus_edges((4, 4))
            >>> torus = FactorGraphEnergy.ising(edges, 0.3).exact()
            >>> round(torus.log_partition.item(), 4)
            12.7855
        """
        if self.cost > max_cost:
            raise ValueError(
                f"the exact sum over {len(self._num_states)} sites by elimination must "
                f"have at most max_cost = {max_cost:.1e} terms, got {self.cost:.1e}. "
                "Estimate log Z by pyro_ebm.partition.estimate and draw by chains of "
                "pyro_ebm.mcmc.Gibbs, or raise max_cost."
            )
        shape = self.batch_shape
        solver = exact_sums(self._num_states, self.factors(), shape)
        return ExactDistribution(self, solver, shape)

    def closed_form(self) -> ExactClosedForm | None:
        r""":math:`\log Z` and the distribution where :meth:`exact` is cheap.

        Exactness: *exact* where it is not ``None``.
        """
        if self.cost > MAX_COST:
            return None
        return ExactClosedForm.of(self.exact())

    def annealing_path(self) -> AnnealingPath:
        """From uniform sites to this energy, by scaling it.

        What is forbidden is only unlikely until the end, so that draws of uniform sites
        lead there.
        """
        path = super().annealing_path()
        factors = [
            (sites, _all_rows(table.detach(), sites)) for sites, table in self.factors()
        ]
        if not any(table.isneginf().any() for _, table in factors):
            return path
        soft = FactorGraphEnergy(
            self._num_states,
            [(sites, softened(table)) for sites, table in factors],
            spins=bool(self.values[0] < 0),
        )
        return path_through(soft, path)

    def factors(self) -> Factors:
        """The potentials as they are now."""
        found = []
        for number, group in enumerate(self._groups):
            table = getattr(self, f"table_{number}")
            sites = getattr(self, f"sites_{number}")
            arity = len(group.states)
            if not isinstance(table, Tensor):
                table = self._evaluate(table, group)
            elif not group.is_many:
                table = table.unsqueeze(-arity - 1)
            table = table.to(self.values)  # of the highest precision among them
            if table.dim() == arity:
                table = table[None]
            found.append((sites, table.contiguous()))
        return found

    def _evaluate(self, function: Callable[..., Tensor], group: _Group) -> Tensor:
        """A potential that is given as a function."""
        arity = len(group.states)
        axes = [
            self.values[:size].reshape(-1, *(1,) * (arity - 1 - k))
            for k, size in enumerate(group.states)
        ]
        table = function(*axes)
        if not isinstance(table, Tensor):
            raise TypeError(
                f"the potential of the sites {_few(group.sites.tolist())} must give a "
                f"tensor, got {type(table).__name__}. Compute it of the states, which "
                "are tensors, or give a table."
            )
        wanted = (group.states, (*group.batch_shape, len(group.sites), *group.states))
        if table.dim() <= arity:
            table = table.expand(group.states)
        if tuple(table.shape) not in wanted:
            raise ValueError(
                f"the potential of the sites {group.sites.tolist()} must give a tensor "
                f"of shape {wanted[0]} or {wanted[1]}, got {tuple(table.shape)}."
            )
        return table

    def _index(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the states, and at which points there is no such state."""
        low, high = self.values[0], self.values[-1]
        step = 2 if low < 0 else 1
        inside = x.detach().nan_to_num(0.0).clamp(low, high)
        index = ((inside - low) / step).long()
        states = torch.tensor(self._num_states, device=x.device)
        index = index.minimum(states - 1)
        return index, (self.values[index] != x).any(-1)


class _Scaled(nn.Module):
    """A coefficient for each factor times a function of the states."""

    coefficient: Tensor

    def __init__(
        self,
        coefficient: float | Tensor,
        name: str,
        number: int,
        function: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        if not isinstance(coefficient, Tensor):
            coefficient = torch.tensor(float(coefficient))
        if coefficient.shape and coefficient.shape[-1] != number:
            raise ValueError(
                f"{name} must be a number or have shape (*batch, {number}), got "
                f"{tuple(coefficient.shape)}."
            )
        require_precision(coefficient, name)
        if not holds(coefficient.detach().isfinite()):
            raise ValueError(
                f"{name} must be finite, got {coefficient.detach().flatten()[:6]}. "
                "What is forbidden has a table with -inf instead."
            )
        live_or_parameter(self, "coefficient", coefficient)
        self.function = function
        self.batch_shape = coefficient.shape[:-1]

    def forward(self, *states: Tensor) -> Tensor:
        term = self.function(*states)
        scale = self.coefficient
        return scale.reshape(*scale.shape, *(1,) * term.dim()) * term


def _product(s: Tensor, t: Tensor) -> Tensor:
    return s * t


def _equal(x: Tensor, y: Tensor) -> Tensor:
    return (x == y).to(x)


def _itself(s: Tensor) -> Tensor:
    return s


def _tensors(groups: Sequence[_Group]) -> Iterator[Tensor]:
    """The tables of potentials, and what modules that give them hold."""
    for group in groups:
        if isinstance(group.table, Tensor):
            yield group.table
        elif isinstance(group.table, nn.Module):
            yield from group.table.parameters()
            yield from group.table.buffers()


def _like(groups: Sequence[_Group]) -> Tensor:
    """A tensor of the highest precision among the potentials, on their device."""
    tensors = [t for t in _tensors(groups) if t.is_floating_point()]
    if not tensors:
        return torch.empty(0)
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    return torch.empty(0, dtype=dtype, device=tensors[0].device)


def _flat_index(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The table with its states in one axis, and the place of states ``(*, F, k)``."""
    arity = index.shape[-1]
    strides = torch.tensor(table.stride()[-arity:], device=index.device)
    return table.flatten(-arity), (index * strides).sum(-1)


def _look_up(flat: Tensor, place: Tensor) -> Tensor:
    """Numbers of flat tables ``(*batch, F, S)`` at places of shape ``(*, F, n)``."""
    if flat.dim() > 2:
        return flat.expand(*place.shape[:-1], -1).gather(-1, place)
    rows = torch.arange(len(flat), device=flat.device)  # of length 1 if all are alike
    return flat[rows[:, None], place]


def _all_rows(table: Tensor, sites: Tensor) -> Tensor:
    """The table with a row for each factor."""
    arity = sites.shape[1]
    return table.expand(*table.shape[: -arity - 1], len(sites), *table.shape[-arity:])


def _batch_shape(groups: Sequence[_Group]) -> torch.Size:
    shapes = [group.batch_shape for group in groups]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            "factors must have potentials whose batch shapes broadcast, got "
            f"{sorted({tuple(shape) for shape in shapes})}."
        ) from None


def _support(states: tuple[int, ...], *, spins: bool) -> Any:
    if spins:
        return _SPINS
    if len(set(states)) == 1:
        return constraints.integer_interval(0, states[0] - 1)
    return constraints.integer_interval(0, torch.tensor(states) - 1)


#: Under a name that the argument of the constructor does not hide.
_SPINS = spins


def _read(
    factor: tuple[Any, Any], place: Mapping[Hashable, int], states: tuple[int, ...]
) -> _Group:
    """One entry of the list of factors, checked."""
    sites, table = factor
    is_many = isinstance(sites, Tensor) or hasattr(sites, "__array__")
    if is_many:
        numbers = torch.as_tensor(sites)
    else:
        # A tuple may itself be the name of a site.
        is_one = not isinstance(sites, list) and sites in place
        names = [sites] if is_one or isinstance(sites, str | int) else list(sites)
        unknown = [name for name in names if name not in place]
        if unknown:
            raise ValueError(
                f"the sites of a factor must be among {_few(place)}, got "
                f"{unknown[0]!r}."
            )
        numbers = torch.tensor([[place[name] for name in names]])
    _require_sites(numbers, len(states))
    numbers = numbers.long()  # bytes would be taken for masks
    sizes = {tuple(states[i] for i in row) for row in numbers.tolist()}
    if len(sizes) > 1:
        raise ValueError(
            "the factors of one group must have the same numbers of states, got "
            f"{sorted(sizes)[:2]}. Give them in several groups."
        )
    (size,) = sizes
    if callable(table):
        shape = getattr(table, "batch_shape", torch.Size())
        return _Group(numbers, size, table, shape, is_many=True)
    _require_table(table, numbers, size, is_many=is_many)
    lead = table.shape[: max(table.dim() - len(size) - is_many, 0)]
    return _Group(numbers, size, table, lead, is_many)


def _require_table(
    table: Any, sites: Tensor, size: tuple[int, ...], *, is_many: bool
) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(
            "the log potential of a factor must be a tensor or a function of the "
            f"states, got {type(table).__name__}."
        )
    own = (len(sites), *size) if is_many else size
    fits = table.shape[-len(own) :] == own or (is_many and table.shape == size)
    if not fits or not table.is_floating_point():
        wanted = f"{size} or (*batch, {', '.join(map(str, own))})"
        raise ValueError(
            f"the log potential of the sites {_few(sites.tolist())} must hold "
            f"floating-point numbers in the shape {wanted}, got {table.dtype} of shape "
            f"{tuple(table.shape)}."
        )
    require_precision(table, "a log potential")
    if not holds(table.detach() < torch.inf):
        raise ValueError(
            f"the log potential of the sites {_few(sites.tolist())} must hold no nan "
            "and no +inf; -inf forbids states."
        )


def _grouped(groups: list[_Group]) -> list[_Group]:
    """Single plain tables of one shape together: one parameter, and one look-up."""
    kept: list[_Group] = []
    plain: dict[tuple[int, ...], list[_Group]] = {}
    for group in groups:
        table = group.table
        is_plain = isinstance(table, Tensor) and not table.requires_grad
        if is_plain and table.dim() == len(group.states):
            if len(group.sites) == 1:
                plain.setdefault(group.states, []).append(group)
                continue
        kept.append(group)
    for states, same in plain.items():
        sites = torch.cat([group.sites for group in same])
        table = torch.stack([group.table for group in same])
        kept.append(_Group(sites, states, table, torch.Size(), is_many=True))
    return kept


def _whole_numbers(states: tuple[Any, ...], *, spins: bool) -> tuple[int, ...]:
    is_whole = all(not isinstance(q, str) and q == int(q) for q in states)
    if not states or not is_whole or min(states) < 1 or (spins and set(states) != {2}):
        wanted = "2 states, as spins have," if spins else "a whole number from 1 on,"
        raise ValueError(
            f"num_states must give each of at least one site {wanted} got "
            f"{_few(states)}."
        )
    return tuple(int(q) for q in states)


def _require_sites(sites: Tensor, number: int) -> None:
    if sites.dim() != 2 or sites.is_floating_point() or not sites.numel():
        raise ValueError(
            "the sites of a group of factors must be integers of shape (F, k), got "
            f"{sites.dtype} of shape {tuple(sites.shape)}."
        )
    if sites.min() < 0 or sites.max() >= number:
        raise ValueError(
            f"the sites of factors must be numbers from 0 to {number - 1}, got "
            f"{sites.min().item()} to {sites.max().item()}."
        )
    ordered = sites.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if twice.any():
        raise ValueError(
            "a factor must hold each of its sites once, got "
            f"{tuple(sites[twice][0].tolist())}."
        )


def _few(items: Any) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "")
