r"""Step-size adaptation for many chains by dual averaging.

The chains share one step size :math:`\epsilon`; Pyro's dual averaging drives
their mean acceptance, as the kernel takes it, to the kernel's target:

.. math::
    \log\epsilon \leftarrow \mathrm{DualAveraging}(a^\star - \bar a),
    \qquad \bar a = \tfrac1C \textstyle\sum_c a_c                          \tag{1}

References:
    Hoffman & Gelman (2014), JMLR 15, section 3.2.
"""

__all__ = [
    "KernelAdaptation",
    "StepSizeAdaptation",
    "find_step_size",
    "follow_acceptance",
]

from abc import abstractmethod
from typing import Any, Generic, TypeVar

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor, nn

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo

K = TypeVar("K", bound=Kernel)


class KernelAdaptation(nn.Module, Generic[K]):
    """Contract of adaptation that is specific to a kernel.

    A kernel brings its own by a method ``adaptation()`` that returns one; it is driven
    by the warm-up of :class:`~pyro_ebm.mcmc.MCMC`. All that it learns is in its
    ``state_dict``.

    Attributes:
        spread: Standard deviation of the draws in units of the scale, 1 of a Gaussian;
            told by the warm-up before each :meth:`reset`.
    """

    spread: float | Tensor = 1.0

    @abstractmethod
    def reset(self) -> None:
        """Begin anew, as the scale of the kernel has changed."""

    @abstractmethod
    def current(self, kernel: K) -> K:
        """The kernel of the next transition, which must be the same until an update."""

    @abstractmethod
    def frozen(self, kernel: K) -> K:
        """The kernel after the warm-up."""

    @abstractmethod
    def update(self, kernel: K, info: StepInfo) -> None:
        """Learn from a transition.

        Args:
            kernel: That which :meth:`current` returned.
            info: What its step returned.
        """


class StepSizeAdaptation(nn.Module):
    """Dual averaging (1) with its state in a ``state_dict``.

    No number leaves the device: the step size stays a scalar tensor.

    Args:
        step_size: Where to begin; with the shape of the chains, each has its own.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = pyro_ebm.mcmc.MALA(0.5)
        >>> adaptation = StepSizeAdaptation(kernel.step_size)
        >>> _, info = kernel.step(energy, kernel.init(energy, torch.randn(64, 2)))
        >>> adaptation.update(kernel, info)  # accepted more than it aims at
        >>> bool(adaptation.step_size > 0.5)
        True
    """

    _state: Tensor

    #: Twice Pyro's value, so half the gain. The mean of many chains has little noise,
    #: and with the full gain the step size swings where the acceptance falls steeply.
    GAMMA = 0.1

    def __init__(self, step_size: float | Tensor) -> None:
        super().__init__()
        start = torch.as_tensor(step_size, dtype=torch.get_default_dtype())
        # t, mean gradient, averaged iterate, iterate, centre: all of Pyro's class.
        state = torch.zeros(5, *start.shape, device=start.device)
        self.register_buffer("_state", state)
        self.reset(start)

    def reset(self, step_size: float | Tensor) -> None:
        """Begin anew at ``step_size``."""
        log_step = torch.as_tensor(step_size).to(self._state).log()
        zero = torch.zeros_like(log_step)
        # Pyro and Stan pull towards ten times the step. From a step that was found by
        # find_step_size that wastes the first transitions of all chains at once.
        self._state = torch.stack([zero, zero, log_step, log_step, log_step])

    @property
    def step_size(self) -> Tensor:
        """The current iterate, for use while adapting, in the shape of the start."""
        return self._state[3].exp()

    @property
    def averaged_step_size(self) -> Tensor:
        """The averaged iterate, to be frozen after warmup, in the same shape."""
        return self._state[2].exp()

    def update(self, kernel: Kernel, info: StepInfo) -> None:
        """Learn from the mean acceptance of one or more transitions.

        Args:
            kernel: For its target.
            info: Of all chains, with any leading dimension of transitions.
        """
        # A copy: Pyro adds to t in place, and a saved state_dict shares the buffer.
        t, g_avg, x_avg, _, centre = self._state.clone().unbind()
        scheme: Any = DualAveraging(prox_center=centre, gamma=self.GAMMA)
        scheme._t, scheme._g_avg, scheme._x_avg = t, g_avg, x_avg
        is_shared = self._state.dim() == 1
        mean = info.accept_prob
        mean = kernel.mean_acceptance(mean) if is_shared else mean.to(t)
        scheme.step(kernel.target_accept_prob - mean)
        x, x_avg = scheme.get_state()
        self._state = torch.stack([scheme._t, scheme._g_avg, x_avg, x, centre])


def find_step_size(
    kernel: Kernel, energy: Energy, state: ChainState, max_doublings: int = 50
) -> Tensor:
    """Double or halve the step until the mean acceptance crosses the target.

    Args:
        kernel: Its ``step_size`` is where the search begins.
        energy: The energy of ``state``.
        state: Chains, left where they are.
        max_doublings: Where to give up.

    Returns:
        A step size of shape ``()``, 1 for a kernel without one. Costs a transition a
        doubling, of the kernel that ``kernel.probe()`` returns where there is such a
        method.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = pyro_ebm.mcmc.HMC(step_size=1e-4)
        >>> state = kernel.init(energy, torch.randn(64, 2))
        >>> bool(find_step_size(kernel, energy, state) > 0.1)
        True
    """
    if not kernel.has_step_size:
        return torch.ones_like(state.energy[:0].sum())
    step_size = torch.as_tensor(kernel.step_size).to(state.energy)
    direction = 0
    kernel = getattr(kernel, "probe", lambda: kernel)()
    for _ in range(max_doublings):
        trial = kernel.with_step_size(step_size)
        accept_prob = trial.mean_acceptance(trial.step(energy, state)[1].accept_prob)
        above = 1 if accept_prob > kernel.target_accept_prob else -1
        if direction and above != direction:
            break
        direction = above
        step_size = step_size * 2.0**direction
    return step_size


def follow_acceptance(
    log_step_size: Tensor, kernel: Kernel, info: StepInfo, gain: float
) -> Tensor:
    r"""Update step sizes by the acceptance of each temperature.

    .. math::
        \log\epsilon_k \leftarrow \log\epsilon_k + \gamma\, (\bar a_k - a^\star)

    Args:
        log_step_size: Shape ``(K,)``.
        kernel: For its target :math:`a^\star`.
        info: Of chains at ``K`` temperatures, chain shape ``(C, K)``.
        gain: :math:`\gamma`; falling with the number of steps to settle down, constant
            to keep up with an energy that changes.

    References:
        Robbins & Monro (1951), Annals of Mathematical Statistics 22, 400-407.
    """
    excess = info.accept_prob.mean(0) - kernel.target_accept_prob
    return log_step_size + gain * excess
