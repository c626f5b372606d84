r"""The equation that maximum likelihood solves, however its second term is found.

With :math:`\varphi = \partial_\theta f`, in the notation of
:mod:`~pyro_ebm.infer.uncertainty.estimating_equations`,

.. math::
    \psi = \mathbb{E}_q \varphi - \varphi(x), \qquad
    A = \mathrm{Cov}_q\, \varphi + \mathbb{E}_x \partial_\theta^2 f
        - \mathbb{E}_q \partial_\theta^2 f                                  \tag{1}

of eq. (1.16) and its derivative. An estimate of the second term by draws adds its own
covariance to the spread of :math:`\psi`.
"""

__all__ = ["likelihood_equation"]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.finite import num_points
from pyro_ebm.infer.objectives.likelihood.exact_likelihood import (
    ExactGrid,
    ExactMaximumLikelihood,
)
from pyro_ebm.infer.objectives.objective import Objective
from pyro_ebm.infer.uncertainty.estimating_equations import CHUNK, Equation, derivatives

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
    for points, share in zip(x.split(CHUNK), weights.split(CHUNK), strict=True):
        rows, hessian = derivatives(energy(points), parameters, share)
        weighted = share.to(rows)[:, None] * rows
        parts.append(_Moments(weighted.sum(0), weighted.mT @ rows, hessian))
    return _Moments(*(torch.stack(part).sum(0) for part in zip(*parts, strict=True)))


def likelihood_equation(
    distribution: EnergyDistribution,
    objective: Objective,
    parameters: Sequence[Tensor],
    x: Tensor,
    draws: Tensor | None,
    covariance: str,
    num_redraws: float,
) -> Equation:
    """The equation (1) that all estimators of the likelihood solve.

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
    curvature = model.covariance + data.hessian - model.hessian  # (1)
    spread = data.covariance * (len(x) / (len(x) - 1))
    if covariance == "information":
        spread = curvature
    if math.isfinite(num_redraws):

        def rows_of(values: Tensor) -> Tensor:
            return derivatives(values, parameters).rows

        second_term = objective.second_term_covariance(
            distribution, rows_of, model.covariance
        )
        spread = spread + second_term * (len(x) / num_redraws)
    scale = (model.second + data.second).diagonal().sqrt()
    return Equation(
        model.mean - data.mean,
        curvature,
        spread,
        model.covariance / points.num_draws,
        scale,
        (scale > 0) | (data.hessian != 0).any(0),
        points.how,
        "the draws of the model are too few to say whether the parameters are at the "
        f"solution: give draws, about {len(x):,} of them",
    )


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
    exact, grid = ExactMaximumLikelihood(), ExactGrid().to(x)
    on_grid, nodes = exact._nodes(energy, x, grid)
    values = torch.cat([on_grid(part) for part in nodes.x.split(CHUNK)])
    log_terms = nodes.log_volume - values.to(nodes.log_volume)
    exact._judge(grid, nodes, log_terms, log_terms.logsumexp(0))
    weights = log_terms.softmax(0)
    kept = weights > 1e-16 * weights.max()
    how = "of the likelihood by a sum over the space"
    return _Points(on_grid, nodes.x[kept], weights[kept], math.inf, how)
