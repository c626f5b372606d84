"""A name for each objective put at the energy sites of a model."""

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

from pyro_ebm.infer.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.denoising import DenoisingScoreMatching
from pyro_ebm.infer.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.exact_likelihood import ExactMaximumLikelihood
from pyro_ebm.infer.flow_contrastive import FlowContrastive
from pyro_ebm.infer.generator import AmortizedSampler
from pyro_ebm.infer.handler import ObjectiveModel
from pyro_ebm.infer.importance import BoundedLikelihood, ImportanceSampledLikelihood
from pyro_ebm.infer.noise_contrastive import NoiseContrastive
from pyro_ebm.infer.ranking import RankingNoiseContrastive
from pyro_ebm.infer.score_matching import ScoreMatching, SlicedScoreMatching
from pyro_ebm.infer.tempered import TemperedMaximumLikelihood


def amortized_sampler(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """``ObjectiveModel(model, AmortizedSampler(**settings))``."""
    return ObjectiveModel(model, AmortizedSampler(**settings))


def bounded_likelihood(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """``ObjectiveModel(model, BoundedLikelihood(**settings))``."""
    return ObjectiveModel(model, BoundedLikelihood(**settings))


def contrastive_divergence(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """``ObjectiveModel(model, ContrastiveDivergence(**settings))``."""
    return ObjectiveModel(model, ContrastiveDivergence(**settings))


def denoising_score_matching(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """``ObjectiveModel(model, DenoisingScoreMatching(**settings))``."""
    return ObjectiveModel(model, DenoisingScoreMatching(**settings))


def energy_discrepancy(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """``ObjectiveModel(model, EnergyDiscrepancy(**settings))``."""
    return ObjectiveModel(model, EnergyDiscrepancy(**settings))


def exact_maximum_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """``ObjectiveModel(model, ExactMaximumLikelihood(**settings))``."""
    return ObjectiveModel(model, ExactMaximumLikelihood(**settings))


def flow_contrastive(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """``ObjectiveModel(model, FlowContrastive(**settings))``."""
    return ObjectiveModel(model, FlowContrastive(**settings))


def importance_sampled_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """``ObjectiveModel(model, ImportanceSampledLikelihood(**settings))``."""
    return ObjectiveModel(model, ImportanceSampledLikelihood(**settings))


def noise_contrastive(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """``ObjectiveModel(model, NoiseContrastive(**settings))``."""
    return ObjectiveModel(model, NoiseContrastive(**settings))


def ranking_noise_contrastive(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """``ObjectiveModel(model, RankingNoiseContrastive(**settings))``."""
    return ObjectiveModel(model, RankingNoiseContrastive(**settings))


def score_matching(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """``ObjectiveModel(model, ScoreMatching(**settings))``."""
    return ObjectiveModel(model, ScoreMatching(**settings))


def sliced_score_matching(model: Callable[..., Any], **settings: Any) -> ObjectiveModel:
    """``ObjectiveModel(model, SlicedScoreMatching(**settings))``."""
    return ObjectiveModel(model, SlicedScoreMatching(**settings))


def tempered_maximum_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """``ObjectiveModel(model, TemperedMaximumLikelihood(**settings))``."""
    return ObjectiveModel(model, TemperedMaximumLikelihood(**settings))
