"""A progress bar that counts energy evaluations."""

__all__ = ["WatchedEnergy", "watched"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.energies import Energy


@final
class WatchedEnergy(Energy):
    """An energy that moves a progress bar by one for each point evaluated.

    Args:
        energy: What is evaluated.
        total: Evaluations expected; ``None`` where they are not known before.

    Attributes:
        bar: The progress bar; it appears after a second, and is closed by its owner.
    """

    def __init__(self, energy: Energy, total: int | None) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self.bar = tqdm(total=total, desc="log Z", unit="", unit_scale=True, delay=1)

    def tensor_options(self, like: Tensor | None = None) -> dict[str, Any]:
        """Those of the energy."""
        return self.energy.tensor_options(like)

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


@contextmanager
def watched(
    energy: Energy, total: int | None = None, *, is_shown: bool
) -> Iterator[Energy]:
    """The energy, under a progress bar that is closed in the end.

    Args:
        energy: What is evaluated.
        total: Evaluations expected; default: not known before.
        is_shown: Whether there is a bar at all; if not, the energy stays as it is.
    """
    if not is_shown:
        yield energy
        return
    under_bar = WatchedEnergy(energy, total)
    try:
        yield under_bar
    finally:
        under_bar.bar.close()
