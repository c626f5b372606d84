"""Warm-up of any kernel: step size, scale, and what the kernel itself adapts.

The step size follows the mean acceptance throughout. The scale comes from the draws of
all chains together, in windows that end at 20, 40 and 70 % of the warm-up; at each end
the step size is searched for again and everything else starts anew in the new scale.
After the warm-up the kernel is frozen, so that it leaves its target invariant.
"""

__all__ = ["Warmup"]

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.adaptation import (
    KernelAdaptation,
    StepSizeAdaptation,
    find_step_size,
)
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, move_to_others
from pyro_ebm.mcmc.metric import PooledMoments


class Warmup(nn.Module):
    """Adapts a kernel to the chains that it moves, with its state in a ``state_dict``.

    Args:
        kernel: Any kernel; its settings are where the search begins. The scale is
            adapted if it has a setting ``scale``, and what its method ``adaptation``
            returns, if it has one.
        energy: Over unconstrained space.
        state: Where the chains are.
        num_steps: Updates after which the kernel is frozen; with 0 it stays as given.
        is_dense: Whether to adapt a dense scale, for events that are vectors.

    Attributes:
        num_stuck: Chains that accepted hardly anything in the last window, shape
            ``()``. The mean acceptance of many chains hides them.

    Raises:
        ValueError: If ``num_steps`` is negative, or a dense scale is asked for where
            the kernel or the event has none.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = pyro_ebm.mcmc.HMC()
        >>> state = kernel.init(energy, torch.randn(64, 2))
        >>> warmup = Warmup(kernel, energy, state, num_steps=50)
        >>> for _ in range(50):
        ...     state, info = warmup.kernel.step(energy, state)
        ...     state = warmup.update(state, info)
        >>> warmup.kernel.scale.shape
        torch.Size([2])
    """

    scale: Tensor
    num_stuck: Tensor
    accept_sum: Tensor

    #: Where the windows end, in parts of the warm-up.
    WINDOW_ENDS = (0.2, 0.4, 0.7)
    #: Draws that a scale must come from, in all and for each column of a dense one.
    MIN_DRAWS = 10
    MIN_DRAWS_DENSE = 5
    #: Mean acceptance of a chain, relative to the target, below which it is stuck.
    STUCK = 0.1

    def __init__(
        self,
        kernel: Kernel,
        energy: Energy,
        state: ChainState,
        num_steps: int,
        *,
        is_dense: bool = False,
    ) -> None:
        super().__init__()
        if num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {num_steps}.")
        self.num_steps = num_steps
        self._given = kernel
        # In a tuple: as a submodule its parameters would be part of the state_dict.
        self._energy = (energy,)
        self._num_updates, self._window_start = 0, 0
        ends = {round(part * num_steps) for part in self.WINDOW_ENDS}
        self._window_ends = sorted((ends | {num_steps}) - {0})
        names = {field.name for field in dataclasses.fields(kernel)}
        self._has_step_size = {"step_size", "target_accept_prob"} <= names
        self._set_up_scale(names, state, is_dense=is_dense)
        self.register_buffer("num_stuck", torch.tensor(0, device=state.x.device))
        self.register_buffer("accept_sum", torch.zeros_like(state.energy))
        self.own: KernelAdaptation[Any] | None = None
        if hasattr(kernel, "adaptation"):
            self.own = kernel.adaptation().to(state.x.device)
        self.step_size = StepSizeAdaptation(1.0).to(state.x.device)
        if num_steps:
            self._restart(state)

    def _set_up_scale(
        self, names: set[str], state: ChainState, *, is_dense: bool
    ) -> None:
        event_shape = self._energy[0].event_shape
        if is_dense and ("scale_tril" not in names or len(event_shape) != 1):
            raise ValueError(
                "is_dense must be False for a kernel without scale_tril, or for events "
                f"that are not vectors; got {type(self._given).__name__} and "
                f"event_shape {tuple(event_shape)}."
            )
        self._has_scale = "scale" in names
        self._is_dense = is_dense
        if not self._has_scale:
            return
        given: Any = self._given
        ones = state.x.new_ones(event_shape)
        scale = ones if given.scale is None else given.scale.to(state.x)
        tril = given.scale_tril if "scale_tril" in names else None
        self._is_dense = is_dense or tril is not None
        if self._is_dense:
            scale = scale.diag_embed() if tril is None else tril.to(state.x)
        self.register_buffer("scale", scale.detach().clone())
        self.moments = PooledMoments(event_shape, is_dense=self._is_dense).to(state.x)

    @property
    def is_done(self) -> bool:
        """Whether the kernel is frozen."""
        return self._num_updates >= self.num_steps

    @property
    def kernel(self) -> Kernel:
        """The kernel as adapted so far, to make the next transition with.

        Once frozen it holds plain numbers, and need not be asked for again.
        """
        if not self.num_steps:
            return self._given
        kernel = self._with_scale()
        if self._has_step_size:
            step_size: Tensor | float = self.step_size.step_size
            if self.is_done:
                step_size = self.step_size.averaged_step_size.item()
            kernel = dataclasses.replace(kernel, step_size=step_size)
        if self.own is not None:
            own = self.own
            kernel = own.frozen(kernel) if self.is_done else own.current(kernel)
        return kernel

    @torch.no_grad()
    def update(self, state: ChainState, info: StepInfo) -> ChainState:
        """Learn from a transition of :attr:`kernel`; nothing more once it is frozen.

        Args:
            state: Where the transition led.
            info: What it returned with the state.

        Returns:
            The state to go on from. At the end of a window, chains that were stuck in
            it stand where randomly chosen others do.
        """
        if self.is_done:
            return state
        kernel = self.kernel
        if self._has_step_size:
            self.step_size.update(kernel, info)
        if self.own is not None:
            self.own.update(kernel, info)
        self.accept_sum = self.accept_sum + info.accept_prob
        window_end = next(e for e in self._window_ends if e > self._num_updates)
        self._num_updates += 1
        # The draws of the first half come from a worse kernel, and remember the start.
        half_time = (self._window_start + window_end) / 2
        if self._has_scale and self._num_updates > half_time:
            self.moments.update(state.x)
        return self._end_window(state) if self._num_updates == window_end else state

    def get_extra_state(self) -> dict[str, int]:
        """The counters, which must be on the host."""
        return {"updates": self._num_updates, "window_start": self._window_start}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Load the counters."""
        self._num_updates = state["updates"]
        self._window_start = state["window_start"]

    def _end_window(self, state: ChainState) -> ChainState:
        count = self._num_updates - self._window_start
        least = self.STUCK * (
            self._given.target_accept_prob if self._has_step_size else 1
        )
        is_stuck = self.accept_sum < least * count
        self.num_stuck = is_stuck.sum()
        self.accept_sum = torch.zeros_like(self.accept_sum)
        self._window_start = self._num_updates
        if self.is_done:
            return state
        if self._has_step_size and is_stuck.dim() == 1:
            state = move_to_others(state, is_stuck)
        if self._has_scale:
            self._update_scale()
        self._restart(state)
        return state

    def _update_scale(self) -> None:
        """Take that of the window's draws, where there are enough of them."""
        covariance, count = self.moments.covariance(), self.moments.count
        variance = covariance.diagonal() if self._is_dense else covariance
        old = self.scale.diagonal() if self._is_dense else self.scale.flatten()
        # A coordinate in which no chain has moved has no scale yet.
        is_known = (variance > 0) & variance.isfinite() & (count >= self.MIN_DRAWS)
        scale = torch.where(is_known, variance.sqrt(), old)
        if self._is_dense:
            factor, failed = torch.linalg.cholesky_ex(covariance)
            is_enough = (count >= self.MIN_DRAWS_DENSE * len(factor)) & (failed == 0)
            # A factor comes column by column, but is loaded row by row, and a product
            # with it would not be the same to the last bit.
            dense = torch.where(is_enough, factor, scale.diag_embed())
            self.scale = dense.contiguous()
        else:
            self.scale = scale.reshape(self.scale.shape)
        self.moments.reset()

    def _restart(self, state: ChainState) -> None:
        """Find the step size in the current scale; begin anew with everything else."""
        if self._has_step_size:
            kernel = self._with_scale()
            step_size = find_step_size(kernel, self._energy[0], state)
            self.step_size.reset(step_size)
        if self.own is not None:
            self.own.reset()

    def _with_scale(self) -> Any:
        if not self._has_scale:
            return self._given
        if self._is_dense:
            return dataclasses.replace(self._given, scale=None, scale_tril=self.scale)
        return dataclasses.replace(self._given, scale=self.scale)
