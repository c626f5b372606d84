r"""Metropolis-adjusted Langevin algorithm (MALA).

.. math::
    x'          &= x - \epsilon \nabla f(x) + \sqrt{2\epsilon}\,\xi,
                   \quad \xi \sim \mathcal{N}(0, I)                      \tag{1} \\
    \log \alpha &= f(x) - f(x') + \log q(x \mid x') - \log q(x' \mid x)  \tag{2}

References:
    Roberts & Tweedie (1996), Bernoulli 2(4), 341-363.
"""

__all__ = ["MALA"]

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, accept, flat_event


@final
@dataclass(frozen=True)
class MALA(Kernel):
    r"""Gradient-guided Metropolis kernel that leaves :math:`e^{-f}` invariant.

    Args:
        step_size: :math:`\epsilon > 0`, in squared units of ``x``.
        target_accept_prob: What step-size adaptation aims at; 0.574 is optimal for
            large dimensions (Roberts & Rosenthal 1998, JRSS B 60, 255-268).

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = MALA(step_size=0.1)
        >>> state = kernel.init(energy, torch.zeros(64, 2))
        >>> state, info = kernel.step(energy, state)
        >>> state.x.shape, info.accept_prob.shape
        (torch.Size([64, 2]), torch.Size([64]))
    """

    step_size: float | Tensor = 0.1
    target_accept_prob: float = 0.574

    def __post_init__(self) -> None:
        self._check()

    @property
    def num_gradients(self) -> int:
        """One, at the proposal."""
        return 1

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; ``state.x`` has shape ``(*chains, *event)``."""
        eps, noise = self.step_size, torch.randn_like(state.x)
        x_new = state.x - eps * state.grad + (2 * eps) ** 0.5 * noise  # (1)
        new = ChainState(x_new, *energy.value_and_grad(x_new))

        chain_dim = state.energy.dim()
        residual = state.x - x_new + eps * new.grad
        log_forward = -flat_event(noise, chain_dim).square().sum(-1) / 2
        log_reverse = -flat_event(residual, chain_dim).square().sum(-1) / (4 * eps)
        log_ratio = state.energy - new.energy + log_reverse - log_forward  # (2)
        return accept(log_ratio, state, new)
