r"""Whether the draws of a base are those of its density.

A base is trusted twice: its draws start the path, and its density weighs them. Where
the two are not of one law, as of ``LKJCholesky`` for three and more dimensions in
torch, log Z is off by a constant that no other diagnostic shows. A Metropolis step
keeps the law of the density, so of draws :math:`u` of that law and
:math:`u' = u + \sigma \xi`,

.. math::
    \mathbb{E}\left[\min\left(1, e^{f_0(u) - f_0(u')}\right)
        \left(g(u') - g(u)\right)\right] = 0                                \tag{1}

for each bounded :math:`g`; here the coordinates and the energy, and the squares of the
former, through ``tanh``. It takes two evaluations a draw, and no gradient.
"""

__all__ = ["check_draws"]

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.energies import DistributionEnergy, Energy, unconstrained

#: Probability below which more draws are made, and below which they speak against it.
_SUSPECT, _CONFIRMED = 1e-2, 1e-6
#: Of the first look.
_NUM_DRAWS, _NUM_MORE = 4_000, 16_000
#: Share of draws without a finite place in unconstrained space that is let pass.
_MAX_LOST = 0.01
#: Mean acceptance below which (1) has too few draws that move.
_MIN_MOVED = 0.02


@torch.no_grad()
def check_draws(base: dist.TorchDistribution) -> Finding | None:
    """Compare the draws of a distribution with its density by (1).

    First with 4,000 draws, and where these are in doubt with 16,000 others. A sound
    base is accused once in a million times.

    Args:
        base: A normalised distribution over one event, on a continuous support.

    Returns:
        The finding; ``None`` if nothing was found, or the support is discrete.

    Example:
        >>> check_draws(dist.Gamma(2.0, 1.0))
        >>> wrong = dist.LKJCholesky(4, torch.tensor(2.0))
        >>> check_draws(wrong).reason == Reason.BASE_INCONSISTENT
        True
    """
    energy = DistributionEnergy(base)
    if energy.support.is_discrete:
        return None
    flat, to_support = unconstrained(energy)
    for num, limit in ((_NUM_DRAWS, _SUSPECT), (_NUM_MORE, _CONFIRMED)):
        u = to_support.inv(base.sample(torch.Size((num,))))
        u = u.reshape(num, *flat.event_shape)
        kept = u[u.reshape(num, -1).isfinite().all(-1)]
        if len(kept) < (1 - _MAX_LOST) * num:
            return Finding(
                Reason.BASE_INCONSISTENT,
                f"{num - len(kept)} of {num} draws of the base are at the boundary of "
                "its support, where rounding put them",
            )
        probability = _probability(flat, kept)
        if probability > limit:
            return None
    return Finding(
        Reason.BASE_INCONSISTENT,
        "the draws of the base do not have its density: a Metropolis step moves their "
        f"law, by a test of which the probability is {probability:.0e}",
    )


def _probability(energy: Energy, u: Tensor) -> float:
    """Of a mean (1) as far from zero, by the worst statistic and their number."""
    flat = u.reshape(len(u), -1)
    centre, spread = _location(flat)
    step = 2.38 / math.sqrt(flat.shape[-1]) * spread
    moved = flat + step * torch.randn_like(flat)
    here, there = energy(u), energy(moved.reshape(u.shape))
    accept = (here - there).clamp(max=0.0).exp().nan_to_num(0.0)
    if accept.mean() < _MIN_MOVED:
        return 1.0
    level, width = _location(here[:, None])

    def statistics(points: Tensor, value: Tensor) -> Tensor:
        scaled = ((points - centre) / spread).tanh()
        energies = ((value[:, None] - level) / width).tanh()
        return torch.cat([scaled, scaled.square(), energies], -1)

    change = statistics(moved, there) - statistics(flat, here)
    terms = (accept[:, None] * change.nan_to_num(0.0)).double()  # (1)
    z = terms.mean(0) / terms.std(0) * math.sqrt(len(terms))
    worst = z.nan_to_num(0.0).abs().max().item()
    return math.erfc(worst / math.sqrt(2)) * z.numel()


def _location(values: Tensor) -> tuple[Tensor, Tensor]:
    """Median and standard deviation by the quartiles, of each column."""
    ordered = values.sort(0).values
    lower, centre, upper = (ordered[int(p * len(values))] for p in (0.25, 0.5, 0.75))
    tiny = torch.finfo(values.dtype).tiny
    return centre, ((upper - lower) / 1.349).clamp(min=tiny)
