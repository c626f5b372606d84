r"""Draws of gammas, betas and Dirichlets in unconstrained space.

With a small concentration most of their mass lies nearer to an edge of the support than
a floating-point number can: of ``Gamma(0.01, 1.0)`` two fifths are below
:math:`10^{-38}`, and torch gives the smallest number for all of them. Their logarithms
are no trouble. With :math:`g \sim \mathrm{Gamma}(a)`,

.. math::
    \log g = \log g' + \log(U) / a, \qquad g' \sim \mathrm{Gamma}(a + 1)     \tag{1}

the logit of a beta is the difference of two of them, and the stick-breaking coordinates
of a Dirichlet are :math:`\log g_k - \log \sum_{j > k} g_j`, up to a constant.
"""

__all__ = ["edge_draw"]

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent


def edge_draw(distribution: Any) -> Tensor | None:
    """A draw in the unconstrained space of the support, in double precision.

    Args:
        distribution: Of any kind.

    Returns:
        What ``biject_to(distribution.support)`` maps to a draw, or ``None`` where the
        distribution is no gamma, inverse gamma, beta or Dirichlet.
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if isinstance(distribution, torch.distributions.Gamma):
        return _log_gamma(distribution.concentration) - distribution.rate.double().log()
    if isinstance(distribution, torch.distributions.Beta):
        first = _log_gamma(distribution.concentration1)
        return first - _log_gamma(distribution.concentration0)
    if isinstance(distribution, torch.distributions.Dirichlet):
        return _sticks(_log_gamma(distribution.concentration))
    if isinstance(distribution, dist.InverseGamma):
        log_rate = distribution.rate.double().log()
        return log_rate - _log_gamma(distribution.concentration)
    return None


def _log_gamma(concentration: Tensor) -> Tensor:
    a = concentration.double()
    return torch._standard_gamma(a + 1).log() + torch.rand_like(a).log() / a  # (1)


def _sticks(log_g: Tensor) -> Tensor:
    rest = log_g.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    left = torch.arange(log_g.shape[-1] - 1, 0, -1).to(log_g)  # sticks after each
    return log_g[..., :-1] - rest + left.log()
