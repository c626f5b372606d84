r"""A frozen schedule for annealing, from a pilot run that is thrown away.

The pilot moves a few particles along the path by sequential Monte Carlo, placing each
rung of a ladder where the effective fraction of the weights falls to one half, and
adapts step size and metric on each. Rungs are then equally far from each other in what
annealing finds hard, so each is divided into equally many temperatures.

References:
    Del Moral, Doucet & Jasra (2006), JRSS B 68, 411-436.
"""

__all__ = ["Schedule", "plan_schedule"]

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pyro_ebm.mcmc import HMC, Kernel, StepSizeAdaptation, find_step_size
from pyro_ebm.mcmc.path import GeometricPath, PathState
from pyro_ebm.partition.particles.resampling import systematic_resample
from pyro_ebm.partition.particles.smc import (
    next_temperature,
    with_metric,
    with_step_size,
)

#: Particles of the pilot run, and transitions on each rung.
_NUM_PARTICLES = 128
_NUM_MOVES = 6
_MAX_RUNGS = 300


class Schedule(NamedTuple):
    """What annealing needs to know beforehand.

    Attributes:
        inverse_temperatures: From 0 to 1.
        kernels: One for each, frozen; the first is not used.
    """

    inverse_temperatures: list[float]
    kernels: list[Kernel]


@torch.no_grad()
def plan_schedule(
    path: GeometricPath,
    num_temperatures: int = 200,
    inverse_temperatures: Sequence[float] | None = None,
    kernel: Kernel | None = None,
) -> Schedule:
    """Freeze a schedule; what is not given comes from a pilot run.

    Args:
        path: From the base to the target; it counts the evaluations.
        num_temperatures: At least so many, where they are not given.
        inverse_temperatures: From 0 to 1, rising.
        kernel: For all temperatures.

    Raises:
        DivergenceError: If the pilot run does not arrive at the target.
        ValueError: If an argument is out of range.
    """
    if inverse_temperatures is not None:
        betas = [float(beta) for beta in inverse_temperatures]
        _check(betas)
        if kernel is not None:
            return Schedule(betas, [kernel] * len(betas))
    elif num_temperatures < 1:
        raise ValueError(
            f"num_temperatures must be at least 1, got {num_temperatures}."
        )
    rungs, found = _pilot(path)
    if inverse_temperatures is None:
        each = math.ceil(num_temperatures / (len(rungs) - 1))
        betas = [0.0]
        for low, high in zip(rungs[:-1], rungs[1:], strict=True):
            betas += [low + (high - low) * k / each for k in range(1, each)] + [high]
    if kernel is not None:
        return Schedule(betas, [kernel] * len(betas))
    # The kernel of the next rung above: its step suits the narrower distribution.
    above = [next(k for k, rung in enumerate(rungs) if rung >= beta) for beta in betas]
    return Schedule(betas, [found[max(k, 1) - 1] for k in above])


def _check(betas: list[float]) -> None:
    rising = all(a < b for a, b in zip(betas[:-1], betas[1:], strict=True))
    if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not rising:
        shown = betas if len(betas) < 6 else [*betas[:2], "...", *betas[-2:]]
        raise ValueError(
            f"inverse_temperatures must rise from 0 to 1, got {shown}. "
            "torch.linspace(0, 1, n).tolist() does."
        )


def _pilot(path: GeometricPath) -> tuple[list[float], list[Kernel]]:
    """A ladder of temperatures, and an adapted kernel for each but the first."""
    state = path.start(_NUM_PARTICLES)
    rungs, kernels, kernel = [0.0], [], HMC(step_size=1.0)
    while rungs[-1] < 1:
        path.require_progress(len(rungs), _MAX_RUNGS)
        beta = next_temperature(state, rungs[-1], 0.5)
        log_weights = state.log_weight(beta - rungs[-1])
        kernel = with_metric(kernel, state.u[None], log_weights[None])
        _, chosen = systematic_resample(log_weights[None], _NUM_PARTICLES)
        path.inverse_temperature = beta
        state, kernel = _move(path, state.select((chosen[0],)), kernel)
        rungs.append(beta)
        kernels.append(kernel)
    return rungs, list(kernels)


def _move(path: GeometricPath, state: PathState, kernel: HMC) -> tuple[PathState, HMC]:
    """Move the particles; the kernel's step size is adapted on the way."""
    one_step = dataclasses.replace(kernel, num_leapfrog=1)
    adaptation = StepSizeAdaptation(
        find_step_size(one_step, path, path.at_temperature(state))
    )
    for _ in range(_NUM_MOVES):
        kernel = with_step_size(kernel, adaptation.step_size)
        state, info = path.step(kernel, state)
        adaptation.update(kernel, info)
    return state, with_step_size(kernel, adaptation.step_size)
