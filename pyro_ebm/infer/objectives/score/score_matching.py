r"""Score matching: fit the gradient of the log-density; log Z drops out.

.. math::
    J        &= \operatorname{tr}\nabla^2 f_\theta(x)
                - \tfrac12 \lVert\nabla f_\theta(x)\rVert^2                 \tag{1} \\
    J_{\text{sliced}} &= \frac1M \sum_{m=1}^{M} v_m^\top \nabla^2 f_\theta(x)\, v_m
                - \tfrac12 \lVert\nabla f_\theta(x)\rVert^2,
                \qquad v_m \in \{-1, 1\}^D                                 \tag{2}

Minus the mean of (1) over the data is, up to a constant, half the mean square distance
between the scores of data and model. On a constrained support both are taken in
unconstrained space, where the data have no boundary: what is matched is the score of
:math:`u = T^{-1}(x)`, with the Jacobian of :math:`T` in its energy.

References:
    Hyvarinen (2005), JMLR 6, 695-709.
    Song, Garg, Shi & Ermon (2019), UAI (2).
"""

__all__ = ["ScoreMatching", "SlicedScoreMatching", "Slopes", "slopes"]

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.infer.objectives.objective import (
    Need,
    Objective,
    Surrogate,
    Terms,
    require_differentiable,
)


class _ByCurvature(Objective):
    """What (1) and (2) have in common: all but the directions of the curvature."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "second derivatives"})

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse discrete supports, warn of kinks; see :meth:`Objective.check`."""
        require_curvature(distribution.energy, x, type(self).__name__)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy = distribution.energy

        def surrogate(x: Tensor) -> Terms:
            found = slopes(energy, x)
            objective = -found.grad.square().sum(-1) / 2
            for curvature in self._curvatures(found):
                objective = objective + curvature
            return Terms(objective, found.energy)

        return surrogate

    @abstractmethod
    def _curvatures(self, found: "Slopes") -> Iterator[Tensor]:
        """Terms whose sum is the trace of the Hessian, or is it in the mean."""


@final
@dataclass(frozen=True)
class ScoreMatching(_ByCurvature):
    r"""Exact score matching (1), by the trace of the Hessian; for few dimensions.

    Raises:
        NotImplementedError: At its first use, if the support is discrete.

    Warns:
        UnreliableWarning: If the energy is piecewise linear in what is learned, as
            networks of ``nn.ReLU`` are: (1) then lacks its first term.

    Exactness: *consistent* for smooth energies. Blind to the relative weight of modes
    far from each other, whose scores do not know it. It leaves no log Z.

    Cost: one gradient and ``D`` products with the Hessian a data point, each about as
    much as two gradients, and the gradient of all that in the parameters.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> ScoreMatching().loss(energy, torch.ones(3, 2)).item()
        -1.0
    """

    def _curvatures(self, found: "Slopes") -> Iterator[Tensor]:
        for axis in torch.eye(found.grad.shape[-1]).to(found.grad):
            yield found.curvature(axis)  # (1)


@final
@dataclass(frozen=True)
class SlicedScoreMatching(_ByCurvature):
    r"""Sliced score matching (2): the curvature in random directions.

    Args:
        num_directions: :math:`M`, directions of random signs a data point.

    Raises:
        ValueError: If ``num_directions`` is not positive.

    Warns:
        UnreliableWarning: See :class:`ScoreMatching`.

    Exactness: *consistent*: (2) is unbiased for (1), and equal to it where the Hessian
    is diagonal; otherwise as :class:`ScoreMatching`. It leaves no log Z.

    Cost: one gradient and ``num_directions`` products with the Hessian a data point,
    each about as much as two gradients, and the gradient of that in the parameters.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> SlicedScoreMatching().loss(energy, torch.ones(3, 2)).item()
        -1.0
    """

    num_directions: int = 1

    def __post_init__(self) -> None:
        if self.num_directions < 1:
            raise ValueError(
                f"num_directions must be at least 1, got {self.num_directions}."
            )

    def _curvatures(self, found: "Slopes") -> Iterator[Tensor]:
        for _ in range(self.num_directions):
            signs = torch.randint_like(found.grad, 2) * 2 - 1
            yield found.curvature(signs) / self.num_directions  # (2)


class Slopes(NamedTuple):
    """An energy in unconstrained space, differentiable once more.

    Attributes:
        u: Points there, shape ``(*batch, *unconstrained_event)``.
        grad: Gradient of the energy there, shape ``(*batch, D)``.
        energy: The energy at the points of the support, shape ``(*batch,)``.
    """

    u: Tensor
    grad: Tensor
    energy: Tensor

    def curvature(self, direction: Tensor) -> Tensor:
        """Second derivative along a direction that broadcasts to ``grad``."""
        zero = torch.zeros_like(self.energy)
        if not self.grad.requires_grad:
            return zero
        (product,) = torch.autograd.grad(
            (self.grad * direction).sum(), self.u, create_graph=True, allow_unused=True
        )
        if product is None:
            return zero
        return (product.reshape(self.grad.shape) * direction).sum(-1)


def slopes(energy: Energy, x: Tensor) -> Slopes:
    """Energy and gradient in unconstrained space.

    Args:
        energy: On any continuous support that ``biject_to`` knows.
        x: Points of the support, shape ``(*batch, *event)``.
    """
    flat, to_support = unconstrained(energy)
    with torch.no_grad():
        u = to_support.inv(x)
    u = u.detach().requires_grad_()
    value = flat(u)
    (grad,) = torch.autograd.grad(value.sum(), u, create_graph=True)
    if flat is not energy:  # its energy has the Jacobian, that of x has not
        value = value + to_support.log_abs_det_jacobian(u, x).detach()
    return Slopes(u, grad.reshape(*value.shape, -1), value)


def require_curvature(energy: Energy, x: Tensor, objective: str) -> None:
    """Refuse energies without a gradient, and warn of those without a curvature.

    Networks of ``nn.ReLU`` have gradients that jump and are constant in between: what
    is learned changes the gradient from point to point, and the Hessian nowhere.

    Args:
        energy: What is learned.
        x: Some points of its support, shape ``(N, *event)``.
        objective: Its name, for the message.
    """
    require_differentiable(energy, x, objective)
    parameters = [p for p in energy.parameters() if p.requires_grad]
    if not parameters:
        return
    found = slopes(energy, x)
    curvature = sum(found.curvature(torch.randn_like(found.grad)) for _ in range(2))
    change = (found.grad - found.grad.roll(1, 0)).square().sum()
    learned = _slope(change, parameters) > 1e-6 * _slope(
        found.grad.square().sum(), parameters
    )
    if learned and not _slope(curvature, parameters) > 0:
        warnings.warn(
            f"{objective} needs the curvature of the energy, and that of "
            f"{type(energy).__name__} does not depend on its parameters: activations "
            "such as nn.ReLU have none. Take smooth ones (nn.SiLU, nn.Softplus), or "
            "DenoisingScoreMatching, which needs gradients only.",
            UnreliableWarning,
            stacklevel=2,
        )


def _slope(value: Any, parameters: list[nn.Parameter]) -> float:
    """The largest derivative of a sum in the parameters."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return 0.0
    grads = torch.autograd.grad(
        value.sum(), parameters, retain_graph=True, allow_unused=True
    )
    found = [grad.abs().max().item() for grad in grads if grad is not None]
    return max(found, default=0.0)
