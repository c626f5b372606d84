"""Energy functions ``f(x)`` in nats, and their algebra.

Start with :mod:`~pyro_ebm.energies.base`, the contract; :class:`FunctionEnergy` wraps
anything that can be called.
"""

__all__ = [
    "ClosedForm",
    "DistributionEnergy",
    "Energy",
    "ExpEnergy",
    "FunctionEnergy",
    "QuadraticEnergy",
    "SumEnergy",
    "UnconstrainedEnergy",
    "is_unconstrained",
    "unconstrained",
]

from pyro_ebm.energies.algebra import ExpEnergy, SumEnergy
from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.function import DistributionEnergy, FunctionEnergy
from pyro_ebm.energies.quadratic import QuadraticEnergy
from pyro_ebm.energies.unconstrained import (
    UnconstrainedEnergy,
    is_unconstrained,
    unconstrained,
)
