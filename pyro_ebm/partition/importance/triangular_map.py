r"""A proposal coordinate by coordinate, each given those before it.

.. math::
    z_i = m_i(z_{<i}) + e^{s_i(z_{<i})}\, \varepsilon_i, \qquad
    \varepsilon_i \sim q_i                                                 \tag{1}

The coordinates are in units of their own spread, in an order in which those that tell
most of the others come first. The location :math:`m_i` and the log-scale :math:`s_i`
are sums of earlier coordinates and their squares, by least squares and with those terms
alone that are far from zero in units of their standard errors; the density :math:`q_i`
of what is left is a polygon with Pareto tails. So the map is exact, but for the
polygons, for products of any marginals, and for ridges and funnels in which one
coordinate bends or narrows those that follow it.

References:
    Marzouk, Moselhy, Parno & Spantini (2016), Sampling via measure transport: an
    introduction. Handbook of Uncertainty Quantification.
"""

__all__ = ["TriangularMap", "fit_map"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.partition.importance.polygon import Polygons, fit_polygons

#: Standard errors from zero at which a term is kept.
_SIGNIFICANT = 4.5
#: Nats below the median at which the log of a small residual counts.
_SMALL = 3.0
#: Steps of Fisher scoring, and the square of a residual of scale 1 that counts.
_NUM_SCORED, _MAX_SQUARE = 2, 16.0
#: Nats that the largest and the smallest scales may be beyond those of the draws.
_BEYOND = 0.5


class TriangularMap(NamedTuple):
    """The distribution (1) over flat vectors, in double precision.

    Attributes:
        order: The coordinates in the order of the map, shape ``(D,)``.
        loc: What is subtracted from them, in their own order, shape ``(D,)``.
        scale: What they are then divided by, shape ``(D,)``.
        location: Coefficients of :math:`m`, shape ``(D, 2 D + 1)``, in the order of
            the map: of one, and of each coordinate and its square.
        log_scale: Those of :math:`s`, the same shape.
        limits: Least and largest :math:`s`, shape ``(2, D)``.
        residuals: The densities :math:`q_i`.
    """

    order: Tensor
    loc: Tensor
    scale: Tensor
    location: Tensor
    log_scale: Tensor
    limits: Tensor
    residuals: Polygons

    @property
    def has_terms(self) -> bool:
        """Whether a coordinate depends on those before it."""
        return bool((self.location[:, 1:] != 0).any() or self.log_scale[:, 1:].any())

    def sample(self, num: int) -> Tensor:
        """Independent draws, shape ``(num, D)``."""
        residuals = self.residuals.sample(num)
        terms = _terms(torch.zeros_like(residuals))
        z = []
        for i, residual in enumerate(residuals.unbind(1)):
            width = 2 * i + 1
            before = terms[:, :width]
            log_scale = (before @ self.log_scale[i, :width]).clamp(*self.limits[:, i])
            z.append(before @ self.location[i, :width] + log_scale.exp() * residual)
            terms[:, width], terms[:, width + 1] = z[i], z[i].square()
        draws = torch.stack(z, 1)[:, self.order.argsort()]
        return self.loc + self.scale * draws

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density in nats, shape ``(N,)`` for ``u`` of shape ``(N, D)``."""
        z = ((u - self.loc) / self.scale)[:, self.order]
        terms = _terms(z)
        log_scale = (terms @ self.log_scale.mT).clamp(*self.limits)
        residuals = (z - terms @ self.location.mT) * (-log_scale).exp()
        log_density = self.residuals.log_prob(residuals) - log_scale
        return log_density.sum(1) - self.scale.log().sum()


def fit_map(u: Tensor, weights: Tensor, num_independent: float) -> TriangularMap:
    """A map fitted to weighted draws.

    Args:
        u: Draws, shape ``(N, D)``.
        weights: Shape ``(N,)``, of sum 1.
        num_independent: Draws that these are worth, by which a term is told from
            chance.
    """
    loc, scale = _quantile_scale(u, weights)
    z = (u - loc) / scale
    draws = _Draws(weights, num_independent)
    given, told = torch.arange(u.shape[1], device=u.device), _order(z, draws)
    orders = [given] if told.equal(given) else [given, told]
    maps = [_fit_in_order(z[:, order], draws, order) for order in orders]
    best = max(maps, key=lambda found: (weights @ found.log_prob(z)).item())
    return best._replace(loc=loc, scale=scale)


class _Draws(NamedTuple):
    """Weights of draws, shape ``(N,)``, of sum 1, and what the draws are worth."""

    weights: Tensor
    number: float


def _fit_in_order(z: Tensor, draws: _Draws, order: Tensor) -> TriangularMap:
    """The map of draws of location 0 and scale 1 that are in its order."""
    terms = _terms(z)
    location = _regressed(terms, z, draws)
    residual = z - terms @ location.mT
    log_size = _log_size(residual)
    log_scale = _regressed(terms, log_size, draws)
    limits = torch.stack([log_size.amin(0), log_size.amax(0)])
    for i in (log_scale[:, 1:] != 0).any(1).nonzero().flatten().tolist():
        # What has a scale of its own is fitted once more, by the inverse variances.
        own, least, most = terms[:, : 2 * i + 1], *limits[:, i]
        s = (own @ log_scale[i, : 2 * i + 1]).clamp(least, most)
        for _ in range(_NUM_SCORED):
            known = draws._replace(weights=(draws.weights.log() - 2 * s).softmax(0))
            location[i, : 2 * i + 1] = _last(own, z[:, i], known)
            residual[:, i] = z[:, i] - own @ location[i, : 2 * i + 1]
            # A step of Fisher scoring: too narrow is worse than too wide.
            square = (residual[:, i] * (-s).exp()).square()
            square = square / (draws.weights @ square)
            s = s + square.clamp(max=_MAX_SQUARE) / 2
            log_scale[i, : 2 * i + 1] = _last(own, s, draws)
            s = (own @ log_scale[i, : 2 * i + 1]).clamp(least, most)
    s = (terms @ log_scale.mT).clamp(*limits)
    limits = torch.stack([s.amin(0) - _BEYOND, s.amax(0) + _BEYOND])
    residuals = fit_polygons(residual * (-s).exp(), draws.weights)
    zero = torch.zeros_like(z[0])
    return TriangularMap(order, zero, zero + 1, location, log_scale, limits, residuals)


def _terms(z: Tensor) -> Tensor:
    """One, then each coordinate and its square, shape ``(N, 2 D + 1)``."""
    pairs = torch.stack([z, z.square()], -1).flatten(1)
    return torch.cat([torch.ones_like(z[:, :1]), pairs], 1)


def _quantile_scale(u: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Medians, and spreads by quartiles, shape ``(D,)`` each."""
    ordered, order = u.sort(0)
    reached = weights[order].cumsum(0)
    low, middle, high = (
        ordered.gather(0, (reached < part).sum(0, keepdim=True).clamp(max=len(u) - 1))
        for part in (0.25, 0.5, 0.75)
    )
    return middle[0], ((high - low) / 1.349)[0].clamp(min=1e-12)


def _log_size(residual: Tensor) -> Tensor:
    """Logs of absolute residuals; a very small one says no more than a small one."""
    log_size = residual.abs().clamp(min=1e-300).log()
    return log_size.maximum(log_size.median(0).values - _SMALL)


def _order(z: Tensor, draws: _Draws) -> Tensor:
    """The coordinates by how much more they tell of others than those of them."""
    size = _log_size(z)
    told = _told(z, z, draws) + _told(z, size, draws)
    told.fill_diagonal_(0.0)
    return (told - told.mT).sum(1).argsort(descending=True, stable=True)


def _told(z: Tensor, y: Tensor, draws: _Draws) -> Tensor:
    """Nats that coordinate ``i`` and its square tell of column ``j``, ``(D, D)``."""
    weights = draws.weights

    def standard(x: Tensor) -> Tensor:
        x = x - weights @ x
        return x / (weights @ x.square()).clamp(min=1e-300).sqrt()

    first, square, y = standard(z), standard(z.square()), standard(y)
    own = (weights[:, None] * first * square).sum(0)[:, None].clamp(-0.999, 0.999)
    a = (weights[:, None] * first).mT @ y
    b = (weights[:, None] * square).mT @ y
    explained = (a.square() + b.square() - 2 * own * a * b) / (1 - own.square())
    is_seen = explained > _SIGNIFICANT**2 / draws.number
    return torch.where(is_seen, -torch.log1p(-explained.clamp(max=1 - 1e-9)) / 2, 0.0)


def _regressed(terms: Tensor, y: Tensor, draws: _Draws) -> Tensor:
    """Coefficients of each column of ``y`` on the terms before it, ``(D, 2 D + 1)``."""
    weighted = terms * draws.weights[:, None]
    gram, products = weighted.mT @ terms, weighted.mT @ y
    squares = draws.weights @ y.square()
    found = torch.zeros_like(terms[: y.shape[1]])
    for i, row in enumerate(found):
        n = 2 * i + 1
        row[:n] = _selected(gram[:n, :n], products[:n, i], squares[i], draws.number)
    return found


def _last(terms: Tensor, y: Tensor, draws: _Draws) -> Tensor:
    """Coefficients of one column on all terms, shape ``(F,)``."""
    weighted = terms * draws.weights[:, None]
    square = draws.weights @ y.square()
    return _selected(weighted.mT @ terms, weighted.mT @ y, square, draws.number)


def _selected(gram: Tensor, product: Tensor, square: Tensor, number: float) -> Tensor:
    """Least squares, without the terms that are near zero, shape ``(F,)``."""
    kept = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    found = torch.zeros_like(product)
    while True:
        part = gram[kept][:, kept]
        unit = part.diagonal().clamp(min=1e-300).rsqrt()
        eye = torch.eye(len(part)).to(part)
        scaled = part * unit * unit[:, None] + 1e-10 * eye
        inverse = unit * torch.linalg.inv(scaled) * unit[:, None]
        coefficients = inverse @ product[kept]
        left = (square - coefficients @ product[kept]).clamp(min=1e-12 * square)
        error = (left * inverse.diagonal() / number).clamp(min=0).sqrt()
        is_far = coefficients.abs() > _SIGNIFICANT * error
        is_far[0] = True  # the constant
        if is_far.all():
            found[kept] = coefficients
            return found
        # At most half of them at once: terms that stand for each other look small.
        ratio = coefficients.abs() / error.clamp(min=1e-300)
        ratio[0] = math.inf
        worst = ratio.argsort()[: max(1, int((~is_far).sum()) // 2)]
        kept[kept.nonzero().flatten()[worst]] = False
