"""The contract of whatever draws from an energy."""

__all__ = ["Sampler"]

from typing import Protocol

from torch import Tensor

from pyro_ebm.energies import Energy


class Sampler(Protocol):
    """Draws from ``e^-f``, many at once.

    Example:
        One that knows its energy, for the sake of a test.

        >>> class Exact:
        ...     def __call__(self, energy, num_draws):
        ...         return energy.closed_form().distribution.sample((num_draws,))
        ...
        ...     start = __call__
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> q = pyro_ebm.EnergyDistribution(energy, sampler=Exact())
        >>> q.sample((7,)).shape
        torch.Size([7, 2])
    """

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Independent draws, shape ``(num_draws, *event)``, without gradient."""

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Cheap points of the support, for callers that throw them away."""
