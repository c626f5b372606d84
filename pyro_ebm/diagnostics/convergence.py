"""All convergence diagnostics of one site, computed together."""

__all__ = ["Convergence", "convergence"]

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.diagnostics.ess import (
    effective_size,
    mean_error,
    sd_error,
    tail_size,
)
from pyro_ebm.diagnostics.ranks import folded, normal_scores, split_chains, to_rows
from pyro_ebm.diagnostics.rhat import nested_ratio, ratio

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
    if num_superchains < 1 or num_chains % num_superchains:
        raise ValueError(
            f"num_superchains must divide the number of chains, got {num_superchains} "
            f"for {num_chains} chains."
        )
    some, num_superchains = _some_chains(draws, num_superchains)
    size = max(_CHUNK // max(some.shape[0] * some.shape[1], 1), 1)
    parts = [
        _judge(to_rows(part), num_superchains, num_chains / len(some))
        for part in some.reshape(*some.shape[:2], -1).split(size, -1)
    ]
    return Convergence(*(torch.cat(p).reshape(event) for p in zip(*parts, strict=True)))


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
        effective_size(scores) * scale,
        tail_size(rows) * scale,
        mean_error(rows) / scale**0.5,
        sd_error(rows) / scale**0.5,
    )
