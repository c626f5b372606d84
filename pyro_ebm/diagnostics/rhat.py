r"""R-hat and nested R-hat, the potential scale reduction of many chains.

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
The larger is reported.

References:
    Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), Bayesian Analysis 16(2),
    667-718. Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman (2024), Nested
    R-hat, Bayesian Analysis, arXiv:2110.13017.
"""

__all__ = [
    "nested_r_hat",
    "nested_ratio",
    "nested_ratio_of_moments",
    "r_hat",
    "ratio",
    "ratio_of_moments",
]

import torch
from torch import Tensor

from pyro_ebm.diagnostics.ranks import folded, normal_scores, split_chains, to_rows


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
    if num_superchains < 1 or draws.shape[0] % num_superchains:
        raise ValueError(
            f"num_superchains must divide the number of chains, got {num_superchains} "
            f"for {draws.shape[0]} chains."
        )
    halves = split_chains(to_rows(draws))
    both = [
        nested_ratio(normal_scores(x), 2 * num_superchains)
        for x in (halves, folded(halves))
    ]
    return torch.stack(both).amax(0).reshape(draws.shape[2:])


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
