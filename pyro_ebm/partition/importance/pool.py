r"""Adaptive importance sampling: draws of several proposals, weighted as one mixture.

Each round draws from the current proposal :math:`q_t` and weighs all draws so far
against the mixture of all proposals so far,

.. math::
    w_n = e^{-f(u_n)} \Big/ \frac1T \sum_{t=1}^{T} q_t(u_n)                 \tag{1}

The next proposal is fitted to draws weighed by :math:`w_n^\tau`, where
:math:`\tau \le 1` is the largest power that leaves a given number of them effective: a
proposal that is far from the target takes several rounds to get there, but it is never
fitted to the few draws that happen to hold all the weight.

References:
    Cornuet, Marin, Mira & Robert (2012), Scand. J. Stat. 39, 798-812 (the mixture).
    Koblents & Míguez (2015), Statistics and Computing 25, 407-425 (tempered weights).
"""

__all__ = ["Pool", "Proposes", "difference", "log_density", "of_draws", "tempered"]

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.energies import Energy

#: Rounds that are kept, the last ones: each is evaluated under all proposals.
MAX_ROUNDS = 6


class Proposes(Protocol):
    """A normalised density over flat vectors."""

    def sample(self, num: int) -> Tensor:
        """Draws, shape ``(num, D)``."""

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density, shape ``(N,)`` for ``u`` of shape ``(N, D)``."""


class Pool:
    """The draws of the last rounds with their densities under all proposals.

    Args:
        energy: Of the target, over unconstrained space.
    """

    def __init__(self, energy: Energy) -> None:
        self.energy = energy
        self._proposals: list[Proposes] = []
        self._u: list[Tensor] = []
        self._log_density: list[Tensor] = []
        self._log_proposals: list[list[Tensor]] = []  # [round of the draw][proposal]

    def add(self, proposal: Proposes, num: int) -> Tensor:
        """Draw from a proposal; the log-weights under it alone, shape ``(num,)``."""
        u = proposal.sample(num)
        for old, row in zip(self._u, self._log_proposals, strict=True):
            row.append(proposal.log_prob(old))
        self._proposals.append(proposal)
        self._log_proposals.append([q.log_prob(u) for q in self._proposals])
        self._log_density.append(log_density(self.energy, u))
        self._u.append(u)
        if len(self._u) > MAX_ROUNDS:
            del self._u[0], self._log_density[0], self._log_proposals[0]
            del self._proposals[0]
            for row in self._log_proposals:
                del row[0]
        return of_draws(self._log_density[-1], self._log_proposals[-1][-1])

    @property
    def num_rounds(self) -> int:
        """Proposals so far."""
        return len(self._proposals)

    def draws(self) -> Tensor:
        """All draws, shape ``(N, D)``."""
        return torch.cat(self._u)

    def log_weights(self) -> Tensor:
        """Log of (1), shape ``(N,)``."""
        mixtures = [torch.stack(row).logsumexp(0) for row in self._log_proposals]
        number = math.log(len(self._proposals))
        return of_draws(torch.cat(self._log_density), torch.cat(mixtures)) + number


def difference(log_density: Tensor, log_proposal: Tensor) -> Tensor:
    """Log-weights; ``-inf`` where the target is zero, whatever the proposal is."""
    is_zero = log_density == -torch.inf
    return (log_density - log_proposal).masked_fill(is_zero, -torch.inf)


def of_draws(log_density: Tensor, log_proposal: Tensor) -> Tensor:
    """Log-weights of draws of the proposal.

    One at which the proposal has no density that is a number counts as no draw: it is
    too far out for squares not to overflow.
    """
    log_weights = difference(log_density, log_proposal)
    return log_weights.masked_fill(log_proposal == -torch.inf, -torch.inf)


def log_density(energy: Energy, u: Tensor) -> Tensor:
    """Minus the energy at flat draws, ``-inf`` where it is not finite.

    Args:
        energy: Over unconstrained space.
        u: Shape ``(N, D)``.
    """
    value = energy(u.reshape(len(u), *energy.event_shape)).double()
    return torch.where(value.isfinite(), -value, -torch.inf)


def tempered(log_weights: Tensor, num_effective: float) -> Tensor:
    r"""Log-weights times the largest :math:`\tau \le 1` that leaves enough effective.

    Args:
        log_weights: Shape ``(N,)``.
        num_effective: Effective number wanted.
    """
    wanted = num_effective / len(log_weights)
    if effective_sample_fraction(log_weights) >= wanted:
        return log_weights
    low, high = 1e-9, 1.0  # not zero, which would make a nan of a weight of zero
    for _ in range(40):
        middle = (low + high) / 2
        enough = effective_sample_fraction(middle * log_weights) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return low * log_weights
