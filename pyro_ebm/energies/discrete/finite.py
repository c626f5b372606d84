r"""Supports of finitely many points, and the way there from independent sites.

Over a finite support :math:`\mathcal{X} = V^D`, the same values :math:`V` at each of
:math:`D` sites, the integral of the partition function is a sum,

.. math::
    Z = \sum_{x \in V^D} e^{-f(x)} .
"""

__all__ = ["AnnealingPath", "FiniteUniform", "finite_values", "spins"]

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.base import ClosedForm, Energy


class _Spins(Constraint):
    """Minus one and plus one."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        return value.abs() == 1


#: The support of a spin, -1 and +1.
spins: Constraint = _Spins()


class AnnealingPath(NamedTuple):
    """From independent sites to an energy, without leaving its family.

    So the kernel that knows the blocks of the energy knows those of all temperatures.

    Attributes:
        start: What is known of the energy at the inverse temperature 0.
        at: Maps an inverse temperature in [0, 1] to an energy; 1 is the target.
    """

    start: ClosedForm
    at: Callable[[float], Energy]


def finite_values(support: Constraint) -> tuple[float, ...] | None:
    """The values that each site may take, or ``None`` unless they are finitely many.

    Args:
        support: Of an energy: ``boolean``, ``integer_interval(a, b)``, :data:`spins`,
            or ``independent`` of one of them.

    Example:
        >>> finite_values(dist.constraints.integer_interval(0, 2))
        (0.0, 1.0, 2.0)
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.boolean)):
        return (0.0, 1.0)
    if isinstance(support, _Spins):
        return (-1.0, 1.0)
    if not isinstance(support, constraints.integer_interval):
        return None
    ends = torch.stack(
        torch.broadcast_tensors(
            torch.as_tensor(support.lower_bound), torch.as_tensor(support.upper_bound)
        )
    ).reshape(2, -1)
    if (ends != ends[:, :1]).any():  # sites that differ in their values
        return None
    low, high = (int(end) for end in ends[:, 0])
    return tuple(float(value) for value in range(low, high + 1))


class FiniteUniform(dist.TorchDistribution):
    r"""The uniform distribution over a finite support, :math:`\log Z = D \log |V|`.

    A base for energies over spins, for which Pyro has no distribution.

    Args:
        support: See :func:`finite_values`; with as many event dimensions as
            ``event_shape``.
        event_shape: Shape of one point.
        like: A tensor whose dtype and device the draws have; default: torch's own.

    Raises:
        ValueError: If the support is not finite or has other dimensions.

    Exactness: ``log_prob`` is *exact*.

    Example:
        >>> support = dist.constraints.independent(pyro_ebm.energies.spins, 2)
        >>> uniform = FiniteUniform(support, (8, 8))
        >>> uniform.sample((5,)).shape
        torch.Size([5, 8, 8])
        >>> uniform.log_prob(torch.ones(8, 8)) == -64 * math.log(2)
        tensor(True)
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(
        self,
        support: Constraint,
        event_shape: Sequence[int],
        like: Tensor | None = None,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        values = finite_values(support)
        if values is None or support.event_dim != len(event_shape):
            raise ValueError(
                f"support must be finite, with event_dim {len(event_shape)} as "
                f"event_shape {tuple(event_shape)} has; got {support} with event_dim "
                f"{support.event_dim}. independent(boolean, n), "
                "independent(integer_interval(a, b), n) and independent(spins, n) are."
            )
        like = torch.empty(0) if like is None else like
        self._support = support
        self.values = torch.tensor(values, dtype=like.dtype, device=like.device)
        super().__init__(torch.Size(), torch.Size(event_shape), validate_args)

    @property
    def support(self) -> Constraint:
        """The finite support."""
        return self._support

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "FiniteUniform":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample, *batch, *event)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        index = torch.randint(len(self.values), shape, device=self.values.device)
        return self.values[index]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability in nats, shape ``(*sample, *batch)``; ``-inf`` outside."""
        if self._validate_args:
            self._validate_sample(x)
        log_states = self.event_shape.numel() * math.log(len(self.values))
        log_prob = self.values.new_full((), -log_states)
        batch = torch.Size(x.shape[: x.dim() - len(self.event_shape)])
        shape = torch.broadcast_shapes(batch, self.batch_shape)
        return log_prob.where(self.support.check(x), -torch.inf).expand(shape)
