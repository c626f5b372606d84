"""Learning the parameters of energies inside Pyro models.

Start with :mod:`~pyro_ebm.infer.maximum_likelihood`, beside eq. (1.16).
"""

__all__ = [
    "FitRecord",
    "FitResult",
    "LogLikelihood",
    "MaximumLikelihood",
    "Objective",
    "ObjectiveLoss",
    "ObjectiveModel",
    "Surrogate",
    "Terms",
    "fit",
    "log_likelihood",
    "log_likelihood_difference",
    "maximum_likelihood",
]

from pyro_ebm.infer.fit import FitRecord, FitResult, fit
from pyro_ebm.infer.handler import ObjectiveModel, maximum_likelihood
from pyro_ebm.infer.likelihood import (
    LogLikelihood,
    log_likelihood,
    log_likelihood_difference,
)
from pyro_ebm.infer.loss import ObjectiveLoss
from pyro_ebm.infer.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.objective import Objective, Surrogate, Terms
