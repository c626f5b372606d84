r"""Members of a batch of energies, and the sum of all of them.

.. math::
    f_b(x), \quad b \in B, \qquad f(x_1, \dots, x_{|B|}) = \sum_b f_b(x_b)  \tag{1}

Under the sum the members are independent, so that chains on it draw from all of them at
once.
"""

__all__ = ["JointEnergy", "select"]

from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.function import GivenEnergy


def select(energy: Energy, *index: int) -> Energy:
    """One energy of a batch.

    Its parameters are those of the batch, and live. All members are evaluated for one,
    but of an energy in a batch of contexts.

    Args:
        energy: With a batch shape.
        *index: A number for each dimension of the batch shape.

    Returns:
        An energy without a batch shape.

    Raises:
        IndexError: If there is no such member.

    Example:
        >>> batch = pyro_ebm.energies.QuadraticEnergy(torch.tensor([[0.0], [2.0]]))
        >>> select(batch, 1)(torch.tensor([0.0])).item()
        2.0
    """
    member = _Member(energy, *index)
    if isinstance(energy, GivenEnergy) and not energy.energy.batch_shape:
        return energy.energy.given(energy.context[member.index])  # at no more cost
    return member


@final
class _Member(Energy):
    """One energy of a batch; see :func:`select`."""

    def __init__(self, energy: Energy, *index: int) -> None:
        shape = energy.batch_shape
        if len(index) != len(shape) or not all(
            -size <= i < size for i, size in zip(index, shape, strict=True)
        ):
            raise IndexError(
                f"index must be a number for each dimension of batch_shape "
                f"{tuple(shape)}, got {index}."
            )
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self.index: Any = index

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the member at ``x`` of shape ``(*sample, *event)``."""
        return self.energy(self._expanded(x))[(..., *self.index)]

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The member's value and gradient."""
        value, grad = self.energy.value_and_grad(self._expanded(x).detach())
        events = (slice(None),) * self.event_dim
        return value[(..., *self.index)], grad[(..., *self.index, *events)]

    def closed_form(self) -> ClosedForm | None:
        """The member's, by the batch's where that is of normal distributions."""
        known = self.energy.closed_form()
        if known is None:
            return None
        whole = known.distribution
        log_partition = known.log_partition[self.index]
        if isinstance(whole, torch.distributions.MultivariateNormal):
            loc, scale_tril = whole.loc[self.index], whole.scale_tril[self.index]
            member = dist.MultivariateNormal(
                loc, scale_tril=scale_tril, validate_args=False
            )
            return ClosedForm(log_partition, member)
        return None

    def _expanded(self, x: Tensor) -> Tensor:
        shape = self.batch_shape_of(x)
        ones = (1,) * len(self.index)
        x = x.reshape(shape + ones + self.event_shape)
        return x.expand(shape + self.energy.batch_shape + self.event_shape)


@final
class JointEnergy(Energy):
    """The sum (1), over events of shape ``(*batch, *event)``.

    Args:
        energy: With any batch shape.
        batch_shape: That of the energy, or one that it expands to.
    """

    def __init__(self, energy: Energy, batch_shape: torch.Size) -> None:
        support = constraints.independent(energy.support, len(batch_shape))
        super().__init__(batch_shape + energy.event_shape, support)
        self.energy, self.num_dims = energy, len(batch_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*sample, *batch, *event)``."""
        return sum_rightmost(self.energy(x), self.num_dims)  # (1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the values, and the members' own gradients."""
        value, grad = self.energy.value_and_grad(x)
        return sum_rightmost(value, self.num_dims), grad
