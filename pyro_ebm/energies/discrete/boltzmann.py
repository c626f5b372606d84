r"""The Boltzmann machine: every two units have a weight.

.. math::
    f(x) = -\sum_{i < j} W_{ij} x_i x_j - \sum_i b_i x_i,
    \qquad x_i \in \{0, 1\} \text{ or } \{-1, 1\}                          \tag{1}

Given the others a unit has the field :math:`b_i + \sum_j W_{ij} x_j`: the logit of its
larger value against its smaller, times their difference.

References:
    Ackley, Hinton & Sejnowski (1985), Cognitive Science 9, 147-169.
"""

__all__ = ["BoltzmannEnergy"]

from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_ebm.energies.base import ClosedForm, live_or_parameter, require_precision
from pyro_ebm.energies.discrete.exact.distribution import ExactClosedForm
from pyro_ebm.energies.discrete.exact.elimination import (
    MAX_COST,
    Factors,
    exact_closed_form,
)
from pyro_ebm.energies.discrete.finite import AnnealingPath, spins
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.energies.graphs.recording import holds

#: Under a name that the argument of the constructor does not hide.
_SPINS = spins


@final
class BoltzmannEnergy(SiteEnergy):
    r"""The energy (1) of units that are all connected.

    For few edges among many units take :meth:`FactorGraphEnergy.ising`. What is above
    the diagonal of the weights counts. Tensors that carry a graph stay live, a
    ``nn.Parameter`` is shared, and any other tensor becomes a parameter.

    Args:
        weight: :math:`W`, shape ``(D, D)``: symmetric with a diagonal of zeros, or its
            upper triangle.
        bias: :math:`b`, shape ``(D,)``; default: zeros.
        spins: Whether the units are -1 and +1; default: 0 and 1.

    Raises:
        ValueError: If a shape does not fit, or the weights have a diagonal or are
            neither symmetric nor triangular.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> BoltzmannEnergy(weight)(torch.ones(2)).item()
        -2.0
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, spins: bool = False
    ) -> None:
        _require_weights(weight)
        size = len(weight)
        bias = weight.new_zeros(size).detach() if bias is None else bias
        if bias.shape != (size,):
            raise ValueError(
                f"bias must have shape {(size,)} to match weight of shape "
                f"{tuple(weight.shape)}, got {tuple(bias.shape)}."
            )
        unit = _SPINS if spins else constraints.boolean
        blocks = torch.eye(size, dtype=torch.bool)
        super().__init__(
            (size,), constraints.independent(unit, 1), blocks, weight.detach()
        )
        live_or_parameter(self, "weight", weight)
        live_or_parameter(self, "bias", bias)

    @property
    def symmetric_weight(self) -> Tensor:
        """The weights, symmetric with a diagonal of zeros, shape ``(D, D)``."""
        upper = self.weight.triu(1)
        return upper + upper.mT

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, D)``."""
        x = x.to(self.weight.dtype)
        return -((x @ self.weight.triu(1)) * x).sum(-1) - x @ self.bias  # (1)

    def site_logits(self, x: Tensor) -> Tensor:
        """Logits of the two values of each unit, shape ``(2, *batch, D)``."""
        field = self.bias + x.to(self.weight.dtype) @ self.symmetric_weight
        return torch.stack([value * field for value in self.values])

    @torch.no_grad()
    def correct(self, base: dist.TorchDistribution, x: Tensor) -> None:
        """Turn the units on as often as the base does, if none has a bias yet."""
        is_free = isinstance(self.bias, nn.Parameter) and not self.bias.any()
        if is_free and isinstance(base, IndependentSites):
            logits = base.log_probs[1] - base.log_probs[0]
            self.bias.copy_(logits / (self.values[1] - self.values[0]))

    def closed_form(self) -> ExactClosedForm | None:
        r""":math:`\log Z` and the distribution of up to about 20 units.

        Exactness: *exact* where it is not ``None``.
        """
        if 2.0 ** len(self.bias) > MAX_COST:  # all are tied together
            return None
        return exact_closed_form(self, self.factors())

    def annealing_path(self, log_probs: Tensor | None = None) -> AnnealingPath:
        """From independent units to this energy: weights are scaled, and biases mixed.

        Args:
            log_probs: Of the values of the units where it begins, such as those of
                data, shape ``(2, D)``. Default: fair units.
        """
        low, high = self.values.tolist()
        start = torch.zeros_like(self.bias.detach())
        if log_probs is not None:
            start = (log_probs[1] - log_probs[0]) / (high - low)
        weight, bias = self.weight.detach(), self.bias.detach()

        def at(beta: float) -> BoltzmannEnergy:
            mixed = torch.lerp(start, bias, beta)
            return BoltzmannEnergy(beta * weight, mixed, spins=low < 0)

        log_z = torch.logaddexp(low * start, high * start).sum()
        log_odds = torch.stack([low * start, high * start])
        base = IndependentSites(self.support, log_odds.log_softmax(0))
        return AnnealingPath(ClosedForm(log_z, base), at, is_linear=True)

    def factors(self) -> Factors:
        """Log potentials of all pairs, and of the units."""
        size = len(self.bias)
        edges = torch.triu_indices(size, size, 1).mT
        both = self.values * self.values[:, None]
        rows, columns = edges.to(self.weight.device).unbind(-1)
        pairs = self.weight[rows, columns][:, None, None] * both
        units = torch.arange(size)[:, None]
        return [(edges, pairs), (units, self.bias[:, None] * self.values)]


def _require_weights(weight: Tensor) -> None:
    if weight.dim() != 2 or not len(weight) or weight.shape[0] != weight.shape[1]:
        raise ValueError(
            "weight must have shape (D, D) for a machine of D units, got "
            f"{tuple(weight.shape)}."
        )
    require_precision(weight, "weight")
    given = weight.detach()
    if not holds(given.diagonal() == 0):
        raise ValueError(
            "weight must have a diagonal of zeros: what a unit has for itself is its "
            f"bias. Got {given.diagonal()}."
        )
    if not holds(given.tril(-1) == 0) and not holds(given.isclose(given.mT)):
        raise ValueError(
            "weight must be symmetric or upper triangular, and differs from its "
            f"transpose by up to {(given - given.mT).abs().max().item():.3g}. Give "
            "(weight + weight.mT) / 2."
        )
