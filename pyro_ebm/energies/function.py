r"""Any callable as an energy, of a point alone or of a point in a context.

.. math::
    q(x \mid c) = \exp(-f(x, c)) / Z(c)                                   \tag{1}
"""

__all__ = ["FunctionEnergy", "GivenEnergy"]

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
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
        fn: Maps ``x`` of shape ``(*sample, *batch, *event)`` to energies of shape
            ``(*sample, *batch)``; with a ``context_shape``, ``x`` and a context of
            shape ``(*sample, *batch, *context)``.
        event_shape: Shape of one point.
        support: See :class:`Energy`.
        context_shape: Shape of one context, of which ``fn`` is then a function too. The
            energy is used by :meth:`given`.
        batch_shape: Of what ``fn`` closes over, such as a latent variable in a plate;
            default: ``fn`` is one energy.

    Raises:
        TypeError: If ``fn`` cannot be called.
        ValueError: If its parameters are of half precision.

    Example:
        >>> ring = FunctionEnergy(lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,))
        >>> ring(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([0., 8.])

        Three contexts, and an energy of each:

        >>> f = FunctionEnergy(lambda x, c: (x - c) ** 2, (), context_shape=())
        >>> f.given(torch.tensor([0.0, 1.0, 2.0]))(torch.zeros(3))
        tensor([0., 1., 4.])
    """

    def __init__(
        self,
        fn: Callable[..., Tensor],
        event_shape: Sequence[int],
        support: Constraint | None = None,
        context_shape: Sequence[int] | None = None,
        *,
        batch_shape: Sequence[int] = (),
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {type(fn).__name__}.")
        super().__init__(event_shape, support, batch_shape)
        if context_shape is not None:
            self.context_shape = torch.Size(context_shape)
        self.fn = fn
        name_pyro_modules(self)
        for parameter in self.parameters():
            require_precision(parameter, "the parameters of fn")

    def forward(self, x: Tensor) -> Tensor:
        """Call ``fn`` on ``x`` of shape ``(*sample, *batch, *event)``."""
        if self.context_shape is not None:
            raise ValueError(
                "the energy needs a context of shape (*batch, "
                f"*{tuple(self.context_shape)}): call energy.given(context)(x)."
            )
        return self.fn(x)

    def given(self, context: Tensor) -> "GivenEnergy":
        """See :meth:`Energy.given`."""
        if self.context_shape is None:
            super().given(context)
        return GivenEnergy(self, context)


@final
class GivenEnergy(Energy):
    """The energy (1) at fixed contexts, as a function of ``x``.

    Built by :meth:`FunctionEnergy.given`.

    Args:
        energy: With a ``context_shape``.
        context: Shape ``(*batch, *context)``; stays live.

    Raises:
        ValueError: If the context has another shape.
    """

    context: Tensor

    def __init__(self, energy: FunctionEnergy, context: Tensor) -> None:
        shape: Any = energy.context_shape
        num_dims = context.dim() - len(shape)
        if num_dims < 0 or context.shape[num_dims:] != shape:
            raise ValueError(
                f"context must have shape (*batch, *context) with context_shape "
                f"{tuple(shape)}, got {tuple(context.shape)}."
            )
        contexts = context.shape[:num_dims]
        batch_shape = torch.broadcast_shapes(contexts, energy.batch_shape)
        super().__init__(energy.event_shape, energy.support, batch_shape)
        self.energy = energy
        self.register_buffer("context", context, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*sample, *batch, *event)``."""
        shape: Any = self.energy.context_shape
        batch_shape = self.batch_shape_of(x)
        return self.energy.fn(x, self.context.expand(batch_shape + shape))
