"""An objective as a loss of plain torch, for loops without Pyro."""

__all__ = ["ObjectiveLoss", "state_for"]

from typing import final

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyModel
from pyro_ebm.energies import Energy
from pyro_ebm.infer.checks import points_of, require_objective
from pyro_ebm.infer.objectives.objective import Objective, as_distribution
from pyro_ebm.mcmc import PersistentChains


@final
class ObjectiveLoss(nn.Module):
    """The mean of an objective over a batch, negated: a module to minimise.

    Its parameters are those of the energy and what the objective learns beside it, such
    as the log Z of noise contrast or a generator; its ``state_dict`` holds chains too.
    Under SVI, :class:`~pyro_ebm.infer.Learn` takes the same steps.

    Args:
        model: What is learned. Of an :class:`~pyro_ebm.EnergyModel`, log Z follows the
            parameters at each call.
        objective: The estimator.

    Raises:
        TypeError: If an argument is of another type.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> loss = ObjectiveLoss(energy, pyro_ebm.infer.MaximumLikelihood())
        >>> optim = torch.optim.Adam(loss.parameters(), lr=1e-2)
        >>> loss(torch.randn(100, 2)).backward()
        >>> optim.step()
    """

    def __init__(self, model: Energy | EnergyModel, objective: Objective) -> None:
        super().__init__()
        if not isinstance(model, Energy | EnergyModel):
            raise TypeError(
                f"model must be an Energy or EnergyModel, got {type(model).__name__}. "
                "Wrap a callable in pyro_ebm.energies.FunctionEnergy."
            )
        require_objective(objective)
        self.model = model
        self.objective = objective
        self.state = state_for(objective, model)
        self._is_checked = False

    def forward(self, x: Tensor) -> Tensor:
        """Minus the mean objective at data ``x`` of shape ``(*batch, *event)``."""
        distribution = as_distribution(self.model)
        if not self._is_checked:
            self._is_checked = True
            with points_of(distribution) as points:
                self.objective.check(distribution, points)
        if distribution.owner is not None and torch.is_grad_enabled():
            distribution.owner.follow()
        return self.objective.loss(distribution, x, self.state)


def state_for(objective: Objective, model: Energy | EnergyModel) -> nn.Module:
    """A state for an objective, where the model's parameters are.

    Args:
        objective: The estimator.
        model: What is learned; an :class:`~pyro_ebm.EnergyModel` keeps its own chains.
    """
    state = objective.make_state()
    if isinstance(state, PersistentChains) and isinstance(model, EnergyModel):
        state = model.chains
    energy = model.energy if isinstance(model, EnergyModel) else model
    return state.to(**energy.tensor_options())
