"""Learning the parameters of energies inside Pyro models.

Start with :mod:`~pyro_ebm.infer.maximum_likelihood`, beside eq. (1.16).
"""

__all__ = [
    "MaximumLikelihood",
    "Objective",
    "ObjectiveModel",
    "Surrogate",
    "maximum_likelihood",
]

from pyro_ebm.infer.handler import ObjectiveModel, maximum_likelihood
from pyro_ebm.infer.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.objective import Objective, Surrogate
