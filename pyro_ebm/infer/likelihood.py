r"""The held-out log-likelihood of a model, with its error.

.. math::
    \hat\ell = -\frac1n \sum_i f(x^{(i)}) - \log\hat Z, \qquad
    \mathrm{se}^2 = \frac{\mathrm{var}_i f(x^{(i)})}{n} + \mathrm{se}(\log\hat Z)^2
    \tag{1}

after eq. (1.11), a point: the finite test set and :math:`\log Z` each bring an error.
"""

__all__ = [
    "LogLikelihood",
    "likelihood_of",
    "log_likelihood",
    "log_likelihood_difference",
    "mean_and_error",
]

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.core.validation import as_tensor
from pyro_ebm.distributions import EnergyDistribution


class LogLikelihood(NamedTuple):
    r"""Mean log-likelihood of a point, in nats.

    Attributes:
        value: The mean over the points.
        std_error: Standard error of (1), from both sources.
        std_error_data: Its part from the finite number of points.
        std_error_log_partition: Its part from :math:`\log Z`.
        is_normalized: Whether :math:`\log Z` was known, and its verdict good.

    Example:
        >>> energy = pyro_ebm.energies.FunctionEnergy(lambda x: x**4, ())
        >>> q = pyro_ebm.EnergyDistribution(energy)  # log Z unknown
        >>> pyro_ebm.infer.log_likelihood(q, torch.randn(10)).is_normalized
        False
    """

    value: float
    std_error: float
    std_error_data: float
    std_error_log_partition: float
    is_normalized: bool

    def __str__(self) -> str:
        note = "" if self.is_normalized else " [log Z unknown or unreliable]"
        return f"{self.value:.4f} +- {self.std_error:.4f}{note}"


@torch.no_grad()
def log_likelihood(
    distribution: EnergyDistribution, x: Any, weights: Tensor | None = None
) -> LogLikelihood:
    """Mean log-likelihood (1) of points that the model was not fitted to.

    Args:
        distribution: With its log Z, for instance ``model.averaged()``.
        x: Points of shape ``(N, *event)``, at least two: a tensor, an array or a table
            of pandas.
        weights: Of the points in the mean, shape ``(N,)``; default: all equal.

    Returns:
        Nats a point.

    Raises:
        TypeError: If it is given anything but energy distributions.
        ValueError: If there are fewer than two points.

    Exactness: as exact as the log Z of ``distribution``; *unnormalised* if that is
    unknown, and ``is_normalized`` says so.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> q = pyro_ebm.EnergyDistribution(energy)
        >>> print(pyro_ebm.infer.log_likelihood(q, torch.tensor([[-1.0], [1.0]])))
        -1.4189 +- 0.0000
    """
    return likelihood_of(_values(distribution, x), distribution, weights)


def likelihood_of(
    values: Tensor, distribution: EnergyDistribution, weights: Tensor | None = None
) -> LogLikelihood:
    """The mean of log densities of a distribution, shape ``(N,)``, with its error."""
    error = float(distribution.log_partition_std_error)
    return _with_error(values, error, distribution.is_normalized, weights)


@torch.no_grad()
def log_likelihood_difference(
    first: EnergyDistribution,
    second: EnergyDistribution,
    x: Any,
    weights: Tensor | None = None,
) -> LogLikelihood:
    r"""How much better the first model is on held-out points, with the error of that.

    Both are evaluated at the same points, so what makes a point hard for both cancels:
    the difference has a smaller error than the two likelihoods would suggest.

    Args:
        first: With its log Z.
        second: The same, of another model; their errors of log Z are taken for
            independent.
        x: Points of shape ``(N, *event)``, at least two, that neither was fitted to.
        weights: Of the points in the mean, shape ``(N,)``; default: all equal.

    Returns:
        Nats a point, positive where the first model is the better one.

    Raises:
        TypeError: If it is given anything but energy distributions.
        ValueError: If there are fewer than two points.

    Exactness: as :func:`log_likelihood`, of both models.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> q = pyro_ebm.EnergyDistribution(energy)
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> pyro_ebm.infer.log_likelihood_difference(q, q, x).value
        0.0
    """
    return _with_error(
        _values(first, x) - _values(second, x),
        math.hypot(
            float(first.log_partition_std_error), float(second.log_partition_std_error)
        ),
        first.is_normalized and second.is_normalized,
        weights,
    )


def _values(distribution: EnergyDistribution, x: Any) -> Tensor:
    if not isinstance(distribution, EnergyDistribution):
        raise TypeError(
            f"distribution must be an EnergyDistribution, got "
            f"{type(distribution).__name__}. An EnergyModel gives one, "
            "model.averaged(); a distribution of Pyro has log_prob(x).mean()."
        )
    x = as_tensor("x", x, **distribution.energy.tensor_options())
    if x.dim() <= distribution.event_dim or len(x) < 2:
        raise ValueError(
            "x must hold at least two points, shape (N, *event) with event_shape "
            f"{tuple(distribution.event_shape)}; got shape {tuple(x.shape)}."
        )
    return distribution.log_prob(x)


def _with_error(
    values: Tensor,
    error_log_partition: float,
    is_normalized: bool,  # noqa: FBT001
    weights: Tensor | None,
) -> LogLikelihood:
    value, error_data = mean_and_error(values, weights)
    return LogLikelihood(
        value,
        math.hypot(error_data, error_log_partition),
        error_data,
        error_log_partition,
        is_normalized,
    )


def mean_and_error(
    values: Tensor, weights: Tensor | None = None
) -> tuple[float, float]:
    r"""A mean :math:`\bar v = \sum w_i v_i / \sum w_i`, and its standard error.

    Args:
        values: Shape ``(N,)``.
        weights: Shape ``(N,)``; default: all equal. The error is then
            :math:`\sqrt{\sum w_i^2 (v_i - \bar v)^2} / \sum w_i`.

    Example:
        >>> mean_and_error(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]))[0]
        1.5
    """
    if weights is None:
        return values.mean().item(), values.std().item() / math.sqrt(values.numel())
    shares = (weights / weights.sum()).to(values)
    mean = shares @ values
    return mean.item(), (shares @ (shares * (values - mean).square())).sqrt().item()
