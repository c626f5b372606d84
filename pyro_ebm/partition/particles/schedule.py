r"""A frozen schedule for annealing, from a pilot run that is thrown away.

The pilot moves a few particles along the path by sequential Monte Carlo, placing each
rung of a ladder where the effective fraction of the weights falls to one half, and
adapts step size and metric on each. Rungs are then equally far from each other in what
annealing finds hard, so each is divided into equally many temperatures.

References:
    Del Moral, Doucet & Jasra (2006), JRSS B 68, 411-436.
"""

__all__ = ["Schedule", "plan_schedule"]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pyro_ebm.mcmc import Kernel
from pyro_ebm.mcmc.tempering.path import GeometricPath, require_rising
from pyro_ebm.partition.particles.engine import travel
from pyro_ebm.partition.particles.movers import AdaptiveHMC

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
        require_rising(betas)
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


def _pilot(path: GeometricPath) -> tuple[list[float], list[Kernel]]:
    """A ladder of temperatures, and an adapted kernel for each but the first."""
    move = AdaptiveHMC(path, _NUM_MOVES, keeps_all=False)
    journey = travel(
        path.start(1, _NUM_PARTICLES),
        move,
        num_ancestors=_NUM_PARTICLES,
        max_temperatures=_MAX_RUNGS,
    )
    return journey.inverse_temperatures, list(move.kernels)
