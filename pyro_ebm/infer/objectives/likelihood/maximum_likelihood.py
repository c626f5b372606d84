r"""Maximum likelihood by persistent contrastive divergence.

.. math::
    \frac{\partial L}{\partial\theta} =
        - \sum_i \frac{\partial f_\theta(x^{(i)})}{\partial\theta}
        + N\, \mathbb{E}_{x \sim q_\theta}
            \left[\frac{\partial f_\theta(x)}{\partial\theta}\right]    \tag{1.16}

References:
    Younes (1989), Probability Theory and Related Fields 82, 625-645.
    Tieleman (2008), ICML.
"""

__all__ = [
    "ByChains",
    "ByPersistentChains",
    "MaximumLikelihood",
    "kernel_of",
    "likelihood_surrogate",
]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.verdict import Finding
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.infer.objectives.objective import (
    Need,
    Objective,
    Surrogate,
    Terms,
    require_differentiable,
)
from pyro_ebm.mcmc import MALA, IndependentChains, Kernel, PersistentChains
from pyro_ebm.mcmc.base import bias_of
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for

#: Moves of chains that begin in a later stage, before its first parameter step.
_WARMUP_MOVES = 50


class ByChains(Objective):
    """An objective whose negatives are chains, and what it says of them."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "chains"})

    num_steps: int
    kernel: Kernel | None

    def bias(self) -> tuple[Finding, ...]:
        """That of the kernel; see :meth:`Objective.bias`."""
        return bias_of(self.kernel)

    def _position(self, state: nn.Module) -> Tensor:
        """Of the chains in unconstrained space; empty before they have started."""
        return cast(PersistentChains, state).u

    @torch.no_grad()
    def negatives(
        self, distribution: EnergyDistribution, state: nn.Module, num_points: int = 256
    ) -> Tensor | None:
        """The chains; see :meth:`Objective.negatives`."""
        u = self._position(state)
        if not u.numel():
            return None
        _, to_support = unconstrained(distribution.energy)
        points: Tensor = to_support(u.clone())
        return points

    def second_term_covariance(
        self,
        distribution: EnergyDistribution,
        rows_of: Callable[[Tensor], Tensor],
        covariance: Tensor,
    ) -> Tensor:
        """As of independent chains; see the method of :class:`Objective`.

        Chains that start at the data are counted by ``starts_at_data``.
        """
        number = getattr(self, "num_chains", None)
        return covariance / number if number else torch.zeros_like(covariance)


class ByPersistentChains(ByChains):
    """An objective whose chains are those of an energy model."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")
        if self.kernel is not None:
            require_kernel(self.kernel)

    def make_state(self) -> PersistentChains:
        """Chains that have not started."""
        return PersistentChains()

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse an energy without a gradient, unless its support has states."""
        support = distribution.energy.support
        if not (isinstance(support, MixedSupport) or is_finite_support(support)):
            require_differentiable(distribution.energy, x, type(self).__name__)

    def mover(self, energy: Energy, state: nn.Module) -> tuple[Kernel, int] | None:
        """See :meth:`Objective.mover`."""
        chains = cast(PersistentChains, state)
        if not chains.is_started or chains.kernel is None:
            return None
        step_size = chains.adaptation.step_size
        return chains.kernel.with_step_size(step_size), self.num_steps


@final
@dataclass(frozen=True)
class MaximumLikelihood(ByPersistentChains):
    r"""Maximum likelihood by the gradient (1.16), with persistent chains.

    Args:
        num_chains: Chains that estimate the expectation.
        num_steps: Transitions of each chain between two parameter steps.
        kernel: A corrected kernel, default :class:`~pyro_ebm.mcmc.MALA`, and on a
            finite support :class:`~pyro_ebm.mcmc.Gibbs`; a step size is adapted on the
            way.
        restart_fraction: Part of the chains that begin anew from the base at each step,
            so that a mode which no chain has visited is found before it grows. Fresh
            chains take a while to arrive and bias the gradient: keep it small.

    Raises:
        TypeError: If ``kernel`` is no kernel.
        ValueError: If a count is not positive, or ``restart_fraction`` not in [0, 1).

    Exactness: the gradient is *consistent* as the parameters settle and the chains
    catch up (Younes 1989). It leaves no log Z.

    Cost: ``num_steps * kernel.num_gradients + 1`` gradients and one value a chain, and
    one value a data point.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> objective = MaximumLikelihood(num_chains=64, kernel=pyro_ebm.mcmc.HMC())
        >>> loss = pyro_ebm.infer.ObjectiveLoss(energy, objective)
        >>> loss(torch.randn(100, 2) + 1).backward()
        >>> (energy.loc.grad < 0).all()  # a step down the loss moves it to the data
        tensor(True)
    """

    is_pointwise: ClassVar[bool] = True

    num_chains: int = 256
    num_steps: int = 10
    kernel: Kernel | None = None
    restart_fraction: float = 0.004

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got {self.num_chains}.")
        if not 0 <= self.restart_fraction < 1:
            raise ValueError(
                f"restart_fraction must be in [0, 1), got {self.restart_fraction}."
            )

    def chain_age(self, num_steps: int) -> float:
        """See :meth:`Objective.chain_age`."""
        rate = round(self.restart_fraction * self.num_chains) / self.num_chains
        steps = (1 - (1 - rate) ** num_steps) / rate if rate else num_steps
        return self.num_steps * steps

    def begin(
        self, energy: Energy, draw: Callable[[int], Tensor], state: nn.Module
    ) -> None:
        """Start the chains and move them on; see :meth:`Objective.begin`."""
        chains = cast(PersistentChains, state)
        kernel = kernel_of(self.kernel, energy)
        chains.start(energy, draw(self.num_chains), kernel)
        chains.advance(energy, kernel, _WARMUP_MOVES)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        r"""See :meth:`Objective.surrogate`.

        Raises:
            ValueError: If :math:`\log Z` is a free parameter; see
                :meth:`EnergyDistribution.require_no_free_log_partition`.
        """
        distribution.require_no_free_log_partition()
        chains = cast(PersistentChains, state)
        energy = distribution.energy
        sampler = distribution.sampler or IndependentChains()
        x_model = chains.follow(
            energy,
            sampler,
            kernel_of(self.kernel, energy),
            self.num_chains,
            self.num_steps,
            self.restart_fraction,
        )
        return likelihood_surrogate(distribution, x_model)


def likelihood_surrogate(
    distribution: EnergyDistribution, x_model: Tensor
) -> Surrogate:
    """The surrogate of the likelihood with given draws of the model.

    Args:
        distribution: At the current parameters.
        x_model: About draws of it, shape ``(C, *event)``.
    """
    energy, log_partition = distribution.energy, distribution.log_partition.detach()
    second_term = energy(x_model).mean()  # E_q[f], whose gradient is E_q[df]

    def surrogate(x: Tensor) -> Terms:
        value = energy(x)
        gap = second_term - second_term.detach()
        return Terms(-value - log_partition + gap, value)  # (1.16)

    return surrogate


def kernel_of(kernel: Kernel | None, energy: Energy) -> Kernel:
    """The kernel that chains of an objective move by: the given one, or a default.

    Args:
        kernel: Of the objective.
        energy: That they follow.
    """
    return kernel_for(energy, MALA()) if kernel is None else kernel


def require_kernel(kernel: Any) -> None:
    """Check that a kernel is one.

    Raises:
        TypeError: If it is no :class:`~pyro_ebm.mcmc.Kernel`.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"kernel must be a pyro_ebm.mcmc.Kernel, got {type(kernel).__name__}. For "
            "instance pyro_ebm.mcmc.HMC()."
        )
