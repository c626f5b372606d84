"""Marginal distributions of some coordinates of an event, in closed form."""

__all__ = ["marginal"]

from typing import Any

import pyro.distributions as dist
import torch.distributions as torch_dist
from torch import Tensor

from pyro_ebm.energies.corrections import without_independent

#: Families of one number that are built from just their ``arg_constraints``.
_UNIVARIATE = (
    torch_dist.Beta,
    torch_dist.Cauchy,
    torch_dist.Exponential,
    torch_dist.Gamma,
    torch_dist.HalfCauchy,
    torch_dist.HalfNormal,
    torch_dist.Laplace,
    torch_dist.LogNormal,
    torch_dist.Normal,
    torch_dist.StudentT,
    torch_dist.Uniform,
)


def marginal(
    distribution: Any, numbers: Tensor, *, only_independent: bool = False
) -> dist.TorchDistribution | None:
    """The distribution of some coordinates of a normal or of independent ones.

    Args:
        distribution: Over one event.
        numbers: Of the coordinates in the flattened event, shape ``(U,)``.
        only_independent: Whether it is wanted only where the coordinates are
            independent by construction.

    Returns:
        A distribution over vectors of shape ``(U,)``; ``None`` for other families, and
        for a batch of distributions.

    Example:
        >>> whole = dist.Normal(torch.arange(3.0), 1.0).to_event(1)
        >>> marginal(whole, torch.tensor([2])).mean
        tensor([2.])
    """
    if distribution.batch_shape:
        return None
    if isinstance(distribution, torch_dist.MultivariateNormal) and not only_independent:
        covariance = distribution.covariance_matrix[numbers][:, numbers]
        return dist.MultivariateNormal(distribution.loc[numbers], covariance)
    event_shape = distribution.event_shape
    distribution = without_independent(distribution)
    if not isinstance(distribution, _UNIVARIATE):
        return None
    parameters = {
        name: getattr(distribution, name).expand(event_shape).reshape(-1)[numbers]
        for name in distribution.arg_constraints
    }
    family: Any = type(distribution)
    return family(**parameters, validate_args=False).to_event(1)
