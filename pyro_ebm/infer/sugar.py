"""A name for each objective put at the energy sites of a model."""

__all__ = [
    "contrastive_divergence",
    "denoising_score_matching",
    "exact_maximum_likelihood",
    "noise_contrastive",
    "ranking_noise_contrastive",
    "score_matching",
    "sliced_score_matching",
]

from collections.abc import Callable
from typing import Any

from pyro_ebm.infer.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.denoising import DenoisingScoreMatching
from pyro_ebm.infer.exact_likelihood import ExactMaximumLikelihood
from pyro_ebm.infer.handler import ObjectiveModel
from pyro_ebm.infer.noise_contrastive import NoiseContrastive
from pyro_ebm.infer.ranking import RankingNoiseContrastive
from pyro_ebm.infer.score_matching import ScoreMatching, SlicedScoreMatching


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


def exact_maximum_likelihood(
    model: Callable[..., Any], **settings: Any
) -> ObjectiveModel:
    """``ObjectiveModel(model, ExactMaximumLikelihood(**settings))``."""
    return ObjectiveModel(model, ExactMaximumLikelihood(**settings))


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
