r"""The contract of a Markov kernel that moves many chains at once.

A kernel leaves :math:`e^{-f}` invariant, or says that it does not. It holds settings
only and takes the energy at each step, so one kernel serves every temperature and every
iterate of a fit; the state carries the energy and the gradient of the current points,
so that neither is computed twice.
"""

__all__ = [
    "ChainState",
    "Kernel",
    "StepInfo",
    "accept",
    "acceptance",
    "bias_of",
    "evaluate",
    "far_limit",
    "flat_event",
    "replace_nonfinite",
    "select",
]

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import Field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.core.spaces import require_not_mixed
from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.energies import Energy
from pyro_ebm.energies.views.unconstrained import is_unconstrained

_K = TypeVar("_K", bound="Kernel")
#: Numbers of a point that a message shows.
_MAX_SHOWN = 8


class ChainState(NamedTuple):
    """The points of all chains, with their energies and gradients.

    Attributes:
        x: Points, shape ``(*chains, *event)``.
        energy: Energy of each point in nats, shape ``(*chains,)``.
        grad: Gradient of the energy, shape of ``x``.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> state = pyro_ebm.mcmc.HMC().init(energy, torch.ones(5, 2))
        >>> state.energy
        tensor([1., 1., 1., 1., 1.])
    """

    x: Tensor
    energy: Tensor
    grad: Tensor

    def moved_to_others(self, is_lost: Tensor) -> "ChainState":
        """Some chains replaced by copies of randomly chosen others.

        Args:
            is_lost: Which of the ``C`` chains, shape ``(C,)``. If all, they stay.
        """
        weights = (~is_lost | is_lost.all()).to(self.x.dtype)
        others = weights.multinomial(len(weights), replacement=True)
        own = torch.arange(len(weights), device=others.device)
        source = torch.where(is_lost & ~is_lost.all(), others, own)
        return ChainState(self.x[source], self.energy[source], self.grad[source])


class StepInfo(NamedTuple):
    """Acceptance of one transition, for each chain.

    Attributes:
        accept_prob: Metropolis probability in [0, 1], shape ``(*chains,)``.
        accepted: Whether the proposal was taken, shape ``(*chains,)``.
        is_finite: False where the proposal had a non-finite energy or gradient, or its
            log acceptance ratio overflowed; such a proposal is rejected. Shape
            ``(*chains,)``.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = pyro_ebm.mcmc.HMC(0.1)
        >>> _, info = kernel.step(energy, kernel.init(energy, torch.ones(5, 2)))
        >>> bool((info.accept_prob > 0.9).all()), bool(info.is_finite.all())
        (True, True)
    """

    accept_prob: Tensor
    accepted: Tensor
    is_finite: Tensor

    @property
    def is_divergent(self) -> Tensor:
        """Where the probability of the proposal underflows.

        So it is where the energy was not finite, and where its error exceeded some 745
        nats in double precision, 103 in single.
        """
        return self.accept_prob == 0


class Kernel(ABC):
    """A Markov kernel: plain settings, and a step for all chains at once.

    Subclasses are frozen dataclasses; ``dataclasses.replace`` makes the adapted kernel.

    Attributes:
        step_size: Size of a move, a number or a scalar tensor.
        target_accept_prob: Mean acceptance that step-size adaptation aims at.
        is_exact: Whether it leaves :math:`e^{-f}` invariant. What was drawn with a
            kernel that does not is never ``"ok"``.
        has_chain_steps: Whether ``step_size`` may be of the shape of the chains, a step
            for each, while the kernel is adapted.
        has_step_size: Whether there is a step size at all; a kernel that draws from
            conditional distributions has none, and nothing is adapted.

    Example:
        One kernel serves any energy, from wherever the chains are.

        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = pyro_ebm.mcmc.MALA(0.5)
        >>> state = kernel.init(energy, torch.randn(64, 2))
        >>> for _ in range(3):
        ...     state, info = kernel.step(energy, state)
        >>> state.x.shape
        torch.Size([64, 2])
    """

    step_size: float | Tensor
    target_accept_prob: float
    is_exact: ClassVar[bool] = True
    has_chain_steps: ClassVar[bool] = False
    has_step_size: ClassVar[bool] = True
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # so that replace() is typed

    @property
    @abstractmethod
    def num_gradients(self) -> int:
        """Energy gradients that one step costs, a chain."""

    def init(self, energy: Energy, x: Tensor) -> ChainState:
        """Evaluate the energy at the chains' points, once.

        Args:
            energy: Over unconstrained space.
            x: Points, shape ``(*chains, *event)``.

        Raises:
            ValueError: If the energy has a constrained or a discrete support.
        """
        require_not_mixed(energy.support, type(self).__name__)
        if energy.support.is_discrete:
            raise ValueError(
                f"energy must have a continuous support for {type(self).__name__}, got "
                f"the discrete {energy.support}: it has no gradient there. Take a "
                "kernel for discrete spaces, such as pyro_ebm.mcmc.Gibbs."
            )
        if not is_unconstrained(energy.support):
            raise ValueError(
                f"energy must have an unconstrained support for {type(self).__name__}, "
                f"got {energy.support}. Move it there with "
                "pyro_ebm.energies.unconstrained(energy), which also returns the map "
                "back."
            )
        value, grad = energy.value_and_grad(x)
        return ChainState(x.detach(), value, grad)

    def with_step_size(self: _K, step_size: float | Tensor) -> _K:
        """The kernel with another step size, or itself if it has none.

        Args:
            step_size: As for the constructor.
        """
        if not self.has_step_size:
            return self
        return dataclasses.replace(self, step_size=step_size)

    def mean_acceptance(self, accept_prob: Tensor) -> Tensor:
        """What is held to ``target_accept_prob``: the mean over chains and transitions.

        Args:
            accept_prob: Of the steps of all chains, any shape.

        Returns:
            A mean in [0, 1], shape ``()``.
        """
        return accept_prob.mean()

    def _check(self) -> None:
        if not isinstance(self.step_size, Tensor) and not 0 < self.step_size < math.inf:
            raise ValueError(
                f"step_size must be positive and finite, got {self.step_size}."
            )
        if not 0 < self.target_accept_prob < 1:
            raise ValueError(
                "target_accept_prob must be between 0 and 1, got "
                f"{self.target_accept_prob}."
            )

    @abstractmethod
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once.

        Args:
            energy: The same that ``state`` was computed with.
            state: Of ``C`` chains.

        Returns:
            The new state, and what happened in each chain.
        """


def evaluate(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of points and their gradients, zero on a discrete support.

    Args:
        energy: Where its chains move.
        x: Points, shape ``(*chains, *event)``.
    """
    if not energy.support.is_discrete:
        return energy.value_and_grad(x)
    with torch.no_grad():
        return energy(x), torch.zeros_like(x)


def bias_of(kernel: Any) -> tuple[Finding, ...]:
    """The findings against draws of a biased kernel; none if it is exact.

    Args:
        kernel: That moved the chains, or ``None``. One that does not say whether it is
            exact is taken at its word that it is a kernel.

    Example:
        >>> bias_of(pyro_ebm.mcmc.MALA())
        ()
    """
    if getattr(kernel, "is_exact", True):
        return ()
    name = type(kernel).__name__
    beside = (
        f"{name} does not leave the target invariant: its chains settle beside it, "
        "however many draws there are. Take a corrected kernel, such as MALA"
    )
    return (Finding(Reason.BIASED_KERNEL, beside),)


def accept(
    log_ratio: Tensor, old: ChainState, new: ChainState
) -> tuple[ChainState, StepInfo]:
    """Metropolis-Hastings: take each proposal with probability ``min(1, e^log_ratio)``.

    The one rule for non-finite proposals of all kernels: a proposal whose log ratio is
    not finite is rejected and counted, with acceptance probability 0. Plus infinity is
    such a case: it means an energy of minus infinity, or a chain that is at a point of
    infinite energy already, where :func:`replace_nonfinite` leaves none.

    Args:
        log_ratio: Log acceptance ratio, shape ``(*chains,)``. It must not be finite
            where the energy or gradient of ``new`` is not.
        old: Current state.
        new: Proposed state.
    """
    accept_prob, is_finite = acceptance(log_ratio)
    accepted = torch.rand_like(accept_prob) < accept_prob
    return select(accepted, new, old), StepInfo(accept_prob, accepted, is_finite)


def acceptance(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Acceptance probability, 0 where the ratio is not finite, and whether it is."""
    # In four operations instead of six: minus infinity is the one value that becomes
    # another finite one, the lowest.
    clean = log_ratio.nan_to_num(-torch.inf, -torch.inf)
    is_finite = clean == log_ratio
    return clean.clamp_(max=0.0).exp_(), is_finite


def select(accepted: Tensor, new: ChainState, old: ChainState) -> ChainState:
    """The new state of the chains in ``accepted``, shape ``(*chains,)``."""
    wide = accepted.reshape(accepted.shape + (1,) * (new.x.dim() - accepted.dim()))
    return ChainState(
        torch.where(wide, new.x, old.x),
        torch.where(accepted, new.energy, old.energy),
        torch.where(wide, new.grad, old.grad),
    )


def flat_event(value: Tensor, chain_dim: int) -> Tensor:
    """Reshape ``(*chains, *event)`` to ``(*chains, D)``, scalars to ``D = 1``."""
    return value.reshape(*value.shape[:chain_dim], -1)


def replace_nonfinite(state: ChainState) -> ChainState:
    """Re-initialise chains at non-finite energy from randomly chosen finite ones.

    A chain at a point of non-finite energy or gradient has no proposal to accept: it
    would stay for ever, pass its point off as a draw and hold the mean acceptance
    below any target.

    Args:
        state: Of ``C`` chains, chain shape ``(C,)``.

    Raises:
        DivergenceError: If there is no chain with a finite energy and gradient.
    """
    grad_sum = flat_event(state.grad, 1).sum(-1)  # finite only if all its terms are
    is_finite = (state.energy + grad_sum).isfinite()
    if is_finite.all():
        return state
    if not is_finite.any():
        raise DivergenceError(
            f"energy and gradient must be finite somewhere, and are not at any of the "
            f"{len(is_finite)} chains; the first is at {_shown(state.x[0])}, with "
            f"energy {state.energy[0].item()}. Start the chains from a base that "
            "overlaps the support, or at points where the energy is finite, check the "
            "energy there, or lower the learning rate if the chains were well before."
        )
    return state.moved_to_others(~is_finite)


def _shown(x: Tensor) -> str:
    """A point, or the beginning of a long one."""
    if x.numel() <= _MAX_SHOWN:
        return str(x.tolist())
    first = ", ".join(f"{number:g}" for number in x.flatten()[:_MAX_SHOWN].tolist())
    return f"[{first}, ... {x.numel() - _MAX_SHOWN:,} more]"


def far_limit(size: int) -> float:
    """Energy above the median chain, in nats, beyond which a chain has not converged.

    In equilibrium energies differ by some ``sqrt(size / 2)``; between modes of one mass
    by ``size`` times the log ratio of their widths, of which 20 are allowed for.

    Args:
        size: Coordinates of a point.
    """
    return 20 + 3 * size
