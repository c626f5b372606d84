r"""Exact sums over trees, by messages from the leaves to the roots and back.

Of a forest with log potentials :math:`u_i` of sites and :math:`t_{ij}` of edges, a site
:math:`j` sends to its parent :math:`i`

.. math::
    m_j(x_i) = \log \sum_{x_j} \exp\Big(t_{ji}(x_j, x_i) + u_j(x_j)
        + \sum_{k \in \mathrm{children}(j)} m_k(x_j)\Big)                  \tag{1}

All sites at the same depth send at once. :math:`\log Z` is the log-sum at the roots,
added up. Draws go from the roots down, each site from the distribution
:math:`p(x_j \mid x_i)` of which (1) is the normaliser; and so do the marginals:

.. math::
    p(x_j) = \sum_{x_i} p(x_j \mid x_i)\, p(x_i)                          \tag{2}

References:
    Pearl (1982), Reverend Bayes on inference engines, AAAI.
"""

__all__ = ["Forest"]

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies.discrete.exact.distribution import (
    FORBIDDEN,
    categorical,
    flat_states,
    where_allowed,
)


class _Rooted(NamedTuple):
    """A rooted forest.

    Attributes:
        parent: Of each site, itself for a root.
        levels: Sites by depth, from the roots' children down.
        roots: One site of each tree.
        edges: Pairs of sites.
    """

    parent: Tensor
    levels: tuple[Tensor, ...]
    roots: Tensor
    edges: tuple[tuple[int, int], ...]


def _rooted(num_sites: int, scopes: Sequence[Tensor]) -> "_Rooted | None":
    """The forest that the edges of potentials, in groups ``(F, k)``, make, rooted."""
    if any(sites.shape[1] > 2 for sites in scopes):
        return None
    pairs = (tuple(map(tuple, s.tolist())) for s in scopes if s.shape[1] == 2)
    return _search(num_sites, tuple(pairs))


@functools.lru_cache(maxsize=64)
def _search(
    num_sites: int, pairs: tuple[tuple[tuple[int, int], ...], ...]
) -> "_Rooted | None":
    """Roots and depths by breadth-first search; ``None`` if there is a ring."""
    near: list[list[int]] = [[] for _ in range(num_sites)]
    # Several potentials may share one.
    edges = {(min(pair), max(pair)) for group in pairs for pair in group}
    for i, j in edges:
        near[i].append(j)
        near[j].append(i)
    parent = [-1] * num_sites
    roots: list[int] = []
    levels: list[list[int]] = []
    for root in range(num_sites):
        if parent[root] >= 0:
            continue
        parent[root] = root
        roots.append(root)
        front, depth = [root], 0
        while front:
            ahead = [(j, i) for i in front for j in near[i] if parent[i] != j]
            front = [j for j, _ in ahead]
            for j, i in ahead:
                if parent[j] >= 0:
                    return None
                parent[j] = i
            if depth == len(levels) and front:
                levels.append([])
            if front:
                levels[depth] += front
            depth += 1
    places = tuple(torch.tensor(level) for level in levels)
    tree = torch.tensor(parent)
    return _Rooted(tree, places, torch.tensor(roots), tuple(edges))


@dataclass(frozen=True)
class Forest:
    """The sums over the states of forests with the same edges.

    Attributes:
        sites: Log potentials :math:`u`, shape ``(B, D, q)``.
        edges: Those of the edges from each site, first axis, to its parent, second
            axis; shape ``(B, D, q, q)``, or ``(1, D, q, q)`` where all have the same.
        parent: Of each site.
        levels: Sites by depth, roots' children first.
        roots: One site of each tree.
        batch_shape: Of the ``B`` forests.
    """

    sites: Tensor
    edges: Tensor
    parent: Tensor
    levels: tuple[Tensor, ...]
    roots: Tensor
    batch_shape: torch.Size = torch.Size()
    _sums: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    @classmethod
    def of(
        cls,
        states: Sequence[int],
        factors: Sequence[tuple[Tensor, Tensor]],
        batch_shape: torch.Size,
    ) -> "Forest | None":
        """From potentials in groups, with one axis for the batch.

        Returns:
            ``None`` where a potential has more than two sites, or edges close a ring.
        """
        shape = _rooted(len(states), [sites for sites, _ in factors])
        if shape is None:
            return None
        most, like = max(states), factors[0][1]
        number, device = batch_shape.numel(), like.device
        parent = shape.parent.to(device)
        state = torch.arange(most, device=device)
        is_missing = state >= torch.tensor(states, device=device)[:, None]
        sites = like.new_zeros(number, len(states), most)
        sites = sites.masked_fill(is_missing, FORBIDDEN)
        edges = like.new_zeros(number, len(states), most, most)
        for group, table in factors:
            group = group.to(device)
            lacks = [(0, most - size) for size in reversed(table.shape[2:])]
            pads = [pad for pair in lacks for pad in pair]
            table = table.clamp(min=FORBIDDEN)
            table = torch.nn.functional.pad(table, pads)
            table = table.expand(number, len(group), *table.shape[2:])
            if group.shape[1] == 1:
                sites = sites.index_add(1, group[:, 0], table)
                continue
            is_child = parent[group[:, 0]] == group[:, 1]
            child = torch.where(is_child, group[:, 0], group[:, 1])
            table = torch.where(is_child[:, None, None], table, table.mT)
            edges = edges.index_add(1, child, table)
        levels = tuple(level.to(device) for level in shape.levels)
        return cls(sites, edges, parent, levels, shape.roots.to(device), batch_shape)

    @staticmethod
    def edges_of(
        num_sites: int, scopes: Sequence[Tensor]
    ) -> tuple[tuple[int, int], ...] | None:
        """Pairs of sites that potentials join; ``None`` where they make no forest.

        Args:
            num_sites: Number of sites.
            scopes: Sites of potentials, in groups of shape ``(F, k)``.
        """
        shape = _rooted(num_sites, scopes)
        return None if shape is None else shape.edges

    def log_partition(self) -> Tensor:
        """See ``Solver`` in the module of the distribution, as for what follows."""
        beliefs, scale = self._messages()
        value = beliefs[:, self.roots].logsumexp(-1).sum(-1) + scale
        return where_allowed(value.to(beliefs)).reshape(self.batch_shape)

    def marginals(self) -> Tensor:
        """By (2), from the roots down."""
        beliefs, _ = self._messages()
        probs = beliefs.softmax(-1)
        for level in self.levels:
            joint = self.edges[:, level] + beliefs[:, level].unsqueeze(-1)
            above = probs[:, self.parent[level]].unsqueeze(-1)
            own = (joint.softmax(-2) @ above).squeeze(-1)  # (2)
            # What rounding adds on a long way is taken off at each step.
            own = own / own.sum(-1, keepdim=True)
            probs = probs.index_copy(1, level, own)
        return probs.reshape(*self.batch_shape, *probs.shape[1:])

    def mode(self) -> Tensor:
        """By messages with the largest in place of the log-sum."""
        return self._downward(torch.amax, lambda logits: logits.argmax(-1), 1)[0]

    def sample(self, num_draws: int) -> Tensor:
        """From the roots down."""
        return self._downward(torch.logsumexp, categorical, num_draws)

    def given(self, observed: Mapping[int, Tensor]) -> "Forest":
        """All other states of these sites forbidden."""
        sites = self.sites.expand(self.batch_shape.numel(), -1, -1).clone()
        states = torch.arange(sites.shape[-1], device=sites.device)
        for site, state in flat_states(observed, self.batch_shape).items():
            is_it = states == state[:, None]
            sites[:, site] = sites[:, site].where(is_it, FORBIDDEN)
        return replace(self, sites=sites)

    def _messages(self) -> tuple[Tensor, Tensor]:
        """Those of sums, found once where no gradient is wanted."""
        if torch.is_grad_enabled():
            return self._upward(torch.logsumexp)
        if not self._sums:
            self._sums.append(self._upward(torch.logsumexp))
        return self._sums[0]

    def _upward(self, reduce: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """Potentials of the sites with the messages of their children.

        The largest of a message is 0; what was taken off is the second, the sum of it
        in double precision.
        """
        beliefs = self.sites
        total = torch.zeros((), dtype=torch.float64, device=beliefs.device)
        for level in reversed(self.levels):
            joint = self.edges[:, level] + beliefs[:, level].unsqueeze(-1)
            message = reduce(joint, -2)  # (1)
            scale = message.detach().amax(-1, keepdim=True)
            total = total + scale.sum((-1, -2), dtype=torch.float64)
            beliefs = beliefs.index_add(1, self.parent[level], message - scale)
        return beliefs, total

    @torch.no_grad()
    def _downward(
        self,
        reduce: Callable[[Tensor, int], Tensor],
        choose: Callable[[Tensor], Tensor],
        number: int,
    ) -> Tensor:
        """States of all sites, parents first."""
        beliefs, _ = self._upward(reduce)
        shape = (number, *beliefs.shape[:2])
        x = torch.zeros(shape, dtype=torch.long, device=beliefs.device)
        x[..., self.roots] = choose(beliefs[:, self.roots].expand(number, -1, -1, -1))
        for level in self.levels:
            # Of each site the column of the edge where its parent's state is.
            edges = self.edges[:, level].mT.expand(*shape[:2], -1, -1, -1)
            at = x[..., self.parent[level], None, None]
            at = at.expand(*at.shape[:-1], edges.shape[-1])
            logits = beliefs[:, level] + edges.gather(-2, at).squeeze(-2)
            x[..., level] = choose(logits)
        return x.reshape(number, *self.batch_shape, -1)
