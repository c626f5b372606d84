"""An energy that counts its evaluations."""

__all__ = ["CountingEnergy"]

from typing import Any, final

import torch
from torch import Tensor

from pyro_ebm.energies import ClosedForm, Energy


@final
class CountingEnergy(Energy):
    """An energy that counts the points at which it is evaluated.

    Otherwise it is the energy that it wraps: same values, gradients, closed form and
    ``state_dict``.

    Attributes:
        num_values: Points at which only the energy was evaluated.
        num_gradients: Points through :meth:`value_and_grad`, or through the energy with
            an ``x`` that requires a gradient.

    Args:
        energy: The energy to watch.

    Example:
        >>> f = CountingEnergy(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)))
        >>> _ = f(torch.zeros(5, 2)), f.value_and_grad(torch.zeros(3, 4, 2))
        >>> f.num_values, f.num_gradients
        (5, 12)
    """

    def __init__(self, energy: Energy) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        self.num_values = 0
        self.num_gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the wrapped energy at ``x`` of shape ``(*batch, *event)``."""
        num_points = self.batch_shape_of(x).numel()
        if x.requires_grad and torch.is_grad_enabled():
            self.num_gradients += num_points
        else:
            self.num_values += num_points
        return self.energy(x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the wrapped energy."""
        self.num_gradients += self.batch_shape_of(x).numel()
        return self.energy.value_and_grad(x)

    def closed_form(self) -> ClosedForm | None:
        """That of the wrapped energy. Exactness: *exact* where it is not ``None``."""
        return self.energy.closed_form()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the wrapped energy, without a level of its own."""
        return self.energy.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # The modules below look for their keys under the level that is left out above.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            inner = f"{prefix}energy.{key.removeprefix(prefix)}"
            state_dict[inner] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
