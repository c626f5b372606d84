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

Maximum likelihood, however its second term is found, solves

.. math::
    \psi = \mathbb{E}_q \varphi - \varphi(x), \qquad
    A = \mathrm{Cov}_q\, \varphi + \mathbb{E}_x \partial_\theta^2 f
        - \mathbb{E}_q \partial_\theta^2 f                                  \tag{4}

of eq. (1.16) and its derivative. An estimate of the second term by draws adds its own
covariance to the spread of :math:`\psi`.

References:
    van der Vaart (1998), Asymptotic Statistics, chapter 5.
"""

__all__ = ["Equation"]

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.finite import num_points
from pyro_ebm.infer.objectives.likelihood.exact_likelihood import (
    ExactMaximumLikelihood,
)
from pyro_ebm.infer.objectives.objective import Objective

#: Points that are differentiated at once.
_CHUNK = 4096
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

    @classmethod
    def of_likelihood(
        cls,
        distribution: EnergyDistribution,
        objective: Objective,
        parameters: Sequence[Tensor],
        x: Tensor,
        draws: Tensor | None,
        covariance: str,
        num_redraws: float,
    ) -> "Equation":
        """The equation (4) that all estimators of the likelihood solve.

        Args:
            distribution: At the parameters that were found.
            objective: By which; it says what its draws add to the spread.
            parameters: What was learned.
            x: Data of shape ``(N, *event)``.
            draws: Of the model, shape ``(C, *event)``. Default: a sum over all of its
                space where that is possible, else draws by its sampler.
            covariance: ``"information"`` puts :math:`A` for the spread over the data.
            num_redraws: How often the second term was drawn.
        """
        energy = distribution.energy
        data = _moments(energy, parameters, x, _equal_weights(x))
        points = _model_points(distribution, x, draws)
        model = _moments(points.energy, parameters, points.x, points.weights)
        curvature = model.covariance + data.hessian - model.hessian  # (4)
        spread = data.covariance * (len(x) / (len(x) - 1))
        if covariance == "information":
            spread = curvature
        if math.isfinite(num_redraws):

            def rows_of(values: Tensor) -> Tensor:
                return _derivatives(values, parameters).rows

            second_term = objective.second_term_covariance(
                distribution, rows_of, model.covariance
            )
            spread = spread + second_term * (len(x) / num_redraws)
        scale = (model.second + data.second).diagonal().sqrt()
        return cls(
            model.mean - data.mean,
            curvature,
            spread,
            model.covariance / points.num_draws,
            scale,
            (scale > 0) | (data.hessian != 0).any(0),
            points.how,
            "the draws of the model are too few to say whether the parameters are at "
            f"the solution: give draws, about {len(x):,} of them",
        )

    @classmethod
    def of_objective(
        cls,
        distribution: EnergyDistribution,
        objective: Objective,
        state: nn.Module,
        parameters: Sequence[Tensor],
        x: Tensor,
        num_redraws: float,
    ) -> "Equation":
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
            for part in x.split(_CHUNK)
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
        energy = _derivatives(distribution.energy(x[:_CHUNK]), parameters).rows
        scale = curvature.diagonal().abs().sqrt()
        if "gradient" not in objective.needs:  # it compares values, which may cancel
            scale = torch.maximum(scale, energy.square().mean(0).sqrt())
        return cls(
            mean,
            curvature,
            _positive(spread, averaged),
            noise * ((1 / _REDRAWS + 1 / num_redraws) / len(x)),
            scale,
            (energy != 0).any(0) | (curvature != 0).any(0),
            f"of {type(objective).__name__}",
            "what the objective draws drowns the data, and whether the parameters are "
            "at the solution cannot be said: take noise that does less",
        )

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


class _Derivatives(NamedTuple):
    """Gradients and summed second derivatives in the parameters, in double precision.

    Attributes:
        rows: The gradient of each, shape ``(N, P)``.
        hessian: Second derivatives of their weighted sum, shape ``(P, P)``.
    """

    rows: Tensor
    hessian: Tensor


def _derivatives(
    values: Tensor, parameters: Sequence[Tensor], weights: Tensor | None = None
) -> _Derivatives:
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
        return _Derivatives(rows, hessian)
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
    return _Derivatives(rows, hessian)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class _Rows(NamedTuple):
    """Gradients of the objective at all points, averaged over the times it was drawn.

    The sums run over the points; ``single`` is of the squares of single gradients.
    """

    averaged: Tensor
    single: Tensor
    hessian: Tensor


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
    found: list[_Derivatives] = []
    for _ in range(_REDRAWS):
        terms: Any = objective.surrogate(distribution, state)(x)
        found.append(_derivatives(terms.objective, parameters))
        if len(found) == 2 and torch.equal(found[0].rows, found[1].rows):
            found = found[:1] * _REDRAWS  # it draws nothing
            break
    rows = torch.stack([part.rows for part in found])
    single = torch.einsum("rnp,rnq->pq", rows, rows) / len(found)
    hessian = torch.stack([part.hessian for part in found]).mean(0)
    return _Rows(rows.mean(0), single, hessian)


#: Draws of the model where its expectations cannot be summed.
_DRAWS = 4096
#: Largest number of points of a finite support that are summed over.
_MAX_STATES = 2**20


class _Moments(NamedTuple):
    """Weighted means of the gradient of the energy, of its square and its slope."""

    mean: Tensor
    second: Tensor
    hessian: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.second - self.mean.outer(self.mean)


def _moments(
    energy: Energy, parameters: Sequence[Tensor], x: Tensor, weights: Tensor
) -> _Moments:
    parts = []
    for points, share in zip(x.split(_CHUNK), weights.split(_CHUNK), strict=True):
        rows, hessian = _derivatives(energy(points), parameters, share)
        weighted = share.to(rows)[:, None] * rows
        parts.append(_Moments(weighted.sum(0), weighted.mT @ rows, hessian))
    return _Moments(*(torch.stack(part).sum(0) for part in zip(*parts, strict=True)))


def _equal_weights(x: Tensor) -> Tensor:
    return x.new_full((len(x),), 1 / len(x), dtype=torch.float64)


class _Points(NamedTuple):
    """What stands for the model; a sum has the worth of infinitely many draws."""

    energy: Energy
    x: Tensor
    weights: Tensor
    num_draws: float
    how: str


def _model_points(
    distribution: EnergyDistribution, x: Tensor, draws: Tensor | None
) -> _Points:
    energy = distribution.energy
    if draws is None and _is_small(energy):
        return _all_of_space(energy, x)
    if draws is None:
        draws = distribution.sample(torch.Size((_DRAWS,)))
    points = draws.detach().reshape(-1, *energy.event_shape)
    how = f"of the likelihood by {len(points):,} draws"
    return _Points(energy, points, _equal_weights(points), len(points), how)


def _is_small(energy: Energy) -> bool:
    count = num_points(energy.support, energy.event_shape)
    return energy.event_shape.numel() <= 3 if count is None else count <= _MAX_STATES


@torch.no_grad()
def _all_of_space(energy: Energy, x: Tensor) -> _Points:
    """What ExactMaximumLikelihood sums over, which warns where that is too coarse."""
    exact = ExactMaximumLikelihood()
    grid = exact.make_state().to(x)
    on_grid, nodes = exact._nodes(energy, x, grid)
    values = torch.cat([on_grid(part) for part in nodes.x.split(_CHUNK)])
    log_terms = nodes.log_volume - values.to(nodes.log_volume)
    exact._judge(grid, nodes, log_terms, log_terms.logsumexp(0))
    weights = log_terms.softmax(0)
    kept = weights > 1e-16 * weights.max()
    how = "of the likelihood by a sum over the space"
    return _Points(on_grid, nodes.x[kept], weights[kept], math.inf, how)
