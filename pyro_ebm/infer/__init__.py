"""Learning the parameters of energies inside Pyro models.

Start with :mod:`~pyro_ebm.infer.objective`, the contract of all estimators, and
:mod:`~pyro_ebm.infer.maximum_likelihood`, beside eq. (1.16).
"""

__all__ = [
    "ContrastiveDivergence",
    "DenoisingScoreMatching",
    "ExactMaximumLikelihood",
    "FitRecord",
    "FitResult",
    "LogLikelihood",
    "MaximumLikelihood",
    "NoiseContrastive",
    "Objective",
    "ObjectiveLoss",
    "ObjectiveModel",
    "RankingNoiseContrastive",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Surrogate",
    "Terms",
    "contrastive_divergence",
    "denoising_score_matching",
    "exact_maximum_likelihood",
    "fit",
    "log_likelihood",
    "log_likelihood_difference",
    "maximum_likelihood",
    "noise_contrastive",
    "ranking_noise_contrastive",
    "score_matching",
    "sliced_score_matching",
]

from pyro_ebm.infer.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.denoising import DenoisingScoreMatching
from pyro_ebm.infer.exact_likelihood import ExactMaximumLikelihood
from pyro_ebm.infer.fit import FitRecord, FitResult, fit
from pyro_ebm.infer.handler import ObjectiveModel, maximum_likelihood
from pyro_ebm.infer.likelihood import (
    LogLikelihood,
    log_likelihood,
    log_likelihood_difference,
)
from pyro_ebm.infer.loss import ObjectiveLoss
from pyro_ebm.infer.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.noise_contrastive import NoiseContrastive
from pyro_ebm.infer.objective import Objective, Surrogate, Terms
from pyro_ebm.infer.ranking import RankingNoiseContrastive
from pyro_ebm.infer.score_matching import ScoreMatching, SlicedScoreMatching
from pyro_ebm.infer.sugar import (
    contrastive_divergence,
    denoising_score_matching,
    exact_maximum_likelihood,
    noise_contrastive,
    ranking_noise_contrastive,
    score_matching,
    sliced_score_matching,
)
