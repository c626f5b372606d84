"""A name for each objective put at the energy sites of a model.

Each function takes any Pyro model with an
:class:`~pyro_ebm.distributions.EnergyDistribution`, over events of shape ``(*event,)``,
at one or more sites, and the settings of an objective. ``score_matching(model)`` is
``ObjectiveModel(model, ScoreMatching())``: a model that is called as the first one is,
for ``SVI`` under any ELBO.

Cost, exactness and all settings are those of the objective. Each raises a ``TypeError``
if the model cannot be called or a setting is unknown; what the energies at the sites do
not allow is refused at the first step of learning.

Example:
    A model of points ``x`` of shape ``(N, 2)``, and whether a step of learning moves
    its energy to the data; the examples of the functions below use both.

    >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    >>> q = pyro_ebm.EnergyModel(
    ...     pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)), base
    ... )
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", pyro.module("q", q)(), obs=x)
    >>> def learns(model):
    ...     optim, elbo = pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO()
    ...     svi = pyro.infer.SVI(model, lambda x: None, optim, elbo)
    ...     svi.step(torch.randn(100, 2) + 1)
    ...     return bool((q.energy.loc > 0).all())
"""

__all__ = [
    "amortized_sampler",
    "bounded_likelihood",
    "contrastive_divergence",
    "denoising_score_matching",
    "energy_discrepancy",
    "exact_maximum_likelihood",
    "flow_contrastive",
    "importance_sampled_likelihood",
    "noise_contrastive",
    "ranking_noise_contrastive",
    "score_matching",
    "sliced_score_matching",
    "tempered_maximum_likelihood",
]

from collections.abc import Callable
from typing import Any

from pyro_ebm.infer.handler import ObjectiveModel
from pyro_ebm.infer.objectives.contrast.flow_contrastive import FlowContrastive
from pyro_ebm.infer.objectives.contrast.noise_contrastive import NoiseContrastive
from pyro_ebm.infer.objectives.contrast.ranking import RankingNoiseContrastive
from pyro_ebm.infer.objectives.likelihood.contrastive_divergence import (
    ContrastiveDivergence,
)
from pyro_ebm.infer.objectives.likelihood.exact_likelihood import ExactMaximumLikelihood
from pyro_ebm.infer.objectives.likelihood.generator import AmortizedSampler
from pyro_ebm.infer.objectives.likelihood.importance import (
    BoundedLikelihood,
    ImportanceSampledLikelihood,
)
from pyro_ebm.infer.objectives.likelihood.tempered import TemperedMaximumLikelihood
from pyro_ebm.infer.objectives.score.denoising import DenoisingScoreMatching
from pyro_ebm.infer.objectives.score.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.objectives.score.score_matching import (
    ScoreMatching,
    SlicedScoreMatching,
)


def amortized_sampler(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Learn by :class:`AmortizedSampler`: against draws of a generator.

    Needs the ``generator``, a module from noise ``(N, *latent_shape)`` to points
    ``(N, *event)`` of unconstrained space, and the ``latent_shape``.

    Raises:
        TypeError: If the generator is no module.
        ValueError: If a number is out of range.

    Example:
        >>> generator = torch.nn.Linear(2, 2)
        >>> learns(amortized_sampler(model, generator=generator, latent_shape=(2,)))
        True
    """
    return ObjectiveModel(model, AmortizedSampler(**settings))


def bounded_likelihood(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Learn by :class:`BoundedLikelihood`: a lower bound, with log Z learned.

    Draws ``num_draws`` points of the ``proposal``, by default the base of the
    :class:`~pyro_ebm.EnergyModel`, at each step.

    Raises:
        ValueError: If ``num_draws`` is below 2.

    Example:
        >>> learns(bounded_likelihood(model, num_draws=500))
        True
    """
    return ObjectiveModel(model, BoundedLikelihood(**settings))


def contrastive_divergence(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Learn by :class:`ContrastiveDivergence`: short chains from the data.

    Each point of a batch starts a chain of ``num_steps`` moves of the ``kernel``.

    Raises:
        TypeError: If ``kernel`` is no kernel.
        ValueError: If ``num_steps`` is not positive.

    Example:
        >>> learns(contrastive_divergence(model, num_steps=5))
        True
    """
    return ObjectiveModel(model, ContrastiveDivergence(**settings))


def denoising_score_matching(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Learn by :class:`DenoisingScoreMatching`: the score of noisy data.

    The noise has the standard deviation ``noise_scale``, one number or several, in
    units of unconstrained space.

    Raises:
        ValueError: If a level of noise is not positive and finite, or there is none.

    Example:
        >>> learns(denoising_score_matching(model, noise_scale=0.3))
        True
    """
    return ObjectiveModel(model, DenoisingScoreMatching(**settings))


def energy_discrepancy(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Learn by :class:`EnergyDiscrepancy`: from values of the energy alone.

    Each point is compared with ``num_copies`` of it, perturbed by a Gaussian.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> learns(energy_discrepancy(model, num_copies=16))
        True
    """
    return ObjectiveModel(model, EnergyDiscrepancy(**settings))


def exact_maximum_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Learn by :class:`ExactMaximumLikelihood`: log Z on a grid or by a sum.

    For events of at most three real numbers, or ``max_states`` discrete states.

    Raises:
        ValueError: If a number is too small.

    Example:
        >>> learns(exact_maximum_likelihood(model, num_nodes=65))
        True
    """
    return ObjectiveModel(model, ExactMaximumLikelihood(**settings))


def flow_contrastive(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Learn by :class:`FlowContrastive`: against a flow that is trained too.

    Needs the ``flow``, a module that returns a distribution over events of shape
    ``(*event,)`` when called.

    Raises:
        TypeError: If the flow is no module.
        ValueError: If ``num_noise`` is not positive.

    Example:
        >>> class Affine(torch.nn.Linear):
        ...     def forward(self):
        ...         return dist.Normal(self.bias, 1.5).to_event(1)
        >>> learns(flow_contrastive(model, flow=Affine(1, 2)))
        True
    """
    return ObjectiveModel(model, FlowContrastive(**settings))


def importance_sampled_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Learn by :class:`ImportanceSampledLikelihood`: log Z from a proposal.

    Draws ``num_draws`` points of the ``proposal``, by default the base of the
    :class:`~pyro_ebm.EnergyModel`, at each step.

    Raises:
        ValueError: If ``num_draws`` is below 2.

    Example:
        >>> learns(importance_sampled_likelihood(model, num_draws=500))
        True
    """
    return ObjectiveModel(model, ImportanceSampledLikelihood(**settings))


def noise_contrastive(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Learn by :class:`NoiseContrastive`: tell data from noise, with log Z learned.

    Draws ``num_noise`` points a data point of the ``noise``, by default the base of the
    :class:`~pyro_ebm.EnergyModel`.

    Raises:
        ValueError: If ``num_noise`` is not positive.

    Example:
        >>> learns(noise_contrastive(model, num_noise=4))
        True
    """
    return ObjectiveModel(model, NoiseContrastive(**settings))


def ranking_noise_contrastive(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Learn by :class:`RankingNoiseContrastive`: find the datum among noise.

    Draws ``num_noise`` points a data point of the ``noise``, by default the base of the
    :class:`~pyro_ebm.EnergyModel`.

    Raises:
        ValueError: If ``num_noise`` is not positive.

    Example:
        >>> learns(ranking_noise_contrastive(model, num_noise=15))
        True
    """
    return ObjectiveModel(model, RankingNoiseContrastive(**settings))


def score_matching(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Learn by :class:`ScoreMatching`: the exact score, for few dimensions.

    It has no settings, and takes energies that are twice differentiable.

    Warns:
        UnreliableWarning: At the first step, if an energy is piecewise linear.

    Example:
        >>> learns(score_matching(model))
        True
    """
    return ObjectiveModel(model, ScoreMatching(**settings))


def sliced_score_matching(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """Learn by :class:`SlicedScoreMatching`: the score in random directions.

    Takes ``num_directions`` a data point, and energies that are twice differentiable.

    Raises:
        ValueError: If ``num_directions`` is not positive.

    Warns:
        UnreliableWarning: At the first step, if an energy is piecewise linear.

    Example:
        >>> learns(sliced_score_matching(model, num_directions=2))
        True
    """
    return ObjectiveModel(model, SlicedScoreMatching(**settings))


def tempered_maximum_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """Learn by :class:`TemperedMaximumLikelihood`: chains that swap temperatures.

    Runs ``num_chains`` chains between the ``base``, by default that of the
    :class:`~pyro_ebm.EnergyModel`, and the energy.

    Raises:
        TypeError: If ``kernel`` is not :class:`~pyro_ebm.mcmc.HMC`.
        ValueError: If a count is too small.

    Example:
        >>> learns(tempered_maximum_likelihood(model, num_chains=64))
        True
    """
    return ObjectiveModel(model, TemperedMaximumLikelihood(**settings))
