r"""R-hat, effective sample sizes and Monte Carlo errors of many chains.

With :math:`\bar x_c` and :math:`s_c^2` the mean and variance of chain ``c`` of length
``N``,

.. math::
    \hat R^2 = \frac{N - 1}{N}
        + \frac{\mathrm{Var}_c\, \bar x_c}{\mathrm{mean}_c\, s_c^2}         \tag{1}

is near 1 once each chain alone has seen the whole distribution. A thousand chains need
not be that long. Start the chains of a group, a *superchain*, at the same point; they
have forgotten it once the means of the superchains agree,

.. math::
    n\hat R^2 = 1 + \frac{\mathrm{Var}_k\, \bar x_k}
        {\mathrm{mean}_k [\mathrm{Var}_{c \in k}\, \bar x_c
                          + \mathrm{mean}_{c \in k}\, s_c^2]}               \tag{2}

Both are taken of the halves of the chains, which shows a drift that all of them share,
and of normal scores: those of the draws and those of their distances from the median.
The larger is reported. The draw whose rank among all :math:`S` is :math:`r`, averaged
over equal draws, has the score

.. math::
    z = \Phi^{-1}\!\left(\frac{r - 3/8}{S + 1/4}\right)                     \tag{3}

so that what is computed from it exists for tails of any weight, and stays the same
under an increasing map of the draws.

With :math:`\hat\rho_t` the autocorrelation at lag ``t``, estimated from ``C`` chains of
length ``N`` against the variance between as well as within them, and the sums
:math:`P_k = \min_{j \le k} (\hat\rho_{2j} + \hat\rho_{2j+1})` up to the first that is
not positive, at ``k = K``,

.. math::
    \mathrm{ESS} = \frac{C N}{\tau}, \qquad
    \tau = -1 + 2 \sum_{k < K} P_k + \max(\hat\rho_{2K}, 0)                 \tag{4}

which is Geyer's initial monotone sequence. From ten draws a chain on this is what ArviZ
computes; of fewer all lags count, where ArviZ lets none. The *bulk* ESS is that of the
normal scores of the draws; the *tail* ESS the smaller one of the events that a draw is
below the 5 % or the 95 % quantile; a standard error takes the ESS of what is averaged,

.. math::
    \mathrm{se}(\bar x)^2 = \frac{\mathrm{Var}\, x}{\mathrm{ESS}(x)},
    \qquad
    \mathrm{se}(s)^2 = \frac{\mathrm{Var}\, (x - \bar x)^2}
        {4 s^2\, \mathrm{ESS}((x - \bar x)^2)}                              \tag{5}

References:
    Geyer (1992), Statistical Science 7(4), 473-483. Vehtari, Gelman, Simpson, Carpenter
    & Bürkner (2021), Bayesian Analysis 16(2), 667-718. Margossian, Hoffman, Sountsov,
    Riou-Durand, Vehtari & Gelman (2024), Nested R-hat, Bayesian Analysis,
    arXiv:2110.13017. Blom (1958), Statistical estimates and transformed beta-variables.
"""

__all__ = [
    "Convergence",
    "bulk_ess",
    "convergence",
    "mean_std_error",
    "nested_r_hat",
    "nested_ratio",
    "nested_ratio_of_moments",
    "quantiles",
    "r_hat",
    "ratio",
    "ratio_of_moments",
    "sd_std_error",
    "split_chains",
    "tail_ess",
]

import math
from typing import Any, NamedTuple

import torch
from pyro.ops.tensor_utils import next_fast_len
from torch import Tensor

from pyro_ebm.core.validation import as_tensor

#: Numbers that are looked at, half a second to a second a million; more are left out.
_MAX_NUMBERS = 2**22
#: Numbers held in memory at once, of the same coordinates.
_CHUNK = 2**21


class Convergence(NamedTuple):
    r"""R-hat, effective sizes and errors of one site, for each coordinate.

    Attributes:
        r_hat: Rank-normalised, folded split :math:`\hat R`.
        nested_r_hat: The same between superchains; that of single chains where each
            started at a point of its own.
        bulk_ess: Effective sample size of the centre.
        tail_ess: Effective sample size of the 5 % and 95 % quantiles.
        mean_std_error: Monte Carlo standard error of the mean.
        sd_std_error: Monte Carlo standard error of the standard deviation.

    All have the shape of the event. The two errors are in units of the draws, the two
    sizes numbers of independent draws.

    Example:
        It is what :func:`convergence` returns.

        >>> stuck = torch.randn(4, 500) + torch.arange(4.0)[:, None]
        >>> found = convergence(stuck)  # no two chains agree on the mean
        >>> bool(found.r_hat > 1.2), bool(found.bulk_ess < 20)
        (True, True)
    """

    r_hat: Tensor
    nested_r_hat: Tensor
    bulk_ess: Tensor
    tail_ess: Tensor
    mean_std_error: Tensor
    sd_std_error: Tensor


def convergence(draws: Tensor, num_superchains: int | None = None) -> Convergence:
    """Compute all convergence diagnostics of many chains.

    Of more than some four million numbers only a part of the chains is looked at,
    never fewer than 64, and sample sizes are scaled up.

    Args:
        draws: Shape ``(C, N, *event)``, ``N >= 4``.
        num_superchains: Groups of chains side by side that started at the same point;
            default: as many as chains.

    Returns:
        Tensors of shape ``event``, in double precision.

    Raises:
        ValueError: If ``num_superchains`` does not divide the number of chains, there
            is no chain, or there are fewer than four draws of each.

    Example:
        >>> found = convergence(torch.randn(4, 1000, 2))
        >>> found.r_hat.shape, bool((found.bulk_ess > 3000).all())
        (torch.Size([2]), True)
    """
    num_chains, event = draws.shape[0], draws.shape[2:]
    num_superchains = num_chains if num_superchains is None else num_superchains
    _require_divisor(num_superchains, num_chains)
    some, num_superchains = _some_chains(draws, num_superchains)
    size = max(_CHUNK // max(some.shape[0] * some.shape[1], 1), 1)
    parts = [
        _judge(to_rows(part), num_superchains, num_chains / len(some))
        for part in some.reshape(*some.shape[:2], -1).split(size, -1)
    ]
    return Convergence(*(torch.cat(p).reshape(event) for p in zip(*parts, strict=True)))


def _require_divisor(num_superchains: int, num_chains: int) -> None:
    if num_superchains < 1 or num_chains % num_superchains:
        raise ValueError(
            f"num_superchains must divide the number of chains, got {num_superchains} "
            f"for {num_chains} chains."
        )


def _some_chains(draws: Tensor, num_superchains: int) -> tuple[Tensor, int]:
    """The first chains of each superchain, and how many superchains they are."""
    wanted = max(64, _MAX_NUMBERS // max(draws[0].numel(), 1))
    if len(draws) <= wanted:
        return draws, num_superchains
    groups = draws.unflatten(0, (num_superchains, -1))[:wanted]
    return groups[:, : max(wanted // len(groups), 1)].flatten(0, 1), len(groups)


def _judge(rows: Tensor, num_superchains: int, scale: float) -> Convergence:
    halves = split_chains(rows)
    scores, spread = normal_scores(halves), normal_scores(folded(halves))
    return Convergence(
        torch.maximum(ratio(scores), ratio(spread)),
        torch.maximum(
            nested_ratio(scores, 2 * num_superchains),
            nested_ratio(spread, 2 * num_superchains),
        ),
        _effective_size(scores) * scale,
        _tail_size(rows) * scale,
        _mean_error(rows) / scale**0.5,
        _sd_error(rows) / scale**0.5,
    )


def r_hat(draws: Tensor) -> Tensor:
    r"""Rank-normalised, folded split :math:`\hat R` (1).

    Args:
        draws: Shape ``(C, N, *event)``, ``N >= 4``; a single chain is compared with
            itself by its halves.

    Returns:
        Shape ``event``; above 1.01 the chains have not mixed. ``nan`` of a constant.

    Raises:
        ValueError: If there is no chain, or fewer than four draws of each.

    Example:
        >>> same, apart = torch.randn(4, 500), torch.arange(4.0)[:, None]
        >>> r_hat(same).item() < 1.02, r_hat(same + apart).item() > 1.2
        (True, True)
    """
    halves = split_chains(to_rows(draws))
    both = torch.stack([ratio(normal_scores(x)) for x in (halves, folded(halves))])
    return both.amax(0).reshape(draws.shape[2:])


def nested_r_hat(draws: Tensor, num_superchains: int) -> Tensor:
    r"""Rank-normalised, folded split :math:`n\hat R` (2), for many short chains.

    Args:
        draws: Shape ``(C, N, *event)``, ``N >= 4``; chains of a superchain, which
            started at the same point, stand side by side.
        num_superchains: ``K``, a divisor of ``C``.

    Returns:
        Shape ``event``; above 1.01 the chains have not forgotten their start.

    Raises:
        ValueError: If ``num_superchains`` does not divide the number of chains, there
            is no chain, or there are fewer than four draws of each.

    Example:
        >>> short = torch.randn(512, 1) + torch.randn(512, 4)  # slow to move
        >>> bool(r_hat(short) > 1.2), bool(nested_r_hat(short, 4) < 1.05)
        (True, True)
    """
    _require_divisor(num_superchains, draws.shape[0])
    halves = split_chains(to_rows(draws))
    both = [
        nested_ratio(normal_scores(x), 2 * num_superchains)
        for x in (halves, folded(halves))
    ]
    return torch.stack(both).amax(0).reshape(draws.shape[2:])


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
    return _effective_size(scores).reshape(draws.shape[2:])


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
    return _tail_size(to_rows(draws)).reshape(draws.shape[2:])


def mean_std_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean, (5).

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
    return _mean_error(to_rows(draws)).reshape(draws.shape[2:])


def sd_std_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the standard deviation, (5).

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
    return _sd_error(to_rows(draws)).reshape(draws.shape[2:])


def ratio(rows: Tensor) -> Tensor:
    """Equation (1) without split or ranks, ``(D, C, N)`` to ``(D,)``."""
    variance, mean = torch.var_mean(rows, -1)
    return ratio_of_moments(mean, variance, rows.shape[-1])


def nested_ratio(rows: Tensor, num_superchains: int) -> Tensor:
    """Equation (2) without split or ranks, ``(D, C, N)`` to ``(D,)``."""
    variance, mean = torch.zeros_like(rows[..., 0]), rows.mean(-1)
    if rows.shape[-1] > 1:
        variance = rows.var(-1)
    return nested_ratio_of_moments(mean, variance, num_superchains)


def ratio_of_moments(mean: Tensor, variance: Tensor, length: int) -> Tensor:
    """Equation (1) from the moments of each chain, ``(D, C)`` to ``(D,)``."""
    return ((length - 1) / length + mean.var(-1) / variance.mean(-1)).sqrt()  # (1)


def nested_ratio_of_moments(
    mean: Tensor, variance: Tensor, num_superchains: int
) -> Tensor:
    """Equation (2) from the moments of each chain, ``(D, C)`` to ``(D,)``."""
    mean = mean.unflatten(-1, (num_superchains, -1))
    within = variance.unflatten(-1, (num_superchains, -1)).mean(-1)
    if mean.shape[-1] > 1:
        within = within + mean.var(-1)
    return (1 + mean.mean(-1).var(-1) / within.mean(-1)).sqrt()  # (2)


def _tail_size(rows: Tensor) -> Tensor:
    """Tail ESS, ``(D, C, N)`` to ``(D,)``."""
    sizes = []
    for prob in (0.05, 0.95):
        below = (rows <= quantiles(rows, prob)[:, None, None]).to(rows.dtype)
        below = below.masked_fill(rows.isnan(), torch.nan)
        sizes.append(_effective_size(split_chains(below)))
    return torch.minimum(*sizes)


def _mean_error(rows: Tensor) -> Tensor:
    """Standard error of the mean, ``(D, C, N)`` to ``(D,)``."""
    return (rows.var((-2, -1)) / _effective_size(split_chains(rows))).sqrt()  # (5)


def _sd_error(rows: Tensor) -> Tensor:
    """Standard error of the standard deviation, ``(D, C, N)`` to ``(D,)``."""
    square = (rows - rows.mean((-2, -1), keepdim=True)) ** 2
    spread, variance = torch.var_mean(square, (-2, -1), correction=0)
    size = _effective_size(split_chains(square))
    return (spread / (4 * variance * size)).sqrt()  # (5)


def _effective_size(rows: Tensor) -> Tensor:
    """Equation (4) for chains as they are, ``(D, C, N)`` to ``(D,)``."""
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
    tau = -1 + 2 * kept + end  # (4)
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


# Ranks -----------------------------------------------------------------------------


def to_rows(draws: Any) -> Tensor:
    """Draws of shape ``(C, N, *event)`` as ``(D, C, N)``, in double precision.

    Raises:
        ValueError: If there is no chain, or fewer than four draws of each.
    """
    draws = as_tensor("draws", draws)
    if draws.dim() < 2 or draws.shape[0] < 1 or draws.shape[1] < 4:
        raise ValueError(
            "draws must have shape (num_chains, num_draws, *event) with at least 1 "
            f"chain and 4 draws, got {tuple(draws.shape)}. Draw more, or put the "
            "dimension of chains first: draws[None] for a single chain."
        )
    return draws.reshape(*draws.shape[:2], -1).double().movedim(2, 0)


def split_chains(rows: Tensor) -> Tensor:
    """Halves of the chains: ``(D, C, N)`` to ``(D, 2 C, N // 2)``.

    First halves come first; a draw in the middle is left out.
    """
    half = rows.shape[-1] // 2
    return torch.cat([rows[..., :half], rows[..., -half:]], -2)


def folded(rows: Tensor) -> Tensor:
    """Folded draws: absolute deviations from the median of all chains."""
    return (rows - quantiles(rows, 0.5)[:, None, None]).abs()


def quantiles(rows: Tensor, prob: float) -> Tensor:
    """Quantile over all chains by linear interpolation, ``(D, C, N)`` to ``(D,)``."""
    flat = rows.flatten(-2)
    position = prob * (flat.shape[-1] - 1)
    below = min(int(position), flat.shape[-1] - 2)
    low = flat.kthvalue(below + 1).values
    high = flat.kthvalue(below + 2).values
    return torch.lerp(low, high, position - below)


def normal_scores(rows: Tensor) -> Tensor:
    """The scores (3) among all chains, in the shape ``(D, C, N)`` of ``rows``."""
    flat = rows.flatten(-2)
    ordered, order = flat.sort(-1)
    ranks = torch.empty_like(flat).scatter_(-1, order, _average_ranks(ordered))
    scores = torch.special.ndtri((ranks - 0.375) / (flat.shape[-1] + 0.25))  # (3)
    return scores.masked_fill(flat.isnan(), torch.nan).reshape(rows.shape)


def _average_ranks(ordered: Tensor) -> Tensor:
    """Ranks from 1 of sorted values; equal ones share the mean of theirs."""
    size = ordered.shape[-1]
    index = torch.arange(size, device=ordered.device)
    differs = ordered[..., 1:] != ordered[..., :-1]
    edge = torch.ones_like(ordered[..., :1], dtype=torch.bool)
    is_first = torch.cat([edge, differs], -1)
    is_last = torch.cat([differs, edge], -1)
    first = torch.where(is_first, index, 0).cummax(-1).values
    last = torch.where(is_last, index, size).flip(-1).cummin(-1).values.flip(-1)
    return (first + last).to(ordered.dtype) / 2 + 1
