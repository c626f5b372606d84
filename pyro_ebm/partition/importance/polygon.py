r"""Densities of single coordinates: straight lines between knots, and Pareto tails.

Between its first and its last knot :math:`x_1 < \dots < x_K` the density is

.. math::
    q(x) = \sum_k \alpha_k \frac{h_k(x)}{\int h_k}                           \tag{1}

with :math:`h_k` the hat that is one at :math:`x_k` and zero at its neighbours. The
shares are the mean heights of the hats at weighted draws. Below and above it is a
generalised Pareto density of the excess :math:`y` over the knot, with the mass
:math:`\tau` of the draws there,

.. math::
    q(y) = \frac\tau\sigma (1 + \xi y / \sigma)^{-1 - 1/\xi}                 \tag{2}

whose shape is the likeliest of a few, and whose median is that of the draws.

References:
    Jones, Samiuddin, Al-Harbey & Maatouk (1998), Biometrika 85, 235-241 (hats as
    kernels). Pickands (1975), Annals of Statistics 3, 119-131 (tails).
"""

__all__ = ["Polygons", "fit_polygons"]

from typing import NamedTuple

import torch
from torch import Tensor

#: Knots at quantiles, as many at equal distances; and effective draws for each.
_MIN_KNOTS, _MAX_KNOTS, _DRAWS_PER_KNOT = 8, 40, 80
#: What the draws of each tail hold together, and how many they are at least.
_TAIL, _TAIL_DRAWS = 0.01, 20
#: Shapes of a tail. The lightest is heavier than that of an exponential.
_SHAPES = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)
#: The tail of a proposal should be heavier than that of what it proposes for.
_HEAVIER = 0.1


class Polygons(NamedTuple):
    """A density for each of ``D`` coordinates, in double precision.

    Attributes:
        knots: Rising, shape ``(D, K)``.
        shares: Of the hats, shape ``(D, K)``.
        tails: Mass, scale and shape of the lower and the upper tail, ``(3, 2, D)``.
            Masses and shares have the sum 1.
    """

    knots: Tensor
    shares: Tensor
    tails: Tensor

    def sample(self, num: int) -> Tensor:
        """Independent draws, shape ``(num, D)``."""
        mass, scale, shape = self.tails
        parts = torch.cat([self.shares.mT, mass]).mT
        chosen = parts.multinomial(num, replacement=True)  # (D, num)
        dim, size = self.knots.shape
        k = chosen.clamp(max=size - 1)
        below, above = self._widths()
        near, lower, upper = (part.gather(1, k) for part in (self.knots, below, above))
        is_lower = torch.rand(dim, num).to(near) * (lower + upper) < lower
        away = 1 - torch.rand(dim, num).to(near).sqrt()
        draws = near + torch.where(is_lower, -lower, upper) * away
        for side, sign in ((0, -1), (1, 1)):
            xi, sigma = shape[side][:, None], scale[side][:, None]
            excess = sigma * torch.expm1(-xi * torch.rand(dim, num).to(xi).log()) / xi
            end = self.knots[:, -side][:, None]
            draws = torch.where(chosen == size + side, end + sign * excess, draws)
        return draws.mT

    def log_prob(self, x: Tensor) -> Tensor:
        """Log densities in nats at ``x`` of shape ``(N, D)``, the same shape."""
        x = x.mT.contiguous()
        values = self.shares / self._areas()
        low, t = _position(self.knots, x)
        density = (1 - t) * values.gather(1, low) + t * values.gather(1, low + 1)
        log_density = density.clamp(min=1e-300).log()
        for side, excess in enumerate(_excesses(self.knots, x)):
            mass, scale, shape = (part[side][:, None] for part in self.tails)
            outside = mass.log() + _log_pareto(excess.clamp(min=0.0), scale, shape)
            log_density = torch.where(excess > 0, outside, log_density)  # (2)
        return log_density.mT

    def _widths(self) -> tuple[Tensor, Tensor]:
        """Distances of each knot from the knots below and above, 0 where none is."""
        gaps = self.knots.diff()
        none = torch.zeros_like(gaps[:, :1])
        return torch.cat([none, gaps], 1), torch.cat([gaps, none], 1)

    def _areas(self) -> Tensor:
        """Integrals of the hats, shape ``(D, K)``."""
        below, above = self._widths()
        return (below + above) / 2


def fit_polygons(x: Tensor, weights: Tensor) -> Polygons:
    """Densities fitted to weighted draws.

    Args:
        x: Shape ``(N, D)``, finite.
        weights: Shape ``(N,)``, of sum 1.
    """
    effective = 1 / weights.square().sum().item()
    ordered, order = x.mT.contiguous().sort(-1)
    sorted_weights = weights[order]
    knots = _knots(ordered, sorted_weights, effective)
    tails = torch.stack(
        [
            _tail(excess, sorted_weights, effective)
            for excess in _excesses(knots, ordered)
        ],
        1,
    )
    low, t = _position(knots, ordered)
    inside = sorted_weights * ((ordered >= knots[:, :1]) & (ordered <= knots[:, -1:]))
    body = 1 - tails[0].sum(0)[:, None]
    empty = torch.zeros_like(knots)
    flat = Polygons(knots, empty, tails)._areas()
    shares = empty.scatter_add(1, low, inside * (1 - t))
    shares = shares.scatter_add(1, low + 1, inside * t)
    # No hat is empty, or the density would be zero between the draws.
    shares = shares + flat / flat.sum(1, keepdim=True) / effective
    shares = body * shares / shares.sum(1, keepdim=True)
    return Polygons(knots, shares, tails)


def _knots(ordered: Tensor, weights: Tensor, effective: float) -> Tensor:
    """Knots at quantiles and at equal distances, shape ``(D, K)``."""
    number = int(min(max(effective / _DRAWS_PER_KNOT / 2, _MIN_KNOTS), _MAX_KNOTS))
    end = min(max(_TAIL, _TAIL_DRAWS / effective), 0.1)
    levels = torch.linspace(end, 1 - end, number).to(ordered)
    reached = weights.cumsum(1)
    place = torch.searchsorted(reached, levels.expand(len(ordered), -1).contiguous())
    quantiles = ordered.gather(1, place.clamp(max=ordered.shape[1] - 1))
    low, high = quantiles[:, :1], quantiles[:, -1:]
    even = low + (high - low) * torch.linspace(0, 1, number + 2).to(ordered)[1:-1]
    knots = torch.cat([quantiles, even], 1).sort(1).values
    # Knots on top of each other, as draws may be, would make a spike.
    least = ((high - low) / (20 * number)).clamp(min=1e-9 * (1 + high.abs()))
    steps = least * torch.arange(knots.shape[1]).to(knots)
    return (knots - steps).cummax(1).values + steps


def _tail(excess: Tensor, weights: Tensor, effective: float) -> Tensor:
    """Mass, scale and shape (2) of one tail, shape ``(3, D)``.

    Args:
        excess: Of the draws over the knot, shape ``(D, N)``; not positive inside.
        weights: Of the draws, shape ``(D, N)``.
        effective: Number of draws.
    """
    own = weights * (excess > 0)
    total = own.sum(1)
    share = own / total.clamp(min=1e-300)[:, None]
    ordered, order = excess.sort(1)
    middle = (share.gather(1, order).cumsum(1) < 0.5).sum(1, keepdim=True)
    median = ordered.gather(1, middle.clamp(max=excess.shape[1] - 1))[:, 0]
    median = median.clamp(min=1e-9)
    shapes = _SHAPES.to(excess)[:, None]
    scales = shapes * median / torch.expm1(shapes * torch.log(torch.tensor(2.0)))
    scores = torch.stack(
        [
            (share * _log_pareto(excess.clamp(min=0), s[:, None], xi)).sum(1)
            for s, xi in zip(scales, shapes, strict=True)
        ]
    )
    shape = _SHAPES.to(excess)[scores.argmax(0)] + _HEAVIER
    scale = shape * median / torch.expm1(shape * torch.log(torch.tensor(2.0)))
    return torch.stack([total.clamp(min=1 / effective), scale, shape])


def _log_pareto(excess: Tensor, scale: Tensor, shape: Tensor) -> Tensor:
    return -scale.log() - (1 + 1 / shape) * (shape * excess / scale).log1p()


def _position(knots: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the knot below each of ``x``, and how far the next is, in [0, 1]."""
    low = torch.searchsorted(knots, x.detach()).sub(1).clamp(0, knots.shape[1] - 2)
    start, end = knots.gather(1, low), knots.gather(1, low + 1)
    return low, ((x - start) / (end - start)).clamp(0, 1)


def _excesses(knots: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """How far ``x`` is below the first knot, and above the last, ``(D, N)`` each."""
    return knots[:, :1] - x, x - knots[:, -1:]
