r"""Supports of finitely many points, and the way there from independent sites.

Over a finite support :math:`\mathcal{X} = V_1 \times \dots \times V_D` of :math:`D`
sites the integral of the partition function is a sum,

.. math::
    Z = \sum_{x \in \mathcal{X}} e^{-f(x)} .

The sites have the same values :math:`V`, or each its own number of states
:math:`V_i = \{0, \dots, q_i - 1\}`.
"""

__all__ = [
    "AnnealingPath",
    "finite_points",
    "finite_values",
    "num_points",
    "num_states",
    "require_inside",
    "site_states",
    "spins",
]

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import scalar_of
from pyro_ebm.energies.base import ClosedForm, Energy


class _Spins(Constraint):
    """Minus one and plus one."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        return (value == 1) | (value == -1)  # of booleans there is no abs


#: The support of a spin, -1 and +1.
spins: Constraint = _Spins()


class AnnealingPath(NamedTuple):
    """From independent sites to an energy, without leaving its family.

    So the kernel that knows the blocks of the energy knows those of all temperatures.

    Attributes:
        start: What is known of the energy at the inverse temperature 0.
        at: Maps an inverse temperature in [0, 1] to an energy; 1 is the target.
        is_linear: Whether the energy between is known to be the weighted mean of those
            at the two ends, which then are all that has to be evaluated.
    """

    start: ClosedForm
    at: Callable[[float], Energy]
    is_linear: bool = False


def finite_values(support: Constraint) -> tuple[float, ...] | None:
    """The values that a site may take, or ``None`` unless they are finitely many.

    Where the sites have their own numbers of states, those of the largest; which of
    them a site has is what :func:`num_states` tells.

    Args:
        support: Of an energy: ``boolean``, ``integer_interval(a, b)``, :data:`spins`,
            or ``independent`` of one of them. The end ``b`` may be a tensor with one
            number for each site, if all begin at the same ``a``.

    Example:
        >>> finite_values(dist.constraints.integer_interval(0, 2))
        (0.0, 1.0, 2.0)
    """
    support = scalar_of(support)
    if isinstance(support, type(constraints.boolean)):
        return (0.0, 1.0)
    if isinstance(support, _Spins):
        return (-1.0, 1.0)
    if not isinstance(support, constraints.integer_interval):
        return None
    first = torch.as_tensor(support.lower_bound)
    if (first != first.flatten()[0]).any():
        return None
    low = int(first.flatten()[0])
    high = int(torch.as_tensor(support.upper_bound).max())
    return tuple(float(value) for value in range(low, high + 1))


def num_states(support: Constraint, event_shape: Sequence[int]) -> Tensor | None:
    """How many states each site has, where the sites differ in that.

    Args:
        support: Of an energy.
        event_shape: Shape of one point.

    Returns:
        Integers of shape ``event_shape``: site ``i`` has the first so many of
        :func:`finite_values`. ``None`` if all sites have all of them, or the support is
        not finite.

    Example:
        >>> support = dist.constraints.integer_interval(0, torch.tensor([1, 2]))
        >>> num_states(support, (2,))
        tensor([2, 3])
    """
    support = scalar_of(support)
    if finite_values(support) is None:
        return None
    high = torch.as_tensor(getattr(support, "upper_bound", 1))
    if (high == high.flatten()[0]).all():
        return None
    number = high - torch.as_tensor(getattr(support, "lower_bound", 0)) + 1
    return number.long().expand(torch.Size(event_shape))


def num_points(support: Constraint, event_shape: Sequence[int]) -> int | None:
    """How many points a support has, ``None`` if infinitely many.

    Args:
        support: Of an energy.
        event_shape: Shape of one point.
    """
    values = finite_values(support)
    if values is None:
        return None
    number = num_states(support, event_shape)
    if number is None:
        return len(values) ** math.prod(event_shape)
    return math.prod(number.flatten().tolist())


def site_states(support: Constraint, event_shape: Sequence[int]) -> list[int]:
    """How many states each site of an event has, in one list.

    Args:
        support: Of an energy; finite.
        event_shape: Shape of one point.
    """
    number = num_states(support, event_shape)
    if number is not None:
        states: list[int] = number.flatten().tolist()
        return states
    return [len(finite_values(support) or ())] * math.prod(event_shape)


def finite_points(
    support: Constraint, event_shape: Sequence[int], number: Tensor, like: Tensor
) -> Tensor:
    """The points of a finite support that have the given numbers.

    Args:
        support: Of an energy; finite.
        event_shape: Shape of one point.
        number: From 0 to one less than :func:`num_points`, shape ``(N,)``.
        like: A tensor whose dtype and device the points have.

    Returns:
        Shape ``(N, *event)``; the first site changes fastest.

    Example:
        >>> number = torch.arange(4)
        >>> finite_points(pyro_ebm.energies.spins, (), number[:2], torch.empty(0))
        tensor([-1.,  1.])
    """
    values = torch.tensor(finite_values(support), dtype=like.dtype, device=like.device)
    size = math.prod(event_shape)
    own = num_states(support, event_shape)
    states = torch.full((size,), len(values)) if own is None else own.flatten()
    states = states.to(like.device)
    place = torch.cat([states.new_ones(1), states.cumprod(0)])[:size]
    digits = number.to(like.device)[:, None] // place % states
    return values[digits].reshape(-1, *event_shape)


def require_inside(support: Constraint, x: Tensor) -> None:
    """Check that points lie in a support, finite or not.

    Args:
        support: Of an energy or a distribution.
        x: Points of shape ``(*batch, *event)``.

    Raises:
        ValueError: If one does not, or is no number.
    """
    if x.is_floating_point() and torch._is_any_true(x.isnan()):  # vmap has a rule
        raise ValueError(
            f"x must not contain nan, got {int(x.isnan().sum())} nan in {x.numel()} "
            "numbers. Drop the rows, or mask them with poutine.mask after filling them "
            "with any point of the support."
        )
    inside = support.check(x)
    if not torch._is_all_true(inside):
        outside = x[~inside][:1] if inside.dim() else x
        raise ValueError(
            f"x must lie in the support {support}; {int((~inside).sum())} of "
            f"{inside.numel()} points do not, the first is {outside.tolist()}. "
            "Give the energy the support of the data, or transform the data."
        )
