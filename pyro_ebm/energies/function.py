"""Any callable, and any Pyro distribution, as an energy."""

__all__ = ["DistributionEnergy", "FunctionEnergy"]

from collections.abc import Callable, Sequence
from typing import final

import pyro.distributions as dist
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.base import ClosedForm, Energy


@final
class FunctionEnergy(Energy):
    """Wrap a callable as an energy.

    A ``nn.Module`` given as ``fn`` becomes a submodule, so its parameters are learned.
    A module that is only reached through a closure is not, and
    :func:`pyro_ebm.infer.maximum_likelihood` warns about it.

    Args:
        fn: Maps ``x`` of shape ``(*batch, *event)`` to energies of shape ``(*batch,)``.
        event_shape: Shape of one point.
        support: See :class:`Energy`.

    Raises:
        TypeError: If ``fn`` cannot be called.

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

    def forward(self, x: Tensor) -> Tensor:
        """Call ``fn`` on ``x`` of shape ``(*batch, *event)``."""
        return self.fn(x)


@final
class DistributionEnergy(Energy):
    r"""The energy :math:`-\log p(x)` of a Pyro distribution: :math:`\log Z = 0`.

    Args:
        distribution: Normalised, with an empty ``batch_shape``.

    Raises:
        ValueError: If the distribution has a batch shape.
    """

    def __init__(self, distribution: dist.TorchDistribution) -> None:
        if distribution.batch_shape:
            raise ValueError(
                "distribution must have an empty batch_shape, one distribution over "
                f"one event; got batch_shape {tuple(distribution.batch_shape)}. "
                f"Declare it an event: .to_event({len(distribution.batch_shape)})."
            )
        super().__init__(distribution.event_shape, distribution.support)
        self.distribution = distribution

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density at ``x`` of shape ``(*batch, *event)``."""
        return -self.distribution.log_prob(x)

    def closed_form(self) -> ClosedForm:
        """Zero and the distribution itself. Exactness: *exact*."""
        zero = self.distribution.log_prob(self.distribution.sample()).new_zeros(())
        return ClosedForm(zero, self.distribution)
