r"""The contract of an estimator of the parameters of an energy.

An objective gives, for each example, a surrogate of :math:`\log q_\theta(x)` whose
gradient in :math:`\theta` estimates that of eq. (1.8),
:math:`L(\theta) = \sum_i \log q_\theta(x^{(i)})`. One effect handler
(:mod:`pyro_ebm.infer.handler`) puts any objective at the energy sites of a model.
"""

__all__ = ["Objective", "Surrogate"]

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.mcmc import PersistentChains

#: Maps points ``(*batch, *event)`` to values ``(*batch,)`` in nats.
Surrogate = Callable[[Tensor], Tensor]


class Objective(ABC):
    """An estimator: only settings; what it remembers is in the chains given to it."""

    @abstractmethod
    def surrogate(
        self, distribution: EnergyDistribution, chains: PersistentChains
    ) -> Surrogate:
        """Do the work of one parameter step that does not depend on the data.

        Args:
            distribution: At the current parameters.
            chains: Chains that persist from step to step.

        Returns:
            A function of the data with the value of ``log_prob`` and the gradient of
            the objective.
        """
