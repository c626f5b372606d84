r"""A penalty on large energies, for any objective that has negative points.

.. math::
    J_\alpha(x) = J(x) - \alpha \big( f_\theta(x)^2
        + \mathbb{E}_{y}\, f_\theta(y)^2 \big)                             \tag{1}

with :math:`y` where the objective pushes the energy up: its chains, generator or noise.
Since only differences of energies matter to :math:`q_\theta`, :math:`f` is otherwise
free to drift to values where floating-point numbers are coarse, and to grow without
bound where chains do not control it.

References:
    Du & Mordatch (2019), NeurIPS.
"""

__all__ = ["EnergyPenalty"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from pyro_ebm.core.verdict import Finding
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy
from pyro_ebm.infer.objectives.objective import (
    Objective,
    Surrogate,
    Terms,
    require_objective,
)
from pyro_ebm.mcmc import Kernel

#: What an objective with negatives says that it needs, one of these.
_WITH_NEGATIVES = frozenset({"chains", "noise", "generator"})


@final
@dataclass(frozen=True)
class EnergyPenalty(Objective):
    r"""An objective less the penalty (1) on energies far from zero.

    Args:
        objective: Any that has negatives: chains, noise or a generator.
        weight: :math:`\alpha`, in units of one over nats; 0.001 to 0.1 is usual.

    Raises:
        TypeError: If ``objective`` is none.
        ValueError: If ``weight`` is not positive, or the objective has no negatives.

    Exactness: *biased*, as any penalty: the energy is made flatter, and where it could
    be that of the data it no longer is. For a Gaussian energy with a free constant the
    bias is of the order of ``weight``. It leaves what the objective leaves.

    Cost: that of the objective, and one value a negative point, with gradient in the
    parameters.

    Example:
        >>> objective = EnergyPenalty(pyro_ebm.infer.MaximumLikelihood(), weight=0.01)
        >>> energy = pyro_ebm.energies.NeuralEnergy((2,), (16,))
        >>> loss = pyro_ebm.infer.ObjectiveLoss(energy, objective)
        >>> loss(torch.randn(100, 2)).backward()
    """

    objective: Objective
    weight: float = 0.01

    def __post_init__(self) -> None:
        require_objective(self.objective)
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"weight must be positive and finite, got {self.weight}. Without a "
                "penalty, take the objective itself."
            )
        if not _WITH_NEGATIVES & self.objective.needs:
            raise ValueError(
                f"objective must have negative points to penalise, and "
                f"{type(self.objective).__name__} has none. Those with chains, noise "
                "or a generator have."
            )
        # What the wrapped one says of itself holds for this one.
        for name in ("needs", "log_partition", "is_pointwise", "starts_at_data"):
            object.__setattr__(self, name, getattr(self.objective, name))

    def make_state(self) -> nn.Module:
        """That of the objective."""
        return self.objective.make_state()

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse what the objective refuses; see :meth:`Objective.check`."""
        self.objective.check(distribution, x)

    @property
    def name(self) -> str:
        """The objective's, with the weight."""
        return f"{self.objective.name} with penalty {self.weight:g}"

    def bias(self) -> tuple[Finding, ...]:
        """That of the objective; see :meth:`Objective.bias`."""
        return self.objective.bias()

    def current_proposal(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Any | None:
        """That of the objective; see :meth:`Objective.current_proposal`."""
        return self.objective.current_proposal(distribution, state)

    def num_proposed(self, batch_size: int) -> int:
        """See :meth:`Objective.num_proposed`."""
        return self.objective.num_proposed(batch_size)

    def negatives(
        self, distribution: EnergyDistribution, state: nn.Module, num_points: int = 256
    ) -> Tensor | None:
        """Those of the objective; see :meth:`Objective.negatives`."""
        return self.objective.negatives(distribution, state, num_points)

    def mover(self, energy: Energy, state: nn.Module) -> tuple[Kernel, int] | None:
        """See :meth:`Objective.mover`."""
        return self.objective.mover(energy, state)

    def chain_age(self, num_steps: int) -> float | None:
        """See :meth:`Objective.chain_age`."""
        return self.objective.chain_age(num_steps)

    def begin(
        self, energy: Energy, draw: Callable[[int], Tensor], state: nn.Module
    ) -> None:
        """See :meth:`Objective.begin`."""
        self.objective.begin(energy, draw, state)

    def second_term_covariance(
        self,
        distribution: EnergyDistribution,
        rows_of: Callable[[Tensor], Tensor],
        covariance: Tensor,
    ) -> Tensor:
        """That of the objective; see the method of :class:`Objective`."""
        return self.objective.second_term_covariance(distribution, rows_of, covariance)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        inner = self.objective.surrogate(distribution, state)

        def surrogate(x: Tensor) -> Terms:
            terms = inner(x)  # contrastive divergence moves its chains only here
            penalty = terms.energy.square()
            y = self.objective.negatives(distribution, state)
            if y is not None:
                penalty = penalty + distribution.energy(y).square().mean()
            return terms._replace(
                objective=terms.objective - self.weight * penalty  # (1)
            )

        return surrogate
