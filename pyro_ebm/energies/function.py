"""Any callable as an energy."""

__all__ = ["FunctionEnergy"]

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.base import Energy, require_precision
from pyro_ebm.energies.pyro_modules import name_pyro_modules


@final
class FunctionEnergy(Energy):
    """Wrap a callable as an energy.

    A ``nn.Module`` given as ``fn`` becomes a submodule, so its parameters are learned.
    A module that is only reached through a closure is not, and learning warns of it.

    Args:
        fn: Maps ``x`` of shape ``(*batch, *event)`` to energies of shape ``(*batch,)``.
        event_shape: Shape of one point.
        support: See :class:`Energy`.

    Raises:
        TypeError: If ``fn`` cannot be called.
        ValueError: If its parameters are of half precision.

    Example:
        >>> ring = FunctionEnergy(lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,))
        >>> ring(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([0., 8.])
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        event_shape: Sequence[int],
        support: Constraint | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}.")
        super().__init__(event_shape, support)
        self.fn = fn
        name_pyro_modules(self)
        for parameter in self.parameters():
            require_precision(parameter, "the parameters of fn")

    def forward(self, x: Tensor) -> Tensor:
        """Call ``fn`` on ``x`` of shape ``(*batch, *event)``."""
        return self.fn(x)
