r"""An energy with a part of its event held fixed.

With the event split into free and observed coordinates, :math:`x = (u, v)`,

.. math::
    f_v(u) = f(u, v), \qquad e^{-f_v(u)} / Z_v = q(u \mid v)                \tag{1}

is the conditional distribution of what is free: only :math:`Z_v = Z\, q(v)` changes.
Where :math:`f` is quadratic with precision :math:`\Lambda` and linear term
:math:`-\eta^\top x`, so is :math:`f_v`, with

.. math::
    \Lambda_v = \Lambda_{uu}, \qquad \eta_v = \eta_u - \Lambda_{uv} v, \qquad
    c_v = c + (\tilde\eta - \tfrac12 \Lambda_{vv} v)^\top v             \tag{2}

and constant :math:`-c_v`; :math:`\tilde\eta` is the observed part of :math:`\eta`, and
:math:`\Lambda_{uu}^{-1}` the Schur complement :math:`\Sigma_{uu} - \Sigma_{uv}
\Sigma_{vv}^{-1} \Sigma_{vu}` of the covariance.
"""

__all__ = ["ClampedEnergy", "Index", "chosen_numbers"]

import math
from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import MixedSupport, scalar_of, support_at
from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.closed_form.gaussian import (
    GaussianForm,
    gaussian_closed_form,
    gaussian_form,
)
from pyro_ebm.energies.closed_form.marginal import marginal
from pyro_ebm.energies.discrete.exact.distribution import (
    ExactClosedForm,
    site_number,
)
from pyro_ebm.energies.discrete.factor_graph import FactorGraphEnergy
from pyro_ebm.energies.discrete.finite import (
    finite_points,
    finite_values,
    num_points,
    num_states,
)

#: What chooses coordinates of an event, as in ``x[index]``.
Index: TypeAlias = (
    "int | slice | EllipsisType | Tensor | tuple[int | slice | EllipsisType, ...]"
)

#: States of the categorical columns of a mixed event that are summed.
_MAX_STATES = 4096


@final
class ClampedEnergy(Energy):
    r"""The energy (1) over the free coordinates, as one vector in the event's order.

    Parameters of the energy stay live.

    Args:
        energy: The energy :math:`f` of the whole event; its support must be the same
            kind of interval, or all real numbers, in each coordinate.
        observed: Pairs of an index and its value, or a mapping. An index is what
            ``x[index]`` takes: a number, a slice, a tuple of these, or a boolean mask;
            or the name of a site of a factor graph.
            The value has the shape of ``x[index]``, or is one number for all of it.
            (Slices are hashable, as keys must be, from Python 3.12 on.)

    Raises:
        TypeError: If ``energy`` is no energy or an index is of another type.
        ValueError: If an index is not in the event, a value has another shape or lies
            outside the support, a coordinate is given twice, or none is left or given.
        NotImplementedError: If the support is infinite and discrete, or ties
            coordinates together.

    Of a mixed event the free coordinates are real, categorical, or again of both kinds.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(3))
        >>> clamped = ClampedEnergy(energy, {1: 2.0})
        >>> clamped(torch.zeros(5, 2))
        tensor([2., 2., 2., 2., 2.], grad_fn=<DivBackward0>)
        >>> clamped.expand_event(torch.tensor([1.0, 3.0]))
        tensor([1., 2., 3.])
    """

    value: Tensor  # of the observed coordinates, shape (V,)
    free: Tensor  # numbers of the free coordinates in the flattened event, shape (U,)
    fixed: Tensor  # those of the observed ones, shape (V,)
    order: Tensor  # of the flattened event in (u, v), shape (U + V,)

    def __init__(
        self,
        energy: Energy,
        observed: "Mapping[Any, Any] | Iterable[tuple[Any, Any]]",
    ) -> None:
        if not isinstance(energy, Energy):
            raise TypeError(
                f"energy must be an Energy, got {type(energy).__name__}. Wrap a "
                "callable in FunctionEnergy, a distribution in DistributionEnergy."
            )
        _require_separable(energy)
        pairs = observed.items() if isinstance(observed, Mapping) else observed
        fixed, value = _flatten_observed(energy, list(pairs))
        is_free = torch.ones(energy.event_shape.numel(), dtype=torch.bool)
        is_free[fixed.cpu()] = False
        free = is_free.nonzero().squeeze(-1).to(fixed.device)
        if not len(free):
            raise ValueError(
                f"observed holds all {len(fixed)} numbers of the event: no coordinate "
                "is left to have a distribution. The density there is log_prob(x)."
            )
        whole = energy.support, energy.event_shape
        _require_inside(support_at(*whole, fixed), value)
        super().__init__((len(free),), support_at(*whole, free), energy.batch_shape)
        self.energy = energy
        self.register_buffer("value", value)
        for name, numbers in (
            ("free", free),
            ("fixed", fixed),
            ("order", torch.cat([free, fixed]).argsort()),
        ):
            self.register_buffer(name, numbers, persistent=False)

    def expand_event(self, u: Tensor) -> Tensor:
        """Put the observed values back.

        Args:
            u: The free coordinates, shape ``(*batch, U)``.

        Returns:
            Whole events, shape ``(*batch, *event)`` of the energy that was clamped.
        """
        batch_shape = self.batch_shape_of(u)
        value = self.value.to(u.dtype).expand(*batch_shape, len(self.fixed))
        flat = torch.cat([u, value], -1).index_select(-1, self.order)
        return flat.reshape(batch_shape + self.energy.event_shape)

    def free_part(self, x: Tensor) -> Tensor:
        """The inverse: ``(*batch, *event)`` to the free coordinates ``(*batch, U)``."""
        batch_shape = self.energy.batch_shape_of(x)
        return x.reshape(*batch_shape, -1).index_select(-1, self.free)

    def forward(self, u: Tensor) -> Tensor:
        """Evaluate (1) at ``u`` of shape ``(*batch, U)``."""
        return self.energy(self.expand_event(u))  # (1)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The energy's own gradient, in the free coordinates."""
        value, grad = self.energy.value_and_grad(self.expand_event(u).detach())
        return value, self.free_part(grad)

    def closed_form(self) -> ClosedForm | None:
        r"""By (2), also of mixtures of Gaussians, and of independent coordinates.

        Of finite sites whose sums can be done, by the same sums over what is free. Of
        categorical columns of a mixed event, given all real ones, by a sum over at most
        4096 states.

        Exactness: *exact* where it is not ``None``.
        """
        whole = self.energy.closed_form()
        if isinstance(whole, ExactClosedForm):
            sites = torch.unravel_index(self.fixed, self.energy.event_shape)
            places = zip(*(axis.tolist() for axis in sites), strict=True)
            states = dict(zip(places, self.value, strict=True))
            return ExactClosedForm.of(whole.distribution.condition(states))
        if whole is not None:
            free, observed = (
                marginal(whole.distribution, numbers, only_independent=True)
                for numbers in (self.free, self.fixed)
            )
            if free is not None and observed is not None:
                log_density = observed.log_prob(self.value)
                return ClosedForm(whole.log_partition + log_density, free)
        if isinstance(self.energy.support, MixedSupport):
            return self._tabulated()
        return gaussian_closed_form(self)

    def _tabulated(self) -> ClosedForm | None:
        """Of the few states that columns of a mixed event have, given the others."""
        number = num_points(self.support, self.event_shape)
        values = finite_values(self.support) or (math.nan,)
        is_spin = values == (-1.0, 1.0)
        if number is None or number > _MAX_STATES or not (is_spin or values[0] == 0):
            return None
        states = num_states(self.support, self.event_shape)
        shape = [len(values)] * len(self.free) if states is None else states.tolist()
        points = torch.arange(number, device=self.value.device)
        points = finite_points(self.support, self.event_shape, points, self.value)
        table = -self(points).reshape(shape[::-1]).permute(*reversed(range(len(shape))))
        sites = tuple(range(len(shape)))
        return FactorGraphEnergy(shape, [(sites, table)], spins=is_spin).closed_form()

    def extra_repr(self) -> str:
        """How much is observed, for ``repr``."""
        return f"observed={len(self.fixed)} of {len(self.order)} numbers"


@gaussian_form.register
def _(energy: ClampedEnergy) -> GaussianForm | None:
    form = gaussian_form(energy.energy)
    if form is None:
        return None
    v, u_rows = energy.value.double(), form.precision[..., energy.free, :]
    v_square = form.precision[..., energy.fixed, :][..., energy.fixed] @ v
    return GaussianForm(
        form.constant + (form.information[..., energy.fixed] - v_square / 2) @ v,
        form.information[..., energy.free] - u_rows[..., energy.fixed] @ v,
        u_rows[..., energy.free],
        form.magnitude[..., energy.free],
    )  # (2)


def _require_separable(energy: Energy) -> None:
    """Refuse a support in which coordinates depend on each other."""
    if isinstance(energy.support, MixedSupport):
        return
    if energy.support.is_discrete and finite_values(energy.support) is None:
        raise NotImplementedError(
            f"energy must have a continuous or finite support to be clamped, got "
            f"{energy.support}. Give it a finite one, such as "
            "independent(integer_interval(a, b), n)."
        )
    scalar = scalar_of(energy.support)
    if scalar.event_dim or hasattr(scalar, "cseq"):
        raise NotImplementedError(
            "energy must have a support that is the same interval in each coordinate, "
            f"or real, to be clamped; {energy.support} is not. Write the energy of the "
            "free coordinates as a FunctionEnergy with their own support."
        )


def _flatten_observed(
    energy: Energy, pairs: list[tuple[Any, Any]]
) -> tuple[Tensor, Tensor]:
    """Numbers of the observed coordinates in the flattened event, and their values."""
    options = energy.tensor_options()
    shape = energy.event_shape
    numbers = torch.arange(shape.numel(), device=options["device"]).reshape(shape)
    fixed, values = [], []
    for index, value in pairs:
        chosen = chosen_numbers(energy, index)
        value = torch.as_tensor(value).to(**options)
        if value.shape not in (chosen.shape, torch.Size()):
            raise ValueError(
                f"the value at index {index} must have shape {tuple(chosen.shape)}, "
                f"that of x[index] for an event of shape {tuple(shape)}, or be one "
                f"number; got shape {tuple(value.shape)}."
            )
        fixed.append(chosen.reshape(-1))
        values.append(value.expand(chosen.shape).reshape(-1))
    if not sum(map(len, fixed)):
        raise ValueError(
            "observed must hold the value of at least one coordinate, got none. "
            "Without any, the conditional distribution is the distribution itself."
        )
    all_fixed = torch.cat(fixed)
    unique, counts = all_fixed.unique(return_counts=True)
    if len(unique) < len(all_fixed):
        twice = tuple((numbers == unique[counts > 1][0]).nonzero()[0].tolist())
        raise ValueError(
            f"observed holds the coordinate {twice} more than once. Leave out one."
        )
    return all_fixed, torch.cat(values)


def chosen_numbers(energy: Energy, index: Any) -> Tensor:
    """Where the coordinates that an index chooses are in the flattened event.

    Args:
        energy: Of the whole event.
        index: As for :class:`ClampedEnergy`.

    Returns:
        Integers, in the shape of ``x[index]``.

    Raises:
        TypeError: If the index is of another type.
        ValueError: If it is not in the event.
    """
    shape, device = energy.event_shape, energy.tensor_options()["device"]
    numbers = torch.arange(shape.numel(), device=device).reshape(shape)
    index = site_number(getattr(energy, "names", None), index)
    if isinstance(index, Tensor):
        if index.dtype != torch.bool or index.shape != numbers.shape:
            raise ValueError(
                f"a mask must be boolean and of the event's shape {tuple(shape)}, got "
                f"dtype {index.dtype} and shape {tuple(index.shape)}."
            )
        return numbers[index.to(numbers.device)]
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | slice | EllipsisType):
            raise TypeError(
                "an index must be a number, a slice, ..., a tuple of these or a "
                f"boolean mask of shape {tuple(shape)}; got {type(part).__name__}."
            )
    try:
        return numbers[index]
    except IndexError as error:
        raise ValueError(
            f"index {index} is not in an event of shape {tuple(shape)}: {error}."
        ) from None


def _require_inside(support: Constraint, value: Tensor) -> None:
    if isinstance(support, MixedSupport):
        inside = support.check_columns(value)
    else:
        support = scalar_of(support)
        inside = support.check(value)
    inside = inside & value.isfinite()
    if not inside.all():
        raise ValueError(
            f"observed values must be finite and lie in the support {support}; "
            f"{int((~inside).sum())} of {len(value)} do not, the first is "
            f"{value[~inside][0].item():.6g}."
        )
