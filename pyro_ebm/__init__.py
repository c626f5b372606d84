"""Energy functions as Pyro distributions.

Every energy is a Pyro distribution, and every Pyro model is an energy.
"""

__version__ = "0.1.0"

from pyro_ebm import energies
from pyro_ebm.energies import Energy
