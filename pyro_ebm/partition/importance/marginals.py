r"""A mixture of Student t distributions for each coordinate, fitted to draws.

The coordinates are taken to be independent; what is known to be otherwise belongs into
a map in front (:mod:`pyro_ebm.partition.importance.triangular`). For each coordinate of
the draws
:math:`z_n`, expectation maximisation iterates, with responsibilities :math:`r_{nk}` of
the components and residuals :math:`y_{nk} = (z_n - m_k) / s_k`,

.. math::
    v_{nk} &= r_{nk}\,\frac{\nu + 1}{\nu + y_{nk}^2}, \qquad
    m_k \leftarrow \frac{\sum_n v_{nk} z_n}{\sum_n v_{nk}}                    \\
    s_k^2 &\leftarrow \frac{\sum_n v_{nk} (z_n - m_k)^2 + s_0^2}
                          {\sum_n r_{nk} + 1}                              \tag{1}

with one pseudo-draw at the centre of each, of scale :math:`s_0`, so that no component
collapses. Each
coordinate takes the degrees of freedom under which its draws are the most likely: a
product of heavy tails stays one, and a Gaussian is not given tails that it has not.

References:
    Peel & McLachlan (2000), Statistics and Computing 10, 339-348.
"""

__all__ = ["fit_marginals"]

import math

import pyro.distributions as dist
import torch
from torch import Tensor

_DEGREES = (2.5, 5.0, 30.0)
#: Quantiles where the components start. The outer two find a mode of small mass.
_QUANTILES = (0.01, 0.15, 0.4, 0.6, 0.85, 0.99)
_NUM_ITERATIONS = 20
#: Smallest scale of a component, in units of the interquartile range.
_MIN_SCALE = 0.02
_IQR_OF_NORMAL = 1.349


def fit_marginals(
    z: Tensor, wide: Tensor | None = None, wide_weight: float = 0.05
) -> dist.TorchDistribution:
    """Fit (1) to every coordinate, under each of a few degrees of freedom.

    Args:
        z: Draws of shape ``(N, D)``.
        wide: Draws of something wider, shape ``(N', D)``; gives each coordinate one
            component more, with its location and scale.
        wide_weight: Weight of that component.

    Returns:
        A distribution over vectors of size ``D``.
    """
    center, spread = z.median(0).values, spread_of(z)
    parts = _expectation_maximisation(((z - center) / spread).mT)
    if wide is not None:
        parts = _with_wide(*parts, (wide - center) / spread, wide_weight)
    df, location, scale, logits = parts
    components = dist.StudentT(
        df[:, None],
        center[:, None] + spread[:, None] * location,
        spread[:, None] * scale,
        validate_args=False,
    )
    mixture = dist.MixtureSameFamily(
        dist.Categorical(logits=logits), components, validate_args=False
    )
    return mixture.to_event(1)


def _expectation_maximisation(
    z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Degrees of freedom ``(D,)``, locations, scales and log weights ``(D, K)``.

    Args:
        z: Standardised draws, shape ``(D, N)``.
    """
    dim, num = len(_QUANTILES), len(_DEGREES)
    degrees = z.new_tensor(_DEGREES)[:, None]  # (V, 1)
    levels = z.new_tensor(_QUANTILES)
    # Shapes are (D, K, V) and, with the draws, (D, K, V, N).
    location = torch.quantile(z, levels, dim=-1).mT[..., None].expand(-1, -1, num)
    scale = torch.full_like(location, dim**-0.5)
    logits = torch.full_like(location, -math.log(dim))
    moments = torch.stack([torch.ones_like(z), z, z.square()], -1)  # (D, N, 3)
    for _ in range(_NUM_ITERATIONS):
        log_joint, square = _log_joint(z, location, scale, logits, degrees)
        r = log_joint.softmax(1)
        count = r.sum(-1) + 1
        v = r * (degrees + 1) / (degrees + square)
        sums = (v.flatten(1, 2) @ moments).unflatten(1, (dim, num)).unbind(-1)
        location = sums[1] / (sums[0] + 1e-9)
        total = sums[2] - location * sums[1] + 1 / dim
        scale = (total / count).clamp(min=_MIN_SCALE**2).sqrt()  # (1)
        logits = count.log() - count.sum(1, keepdim=True).log()
    log_joint, _ = _log_joint(z, location, scale, logits, degrees)
    best = log_joint.logsumexp(1).mean(-1).argmax(-1)
    chosen = torch.arange(len(best), device=z.device), slice(None), best
    return degrees[best, 0], location[chosen], scale[chosen], logits[chosen]


def _log_joint(
    z: Tensor, location: Tensor, scale: Tensor, logits: Tensor, degrees: Tensor
) -> tuple[Tensor, Tensor]:
    """Log joint density of draw and component, and squared residuals."""
    y = (z[:, None, None] - location[..., None]) / scale[..., None]
    square = y.square()
    log_norm = torch.lgamma((degrees + 1) / 2) - torch.lgamma(degrees / 2)
    log_norm = log_norm - (degrees * math.pi).log() / 2
    constant = (logits - scale.log())[..., None] + log_norm
    return constant - (degrees + 1) / 2 * (square / degrees).log1p(), square


def spread_of(z: Tensor) -> Tensor:
    """Interquartile range in units of that of a standard normal, shape ``(D,)``."""
    low, high = torch.quantile(z, z.new_tensor([0.25, 0.75]), dim=0)
    return ((high - low) / _IQR_OF_NORMAL).clamp(min=1e-9)


def _with_wide(
    df: Tensor,
    location: Tensor,
    scale: Tensor,
    logits: Tensor,
    wide: Tensor,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    share = logits.new_full((len(logits), 1), math.log(weight))
    return (
        df,
        torch.cat([location, wide.median(0).values[:, None]], -1),
        torch.cat([scale, spread_of(wide)[:, None]], -1),
        torch.cat([logits + math.log1p(-weight), share], -1),
    )
