r"""What replica exchange learns in its warm-up: temperatures, scales and step sizes.

The warm-up is in rounds, each about as long as all before it. During a round each
temperature follows its mean acceptance :math:`a_k` with its step size,

.. math::
    \log \epsilon_k \leftarrow \log \epsilon_k
        + \frac{1}{\sqrt t}\, (a_k - a^\star)                              \tag{1}

and at its end the temperatures are placed anew where all pairs would swap equally
often, and the scale of each coordinate becomes

.. math::
    s_{ki} = \mathbb{E}_k\big[(\partial_i f_{\beta_k})^2\big]^{-1/2}       \tag{2}

which on a Gaussian is the standard deviation where coordinates are independent. The
standard deviation itself would measure how far modes are apart, not how wide they are.
The last round, half of the warm-up, is for the step sizes alone.
"""

__all__ = ["LadderAdaptation"]

import dataclasses

import torch
from torch import Tensor

from pyro_ebm.mcmc.base import StepInfo
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.tempering.ladder import Ladder, equalised, interpolate
from pyro_ebm.mcmc.tempering.path import GeometricPath, PathState
from pyro_ebm.mcmc.warmup.adaptation import find_step_size, follow_acceptance


class LadderAdaptation:
    """The ladder and the kernel as learned so far.

    Args:
        path: From the base to the energy.
        kernel: Its step size is where the search begins. With a scale of its own, that
            is kept at all temperatures.
        inverse_temperatures: To begin with, shape ``(K,)``.
        state: Replicas above the base, chain shape ``(C, K - 1)``.
        num_steps: Updates after which nothing changes any more; may be 0.
    """

    #: Where the rounds end, in parts of the warm-up.
    ROUND_ENDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)

    def __init__(
        self,
        path: GeometricPath,
        kernel: HMC,
        inverse_temperatures: Tensor,
        state: PathState,
        num_steps: int,
    ) -> None:
        self.path, self._given, self.num_steps = path, kernel, num_steps
        ends = {round(part * num_steps) for part in self.ROUND_ENDS}
        self._round_ends = sorted(ends - {0})
        self._num_updates = 0
        num_above = len(inverse_temperatures) - 1
        ones = state.u.new_ones((num_above, *path.event_shape))
        self.ladder = Ladder(path, inverse_temperatures, ones)
        step_size = torch.as_tensor(kernel.step_size).to(state.u)
        if num_steps:
            step_size = find_step_size(kernel, self.ladder, self.ladder.chains(state))
        self._log_step = step_size.log().expand(num_above)
        self._start_round()

    @property
    def kernel(self) -> HMC:
        """With a step size for each temperature above the base's."""
        return dataclasses.replace(self._given, step_size=self._log_step.exp())

    def update(self, state: PathState, info: StepInfo, swap_prob: Tensor) -> None:
        """Learn from a step of all replicas; nothing more after the warm-up.

        Args:
            state: Where the step of the kernel led those above the base.
            info: What it returned with the state.
            swap_prob: Of all pairs, shape ``(C, K - 1)``.
        """
        if self._num_updates >= self.num_steps:
            return
        self._num_updates += 1
        self._log_steps.append(self._log_step)
        gain = len(self._log_steps) ** -0.5
        log_step, given = self._log_step, self._given
        self._log_step = follow_acceptance(log_step, given, info, gain)  # (1)
        self._rejections.append(1 - swap_prob.mean(0))
        grad = self.ladder.chains(state).grad / self.ladder.scale
        self._squares.append(grad.square().mean(0))
        if self._num_updates in self._round_ends:
            self._end_round()

    def _start_round(self) -> None:
        self._log_steps: list[Tensor] = []
        self._rejections: list[Tensor] = []
        self._squares: list[Tensor] = []

    def _end_round(self) -> None:
        # The first half of a round is on its way from another ladder.
        half = len(self._log_steps) // 2
        self._log_step = torch.stack(self._log_steps[half:]).mean(0)
        if self._num_updates < self.num_steps:
            given = self._given
            metric = (given.scale, given.scale_tril, given.low_rank)
            if all(part is None for part in metric):
                self._set_scale(torch.stack(self._squares[half:]).mean(0))
            self._move_temperatures(torch.stack(self._rejections[half:]).mean(0))
        self._start_round()

    def _set_scale(self, squares: Tensor) -> None:
        old = self.ladder.scale
        new = squares.rsqrt()  # (2)
        new = torch.where(new.isfinite() & (new > 0), new, old)
        # The mean step in the coordinates of the path stays what it was.
        change = (old / new).log().reshape(len(old), -1).mean(1)
        self._log_step = self._log_step + change
        self.ladder = Ladder(self.path, self.ladder.inverse_temperatures, new)

    def _move_temperatures(self, rejection: Tensor) -> None:
        old, scale = self.ladder.inverse_temperatures, self.ladder.scale
        if len(old) == 2:
            return
        new = equalised(old, rejection)
        self._log_step = interpolate(new[1:], old[1:], self._log_step)
        scale = interpolate(new[1:], old[1:], scale.log()).exp()
        self.ladder = Ladder(self.path, new, scale)
