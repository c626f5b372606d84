r"""A triangular map that undoes the dependence between the coordinates of draws.

Coordinate by coordinate, with features of those before it,

.. math::
    x_k   &= \mu_k(x_{<k}) + e^{s_k(x_{<k})}\, z_k                            \\
    \mu_k &= a_k + \sum_{j<k} b_{kj} x_j + c_{kj} x_j^2, \qquad
    s_k = d_k + \sum_{j<k} g_{kj} x_j                                      \tag{1}

so that a correlation, a bend and a funnel are all within reach, and the coefficients
extrapolate: a funnel that was seen in part is followed into its neck. Most of them are
zero: a term enters only where its correlation :math:`\rho` with the residual, or
with the size of the residual, is worth more than it costs,

.. math::
    -n \log(1 - \rho^2) > \log n + 2 \log 3 k                              \tag{2}

for :math:`n` effective draws, an extended Bayesian information criterion.

What the draws leave open about the coefficients widens the scale. Features
:math:`\phi, \psi` of the location and the log scale, with covariances :math:`C, G` of
their coefficients, give

.. math::
    s_k \leftarrow s_k + (\psi^\top G\, \psi)^{1/2}
        + \tfrac12 \log(1 + e^{-2 s_k}\, \phi^\top C \phi)                \tag{3}

which is next to nothing among the draws and grows beyond them: an extrapolation that
may be wrong is made wide, so that draws of it find the mass where it is.

References:
    Marzouk, Moselhy, Parno & Spantini (2016), Handbook of Uncertainty Quantification
    (triangular transport maps).
    Chen & Chen (2008), Biometrika 95, 759-771 (the criterion).
"""

__all__ = ["TriangularTransform", "fit_triangular"]

import math
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_ebm.partition.importance.marginals import spread_of

#: Degrees of freedom of the Student t by which outliers count less.
_DEGREES = 5.0
_MAX_TERMS = 40
#: How far a log scale may go beyond those of the draws that it was fitted to.
_MAX_EXTRAPOLATION = 3.0


class _Column(NamedTuple):
    """One coordinate of (1) with (3).

    Attributes:
        location_terms: Indices of the features of the location.
        location: Their coefficients.
        location_root: A root of their covariance, ``(p, p)``.
        scale_terms: Indices of the features of the log scale.
        log_scale: Their coefficients.
        scale_root: A root of their covariance.
        bounds: Least and largest log scale.
    """

    location_terms: list[int]
    location: Tensor
    location_root: Tensor
    scale_terms: list[int]
    log_scale: Tensor
    scale_root: Tensor
    bounds: tuple[float, float]

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log scale, shape ``(*batch,)``."""
        first = features[..., self.location_terms]
        second = features[..., self.scale_terms]
        s = (second @ self.log_scale).clamp(*self.bounds)
        s = s + torch.linalg.vector_norm(second @ self.scale_root, dim=-1)
        doubt = (first @ self.location_root).square().sum(-1)
        return first @ self.location, s + (doubt * (-2 * s).exp()).log1p() / 2  # (3)


@final
class TriangularTransform(Transform):
    """The map (1) from independent ``z`` to ``x``, over vectors of size ``D``.

    Args:
        center: Subtracted from ``x`` before (1), shape ``(D,)``.
        spread: Divides ``x`` after that, shape ``(D,)``.
        columns: The coordinates, in their order.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, center: Tensor, spread: Tensor, columns: list[_Column]) -> None:
        super().__init__()
        self.center, self.spread, self.columns = center, spread, columns

    def _call(self, z: Tensor) -> Tensor:
        x = torch.zeros_like(z)
        for k, column in enumerate(self.columns):
            location, log_scale = column(_features(x))
            x[..., k] = location + log_scale.exp() * z[..., k]  # (1)
        return x * self.spread + self.center

    def _inverse(self, y: Tensor) -> Tensor:
        x = (y - self.center) / self.spread
        location, log_scale = self._coefficients(x)
        return (x - location) * (-log_scale).exp()

    def log_abs_det_jacobian(self, z: Tensor, y: Tensor) -> Tensor:
        """Sum of the log scales, shape ``(*batch,)``."""
        _, log_scale = self._coefficients((y - self.center) / self.spread)
        return (log_scale + self.spread.log()).sum(-1)

    def _coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = _features(x)
        location, log_scale = zip(*(f(features) for f in self.columns), strict=True)
        return torch.stack(location, -1), torch.stack(log_scale, -1)


def fit_triangular(u: Tensor, num_effective: float) -> TriangularTransform:
    """Fit (1) to draws, adding one term after the other by (2).

    Args:
        u: Draws of shape ``(N, D)``.
        num_effective: How many independent draws they are worth.
    """
    center, spread = u.median(0).values, spread_of(u)
    x = (u - center) / spread
    features = _features(x)
    selection = _features(x.clamp(-4, 4))
    selection = selection - selection.mean(0)
    selection = selection / selection.norm(dim=0).clamp(min=1e-9)
    columns = []
    for k in range(u.shape[-1]):
        fit = _Conditional(features, x[:, k])
        fit.grow(selection, k, num_effective)
        columns.append(fit.column(num_effective))
    return TriangularTransform(center, spread, columns)


def _features(x: Tensor) -> Tensor:
    """``(1, x, x^2)`` along the last dimension."""
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square()], -1)


class _Conditional:
    """One coordinate given those before it.

    Args:
        features: Shape ``(N, 2 D + 1)``.
        y: The coordinate, shape ``(N,)``.
    """

    def __init__(self, features: Tensor, y: Tensor) -> None:
        self.features, self.y = features, y
        self.location_terms, self.scale_terms = [0], [0]
        self._fit()

    def grow(self, selection: Tensor, k: int, num_effective: float) -> None:
        """Add terms by (2), the most telling first.

        Args:
            selection: Centred features of unit norm, without outliers.
            k: Index of the coordinate; its terms are those of the ones before.
            num_effective: Independent draws.
        """
        dim = (selection.shape[-1] - 1) // 2
        linear = list(range(1, k + 1))
        candidates = (linear + list(range(dim + 1, dim + 1 + k)), linear)
        columns = (self.location_terms, self.scale_terms)
        price = math.log(max(num_effective, 2)) + 2 * math.log(3 * max(k, 1))
        limit = min(_MAX_TERMS, len(selection) // 8)
        while k and len(self.location_terms) + len(self.scale_terms) < limit:
            found = [
                _strongest(selection, *pair)
                for pair in zip(columns, candidates, self._targets(), strict=True)
            ]
            which = int(found[1][0] > found[0][0])
            square, term = found[which]
            if -num_effective * math.log1p(-min(square, 1 - 1e-12)) < price:  # (2)
                return
            columns[which].append(term)
            self._fit()

    def column(self, num_effective: float) -> _Column:
        """The coordinate as fitted, with the covariances that (3) needs."""
        fitted = self.features[:, self.scale_terms] @ self.log_scale
        excess = len(self.y) / num_effective
        return _Column(
            self.location_terms,
            self.location,
            _root_of_inverse(self._gram / excess),
            self.scale_terms,
            self.log_scale,
            _root_of_inverse(self._hessian / excess),
            (
                fitted.min().item() - _MAX_EXTRAPOLATION,
                fitted.max().item() + _MAX_EXTRAPOLATION,
            ),
        )

    def _targets(self) -> tuple[Tensor, Tensor]:
        """The residual and its size, centred, of unit norm, without outliers."""
        size = self.z.square()
        size = _weight(size) * size
        pair = self.z.clamp(-3, 3), size
        centred = [part - part.mean() for part in pair]
        return centred[0] / centred[0].norm(), centred[1] / centred[1].norm()

    def _fit(self) -> None:
        """Weighted least squares for the location, Newton steps for the log scale."""
        first = self.features[:, self.location_terms]
        second = self.features[:, self.scale_terms]
        weight, s = torch.ones_like(self.y), torch.zeros_like(self.y)
        self.log_scale = self.y.new_zeros(len(self.scale_terms))
        self._hessian = 2 * _DEGREES / (_DEGREES + 3) * second.mT @ second
        self._hessian.diagonal().add_(1e-3 * len(self.y))
        for _ in range(4):
            weighted = (weight * (-2 * s).exp())[:, None] * first
            self._gram = weighted.mT @ first
            self._gram.diagonal().mul_(1 + 1e-6).add_(1e-10)
            self.location = torch.linalg.solve(self._gram, weighted.mT @ self.y)
            residual = self.y - first @ self.location
            for _ in range(4):
                size = (residual * (-s).exp()).square()
                gradient = second.mT @ (1 - _weight(size) * size)
                step = torch.linalg.solve(self._hessian, gradient)
                self.log_scale = self.log_scale - step / step.abs().amax().clamp(min=1)
                s = (second @ self.log_scale).clamp(-20, 20)
            self.z = residual * (-s).exp()
            weight = _weight(self.z.square())


def _root_of_inverse(precision: Tensor) -> Tensor:
    """``R`` with ``R R^T`` the inverse."""
    factor = torch.linalg.cholesky(precision)
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor.mT, eye, upper=True)


def _weight(square: Tensor) -> Tensor:
    """How much a residual counts under a Student t."""
    return (_DEGREES + 1) / (_DEGREES + square)


def _strongest(
    selection: Tensor, chosen: list[int], candidates: list[int], target: Tensor
) -> tuple[float, int]:
    """Largest squared correlation with the target, and the candidate that has it.

    What the terms that were chosen explain of a candidate is taken out of it first.
    """
    candidates = [term for term in candidates if term not in chosen]
    if not candidates:
        return 0.0, 0
    x = selection[:, candidates]
    if len(chosen) > 1:
        basis, _ = torch.linalg.qr(selection[:, chosen[1:]])
        x = x - basis @ (basis.mT @ x)
    norm = x.norm(dim=0)
    square = (target @ x / norm.clamp(min=1e-9)).square()
    value, index = torch.where(norm > 1e-3, square, 0.0).max(0)
    return value.item(), candidates[int(index)]
