r"""Swendsen-Wang moves: clusters of like neighbours take a new value at once.

For sites with the same states and pairs that like to agree,

.. math::
    -f(x) = \sum_e J_e\, [x_{i_e} = x_{j_e}] + \sum_i h_i(x_i), \qquad J_e \ge 0 \tag{1}

up to a constant, a bond is laid between two equal neighbours with probability

.. math::
    P(b_e = 1 \mid x) = (1 - e^{-J_e})\, [x_{i_e} = x_{j_e}]               \tag{2}

and each cluster :math:`K` that the bonds hold together draws one value for all of it,

.. math::
    P(x_K = v \mid b) \propto \exp \sum_{i \in K} h_i(v)                   \tag{3}

Both are exact conditionals of a joint distribution of sites and bonds (Edwards &
Sokal), so nothing is rejected, fields or not. Of two states every finite potential of a
pair has the form (1). Where fields differ in sign from site to site a large cluster
keeps its value most of the time, which is what the sweeps of Gibbs sampling are for
that follow each move.

References:
    Swendsen & Wang (1987), Physical Review Letters 58, 86-88. Edwards & Sokal (1988),
    Physical Review D 38, 2009-2012. Shiloach & Vishkin (1982), Journal of Algorithms 3,
    57-67 (connected components by hooking and pointer jumping).
"""

__all__ = ["SwendsenWang"]

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.mcmc.base import ChainState
from pyro_ebm.mcmc.kernels.gibbs import Gibbs, SweepKernel, draw_index

#: What rounding may leave of a coupling, in parts of the largest.
_ROUNDING = 1e-5


@final
@dataclass(frozen=True)
class SwendsenWang(SweepKernel):
    """Move clusters by (2) and (3), all chains at once, then sweep by blocks.

    For ferromagnets near or below their critical temperature, where sweeps alone take
    long from one phase to another: :class:`~pyro_ebm.energies.IsingEnergy` and
    :class:`~pyro_ebm.energies.PottsEnergy`,
    :class:`~pyro_ebm.energies.FactorGraphEnergy` and
    :class:`~pyro_ebm.energies.BoltzmannEnergy` of pairs with couplings of no negative
    sign, with any fields. It has no step size.

    Args:
        num_sweeps: Sweeps of Gibbs sampling after each move of clusters; may be 0.
        is_reversed: Whether they come before it, from last block to first: the time
            reversal.

    Raises:
        ValueError: If ``num_sweeps`` is negative.

    Example:
        >>> energy = pyro_ebm.energies.IsingEnergy((16, 16), coupling=0.44)
        >>> kernel = SwendsenWang()
        >>> state = kernel.init(energy, torch.ones(100, 16, 16))
        >>> for _ in range(5):
        ...     state, info = kernel.step(energy, state)
        >>> bool(state.x.mean().abs() < 0.4)  # of a magnetisation of .8
        True
    """

    num_sweeps: int = 1
    is_reversed: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.num_sweeps < 0:
            raise ValueError(f"num_sweeps must not be negative, got {self.num_sweeps}.")

    @property
    def num_gradients(self) -> int:
        """Evaluations that a step costs, a chain: about two for the clusters."""
        return self.num_sweeps + 2

    def init(self, energy: Energy, x: Tensor) -> ChainState:
        """Evaluate the energy at the chains' points, once; see :meth:`Gibbs.init`.

        Args:
            energy: A sum of potentials (1) of single sites and of pairs.
            x: Points of the support, shape ``(*chains, *event)``.

        Raises:
            ValueError: If the energy is no such sum or a coupling is negative, or a
                point is outside of the support.
        """
        _Couplings.of(energy)
        return super().init(energy, x)

    @torch.no_grad()
    def sweep(self, energy: Energy, x: Tensor) -> Tensor:
        """Where one step takes the chains, without their energy.

        Args:
            energy: As for :meth:`init`.
            x: Points of the support, shape ``(*chains, *event)``.
        """
        gibbs = Gibbs(max(self.num_sweeps, 1), self.is_reversed)
        if self.num_sweeps and self.is_reversed:
            x = gibbs.sweep(energy, x)
        couplings = _Couplings.of(energy)
        first, step = couplings.values[0], couplings.values[:2].diff().sum()
        index = (x.reshape(-1, energy.event_shape.numel()).mT - first) / step
        drawn = _moved(couplings, index.round())
        x = (first + step * drawn).mT.contiguous().reshape(x.shape)
        if self.num_sweeps and not self.is_reversed:
            x = gibbs.sweep(energy, x)
        return x


class _Couplings(NamedTuple):
    """The energy (1).

    Attributes:
        values: That a site may take, shape ``(q,)``.
        edges: Shape ``(E, 2)``.
        strength: :math:`J`, shape ``(E,)``.
        fields: :math:`h`, shape ``(q, D)``, or ``None`` where there are none.
    """

    values: Tensor
    edges: Tensor
    strength: Tensor
    fields: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, energy: Energy) -> "_Couplings":
        """Take the potentials of an energy apart.

        Raises:
            ValueError: If they do not have the form (1).
        """
        factors = energy.factors() if isinstance(energy, SiteEnergy) else None
        if not isinstance(energy, SiteEnergy) or factors is None or energy.batch_shape:
            raise ValueError(
                "energy must be a sum of potentials of single sites and of pairs for "
                f"SwendsenWang, and {type(energy).__name__} is not known as one. Write "
                "it as pyro_ebm.energies.FactorGraphEnergy, or take pyro_ebm.mcmc.Gibbs"
                " or DiscreteLangevin."
            )
        values = energy.values
        fields = values.new_zeros(len(values), energy.event_shape.numel())
        parts = [_split(sites, table, fields) for sites, table in factors]
        edges = torch.cat([fields.new_zeros(0, 2).long(), *(e for e, _ in parts)])
        strength = torch.cat([fields.new_zeros(0), *(j for _, j in parts)])
        least = strength.min().item() if len(strength) else 0.0
        if least < 0:
            i, j = edges[strength.argmin()].tolist()
            raise ValueError(
                "couplings must not be negative for SwendsenWang, and the sites "
                f"{i} and {j} have {least:.3g}: they like to differ. Take "
                "pyro_ebm.mcmc.Gibbs, or ReplicaExchange with it; a lattice of two "
                "colours becomes a ferromagnet by flipping one of them."
            )
        has_fields = bool((fields != fields[:1]).any())
        return cls(values, edges, strength, fields if has_fields else None)


def _split(sites: Tensor, table: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    """Edges and couplings of one group of potentials; what sites have is added up."""
    arity = sites.shape[1]
    table = table.to(fields).expand(len(sites), *table.shape[1:])
    sites = sites.to(fields.device)
    if arity == 1:
        fields[: table.shape[1]].index_add_(1, sites[:, 0], table.mT)
        return sites.new_zeros(0, 2), fields.new_zeros(0)
    q = len(fields)
    if arity != 2 or table.shape[1:] != (q, q) or not table.isfinite().all():
        raise ValueError(
            "potentials of several sites must be of pairs with the same states, and "
            f"finite, for SwendsenWang; got one of {arity} sites with the states "
            f"{tuple(table.shape[1:])}. Take pyro_ebm.mcmc.Gibbs."
        )
    own = torch.eye(q).to(fields)
    diagonal = table.diagonal(dim1=1, dim2=2).sum(1)
    total = table.sum((1, 2))
    strength = (diagonal - total / q) / (q - 1)
    rest = table - strength[:, None, None] * own
    mean = rest.mean((1, 2), keepdim=True)
    rows, columns = rest.mean(2, keepdim=True), rest.mean(1, keepdim=True) - mean
    limit = _ROUNDING * (1 + table.abs().amax())
    if ((rest - rows - columns).abs() > limit).any():
        raise ValueError(
            "potentials of pairs must be a coupling of equal states, and what each "
            f"site has for itself, for SwendsenWang; those of {q} states got are "
            "not. Take pyro_ebm.mcmc.Gibbs."
        )
    strength = torch.where(strength.abs() < limit, 0.0, strength)
    # Of potentials without fields no more than rounding is left.
    for side, field in ((0, rows.squeeze(2)), (1, columns.squeeze(1))):
        field = field - field.mean(1, keepdim=True)
        field = torch.where(field.abs() < limit, 0.0, field)
        fields.index_add_(1, sites[:, side], field.mT)
    return sites, strength


def _moved(couplings: _Couplings, index: Tensor) -> Tensor:
    """New indices of the values, shape ``(D, C)`` as the old ones, by (2) and (3)."""
    values, edges, strength, fields = couplings
    q, number = len(values), index.shape[1]
    first, second = (index.index_select(0, end) for end in edges.unbind(1))
    draw = torch.rand_like(first)
    bonds = (first == second) & (draw < -torch.expm1(-strength)[:, None])
    bond = bonds.flatten().nonzero().squeeze(1)  # (2)
    edge = bond // number
    # Nodes are numbered as in the flattened index: site by site, then by chain.
    chain = bond - edge * number
    low, high = (end.index_select(0, edge) * number + chain for end in edges.unbind(1))
    root = _components(low, high, index.numel())
    if fields is None:
        drawn = torch.randint_like(index.flatten(), q)
        return drawn.index_select(0, root).reshape(index.shape)
    logits = fields.new_zeros(q, index.numel())
    wide = fields[:, :, None].expand(-1, -1, number).reshape(q, -1)
    logits.index_add_(1, root, wide)
    drawn = draw_index(logits, torch.rand_like(logits[0])).to(index)  # (3)
    return drawn.index_select(0, root).reshape(index.shape)


def _components(first: Tensor, second: Tensor, number: int) -> Tensor:
    """The smallest node that each of ``number`` nodes is connected with.

    Roots hook to smaller neighbouring roots, and paths are cut short, until no edge is
    left between two roots: about as many rounds as the logarithm of the largest size.
    """
    root = torch.arange(number, device=first.device)
    while len(first):
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        root[high] = low
        while not torch.equal(parent := root.index_select(0, root), root):
            root = parent
        first, second = root.index_select(0, low), root.index_select(0, high)
        is_open = (first != second).nonzero().squeeze(1)
        first, second = (end.index_select(0, is_open) for end in (first, second))
    return root
