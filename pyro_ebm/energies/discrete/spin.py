r"""One spin in a field, as a Pyro distribution.

.. math::
    p(s) = e^{h s} / (2 \cosh h), \qquad s \in \{-1, 1\}, \quad
    \mathbb{E}[s] = \tanh h                                                \tag{1}
"""

__all__ = ["Spin", "log_two_cosh"]

from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint, real

from pyro_ebm.energies.discrete.finite import spins


@final
class Spin(dist.TorchDistribution):
    r"""A spin -1 or +1 in a field, eq. (1); a Bernoulli variable by another name.

    Args:
        field: :math:`h` in nats, any shape: that of the batch.

    Exactness: ``log_prob`` is *exact*.

    Example:
        >>> spin = Spin(torch.tensor([0.0, 20.0]))
        >>> spin.mean, spin.log_prob(torch.ones(2))
        (tensor([0., 1.]), tensor([-0.6931,  0.0000]))
    """

    arg_constraints = {"field": real}
    support: Constraint = spins

    def __init__(
        self,
        field: Tensor,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        self.field = field
        super().__init__(field.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean (1), shape of the batch."""
        return self.field.tanh()

    @property
    def variance(self) -> Tensor:
        """One less the squared mean."""
        return 1 - self.mean.square()

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Spin":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        new.field = self.field.expand(torch.Size(batch_shape))
        super(Spin, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample, *batch)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        up = torch.bernoulli((2 * self.field.detach()).sigmoid().expand(shape))
        return 2 * up - 1

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability (1) in nats, shape ``(*sample, *batch)``."""
        if self._validate_args:
            self._validate_sample(x)
        return self.field * x - log_two_cosh(self.field)  # (1)


def log_two_cosh(field: Tensor) -> Tensor:
    """The log partition function of a spin in a field, without overflow."""
    return torch.logaddexp(field, -field)
