r"""An upper bound of the partition function of a product.

For weights that add up to one, Hoelder's inequality gives

.. math::
    Z = \int \prod_k \left(e^{-f_k(x)}\right)^{w_k} dx \le \prod_k Z_k^{w_k},
    \qquad w_k \ge 0,\ \sum_k w_k = 1                                      \tag{1}

with equality if and only if all :math:`e^{-f_k} / Z_k` are the same distribution.
"""

__all__ = ["LogPartitionBound", "hoelder_bound"]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.model import EnergyModel
from pyro_ebm.distributions.terms import Term, number_of


class LogPartitionBound(NamedTuple):
    r"""A bound of :math:`\log Z` in nats.

    Attributes:
        value: The bound.
        std_error: Its standard error; 0 where all :math:`\log Z_k` are exact.

    Exactness: *upper bound*, given exact :math:`\log Z_k`.

    Example:
        >>> experts = [dist.Normal(0.0, 1.0), dist.Normal(2.0, 1.0)]
        >>> product = pyro_ebm.distributions.ProductOfExperts(experts, [0.5, 0.5])
        >>> bound = product.upper_bound()
        >>> bound.std_error, bound.value > product.log_partition.item()
        (0.0, True)
    """

    value: float
    std_error: float


def hoelder_bound(terms: Sequence[Term]) -> LogPartitionBound:
    r"""Evaluate the logarithm of (1).

    Args:
        terms: The factors of a product.

    Returns:
        The bound. Its error is that of estimated :math:`\log Z_k`, taken for
        independent.

    Raises:
        ValueError: If weights are negative or do not add up to one, or the
            :math:`\log Z_k` of an expert is not known.

    Exactness: *upper bound*, given exact :math:`\log Z_k`.
    """
    weights = [number_of(term.weight) for term in terms]
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            "weights must be positive and add up to 1 for Hoelder's bound, got "
            f"{weights}. Estimate log Z: product.estimate_log_partition()."
        )
    known = [_log_partition_of(term) for term in terms]
    return LogPartitionBound(
        sum(w * value for w, (value, _) in zip(weights, known, strict=True)),
        math.hypot(*(w * error for w, (_, error) in zip(weights, known, strict=True))),
    )  # (1)


def _log_partition_of(term: Term) -> tuple[float, float]:
    """Log Z of an expert and its standard error."""
    closed = term.energy.closed_form()
    if closed is not None:
        return number_of(closed.log_partition), 0.0
    expert = term.expert
    if isinstance(expert, EnergyModel):
        with torch.no_grad():
            expert = expert()
    if not isinstance(expert, EnergyDistribution) or not expert.is_normalized:
        raise ValueError(
            "the log Z of every expert must be known for a bound, and that of "
            f"{term.name} is not. Estimate it: EnergyDistribution(energy, "
            "pyro_ebm.partition.estimate(energy, base))."
        )
    error = expert.log_partition_std_error
    return number_of(expert.log_partition), number_of(error)
