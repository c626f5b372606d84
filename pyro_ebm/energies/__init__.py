"""Energy functions ``f(x)`` in nats, and their algebra.

Start with :mod:`~pyro_ebm.energies.base`, the contract; :class:`FunctionEnergy` wraps
anything that can be called, :class:`NeuralEnergy` is the usual network for vectors.
"""

__all__ = [
    "BoltzmannEnergy",
    "ChainEnergy",
    "ClampedEnergy",
    "ClosedForm",
    "CompiledEnergy",
    "ConvolutionalEnergy",
    "DistributionEnergy",
    "Energy",
    "ExpEnergy",
    "FactorGraphEnergy",
    "FreeEnergy",
    "FunctionEnergy",
    "HopfieldEnergy",
    "IsingEnergy",
    "LinearMapEnergy",
    "MixtureEnergy",
    "NeuralEnergy",
    "PartEnergy",
    "PottsEnergy",
    "PyroModelEnergy",
    "QuadraticEnergy",
    "RBMEnergy",
    "SpinMemoryEnergy",
    "SumEnergy",
    "UnconstrainedEnergy",
    "VectorMemoryEnergy",
    "grid_edges",
    "register_product",
    "select",
    "spins",
    "torus_edges",
    "unconstrained",
]

from pyro_ebm.energies.algebra import ExpEnergy, MixtureEnergy, SumEnergy
from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.closed_form.products import register_product
from pyro_ebm.energies.discrete.boltzmann import BoltzmannEnergy
from pyro_ebm.energies.discrete.chain import ChainEnergy
from pyro_ebm.energies.discrete.factor_graph import FactorGraphEnergy
from pyro_ebm.energies.discrete.finite import spins
from pyro_ebm.energies.discrete.free_energy import FreeEnergy
from pyro_ebm.energies.discrete.graph import grid_edges, torus_edges
from pyro_ebm.energies.discrete.lattice import IsingEnergy, PottsEnergy
from pyro_ebm.energies.discrete.rbm import RBMEnergy
from pyro_ebm.energies.distribution import DistributionEnergy
from pyro_ebm.energies.function import FunctionEnergy
from pyro_ebm.energies.graphs.compiled import CompiledEnergy
from pyro_ebm.energies.memory import (
    HopfieldEnergy,
    SpinMemoryEnergy,
    VectorMemoryEnergy,
)
from pyro_ebm.energies.neural import ConvolutionalEnergy, NeuralEnergy
from pyro_ebm.energies.pyro_model.energy import PyroModelEnergy
from pyro_ebm.energies.quadratic import QuadraticEnergy
from pyro_ebm.energies.views.batch import select
from pyro_ebm.energies.views.clamped import ClampedEnergy
from pyro_ebm.energies.views.part import LinearMapEnergy, PartEnergy
from pyro_ebm.energies.views.unconstrained import (
    UnconstrainedEnergy,
    unconstrained,
)
