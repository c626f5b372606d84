r"""Maximum likelihood with log Z by importance sampling, and a bound of it.

.. math::
    \hat Z &= \frac1N \sum_{j=1}^{N} \frac{e^{-f_\theta(y_j)}}{p_n(y_j)},
              \qquad y_j \sim p_n                                          \tag{1} \\
    J      &= -f_\theta(x) - \log\hat Z                                    \tag{2} \\
    J_c    &= -f_\theta(x) - c - e^{-c} \hat Z + 1                         \tag{3}

The gradient of (2) is that of eq. (1.16) with self-normalised weights, biased by
:math:`O(1/N)`. Since :math:`\log Z \le c + e^{-c} Z - 1` with equality at
:math:`c = \log Z`, the mean of (3) is a lower bound of the log-likelihood for any
:math:`c`, and its gradient in :math:`\theta` and :math:`c` is unbiased.

References:
    Bengio & Senecal (2008), IEEE Transactions on Neural Networks 19, 713-722 (2).
    Jordan, Ghahramani, Jaakkola & Saul (1999), Machine Learning 37, 183-233 (the
    tangent of the logarithm).
"""

__all__ = ["BoundedLikelihood", "ImportanceSampledLikelihood", "ImportanceState"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.objectives.contrast.noise import (
    LearnedLogPartition,
    Noise,
    effective_number,
    noise_of,
    require_noise,
)
from pyro_ebm.infer.objectives.objective import Need, Objective, Surrogate, Terms


class ImportanceState(nn.Module):
    r"""Log Z and effective number of the draws of the last step.

    Attributes:
        log_partition: :math:`\log\hat Z`, nats. Exactness: *consistent*.
        ess: Effective number of the draws. Close to 1, neither the value nor the
            gradient means anything.
    """

    log_partition: Tensor
    ess: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_partition", torch.tensor(math.nan))
        self.register_buffer("ess", torch.tensor(math.nan))


@dataclass(frozen=True)
class _ByProposal(Objective):
    """What both have: draws of a proposal, with their weights."""

    needs: ClassVar[frozenset[Need]] = frozenset({"noise"})
    log_partition: ClassVar[Literal["consistent"]] = "consistent"
    is_pointwise: ClassVar[bool] = True

    proposal: Noise = None
    num_draws: int = 1024

    def __post_init__(self) -> None:
        if self.num_draws < 2:
            raise ValueError(f"num_draws must be at least 2, got {self.num_draws}.")

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse a proposal that does not fit; see :meth:`Objective.check`."""
        proposal = noise_of(self.proposal, distribution, "proposal")
        require_noise(proposal, distribution.energy, "proposal")

    def current_proposal(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Any:
        """The proposal; see :meth:`Objective.current_proposal`."""
        return noise_of(self.proposal, distribution, "proposal")

    def num_proposed(self, batch_size: int) -> int:
        """See :meth:`Objective.num_proposed`."""
        return self.num_draws

    def second_term_covariance(
        self,
        distribution: EnergyDistribution,
        rows_of: Callable[[Tensor], Tensor],
        covariance: Tensor,
    ) -> Tensor:
        """Of a mean by normalised weights; see the method of :class:`Objective`."""
        energy = distribution.energy
        proposal = noise_of(self.proposal, distribution, "proposal")
        y = proposal.sample(torch.Size((self.num_draws,)))
        y = y.to(**energy.tensor_options(y))
        with torch.no_grad():
            weights = (-energy(y) - proposal.log_prob(y)).double().softmax(0)
        rows = rows_of(energy(y))
        deviation = weights[:, None] * (rows - weights @ rows)
        return deviation.mT @ deviation

    def _log_weights(self, distribution: EnergyDistribution) -> Tensor:
        """Of draws of the proposal, shape ``(num_draws,)``."""
        energy = distribution.energy
        proposal = noise_of(self.proposal, distribution, "proposal")
        with torch.no_grad():
            y = proposal.sample(torch.Size((self.num_draws,)))
            y = y.to(**energy.tensor_options(y))
            log_proposal = proposal.log_prob(y)
        return -energy(y) - log_proposal.to(y)


@final
@dataclass(frozen=True)
class ImportanceSampledLikelihood(_ByProposal):
    r"""Maximum likelihood (2), with log Z from draws of a proposal.

    Args:
        proposal: A distribution with ``sample`` and ``log_prob`` over the same events
            and support, with tails no lighter than those of the model, or a module
            that returns one; it is not trained here. Default: the base of the
            :class:`~pyro_ebm.EnergyModel`.
        num_draws: :math:`N`, drawn anew at each step.

    Raises:
        ValueError: If ``num_draws`` is below 2.

    Exactness: *consistent* in :math:`N`, as the :math:`\log\hat Z` in its state; both
    fail without a sign but ``state.ess`` where the proposal misses the model.

    Cost: ``num_draws`` values a step and one a data point, with gradient in the
    parameters only.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> proposal = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> objective = ImportanceSampledLikelihood(proposal)
        >>> loss = pyro_ebm.infer.ObjectiveLoss(energy, objective)
        >>> loss(torch.randn(100, 2)).backward()
        >>> 400 < loss.state.ess < 1024
        tensor(True)
    """

    def make_state(self) -> ImportanceState:
        """Empty notes."""
        return ImportanceState()

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy, notes = distribution.energy, cast(ImportanceState, state)
        log_weights = self._log_weights(distribution)
        log_partition = log_weights.logsumexp(0) - math.log(self.num_draws)  # (1)
        notes.log_partition = log_partition.detach()
        notes.ess = effective_number(log_weights)

        def surrogate(x: Tensor) -> Terms:
            value = energy(x)
            return Terms(-value - log_partition, value)  # (2)

        return surrogate


@final
@dataclass(frozen=True)
class BoundedLikelihood(_ByProposal):
    r"""Maximisation of the lower bound (3) of the likelihood, with a learned log Z.

    Args:
        proposal: See :class:`ImportanceSampledLikelihood`.
        num_draws: :math:`N`, drawn anew at each step.

    Raises:
        ValueError: If ``num_draws`` is below 2.

    Exactness: the mean of the objective is a *lower bound* of the log-likelihood, its
    gradient is unbiased. ``state.log_partition`` is :math:`c`, a *consistent* log Z of
    the current parameters, started at :math:`\log\hat Z`.

    Cost: ``num_draws`` values a step and one a data point, with gradient in the
    parameters only.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> proposal = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> loss = pyro_ebm.infer.ObjectiveLoss(energy, BoundedLikelihood(proposal))
        >>> loss(torch.randn(100, 2)).backward()
        >>> abs(loss.state.log_partition.item() - math.log(2 * math.pi)) < 0.2
        True
    """

    def make_state(self) -> LearnedLogPartition:
        """The learned log Z."""
        return LearnedLogPartition()

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy, learned = distribution.energy, cast(LearnedLogPartition, state)
        log_weights = self._log_weights(distribution)
        learned.observe(log_weights)
        c = learned.log_partition
        penalty = c + (log_weights - c).exp().mean() - 1

        def surrogate(x: Tensor) -> Terms:
            value = energy(x)
            return Terms(-value - penalty, value)  # (3)

        return surrogate
