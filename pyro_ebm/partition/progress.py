"""A progress bar that counts energy evaluations."""

__all__ = ["WatchedEnergy"]

from typing import final

from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.energies import Energy


@final
class WatchedEnergy(Energy):
    """An energy that moves a progress bar by one for each point evaluated.

    Args:
        energy: What is evaluated.
        total: Evaluations expected.

    Attributes:
        bar: The progress bar; it appears after a second, and is closed by its owner.
    """

    def __init__(self, energy: Energy, total: int) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self.bar = tqdm(total=total, desc="log Z", unit="", unit_scale=True, delay=1)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the energy."""
        value = self.energy(x)
        self.bar.update(value.numel())
        return value

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the energy and its gradient."""
        value, grad = self.energy.value_and_grad(x)
        self.bar.update(value.numel())
        return value, grad
