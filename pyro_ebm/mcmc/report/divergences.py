r"""Where divergent transitions start, and where the energy is infinite.

With :math:`u_i`, the rank of start :math:`i` among all draws in one coordinate, as a
part of them,

.. math::
    e = \frac1n \sum_{i=1}^n |2 u_i - 1|, \qquad
    z = \sqrt{12 n}\, \left(e - \tfrac12\right)                           \tag{1}

is near standard normal if starts are draws like any others. If they are all in a tail
of a coordinate, or of the energy, the chains hardly enter what lies beyond.
"""

__all__ = ["hole_in_support", "starts_in_a_tail"]

import math

import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.mcmc.report.summary import coordinate_names

#: Distinct starts, and chains that have any, below which nothing is said.
_MIN_STARTS, _MIN_CHAINS = 8, 3
#: Least (1) of starts that are in a tail, and its least score for one coordinate.
_TAIL, _MIN_SCORE = 0.8, 4.0
#: Draws that starts are ranked among.
_MAX_DRAWS = 8192
#: Part of the points among the draws at which an infinite energy is no accident.
_HOLE = 0.05


@torch.no_grad()
def starts_in_a_tail(
    samples: dict[str, Tensor], energy: Tensor, divergent: Tensor
) -> str:
    """The tail in which divergent transitions start; empty if they start anywhere.

    Args:
        samples: Of each site, shape ``(C, N, *site)``.
        energy: Shape ``(C, N)``.
        divergent: Whether the transition to a draw was, which then stayed where it
            had started; shape ``(C, N)``.
    """
    chains, times = _distinct(energy, divergent)
    if len(chains) < _MIN_STARTS or len(chains.unique()) < _MIN_CHAINS:
        return ""
    names, extremes, sides = ["the energy"], *_ranks(energy, chains, times)
    for site, draws in samples.items():
        names += coordinate_names(site, draws.shape[2:])
        more = _ranks(draws, chains, times)
        extremes, sides = torch.cat([extremes, more[0]]), torch.cat([sides, more[1]])
    best = int(extremes.argmax())
    score = math.sqrt(12 * len(chains)) * (extremes[best].item() - 0.5)  # (1)
    least = math.sqrt(_MIN_SCORE**2 + 2 * math.log(len(names)))
    if extremes[best] < _TAIL or score < least:
        return ""
    side, end = sides[best].item(), "both ends"
    if abs(side - 0.5) > 0.2:
        end = "the upper end" if side > 0.5 else "the lower end"
    return f"{end} of {names[best]}"


def _distinct(energy: Tensor, divergent: Tensor) -> tuple[Tensor, Tensor]:
    """Chains and times of the starts, each of which counts once.

    A chain comes back to no point, and so has one energy only where it has stayed.
    """
    chains, times = divergent.nonzero().unbind(1)
    points = torch.stack([chains.to(energy), energy[chains, times]], 1)
    _, number = points.unique(dim=0, return_inverse=True)
    count = int(number.max()) + 1 if len(number) else 0
    some = number.new_zeros(count).scatter_(
        0, number, torch.arange(len(number), device=number.device)
    )
    return chains[some], times[some]


def _ranks(draws: Tensor, chains: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (1) and mean rank of the starts in each coordinate, shape ``(D,)``."""
    columns = draws.reshape(*draws.shape[:2], -1)
    rows = columns.flatten(0, 1)
    some = rows[:: -(-len(rows) // _MAX_DRAWS)].mT.contiguous().sort(1).values
    starts = columns[chains, times].mT.contiguous()
    low, high = (torch.searchsorted(some, starts, right=r) for r in (False, True))
    ranks = (low + high) / (2.0 * some.shape[1])
    return (2 * ranks - 1).abs().mean(1), ranks.mean(1)


def hole_in_support(energy: Tensor) -> list[Finding]:
    """What to do where the energy is infinite in the midst of the draws.

    Args:
        energy: At points among the draws.
    """
    share = 1 - energy.isfinite().double().mean().item()
    if share < _HOLE:
        return []
    return [
        Finding(
            Reason.ZERO_DENSITY,
            f"the density is zero at {share:.0%} of the points among the draws, inside "
            "the support, where no gradient leads away: sample on the support alone, "
            "as Uniform(max(y), ...) for a bound of the data y",
        )
    ]
