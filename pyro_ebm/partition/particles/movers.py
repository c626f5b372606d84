"""Kernels that move particles along a path.

:class:`AdaptiveHMC` adapts Hamiltonian Monte Carlo at each temperature: the metric
comes from the weighted population, the step size from the acceptance of the moves.
:class:`SiteMoves` does the same over finite supports, where there is no metric.
:class:`GivenKernels` uses kernels as they are.
"""

__all__ = [
    "AdaptiveHMC",
    "GivenKernels",
    "SiteMoves",
    "adaptive",
    "with_metric",
    "with_step_size",
]

import dataclasses
import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from pyro_ebm.mcmc import HMC, Kernel
from pyro_ebm.mcmc.base import flat_event
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for
from pyro_ebm.mcmc.tempering.path import GeometricPath, PathState, joined
from pyro_ebm.mcmc.tempering.site_path import SitePath, SiteState
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
class SiteMoves:
    """A kernel over a finite support, its step size adapted if it has one.

    Args:
        path: Where the particles travel.
        kernel: That moves them.
        num_moves: As of :class:`AdaptiveHMC`.
        keeps_all: Alike.

    Attributes:
        kernels: As they were left at each temperature.
    """

    def __init__(
        self, path: SitePath, kernel: Kernel, num_moves: int, *, keeps_all: bool = True
    ) -> None:
        self.path, self.num_moves, self.keeps_all = path, num_moves, keeps_all
        self._given = kernel
        self.kernels: list[Kernel] = []

    def __call__(
        self, _: SiteState, __: Tensor, ancestors: SiteState, beta: float
    ) -> SiteState:
        """See :class:`~pyro_ebm.partition.particles.engine.Mover`."""
        kernel = self.kernels[-1] if self.kernels else self._given
        self.path.inverse_temperature = beta
        adaptation = StepSizeAdaptation(getattr(kernel, "step_size", 1.0))
        kept = [ancestors]
        for _step in range(self.num_moves):
            kernel = kernel.with_step_size(adaptation.step_size)
            state, info = self.path.step(kernel, kept[-1])
            if kernel.has_step_size:
                adaptation.update(kernel, info)
            kept.append(state)
        self.kernels.append(kernel.with_step_size(adaptation.step_size))
        return self.path.joined(kept) if self.keeps_all else kept[-1]


def adaptive(
    path: GeometricPath | SitePath,
    num_moves: int,
    kernel: Kernel | None = None,
    *,
    keeps_all: bool = True,
) -> AdaptiveHMC | SiteMoves:
    """What moves particles along a path, adapted on the way.

    Args:
        path: Where they travel.
        num_moves: Transitions of each at each temperature.
        kernel: Over a finite support; default: what suits the target.
        keeps_all: Whether all states become particles, or the last one alone.

    Raises:
        TypeError: If a kernel is given for real space.
    """
    if isinstance(path, SitePath):
        kernel = kernel or kernel_for(path.at(1.0), HMC())
        return SiteMoves(path, kernel, num_moves, keeps_all=keeps_all)
    if kernel is not None:
        raise TypeError(
            "kernel must be None on a continuous support, where HMC is adapted at each "
            f"temperature; got {type(kernel).__name__}."
        )
    return AdaptiveHMC(path, num_moves, keeps_all=keeps_all)


@final
class GivenKernels:
    """Frozen kernels, one transition at each temperature.

    Args:
        path: Where the particles travel.
        kernel_at: The kernel of an inverse temperature.
    """

    def __init__(
        self, path: GeometricPath | SitePath, kernel_at: Callable[[float], Kernel]
    ) -> None:
        self.path: Any = path
        self.kernel_at = kernel_at

    def __call__(self, _: Any, __: Tensor, ancestors: Any, beta: float) -> Any:
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
