r"""Adaptive importance sampling: proposals, and their draws weighted as one mixture.

Each round draws from the current proposal :math:`q_t` and weighs all draws so far
against the mixture of all proposals so far,

.. math::
    w_n = e^{-f(u_n)} \Big/ \frac1T \sum_{t=1}^{T} q_t(u_n)                 \tag{1}

The next proposal is fitted to draws weighed by :math:`w_n^\tau`, where
:math:`\tau \le 1` is the largest power that leaves a given number of them effective: a
proposal that is far from the target takes several rounds to get there, but it is never
fitted to the few draws that happen to hold all the weight. It is itself a mixture,

.. math::
    q = \alpha_1 t + \alpha_2 m + \alpha_0 p_0                              \tag{2}

of Student distributions :math:`t` for modes, a triangular map :math:`m` for marginals
and ridges that no few ellipsoids describe, either of which may be missing, and of the
base :math:`p_0`, which keeps its share, so that a region which all draws have missed
still gets some. The shares are learned from draws of the mixture: with weights
:math:`w_n` and responsibilities :math:`\rho_{nj} = \alpha_j q_j(u_n) / q(u_n)`,

.. math::
    \alpha_j \leftarrow \frac{\sum_n w_n \rho_{nj}}{\sum_n w_n}            \tag{3}

which lowers the Kullback-Leibler divergence from the target to the mixture.

References:
    Cornuet, Marin, Mira & Robert (2012), Scand. J. Stat. 39, 798-812 (the mixture).
    Koblents & Míguez (2015), Statistics and Computing 25, 407-425 (tempered weights).
    Hesterberg (1995), Technometrics 37, 185-194 (the defensive mixture).
    Cappé, Douc, Guillin, Marin & Robert (2008), Statistics and Computing 18, 447-459.
"""

__all__ = [
    "FlatBase",
    "Pool",
    "Proposal",
    "Proposes",
    "difference",
    "log_density",
    "of_draws",
    "tempered",
]

import math
from collections.abc import Sequence
from typing import Protocol, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition.importance.student_mixture import StudentMixture
from pyro_ebm.partition.importance.triangular_map import TriangularMap, fit_map

#: Rounds that are kept, the last ones: each is evaluated under all proposals.
MAX_ROUNDS = 6
#: The base is not given up: with less it could not show that it has become good.
MIN_SHARE = 0.04
#: Nor is a component, of all components together.
_MIN_COMPONENT = 0.02
#: Mass of a component that is none, where there is a map.
_IDLE = 1e-3
#: Weights of a draw, in units of their mean, that are too much for one; what they may
#: hold together; and components that are added there, at once and in all.
_HEAVY = 20.0
_MIN_HEAVY = 0.03
_NUM_NEW = 4
_MAX_COMPONENTS = 100


class Proposes(Protocol):
    """A normalised density over flat vectors."""

    def sample(self, num: int) -> Tensor:
        """Draws, shape ``(num, D)``."""

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density, shape ``(N,)`` for ``u`` of shape ``(N, D)``."""


@final
class Proposal:
    r"""The mixture (2), over flat vectors in unconstrained space, in double precision.

    Args:
        path: For its base.
        mixture: Default: none.
        base_share: :math:`\alpha_0`; 1 where there is nothing else.
        triangular: The map; default: none.
        map_share: :math:`\alpha_2`.
    """

    def __init__(
        self,
        path: GeometricPath,
        mixture: StudentMixture | None = None,
        base_share: float = 0.1,
        triangular: TriangularMap | None = None,
        map_share: float = 0.0,
    ) -> None:
        self.path, self.mixture, self.triangular = path, mixture, triangular
        self.map_share = 0.0 if triangular is None else map_share
        if mixture is None:
            base_share = 1.0 - self.map_share
        self.base_share = base_share

    def sample(self, num: int) -> Tensor:
        """Independent draws, those of the base last, shape ``(num, D)``."""
        which = torch.rand(num)
        from_base = int((which < self.base_share).sum())
        from_map = int((which >= 1 - self.map_share).sum())
        draws, left = [], num - from_base - from_map
        if self.mixture is not None and left:
            draws.append(self.mixture.sample(left))
        if self.triangular is not None and from_map:
            draws.append(self.triangular.sample(from_map))
        if from_base:
            draws.append(self._base_draws(from_base))
        return torch.cat(draws)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of (2), shape ``(N,)`` for ``u`` of shape ``(N, D)``."""
        return self._log_joint(u).logsumexp(0)

    def refitted(self, u: Tensor, weights: Tensor, num_steps: int = 3) -> "Proposal":
        """The proposal after some steps of expectation maximisation.

        The map is fitted anew to all of the draws.

        Args:
            u: Draws, shape ``(N, D)``.
            weights: Shape ``(N,)``, of sum 1.
            num_steps: Of the mixture; the shares (3) are updated once.
        """
        mixture, triangular = self.mixture, self.triangular
        if mixture is None and triangular is None:
            return self
        if mixture is not None:
            for _ in range(num_steps):
                mixture = mixture.updated(u, weights, _MIN_COMPONENT)
        if triangular is not None:
            triangular = fit_map(u, weights, 1 / weights.square().sum().item())
        shares = self.base_share, triangular, self.map_share
        return Proposal(self.path, mixture, *shares).shared_out(u, weights)

    def with_map(self, triangular: TriangularMap, share: float) -> "Proposal":
        """The proposal with a map in it, or with another map, of the given share."""
        base_share = min(self.base_share, MIN_SHARE)
        return Proposal(self.path, self.mixture, base_share, triangular, share)

    def shared_out(self, u: Tensor, weights: Tensor) -> "Proposal":
        """The proposal with the shares (3) of mixture, map and base.

        Args:
            u: Draws, shape ``(N, D)``.
            weights: Shape ``(N,)``, of sum 1.
        """
        parts = self.mixture is not None, self.triangular is not None, True
        rho = self._log_joint(u).softmax(0).nan_to_num(0.0)
        shares = _at_least(rho @ weights, torch.tensor(parts).to(u.device))
        _, map_share, base_share = shares.tolist()
        return Proposal(self.path, self.mixture, base_share, self.triangular, map_share)

    def pruned(self, u: Tensor, weights: Tensor) -> "Proposal":
        """The proposal without components whose mass the map holds.

        Args:
            u: Draws, shape ``(N, D)``.
            weights: Shape ``(N,)``, of sum 1.
        """
        if self.mixture is None or self.triangular is None:
            return self
        rho = self._log_joint(u).softmax(0).nan_to_num(0.0)[0]
        mixture = self.mixture.without_idle(u, weights * rho, _IDLE)
        shares = self.base_share, self.triangular, self.map_share
        return Proposal(self.path, mixture, *shares)

    def thickened(self, u: Tensor, log_weights: Tensor) -> "Proposal":
        """The proposal with components where its own draws weigh too much.

        Args:
            u: Draws, shape ``(N, D)``.
            log_weights: Shape ``(N,)``.

        References:
            Raftery & Bao (2010), Biometrics 66, 1162-1173.
        """
        weights = log_weights.softmax(0)
        heavy = weights > _HEAVY / len(weights)
        share = weights[heavy].sum()
        if self.mixture is None or share < _MIN_HEAVY or self.size > _MAX_COMPONENTS:
            return self
        number = min(_NUM_NEW, int(heavy.sum()))
        chosen = weights.where(heavy, 0.0).multinomial(number)
        return self.joined(self.mixture.at(u[chosen]), min(0.3, share.item()))

    @property
    def is_bent(self) -> bool:
        """Whether a map follows a ridge or a funnel."""
        return self.triangular is not None and self.triangular.has_terms

    @property
    def size(self) -> int:
        """Components."""
        return 0 if self.mixture is None else len(self.mixture.loc)

    def joined(self, mixture: StudentMixture, share: float) -> "Proposal":
        """The proposal with another mixture in it.

        Args:
            mixture: Its components are added to those that there are.
            share: Of the new among all components.
        """
        if self.mixture is not None:
            mixture = self.mixture.joined(mixture, share)
        base_share, map_share = min(self.base_share, 0.2), min(self.map_share, 0.5)
        return Proposal(self.path, mixture, base_share, self.triangular, map_share)

    def _base_draws(self, num: int) -> Tensor:
        return self.path.draw_base(num).reshape(num, -1).double()

    def _log_joint(self, u: Tensor) -> Tensor:
        """Logs of the terms of (2), shape ``(3, N)``: mixture, map, base."""
        base = -self.path.base(u.reshape(len(u), *self.path.event_shape)).double()
        base = base.nan_to_num(-torch.inf, -torch.inf) + math.log(self.base_share)
        none = torch.full_like(base, -torch.inf)
        mixture = triangular = none
        if self.mixture is not None:
            share = 1 - self.base_share - self.map_share
            mixture = self.mixture.log_prob(u) + math.log(share)
        if self.triangular is not None:
            triangular = self.triangular.log_prob(u) + math.log(self.map_share)
        joint = torch.stack([mixture, triangular, base])
        # So far out that squares overflow: there is nothing there.
        return joint.masked_fill(joint.isnan(), -torch.inf)


def _at_least(learned: Tensor, is_there: Tensor) -> Tensor:
    """Shares of what there is, each ``MIN_SHARE`` or more, of sum 1."""
    is_low = (learned < MIN_SHARE) & is_there
    others = learned.where(is_there & ~is_low, 0.0)
    left = 1 - MIN_SHARE * is_low.sum()
    shares = others / others.sum().clamp(min=1e-300) * left
    return torch.where(is_low, MIN_SHARE, shares)


@final
class FlatBase(dist.TorchDistribution):
    """A proposal over flat vectors as a base over an event."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, proposal: Proposes, event_shape: torch.Size) -> None:
        super().__init__(torch.Size(), event_shape, validate_args=False)
        self.proposal = proposal

    @property
    def support(self) -> constraints.Constraint:
        """All of unconstrained space."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density at ``u`` of shape ``(*batch, *event)``."""
        batch = u.shape[: u.dim() - len(self.event_shape)]
        return self.proposal.log_prob(u.reshape(batch.numel(), -1)).reshape(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws in random order, shape ``(*sample, *event)``."""
        number = torch.Size(sample_shape).numel()
        draws = self.proposal.sample(number)[torch.randperm(number)]
        return draws.reshape(torch.Size(sample_shape) + self.event_shape)


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
