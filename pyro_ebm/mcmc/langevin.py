r"""Metropolis-adjusted Langevin algorithm (MALA), with a bounded drift.

.. math::
    x'          &= x - \epsilon\, D(x) + \sqrt{2\epsilon}\,\xi,
                   \quad \xi \sim \mathcal{N}(0, I)                      \tag{1} \\
    D_i(x)      &= \max(-b, \min(\partial_i f(x), b)),
                   \quad b = m \sqrt{2 / \epsilon}                       \tag{2} \\
    \log \alpha &= f(x) - f(x') + \log q(x \mid x') - \log q(x' \mid x)  \tag{3}

By (2) the drift :math:`\epsilon D` is in no coordinate more than ``m`` standard
deviations of the noise. Without that bound a chain that starts where the energy is
steep overshoots at every step, is always rejected and never leaves; while an energy is
learned, such chains push it up where they stand, make it steeper still, and learning
diverges.

References:
    Roberts & Tweedie (1996), Bernoulli 2(4), 341-363 (MALA, and its truncation MALTA).
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
        max_drift: The bound :math:`m` on the drift, in standard deviations of
            the noise; ``None`` for plain MALA.

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
    max_drift: float | None = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        self._check()
        if self.max_drift is not None and not self.max_drift > 0:
            raise ValueError(
                f"max_drift must be positive or None, got {self.max_drift}."
            )

    @property
    def num_gradients(self) -> int:
        """One, at the proposal."""
        return 1

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; ``state.x`` has shape ``(*chains, *event)``."""
        eps = torch.as_tensor(self.step_size).to(state.x)
        root, noise = (2 * eps).sqrt(), torch.randn_like(state.x)
        drift = self._drift(state.grad, root)
        x_new = state.x.addcmul(eps, drift, value=-1).addcmul(root, noise)  # (1)
        new = ChainState(x_new, *energy.value_and_grad(x_new))

        s = root / 2 * (drift + self._drift(new.grad, root))
        log_proposals = s * noise.sub(s, alpha=0.5)
        log_proposals = flat_event(log_proposals, state.energy.dim()).sum(-1)
        return accept(state.energy - new.energy + log_proposals, state, new)  # (3)

    def _drift(self, grad: Tensor, root: Tensor) -> Tensor:
        if self.max_drift is None:
            return grad
        bound = 2 * self.max_drift / root
        # Zero times an infinite gradient is nan, and so the proposal is rejected.
        return grad.clamp(-bound, bound).add(grad, alpha=0)  # (2)
