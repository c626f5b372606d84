r"""Estimating equations of the objectives, and their derivatives.

Every estimator sets the mean of a function of single points to zero,

.. math::
    \frac1n \sum_{i=1}^n \psi(x^{(i)}, \omega_i; \theta) = 0               \tag{1}

with :math:`\psi` the gradient of its objective at a point and :math:`\omega_i` what it
draws besides: noise, directions, perturbations. Its slope and spread,

.. math::
    A = -\mathbb{E}\, \partial_\theta \psi, \qquad
    B_T = \mathrm{Cov}_x\, \mathbb{E}_\omega\, \psi
        + \tfrac1T\, \mathbb{E}_x\, \mathrm{Cov}_\omega\, \psi              \tag{2}

when :math:`\omega` was drawn :math:`T` times, say how far the solution is from what it
tends to. Of contrastive divergence by a reversible kernel, at data that the model fits,
with :math:`\varphi = \partial_\theta f`,

.. math::
    \psi = \varphi(x_k) - \varphi(x), \qquad A = \tfrac12\, \mathrm{Cov}\, \psi
    \tag{3}

because :math:`q_\theta K_\theta^k = q_\theta` for all :math:`\theta`, whose derivative
makes :math:`A` the covariance of :math:`\varphi(x)` less that with
:math:`\varphi(x_k)`.

References:
    van der Vaart (1998), Asymptotic Statistics, chapter 5.
"""

__all__ = ["CHUNK", "Derivatives", "Equation", "derivatives", "objective_equation"]

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.objectives.objective import Objective

#: Points that are differentiated at once.
CHUNK = 4096
#: Times that the objective is evaluated to tell its own noise from that of the data.
_REDRAWS = 8


class Equation(NamedTuple):
    """Equation (1) at the current parameters, in double precision.

    Attributes:
        mean: Its left side, shape ``(P,)``; the noise averaged over.
        curvature: :math:`A` of (2), shape ``(P, P)``.
        spread: :math:`B_T` of (2), shape ``(P, P)``.
        noise: Covariance of the error in ``mean`` from drawing anew, ``(P, P)``.
        scale: What the diagonal of ``curvature`` would be if nothing cancelled,
            ``(P,)``.
        has_effect: Whether anything depends on a parameter, shape ``(P,)``.
        how: How the expectations were found.
        too_noisy: What to say where ``noise`` is more than can be borne.
    """

    mean: Tensor
    curvature: Tensor
    spread: Tensor
    noise: Tensor
    scale: Tensor
    has_effect: Tensor
    how: str
    too_noisy: str

    def where_it_has_effect(self) -> "Equation":
        """The equation of those parameters alone."""
        kept = self.has_effect
        return self._replace(
            mean=self.mean[kept],
            curvature=self.curvature[kept][:, kept],
            spread=self.spread[kept][:, kept],
            noise=self.noise[kept][:, kept],
            scale=self.scale[kept],
            has_effect=kept[kept],
        )


class Derivatives(NamedTuple):
    """Gradients and summed second derivatives in the parameters, in double precision.

    Attributes:
        rows: The gradient of each, shape ``(N, P)``.
        hessian: Second derivatives of their weighted sum, shape ``(P, P)``.
    """

    rows: Tensor
    hessian: Tensor


def derivatives(
    values: Tensor, parameters: Sequence[Tensor], weights: Tensor | None = None
) -> Derivatives:
    """Differentiate each of ``N`` numbers once, and their weighted sum twice.

    The gradient of the weighted sum is linear in the weights, with the gradients of the
    numbers as coefficients: one more backward pass a parameter gives those of all
    numbers, and its second derivatives too.

    Args:
        values: Shape ``(N,)``.
        parameters: With ``P`` entries together.
        weights: Shape ``(N,)``; default: ones.
    """
    count = sum(parameter.numel() for parameter in parameters)
    rows = values.new_zeros(len(values), count, dtype=torch.float64)
    hessian = values.new_zeros(count, count, dtype=torch.float64)
    if not values.requires_grad:
        return Derivatives(rows, hessian)
    weights = torch.ones_like(values) if weights is None else weights.to(values)
    weights = weights.detach().requires_grad_()
    first = torch.autograd.grad(
        values, parameters, weights, create_graph=True, materialize_grads=True
    )
    for index, entry in enumerate(_flat(first)):
        if not entry.requires_grad:
            continue
        column, *second = torch.autograd.grad(
            entry, [weights, *parameters], retain_graph=True, materialize_grads=True
        )
        rows[:, index], hessian[index] = column, _flat(second)
    return Derivatives(rows, hessian)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class _Rows(NamedTuple):
    """Gradients of the objective at all points, averaged over the times it was drawn.

    The sums run over the points; ``single`` is of the squares of single gradients.
    """

    averaged: Tensor
    single: Tensor
    hessian: Tensor


def objective_equation(
    distribution: EnergyDistribution,
    objective: Objective,
    state: nn.Module,
    parameters: Sequence[Tensor],
    x: Tensor,
    num_redraws: float,
) -> Equation:
    """The equation (2), or (3), of an objective that is a mean over the data.

    Args:
        distribution: At the parameters that were found.
        objective: By which.
        state: What it has learned beside the energy; it is changed.
        parameters: What was learned.
        x: Data of shape ``(N, *event)``.
        num_redraws: :math:`T` of (2).
    """
    parts = [
        _rows(distribution, objective, state, parameters, part)
        for part in x.split(CHUNK)
    ]
    rows = torch.cat([part.averaged for part in parts])
    single = torch.stack([part.single for part in parts]).sum(0)
    hessian = torch.stack([part.hessian for part in parts]).sum(0)
    mean = rows.mean(0)
    averaged = torch.atleast_2d(torch.cov(rows.mT))
    all_single = (single / len(x) - mean.outer(mean)) * (len(x) / (len(x) - 1))
    noise = (all_single - averaged) * (_REDRAWS / (_REDRAWS - 1))
    spread = averaged + (1 / num_redraws - 1 / _REDRAWS) * noise  # (2)
    curvature = -hessian / len(x)
    if objective.starts_at_data:
        curvature = all_single / 2  # (3)
    energy = derivatives(distribution.energy(x[:CHUNK]), parameters).rows
    scale = curvature.diagonal().abs().sqrt()
    if "gradient" not in objective.needs:  # it compares values, which may cancel
        scale = torch.maximum(scale, energy.square().mean(0).sqrt())
    return Equation(
        mean,
        curvature,
        _positive(spread, averaged),
        noise * ((1 / _REDRAWS + 1 / num_redraws) / len(x)),
        scale,
        (energy != 0).any(0) | (curvature != 0).any(0),
        f"of {type(objective).__name__}",
        "what the objective draws drowns the data, and whether the parameters are at "
        "the solution cannot be said: take noise that does less",
    )


def _positive(spread: Tensor, like: Tensor) -> Tensor:
    """The nearest covariance, in units of another one's standard deviations."""
    scale = like.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(spread / scale.outer(scale))
    positive = (vectors * values.clamp(min=0.0)) @ vectors.mT
    return positive * scale.outer(scale)


def _rows(
    distribution: EnergyDistribution,
    objective: Objective,
    state: nn.Module,
    parameters: Sequence[Tensor],
    x: Tensor,
) -> _Rows:
    found: list[Derivatives] = []
    for _ in range(_REDRAWS):
        terms: Any = objective.surrogate(distribution, state)(x)
        found.append(derivatives(terms.objective, parameters))
        if len(found) == 2 and torch.equal(found[0].rows, found[1].rows):
            found = found[:1] * _REDRAWS  # it draws nothing
            break
    rows = torch.stack([part.rows for part in found])
    single = torch.einsum("rnp,rnq->pq", rows, rows) / len(found)
    hessian = torch.stack([part.hessian for part in found]).mean(0)
    return _Rows(rows.mean(0), single, hessian)
