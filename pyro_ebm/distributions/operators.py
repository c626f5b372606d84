"""Operators ``*``, ``/`` and ``**`` of distributions and energy models."""

__all__ = ["Factor"]

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor


class Factor:
    """Products, quotients and powers: ``p * q``, ``p / q``, ``p ** beta``.

    The other factor may be an energy, an ``EnergyModel`` or any Pyro distribution, on
    either side. See :class:`~pyro_ebm.distributions.ProductOfExperts`.
    """

    # Filled in by pyro_ebm.distributions.product, whose class is a Factor itself.
    _product: ClassVar[Callable[..., Any]]

    def __mul__(self, other: Any) -> Any:
        """The product."""
        return Factor._product((self, 1.0), (other, 1.0))

    def __rmul__(self, other: Any) -> Any:
        """The product, with a distribution that has no operators on the left."""
        return Factor._product((other, 1.0), (self, 1.0))

    def __truediv__(self, other: Any) -> Any:
        """The quotient."""
        return Factor._product((self, 1.0), (other, -1.0))

    def __rtruediv__(self, other: Any) -> Any:
        """The quotient, with a distribution that has no operators on the left."""
        return Factor._product((other, 1.0), (self, -1.0))

    def __pow__(self, power: float | Tensor) -> Any:
        """The power: tempering, with an inverse temperature."""
        return Factor._product((self, power))
