"""The contract of whatever draws from an energy."""

__all__ = ["Sampler"]

from typing import Protocol

from torch import Tensor

from pyro_ebm.energies import Energy


class Sampler(Protocol):
    """Draws from ``e^-f``, many at once."""

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Independent draws, shape ``(num_draws, *event)``, without gradient."""

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Cheap points of the support, for callers that throw them away."""
