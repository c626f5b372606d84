r"""The scale matrix :math:`S` of a preconditioned kernel.

Such a kernel moves in whitened coordinates :math:`z = S^{-1} x`; :math:`S` is the
identity, a diagonal (``scale``, in the shape of the event) or a dense matrix
(``scale_tril``, for vectors). It is best where :math:`S S^\top` is near the covariance.

Draws alone tell the covariance slowly, and of chains that have not arrived they tell
nothing. With the gradients there, the diagonal and the dense metric are

.. math::
    S_{ii}^2 &= \sqrt{\mathrm{Var}\, x_i / \mathrm{Var}\, \partial_i f}      \tag{1} \\
    M\, \mathrm{Cov}(\nabla f)\, M &= \mathrm{Cov}(x), \qquad
        M = S S^\top                                                      \tag{2}

which minimise the Fisher divergence from a normal distribution, and give the
covariance of a Gaussian exactly from any draws that span the space.

References:
    Seyboldt, Carlson & Carpenter (2026), arXiv:2603.18845.
"""

__all__ = [
    "GroupMoments",
    "MAX_DENSE",
    "check_scales",
    "dense_metric",
    "diagonal_metrics",
    "geometric_mean",
    "require_one_scale",
    "steepness_weights",
    "times_scale",
    "times_transposed",
    "typical",
    "whiten",
]

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_ebm.energies import Energy

#: Coordinates up to which a dense metric is tried.
MAX_DENSE = 150
#: A group whose scale differs by more than this factor is left out of a dense metric.
_UNUSUAL = 10.0
#: Condition number that is left by a diagonal metric, below which it serves as well.
_WORTH_IT = 4.0


def require_one_scale(scale: Tensor | None, scale_tril: Tensor | None) -> None:
    """Check that at most one of the two is given.

    Raises:
        ValueError: If both are.
    """
    if scale is not None and scale_tril is not None:
        raise ValueError("give scale or scale_tril, not both.")


def check_scales(
    energy: Energy, scale: Tensor | None, scale_tril: Tensor | None
) -> None:
    """Check the shapes: others would broadcast along the chains without a word.

    Raises:
        ValueError: If one does not fit the event of the energy.
    """
    event = energy.event_shape
    if scale is not None and scale.shape != event:
        raise ValueError(
            f"scale must have the event_shape {tuple(event)} of the energy, got shape "
            f"{tuple(scale.shape)}."
        )
    if scale_tril is not None and scale_tril.shape != event * 2:
        raise ValueError(
            "scale_tril must have shape (D, D) for an energy over vectors of "
            f"shape (D,), got {tuple(scale_tril.shape)} for event_shape "
            f"{tuple(event)}. Other events take a diagonal scale."
        )


def times_scale(z: Tensor, scale_tril: Tensor | None) -> Tensor:
    """The dense :math:`S z` of each row, or ``z`` itself without one."""
    return z if scale_tril is None else z @ scale_tril.mT


def times_transposed(grad: Tensor, scale_tril: Tensor | None) -> Tensor:
    r"""The dense :math:`S^\top \nabla f` of each row, or the gradient itself."""
    return grad if scale_tril is None else grad @ scale_tril


def whiten(x: Tensor, scale: Tensor | None, scale_tril: Tensor | None) -> Tensor:
    r""":math:`z = S^{-1} x` of each row, for points and scales without event shape.

    Args:
        x: Shape ``(N, D)``.
        scale: As in a kernel, of ``D`` elements, or ``None``.
        scale_tril: Lower-triangular, shape ``(D, D)``, or ``None``.
    """
    if scale_tril is not None:
        return torch.linalg.solve_triangular(scale_tril.to(x), x.mT, upper=False).mT
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
    """Weights of draws: less where the density falls off a cliff, with mean 1.

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
    """Median of the scales of those groups that have moved, ``nan`` if none has.

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
    ratio = (sizes[0] / sizes[1]).log()
    # A group at another scale than most neither sets it nor hides the correlations.
    usual = (ratio - ratio.nanmedian()).abs() < 2 * math.log(_UNUSUAL)
    usual &= ratio.isfinite()
    if not usual.any():
        return None
    # One weight for both: of a Gaussian any draws at all give the exact covariance.
    weights = (sizes[0] * sizes[1])[usual].rsqrt()[:, None, None]
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
