r"""A metric for many coordinates: a diagonal, and a few directions that it gets wrong.

In the scale of the diagonal metric, with rows :math:`\tilde x` of draws and
:math:`\tilde g` of the gradients there, the directions in which either varies most span
a small space, with an orthonormal basis :math:`P`. In it the metric is the dense one,

.. math::
    M\, A\, M = B, \qquad A = P^\top \mathrm{Cov}(\tilde g)\, P, \quad
        B = P^\top \mathrm{Cov}(\tilde x)\, P                              \tag{1} \\
    M = W \Lambda^2 W^\top, \qquad U = P W                                 \tag{2}

of which those directions are kept whose :math:`\Lambda^2` is away from one by more
than a cutoff; everywhere else the diagonal stays. A draw and its gradient share their
noise, and on a Gaussian it cancels in (1).

References:
    Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845.
"""

__all__ = ["DrawRows", "low_rank_metric"]

import math

import torch
from torch import Tensor, nn

from pyro_ebm.mcmc.kernels.metric import LowRank, balanced_weights, geometric_mean

#: Directions of the draws, and as many of the gradients, that are looked at.
_MAX_DIRECTIONS = 32
#: Rows for each direction that is looked at, as a few have an uncertain covariance.
_ROWS_PER_DIRECTION = 4
#: Variance, or one over it, that a direction must have in the scale of the diagonal.
_CUTOFF = 2.0
#: Rows of draws and gradients that are kept of a window.
_MAX_ROWS = 1024
#: Part of the largest variance below which one is rounding.
_ROUNDING = 1e-12


class DrawRows(nn.Module):
    """Some draws of a window with the gradients there, as many of each chain.

    Args:
        num_chains: ``C``.
        size: Coordinates, ``D``.
        num_draws: Most draws of each chain that are offered.

    Attributes:
        rows: Draws and gradients, shape ``(2, K, C, D)``.
        weights: Of the draws, shape ``(K, C)``.
        count: How many of the ``K`` there are, shape ``()``.
    """

    rows: Tensor
    weights: Tensor
    count: Tensor

    def __init__(self, num_chains: int, size: int, num_draws: int) -> None:
        super().__init__()
        most = max(min(_MAX_ROWS // num_chains, num_draws), 1)
        self.register_buffer("rows", torch.zeros(2, most, num_chains, size))
        self.register_buffer("weights", torch.zeros(most, num_chains))
        self.register_buffer("count", torch.tensor(0))

    def reset(self) -> None:
        """Forget all draws."""
        self.count = torch.zeros_like(self.count)

    def update(self, rows: Tensor, weight: Tensor, number: int, expected: int) -> None:
        """Keep a draw of each chain, or leave it out to spread them over the window.

        Args:
            rows: Draws and gradients, shape ``(2, *chains, D)``.
            weight: Of the draws, shape ``(*chains,)``.
            number: How many draws there were before in the window.
            expected: How many there will be in all.
        """
        place, rest = divmod(number, max(-(-expected // len(self.weights)), 1))
        if rest or place >= len(self.weights):
            return
        # Copies: a saved state_dict shares the buffers.
        self.rows, self.weights = self.rows.clone(), self.weights.clone()
        self.rows[:, place] = rows.reshape(self.rows[:, 0].shape)
        self.weights[place] = weight.flatten()
        self.count = torch.full_like(self.count, place + 1)

    def by_group(self, num_groups: int) -> tuple[Tensor, Tensor]:
        """Draws and gradients ``(G, N, D)``, centred, times the roots of the weights.

        Args:
            num_groups: ``G``; chains side by side belong together.
        """
        count = int(self.count)
        shape = (count, num_groups, -1)
        weights = self.weights[:count].double().reshape(shape).transpose(0, 1)
        weights = weights.flatten(1)[..., None]

        def centred(rows: Tensor) -> Tensor:
            rows = rows[:count].double().reshape(*shape, rows.shape[-1])
            rows = rows.transpose(0, 1).flatten(1, 2)
            mean = (weights * rows).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
            return (rows - mean) * weights.sqrt()

        draws, grads = self.rows
        return centred(draws), centred(grads)


def low_rank_metric(draws: Tensor, grads: Tensor, scale: Tensor) -> LowRank | None:
    r"""The metric (2) from draws of groups of chains.

    Args:
        draws: Centred, shape ``(G, N, D)``.
        grads: The gradients there, centred, shape ``(G, N, D)``.
        scale: Of the diagonal metric, shape ``(D,)``.

    Returns:
        ``None`` if the diagonal serves as well.
    """
    x, g = draws / scale, grads * scale
    sizes = [rows.square().mean(1).sum(-1) for rows in (x, g)]
    usual, weights = balanced_weights(*sizes)
    if not usual.any():
        return None
    roots = weights[usual].sqrt()[:, None, None]
    x, g = ((roots * rows[usual]).flatten(0, 1) for rows in (x, g))
    number = len(x)
    basis = torch.cat([_main_directions(x), _main_directions(g)], 1)
    basis, size = torch.linalg.qr(basis)
    # A direction that both have is there once.
    basis = basis[:, size.diagonal().abs() > 1e-6]
    inside = [rows @ basis for rows in (x, g)]
    covariance, precision = (_with_floor(rows.mT @ rows / number) for rows in inside)
    found = geometric_mean(precision, covariance)  # (1)
    if not found.isfinite().all():
        return None
    values, vectors = torch.linalg.eigh(found)
    # What so few rows show of independent coordinates is no direction to stretch.
    cutoff = max(_CUTOFF, 1 + math.sqrt(len(scale) / number))
    kept = (values > cutoff) | (values < 1 / cutoff)
    if not kept.any() or not (values > 0).all():
        return None
    directions = (basis @ vectors[:, kept]).contiguous()
    return LowRank(scale, directions, values[kept].sqrt())  # (2)


def _main_directions(rows: Tensor) -> Tensor:
    """Orthonormal directions in which rows ``(N, D)`` vary most, shape ``(D, K)``."""
    number, size = rows.shape
    if size <= number:
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
    else:
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        vectors = rows.mT @ vectors
    keep = values > _ROUNDING * values[-1]
    keep[: -min(_MAX_DIRECTIONS, max(number // _ROWS_PER_DIRECTION, 1))] = False
    vectors = vectors[:, keep]
    return vectors / vectors.norm(dim=0)


def _with_floor(covariance: Tensor) -> Tensor:
    """Positive definite in spite of rounding."""
    floor = _ROUNDING * covariance.diagonal().amax()
    return covariance + floor * torch.eye(len(covariance)).to(covariance)
