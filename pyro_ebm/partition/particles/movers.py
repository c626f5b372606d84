"""Kernels that move particles along a path.

:class:`AdaptiveHMC` adapts Hamiltonian Monte Carlo at each temperature: the metric
comes from the weighted population, the step size from the acceptance of the moves.
:class:`GivenKernels` uses kernels as they are.
"""

__all__ = ["AdaptiveHMC", "GivenKernels", "with_metric", "with_step_size"]

import dataclasses
import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from pyro_ebm.mcmc import HMC, Kernel
from pyro_ebm.mcmc.base import flat_event
from pyro_ebm.mcmc.tempering.path import GeometricPath, PathState, joined
from pyro_ebm.mcmc.warmup.adaptation import StepSizeAdaptation, find_step_size

#: Robust standard deviations from the median that are no distance between modes; and
#: those that a point counts for at most where others are that far out.
_VAGUE, _MAX_SCALES = 300.0, 6.0


@final
class AdaptiveHMC:
    """Hamiltonian Monte Carlo, adapted anew at each temperature.

    Args:
        path: Where the particles travel.
        num_moves: Transitions of each ancestor at each temperature.
        keeps_all: Whether all its states become particles (the waste-free form), or
            the last one alone.

    Attributes:
        kernels: As they were left at each temperature.
    """

    def __init__(
        self, path: GeometricPath, num_moves: int, *, keeps_all: bool = True
    ) -> None:
        self.path, self.num_moves, self.keeps_all = path, num_moves, keeps_all
        self.kernels: list[HMC] = []

    def __call__(
        self,
        population: PathState,
        log_weights: Tensor,
        ancestors: PathState,
        beta: float,
    ) -> PathState:
        """See :class:`~pyro_ebm.partition.particles.engine.Mover`."""
        kernel = self.kernels[-1] if self.kernels else HMC(step_size=1.0)
        kernel = with_metric(kernel, population.u, log_weights)
        path, state = self.path, ancestors
        path.inverse_temperature = beta
        probe = dataclasses.replace(kernel, num_leapfrog=1)
        step_size = find_step_size(probe, path, path.at_temperature(state))
        adaptation = StepSizeAdaptation(step_size)
        kept = [state]
        for _ in range(self.num_moves):
            kernel = with_step_size(kernel, adaptation.step_size)
            state, info = path.step(kernel, state)
            adaptation.update(kernel, info)
            kept.append(state)
        self.kernels.append(with_step_size(kernel, adaptation.step_size))
        return state if not self.keeps_all else joined(kept)


@final
class GivenKernels:
    """Frozen kernels, one transition at each temperature.

    Args:
        path: Where the particles travel.
        kernel_at: The kernel of an inverse temperature.
    """

    def __init__(
        self, path: GeometricPath, kernel_at: Callable[[float], Kernel]
    ) -> None:
        self.path, self.kernel_at = path, kernel_at

    def __call__(
        self, _: PathState, __: Tensor, ancestors: PathState, beta: float
    ) -> PathState:
        """See :class:`~pyro_ebm.partition.particles.engine.Mover`."""
        self.path.inverse_temperature = beta
        return self.path.step(self.kernel_at(beta), ancestors)[0]


def with_metric(kernel: HMC, u: Tensor, log_weights: Tensor) -> HMC:
    """The kernel with the scales of a weighted population as its metric.

    Dense for vectors if there are enough points to tell correlations, else diagonal:
    any shrinkage of the one towards the other would undo a strong correlation. Where
    some are as far out as those of a vague prior, farther than any step could be, the
    scale is that of the others.

    Args:
        kernel: Its step size and number of leapfrog steps are kept.
        u: Points, shape ``(M, N, *event)``.
        log_weights: Shape ``(M, N)``.
    """
    points, event_shape = flat_event(u, 2).flatten(0, 1), u.shape[2:]
    weights = log_weights.flatten().softmax(0)
    ess = 1 / weights.square().sum()
    points = _winsorised(points, weights)
    centred = points - weights @ points
    variance = (weights @ centred.square()).clamp(min=1e-12)
    if len(event_shape) == 1 and ess > 5 * len(variance):
        covariance = (centred * weights[:, None]).mT @ centred
        factor, info = torch.linalg.cholesky_ex(covariance)
        if info == 0:
            return dataclasses.replace(kernel, scale=None, scale_tril=factor)
    scale = variance.sqrt().reshape(event_shape)
    return dataclasses.replace(kernel, scale=scale, scale_tril=None)


def _winsorised(points: Tensor, weights: Tensor) -> Tensor:
    """Points ``(N, D)``, none farther from the median than some robust scales."""
    ordered, order = points.sort(0)
    reached = weights[order].cumsum(0)
    last = len(points) - 1
    low, middle, high = (
        ordered.gather(0, (reached < part).sum(0, keepdim=True).clamp(max=last))
        for part in (0.25, 0.5, 0.75)
    )
    scale = (high - low) / 1.349  # of a normal distribution
    is_vague = ((points - middle).abs() > _VAGUE * scale).any(0)
    reach = torch.where(is_vague, _MAX_SCALES * scale, torch.inf)
    return points.clamp(middle - reach, middle + reach)


def with_step_size(kernel: HMC, step_size: Tensor) -> HMC:
    """Set the step size for about a quarter period in whitened coordinates."""
    # Where nothing is accepted the step may be nil.
    num_leapfrog = min(16, max(1, math.ceil(1.6 / max(step_size.item(), 0.1))))
    return dataclasses.replace(kernel, step_size=step_size, num_leapfrog=num_leapfrog)
