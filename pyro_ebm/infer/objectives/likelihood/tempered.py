r"""Maximum likelihood with chains that have replicas at higher temperatures.

Persistent chains (:mod:`~pyro_ebm.infer.objectives.likelihood.maximum_likelihood`)
seldom leave their mode, and then the weights of modes are learned from where the chains
happen to be. Here each chain has :math:`K` replicas on the geometric path from the base
to the energy

.. math::
    f_k = (1 - \beta_k) f_0 + \beta_k f_\theta, \qquad
    0 = \beta_0 < \dots < \beta_{K-1} = 1                                  \tag{1}

that swap places as in :mod:`pyro_ebm.mcmc.tempering.ladder`. The lowest is drawn anew
from the base in each step; the uppermost gives the second term of (1.16).

References:
    Desjardins, Courville, Bengio, Vincent & Delalleau (2010), AISTATS.
    Syed, Bouchard-Cote, Deligiannidis & Doucet (2022), JRSS B 84, 321-350.
"""

__all__ = ["TemperedChains", "TemperedMaximumLikelihood"]

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.infer.objectives.contrast.noise import noise_of
from pyro_ebm.infer.objectives.likelihood.maximum_likelihood import (
    ByChains,
    likelihood_surrogate,
)
from pyro_ebm.infer.objectives.objective import Surrogate, require_differentiable
from pyro_ebm.mcmc import HMC, Kernel
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for
from pyro_ebm.mcmc.samplers.persistent import StatefulModule
from pyro_ebm.mcmc.tempering.ladder import (
    Ladder,
    Replicas,
    SiteLadder,
    first_temperatures,
    require_hmc,
)
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.mcmc.tempering.site_path import SitePath, path_between
from pyro_ebm.mcmc.warmup.adaptation import follow_acceptance


class TemperedChains(StatefulModule):
    """Replicas that persist between parameter steps.

    Attributes:
        u: In unconstrained space, shape ``(C, K, *event)``.
        log_step_size: Of each temperature above the base, shape ``(K - 1,)``.
        swap_prob: Of each pair of neighbours at the last step, shape ``(K - 1,)``. What
            is at the base arrives at the energy only if none of them is near 0.
        parity: Which pairs swap next.
    """

    u: Tensor
    log_step_size: Tensor
    swap_prob: Tensor
    parity: Tensor

    #: Change of the logarithm of a step size at an acceptance off by 1.
    GAIN = 0.1

    def __init__(self) -> None:
        super().__init__()
        for name in ("u", "log_step_size", "swap_prob"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("parity", torch.tensor(0))

    @torch.no_grad()
    def start(
        self, path: GeometricPath | SitePath, shape: tuple[int, int], kernel: Any
    ) -> None:
        """Draw all replicas from the base; ``shape`` is ``(C, K)``."""
        self.u = path.sample_base(*shape).u
        log_step_size = torch.as_tensor(getattr(kernel, "step_size", 1.0)).log()
        self.log_step_size = log_step_size.to(self.u).repeat(shape[1] - 1)
        self.swap_prob = torch.zeros_like(self.log_step_size)

    @torch.no_grad()
    def advance(
        self, path: Any, betas: Tensor, kernel: Kernel, num_steps: int
    ) -> Tensor:
        """Move, swap and adapt; return the uppermost points, ``(C, *event)``."""
        betas = betas.to(self.u)
        ladder: Any = SiteLadder(path, betas)
        if not isinstance(path, SitePath):
            ladder = Ladder(path, betas, torch.ones_like(self.u[0, 1:]))
        state = path.with_finite_chains(path.evaluate(self.u))
        nowhere = torch.zeros(self.u.shape[:2], dtype=torch.bool, device=self.u.device)
        replicas = Replicas(state, nowhere, int(self.parity))
        for _ in range(num_steps):
            if kernel.has_step_size:
                kernel = kernel.with_step_size(self.log_step_size.exp())
            replicas, _, info, swap_prob, _ = ladder.exchange(kernel, replicas)
            if kernel.has_step_size:
                self.log_step_size = follow_acceptance(
                    self.log_step_size, kernel, info, self.GAIN
                )
        self.u, self.swap_prob = replicas.state.u, swap_prob.mean(0)
        self.parity = torch.full_like(self.parity, replicas.parity)
        points: Tensor = path.transform(self.u[:, -1].clone())
        return points


@final
@dataclass(frozen=True)
class TemperedMaximumLikelihood(ByChains):
    r"""Maximum likelihood by the gradient (1.16), with persistent tempered chains.

    Args:
        base: A normalised distribution over the same events and support that covers all
            modes. Default: the base of the :class:`~pyro_ebm.EnergyModel`.
        num_chains: Chains :math:`C`, each with its replicas.
        num_temperatures: :math:`K`, base and energy included;
            :math:`\beta_k = (k / (K - 1))^3`.
        num_steps: Moves, each followed by swaps, between two parameter steps.
        kernel: Its step size is adapted at each temperature; default: one of three
            leapfrog steps. Over a finite support chains move as suits the energy, by
            :class:`~pyro_ebm.mcmc.Gibbs` where blocks are known.
        warmup_steps: Moves before the first parameter step.

    Raises:
        TypeError: If ``kernel`` is not :class:`~pyro_ebm.mcmc.HMC`.
        ValueError: If a count is too small.

    Exactness: the gradient is *consistent* as the parameters settle and the chains
    catch up, across modes too as long as ``state.swap_prob`` is not near 0. It leaves
    no log Z.

    Cost: ``K + num_steps * ((K - 1) * kernel.num_gradients + 1)`` gradients and one
    value a chain, and one value a data point.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
        >>> objective = TemperedMaximumLikelihood(base, num_chains=64)
        >>> loss = pyro_ebm.infer.ObjectiveLoss(energy, objective)
        >>> loss(torch.randn(100, 2)).backward()
        >>> loss.state.u.shape
        torch.Size([64, 6, 2])
    """

    is_pointwise: ClassVar[bool] = True

    base: dist.TorchDistribution | None = None
    num_chains: int = 128
    num_temperatures: int = 6
    num_steps: int = 3
    kernel: HMC = field(default_factory=lambda: HMC(num_leapfrog=3))
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        require_hmc(self.kernel)
        counts = {"num_chains": 1, "num_temperatures": 2, "num_steps": 1}
        for name, low in {**counts, "warmup_steps": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"{name} must be at least {low}, got {getattr(self, name)}."
                )

    def make_state(self) -> TemperedChains:
        """Replicas that have not started."""
        return TemperedChains()

    def _position(self, state: nn.Module) -> Tensor:
        """Of the chains at the energy itself."""
        u = cast(TemperedChains, state).u
        return u[:, -1] if u.numel() else u

    def mover(self, energy: Energy, state: nn.Module) -> tuple[Kernel, int] | None:
        """See :meth:`Objective.mover`."""
        chains = cast(TemperedChains, state)
        if not chains.u.numel():
            return None
        kernel, step_size = kernel_for(energy, self.kernel), chains.log_step_size[-1]
        if kernel.has_step_size:
            kernel = kernel.with_step_size(step_size.exp())
        return kernel, self.num_steps

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse an energy without a gradient, unless its support is finite."""
        if not is_finite_support(distribution.energy.support):
            require_differentiable(distribution.energy, x, type(self).__name__)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`.

        Raises:
            ValueError: If the base does not fit the energy, or there is none.
        """
        chains = cast(TemperedChains, state)
        base = noise_of(self.base, distribution, "base")
        energy = distribution.energy
        path: Any = path_between(energy, base)
        kernel = kernel_for(energy, self.kernel)
        betas = first_temperatures(self.num_temperatures)
        if not chains.u.numel():
            chains.start(path, (self.num_chains, self.num_temperatures), kernel)
            if self.warmup_steps:
                chains.advance(path, betas, kernel, self.warmup_steps)
        x_model = chains.advance(path, betas, kernel, self.num_steps)
        return likelihood_surrogate(distribution, x_model)
