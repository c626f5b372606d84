"""Learning the parameters of energies inside Pyro models.

Start with :mod:`~pyro_ebm.infer.objectives.objective`, the contract of all estimators,
and :mod:`~pyro_ebm.infer.objectives.likelihood.maximum_likelihood`, beside eq. (1.16).
"""

__all__ = [
    "AmortizedSampler",
    "Anomaly",
    "BoundedLikelihood",
    "ContrastiveDivergence",
    "DenoisingScoreMatching",
    "EnergyDifference",
    "EnergyDiscrepancy",
    "EnergyPenalty",
    "ExactMaximumLikelihood",
    "FitDiagnostics",
    "FitRecord",
    "FitResult",
    "FitTimings",
    "FlowContrastive",
    "ImportanceSampledLikelihood",
    "Imputed",
    "Learn",
    "LogLikelihood",
    "MaximumLikelihood",
    "NoiseContrastive",
    "Objective",
    "ObjectiveLoss",
    "ParameterErrors",
    "Pseudolikelihood",
    "RankingNoiseContrastive",
    "RatioMatching",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Stage",
    "TemperedMaximumLikelihood",
    "Terms",
    "fit",
    "log_likelihood",
    "log_likelihood_difference",
    "parameter_errors",
]

from pyro_ebm.infer.fit.diagnosis import (
    EnergyDifference,
    FitDiagnostics,
    FitRecord,
)
from pyro_ebm.infer.fit.fit import fit
from pyro_ebm.infer.fit.fit_result import Anomaly, FitResult, FitTimings
from pyro_ebm.infer.fit.missing import Imputed
from pyro_ebm.infer.fit.stages import Stage
from pyro_ebm.infer.handler import Learn, ObjectiveLoss
from pyro_ebm.infer.likelihood import (
    LogLikelihood,
    log_likelihood,
    log_likelihood_difference,
)
from pyro_ebm.infer.objectives.contrast.flow_contrastive import FlowContrastive
from pyro_ebm.infer.objectives.contrast.noise_contrastive import (
    NoiseContrastive,
    RankingNoiseContrastive,
)
from pyro_ebm.infer.objectives.likelihood.contrastive_divergence import (
    ContrastiveDivergence,
)
from pyro_ebm.infer.objectives.likelihood.exact_likelihood import ExactMaximumLikelihood
from pyro_ebm.infer.objectives.likelihood.generator import AmortizedSampler
from pyro_ebm.infer.objectives.likelihood.importance import (
    BoundedLikelihood,
    ImportanceSampledLikelihood,
)
from pyro_ebm.infer.objectives.likelihood.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.objectives.likelihood.tempered import TemperedMaximumLikelihood
from pyro_ebm.infer.objectives.objective import Objective, Terms
from pyro_ebm.infer.objectives.penalty import EnergyPenalty
from pyro_ebm.infer.objectives.score.denoising import DenoisingScoreMatching
from pyro_ebm.infer.objectives.score.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.objectives.score.score_matching import (
    ScoreMatching,
    SlicedScoreMatching,
)
from pyro_ebm.infer.objectives.score.site_conditionals import (
    Pseudolikelihood,
    RatioMatching,
)
from pyro_ebm.infer.uncertainty.standard_errors import ParameterErrors, parameter_errors
