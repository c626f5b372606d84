r"""Metropolis-adjusted Langevin algorithm (MALA).

.. math::
    x'          &= x - \epsilon \nabla f(x) + \sqrt{2\epsilon}\,\xi,
                   \quad \xi \sim \mathcal{N}(0, I)                      \tag{1} \\
    \log \alpha &= f(x) - f(x') + \log q(x \mid x') - \log q(x' \mid x)  \\
                &= f(x) - f(x') + s \cdot (\xi - s / 2),
                   \quad s = \sqrt{\epsilon / 2}\,
                   \big(\nabla f(x) + \nabla f(x')\big)                  \tag{2}

for :math:`q(x' \mid x) \propto e^{-|\xi|^2 / 2}`, and the way back from :math:`x'` to
:math:`x` takes the noise :math:`s - \xi`.

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
        """Check the settings."""
        self._check()

    @property
    def num_gradients(self) -> int:
        """One, at the proposal."""
        return 1

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; ``state.x`` has shape ``(*chains, *event)``."""
        eps = torch.as_tensor(self.step_size).to(state.x)
        root, noise = (2 * eps).sqrt(), torch.randn_like(state.x)
        x_new = state.x.addcmul(eps, state.grad, value=-1).addcmul(root, noise)  # (1)
        new = ChainState(x_new, *energy.value_and_grad(x_new))

        s = root / 2 * (state.grad + new.grad)
        log_proposals = s * noise.sub(s, alpha=0.5)
        log_proposals = flat_event(log_proposals, state.energy.dim()).sum(-1)
        return accept(state.energy - new.energy + log_proposals, state, new)  # (2)
