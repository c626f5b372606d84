r"""Corrections of distributions whose draws or support are not those of their density.

* ``LKJCholesky.sample`` draws from another law than that of ``log_prob`` for three and
  more dimensions. The squared length of row :math:`i` below the diagonal,
  :math:`i = 1, \dots, d - 1`, is

  .. math::
      y_i \sim \mathrm{Beta}\left(\tfrac{i}{2}, \eta + \tfrac{d - 1 - i}{2}\right)
      \tag{1}

  where torch takes :math:`i - \tfrac12` for :math:`\tfrac i2`.
* ``VonMises`` and its like say that their support is the real line, over which their
  density is periodic. It is a circle: here the interval :math:`(-\pi, \pi)`.

References:
    Lewandowski, Kurowicka & Joe (2009), J. Multivariate Analysis 100, 1989-2001.
"""

__all__ = [
    "corrected",
    "map_tensors",
    "parts_of",
    "shared_support",
    "support_of",
    "without_independent",
]

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform

_CIRCLE = constraints.interval(-math.pi, math.pi)
_TORUS = constraints.independent(_CIRCLE, 1)


class _VonMises(dist.VonMises):
    support = _CIRCLE


class _SineBivariateVonMises(dist.SineBivariateVonMises):
    support = _TORUS


class _SineSkewed(dist.SineSkewed):
    support = _TORUS


_CIRCULAR: dict[type, type] = {
    torch.distributions.VonMises: _VonMises,
    dist.VonMises: _VonMises,
    dist.SineBivariateVonMises: _SineBivariateVonMises,
    dist.SineSkewed: _SineSkewed,
}


def corrected(distribution: Any) -> Any:
    """A distribution whose draws and support are those of its density.

    Args:
        distribution: Is given back as it is where nothing is wrong, else a copy; what
            it is made of is corrected too.

    Example:
        >>> corrected(dist.VonMises(0.0, 1.0)).support
        Interval(lower_bound=-3.141592653589793, upper_bound=3.141592653589793)
    """
    parts = {name: corrected(part) for name, part in parts_of(distribution).items()}
    changed = {n: p for n, p in parts.items() if p is not vars(distribution)[n]}
    if isinstance(distribution, torch.distributions.LKJCholesky):
        changed["_beta"] = _row_lengths(distribution)
    circular = _CIRCULAR.get(type(distribution))
    if not changed and circular is None:
        return distribution
    clone = copy.copy(distribution)
    vars(clone).update(changed)
    if circular is not None:
        clone.__class__ = circular
    return clone


def parts_of(distribution: Any) -> dict[str, Distribution]:
    """The distributions that one is directly made of, by their attributes."""
    parts = getattr(distribution, "__dict__", {}).items()
    return {name: part for name, part in parts if isinstance(part, Distribution)}


def _row_lengths(lkj: Any) -> dist.Beta:
    """The distribution (1), by rows; the first row has none."""
    eta = lkj.concentration.unsqueeze(-1)
    row = torch.arange(lkj.dim).to(eta).clamp(min=1)
    return dist.Beta(row / 2, eta + (lkj.dim - 1 - row) / 2, validate_args=False)


def support_of(distribution: Any) -> Constraint:
    """The support of a distribution, a circle where it is one.

    Args:
        distribution: Of torch or Pyro; a mixture has the support of its components.
    """
    return shared_support(corrected(distribution).support)


def shared_support(support: Constraint) -> Constraint:
    """The support that all components of a mixture have, which torch wraps."""
    if isinstance(support, constraints.independent):
        inner = shared_support(support.base_constraint)
        if inner is support.base_constraint:
            return support
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    # The class is newer than the oldest torch supported, hence its name.
    if type(support).__name__ != "MixtureSameFamilyConstraint":
        return support
    wrapped: Any = support
    shared = _of_any_component(wrapped.base_constraint)
    return support if shared is None else shared


def _of_any_component(support: Constraint, num_dims: int = 0) -> Constraint | None:
    """A support without its last batch dimension, or ``None`` where that matters.

    Args:
        support: Of the components of a mixture.
        num_dims: Event dimensions that wrap it.
    """
    if isinstance(support, constraints.independent):
        number = support.reinterpreted_batch_ndims
        inner = _of_any_component(support.base_constraint, num_dims + number)
        return None if inner is None else constraints.independent(inner, number)
    axis = -1 - num_dims
    bounds = {
        name: value
        for name, value in vars(support).items()
        if isinstance(value, Tensor) and value.dim() > num_dims
    }
    firsts = {name: value.select(axis, 0) for name, value in bounds.items()}
    if any((v != firsts[name].unsqueeze(axis)).any() for name, v in bounds.items()):
        return None  # components that differ in their bounds share no support
    clone = copy.copy(support)
    vars(clone).update(firsts)
    return clone


def without_independent(distribution: Any) -> Any:
    """The distribution inside all ``Independent`` wrappers; any other as it is."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Copy of a distribution in which ``fn`` is applied to each tensor."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, fn) for item in value)
    if isinstance(value, nn.Module):  # a flow's
        return copy.deepcopy(value)._apply(fn)
    if not isinstance(value, Distribution | Transform):
        return value
    if isinstance(value, _InverseTransform):
        return map_tensors(value.inv, fn).inv
    clone = copy.copy(value)
    for key, part in vars(value).items():
        # A transform and its inverse refer to each other; the latter is made anew.
        vars(clone)[key] = None if key == "_inv" else map_tensors(part, fn)
    return clone
