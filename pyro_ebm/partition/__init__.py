r"""Estimates of :math:`\log Z` with an error bar and a verdict.

Start with :mod:`~pyro_ebm.partition.base`: what an estimate says of itself.
"""

__all__ = [
    "LogPartition",
    "LogPartitionEstimate",
    "closed_form",
    "quadrature",
    "smc",
]

from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.exact import closed_form, quadrature
from pyro_ebm.partition.smc import smc
from pyro_ebm.partition.tracking import LogPartition
