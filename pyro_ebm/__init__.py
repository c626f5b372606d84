"""Energy functions as Pyro distributions: fit them, sample them, know their log Z.

Every energy is a Pyro distribution, and every Pyro model is an energy. The packages in
the order of the mathematics::

    energies -> mcmc -> partition -> distributions -> infer
      f(x)    x ~ e^-f   log Z      q = e^-f / Z    theta fitted
"""

__all__ = [
    "Energy",
    "EnergyDistribution",
    "EnergyModel",
    "__version__",
    "bases",
    "datasets",
    "diagnostics",
    "distributions",
    "energies",
    "errors",
    "fit",
    "infer",
    "mcmc",
    "partition",
]

__version__ = "0.2.0"

from pyro_ebm import (
    bases,
    datasets,
    diagnostics,
    distributions,
    energies,
    infer,
    mcmc,
    partition,
)
from pyro_ebm.core import errors
from pyro_ebm.distributions import EnergyDistribution, EnergyModel
from pyro_ebm.energies import Energy
from pyro_ebm.infer import fit
