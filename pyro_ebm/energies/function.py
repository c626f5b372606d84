r"""Any callable, and any Pyro distribution, as an energy.

The energy of a normal distribution has its gradient in closed form:

.. math::
    f(x) = -\log \mathcal{N}(x; \mu, \sigma^2), \qquad
    \nabla f(x) = (x - \mu) / \sigma^2                                      \tag{1}
"""

__all__ = ["DistributionEnergy", "FunctionEnergy", "base_energy"]

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.unconstrained import same_support


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

    The energy is infinite outside the support, whether the distribution validates its
    arguments or not. The distribution stays as it is: its tensors are no parameters and
    not in the ``state_dict``, but ``.to(device_or_dtype)`` moves (a copy of) them.

    Args:
        distribution: Normalised, with an empty ``batch_shape``.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If the distribution has a batch shape.

    Example:
        >>> f = DistributionEnergy(dist.Gamma(3.0, 1.0))
        >>> f(torch.tensor([-1.0, 2.0]))
        tensor([   inf, 1.3069])
    """

    inside: Tensor  # some point of the support

    def __init__(self, distribution: dist.TorchDistribution) -> None:
        require_single(distribution, "distribution")
        super().__init__(distribution.event_shape, distribution.support)
        self.distribution = distribution
        with torch.random.fork_rng(devices=[]):  # building must not move the stream
            self.register_buffer("inside", distribution.sample(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density at ``x`` of shape ``(*batch, *event)``."""
        inside = self.support.check(x)
        event_inside = inside.reshape(inside.shape + (1,) * self.event_dim)
        energy = -self.distribution.log_prob(x.where(event_inside, self.inside.to(x)))
        return energy.where(inside, torch.inf)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The closed form (1) for (independent) normals, else by autograd."""
        normal = self.distribution
        while isinstance(normal, torch.distributions.Independent):
            normal = normal.base_dist
        if not isinstance(normal, torch.distributions.Normal):
            return super().value_and_grad(x)
        self.batch_shape_of(x)
        with torch.no_grad():
            z = (x - normal.loc) / normal.scale
            log_norm = sum_rightmost(normal.scale.log(), self.event_dim)
            log_norm = log_norm + math.log(2 * math.pi) / 2 * self.event_shape.numel()
            value = sum_rightmost(z.square(), self.event_dim) / 2 + log_norm
            return value, z / normal.scale  # (1)

    def closed_form(self) -> ClosedForm:
        """Zero and the distribution itself. Exactness: *exact*."""
        zero = self.distribution.log_prob(self.inside).new_zeros(())
        return ClosedForm(zero, self.distribution)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Energy":  # noqa: FBT001, FBT002
        # nn.Module moves parameters and buffers only; the distribution goes with them.
        super()._apply(fn, recurse)
        self.distribution = _map_tensors(self.distribution, fn)
        return self


def base_energy(
    base: dist.TorchDistribution | None, energy: Energy
) -> DistributionEnergy | None:
    """The normalised base distribution inside an energy, checked against it.

    Args:
        base: A distribution over the energy's event, or ``None``.
        energy: The energy that is to be corrected.

    Raises:
        TypeError: If ``base`` is no distribution.
        ValueError: If its batch shape is not empty, or its event shape or support is
            not that of the energy.
    """
    if base is None:
        return None
    require_single(base, "base")
    if base.event_shape != energy.event_shape:
        raise ValueError(
            f"base must have event_shape {tuple(energy.event_shape)}, that of the "
            f"energy; got {tuple(base.event_shape)}. Expand it: "
            "dist.Normal(0.0, 1.0).expand(event_shape).to_event()."
        )
    wrapped = DistributionEnergy(base)
    if not same_support(wrapped.support, energy.support):
        raise ValueError(
            f"base must have support {energy.support}, that of the energy; got "
            f"{wrapped.support}. Map it to that support with "
            "dist.TransformedDistribution, or add DistributionEnergy(base) to an "
            "energy on its own support."
        )
    return wrapped


def require_single(distribution: dist.TorchDistribution, name: str) -> None:
    """Check that the argument ``name`` is one distribution over one event.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If it has a batch shape.
    """
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"{name} must be a Pyro distribution, got {type(distribution).__name__}."
        )
    if distribution.batch_shape:
        raise ValueError(
            f"{name} must have an empty batch_shape, one distribution over "
            f"one event; got batch_shape {tuple(distribution.batch_shape)}. "
            f"Declare it an event: .to_event({len(distribution.batch_shape)})."
        )


def _map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Copy of a distribution in which ``fn`` is applied to each tensor."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, fn) for item in value)
    if not isinstance(value, Distribution | Transform):
        return value
    if isinstance(value, _InverseTransform):
        return _map_tensors(value.inv, fn).inv
    clone = copy.copy(value)
    for key, part in vars(value).items():
        # A transform and its inverse refer to each other; the latter is made anew.
        vars(clone)[key] = None if key == "_inv" else _map_tensors(part, fn)
    return clone
