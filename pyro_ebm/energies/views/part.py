r"""Energies of parts of an event.

.. math::
    f(x) = \sum_{j=1}^J g(x_{I_j}), \qquad
    \nabla f(x) = \sum_{j=1}^J S_j^\top \nabla g(x_{I_j})                  \tag{1}

with :math:`S_j` the matrix that selects the coordinates :math:`I_j`. Coordinates in no
part stay free: then there is no partition function but in a product with others. Where
parts overlap, the product is a Markov random field.

References:
    Roth & Black (2009), International Journal of Computer Vision 82, 205-229 (one
    expert on all overlapping patches of an image).
"""

__all__ = ["PartEnergy", "as_expert"]

from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.energies.base import ClosedForm, Energy, require_no_batch
from pyro_ebm.energies.closed_form.gaussian import (
    GaussianForm,
    gaussian_closed_form,
    gaussian_form,
)
from pyro_ebm.energies.discrete.exact.elimination import (
    Factors,
    exact_closed_form,
    factors_of,
)
from pyro_ebm.energies.discrete.finite import finite_values, num_states
from pyro_ebm.energies.distribution import DistributionEnergy, require_single


@final
class PartEnergy(Energy):
    r"""The energy (1): one expert on one or several parts of a larger event.

    All parts are evaluated in one call of the expert.

    Args:
        energy: The expert :math:`g`; a Pyro distribution stands for minus its log
            density, see :class:`DistributionEnergy`.
        event_shape: Shape of the whole event ``x``.
        *indices: Each chooses a part, ``x[index]`` for a single ``x``, of the expert's
            event shape: a number, a slice, a list or tensor of numbers, a tuple of
            these, or a boolean mask.
        support: Of the whole event; default: that of the expert, where it is the same
            for each coordinate.

    Raises:
        TypeError: If ``energy`` is no energy or distribution.
        ValueError: If there is no index, one is not in the event, a part has another
            shape than the expert's event, or the support is not given or contradicts
            the expert's.

    Example:
        >>> pair = pyro_ebm.energies.QuadraticEnergy(
        ...     torch.zeros(2), torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
        ... )
        >>> chain = PartEnergy(pair, (4,), *(slice(i, i + 2) for i in range(3)))
        >>> chain(torch.tensor([1.0, 1.0, 1.0, 0.0])).item()
        3.0
        >>> chain.closed_form().distribution.variance.shape
        torch.Size([4])
    """

    positions: Tensor  # in the flattened event, shape (J, *part)

    def __init__(
        self,
        energy: "Energy | dist.TorchDistribution",
        event_shape: Sequence[int],
        *indices: Any,
        support: Constraint | None = None,
    ) -> None:
        expert = as_expert(energy)
        if isinstance(expert, DistributionEnergy):
            require_single(expert.distribution, "energy")
        require_no_batch(expert)
        shape = torch.Size(event_shape)
        if not indices:
            raise ValueError(
                "indices must name at least one part of the event, got none. For the "
                "whole event take the energy itself."
            )
        numbers = torch.arange(shape.numel()).reshape(shape)
        parts = [_part(numbers, index, expert.event_shape) for index in indices]
        if support is None:
            support = _support_of_each(expert, len(shape))
        super().__init__(shape, support)
        self.energy = expert
        positions = torch.stack(parts).to(expert.tensor_options()["device"])
        self.register_buffer("positions", positions, persistent=False)
        self._require_inside()

    def parts(self, x: Tensor) -> Tensor:
        """Select the parts.

        Args:
            x: Shape ``(*batch, *event)``.

        Returns:
            Shape ``(*batch, J, *part)``.
        """
        batch_shape = self.batch_shape_of(x)
        flat = x.reshape(*batch_shape, self.event_shape.numel())
        chosen = flat.index_select(-1, self.positions.flatten())
        return chosen.reshape(batch_shape + self.positions.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, *event)``."""
        return self.energy(self.parts(x)).sum(-1)  # (1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the expert's own gradients at the parts' places."""
        batch_shape = self.batch_shape_of(x)
        value, part_grad = self.energy.value_and_grad(self.parts(x).detach())
        grad = part_grad.new_zeros(*batch_shape, self.event_shape.numel())
        flat = part_grad.reshape(*batch_shape, self.positions.numel())
        grad.index_add_(-1, self.positions.flatten(), flat)  # (1)
        return value.sum(-1), grad.reshape(x.shape)

    def closed_form(self) -> ClosedForm | None:
        """Of a Gaussian expert whose parts confine the whole event.

        And of finite sites, where the sums over all of them can be done.

        Exactness: *exact* where it is not ``None``.
        """
        factors = self.factors()
        if factors is not None:
            return exact_closed_form(self, factors)
        return gaussian_closed_form(self)

    def factors(self) -> Factors | None:
        """The log potentials of the expert at all parts, where it has any.

        Returns:
            ``None`` where it has not, or sites differ in their states; see
            :meth:`~pyro_ebm.energies.discrete.sites.SiteEnergy.factors`.
        """
        spaces = [(e.support, e.event_shape) for e in (self, self.energy)]
        values = {finite_values(support) for support, _ in spaces}
        has_own = any(num_states(*space) is not None for space in spaces)
        if len(values) > 1 or None in values or has_own:
            return None
        found = factors_of(self.energy)
        if found is None:
            return None
        positions = self.positions.cpu().reshape(len(self.positions), -1)
        return [
            (
                positions[:, sites.cpu()].flatten(0, 1),
                table if len(table) == 1 else torch.cat([table] * len(positions)),
            )
            for sites, table in found
        ]

    def _require_inside(self) -> None:
        """Refuse a support of the whole that is larger than the expert's at a part."""
        support, options = self.support, self.energy.tensor_options()
        if isinstance(support, MixedSupport):
            transform = support.bijection()
            points = support.two_points(torch.empty(0, **options))
        elif support.is_discrete:
            return
        else:
            transform = biject_to(support)
            shape = transform.inverse_shape(self.event_shape)
            points = torch.stack([torch.full(shape, v, **options) for v in (-1.0, 1.0)])
        for x in transform(points):
            if not self.energy.support.check(self.parts(x)).all():
                raise ValueError(
                    "support must lie within that of the expert at each part, "
                    f"{self.energy.support}; {self.support} does not. Where it differs "
                    "along a vector, write constraints.cat of independent(support, 1), "
                    "with dim=-1 and the lengths."
                )

    def extra_repr(self) -> str:
        """Number of parts and shape of the whole, for ``repr``."""
        shape = tuple(self.event_shape)
        return f"{len(self.positions)} parts of event_shape {shape}"


@gaussian_form.register
def _(energy: PartEnergy) -> GaussianForm | None:
    form = gaussian_form(energy.energy)
    dim = energy.event_shape.numel()
    positions = energy.positions.reshape(len(energy.positions), -1)
    if form is None or not form.is_mixture:
        return form and form.scattered(positions, dim)
    whole: GaussianForm | None = None
    for row in positions:
        factor = form.scattered(row[None], dim)
        whole = factor if whole is None or factor is None else whole.times(factor)
        if whole is None:
            return None
    return whole


def as_expert(expert: Any) -> Energy:
    """The expert as an energy; of a Pyro distribution minus its log density.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(expert, Energy):
        return expert
    if not isinstance(expert, Distribution) or hasattr(expert, "energy"):
        raise TypeError(
            "energy must be an Energy or a Pyro distribution, got "
            f"{type(expert).__name__}. Of an EnergyDistribution or EnergyModel, give "
            "its .energy."
        )
    distribution: Any = expert
    return DistributionEnergy(distribution)


def _part(numbers: Tensor, index: Any, part_shape: torch.Size) -> Tensor:
    """The positions that an index chooses, in the shape of the expert's event."""
    try:
        chosen = numbers[index]
    except IndexError as error:
        raise ValueError(
            f"index {index} is not in an event of shape {tuple(numbers.shape)}: "
            f"{error}."
        ) from None
    if chosen.shape != part_shape:
        raise ValueError(
            f"index {index} must choose a part of the expert's event shape "
            f"{tuple(part_shape)} from an event of shape {tuple(numbers.shape)}, got "
            f"shape {tuple(chosen.shape)}."
        )
    return chosen


def _support_of_each(expert: Energy, event_dim: int) -> Constraint:
    """The support of a whole event whose coordinates are like those of the expert."""
    scalar = expert.support
    while isinstance(scalar, constraints.independent):
        scalar = scalar.base_constraint
    bounds = (value for value in vars(scalar).values() if isinstance(value, Tensor))
    if scalar.event_dim or hasattr(scalar, "cseq") or any(b.dim() for b in bounds):
        raise ValueError(
            f"support of the whole event must be given, for the expert's, "
            f"{expert.support}, is not the same for each coordinate."
        )
    return constraints.independent(scalar, event_dim)
