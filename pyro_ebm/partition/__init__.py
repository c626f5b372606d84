r"""Estimates of :math:`\log Z` with an error bar and a verdict.

Start with :mod:`~pyro_ebm.partition.base`, what an estimate says of itself, and
:func:`estimate`, which chooses among the others.
"""

__all__ = [
    "FittedGenerator",
    "LogPartition",
    "LogPartitionEstimate",
    "LogRatioEstimate",
    "ThermodynamicCurve",
    "annealed_importance_sampling",
    "bidirectional",
    "bridge_sampling",
    "check_normalizability",
    "closed_form",
    "enumeration",
    "estimate",
    "evidence",
    "fit_generator",
    "gibbs_annealing",
    "importance_sampling",
    "log_ratio",
    "quadrature",
    "smc",
    "thermodynamic_integration",
]

from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.bridge.bridge import bridge_sampling
from pyro_ebm.partition.bridge.ratio import LogRatioEstimate, log_ratio
from pyro_ebm.partition.estimate import estimate
from pyro_ebm.partition.exact.closed_form import closed_form
from pyro_ebm.partition.exact.enumeration import enumeration
from pyro_ebm.partition.exact.quadrature import quadrature
from pyro_ebm.partition.generator import FittedGenerator, fit_generator
from pyro_ebm.partition.importance.evidence import evidence
from pyro_ebm.partition.importance.importance import importance_sampling
from pyro_ebm.partition.normalizability import check_normalizability
from pyro_ebm.partition.particles.annealed import (
    annealed_importance_sampling,
    bidirectional,
)
from pyro_ebm.partition.particles.gibbs_annealing import gibbs_annealing
from pyro_ebm.partition.particles.smc import smc
from pyro_ebm.partition.particles.thermodynamic import (
    ThermodynamicCurve,
    thermodynamic_integration,
)
from pyro_ebm.partition.tracking.log_partition import LogPartition
