r"""Independent sites over a finite support, as a Pyro distribution.

.. math::
    p(x) = \prod_i p_i(x_i), \qquad
    p_i(v) = \frac{n_{iv} + 1/2}{n + q_i / 2}                               \tag{1}

with what was counted in data: :math:`n_{iv}` of :math:`n` points have the value
:math:`v` at site :math:`i`, which has :math:`q_i` states.

References:
    Krichevsky & Trofimov (1981), IEEE Trans. Information Theory 27, 199-207.
"""

__all__ = ["IndependentSites"]

from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.discrete.finite import finite_values, num_states


@final
class IndependentSites(dist.TorchDistribution):
    """Sites that are independent, each with probabilities of its own.

    The base of a fit over a finite support, and for energies over spins, for which Pyro
    has no distribution.

    Args:
        support: Finite, with as many event dimensions as the event.
        log_probs: Of each value at each site, up to a constant of the site, in the
            order of increasing values; shape ``(q, *event)``.

    Raises:
        ValueError: If the support is not finite or the shape does not fit.

    Exactness: ``log_prob`` is *exact*.

    Example:
        >>> spins = dist.constraints.independent(pyro_ebm.energies.spins, 1)
        >>> sites = IndependentSites(
        ...     spins, torch.tensor([[0.9, 0.5], [0.1, 0.5]]).log()
        ... )
        >>> sites.log_prob(torch.tensor([-1.0, 1.0])).exp()
        tensor(0.4500)
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(
        self,
        support: Constraint,
        log_probs: Tensor,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        values = finite_values(support)
        if values is None or log_probs.shape[:1] != (len(values),):
            raise ValueError(
                "support must be finite and log_probs have a row for each of its "
                f"values; got {support} with the values {values} and log_probs of "
                f"shape {tuple(log_probs.shape)}."
            )
        if support.event_dim != log_probs.dim() - 1:
            raise ValueError(
                f"log_probs must have shape (q, *event) with {support.event_dim} event "
                f"dimensions, those of {support}; got {tuple(log_probs.shape)}."
            )
        self._support = support
        self.log_probs = log_probs.log_softmax(0)
        self.values = torch.tensor(values).to(log_probs)
        event_shape = log_probs.shape[1:]
        super().__init__(torch.Size(), event_shape, validate_args=validate_args)

    @classmethod
    def fitted(cls, support: Constraint, data: Tensor) -> "IndependentSites":
        """The marginals (1) of data.

        Args:
            support: Finite; all data must be in it.
            data: Shape ``(N, *event)``, floating-point.
        """
        values = finite_values(support) or ()
        counts = torch.stack([(data == value).to(data).sum(0) for value in values])
        weights = (counts + 0.5).log()  # (1)
        states = num_states(support, data.shape[1:])
        if states is not None:
            index = torch.arange(len(values), device=data.device)
            index = index.reshape(-1, *(1,) * states.dim())
            weights = weights.where(index < states.to(data.device), -torch.inf)
        return cls(support, weights)

    @property
    def support(self) -> Constraint:
        """The finite support."""
        return self._support

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "IndependentSites":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample, *batch, *event)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        log_probs = self.log_probs.detach().movedim(0, -1)
        sites = torch.distributions.Categorical(logits=log_probs, validate_args=False)
        batch = shape[: len(shape) - len(self.event_shape)]
        return self.values[sites.sample(batch)]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability in nats, shape ``(*sample, *batch)``; ``-inf`` outside."""
        if self._validate_args:
            self._validate_sample(x)
        found = torch.full_like(x, -torch.inf)
        for value, log_prob in zip(self.values, self.log_probs, strict=True):
            found = torch.where(x == value, log_prob, found)
        log_prob = sum_rightmost(found, len(self.event_shape))
        shape = torch.broadcast_shapes(log_prob.shape, self.batch_shape)
        return log_prob.expand(shape)
