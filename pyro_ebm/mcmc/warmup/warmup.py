"""Warm-up of any kernel: step size, metric, and what the kernel itself adapts.

The step size follows the mean acceptance throughout. The metric comes from the draws of
all chains and the gradients there, in windows that end at 10, 20, 40 and 70 % of the
warm-up; at each end the step size is searched for again and everything else starts anew
in the new metric (:mod:`pyro_ebm.mcmc.kernels.metric`). It is diagonal, or dense where
that leaves much less to do, or, of many coordinates, diagonal but for a few directions;
each group of chains has the same say in it.

Chains that have not arrived, whose energy is far above that of others, have no say in
the step size either, and at the end of a window go on from where others are, as do
chains that are stuck. After the warm-up the kernel is frozen, so that it leaves its
target invariant.
"""

__all__ = ["Warmup"]

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import (
    ChainState,
    Kernel,
    StepInfo,
    far_limit,
    flat_event,
)
from pyro_ebm.mcmc.kernels.metric import (
    MAX_DENSE,
    DrawRows,
    GroupMoments,
    LowRank,
    dense_metric,
    diagonal_metrics,
    low_rank_metric,
    steepness_weights,
    times_transposed,
    typical,
)
from pyro_ebm.mcmc.warmup.adaptation import (
    KernelAdaptation,
    StepSizeAdaptation,
    find_step_size,
)

#: Parts of a metric that is no diagonal.
_PARTS = ("scale_tril", "directions", "stretch")


class Warmup(nn.Module):
    """Adapts a kernel to the chains that it moves, with its state in a ``state_dict``.

    Args:
        kernel: Any kernel; its settings are where the search begins. The metric is
            adapted if it has a setting ``scale``, a dense one too if it has
            ``scale_tril``, one of low rank if it has ``low_rank``, and what its method
            ``adaptation`` returns, if it has one.
        energy: Over unconstrained space.
        state: Where the chains are.
        num_steps: Updates after which the kernel is frozen; with 0 it stays as given.
        num_groups: Groups of chains side by side that started at the same point;
            default: each chain is one.

    Attributes:
        num_stuck: Chains that accepted hardly anything in the last window, shape
            ``()``. The mean acceptance of many chains hides them.
        num_moved: Chains that were stuck or had not arrived at the end of a window,
            and were put where others are, shape ``()``; over all windows.

    Raises:
        ValueError: If ``num_steps`` is negative, or ``num_groups`` does not divide the
            number of chains.

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
    scale_tril: Tensor
    directions: Tensor
    stretch: Tensor
    num_stuck: Tensor
    num_moved: Tensor
    accept_sum: Tensor
    spread: Tensor
    level_sum: Tensor

    #: Where the windows end, in parts of the warm-up.
    WINDOW_ENDS = (0.1, 0.2, 0.4, 0.7)
    #: Where chains are looked at once more, in the last window.
    LAST_LOOK = 0.85
    #: The part in which each chain has a step of its own, if the kernel allows for it.
    OWN_STEPS = 0.2
    #: Draws that a metric must come from, in all and for each column of a dense one.
    MIN_DRAWS = 10
    MIN_DRAWS_DENSE = 5
    #: Standard deviation of whitened draws, which is 1 of a Gaussian, that is believed.
    MAX_SPREAD = 4.0
    #: Mean acceptance of a chain, relative to the target, below which it is stuck.
    STUCK = 0.1

    def __init__(
        self,
        kernel: Kernel,
        energy: Energy,
        state: ChainState,
        num_steps: int,
        *,
        num_groups: int | None = None,
    ) -> None:
        super().__init__()
        if num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {num_steps}.")
        self.num_steps = num_steps
        self._given = kernel
        # In a tuple: as a submodule its parameters would be part of the state_dict.
        self._energy = (energy,)
        self._far_limit = far_limit(energy.event_shape.numel())
        self._num_updates, self._window_start, self._num_draws = 0, 0, 0
        parts = (*self.WINDOW_ENDS, self.LAST_LOOK)
        ends = {round(part * num_steps) for part in parts}
        self._window_ends = sorted((ends | {num_steps}) - {0})
        names = {field.name for field in dataclasses.fields(kernel)}
        self._has_step_size = {"step_size", "target_accept_prob"} <= names
        self._set_up_metric(names, state, _groups_of(state, num_groups))
        device = state.x.device
        for name in ("num_stuck", "num_moved"):
            self.register_buffer(name, torch.tensor(0, device=device))
        self.register_buffer("spread", torch.tensor(1.0, device=device))
        self.register_buffer("accept_sum", torch.zeros_like(state.energy))
        self.own: KernelAdaptation[Any] | None = None
        if hasattr(kernel, "adaptation"):
            self.own = kernel.adaptation().to(device)
        self.step_size = StepSizeAdaptation(1.0).to(device)
        self.chain_steps: StepSizeAdaptation | None = None
        if self._has_step_size and kernel.has_chain_steps:
            ones = torch.ones_like(state.energy, dtype=torch.get_default_dtype())
            self.chain_steps = StepSizeAdaptation(ones)
        if num_steps:
            self._restart(state)

    def _set_up_metric(
        self, names: set[str], state: ChainState, num_groups: int
    ) -> None:
        self._has_scale = "scale" in names
        if not self._has_scale:
            return
        given: Any = self._given
        event_shape = self._energy[0].event_shape
        size = event_shape.numel()
        is_vector = len(event_shape) == 1
        self._may_be_dense = is_vector and "scale_tril" in names and size > 1
        self._may_be_dense &= size <= MAX_DENSE
        self._may_stretch = is_vector and "low_rank" in names and size > MAX_DENSE
        self.register_buffer("scale", state.x.new_ones(event_shape))
        # Of the parts of a metric those that are not in use have no elements.
        for name in _PARTS:
            self.register_buffer(name, state.x.new_empty(0))
        tril, low_rank = (getattr(given, n, None) for n in ("scale_tril", "low_rank"))
        self._set_metric(given.scale, tril if low_rank is None else low_rank)
        # Draws and gradients side by side, in double precision.
        device, count = state.x.device, 2 * state.energy.numel()
        self._num_groups = num_groups
        self.moments = GroupMoments(event_shape, count).to(device, torch.float64)
        if self._may_be_dense:
            self.dense_moments = GroupMoments(
                event_shape, 2 * num_groups, is_dense=True
            ).to(device, torch.float64)
        if self._may_stretch:
            self.rows = DrawRows(count // 2, size, self.num_steps).to(state.x)
        self.register_buffer("level_sum", torch.zeros_like(state.energy))

    def _set_metric(
        self, scale: Tensor | None, factor: Tensor | LowRank | None
    ) -> None:
        """Take a metric, of which the kernel will have one part or the other."""
        empty = self.scale.new_empty(0)
        parts = dict.fromkeys(_PARTS, empty)
        if isinstance(factor, LowRank):
            scale = factor.scale
            parts |= {"directions": factor.directions, "stretch": factor.stretch}
        elif factor is not None:
            parts["scale_tril"] = factor
        if scale is not None:
            parts["scale"] = scale.reshape(self.scale.shape)
        for name, part in parts.items():
            setattr(self, name, part.detach().to(self.scale).clone())

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
        kernel = self._with_metric()
        if self._has_step_size:
            step_size: Tensor | float = self.step_size.step_size
            if self.is_done:
                step_size = self.step_size.averaged_step_size.item()
            elif self._own_steps is not None:
                step_size = self._own_steps.step_size
            kernel = dataclasses.replace(kernel, step_size=step_size)
        if self.own is not None:
            own = self.own
            kernel = own.frozen(kernel) if self.is_done else own.current(kernel)
        return kernel

    @property
    def _own_steps(self) -> StepSizeAdaptation | None:
        """Of each chain, in the windows in which chains are still on their way."""
        is_early = self._num_updates < round(self.OWN_STEPS * self.num_steps)
        return self.chain_steps if is_early else None

    @torch.no_grad()
    def update(self, state: ChainState, info: StepInfo) -> ChainState:
        """Learn from a transition of :attr:`kernel`; nothing more once it is frozen.

        Args:
            state: Where the transition led.
            info: What it returned with the state.

        Returns:
            The state to go on from. At the end of a window, chains that were stuck in
            it, or have not arrived, stand where randomly chosen others do.
        """
        if self.is_done:
            return state
        kernel = self.kernel
        is_far = self._is_far(state)
        if self._has_step_size:
            neutral = kernel.target_accept_prob
            self.step_size.update(kernel, _with_acceptance(info, is_far, neutral))
            if self._own_steps is not None:
                self._own_steps.update(kernel, info)
        if self.own is not None:
            self.own.update(kernel, _with_acceptance(info, is_far, 0.0))
        self.accept_sum = self.accept_sum + info.accept_prob
        window_end = next(e for e in self._window_ends if e > self._num_updates)
        self._num_updates += 1
        # The draws of the first half come from a worse kernel, and remember the start.
        half_time = (self._window_start + window_end) / 2
        if self._has_scale and self._num_updates > half_time:
            rows = torch.stack([state.x, state.grad])
            weight = self._weights(state.grad).repeat(2, *[1] * state.energy.dim())
            self.moments.update(rows, weight)
            if self._may_be_dense:
                self.dense_moments.update(rows, weight)
            if self._may_stretch:
                expected = self._num_draws + 1 + window_end - self._num_updates
                self.rows.update(rows, weight[0], self._num_draws, expected)
            self.level_sum = self.level_sum + state.energy
            self._num_draws += 1
        return self._end_window(state) if self._num_updates == window_end else state

    def get_extra_state(self) -> dict[str, int]:
        """The counters, which must be on the host."""
        return {
            "updates": self._num_updates,
            "window_start": self._window_start,
            "draws": self._num_draws,
        }

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Load the counters."""
        self._num_updates = state["updates"]
        self._window_start = state["window_start"]
        self._num_draws = state["draws"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # The metric may have become dense, or have ceased to be.
        for name in _PARTS if self._has_scale else ():
            part = state_dict.get(f"{prefix}{name}")
            if part is not None:
                setattr(self, name, self.scale.new_empty(part.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_far(self, state: ChainState) -> Tensor:
        """Chains with an energy far above that of the lower quarter."""
        return state.energy > _lower_quarter(state.energy) + self._far_limit

    def _end_window(self, state: ChainState) -> ChainState:
        count = self._num_updates - self._window_start
        is_last = self._num_updates > max(self.WINDOW_ENDS) * self.num_steps + 1
        least = self.STUCK * (
            self._given.target_accept_prob if self._has_step_size else 1
        )
        is_stuck = self.accept_sum < least * count
        self.num_stuck = is_stuck.sum()
        self.accept_sum = torch.zeros_like(self.accept_sum)
        self._window_start = self._num_updates
        is_lost = self._is_far(state)
        if self._has_scale and self._num_draws:
            scales = diagonal_metrics(*self.moments.covariance().chunk(2))
            free = self._free_energies(scales)
            low, limit = _lower_quarter(free), _massless_limit(scales.shape[1])
            is_lost = is_lost | (free > low + limit)
            if not is_last:
                self._update_metric(scales, is_lost)
            self.moments.reset()
            self.level_sum = torch.zeros_like(self.level_sum)
            self._num_draws = 0
        if (self._has_step_size or self.own is not None) and is_stuck.dim() == 1:
            is_lost = is_lost | is_stuck
            self.num_moved = self.num_moved + (is_lost & ~is_lost.all()).sum()
            state = state.moved_to_others(is_lost)
        # In the last window all goes on, but not the step for chains that are gone.
        if not self.is_done and (not is_last or is_lost.any()):
            self._restart(state)
        return state

    def _free_energies(self, scales: Tensor) -> Tensor:
        """Mean energy of each chain less the log volume of its surroundings.

        This is minus the log of the mass there. In the neck of a funnel the energy is
        low, and the volume lower still. 0 before there are draws enough to tell.
        """
        if self._num_draws < self.MIN_DRAWS:
            return torch.zeros_like(self.level_sum)
        volume = scales.log().sum(1).reshape(self.level_sum.shape)
        return self.level_sum / self._num_draws - volume

    def _weights(self, grad: Tensor) -> Tensor:
        force = times_transposed(grad, self._factor)
        if self._factor is None:
            force = force * self.scale
        return steepness_weights(flat_event(force, self.accept_sum.dim()))

    def _update_metric(self, scales: Tensor, is_lost: Tensor) -> None:
        """Take that of the window, where there are enough draws."""
        count = self._num_draws * len(scales)
        if count < self.MIN_DRAWS:
            return
        # A coordinate in which no chain has moved has no scale yet.
        is_near = ~is_lost.flatten() | is_lost.all()
        scale, old = typical(scales[is_near]), self.scale.flatten()
        scale = torch.where(scale.isfinite(), scale, old.to(scale))
        is_near = is_near.reshape(self._num_groups, -1).all(1)
        factor, variance = self._factor_of(is_near | ~is_near.any(), scale, count)
        if factor is None:
            variance = (self.moments.covariance().chunk(2)[0] / scale**2).mean(1)
        self._set_metric(scale, factor)
        spread = variance.nanmedian().sqrt().nan_to_num(1.0)
        self.spread = spread.clamp(1.0, self.MAX_SPREAD).to(self.spread)

    def _factor_of(
        self, is_near: Tensor, scale: Tensor, count: int
    ) -> tuple[Tensor | LowRank | None, Tensor]:
        """A metric that is more than a diagonal, by the near groups, if it is worth it.

        Args:
            is_near: Shape ``(G,)``.
            scale: Of the diagonal metric, shape ``(D,)``.
            count: Draws of the window.

        Returns:
            The metric, and the variance of the draws of each near group in it.
        """
        factor: Tensor | LowRank | None = None
        variance = scale[:0]
        if self._may_be_dense:
            if count >= self.MIN_DRAWS_DENSE * len(scale):
                covariance, grads = (
                    part[is_near] for part in self.dense_moments.covariance().chunk(2)
                )
                factor = dense_metric(covariance, grads, scale)
                if factor is not None:
                    inverse = torch.linalg.inv(factor)
                    variance = (inverse @ covariance * inverse).sum(-1).mean(-1)
            self.dense_moments.reset()
        if self._may_stretch:
            draws, grads = self.rows.by_group(self._num_groups)
            factor = low_rank_metric(draws[is_near], grads[is_near], scale)
            if factor is not None:
                variance = factor.whiten(draws[is_near]).square().mean((1, 2))
            self.rows.reset()
        return factor, variance

    def _restart(self, state: ChainState) -> None:
        """Find the step size in the current metric; begin anew with all else."""
        if self._has_step_size:
            near = ~self._is_far(state)
            if state.energy.dim() == 1:
                state = ChainState(*(value[near] for value in state))
            step_size = find_step_size(self._with_metric(), self._energy[0], state)
            self.step_size.reset(step_size)
            if self._own_steps is not None:
                self._own_steps.reset(step_size.expand(self.accept_sum.shape))
        if self.own is not None:
            self.own.spread = self.spread.clone()
            self.own.reset()

    @property
    def _factor(self) -> Tensor | LowRank | None:
        """The metric in use, if it is no diagonal."""
        if not self._has_scale:
            return None
        if self.stretch.numel():
            return LowRank(self.scale, self.directions, self.stretch)
        return self.scale_tril if self.scale_tril.numel() else None

    def _with_metric(self) -> Any:
        if not self._has_scale:
            return self._given
        factor = self._factor
        is_low = isinstance(factor, LowRank)
        changes: dict[str, Any] = {"scale": self.scale if factor is None else None}
        if hasattr(self._given, "scale_tril"):
            changes["scale_tril"] = None if is_low else factor
        if hasattr(self._given, "low_rank"):
            changes["low_rank"] = factor if is_low else None
        return dataclasses.replace(self._given, **changes)


def _massless_limit(size: int) -> float:
    """Excess free energy, in nats, beyond which a region holds negligible mass.

    Args:
        size: Coordinates of a point, as the estimates of its volume err in each.
    """
    return 10 + 2 * math.sqrt(size)


def _lower_quarter(values: Tensor) -> Tensor:
    count = (values.numel() + 3) // 4
    return values.flatten().kthvalue(count).values


def _with_acceptance(info: StepInfo, is_far: Tensor, value: float) -> StepInfo:
    """The same with another acceptance probability of the chains that are far."""
    new = info._replace(accept_prob=torch.where(is_far, value, info.accept_prob))
    if hasattr(info, "__dict__"):  # more than the fields, for the kernel's adaptation
        vars(new).update(vars(info))
    return new


def _groups_of(state: ChainState, num_groups: int | None) -> int:
    """The number of groups of chains, by default one for each chain."""
    num_chains = state.energy.numel()
    num_groups = num_chains if num_groups is None else num_groups
    if num_groups < 1 or num_chains % num_groups:
        raise ValueError(
            f"num_groups must divide the number of chains, {num_chains}, got "
            f"{num_groups}."
        )
    return num_groups
