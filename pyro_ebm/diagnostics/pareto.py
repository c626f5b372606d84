r"""Pareto shape of the tail of importance weights.

The excesses of the ``M`` largest weights over the next one are fitted by a generalised
Pareto distribution with shape ``k`` and scale ``sigma``,

.. math::
    P(w - c > y \mid w > c) &= (1 + k y / \sigma)^{-1/k}                       \\
    M &= \lceil \min(N / 5,\ 3 \sqrt N) \rceil                              \tag{1}

Moments of order ``1 / k`` and above are infinite: beyond ``k = 1/2`` the weights have
no variance, and beyond about 0.7 their mean cannot be estimated with any practical
number of draws.

The standard error of the log of the mean weight is that of weights whose tail is
replaced by quantiles of (1),

.. math::
    w_{(N-M+j)} = c + \frac{\sigma}{k}
        \left[\left(1 - \tfrac{j - 1/2}{M}\right)^{-k} - 1\right]            \tag{2}

with ``k`` raised to the end of its own 95 % interval, since a sample that has missed
the largest weights also shows a tail that is too light.

Over finite supports many weights are equal but for rounding, which has no shape: the
tail is what exceeds ``c`` by more than that, and exponential where it is one value.

References:
    Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto smoothed importance sampling,
    JMLR 25. Zhang & Stephens (2009), Technometrics 51, 316-325.
"""

__all__ = ["pareto_k", "pareto_std_error"]

import math
from typing import NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_ebm.diagnostics.weights import log_mean_exp

#: Fewer weights than this in the tail are not fitted.
_MIN_TAIL = 5
#: Excess of the largest weight over the mean, in nats, that is no tail.
_FLAT = 0.05
#: Quantile of a standard normal for a one-sided 95 % limit.
_ONE_SIDED = 1.645


def pareto_k(log_weights: Tensor) -> float:
    r"""Shape :math:`\hat k` of the tail of the weights, by the fit (1).

    Args:
        log_weights: Shape ``(N,)``; ``-inf`` is a weight of zero.

    Returns:
        :math:`\hat k`; ``-inf`` where the largest weights are all equal, ``inf`` where
        there are too few to fit, about 25, or the tail is a few single weights, unless
        these exceed the mean by less than 5 %: then ``-inf`` too.

    Raises:
        ValueError: If ``log_weights`` has another shape or holds a ``nan``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> log_weights = 0.4 * torch.empty(10_000).exponential_()  # k = 0.4
        >>> abs(pareto_k(log_weights) - 0.4) < 0.2
        True
    """
    return _fit(log_weights).k


def pareto_std_error(log_weights: Tensor) -> float:
    r"""Standard error of the log of the mean weight, by the delta method on (2).

    Never below that of the weights as they are. Not an error bar where
    :func:`pareto_k` exceeds 0.7.

    Args:
        log_weights: Shape ``(N,)``, of independent draws; ``-inf`` is a weight of zero.

    Returns:
        In nats; ``inf`` where the tail cannot be fitted.

    Raises:
        ValueError: If ``log_weights`` has another shape or holds a ``nan``.

    Example:
        >>> log_weights = 0.1 * torch.randn(10_000)  # the weights spread by 10 %
        >>> abs(pareto_std_error(log_weights) - 0.001) < 2e-4
        True
        >>> pareto_std_error(torch.randn(10))  # too few to see a tail
        inf
    """
    tail = _fit(log_weights)
    weights = (log_weights.double() - log_weights.max()).exp().sort().values
    if tail.k == math.inf:
        return math.inf
    plain = _relative_error(weights)
    if tail.k == -math.inf:
        return plain
    limit = min(tail.k + _ONE_SIDED * (1 + tail.k) / math.sqrt(tail.size), 0.95)
    ranks = (torch.arange(tail.size).to(weights) + 0.5) / tail.size
    limit = limit or 1e-9
    excess = torch.expm1(-limit * torch.log1p(-ranks)) / limit
    weights[-tail.size :] = tail.cutoff + tail.scale * excess  # (2)
    return max(plain, _relative_error(weights))


class _Tail(NamedTuple):
    """The fit (1), in units of the largest weight."""

    k: float
    scale: float
    cutoff: float
    size: int


def _fit(log_weights: Tensor) -> _Tail:
    if log_weights.dim() != 1 or not len(log_weights):
        raise ValueError(
            f"log_weights must have shape (N,), got {tuple(log_weights.shape)}. "
            "Flatten them, or call once for each set."
        )
    if log_weights.isnan().any():
        raise ValueError(
            f"log_weights must not be nan, and {int(log_weights.isnan().sum())} of "
            f"{len(log_weights)} are. Give such draws the log-weight -inf and say so."
        )
    count = len(log_weights)
    size = math.ceil(min(count / 5, 3 * math.sqrt(count)))  # (1)
    ordered = log_weights.double().sort().values
    if ordered[-1].isinf() or size < _MIN_TAIL:
        return _Tail(math.inf, 0.0, 0.0, 0)
    ordered = ordered - ordered[-1]
    # Lower weights than this are nothing beside the largest.
    cutoff = ordered[-size - 1].clamp(min=math.log(1e-15))
    rounding = math.sqrt(torch.finfo(log_weights.dtype).eps)
    tail = ordered[ordered > cutoff + rounding]  # of finite supports many are equal
    if not len(tail):
        return _Tail(-math.inf, 0.0, 1.0, 0)
    if len(tail) < _MIN_TAIL:
        is_flat = log_mean_exp(ordered).item() > -_FLAT
        return _Tail(-math.inf if is_flat else math.inf, 0.0, 1.0, 0)
    excess = tail.exp() * -torch.expm1(cutoff - tail)
    if tail[0] > -rounding:  # all equal, and the fit may divide by zero: exponential
        return _Tail(0.0, excess[-1].item(), cutoff.exp().item(), len(tail))
    k, scale = fit_generalized_pareto(excess.cpu())
    return _Tail(k, scale, cutoff.exp().item(), len(tail))


def _relative_error(weights: Tensor) -> float:
    """Standard error of the mean over the mean."""
    return (weights.std() / weights.mean()).item() / math.sqrt(len(weights))
