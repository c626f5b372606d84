r"""Adaptive importance sampling: from a few rough draws of a target to a good proposal.

Each round draws from the current proposal :math:`q_t`, a point an energy evaluation and
no gradient, and weighs all draws so far against the mixture of all proposals so far,

.. math::
    w_n = e^{-f(x_n)} \Big/ \frac1T \sum_{t=1}^{T} q_t(x_n)                 \tag{1}

Then the proposal is fitted anew to draws resampled by :math:`w_n^\tau`, where
:math:`\tau \le 1` is the largest power that leaves a given effective number of draws: a
proposal that is far from the target takes several rounds to get there, but it is never
fitted to the few draws that happen to hold all the weight.

References:
    Cornuet, Marin, Mira & Robert (2012), Scand. J. Stat. 39, 798-812 (the mixture).
    Koblents & Míguez (2015), Statistics and Computing 25, 407-425 (tempered weights).
"""

__all__ = ["Adaptation", "adapt_proposal"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.importance.proposal import Proposal, fit_proposal
from pyro_ebm.partition.particles.resampling import systematic_resample

#: A proposal is fitted to so many draws, of so large a fraction effective.
_NUM_FITTED = 8000
_EFFECTIVE_FRACTION = 1 / 8


class Adaptation(NamedTuple):
    """What adaptive importance sampling leaves.

    Attributes:
        proposal: Fitted to the draws of all rounds.
        fractions: Effective fraction of the weights in each round.
        num_evaluations: Energy evaluations spent, a point each.
    """

    proposal: Proposal
    fractions: list[float]
    num_evaluations: int


def adapt_proposal(
    path: GeometricPath,
    u: Tensor,
    num_effective: float,
    *,
    num_draws: int,
    num_rounds: int,
) -> Adaptation:
    """Refine a proposal in rounds.

    Args:
        path: To the target, from a base that keeps a share of every proposal.
        u: Rough draws of the target in unconstrained space, shape ``(N, *event)``.
        num_effective: How many independent draws those are worth.
        num_draws: Draws a round.
        num_rounds: At least 1. There is no early end: a proposal with good weights may
            still lack a tail that only the next rounds find.
    """
    pool, weights, fractions = _Pool(path), None, []
    u = u.reshape(len(u), -1)
    for _ in range(num_rounds):
        proposal = fit_proposal(u, num_effective, path, weights, explore=True)
        x, log_weights = pool.add(proposal, num_draws)
        fractions.append(effective_sample_fraction(log_weights).item())
        if fractions[-1] == 0:
            break  # no draw has a finite energy: there is nothing to learn from
        weights = proposal.improved_weights(x, _tempered(log_weights, num_draws))
        log_weights = _tempered(pool.log_weights(), num_draws)
        num_effective = effective_sample_fraction(log_weights).item() * len(log_weights)
        u = pool.draws()[systematic_resample(log_weights[None], _NUM_FITTED)[1][0]]
    proposal = fit_proposal(u, min(num_effective, _NUM_FITTED), path, weights)
    return Adaptation(proposal, fractions, num_draws * len(fractions))


class _Pool:
    """The draws of all rounds with their densities under all proposals."""

    def __init__(self, path: GeometricPath) -> None:
        self.path = path
        self.proposals: list[Proposal] = []
        self.x: list[Tensor] = []
        self.log_target: list[Tensor] = []
        self.log_proposals: list[list[Tensor]] = []  # [round of the draw][proposal]

    def add(self, proposal: Proposal, num_draws: int) -> tuple[Tensor, Tensor]:
        """New draws, and their log weights under the proposal that they are from."""
        x = proposal.sample(num_draws)
        for old, row in zip(self.x, self.log_proposals, strict=True):
            row.append(proposal.log_prob(old))
        self.proposals.append(proposal)
        self.log_proposals.append([q.log_prob(x) for q in self.proposals])
        self.log_target.append(log_target(self.path, x))
        self.x.append(x)
        return x, self.log_target[-1] - self.log_proposals[-1][-1]

    def draws(self) -> Tensor:
        return torch.cat(self.x)

    def log_weights(self) -> Tensor:
        """Log of (1) for all draws."""
        mixtures = [torch.stack(row).logsumexp(0) for row in self.log_proposals]
        number = math.log(len(self.proposals))
        return torch.cat(self.log_target) - torch.cat(mixtures) + number  # (1)


def log_target(path: GeometricPath, u: Tensor) -> Tensor:
    """Log density of the target at flat draws, ``-inf`` where it is not finite."""
    energy = path.target(u.reshape(len(u), *path.event_shape)).double()
    return torch.where(energy.isfinite(), -energy, -torch.inf)


def _tempered(log_weights: Tensor, num_draws: int) -> Tensor:
    """Log weights times the largest power that leaves enough of them effective."""
    wanted = _EFFECTIVE_FRACTION * num_draws / len(log_weights)
    if effective_sample_fraction(log_weights) >= wanted:
        return log_weights
    low, high = 1e-9, 1.0  # not zero, which would make a nan of a weight of zero
    for _ in range(40):
        middle = (low + high) / 2
        enough = effective_sample_fraction(middle * log_weights) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return low * log_weights
