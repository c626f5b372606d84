r"""Energies of a linear map of an event.

.. math::
    f(x) = g(A x + b), \qquad \nabla f(x) = A^\top \nabla g(A x + b)         \tag{1}

With an expert :math:`g` of independent numbers, one for each row of :math:`A`, this is
a product of as many experts, evaluated in one call. Directions that :math:`A` maps to
zero stay free: then there is no partition function but in a product with others.

References:
    Hinton (2002), Neural Computation 14, 1771-1800 (products of experts).
    Welling, Hinton & Osindero (2003), NeurIPS 15 (products of Student-t experts).
"""

__all__ = ["LinearMapEnergy"]

from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.closed_form.gaussian import (
    GaussianForm,
    gaussian_closed_form,
    gaussian_form,
)
from pyro_ebm.energies.views.part import as_expert
from pyro_ebm.energies.views.unconstrained import is_unconstrained


@final
class LinearMapEnergy(Energy):
    r"""The energy (1): an expert on a linear map of the event.

    Args:
        energy: The expert :math:`g` over all real numbers; a Pyro distribution stands
            for minus its log density.
        matrix: :math:`A`, shape ``(*part, *event)`` with the expert's event shape
            ``part``; the rest is the event shape of ``x``. A ``nn.Parameter`` is
            learned.
        offset: :math:`b`, of the expert's event shape; default: none. A
            ``nn.Parameter`` is learned.

    Raises:
        TypeError: If ``energy`` is no energy or distribution.
        ValueError: If the shapes do not fit, or the expert's support is not all real
            numbers.

    Example:
        >>> experts = dist.StudentT(3.0).expand([8]).to_event(1)
        >>> filters = torch.nn.Parameter(torch.randn(8, 5))
        >>> LinearMapEnergy(experts, filters).event_shape
        torch.Size([5])
    """

    matrix: Tensor
    offset: Tensor | None

    def __init__(
        self,
        energy: "Energy | dist.TorchDistribution",
        matrix: Tensor,
        offset: Tensor | None = None,
    ) -> None:
        expert = as_expert(energy)
        part = expert.event_shape
        if matrix.shape[: len(part)] != part or not matrix.isfinite().all():
            raise ValueError(
                f"matrix must be finite and have shape (*part, *event) with the "
                f"expert's event shape {tuple(part)} first; got {tuple(matrix.shape)}."
            )
        if offset is not None and offset.shape != part:
            raise ValueError(
                f"offset must have the expert's event shape {tuple(part)}, got "
                f"{tuple(offset.shape)}."
            )
        if not is_unconstrained(expert.support):
            raise ValueError(
                "energy must be defined for all real numbers to be put on a linear "
                f"map, got the support {expert.support}. Put it on a part of the event "
                "by PartEnergy, or map it to real numbers first."
            )
        super().__init__(matrix.shape[len(part) :], None, expert.batch_shape)
        self.energy = expert
        for name, value in (("matrix", matrix), ("offset", offset)):
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    @property
    def _flat_matrix(self) -> Tensor:
        num_rows = self.energy.event_shape.numel()
        return self.matrix.reshape(num_rows, self.event_shape.numel())

    def mapped(self, x: Tensor) -> Tensor:
        """The map ``A x + b``.

        Args:
            x: Shape ``(*batch, *event)``.

        Returns:
            Shape ``(*batch, *part)``.
        """
        batch_shape = self.batch_shape_of(x)
        flat = x.reshape(*batch_shape, self.event_shape.numel())
        y = (flat @ self._flat_matrix.mT).reshape(batch_shape + self.energy.event_shape)
        return y if self.offset is None else y + self.offset

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, *event)``."""
        return self.energy(self.mapped(x))  # (1)

    @torch.no_grad()
    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map the expert's own gradient back."""
        value, grad = self.energy.value_and_grad(self.mapped(x))
        flat = grad.reshape(*value.shape, self.energy.event_shape.numel())
        return value, (flat @ self._flat_matrix).reshape(x.shape)  # (1)

    def closed_form(self) -> ClosedForm | None:
        """Of a Gaussian expert, if ``A`` leaves no direction free.

        Exactness: *exact* where it is not ``None``.
        """
        return gaussian_closed_form(self)


@gaussian_form.register
def _(energy: LinearMapEnergy) -> GaussianForm | None:
    form = gaussian_form(energy.energy)
    offset = None if energy.offset is None else energy.offset.double().flatten()
    return form and form.pulled_back(energy._flat_matrix.double(), offset)
