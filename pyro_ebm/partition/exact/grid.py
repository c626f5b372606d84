r"""Integration grids around modes, for densities of up to three coordinates.

Around the mode ``k`` the coordinates follow its curvature, with a root :math:`A_k` of
the inverse Hessian, and power-law tails die out exponentially in :math:`t`:

.. math::
    u = m_k + A_k \sinh(t), \qquad
    Z = \sum_k \int w_k(u)\, e^{-f(u)} \left|\det A_k\right|
        \prod_i \cosh(t_i)\, dt                                             \tag{1}

The trapezoidal rule errs by exponentially little on a smooth integrand that dies out at
both ends. The shares :math:`w_k` sum to one, and are those of the Gaussians of mass
:math:`M_k` at the modes,

.. math::
    w_k(u) \propto M_k\, \mathcal{N}(u; m_k, A_k A_k^\top)                   \tag{2}

so that each integrand is as smooth as its mode is wide.

References:
    Trefethen & Weideman (2014), SIAM Review 56, 385-458.
"""

__all__ = ["Grid", "Sum", "log_cosh"]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.partition.exact.modes import Modes

#: Log-density below the peak at which the integrand is taken for zero.
_CUT = 36.0
#: sinh(340) squared is 1e295: beyond it double precision ends.
_REACH = 340.0
#: Points a side of the first look for a box: around one mode, and around each of many.
_ONE, _EACH = {1: 1025, 2: 97, 3: 33}, {1: 129, 2: 33, 3: 17}
#: The same to see whether a box is large enough, and how often it is let out.
_GROWN, _MAX_GROWN = {1: 129, 2: 33, 3: 13}, 12
#: Nodes a side from which on cells without mass are left out of finer grids.
_DENSE = {1: 2048, 2: 150, 3: 50}
#: Width below which a box is shrunk no more.
_NARROWEST = 1e-9
#: Cells by which a box is wider than what lies above the cut.
_MARGIN = 1.0


class Sum(NamedTuple):
    """The sum of the integrand over all nodes.

    Attributes:
        value: Its logarithm.
        peak: Largest log-integrand less log-volume: of the density itself.
        edge: Log-mass per unit of ``t`` at the ends of the boxes.
        drop: How far the integrand has fallen there from its peak.
        lost: Logarithm of the part of the sum that lies at nodes of doubtful place.
        mean: Mean of ``t`` for each mode, shape ``(K, D)``.
        deviation: Its standard deviation.
        log_masses: Of the pieces, shape ``(K,)``.
    """

    value: float
    peak: float
    edge: float
    drop: float
    lost: float
    mean: Tensor
    deviation: Tensor
    log_masses: Tensor


class Grid:
    """The coordinates (1), with boxes that contain all of the mass.

    Args:
        density: Log-density at points of shape ``(N, D)``.
        modes: Around which the grids lie.
        limit: Largest coordinate of ``u`` that may be looked at.
    """

    def __init__(
        self, density: Callable[[Tensor], Tensor], modes: Modes, limit: float
    ) -> None:
        self.density = density
        self.number, self.dim = modes.loc.shape
        room = (limit - modes.loc.abs().amax(-1)).clamp(min=limit / 2)
        size = modes.root.abs().amax(-2)  # (K, D): the farthest that an axis goes
        # A mode of hardly any curvature is no wider than what can be seen.
        narrower = (room[:, None] / size).clamp(max=1.0)
        self.modes = modes._replace(root=modes.root * narrower.unsqueeze(-2))
        self.log_volume = torch.linalg.slogdet(self.modes.root).logabsdet
        size = size * narrower
        reach = (room[:, None] / size).log().clamp(max=_REACH) + math.log(2)
        reach = reach.clamp(min=1.0, max=_REACH)
        self.largest = torch.stack([-reach, reach], -1)  # (K, D, 2)
        self.boxes = self.largest
        self.cells: list[_Cells | None] = [None] * self.number

    def points(self, k: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """Points at ``t`` of shape ``(N, D)``, and logarithms of the volume in (1)."""
        u = self.modes.loc[k] + t.sinh() @ self.modes.root[k].mT
        return u, self.log_volume[k] + log_cosh(t).sum(-1)

    def log_share(self, k: int, u: Tensor) -> Tensor:
        """Logarithm of (2), shape ``(N,)``."""
        if self.number == 1:
            return torch.zeros_like(u[:, 0])
        return self.log_shares(u)[k]

    def log_shares(self, u: Tensor) -> Tensor:
        """Logarithms of (2) for all modes, shape ``(K, N)``."""
        away = (u - self.modes.loc[:, None]).mT  # (K, D, N)
        square = torch.linalg.solve(self.modes.root, away).square().sum(1)
        weight = (self.modes.log_mass - self.log_volume)[:, None] - square / 2
        return weight.log_softmax(0)  # (2)

    def log_integrand(self, k: int, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """That of (1), the points, and the density itself."""
        u, log_volume = self.points(k, t)
        density = self.density(u)
        return log_volume + density + self.log_share(k, u), u, density

    def find_boxes(self, known: Tensor, density: Tensor) -> None:
        """Shrink all boxes to where the integrand is above the cut.

        Args:
            known: Points of known log-density, which the boxes have to hold if they are
                above the cut, shape ``(N, D)``.
            density: Shape ``(N,)``.
        """
        peak = density.max()
        boxes = []
        for k in range(self.number):
            box = self._grown(k, self._shrunk(k, peak))
            inside = torch.linalg.solve(
                self.modes.root[k], (known - self.modes.loc[k]).mT
            )
            t = inside.mT.asinh()
            share = self.log_share(k, known)
            matters = density + share + log_cosh(t).sum(-1) > peak - _CUT
            if matters.any():
                low = torch.minimum(box[:, 0], t[matters].amin(0) - 0.5)
                high = torch.maximum(box[:, 1], t[matters].amax(0) + 0.5)
                box = torch.stack([low, high], -1)
            boxes.append(box.clamp(self.largest[k, :, :1], self.largest[k, :, 1:]))
        self.boxes = torch.stack(boxes)
        self.cells = [None] * self.number

    def _shrunk(self, k: int, peak: Tensor) -> Tensor:
        box = self.largest[k]
        per_side = (_ONE if self.number == 1 else _EACH)[self.dim]
        for _ in range(12):
            t, step = _nodes(box, per_side, 0.0)
            value, _, _ = self.log_integrand(k, t)
            top = torch.maximum(value.max(), peak + self.log_volume[k])
            chosen = t[value >= top - _CUT]
            if not len(chosen):
                chosen = t[value >= value.max()]
                if not value.max().isfinite():
                    break
            width = box[:, 1] - box[:, 0]
            low = torch.maximum(chosen.amin(0) - _MARGIN * step, box[:, 0])
            high = torch.minimum(chosen.amax(0) + _MARGIN * step, box[:, 1])
            if (high - low < _NARROWEST).any():  # it rises up to a corner
                break
            box = torch.stack([low, high], -1)
            if ((high - low) / width).min() > 0.8:
                break
        return box

    def _grown(self, k: int, box: Tensor) -> Tensor:
        """Let out the sides where the integrand has not died out."""
        per_side = _GROWN[self.dim]
        for _ in range(_MAX_GROWN):
            t, step = _nodes(box, per_side, 0.0)
            value, _, _ = self.log_integrand(k, t)
            alive = t[value > value.max() - _CUT + 6]
            if not len(alive):
                break
            size = box[:, 1] - box[:, 0]
            low = box[:, 0] - 0.5 * size * (alive.amin(0) < box[:, 0] + step / 2)
            high = box[:, 1] + 0.5 * size * (alive.amax(0) > box[:, 1] - step / 2)
            wider = torch.stack([low, high], -1)
            wider = wider.clamp(self.largest[k, :, :1], self.largest[k, :, 1:])
            if torch.equal(wider, box):
                break
            box = wider
        return box

    def cost(self, per_side: int) -> int:
        """Evaluations of a sum."""
        return self.number * per_side**self.dim

    def sum(
        self,
        per_side: int,
        *,
        shift: float = 0.0,
        stretch: float = 1.0,
        is_placed: Callable[[Tensor], Tensor] | None = None,
    ) -> Sum:
        """The trapezoidal rule on all boxes.

        Args:
            per_side: Nodes a side of each box.
            shift: Of the nodes, as a part of a cell.
            stretch: Of the boxes about their middle.
            is_placed: Tells of points whether a bijection has put them in their place.
        """
        pieces = [
            self._piece(k, per_side, shift, stretch, is_placed)
            for k in range(self.number)
        ]
        logs = torch.stack([torch.stack(piece[:5]) for piece in pieces])  # (K, 5)
        value, lost, edge = logs[:, :3].logsumexp(0).tolist()
        drop = (logs[:, 3].max() - logs[:, 4].max()).item()
        return Sum(
            value,
            max(piece[5] for piece in pieces),
            edge,
            drop,
            lost,
            torch.stack([piece[6] for piece in pieces]),
            torch.stack([piece[7] for piece in pieces]),
            logs[:, 0],
        )

    def _piece(
        self,
        k: int,
        per_side: int,
        shift: float,
        stretch: float,
        is_placed: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor]:
        middle = self.boxes[k].mean(-1, keepdim=True)
        box = middle + stretch * (self.boxes[k] - middle)
        box = box.clamp(self.largest[k, :, :1], self.largest[k, :, 1:])
        t, step = _nodes(box, per_side, shift)
        cells = self.cells[k]
        if cells is not None:
            is_held = cells.hold(t)
            t = t[is_held] if is_held.any() else t[:1]
        log_values, u, density = self.log_integrand(k, t)
        if shift == 0 and per_side >= _DENSE[len(box)]:
            self.cells[k] = _Cells.around(box, per_side, t, log_values)
        cell = step.log().sum()
        value = log_values.logsumexp(0) + cell
        # Half of the outermost nodes' mass, as if the box ended there.
        is_end = ((t - box[:, 0] < step) | (box[:, 1] - t < step)).any(-1)
        ends = log_values.masked_fill(~is_end, -torch.inf)
        edge = ends.logsumexp(0) + cell - step.log().min()
        lost = torch.full_like(value, -torch.inf)
        if is_placed is not None:
            doubtful = log_values.masked_fill(is_placed(u), -torch.inf)
            lost = doubtful.logsumexp(0) + cell
        weights = (log_values - log_values.logsumexp(0)).exp().nan_to_num()[:, None]
        mean = (weights * t).sum(0)
        deviation = (weights * (t - mean).square()).sum(0).sqrt()
        top = log_values.max()
        return value, lost, edge, top, ends.max(), density.max().item(), mean, deviation


class _Cells(NamedTuple):
    """Cells of a grid that have mass: only there a finer grid is evaluated."""

    low: Tensor  # (D,): a corner of the box
    step: Tensor  # (D,)
    is_full: Tensor  # (per_side, ..., per_side): by the node at its lower corner

    @staticmethod
    def around(
        box: Tensor, per_side: int, t: Tensor, log_values: Tensor
    ) -> "_Cells | None":
        """Those at, and next to, nodes of shape ``(N, D)`` above the cut."""
        dim = len(box)
        step = (box[:, 1] - box[:, 0]) / (per_side - 1)
        is_full = torch.zeros((per_side,) * dim, dtype=torch.bool, device=t.device)
        chosen = t[log_values >= log_values.max() - _CUT - 4]
        index = ((chosen - box[:, 0]) / step).round().long()
        is_full[tuple(index.mT)] = True
        for axis in range(dim):  # two cells to either side
            grown = is_full
            for shift in (-2, -1, 1, 2):
                grown = grown | is_full.roll(shift, axis)
            is_full = grown
        return _Cells(box[:, 0], step, is_full)

    def hold(self, t: Tensor) -> Tensor:
        """Which points lie in such a cell, or outside of all cells, shape ``(N,)``."""
        index = ((t - self.low) / self.step).floor().long()
        last = len(self.is_full) - 1
        is_out = ((index < 0) | (index >= last)).any(-1)
        return is_out | self.is_full[tuple(index.clamp(0, last).mT)]


def _nodes(box: Tensor, per_side: int, shift: float) -> tuple[Tensor, Tensor]:
    """Nodes of a grid, shape ``(per_side^D, D)``, and the size of a cell."""
    step = (box[:, 1] - box[:, 0]) / (per_side - 1)
    unit = torch.arange(per_side).to(box) + shift
    axes = [low + size * unit for low, size in zip(box[:, 0], step, strict=True)]
    return torch.cartesian_prod(*axes).reshape(-1, len(box)), step


def log_cosh(t: Tensor) -> Tensor:
    """Logarithm of cosh, without overflow."""
    return t.abs() + torch.nn.functional.softplus(-2 * t.abs()) - math.log(2)
