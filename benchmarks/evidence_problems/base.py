"""The definition of an evidence problem, and densities that several of them share."""

__all__ = ["Builder", "EvidenceProblem", "log_beta", "log_normal", "noise"]

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor


class EvidenceProblem(NamedTuple):
    r"""A target and the :math:`\log Z` that is known of it.

    Attributes:
        name: What it is called in tables.
        target: First argument of :func:`pyro_ebm.partition.estimate`: a Pyro model of
            no arguments, or an :class:`~pyro_ebm.energies.Energy`.
        base: Second argument: a normalised distribution over the same event, or
            ``None`` for a Pyro model, whose prior it is.
        truth: :math:`\log Z` in nats, computed in double precision from the constants
            of the target as its own dtype holds them.
        truth_error: How far off ``truth`` may be, in nats.

    Exactness: ``truth`` is *exact* to within ``truth_error``.
    """

    name: str
    target: Any
    base: dist.TorchDistribution | None
    truth: float
    truth_error: float = 1e-6


#: A function of the dtype of the model and its data that builds the problem.
Builder: TypeAlias = Callable[[torch.dtype], EvidenceProblem]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in double precision, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def log_normal(x: Tensor, loc: Tensor | float, variance: Tensor | float) -> Tensor:
    """Log density of a normal distribution, given its variance."""
    variance = torch.as_tensor(variance, dtype=torch.float64)
    square = (x - loc) ** 2 / variance
    return -(square + variance.log() + math.log(2 * math.pi)) / 2


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    """Logarithm of the beta function, for tensors in double precision."""
    return a.lgamma() + b.lgamma() - (a + b).lgamma()
