r"""Energies of parts and of linear maps of an event.

.. math::
    f(x) = \sum_{j=1}^J g(x_{I_j}), \qquad
    \nabla f(x) = \sum_{j=1}^J S_j^\top \nabla g(x_{I_j})                  \tag{1}

with :math:`S_j` the matrix that selects the coordinates :math:`I_j`. Coordinates in no
part stay free: then there is no partition function but in a product with others. Where
parts overlap, the product is a Markov random field. Of a linear map of the event,

.. math::
    f(x) = g(A x + b), \qquad \nabla f(x) = A^\top \nabla g(A x + b)         \tag{2}

with an expert :math:`g` of independent numbers, one for each row of :math:`A`, this is
a product of as many experts, evaluated in one call. Directions that :math:`A` maps to
zero stay free as well.

References:
    Hinton (2002), Neural Computation 14, 1771-1800 (products of experts).
    Roth & Black (2009), International Journal of Computer Vision 82, 205-229 (one
    expert on all overlapping patches of an image).
    Welling, Hinton & Osindero (2003), NeurIPS 15 (products of Student-t experts).
"""

__all__ = ["LinearMapEnergy", "PartEnergy"]

from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import MixedSupport, scalar_of
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
from pyro_ebm.energies.views.unconstrained import is_unconstrained


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
        expert = _as_expert(energy)
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


@final
class LinearMapEnergy(Energy):
    r"""The energy (2): an expert on a linear map of the event.

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
        expert = _as_expert(energy)
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
        """Evaluate (2) at ``x`` of shape ``(*batch, *event)``."""
        return self.energy(self.mapped(x))  # (2)

    @torch.no_grad()
    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map the expert's own gradient back."""
        value, grad = self.energy.value_and_grad(self.mapped(x))
        flat = grad.reshape(*value.shape, self.energy.event_shape.numel())
        return value, (flat @ self._flat_matrix).reshape(x.shape)  # (2)

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


def _as_expert(expert: Any) -> Energy:
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
    scalar = scalar_of(expert.support)
    bounds = (value for value in vars(scalar).values() if isinstance(value, Tensor))
    if scalar.event_dim or hasattr(scalar, "cseq") or any(b.dim() for b in bounds):
        raise ValueError(
            f"support of the whole event must be given, for the expert's, "
            f"{expert.support}, is not the same for each coordinate."
        )
    return constraints.independent(scalar, event_dim)
