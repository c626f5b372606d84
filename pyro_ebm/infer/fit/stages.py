"""Fits in stages, with one objective after the other.

Score matching and noise contrast are quick and see the whole of the data, maximum
likelihood is the most accurate: begin with the one and finish with the other.
"""

__all__ = ["ObjectiveSteps", "Stage", "as_stages", "begin_chains"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pyro
import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution, EnergyModel
from pyro_ebm.energies import unconstrained
from pyro_ebm.infer.fit.optimiser import FitOptim
from pyro_ebm.infer.handler import require_learnable
from pyro_ebm.infer.objectives.objective import (
    Objective,
    as_distribution,
    require_objective,
)
from pyro_ebm.mcmc import IndependentChains


@final
@dataclass(frozen=True)
class Stage:
    """A part of a fit: an objective for a number of parameter steps.

    Args:
        objective: The estimator.
        num_steps: Parameter steps.
        optim: An optimiser of its own, as for :func:`pyro_ebm.fit`; default: that of
            the fit, which goes on with what it has accumulated.

    Raises:
        TypeError: If ``objective`` is none.
        ValueError: If ``num_steps`` is not positive.

    Example:
        >>> energy = pyro_ebm.energies.NeuralEnergy((2,), (16,))
        >>> model = pyro_ebm.EnergyModel(energy)
        >>> stages = [
        ...     Stage(pyro_ebm.infer.DenoisingScoreMatching(0.3), num_steps=10),
        ...     Stage(pyro_ebm.infer.MaximumLikelihood(), num_steps=5),
        ... ]
        >>> data = torch.randn(500, 2)
        >>> pyro_ebm.fit(model, data, stages, progress_bar=False).num_steps
        15
    """

    objective: Objective
    num_steps: int
    optim: Any = None

    def __post_init__(self) -> None:
        require_objective(self.objective)
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")

    @property
    def name(self) -> str:
        """The objective's, for people."""
        return self.objective.name


def as_stages(
    objective: Objective | Sequence[Stage] | str, num_steps: int | None
) -> list[Stage]:
    """Convert the objective of a fit to stages.

    Args:
        objective: One for all steps, or stages.
        num_steps: Of the one objective, default 2,000; stages have their own.

    Raises:
        TypeError: If it is neither.
        ValueError: If there is no stage, or stages and ``num_steps``.
    """
    if isinstance(objective, Objective):
        return [Stage(objective, 2000 if num_steps is None else num_steps)]
    stages = [objective] if isinstance(objective, Stage) else objective
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        require_objective(objective)
    given: Sequence[Any] = stages
    for stage in given:
        if not isinstance(stage, Stage):
            raise TypeError(
                "objective must be an Objective or a list of Stage, got a list with "
                f"{stage!r}. Wrap it: Stage(objective, num_steps)."
            )
    if not stages:
        raise ValueError("objective must hold at least one Stage, got none.")
    if num_steps is not None:
        raise ValueError(
            f"num_steps must be left out with stages, which have their own; got "
            f"{num_steps}."
        )
    return list(given)


def begin_chains(
    energy_model: EnergyModel, objective: Objective, state: nn.Module
) -> None:
    """Start chains for an energy that has been learned without them.

    From the base they would take a while to arrive, and meanwhile push the energy up
    where it is not too low. They start at the walkers that follow log Z, which are
    draws of the averaged model, and move on at fixed parameters.

    Args:
        energy_model: With walkers.
        objective: What begins; not all have chains.
        state: Its.
    """

    def draw(num_draws: int) -> Tensor:
        x = _draws_of_walkers(energy_model, num_draws)
        if x is None:
            sampler = energy_model.sampler or IndependentChains(base=energy_model.base)
            x = sampler.start(energy_model.energy, num_draws)
        return x

    objective.begin(energy_model.energy, draw, state)


class ObjectiveSteps:
    """Parameter steps by an objective, as those of ``ObjectiveLoss``.

    They are those of ``SVI`` on a program with one site, :class:`~pyro_ebm.infer.Learn`
    and an empty guide, but no program is run.

    Args:
        model: What is fitted.
        optim: What moves its parameters and those of the state; one of Pyro's knows
            them by the names that they have in the parameter store.
        objective: The estimator.
        state: Its.
    """

    def __init__(
        self,
        model: EnergyModel,
        optim: FitOptim,
        objective: Objective,
        state: nn.Module,
    ) -> None:
        self.model, self.optim = model, optim
        self.objective, self.state = objective, state
        pyro.module("energy_model", model)
        if any(True for _ in state.parameters()):
            pyro.module("x.objective", state, update_module_params=True)
        learned = {id(p): p for p in (*model.parameters(), *state.parameters())}
        self.parameters = [p for p in learned.values() if p.requires_grad]
        self._is_checked = False

    def step(self, batch: Tensor) -> float:
        """Take a step; return minus the mean log-density of the batch, in nats."""
        distribution = self._distribution()
        if not self._is_checked:
            self._is_checked = True
            require_learnable("x", distribution, [], self.objective)
        self.model.follow()
        with pyro.poutine.block():
            terms = self.objective.surrogate(distribution, self.state)(batch)
        for parameter in self.parameters:
            parameter.grad = None
        (-terms.objective.mean()).backward()
        self.optim(self.parameters)
        return (terms.energy.mean() + distribution.log_partition).item()

    def _distribution(self) -> EnergyDistribution:
        """That of the model; with the tracked log Z where an objective needs none.

        On a finite support a closed form is a sum, which costs more than a step.
        """
        model = self.model
        needs_more = self.objective.needs - {"gradient", "chains"}
        if needs_more or not (model.energy.support.is_discrete):
            return as_distribution(model)
        tracked = model.log_partition.value
        known = tracked.clone() if tracked.isfinite() else None
        sampler = model.sampler or IndependentChains(base=model.base)
        distribution = EnergyDistribution(model.energy, known, sampler=sampler)
        distribution.owner = model
        return distribution


@torch.no_grad()
def _draws_of_walkers(energy_model: EnergyModel, num_draws: int) -> Tensor | None:
    tracker = energy_model.log_partition
    if not tracker.walkers.is_started or not tracker.averaged().is_reliable:
        return None
    walkers = tracker.walkers
    log_weights = walkers.log_weights + walkers.log_offset[:, None]
    weights = log_weights.flatten().softmax(0)
    chosen = torch.multinomial(weights, num_draws, replacement=True)
    _, to_support = unconstrained(energy_model.energy)
    points: Tensor = to_support(walkers.u.flatten(0, 1)[chosen])
    return points
