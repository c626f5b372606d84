r"""Any Pyro distribution as an energy.

Normal distributions have the gradient in closed form: with precision :math:`A`,

.. math::
    f(x) = -\log \mathcal{N}(x; \mu, A^{-1}), \qquad
    \nabla f(x) = A\, (x - \mu)                                            \tag{1}
"""

__all__ = ["DistributionEnergy", "base_energy", "require_single"]

import math
from collections.abc import Callable
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.energies.base import (
    ClosedForm,
    Energy,
    require_no_batch,
    require_precision,
)
from pyro_ebm.energies.corrections import corrected, map_tensors, without_independent
from pyro_ebm.energies.normalization import require_normalized
from pyro_ebm.energies.pyro_model.prior import ModelPrior
from pyro_ebm.energies.views.unconstrained import same_support


@final
class DistributionEnergy(Energy):
    r"""The energy :math:`-\log p(x)` of a Pyro distribution: :math:`\log Z = 0`.

    The energy is infinite outside the support, whether the distribution validates its
    arguments or not. Angles go from :math:`-\pi` to :math:`\pi`, where torch says that
    their support is the real line. The distribution stays as it is: its tensors are no
    parameters and not in the ``state_dict``, but ``.to(device_or_dtype)`` moves (a copy
    of) them.

    Args:
        distribution: Normalised; its ``batch_shape`` is that of the energy.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If the distribution is not normalised.

    Example:
        >>> f = DistributionEnergy(dist.Gamma(3.0, 1.0))
        >>> f(torch.tensor([-1.0, 2.0]))
        tensor([   inf, 1.3069])
    """

    inside: Tensor  # some point of the support, shape (*batch, *event)

    def __init__(self, distribution: dist.TorchDistribution) -> None:
        if not isinstance(distribution, Distribution):
            raise TypeError(
                "distribution must be a Pyro distribution, got "
                f"{type(distribution).__name__}."
            )
        require_normalized(distribution, "distribution")
        distribution = corrected(distribution)
        shapes = distribution.event_shape, distribution.batch_shape
        super().__init__(shapes[0], distribution.support, shapes[1])
        self.distribution = distribution
        with torch.random.fork_rng(devices=[]):  # building must not move the stream
            self.register_buffer("inside", distribution.sample(), persistent=False)
        require_precision(self.inside, "distribution")

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-density at ``x`` of shape ``(*sample, *batch, *event)``."""
        inside = self.support.check(x)
        event_inside = inside.reshape(inside.shape + (1,) * self.event_dim)
        energy = -self.distribution.log_prob(x.where(event_inside, self.inside.to(x)))
        return energy.where(inside, torch.inf)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The closed form (1) for normals, a model's own graph, else by autograd."""
        if isinstance(self.distribution, ModelPrior):
            return self.distribution.energy.value_and_grad(x)
        normal: dist.TorchDistribution = without_independent(self.distribution)
        self.batch_shape_of(x)
        if isinstance(normal, torch.distributions.Normal):
            return self._normal(x, normal.loc, normal.scale)
        if isinstance(normal, torch.distributions.MultivariateNormal) and (
            self.event_dim == 1
        ):
            return self._multivariate_normal(x, normal)
        return super().value_and_grad(x)

    @torch.no_grad()
    def _normal(self, x: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - loc) / scale
        log_scale = scale.log().expand(self.batch_shape + self.event_shape)
        log_norm = sum_rightmost(log_scale, self.event_dim)
        log_norm = log_norm + math.log(2 * math.pi) / 2 * self.event_shape.numel()
        return sum_rightmost(z.square(), self.event_dim) / 2 + log_norm, z / scale

    @torch.no_grad()
    def _multivariate_normal(
        self, x: Tensor, normal: dist.MultivariateNormal
    ) -> tuple[Tensor, Tensor]:
        z = x - normal.loc
        precision = normal.precision_matrix  # torch computes it once
        if precision.dim() == 2:
            grad = z @ precision  # (1)
        else:
            grad = (z.unsqueeze(-2) @ precision).squeeze(-2)
        log_norm = normal.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_norm = log_norm + math.log(2 * math.pi) / 2 * self.event_shape.numel()
        return (z * grad).sum(-1) / 2 + log_norm, grad

    def closed_form(self) -> ClosedForm:
        """Zero and the distribution itself. Exactness: *exact*."""
        zero = self.distribution.log_prob(self.inside).new_zeros(self.batch_shape)
        return ClosedForm(zero, self.distribution)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Energy":  # noqa: FBT001, FBT002
        # nn.Module moves parameters and buffers only; the distribution goes with them.
        super()._apply(fn, recurse)
        self.distribution = map_tensors(self.distribution, fn)
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
        ValueError: If its batch shape is not empty, its event shape or support is not
            that of the energy, or it is not normalised.
    """
    if base is None:
        return None
    require_single(base, "base")
    require_no_batch(energy)
    require_normalized(base, "base")
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
