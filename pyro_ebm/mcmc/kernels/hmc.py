r"""Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

The steps are those of :mod:`pyro_ebm.mcmc.kernels.leapfrog`; each chain jitters their
length.

References:
    Neal (2011), MCMC using Hamiltonian dynamics. Handbook of MCMC, chapter 5.
"""

__all__ = ["HMC"]

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, accept
from pyro_ebm.mcmc.kernels.leapfrog import trajectory
from pyro_ebm.mcmc.kernels.metric import (
    Factor,
    LowRank,
    check_scales,
    require_one_scale,
)


@final
@dataclass(frozen=True)
class HMC(Kernel):
    r"""Hamiltonian Monte Carlo for many chains, one energy gradient a leapfrog step.

    Args:
        step_size: :math:`\epsilon > 0`, in units of ``x / scale``.
        num_leapfrog: Leapfrog steps in one trajectory, at least 1.
        scale: The diagonal of a diagonal :math:`S`, in the shape of the event; best
            near the standard deviation of ``x``. Default: the identity.
        scale_tril: A dense :math:`S` for vector events, shape ``(D, D)``; best where
            :math:`S S^\top` is near the covariance of ``x``. Instead of ``scale``.
        low_rank: An :math:`S` for long vectors that stretches few directions. Instead
            of the other two.
        jitter: Each chain's step is multiplied at each transition by a uniform draw
            from ``[1 - jitter, 1 + jitter]``, so that no trajectory closes on itself.
        target_accept_prob: What step-size adaptation aims at.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = HMC(step_size=0.5, num_leapfrog=4)
        >>> state, info = kernel.step(energy, kernel.init(energy, torch.zeros(64, 2)))
        >>> state.x.shape, kernel.num_gradients
        (torch.Size([64, 2]), 4)
    """

    has_chain_steps: ClassVar[bool] = True

    step_size: float | Tensor = 0.1
    num_leapfrog: int = 5
    scale: Tensor | None = None
    scale_tril: Tensor | None = None
    low_rank: LowRank | None = None
    jitter: float = 0.2
    target_accept_prob: float = 0.8

    def __post_init__(self) -> None:
        """Check the settings."""
        self._check()
        if self.num_leapfrog < 1:
            raise ValueError(
                f"num_leapfrog must be at least 1, got {self.num_leapfrog}."
            )
        require_one_scale(self.scale, self.scale_tril, self.low_rank)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}.")

    @property
    def _factor(self) -> Factor | None:
        return self.scale_tril if self.low_rank is None else self.low_rank

    @property
    def num_gradients(self) -> int:
        """One for each leapfrog step."""
        return self.num_leapfrog

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; ``state.x`` has shape ``(*chains, *event)``."""
        check_scales(energy, self.scale, self._factor)
        end, _, log_ratio = trajectory(
            energy, state, self._step_sizes(state), self.num_leapfrog, self._factor
        )
        return accept(log_ratio, state, end)

    def _step_sizes(self, state: ChainState) -> Tensor:
        """Jittered step of each chain times the diagonal scale, in the shape of x."""
        low, high = 1 - self.jitter, 1 + self.jitter
        jitter = torch.empty_like(state.energy).uniform_(low, high)
        eps = (jitter * self.step_size).to(state.x.dtype)
        eps = eps.reshape(eps.shape + (1,) * (state.x.dim() - eps.dim()))
        if self.scale is not None:
            eps = eps * self.scale
        # In full: each leapfrog step multiplies by it twice, and broadcasting is slow.
        return eps.expand_as(state.x).contiguous()
