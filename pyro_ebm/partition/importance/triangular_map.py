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

That density consists of straight lines between knots, and Pareto tails. Between its
first and its last knot :math:`x_1 < \dots < x_K` the density is

.. math::
    q(x) = \sum_k \alpha_k \frac{h_k(x)}{\int h_k}                           \tag{2}

with :math:`h_k` the hat that is one at :math:`x_k` and zero at its neighbours. The
shares are the mean heights of the hats at weighted draws. Below and above it is a
generalised Pareto density of the excess :math:`y` over the knot, with the mass
:math:`\tau` of the draws there,

.. math::
    q(y) = \frac\tau\sigma (1 + \xi y / \sigma)^{-1 - 1/\xi}                 \tag{3}

whose shape is the likeliest of a few, and whose median is that of the draws.

References:
    Marzouk, Moselhy, Parno & Spantini (2016), Sampling via measure transport: an
    introduction. Handbook of Uncertainty Quantification.
    Jones, Samiuddin, Al-Harbey & Maatouk (1998), Biometrika 85, 235-241 (hats as
    kernels). Pickands (1975), Annals of Statistics 3, 119-131 (tails).
"""

__all__ = ["TriangularMap", "fit_map"]

import math
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


class _Polygons(NamedTuple):
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
            log_density = torch.where(excess > 0, outside, log_density)  # (3)
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


def _fit_polygons(x: Tensor, weights: Tensor) -> _Polygons:
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
    flat = _Polygons(knots, empty, tails)._areas()
    shares = empty.scatter_add(1, low, inside * (1 - t))
    shares = shares.scatter_add(1, low + 1, inside * t)
    # No hat is empty, or the density would be zero between the draws.
    shares = shares + flat / flat.sum(1, keepdim=True) / effective
    shares = body * shares / shares.sum(1, keepdim=True)
    return _Polygons(knots, shares, tails)


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
    """Mass, scale and shape (3) of one tail, shape ``(3, D)``.

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


#: Standard errors from zero at which a term is kept.
_SIGNIFICANT = 4.5
#: Nats below the median at which the log of a small residual counts.
_SMALL = 3.0
#: Steps of Fisher scoring, and the square of a residual of scale 1 that counts.
_NUM_SCORED, _MAX_SQUARE = 2, 16.0
#: Spreads beyond which a draw is where a map has overflown.
_FARTHEST = 1e60
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
    residuals: _Polygons

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
    # Squares of squares may overflow far out, and no weight of zero mends that.
    is_near = (z.abs() < _FARTHEST).all(1)
    z, weights = z[is_near], weights[is_near]
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
    residuals = _fit_polygons(residual * (-s).exp(), draws.weights)
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
