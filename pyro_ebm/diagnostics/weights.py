r"""Mean and effective sample size of importance weights.

.. math::
    \mathrm{ESS} = \frac{(\sum_i w_i)^2}{\sum_i w_i^2}                      \tag{1}

References:
    Kong (1992), A note on importance sampling using standardized weights.
"""

__all__ = ["effective_sample_fraction", "log_mean_exp"]

import math

import torch
from torch import Tensor


def log_mean_exp(log_weights: Tensor, dim: int = -1) -> Tensor:
    """Logarithm of the mean weight along ``dim``.

    Args:
        log_weights: Shape ``(*, D, *)``; ``-inf`` is a weight of zero.
        dim: The axis that is averaged over.

    Returns:
        In nats, shape of ``log_weights`` without ``dim``; ``-inf`` where no weight is
        positive.

    Example:
        >>> log_mean_exp(torch.zeros(4)).item()
        0.0
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0])).item()  # without overflow
        1000.0
    """
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])


def effective_sample_fraction(log_weights: Tensor, dim: int = -1) -> Tensor:
    """Effective sample size (1) as a fraction of the number of weights.

    Args:
        log_weights: Shape ``(*, D, *)``; ``-inf`` is a weight of zero.
        dim: The axis of the samples.

    Returns:
        Shape of ``log_weights`` without ``dim``, in ``[1/D, 1]``, and 0 where no weight
        is positive or one is not a number.

    Example:
        >>> effective_sample_fraction(torch.zeros(4)).item()
        1.0
        >>> effective_sample_fraction(torch.tensor([0.0, -torch.inf])).item()
        0.5
    """
    log_sum = torch.logsumexp(log_weights, dim)
    log_ess = 2 * log_sum - torch.logsumexp(2 * log_weights, dim)  # (1)
    return (log_ess.exp() / log_weights.shape[dim]).nan_to_num(0.0)
