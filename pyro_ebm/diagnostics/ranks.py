r"""Rank normalisation of the draws of many chains.

The draw whose rank among all :math:`S` is :math:`r`, averaged over equal draws, becomes

.. math::
    z = \Phi^{-1}\!\left(\frac{r - 3/8}{S + 1/4}\right)                     \tag{1}

so that what is computed from it exists for tails of any weight, and stays the same
under an increasing map of the draws.

References:
    Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), Bayesian Analysis 16(2),
    667-718. Blom (1958), Statistical estimates and transformed beta-variables.
"""

__all__ = ["folded", "normal_scores", "quantiles", "split_chains", "to_rows"]

import torch
from torch import Tensor


def to_rows(draws: Tensor) -> Tensor:
    """Draws of shape ``(C, N, *event)`` as ``(D, C, N)``, in double precision.

    Raises:
        ValueError: If there is no chain, or fewer than four draws of each.
    """
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
    """The scores (1) among all chains, in the shape ``(D, C, N)`` of ``rows``."""
    flat = rows.flatten(-2)
    ordered, order = flat.sort(-1)
    ranks = torch.empty_like(flat).scatter_(-1, order, _average_ranks(ordered))
    scores = torch.special.ndtri((ranks - 0.375) / (flat.shape[-1] + 0.25))  # (1)
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
