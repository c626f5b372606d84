"""Energies as Pyro distributions.

Start with :class:`EnergyDistribution`; :class:`EnergyModel` is the module that learns.
"""

__all__ = [
    "Conditional",
    "EnergyDistribution",
    "EnergyModel",
    "LogPartitionBound",
    "MixtureOfExperts",
    "ProductOfExperts",
]

from pyro_ebm.distributions.conditional import Conditional
from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.mixture import MixtureOfExperts
from pyro_ebm.distributions.model import EnergyModel
from pyro_ebm.distributions.product import ProductOfExperts
from pyro_ebm.distributions.terms import LogPartitionBound
