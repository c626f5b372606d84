r"""Independent sites over a finite support, as a Pyro distribution.

.. math::
    p(x) = \prod_i p_i(x_i), \qquad
    p_i(v) = \frac{n_{iv} + 1/2}{n + q_i / 2}                               \tag{1}

with what was counted in data: :math:`n_{iv}` of :math:`n` points have the value
:math:`v` at site :math:`i`, which has :math:`q_i` states.

References:
    Krichevsky & Trofimov (1981), IEEE Trans. Information Theory 27, 199-207.
"""

__all__ = ["IndependentSites", "without_missing"]

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
        return cls(support, without_missing(support, weights))

    @classmethod
    def uniform(
        cls, support: Constraint, event_shape: Sequence[int], like: Tensor | None = None
    ) -> "IndependentSites":
        """All points equally likely.

        Args:
            support: Finite, with as many event dimensions as ``event_shape``.
            event_shape: Shape of one point.
            like: A tensor whose dtype and device the draws have; default: torch's own.

        Raises:
            ValueError: If the support is not finite or has other dimensions.

        Example:
            >>> support = dist.constraints.independent(pyro_ebm.energies.spins, 2)
            >>> uniform = IndependentSites.uniform(support, (8, 8))
            >>> uniform.sample((5,)).shape, uniform.log_prob(torch.ones(8, 8)).item()
            (torch.Size([5, 8, 8]), -44.3614)
        """
        values = finite_values(support)
        if values is None or support.event_dim != len(event_shape):
            raise ValueError(
                f"support must be finite, with event_dim {len(event_shape)} as "
                f"event_shape {tuple(event_shape)} has; got {support} with event_dim "
                f"{support.event_dim}. independent(boolean, n), "
                "independent(integer_interval(a, b), n) and independent(spins, n) are."
            )
        like = torch.empty(0) if like is None else like
        log_probs = like.new_zeros(len(values), *event_shape)
        return cls(support, without_missing(support, log_probs))

    @property
    def is_uniform(self) -> bool:
        """Whether all points are equally likely."""
        log_probs = self.log_probs
        return bool(((log_probs == log_probs[0]) | log_probs.isneginf()).all())

    @property
    def mean(self) -> Tensor:
        """Mean of each site, shape ``(*batch, *event)``."""
        mean = torch.tensordot(self.values, self.log_probs.exp(), 1)
        return mean.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each site, shape ``(*batch, *event)``."""
        square = torch.tensordot(self.values.square(), self.log_probs.exp(), 1)
        return square.expand(self._extended_shape()) - self.mean.square()

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
        # Short of the whole by more than rounding: the last may have no probability.
        below = self.log_probs.detach().exp().cumsum(0)
        noise = torch.rand(shape, dtype=below.dtype, device=below.device)
        noise *= (1 - 4 * torch.finfo(noise.dtype).eps) * below[-1]
        index = torch.zeros(shape, dtype=torch.long, device=below.device)
        for limit in below[:-1]:
            index += noise >= limit
        return self.values[index]

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


def without_missing(support: Constraint, logits: Tensor) -> Tensor:
    """Minus infinity at values that a site does not have.

    Args:
        support: Finite.
        logits: Shape ``(q, *batch, *event)``.
    """
    shape = logits.shape[logits.dim() - support.event_dim :]
    states = num_states(support, shape)
    if states is None:
        return logits
    index = torch.arange(len(logits), device=logits.device)
    index = index.reshape(-1, *(1,) * (logits.dim() - 1))
    return logits.where(index < states.to(logits.device), -torch.inf)
