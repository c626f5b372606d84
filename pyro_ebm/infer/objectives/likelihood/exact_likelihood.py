r"""Maximum likelihood with an exact log Z, where the space is small enough.

.. math::
    \log q_\theta(x) &= -f_\theta(x) - \log Z(\theta), \qquad
    Z(\theta) = \sum_j v_j\, e^{-f_\theta(x_j)}                            \tag{1} \\
    \partial \log Z &= -\sum_j w_j\, \partial f_\theta(x_j), \qquad
    w_j = v_j\, e^{-f_\theta(x_j)} / Z                                     \tag{2}

Over a finite support the :math:`x_j` are all of its points, :math:`v_j = 1`, unless the
energy knows its log Z in closed form, as it must in more than three dimensions. In up
to three they are the nodes of the trapezoidal rule in unconstrained space, with
:math:`u = m + s \sinh t` as in :mod:`pyro_ebm.partition.exact.grid`. The grid is
shifted by a random part of a cell at each step, else the energy would be fitted at the
nodes and left free between them.

References:
    Trefethen & Weideman (2014), SIAM Review 56, 385-458.
"""

__all__ = ["ExactGrid", "ExactMaximumLikelihood"]

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.infer.objectives.objective import Need, Objective, Surrogate, Terms
from pyro_ebm.mcmc.samplers.persistent import StatefulModule
from pyro_ebm.partition.exact.grid import log_cosh

#: Points given to the energy at once.
_CHUNK = 2**18
#: The grid reaches to sinh(5), 74 standard deviations of the data, on either side.
_REACH = 5.0
#: Nodes of less weight than this part of the heaviest have no part in (2).
_NEGLIGIBLE = 1e-12
#: So few states are listed even where log Z has a closed form.
_FEW = 2**12


class ExactGrid(StatefulModule):
    r"""The position of the grid, and its findings at the last step.

    Attributes:
        loc: Mean of the first batch in unconstrained space, shape of the event.
        scale: Its standard deviation.
        log_partition: :math:`\log Z`, nats. Exactness: *exact* up to ``error``.
        error: By how much the two halves of the grid, as on a chessboard, differ in
            :math:`\log Z`, plus the part of ``Z`` that lies on its edge.
    """

    loc: Tensor
    scale: Tensor
    log_partition: Tensor
    error: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loc", torch.empty(0))
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("log_partition", torch.tensor(math.nan))
        self.register_buffer("error", torch.tensor(math.nan))

    def place(self, u: Tensor) -> None:
        """Put the grid where the data are, once; ``u`` has shape ``(N, *event)``."""
        if not self.loc.numel():
            self.loc = u.mean(0)
            scale = u.std(0, correction=0)
            self.scale = torch.where(scale > 0, scale, 1.0)


@final
@dataclass(frozen=True)
class ExactMaximumLikelihood(Objective):
    r"""Exact maximum likelihood (1), with log Z by quadrature or summation.

    Args:
        num_nodes: Nodes along each axis of the grid; default: 1,025 in one dimension,
            161 in two, 61 in three.
        max_states: Largest number of points of a finite support.

    Raises:
        ValueError: If a number is too small, or the energy has more than three real
            dimensions or more states than ``max_states``, and no closed form.

    Warns:
        UnreliableWarning: If the grid does not resolve the energy.

    Exactness: *exact* over a finite support; elsewhere up to the error of the
    trapezoidal rule, which is kept in the state and warned of beyond 0.01 nats.

    Cost: one value a node or state, and another, with gradient in the parameters, at
    those of more than 1e-12 of the largest weight; one value a data point.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> loss = ExactMaximumLikelihood().loss(energy, torch.tensor([[0.0], [1.0]]))
        >>> round(loss.item(), 4)  # log(2 pi) / 2 + 1 / 4
        1.1689
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    log_partition: ClassVar[Literal["exact"]] = "exact"
    is_pointwise: ClassVar[bool] = True

    num_nodes: int | None = None
    max_states: int = 2**20

    def __post_init__(self) -> None:
        if self.num_nodes is not None and self.num_nodes < 5:
            raise ValueError(f"num_nodes must be at least 5, got {self.num_nodes}.")
        if self.max_states < 1:
            raise ValueError(f"max_states must be at least 1, got {self.max_states}.")

    def make_state(self) -> ExactGrid:
        """A grid that has no place yet."""
        return ExactGrid()

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse a space that is too large; see :meth:`Objective.check`."""
        if _known(distribution.energy) is None:
            self._require_small(distribution.energy)

    def loss(self, model: Any, x: Tensor, state: nn.Module | None = None) -> Tensor:
        """See :meth:`Objective.loss`; without a state the grid is placed by ``x``."""
        return super().loss(model, x, self.make_state() if state is None else state)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy, grid = distribution.energy, cast(ExactGrid, state)
        if _known(energy) is None:
            self._require_small(energy)
        found: list[Tensor] = []

        def surrogate(x: Tensor) -> Terms:
            if not found:
                known = _known(energy)
                found.append(
                    self._log_partition(energy, x, grid) if known is None else known
                )
            value = energy(x)
            return Terms(-value - found[0], value)  # (1)

        return surrogate

    def _require_small(self, energy: Energy) -> None:
        # Those of the visible units: a machine's smaller layer has the same log Z, but
        # not the expectations of its points.
        count = num_points(energy.support, energy.event_shape)
        if count is not None and count > self.max_states:
            raise ValueError(
                f"energy has 2^{math.log2(count):.4g} states, more than max_states = "
                f"{self.max_states:,}. Take NoiseContrastive, or raise max_states."
            )
        if count is None and energy.event_shape.numel() > 3:
            raise ValueError(
                "energy must have a closed form, a finite support or at most 3 "
                "dimensions to be integrated exactly, got event_shape "
                f"{tuple(energy.event_shape)}. Take MaximumLikelihood or "
                "NoiseContrastive."
            )

    def _log_partition(self, energy: Energy, x: Tensor, state: ExactGrid) -> Tensor:
        """Log Z with its gradient (2) in the parameters."""
        grid_energy, nodes = self._nodes(energy, x, state)
        with torch.no_grad():
            values = [grid_energy(part) for part in nodes.x.split(_CHUNK)]
            log_terms = nodes.log_volume - torch.cat(values).to(nodes.log_volume)
            log_partition = torch.logsumexp(log_terms, 0)  # (1)
            weights = (log_terms - log_partition).exp()
            self._judge(state, nodes, log_terms, log_partition)
            kept = weights > _NEGLIGIBLE * weights.max()
        expected = weights[kept].to(x) @ grid_energy(nodes.x[kept])  # (2)
        return log_partition.to(x) - (expected - expected.detach())

    def _nodes(
        self, energy: Energy, x: Tensor, state: ExactGrid
    ) -> "tuple[Energy, _Nodes]":
        options = energy.tensor_options(x)
        count = num_points(energy.support, energy.event_shape)
        if count is not None:
            return energy, _states(energy, count, torch.empty(0, **options))
        flat, to_support = unconstrained(energy)
        with torch.no_grad():
            u = to_support.inv(x.to(**options)).reshape(-1, *flat.event_shape)
            state.place(u)
            per_side = self.num_nodes or (1025, 161, 61)[flat.event_shape.numel() - 1]
            return flat, _grid(state, flat.event_shape, per_side)

    def _judge(
        self, state: ExactGrid, nodes: "_Nodes", log_terms: Tensor, total: Tensor
    ) -> None:
        state.log_partition = total.to(state.log_partition)
        if nodes.is_black is None:
            state.error = torch.zeros_like(state.error)
            return
        black, white = nodes.is_black, ~nodes.is_black
        halves = log_terms[black].logsumexp(0) - log_terms[white].logsumexp(0)
        edge = (log_terms[nodes.is_edge] - total).exp().sum()
        state.error = (halves.abs() + edge).to(state.error)
        if not state.error < 0.01:
            warnings.warn(
                f"the grid of ExactMaximumLikelihood is off by about "
                f"{state.error.item():.2g} nats in log Z: the energy has finer detail "
                "than its cells, or mass beyond its edge. Raise num_nodes, or bound "
                "the energy by a base.",
                UnreliableWarning,
                stacklevel=2,
            )


def _known(energy: Energy) -> Tensor | None:
    """Log Z with its gradient, where the energy knows it and there are many points."""
    count = num_points(energy.support, energy.event_shape)
    is_small = energy.event_shape.numel() <= 3 if count is None else count <= _FEW
    if is_small and not (count is None and energy.support.is_discrete):
        return None  # listing them, or a grid, takes less time
    known = energy.closed_form()
    return None if known is None else known.log_partition


class _Nodes(NamedTuple):
    """Nodes ``(N, *event)`` and log-volumes ``(N,)``; of grids, colour and edge."""

    x: Tensor
    log_volume: Tensor
    is_black: Tensor | None = None
    is_edge: Tensor | None = None


def _states(energy: Energy, count: int, like: Tensor) -> _Nodes:
    number = torch.arange(count, device=like.device)
    x = finite_points(energy.support, energy.event_shape, number, like)
    return _Nodes(x, x.new_zeros(len(x), dtype=torch.float64))


def _grid(state: ExactGrid, event_shape: torch.Size, per_side: int) -> _Nodes:
    """The trapezoidal rule in ``t``, in double precision, shifted at random."""
    dim = event_shape.numel()
    index = torch.arange(per_side, device=state.loc.device)
    indices = torch.cartesian_prod(*[index] * dim).reshape(-1, dim)
    step = 2 * _REACH / (per_side - 1)
    shift = torch.rand(dim, device=state.loc.device, dtype=torch.float64) - 0.5
    t = (indices + shift) * step - _REACH
    scale = state.scale.double().reshape(-1)
    u = state.loc.double().reshape(-1) + scale * t.sinh()
    log_volume = (scale.log() + log_cosh(t)).sum(-1) + dim * math.log(step)
    is_edge = ((indices == 0) | (indices == per_side - 1)).any(-1)
    u = u.to(state.loc.dtype).reshape(-1, *event_shape)
    return _Nodes(u, log_volume, indices.sum(-1) % 2 == 0, is_edge)
