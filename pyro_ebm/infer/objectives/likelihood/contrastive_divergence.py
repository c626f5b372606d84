r"""Contrastive divergence: short chains that start at the data.

.. math::
    g = -\frac1N \sum_i \left(
        \partial f_\theta(x^{(i)}) - \partial f_\theta(x^{(i)}_k)\right),
    \qquad x^{(i)}_k \sim K_\theta^k(\cdot \mid x^{(i)})                   \tag{1}

with a kernel :math:`K_\theta` that leaves :math:`q_\theta` invariant. Each negative
point stays near its datum, so (1) has little variance; it knows nothing of what lies
farther from the data than ``k`` moves.

References:
    Hinton (2002), Neural Computation 14, 1771-1800.
    Carreira-Perpinan & Hinton (2005), AISTATS (the bias).
"""

__all__ = ["ContrastiveDivergence"]

from dataclasses import dataclass
from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import unconstrained
from pyro_ebm.infer.objectives.likelihood.maximum_likelihood import (
    ByPersistentChains,
    kernel_of,
)
from pyro_ebm.infer.objectives.objective import Surrogate, Terms
from pyro_ebm.mcmc import Kernel, PersistentChains


@final
@dataclass(frozen=True)
class ContrastiveDivergence(ByPersistentChains):
    r"""Contrastive divergence (1) with :math:`k` moves.

    Args:
        num_steps: Moves :math:`k` of each chain.
        kernel: A corrected kernel, default :class:`~pyro_ebm.mcmc.MALA`, and on a
            finite support :class:`~pyro_ebm.mcmc.Gibbs`; a step size is adapted on the
            way.

    Raises:
        TypeError: If ``kernel`` is no kernel.
        ValueError: If ``num_steps`` is not positive.

    Exactness: *biased*, towards no change: at the data (1) is as much smaller than the
    gradient of the likelihood as the chains are short of their equilibrium. Zero where
    the model is the distribution of the data. It leaves no log Z, and energy far from
    the data is not controlled: watch the tracked log Z, or go on by
    :class:`~pyro_ebm.infer.MaximumLikelihood`.

    Cost: ``num_steps * kernel.num_gradients + 1`` gradients and two values a point.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> loss = pyro_ebm.infer.ObjectiveLoss(energy, ContrastiveDivergence())
        >>> loss(torch.randn(100, 2) + 1).backward()
        >>> (energy.loc.grad < 0).all()
        tensor(True)
    """

    starts_at_data: ClassVar[bool] = True

    num_steps: int = 1
    kernel: Kernel | None = None

    def bias(self) -> tuple[Finding, ...]:
        """That of short chains, and of the kernel; see :meth:`Objective.bias`."""
        short = (
            "short chains are off unless the energy can be that of the data, and the "
            "errors hold only if it can"
        )
        found = Finding(Reason.INCONSISTENT_ESTIMATOR, short)
        return (found, *super().bias())

    def chain_age(self, num_steps: int) -> float:
        """See :meth:`Objective.chain_age`."""
        return float(self.num_steps)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy, chains = distribution.energy, cast(PersistentChains, state)
        kernel = kernel_of(self.kernel, energy)

        def surrogate(x: Tensor) -> Terms:
            start = x.reshape(-1, *energy.event_shape)
            if not chains.is_started:
                chains.start(energy, start, kernel)
            else:
                _, to_support = unconstrained(energy)
                with torch.no_grad():
                    chains.u = to_support.inv(start).to(chains.u)
            moved = chains.advance(energy, kernel, self.num_steps)
            data, model = energy(torch.stack([x, moved.reshape(x.shape)]))
            return Terms(model - data, data)  # (1)

        return surrogate
