r"""Effective sample sizes and Monte Carlo standard errors.

With :math:`\hat\rho_t` the autocorrelation at lag ``t``, estimated from ``C`` chains of
length ``N`` against the variance between as well as within them, and the sums
:math:`P_k = \min_{j \le k} (\hat\rho_{2j} + \hat\rho_{2j+1})` up to the first that is
not positive, at ``k = K``,

.. math::
    \mathrm{ESS} = \frac{C N}{\tau}, \qquad
    \tau = -1 + 2 \sum_{k < K} P_k + \max(\hat\rho_{2K}, 0)                 \tag{1}

which is Geyer's initial monotone sequence. From ten draws a chain on this is what ArviZ
computes; of fewer all lags count, where ArviZ lets none. The *bulk* ESS is that of the
normal scores of the draws; the *tail* ESS the smaller one of the events that a draw is
below the 5 % or the 95 % quantile; a standard error takes the ESS of what is averaged,

.. math::
    \mathrm{se}(\bar x)^2 = \frac{\mathrm{Var}\, x}{\mathrm{ESS}(x)},
    \qquad
    \mathrm{se}(s)^2 = \frac{\mathrm{Var}\, (x - \bar x)^2}
        {4 s^2\, \mathrm{ESS}((x - \bar x)^2)}                              \tag{2}

References:
    Geyer (1992), Statistical Science 7(4), 473-483. Vehtari, Gelman, Simpson, Carpenter
    & Bürkner (2021), Bayesian Analysis 16(2), 667-718.
"""

__all__ = [
    "bulk_ess",
    "effective_size",
    "mean_error",
    "mean_std_error",
    "sd_error",
    "sd_std_error",
    "tail_ess",
    "tail_size",
]

import math

import torch
from pyro.ops.tensor_utils import next_fast_len
from torch import Tensor

from pyro_ebm.diagnostics.ranks import (
    normal_scores,
    quantiles,
    split_chains,
    to_rows,
)


def bulk_ess(draws: Tensor) -> Tensor:
    """Effective sample size of the centre of the distribution, rank-normalised.

    Args:
        draws: Shape ``(C, N, *event)``, ``N >= 4``.

    Returns:
        Shape ``event``. All draws count where they are constant.

    Raises:
        ValueError: If there is no chain, or fewer than four draws of each.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> 3500 < bulk_ess(torch.randn(4, 1000)).item() < 4500
        True
    """
    scores = normal_scores(split_chains(to_rows(draws)))
    return effective_size(scores).reshape(draws.shape[2:])


def tail_ess(draws: Tensor) -> Tensor:
    """Effective sample size of the worse of the 5 % and 95 % quantiles.

    Args:
        draws: Shape ``(C, N, *event)``, ``N >= 4``.

    Returns:
        Shape ``event``. All draws count where they are constant.

    Raises:
        ValueError: If there is no chain, or fewer than four draws of each.

    Example:
        >>> tail_ess(torch.randn(4, 1000, 2)).shape
        torch.Size([2])
        >>> bool(tail_ess(torch.randn(4, 1000)) > 2000)  # of independent draws
        True
    """
    return tail_size(to_rows(draws)).reshape(draws.shape[2:])


def mean_std_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean, (2).

    Args:
        draws: Shape ``(C, N, *event)``, ``N >= 4``.

    Returns:
        Shape ``event``, in units of the draws.

    Raises:
        ValueError: If there is no chain, or fewer than four draws of each.

    Example:
        >>> error = mean_std_error(torch.randn(4, 1000))  # sqrt(1 / 4000) = 0.0158
        >>> abs(error.item() - 0.0158) < 0.002
        True
    """
    return mean_error(to_rows(draws)).reshape(draws.shape[2:])


def sd_std_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the standard deviation, (2).

    Args:
        draws: Shape ``(C, N, *event)``, ``N >= 4``.

    Returns:
        Shape ``event``, in units of the draws.

    Raises:
        ValueError: If there is no chain, or fewer than four draws of each.

    Example:
        >>> error = sd_std_error(torch.randn(4, 1000))  # sqrt(1 / 8000) = 0.0112
        >>> abs(error.item() - 0.0112) < 0.002
        True
    """
    return sd_error(to_rows(draws)).reshape(draws.shape[2:])


def tail_size(rows: Tensor) -> Tensor:
    """Tail ESS, ``(D, C, N)`` to ``(D,)``."""
    sizes = []
    for prob in (0.05, 0.95):
        below = (rows <= quantiles(rows, prob)[:, None, None]).to(rows.dtype)
        below = below.masked_fill(rows.isnan(), torch.nan)
        sizes.append(effective_size(split_chains(below)))
    return torch.minimum(*sizes)


def mean_error(rows: Tensor) -> Tensor:
    """Standard error of the mean, ``(D, C, N)`` to ``(D,)``."""
    return (rows.var((-2, -1)) / effective_size(split_chains(rows))).sqrt()  # (2)


def sd_error(rows: Tensor) -> Tensor:
    """Standard error of the standard deviation, ``(D, C, N)`` to ``(D,)``."""
    square = (rows - rows.mean((-2, -1), keepdim=True)) ** 2
    spread, variance = torch.var_mean(square, (-2, -1), correction=0)
    size = effective_size(split_chains(square))
    return (spread / (4 * variance * size)).sqrt()  # (2)


def effective_size(rows: Tensor) -> Tensor:
    """Equation (1) for chains as they are, ``(D, C, N)`` to ``(D,)``."""
    num_chains, length = rows.shape[-2:]
    total = num_chains * length
    rho = torch.nn.functional.pad(_autocorrelation(rows), (0, 2 + length % 2))
    pairs = rho.unflatten(-1, (-1, 2)).sum(-1)
    # The last pair only ends the sum, unless there are so few of them.
    limit = length // 2 if length < 5 else (length - 3) // 2
    index = torch.arange(pairs.shape[-1], device=rows.device)
    stop = torch.where(pairs > 0, limit, index).amin(-1, keepdim=True).clamp(max=limit)
    kept = torch.where(index < stop, pairs.cummin(-1).values, 0.0).sum(-1)
    end = rho.gather(-1, 2 * stop)
    end = torch.where(pairs.gather(-1, stop) > 0, end, end.clamp(min=0)).squeeze(-1)
    tau = -1 + 2 * kept + end  # (1)
    # Antithetic chains may beat independence, by a factor that cannot be trusted.
    tau = tau.clamp(min=1 / math.log10(total))
    constant = rows.amax((-2, -1)) == rows.amin((-2, -1))
    return torch.where(constant, 1.0, 1 / tau) * total


def _autocorrelation(rows: Tensor) -> Tensor:
    """Of all chains together, ``(D, C, N)`` to ``(D, N)``."""
    length = rows.shape[-1]
    mean = rows.mean(-1, keepdim=True)
    size = next_fast_len(2 * length)
    # The transform is linear: average the chains first, and go back once.
    power = torch.view_as_real(torch.fft.rfft(rows - mean, size)).square().mean(-3)
    covariance = torch.fft.irfft(power.sum(-1), size)[:, :length] / length
    variance = covariance[:, :1]
    if rows.shape[-2] > 1:
        variance = variance + mean.squeeze(-1).var(-1, keepdim=True)
    within = covariance[:, :1] * length / (length - 1)
    rho = 1 - (within - covariance) / variance
    rho[:, :1] = variance / variance  # 1, and not a number where nothing is
    return rho
