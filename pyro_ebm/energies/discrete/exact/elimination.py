r"""Exact sums over a factor graph by eliminating one site after another.

With log potentials :math:`t_c` of sets :math:`c` of sites, :math:`-f(x) = \sum_c
t_c(x_c)`, site :math:`i` is summed out by

.. math::
    m_i(x_{N_i}) = \log \sum_{x_i} \exp \sum_{c \ni i} t_c(x_c)            \tag{1}

over all potentials and earlier results that hold it; :math:`N_i` are the other sites in
these, and :math:`m_i` is a potential of theirs. What is left in the end is
:math:`\log Z`. Drawn in the reverse order, each site has the distribution of which (1)
is the normaliser, given sites that are drawn already. With the largest in place of the
log-sum the same steps find the most probable state.

The cost is the number of terms of all sums, which grows exponentially with the number
of sites in a potential: for a lattice with its smaller side. The order is greedy: next
is the site that ties together fewest pairs of others. A batch of graphs with the same
sites and other potentials is summed at once, at as many times the cost. (The greedy
path of ``opt_einsum``, from pair to pair of tensors, has 40 and 200 times as many terms
on tori of 8 and 10 spins a side, and is no order to draw in.)

References:
    Dechter (1999), Artificial Intelligence 113, 41-85 (bucket elimination). Kjaerulff
    (1990), Triangulation of graphs (the greedy order).
"""

__all__ = [
    "Elimination",
    "Factors",
    "MAX_COST",
    "elimination_cost",
    "exact_closed_form",
    "exact_sums",
    "factors_of",
]

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import register_kl

from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.discrete.exact.distribution import (
    FORBIDDEN,
    MAX_LISTED,
    ExactClosedForm,
    ExactDistribution,
    categorical,
    flat_states,
    where_allowed,
)
from pyro_ebm.energies.discrete.exact.tree import Forest
from pyro_ebm.energies.discrete.finite import (
    finite_points,
    num_points,
    site_states,
)
from pyro_ebm.energies.discrete.independent import IndependentSites

#: Summands up to which elimination is cheap, and takes tenths of a second.
MAX_COST = 2**25

#: Sets of as many sites each, shape ``(F, k)``, and their log potentials, of shape
#: ``(*batch, F, *states)`` or ``(*batch, 1, *states)`` where all have the same.
Factors: TypeAlias = Sequence[tuple[Tensor, Tensor]]
_Scopes: TypeAlias = tuple[tuple[int, ...], ...]
_Bucket: TypeAlias = list[tuple[tuple[int, ...], Tensor]]


def exact_sums(
    states: Sequence[int], factors: Factors, batch_shape: torch.Size | None = None
) -> "Forest | Elimination":
    """Choose how the sums over all states are done.

    Args:
        states: How many states each site has.
        factors: Log potentials.
        batch_shape: Of a batch of graphs, to which those of the potentials broadcast.

    Returns:
        Messages along the edges if the graph is a forest, elimination otherwise.
    """
    batch_shape = batch_shape or torch.Size()
    flat = [
        (sites, _flat_batch(table, sites.shape[1] + 1, batch_shape))
        for sites, table in factors
    ]
    forest = Forest.of(states, flat, batch_shape)
    return forest or Elimination.of(tuple(states), flat, batch_shape)


def _flat_batch(table: Tensor, num_dims: int, batch_shape: torch.Size) -> Tensor:
    """A table with one axis for the batch, of length 1 if it has none of its own."""
    if table.dim() == num_dims:
        return table[None]
    own = table.shape[-num_dims:]
    return table.expand(*batch_shape, *own).reshape(-1, *own)


def exact_closed_form(energy: Energy, factors: Factors) -> ExactClosedForm | None:
    """The closed form of an energy, unless its sums have too many terms.

    Args:
        energy: Over a finite support.
        factors: Log potentials.
    """
    batch_shape = energy.batch_shape
    states = site_states(energy.support, energy.event_shape)
    cost = elimination_cost(states, [sites for sites, _ in factors])
    if cost * batch_shape.numel() > MAX_COST:
        return None
    solver = exact_sums(states, factors, batch_shape)
    return ExactClosedForm.of(ExactDistribution(energy, solver, batch_shape))


def factors_of(energy: Energy) -> Factors | None:
    """Log potentials of an energy: its own, or one of all sites where few are to list.

    Args:
        energy: Any; what is made of factors has a method of that name.

    Returns:
        ``None`` where there are none, and more than 4096 points.
    """
    own = getattr(energy, "factors", None)
    found: Factors | None = own() if callable(own) else None
    count = num_points(energy.support, energy.event_shape)
    if found is not None or count is None or count > MAX_LISTED:
        return found
    event, batch = energy.event_shape, energy.batch_shape
    like = torch.empty(0, **energy.tensor_options())
    x = finite_points(energy.support, event, torch.arange(count), like)
    x = x.reshape(count, *(1,) * len(batch), *event).expand(count, *batch, *event)
    states = site_states(energy.support, event)
    table = -energy(x).movedim(0, -1).reshape(*batch, 1, *states[::-1])
    axes = range(len(batch) + len(states), len(batch), -1)  # the first changes fastest
    table = table.permute(*range(len(batch) + 1), *axes)
    return [(torch.arange(len(states))[None], table)]


def elimination_cost(
    states: Sequence[int], scopes: Sequence[Tensor], fixed: Sequence[int] = ()
) -> float:
    """How many terms the sums of :func:`exact_sums` have.

    Args:
        states: How many states each site has.
        scopes: The sites of all potentials, in groups of shape ``(F, k)``.
        fixed: Sites that are observed.

    Returns:
        The number; infinite beyond four billion, where no order is looked for.
    """
    edges = Forest.edges_of(len(states), scopes)
    if edges is not None:
        return sum(states[i] * states[j] for i, j in edges)
    free = frozenset(range(len(states))).difference(fixed)
    rows = (sites for group in scopes for sites in group.tolist())
    flat = tuple(tuple(site for site in row if site in free) for row in rows)
    return _greedy_order(tuple(states), flat, frozenset(fixed)).cost


#: Terms beyond which no order is looked for.
_TOO_MUCH = 2.0**32


class _Order(NamedTuple):
    """Sites in the order of their elimination, and the number of terms of the sums."""

    sites: tuple[int, ...]
    cost: float


@functools.lru_cache(maxsize=64)
def _greedy_order(
    states: tuple[int, ...], scopes: _Scopes, fixed: frozenset[int]
) -> _Order:
    """Eliminate the site that ties together fewest pairs; at a draw, the cheapest."""
    near: dict[int, set[int]] = {i: set() for i in range(len(states)) if i not in fixed}
    for scope in scopes:
        for i, j in itertools.permutations(scope, 2):
            near[i].add(j)

    # At some step each site that is left has as many neighbours as the fewest now are.
    least = min(map(len, near.values()), default=0)
    if float(min(states)) ** (least + 1) > _TOO_MUCH:
        return _Order((), math.inf)

    def score(i: int) -> tuple[int, float, int]:
        pairs = itertools.combinations(near[i], 2)
        fill = sum(b not in near[a] for a, b in pairs)
        return fill, states[i] * math.prod(states[j] for j in near[i]), i

    scores = {i: score(i) for i in near}
    queue = sorted(scores.values())
    order, cost = [], 0.0
    while queue:
        best = heapq.heappop(queue)
        i = best[2]
        if scores.get(i) != best:  # it has changed since
            continue
        cost += best[1]
        if cost > _TOO_MUCH:
            return _Order((), math.inf)
        order.append(i)
        others = near.pop(i)
        del scores[i]
        for j in others:
            near[j] = (near[j] | others) - {i, j}
        touched = others.union(*(near[j] for j in others)) if best[0] else others
        for j in touched:
            if (new := score(j)) != scores[j]:
                scores[j] = new
                heapq.heappush(queue, new)
    return _Order(tuple(order), cost)


@dataclass(frozen=True)
class Elimination:
    """Sums over the states of factor graphs.

    Attributes:
        states: How many states each site has.
        scopes: The sites of each potential.
        tables: The potentials, one axis a site, and in front one for the batch, of
            length 1 where all graphs have the same.
        batch_shape: Of the graphs.
        fixed: States of sites that are observed, and in no potential; shape ``(B,)`` or
            ``(1,)``.
    """

    states: tuple[int, ...]
    scopes: _Scopes
    tables: list[Tensor]
    batch_shape: torch.Size = torch.Size()
    fixed: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, states: tuple[int, ...], factors: Factors, batch_shape: torch.Size
    ) -> "Elimination":
        """From potentials in groups, with one axis for the batch."""
        scopes: list[tuple[int, ...]] = []
        tables: list[Tensor] = []
        for sites, table in factors:
            scopes += map(tuple, sites.tolist())
            table = table.clamp(min=FORBIDDEN)
            tables += table.expand(-1, len(sites), *table.shape[2:]).unbind(1)
        return cls(states, tuple(scopes), tables, batch_shape)

    @property
    def order(self) -> _Order:
        """The sites that are not observed, in the order of their elimination."""
        return _greedy_order(self.states, self.scopes, frozenset(self.fixed))

    def log_partition(self) -> Tensor:
        """See ``Solver`` in the module of the distribution, as for what follows."""
        value, _ = self._eliminate(self.tables, torch.logsumexp)
        return where_allowed(value).expand(self._number).reshape(self.batch_shape)

    def marginals(self) -> Tensor:
        """By (3) there, as the gradient of log Z."""
        most, like = max(self.states), self.tables[0]
        shape = (self._number, len(self.states), most)
        wants_graph = torch.is_grad_enabled() and any(
            table.requires_grad for table in self.tables
        )
        with torch.enable_grad():
            own = torch.zeros(shape, dtype=like.dtype, device=like.device)
            rows = own.requires_grad_().unbind(1)
            scopes = [*self.scopes, *((i,) for i in self.order.sites)]
            tables = [*self.tables]
            tables += [rows[i][:, : self.states[i]] for i in self.order.sites]
            value, _ = self._eliminate(tables, torch.logsumexp, scopes)
            (probs,) = torch.autograd.grad(value.sum(), own, create_graph=wants_graph)
        for site, state in self.fixed.items():
            observed = torch.arange(most, device=like.device) == state[:, None]
            at_site = torch.arange(len(self.states), device=like.device) == site
            probs = torch.where(at_site[:, None], observed.to(probs)[:, None], probs)
        return probs.reshape(*self.batch_shape, *shape[1:])

    def mode(self) -> Tensor:
        """By the largest in place of the log-sum."""
        with torch.no_grad():
            _, buckets = self._eliminate(self.tables, torch.amax)
        return self._back(buckets, lambda logits: logits.argmax(-1), 1)[0]

    def sample(self, num_draws: int) -> Tensor:
        """In the reverse order."""
        with torch.no_grad():
            _, buckets = self._eliminate(self.tables, torch.logsumexp)
        return self._back(buckets, categorical, num_draws)

    def given(self, observed: Mapping[int, Tensor]) -> "Elimination":
        """What is observed is looked up in the tables."""
        states = flat_states(observed, self.batch_shape)
        left: dict[tuple[int, ...], Tensor] = {}
        for scope, table in zip(self.scopes, self.tables, strict=True):
            axes = [axis for axis, site in enumerate(scope, 1) if site in states]
            if axes:
                own = torch.arange(len(table), device=table.device)
                index = [states[scope[axis - 1]].to(own.device) for axis in axes]
                table = table.movedim(axes, tuple(range(1, len(axes) + 1)))
                table = table[(own, *index)]
            free = tuple(site for site in scope if site not in states)
            left[free] = left[free] + table if free in left else table
        fixed = {**self.fixed, **states}
        tables = list(left.values())
        return replace(self, scopes=tuple(left), tables=tables, fixed=fixed)

    @property
    def _number(self) -> int:
        """How many graphs there are."""
        return self.batch_shape.numel()

    def _eliminate(
        self,
        tables: Sequence[Tensor],
        reduce: Callable[[Tensor, int], Tensor],
        scopes: Sequence[tuple[int, ...]] | None = None,
    ) -> tuple[Tensor, list[_Bucket]]:
        """What is left in the end, and what (1) was the sum of, for each site."""
        rank = {site: place for place, site in enumerate(self.order.sites)}
        buckets: list[_Bucket] = [[] for _ in rank]
        left = tables[0].new_zeros(1)
        for scope, table in zip(scopes or self.scopes, tables, strict=True):
            if not scope:
                left = left + table
                continue
            axes = sorted(range(len(scope)), key=lambda axis: rank[scope[axis]])
            sites = tuple(scope[axis] for axis in axes)
            table = table.permute(0, *(axis + 1 for axis in axes))
            buckets[rank[sites[0]]].append((sites, table))
        for place, site in enumerate(self.order.sites):
            bucket = buckets[place]
            sites, total = _total(bucket, site, rank, self.states, tables[0])
            message = reduce(total, 1)  # (1)
            if len(sites) == 1:
                left = left + message
            else:
                buckets[rank[sites[1]]].append((sites[1:], message))
        return left, buckets

    def _back(
        self, buckets: list[_Bucket], choose: Callable[[Tensor], Tensor], number: int
    ) -> Tensor:
        """States of all sites, the last that was eliminated first."""
        like = self.tables[0]
        shape = (number, self._number, len(self.states))
        x = torch.zeros(shape, dtype=torch.long, device=like.device)
        for site, state in self.fixed.items():
            x[..., site] = state
        for place in reversed(range(len(buckets))):
            site = self.order.sites[place]
            logits = like.new_zeros(*shape[:-1], self.states[site])
            for sites, table in buckets[place]:
                others = tuple(x[..., other] for other in sites[1:])
                own = torch.arange(len(table), device=like.device)
                chosen = table.movedim(1, -1).detach()[(own, *others)]
                logits = logits + chosen
            x[..., site] = choose(logits)
        return x.reshape(number, *self.batch_shape, -1)


def _total(
    bucket: _Bucket,
    site: int,
    rank: dict[int, int],
    states: tuple[int, ...],
    like: Tensor,
) -> tuple[tuple[int, ...], Tensor]:
    """The sum of potentials, and their sites in the order of elimination."""
    union = {site}.union(*(sites for sites, _ in bucket))
    all_sites = tuple(sorted(union, key=rank.__getitem__))
    total: Tensor = like.new_zeros(1, states[site]) if not bucket else like
    # The small ones first: most of the sums are then over few states.
    for number, (sites, table) in enumerate(sorted(bucket, key=lambda f: f[1].numel())):
        held = set(sites)
        where = tuple(slice(None) if s in held else None for s in all_sites)
        table = table[(slice(None), *where)]
        total = table if not number else total + table
    return all_sites, total


def _expected(p: ExactDistribution, energy: Energy) -> Tensor:
    r"""Mean of an energy, shape ``batch``, as the derivative of a log Z.

    Of potentials :math:`t + \epsilon u` the log Z has the derivative
    :math:`\langle u \rangle` at :math:`\epsilon = 0`.
    """
    own, other = factors_of(p.energy), factors_of(energy)
    batch = torch.broadcast_shapes(p.energy.batch_shape, energy.batch_shape)
    states = site_states(energy.support, energy.event_shape)
    scopes = [sites for sites, _ in (*(own or ()), *(other or ()))]
    cost = elimination_cost(states, scopes) * batch.numel()
    if own is None or other is None or cost > MAX_COST:
        raise NotImplementedError(
            f"the mean of {type(energy).__name__} under {type(p.energy).__name__} is "
            "known where both are made of factors whose sums are cheap, or have at "
            f"most {MAX_LISTED:,} states; got {len(states)} sites, {cost:.1e} terms. "
            "Take the mean of log_prob over draws."
        )
    tables = [table for _, table in (*own, *other)]
    is_live = torch.is_grad_enabled() and any(t.requires_grad for t in tables)
    with torch.enable_grad():
        epsilon = torch.zeros(batch).to(tables[0]).requires_grad_()
        tilted = [
            (sites, epsilon.reshape(*batch, *(1,) * (1 + sites.shape[1])) * table)
            for sites, table in ((s, t.clamp(min=FORBIDDEN)) for s, t in other)
        ]
        solver = exact_sums(states, [*own, *tilted], batch).given(p.observed)
        value = solver.log_partition().sum()
        (mean,) = torch.autograd.grad(value, epsilon, create_graph=is_live)
    return (-mean).masked_fill(mean < FORBIDDEN / 1e15, torch.inf)


@register_kl(ExactDistribution, ExactDistribution)
def _(p: ExactDistribution, q: ExactDistribution) -> Tensor:
    if p.observed or q.observed or p.event_shape != q.event_shape:
        raise NotImplementedError(
            "the divergence of exact distributions is known of the same event, and "
            f"where nothing is observed; got event shapes {tuple(p.event_shape)} and "
            f"{tuple(q.event_shape)}, with {len(p.observed)} and {len(q.observed)} "
            "sites observed. Clamp the energies instead, by ClampedEnergy."
        )
    mean = _expected(p, q.energy) - _expected(p, p.energy)
    return mean + q.log_partition - p.log_partition


@register_kl(ExactDistribution, IndependentSites)
def _(p: ExactDistribution, q: IndependentSites) -> Tensor:
    probs, log_probs = p.marginals(), q.log_probs.movedim(0, -1)
    mean = torch.where(probs > 0, probs * log_probs, 0.0)
    mean = sum_rightmost(mean, 1 + len(q.event_shape))
    return -_expected(p, p.energy) - p.log_partition - mean
