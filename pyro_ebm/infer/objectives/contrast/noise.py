r"""Common parts of the objectives that compare data with noise.

The noise is any normalised distribution that can be sampled and scored: a Pyro
distribution, or a module that returns one when called, as flows do. It must reach
wherever the model may have mass, not the data alone: where no noise falls, nothing
holds the energy.
"""

__all__ = [
    "LearnedLogPartition",
    "Noise",
    "effective_number",
    "noise_of",
    "require_noise",
]

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy
from pyro_ebm.energies.normalization import require_normalized
from pyro_ebm.energies.views.unconstrained import same_support

#: A distribution, a module that returns one, or ``None`` for the base of the model.
Noise = dist.TorchDistribution | torch.distributions.Distribution | nn.Module | None


class LearnedLogPartition(nn.Module):
    r"""A learned :math:`\log Z`, the constant :math:`c` of a contrast or a bound.

    Attributes:
        log_partition: The parameter, a scalar in nats.
        ess: Effective number of the noise points of the last step, as a proposal for
            the model. Close to 1, the noise misses the model; a large one is no proof
            that it does not, for mass that no point has seen does not show.
    """

    is_started: Tensor
    ess: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.log_partition = nn.Parameter(torch.zeros(()))
        self.register_buffer("is_started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("ess", torch.tensor(math.nan))

    @torch.no_grad()
    def observe(self, log_weights: Tensor) -> None:
        r"""Note the ESS; at the first use, begin at the importance-sampling estimate.

        Args:
            log_weights: :math:`-f(y) - \log p_n(y)` at draws of the noise, any shape.
        """
        log_weights = log_weights.flatten()
        self.ess = effective_number(log_weights)
        if not self.is_started:
            estimate = log_weights.logsumexp(0) - math.log(len(log_weights))
            if estimate.isfinite():
                self.log_partition.copy_(estimate)
            self.is_started.logical_not_()


@torch.no_grad()
def effective_number(log_weights: Tensor) -> Tensor:
    """Effective number of draws with these log-weights, shape ``(N,)``."""
    return 1 / log_weights.softmax(0).square().sum()


def noise_of(
    noise: Noise, distribution: EnergyDistribution, name: str = "noise"
) -> Any:
    """The noise as a distribution at its current parameters.

    Args:
        noise: As it was given to the objective.
        distribution: What is learned; its model's base is the default.
        name: Of the argument, for the message.

    Raises:
        ValueError: If nothing was given and there is no base.
    """
    if noise is None:
        if distribution.owner is None:
            raise ValueError(
                f"{name} is None, and the energy has no EnergyModel whose base could "
                f"serve. Give {name}: a distribution somewhat wider than the data."
            )
        return distribution.owner.base
    if isinstance(noise, nn.Module) and not hasattr(noise, "log_prob"):
        return noise()
    return noise


def require_noise(noise: Any, energy: Energy, argument: str = "noise") -> None:
    """Check that a noise distribution fits an energy.

    Args:
        noise: From :func:`noise_of`.
        energy: What is learned.
        argument: What the noise was given as, for the message.

    Raises:
        TypeError: If the noise cannot be sampled or scored.
        ValueError: If it is not one distribution over the same events and support, or
            not normalised.
    """
    kind = type(noise).__name__
    for name in ("sample", "log_prob"):
        if not callable(getattr(noise, name, None)):
            raise TypeError(
                f"{argument} must have sample and log_prob, and {kind} has no {name}. "
                "Take a Pyro distribution, or a flow; a guide must return one."
            )
    require_normalized(noise, argument)
    if noise.batch_shape or noise.event_shape != energy.event_shape:
        raise ValueError(
            f"{argument} must be one distribution with event_shape "
            f"{tuple(energy.event_shape)}, as the energy; got batch_shape "
            f"{tuple(noise.batch_shape)} and event_shape {tuple(noise.event_shape)}. "
            ".to_event(n) makes a batch an event."
        )
    try:
        noise.log_prob(noise.sample((1,)))
    except NotImplementedError:
        raise TypeError(
            f"{argument} must have a log_prob, and that of {kind} is not implemented. "
            "Fit a distribution to its draws."
        ) from None
    support = _support_of(noise)
    if support is not None and not same_support(support, energy.support):
        raise ValueError(
            f"{argument} must have the support of the energy, {energy.support}, got "
            f"{support}. Draws outside of it, or data that the noise cannot give, "
            "tell nothing: choose one on that support."
        )


def _support_of(noise: Any) -> Any:
    try:
        return noise.support
    except NotImplementedError:
        return None
