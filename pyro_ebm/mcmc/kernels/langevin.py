r"""Langevin kernels: MALA with a bounded drift, and the unadjusted ULA.

With :math:`\xi \sim \mathcal{N}(0, I)` and a scale matrix :math:`S`,

.. math::
    K_i(x)      &= \max(-m, \min(k_i, m)), \quad
                   k = \sqrt{\epsilon / 2}\; S^\top \nabla f(x)            \tag{1} \\
    r           &= \xi - K(x)                                              \tag{2} \\
    x'          &= x + \sqrt{2\epsilon}\; S r                              \tag{3} \\
    r'          &= r - K(x')                                               \tag{4} \\
    \log \alpha &= f(x) + \tfrac12 |\xi|^2 - f(x') - \tfrac12 |r'|^2       \tag{5}

Without the bound :math:`m`, (2) and (3) are :math:`x' = x - \epsilon S S^\top \nabla f
+ \sqrt{2\epsilon}\, S \xi`; :math:`-r'` is the noise that leads from :math:`x'` back to
:math:`x`, so that (5) is the ratio of Metropolis and Hastings.

By (1) the drift is in no whitened coordinate more than ``m`` standard deviations of the
noise. Without that bound a chain that starts where the energy is steep overshoots at
every step, is always rejected and never leaves; while an energy is learned, such chains
push it up where they stand, make it steeper still, and learning diverges.

The unadjusted algorithm (ULA) takes every proposal. Its chains do not settle in
:math:`e^{-f}` but in a distribution that differs from it by :math:`O(\epsilon)`: for a
Gaussian of variance :math:`\sigma^2` they have the variance

.. math::
    \sigma_\epsilon^2 = \frac{\sigma^2}{1 - \epsilon / (2 \sigma^2)}       \tag{6}

and for :math:`\epsilon \geq 2 \sigma^2` none at all.

References:
    Roberts & Tweedie (1996), Bernoulli 2(4), 341-363 (MALA, and its truncation MALTA).
"""

__all__ = [
    "LangevinKernel",
    "MALA",
    "ULA",
]

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import (
    ChainState,
    Kernel,
    StepInfo,
    accept,
    acceptance,
    flat_event,
    select,
)
from pyro_ebm.mcmc.kernels.metric import (
    check_scales,
    require_one_scale,
    times_scale,
    times_transposed,
)


@dataclass(frozen=True)
class LangevinKernel(Kernel):
    """The proposal (1) to (3), and the settings of the kernels that make it.

    Raises:
        ValueError: If a setting is out of range.
    """

    step_size: float | Tensor = 0.1
    target_accept_prob: float = 0.574
    max_drift: float | None = 1.0
    scale: Tensor | None = None
    scale_tril: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        self._check()
        if self.max_drift is not None and not self.max_drift > 0:
            raise ValueError(
                f"max_drift must be positive or None, got {self.max_drift}."
            )
        require_one_scale(self.scale, self.scale_tril)

    @property
    def num_gradients(self) -> int:
        """One, at the proposal."""
        return 1

    def propose(self, energy: Energy, state: ChainState) -> tuple[ChainState, Tensor]:
        """The proposal, and its log ratio (5), not finite where the proposal is not."""
        check_scales(energy, self.scale, self.scale_tril)
        kick, move = (factor.to(state.x) for factor in self._factors)
        noise = torch.randn_like(state.x)
        r = noise - self._bounded(state.grad, kick)  # (2)
        x = state.x.addcmul(move, times_scale(r, self.scale_tril))  # (3)
        new = ChainState(x, *energy.value_and_grad(x))
        r = r.sub_(self._bounded(new.grad, kick))  # (4)
        if self.max_drift is not None:
            # The bound hides an infinite gradient, but zero times it is nan.
            r = r.add_(new.grad, alpha=0)
        twice_kinetic = noise.square().addcmul_(r, r, value=-1)
        twice_kinetic = flat_event(twice_kinetic, state.energy.dim()).sum(-1)
        return new, (state.energy - new.energy).add_(twice_kinetic, alpha=0.5)  # (5)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """Of (1) and (3), with the diagonal: once for a kernel, not at each step."""
        kick = (torch.as_tensor(self.step_size) / 2).sqrt()
        if self.scale is not None:
            kick = self.scale * kick.to(self.scale)
        return kick, 2 * kick

    def _bounded(self, grad: Tensor, kick: Tensor) -> Tensor:
        k = kick * times_transposed(grad, self.scale_tril)
        if self.max_drift is None:
            return k
        return k.clamp_(-self.max_drift, self.max_drift)  # (1)


@final
@dataclass(frozen=True)
class MALA(LangevinKernel):
    r"""Gradient-guided Metropolis kernel that leaves :math:`e^{-f}` invariant.

    Args:
        step_size: :math:`\epsilon > 0`, in squared units of ``x``, or of ``x / scale``.
        target_accept_prob: What step-size adaptation aims at; 0.574 is optimal for
            large dimensions (Roberts & Rosenthal 1998, JRSS B 60, 255-268).
        max_drift: The bound :math:`m` on the drift, in standard deviations of
            the noise; ``None`` for plain MALA.
        scale: The diagonal of a diagonal :math:`S`, in the shape of the event; best
            near the standard deviation of ``x``. Default: the identity.
        scale_tril: A dense :math:`S` for vector events, shape ``(D, D)``; best where
            :math:`S S^\top` is near the covariance of ``x``. Instead of ``scale``.

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

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; ``state.x`` has shape ``(*chains, *event)``."""
        new, log_ratio = self.propose(energy, state)
        return accept(log_ratio, state, new)


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
