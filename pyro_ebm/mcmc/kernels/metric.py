r"""The scale matrix :math:`S` of a preconditioned kernel.

Such a kernel moves in whitened coordinates :math:`z = S^{-1} x`; :math:`S` is the
identity, a diagonal (``scale``, in the shape of the event), a dense matrix
(``scale_tril``, for vectors) or a diagonal times a matrix that stretches few directions
(``low_rank``, for long vectors). It is best where :math:`S S^\top` is near the
covariance.

Draws alone tell the covariance slowly, and of chains that have not arrived they tell
nothing. With the gradients there, the diagonal and the dense metric are

.. math::
    S_{ii}^2 &= \sqrt{\mathrm{Var}\, x_i / \mathrm{Var}\, \partial_i f}      \tag{1} \\
    M\, \mathrm{Cov}(\nabla f)\, M &= \mathrm{Cov}(x), \qquad
        M = S S^\top                                                      \tag{2}

which minimise the Fisher divergence from a normal distribution, and give the
covariance of a Gaussian exactly from any draws that span the space.

For many coordinates the metric is a diagonal and the few directions that it gets wrong.
In the scale of the diagonal metric, with rows :math:`\tilde x` of draws and
:math:`\tilde g` of the gradients there, the directions in which either varies most span
a small space, with an orthonormal basis :math:`P`. In it the metric is the dense one,

.. math::
    M\, A\, M = B, \qquad A = P^\top \mathrm{Cov}(\tilde g)\, P, \quad
        B = P^\top \mathrm{Cov}(\tilde x)\, P                              \tag{3} \\
    M = W \Lambda^2 W^\top, \qquad U = P W                                 \tag{4}

of which those directions are kept whose :math:`\Lambda^2` is away from one by more
than a cutoff; everywhere else the diagonal stays. A draw and its gradient share their
noise, and on a Gaussian it cancels in (3).

References:
    Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845.
"""

__all__ = [
    "DrawRows",
    "Factor",
    "GroupMoments",
    "LowRank",
    "MAX_DENSE",
    "balanced_weights",
    "check_scales",
    "dense_metric",
    "diagonal_metrics",
    "geometric_mean",
    "low_rank_metric",
    "require_one_scale",
    "steepness_weights",
    "times_scale",
    "times_transposed",
    "typical",
    "whiten",
]

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pyro_ebm.energies import Energy

#: Coordinates up to which a dense metric is tried.
MAX_DENSE = 150
#: A group whose scale differs by more than this factor is left out of a dense metric.
_UNUSUAL = 10.0
#: Condition number that is left by a diagonal metric, below which it serves as well.
_WORTH_IT = 4.0
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


class LowRank(NamedTuple):
    r"""The matrix :math:`S = \mathrm{diag}(\sigma)\, (I + U (\Lambda - I) U^\top)`.

    Attributes:
        scale: :math:`\sigma`, shape ``(D,)``.
        directions: :math:`U`, orthonormal columns, shape ``(D, R)``.
        stretch: The diagonal of :math:`\Lambda`, positive, shape ``(R,)``.
    """

    scale: Tensor
    directions: Tensor
    stretch: Tensor

    def times(self, z: Tensor) -> Tensor:
        """:math:`S z` of each row."""
        return self._stretched(z, self.stretch) * self.scale

    def transposed(self, grad: Tensor) -> Tensor:
        r""":math:`S^\top \nabla f` of each row."""
        return self._stretched(grad * self.scale, self.stretch)

    def whiten(self, x: Tensor) -> Tensor:
        """:math:`S^{-1} x` of each row."""
        return self._stretched(x / self.scale, 1 / self.stretch)

    def to(self, like: Tensor) -> "LowRank":
        """The same in the precision and on the device of another tensor."""
        return LowRank(*(part.to(like) for part in self))

    def _stretched(self, rows: Tensor, stretch: Tensor) -> Tensor:
        inside = rows @ self.directions
        return rows + (inside * (stretch - 1)) @ self.directions.mT


#: A scale matrix that is no diagonal.
Factor: TypeAlias = Tensor | LowRank


def require_one_scale(
    scale: Tensor | None, scale_tril: Tensor | None, low_rank: LowRank | None = None
) -> None:
    """Check that at most one of them is given.

    Raises:
        ValueError: If more are.
    """
    if sum(part is not None for part in (scale, scale_tril, low_rank)) > 1:
        raise ValueError("give one of scale, scale_tril and low_rank, not both.")


def check_scales(energy: Energy, scale: Tensor | None, factor: Factor | None) -> None:
    """Check that the scales have the shape of the event.

    Raises:
        ValueError: If one does not fit the event of the energy.
    """
    event = energy.event_shape
    if isinstance(factor, LowRank):
        if len(event) != 1 or factor.directions.shape[:1] != event:
            raise ValueError(
                "low_rank must be for an energy over vectors of shape "
                f"{tuple(factor.directions.shape[:1])}, got event_shape "
                f"{tuple(event)}. Other events take a diagonal scale."
            )
        scale, factor = factor.scale, None
    if scale is not None and scale.shape != event:
        raise ValueError(
            f"scale must have the event_shape {tuple(event)} of the energy, got shape "
            f"{tuple(scale.shape)}."
        )
    if factor is not None and factor.shape != event * 2:
        raise ValueError(
            "scale_tril must have shape (D, D) for an energy over vectors of "
            f"shape (D,), got {tuple(factor.shape)} for event_shape "
            f"{tuple(event)}. Other events take a diagonal scale."
        )


def times_scale(z: Tensor, factor: Factor | None) -> Tensor:
    """The product :math:`S z` of each row, or ``z`` itself without a factor."""
    if isinstance(factor, LowRank):
        return factor.times(z)
    return z if factor is None else z @ factor.mT


def times_transposed(grad: Tensor, factor: Factor | None) -> Tensor:
    r"""The product :math:`S^\top \nabla f` of each row, or the gradient itself."""
    if isinstance(factor, LowRank):
        return factor.transposed(grad)
    return grad if factor is None else grad @ factor


def whiten(x: Tensor, scale: Tensor | None, factor: Factor | None) -> Tensor:
    r""":math:`z = S^{-1} x` of each row, for points and scales without event shape.

    Args:
        x: Shape ``(N, D)``.
        scale: As in a kernel, of ``D`` elements, or ``None``.
        factor: Lower-triangular, shape ``(D, D)``, or of low rank, or ``None``.
    """
    if isinstance(factor, LowRank):
        return factor.to(x).whiten(x)
    if factor is not None:
        return torch.linalg.solve_triangular(factor.to(x), x.mT, upper=False).mT
    return x if scale is None else x / scale.to(x).flatten()


class GroupMoments(nn.Module):
    """Weighted mean and covariance of draws by groups of chains, as they come.

    The parallel form of Welford's recursion, which never subtracts large numbers.

    Args:
        event_shape: Of one draw.
        num_groups: ``G``; chains side by side belong together.
        is_dense: Whether whole covariances are kept, or their diagonals.

    Attributes:
        count: Total weight of each group so far, shape ``(G,)``.

    References:
        Chan, Golub & LeVeque (1983), The American Statistician 37, 242-247.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(
        self, event_shape: Sequence[int], num_groups: int = 1, *, is_dense: bool = False
    ) -> None:
        super().__init__()
        size = torch.Size(event_shape).numel()
        self.register_buffer("count", torch.zeros(num_groups))
        self.register_buffer("mean", torch.zeros(num_groups, size))
        shape = (num_groups, *(size,) * (2 if is_dense else 1))
        self.register_buffer("scatter", torch.zeros(shape))

    def reset(self) -> None:
        """Forget all draws."""
        for name, buffer in self.named_buffers():
            setattr(self, name, torch.zeros_like(buffer))

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add draws.

        Args:
            x: Shape ``(*chains, *event)``, as many of each group.
            weight: Positive, shape ``(*chains,)``; default: 1 each.
        """
        num_groups, size = self.mean.shape
        rows = x.reshape(num_groups, -1, size).to(self.mean)
        weights = torch.ones_like(rows[..., :1])
        if weight is not None:
            weights = weight.reshape(weights.shape).to(rows)
        number = weights.sum(1)
        mean = (weights * rows).sum(1) / number
        centred, shift = rows - mean[:, None], mean - self.mean
        count = self.count[:, None] + number
        between = self.count[:, None] * number / count
        if self.scatter.dim() == 3:
            within = centred.mT @ (weights * centred)
            moved = shift[:, :, None] * (between * shift)[:, None, :]
        else:
            within = (weights * centred.square()).sum(1)
            moved = between * shift.square()
        self.scatter = self.scatter + within + moved
        self.mean = self.mean + shift * (number / count)
        self.count = count[:, 0]

    def covariance(self) -> Tensor:
        """Of each group, shape ``(G, D, D)``, or their diagonals, ``(G, D)``."""
        return self.scatter / self.count.reshape(-1, *[1] * (self.scatter.dim() - 1))


def steepness_weights(force: Tensor) -> Tensor:
    """Weights of draws, of mean 1, that are smaller where the gradient is extreme.

    There the gradients have tails so heavy that their covariance is that of a few. Of a
    Gaussian the metrics are exact whatever the weights.

    Args:
        force: Gradients times the scale of their coordinates, shape ``(*draws, D)``.
    """
    squares = force.square().sum(-1)
    weights = 1 / (1 + squares / squares.median().clamp(min=1e-300))
    return weights / weights.mean()


def diagonal_metrics(variance: Tensor, grad_variance: Tensor) -> Tensor:
    r"""Scale of each coordinate in each group, by (1).

    Args:
        variance: Of the draws of each group, shape ``(G, D)``.
        grad_variance: Of the gradients there, shape ``(G, D)``.

    Returns:
        Shape ``(G, D)``; 0 where a group has not moved. A coordinate whose gradient
        does not vary has the standard deviation of its draws.
    """
    ratio = (variance / grad_variance) ** 0.25  # (1)
    is_known = (grad_variance > 0) & ratio.isfinite()
    scale = torch.where(is_known, ratio, variance.sqrt())
    return torch.where(scale.isfinite(), scale, 0.0)


def typical(scales: Tensor) -> Tensor:
    """Median scale over the groups of chains that have moved, ``nan`` if none has.

    Args:
        scales: Of each group, shape ``(G, D)``.
    """
    return torch.where(scales > 0, scales, torch.nan).nanmedian(0).values


def dense_metric(
    covariance: Tensor, grad_covariance: Tensor, scale: Tensor
) -> Tensor | None:
    r"""Factor of the matrix (2) of groups of chains.

    Args:
        covariance: Of the draws of each group, shape ``(G, D, D)``.
        grad_covariance: Of the gradients there, shape ``(G, D, D)``.
        scale: What (1) gives, shape ``(D,)``.

    Returns:
        Lower-triangular, shape ``(D, D)``; ``None`` if the diagonal serves as well, or
        if the draws span less than the space.
    """
    draws = covariance / (scale[:, None] * scale)
    grads = grad_covariance * (scale[:, None] * scale)
    sizes = [m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (draws, grads)]
    usual, weights = balanced_weights(*sizes)
    if not usual.any():
        return None
    weights = weights[usual, None, None]
    found = geometric_mean(
        (weights * grads[usual]).mean(0), (weights * draws[usual]).mean(0)
    )
    if not found.isfinite().all():
        return None
    values = torch.linalg.eigvalsh(found)
    if not values[0] > 0 or values[-1] < _WORTH_IT * values[0]:
        return None
    factor, failed = torch.linalg.cholesky_ex(found)
    if failed:
        return None
    # A factor comes column by column, but is loaded row by row, and a product with it
    # would not be the same to the last bit.
    return (scale[:, None] * factor).contiguous()


def balanced_weights(draws: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the groups of chains in the estimate of a metric.

    Args:
        draws: Total variance of the whitened draws of each group, shape ``(G,)``.
        grads: Of the gradients there, shape ``(G,)``.

    Returns:
        Which groups are not at another scale than most, which would neither set the
        metric nor show the correlations, and weights, both of shape ``(G,)``.
    """
    ratio = (draws / grads).log()
    usual = (ratio - ratio.nanmedian()).abs() < 2 * math.log(_UNUSUAL)
    # One weight for both: of a Gaussian any draws at all give the exact covariance.
    return usual & ratio.isfinite(), (draws * grads).rsqrt()


def geometric_mean(precision: Tensor, covariance: Tensor) -> Tensor:
    r"""The matrix :math:`M` with :math:`M A M = B`, positive definite.

    Args:
        precision: :math:`A`, shape ``(D, D)``.
        covariance: :math:`B`, shape ``(D, D)``.

    Returns:
        Shape ``(D, D)``; ``nan`` if :math:`A` is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(precision)
    inner = lower.mT @ covariance @ lower
    if failed or not inner.isfinite().all():
        return torch.full_like(precision, torch.nan)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    root = vectors * values.clamp(min=0.0).pow(0.25)
    half = torch.linalg.solve_triangular(lower.mT, root, upper=True)
    return half @ half.mT


class DrawRows(nn.Module):
    """A thinned store of draws and gradients, with equally many of each chain.

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
    r"""The metric (4) from draws of groups of chains.

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
    found = geometric_mean(precision, covariance)  # (3)
    if not found.isfinite().all():
        return None
    values, vectors = torch.linalg.eigh(found)
    # What so few rows show of independent coordinates is no direction to stretch.
    cutoff = max(_CUTOFF, 1 + math.sqrt(len(scale) / number))
    kept = (values > cutoff) | (values < 1 / cutoff)
    if not kept.any() or not (values > 0).all():
        return None
    directions = (basis @ vectors[:, kept]).contiguous()
    return LowRank(scale, directions, values[kept].sqrt())  # (4)


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
