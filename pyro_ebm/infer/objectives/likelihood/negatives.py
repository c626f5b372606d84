"""Where an objective pushes the energy up: its negative points, and its noise."""

__all__ = ["negative_points", "noise_in"]

from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import unconstrained
from pyro_ebm.infer.objectives.contrast.flow_contrastive import FlowState
from pyro_ebm.infer.objectives.contrast.noise import noise_of
from pyro_ebm.infer.objectives.likelihood.generator import GeneratorState
from pyro_ebm.infer.objectives.likelihood.tempered import TemperedChains
from pyro_ebm.infer.objectives.objective import Objective
from pyro_ebm.mcmc import PersistentChains


def noise_in(
    objective: Objective, distribution: EnergyDistribution, state: nn.Module
) -> Any | None:
    """The noise or proposal of an objective, as it is now; ``None`` if it has none.

    Args:
        objective: Not a wrapper of another.
        distribution: What is learned; its model's base is the default noise.
        state: Of the objective.
    """
    if "noise" not in objective.needs:
        return None
    if isinstance(state, FlowState):
        return state.flow()
    given = [getattr(objective, name, None) for name in ("noise", "proposal")]
    return noise_of(next((n for n in given if n is not None), None), distribution)


@torch.no_grad()
def negative_points(
    objective: Objective,
    distribution: EnergyDistribution,
    state: nn.Module,
    num_points: int = 256,
) -> Tensor | None:
    """Points of the support, shape ``(N, *event)``, at which the energy is pushed up.

    Args:
        objective: Not a wrapper of another.
        distribution: What is learned.
        state: Of the objective, after a step.
        num_points: How many to draw, of a generator or of noise. Of chains there are as
            many as there are chains.

    Returns:
        ``None`` where the objective has no negatives, or has not taken a step.
    """
    energy = distribution.energy
    if isinstance(state, GeneratorState):
        made: Tensor = state(energy, num_points)
        return made
    if isinstance(state, PersistentChains | TemperedChains):
        if not state.u.numel():
            return None
        _, to_support = unconstrained(energy)
        u = state.u if isinstance(state, PersistentChains) else state.u[:, -1]
        points: Tensor = to_support(u.clone())
        return points
    noise = noise_in(objective, distribution, state)
    if noise is None:
        return None
    drawn: Tensor = noise.sample(torch.Size((num_points,)))
    return drawn.to(**energy.tensor_options(drawn))
