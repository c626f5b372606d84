r"""What objectives that compare data with noise have in common.

The noise is any normalised distribution that can be sampled and scored: a Pyro
distribution, or a module that returns one when called, as flows do.
"""

__all__ = ["LearnedLogPartition", "Noise", "noise_of", "require_noise"]

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy, same_support

#: A distribution, a module that returns one, or ``None`` for the base of the model.
Noise = dist.TorchDistribution | torch.distributions.Distribution | nn.Module | None


class LearnedLogPartition(nn.Module):
    r""":math:`c`, a learned :math:`\log Z`, that a contrast or a bound holds in place.

    Attributes:
        log_partition: The parameter, a scalar in nats.
    """

    is_started: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.log_partition = nn.Parameter(torch.zeros(()))
        self.register_buffer("is_started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def start(self, log_ratios: Tensor) -> None:
        r"""At its first use, begin at the importance-sampling estimate.

        Args:
            log_ratios: :math:`-f(y) - \log p_n(y)` at draws of the noise, any shape.
        """
        if not self.is_started:
            flat = log_ratios.flatten()
            estimate = flat.logsumexp(0) - math.log(len(flat))
            if estimate.isfinite():
                self.log_partition.copy_(estimate)
            self.is_started.logical_not_()


def noise_of(noise: Noise, distribution: EnergyDistribution) -> Any:
    """The noise as a distribution at its current parameters.

    Args:
        noise: As it was given to the objective.
        distribution: What is learned; its model's base is the default.

    Raises:
        ValueError: If nothing was given and there is no base.
    """
    if noise is None:
        if distribution.owner is None:
            raise ValueError(
                "noise is None, and the energy has no EnergyModel whose base could "
                "serve. Give noise: a distribution somewhat wider than the data."
            )
        return distribution.owner.base
    if isinstance(noise, nn.Module) and not hasattr(noise, "log_prob"):
        return noise()
    return noise


def require_noise(noise: Any, energy: Energy) -> None:
    """Check that noise can stand against an energy.

    Args:
        noise: From :func:`noise_of`.
        energy: What is learned.

    Raises:
        TypeError: If the noise cannot be sampled or scored.
        ValueError: If it is not one distribution over the same events and support.
    """
    for name in ("sample", "log_prob"):
        if not callable(getattr(noise, name, None)):
            raise TypeError(
                f"noise must have sample and log_prob, and {type(noise).__name__} has "
                f"no {name}. Take a Pyro distribution, or a flow; a guide must return "
                "one."
            )
    if noise.batch_shape or noise.event_shape != energy.event_shape:
        raise ValueError(
            f"noise must be one distribution with event_shape "
            f"{tuple(energy.event_shape)}, as the energy; got batch_shape "
            f"{tuple(noise.batch_shape)} and event_shape {tuple(noise.event_shape)}. "
            ".to_event(n) makes a batch an event."
        )
    try:
        support = noise.support
    except NotImplementedError:
        return
    if support is not None and not same_support(support, energy.support):
        raise ValueError(
            f"noise must have the support of the energy, {energy.support}, got "
            f"{support}. Draws outside of it, or data that the noise cannot give, "
            "tell nothing: choose noise on that support."
        )
    try:
        noise.log_prob(noise.sample((1,)))
    except NotImplementedError:
        raise TypeError(
            f"noise must have a log_prob, and that of {type(noise).__name__} is not "
            "implemented. Fit a distribution to its draws."
        ) from None
