r"""Unadjusted Langevin algorithm (ULA): every proposal of MALA is taken.

.. math::
    x' = x - \epsilon \nabla f(x) + \sqrt{2\epsilon}\,\xi,
    \quad \xi \sim \mathcal{N}(0, I)                                       \tag{1}

Its chains do not settle in :math:`e^{-f}` but in a distribution that differs from it by
:math:`O(\epsilon)`: for a Gaussian of variance :math:`\sigma^2` they have the variance

.. math::
    \sigma_\epsilon^2 = \frac{\sigma^2}{1 - \epsilon / (2 \sigma^2)}       \tag{2}

and for :math:`\epsilon \geq 2 \sigma^2` none at all.

References:
    Roberts & Tweedie (1996), Bernoulli 2(4), 341-363.
"""

__all__ = ["ULA"]

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, StepInfo, acceptance, select
from pyro_ebm.mcmc.kernels.langevin import LangevinKernel


@final
@dataclass(frozen=True)
class ULA(LangevinKernel):
    r"""Langevin moves without a test: biased, so never a default and never ``"ok"``.

    What MALA's test would have said is still computed: it is in the info, as the
    measure of the bias, and step-size adaptation keeps it at its target. A proposal
    with a non-finite energy or gradient is not taken.

    Args:
        step_size: :math:`\epsilon > 0`, in squared units of ``x``, or of ``x / scale``.
        target_accept_prob: What step-size adaptation aims at; the nearer to 1, the
            smaller the bias.
        max_drift: As for :class:`~pyro_ebm.mcmc.MALA`. Where it binds it adds to the
            bias; without it the chains explode where the energy is too steep for the
            step.
        scale: As for :class:`~pyro_ebm.mcmc.MALA`.
        scale_tril: As for :class:`~pyro_ebm.mcmc.MALA`.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = ULA(step_size=0.05)
        >>> state, info = kernel.step(energy, kernel.init(energy, torch.zeros(64, 2)))
        >>> bool(info.accepted.all())
        True
    """

    target_accept_prob: float = 0.95
    is_exact: ClassVar[bool] = False

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; ``state.x`` has shape ``(*chains, *event)``."""
        new, log_ratio = self.propose(energy, state)
        accept_prob, is_finite = acceptance(log_ratio)
        info = StepInfo(accept_prob, is_finite, is_finite)
        return select(is_finite, new, state), info
