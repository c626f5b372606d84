"""Default base distributions, chosen by the support of an energy.

Uniform where the support is bounded by numbers or finite, a standard normal in
unconstrained space everywhere else. It knows nothing of where the energy has its mass:
a base to start from, not one to weigh draws of without a look at the weights.
"""

__all__ = ["default_base", "describe", "reach_of", "standard_base"]

from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.mixed import LatentClasses
from pyro_ebm.core.spaces import MixedSupport, scalar_of
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.corrections import without_independent
from pyro_ebm.energies.discrete.finite import finite_values
from pyro_ebm.energies.discrete.independent import IndependentSites

_UNCONSTRAINED = "standard normal in unconstrained space"


def default_base(energy: Energy) -> dist.TorchDistribution:
    """A normalised distribution on the event and support of an energy.

    Args:
        energy: On a bounded box or a circle (any support with finite ``lower_bound``
            and ``upper_bound``, tensors of the event's shape too), on a finite set, or
            on whatever ``biject_to`` knows.

    Returns:
        Uniform on the box or the finite set; else a standard normal, pushed through
        ``biject_to`` where the support is not all of real space. In the dtype and on
        the device of the energy.

    Raises:
        NotImplementedError: If there is none for the support: it is discrete and not
            the same finite set at each site, or has no bijection from real space.

    Exactness: its ``log_prob`` and ``sample`` are *exact*.

    Example:
        >>> energy = pyro_ebm.energies.FunctionEnergy(
        ...     lambda x: x.log().square(), (), dist.constraints.positive
        ... )
        >>> base = default_base(energy)
        >>> describe(base), bool((base.sample((100,)) > 0).all())
        ('standard normal in unconstrained space', True)
    """
    options = energy.tensor_options()
    if finite_values(energy.support) is not None:
        like = torch.empty(0, **options)
        return IndependentSites.uniform(energy.support, energy.event_shape, like)
    ends = _finite_ends(energy, options)
    if ends is not None:
        box = _UniformOnBox(*ends, energy.support)
        return box.to_event(energy.event_dim)
    try:
        return standard_base(energy)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"there is no default base on the support {energy.support}. Give base=, a "
            f"normalised distribution over events of shape {tuple(energy.event_shape)} "
            "with this support."
        ) from error


def standard_base(energy: Energy) -> dist.TorchDistribution:
    """Standard normal in unconstrained space, on the event and support of an energy.

    Categorical columns of a mixed event are uniform.

    Args:
        energy: On any support that ``biject_to`` knows.

    Raises:
        NotImplementedError: If its support has no bijection from real space.

    Exactness: its ``log_prob`` and ``sample`` are *exact*.
    """
    if isinstance(energy.support, MixedSupport):
        like = torch.empty(0, **energy.tensor_options())
        return LatentClasses.standard(energy.support, like)
    flat, to_support = unconstrained(energy)
    zeros = torch.zeros(flat.event_shape, **energy.tensor_options())
    normal = dist.Normal(zeros, torch.ones_like(zeros)).to_event(zeros.dim())
    if flat is energy:
        return normal
    return _NormalOnSupport(normal, to_support, energy.support)


def describe(base: dist.TorchDistribution) -> str:
    """Describe a base in a few words, for messages and the ``method`` of an estimate.

    Args:
        base: Of :func:`default_base`, or any other distribution, which is named by its
            type.

    Example:
        >>> box = dist.constraints.unit_interval
        >>> describe(default_base(pyro_ebm.energies.FunctionEnergy(abs, (), box)))
        'uniform on the box'
        >>> describe(dist.Gamma(2.0, 1.0))
        'Gamma'
    """
    scalar = without_independent(base)
    if isinstance(scalar, _UniformOnBox):
        return "uniform on the box"
    if isinstance(scalar, IndependentSites) and scalar.is_uniform:
        return "uniform on the finite support"
    if isinstance(scalar, LatentClasses):
        return f"latent classes ({len(scalar.probs)})"
    if isinstance(scalar, _NormalOnSupport):
        return _UNCONSTRAINED
    if type(scalar) is dist.Normal and not scalar.loc.any() and _is_one(scalar.scale):
        return "standard normal"
    return type(scalar).__name__


def reach_of(base: dist.TorchDistribution) -> float:
    """How many times as wide as a default base the modes of an energy may well lie.

    A box is all that there is, and numbers end at some hundred units of a logarithm.

    Args:
        base: Of :func:`default_base`.
    """
    return {"standard normal": 32.0, _UNCONSTRAINED: 4.0}.get(describe(base), 1.0)


def _is_one(scale: Tensor) -> bool:
    return bool((scale == 1).all())


def _finite_ends(
    energy: Energy, options: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Lower and upper ends of a box, each of the event's shape, if it is bounded."""
    scalar: Any = scalar_of(energy.support)
    if not (hasattr(scalar, "lower_bound") and hasattr(scalar, "upper_bound")):
        return None
    if scalar.is_discrete:
        return None
    low, high = (
        torch.as_tensor(end, **options).expand(energy.event_shape)
        for end in (scalar.lower_bound, scalar.upper_bound)
    )
    return (low, high) if bool((high - low).isfinite().all()) else None


@final
class _UniformOnBox(dist.Uniform):
    """Uniform numbers whose support is stated, with the ends as they were given.

    torch would rebuild it from ends that were rounded to the dtype of the draws.
    """

    def __init__(self, low: Tensor, high: Tensor, support: Constraint) -> None:
        self._stated = support
        super().__init__(low, high)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Constraint:
        return scalar_of(self._stated)

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "_UniformOnBox":
        new = self._get_checked_instance(_UniformOnBox, _instance)
        new._stated = self._stated
        return super().expand(torch.Size(batch_shape), _instance=new)


@final
class _NormalOnSupport(dist.TransformedDistribution):
    """A normal that was pushed to a support, which is stated.

    torch reads it off the last transform, and ``biject_to(positive)`` ends in an affine
    one: all real numbers.
    """

    def __init__(
        self,
        normal: dist.TorchDistribution,
        to_support: torch.distributions.Transform,
        support: Constraint,
    ) -> None:
        self._stated = support
        super().__init__(normal, [to_support])

    @property
    def support(self) -> Constraint:
        return self._stated

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "_NormalOnSupport":
        new = self._get_checked_instance(_NormalOnSupport, _instance)
        new._stated = self._stated
        return super().expand(torch.Size(batch_shape), _instance=new)
