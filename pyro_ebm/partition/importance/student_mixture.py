r"""A mixture of multivariate Student distributions, fitted to weighted draws.

.. math::
    q(u) = \sum_k \alpha_k\, t_\nu(u; m_k, S_k)                              \tag{1}

One step of expectation maximisation from draws :math:`u_n` with weights :math:`w_n` of
sum 1 is, with responsibilities :math:`\rho_{nk}` of (1) and
:math:`y_{nk} = (u_n - m_k)^\top S_k^{-1} (u_n - m_k)`,

.. math::
    \gamma_{nk} &= w_n\, \rho_{nk}, \qquad
    g_{nk} = \gamma_{nk}\, \frac{\nu + D}{\nu + y_{nk}}                      \\
    \alpha_k &= \sum_n \gamma_{nk}, \qquad
    m_k = \frac{\sum_n g_{nk} u_n}{\sum_n g_{nk}}, \qquad
    S_k = \frac{\sum_n g_{nk} (u_n - m_k)(u_n - m_k)^\top}{\sum_n \gamma_{nk}}
                                                                           \tag{2}

References:
    Peel & McLachlan (2000), Statistics and Computing 10, 339-348. Cappé, Douc, Guillin,
    Marin & Robert (2008), Statistics and Computing 18, 447-459 (weighted draws).
"""

__all__ = ["StudentMixture", "fit_clusters"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Least degrees of freedom: tails heavier than those of most targets.
_MIN_DEGREES = 5.0
#: Dimensions from which on there are as many degrees of freedom: else no draw would be
#: at the distance at which a Gaussian has all of its mass.
_MANY = 48
#: Numbers in the largest tensor of a density.
_CHUNK = 2**22
#: Steps of expectation maximisation from the centres of clusters.
_NUM_STEPS = 15


class StudentMixture(NamedTuple):
    """The mixture (1), in double precision.

    Attributes:
        weights: Shape ``(K,)``, of sum 1.
        loc: Shape ``(K, D)``.
        scale_tril: Cholesky factors of the scale matrices, shape ``(K, D, D)``.
    """

    weights: Tensor
    loc: Tensor
    scale_tril: Tensor

    @property
    def degrees(self) -> float:
        """Degrees of freedom of all components."""
        dim = self.loc.shape[-1]
        return _MIN_DEGREES if dim < _MANY else float(dim)

    def sample(self, num: int) -> Tensor:
        """Independent draws, shape ``(num, D)``."""
        chosen = self.weights.multinomial(num, replacement=True)
        normal = torch.randn(num, self.loc.shape[-1]).to(self.loc)
        half = torch.full((num,), self.degrees / 2).to(self.loc)
        stretch = (half / torch._standard_gamma(half)).sqrt()
        draws = self.loc[chosen]
        # Component by component: a gather of (num, D, D) factors would not fit.
        for k in chosen.unique().tolist():
            own = chosen == k
            moved = normal[own] @ self.scale_tril[k].mT
            draws[own] = self.loc[k] + stretch[own, None] * moved
        return draws

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of (1) in nats at ``u`` of shape ``(N, D)``, shape ``(N,)``."""
        parts = [self._look(part)[0].logsumexp(0) for part in self._split(u)]
        return torch.cat(parts)

    def distances(self, u: Tensor) -> Tensor:
        """The squares :math:`y_{nk}`, shape ``(K, N)``."""
        return torch.cat([self._look(part)[1] for part in self._split(u)], -1)

    def updated(
        self, u: Tensor, weights: Tensor, min_weight: float
    ) -> "StudentMixture":
        """The step (2).

        Args:
            u: Draws, shape ``(N, D)``.
            weights: Shape ``(N,)``, of sum 1.
            min_weight: What all components weigh together at least; what the light ones
                lack is taken from the others. A component with too few draws for a
                covariance keeps its place and shape.
        """
        joint, square = self._joined(u)
        gamma = joint.softmax(0).nan_to_num(0.0) * weights
        total = gamma.sum(-1)
        dim = u.shape[-1]
        g = gamma * (self.degrees + dim) / (self.degrees + square)
        loc = (g @ u) / g.sum(-1, keepdim=True).clamp(min=1e-300)
        loc_new, factor_new = self.loc.clone(), self.scale_tril.clone()
        # As many effective draws as a covariance takes, or the old shape stays.
        effective = total.square() / gamma.square().sum(-1).clamp(min=1e-300)
        # The divergence of a Gaussian from its fit to n draws is about dim^2 / (4 n).
        least = max(3 * dim + 5, dim**2 / 2)
        for k in (effective > least).nonzero().flatten().tolist():
            centred = u - loc[k]
            covariance = (centred * g[k][:, None]).mT @ centred / total[k]
            # Shrunk towards the old shape: few draws say little of correlations.
            share = dim / (dim + effective[k])
            old = self.scale_tril[k] @ self.scale_tril[k].mT
            factor, info = torch.linalg.cholesky_ex(covariance.lerp(old, share))
            if info == 0:
                loc_new[k], factor_new[k] = loc[k], factor
        shares = (total / total.sum()).clamp(min=min_weight / len(total))
        return StudentMixture(shares / shares.sum(), loc_new, factor_new)

    def without_idle(
        self, u: Tensor, weights: Tensor, least: float
    ) -> "StudentMixture":
        """The components that hold some weight; the one that holds most, if none does.

        Args:
            u: Draws, shape ``(N, D)``.
            weights: Shape ``(N,)``.
            least: Weight of a component that is kept.
        """
        held = self._joined(u)[0].softmax(0).nan_to_num(0.0) @ weights
        kept = held >= min(least, held.max().item())
        shares = held[kept].clamp(min=1e-300)
        return StudentMixture(
            shares / shares.sum(), self.loc[kept], self.scale_tril[kept]
        )

    def at(self, u: Tensor) -> "StudentMixture":
        """Components at given points, each shaped as the one that is nearest.

        Args:
            u: Shape ``(N, D)``.
        """
        nearest = self._joined(u)[0].argmax(0)
        weights = torch.full_like(u[:, 0], 1 / len(u))
        return StudentMixture(weights, u, self.scale_tril[nearest])

    def joined(self, other: "StudentMixture", share: float) -> "StudentMixture":
        """A mixture of the two mixtures.

        Args:
            other: With components of the same size.
            share: Weight of ``other``, in (0, 1).
        """
        return StudentMixture(
            torch.cat([(1 - share) * self.weights, share * other.weights]),
            torch.cat([self.loc, other.loc]),
            torch.cat([self.scale_tril, other.scale_tril]),
        )

    def _split(self, u: Tensor) -> tuple[Tensor, ...]:
        rows = max(1, _CHUNK // (self.loc.numel() + 1))
        return u.split(rows)

    def _joined(self, u: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self._look(part) for part in self._split(u)]
        joint, square = zip(*parts, strict=True)
        return torch.cat(joint, -1), torch.cat(square, -1)

    def _look(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the terms of (1) and the squares :math:`y_{nk}`, ``(K, N)`` each."""
        dim, nu = u.shape[-1], self.degrees
        centred = (u - self.loc[:, None]).mT  # (K, D, N)
        white = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False)
        square = white.square().sum(-2)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = (
            math.lgamma((nu + dim) / 2)
            - math.lgamma(nu / 2)
            - dim / 2 * math.log(nu * math.pi)
        )
        log_density = (
            constant - log_det[:, None] - (nu + dim) / 2 * (square / nu).log1p()
        )
        joint = self.weights.log()[:, None] + log_density
        return joint.nan_to_num(-torch.inf, -torch.inf), square


def fit_clusters(u: Tensor, weights: Tensor, num_clusters: int) -> StudentMixture:
    """A mixture fitted to weighted draws, from centres far from each other.

    The centres are drawn one after the other, each with a probability that grows with
    the square of its distance to those before.

    Args:
        u: Draws, shape ``(N, D)``.
        weights: Shape ``(N,)``, of sum 1.
        num_clusters: Components.

    References:
        Arthur & Vassilvitskii (2007), k-means++. SODA.
    """
    loc = weights @ u
    factor = cholesky(((u - loc) * weights[:, None]).mT @ (u - loc))
    z = torch.linalg.solve_triangular(factor, (u - loc).mT, upper=False).mT
    chosen = [int(weights.multinomial(1))]
    square = torch.full_like(weights, torch.inf)
    for _ in range(num_clusters - 1):
        square = torch.minimum(square, (z - z[chosen[-1]]).square().sum(-1))
        chosen.append(int((weights * square + 1e-300).multinomial(1)))
    spread = 1.0 if num_clusters == 1 else 0.5
    mixture = StudentMixture(
        torch.full_like(weights[:num_clusters], 1 / num_clusters),
        u[chosen] if num_clusters > 1 else loc[None],
        (spread * factor).expand(num_clusters, -1, -1).contiguous(),
    )
    for _ in range(_NUM_STEPS):
        mixture = mixture.updated(u, weights, 0.1)
    return mixture


def cholesky(covariance: Tensor) -> Tensor:
    """Cholesky factor; that of the diagonal where there is none."""
    variance = covariance.diagonal().clamp(min=1e-20)
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor if info == 0 else variance.sqrt().diag_embed()
