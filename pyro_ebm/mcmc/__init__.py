"""Kernels that move many chains at once, and what runs them.

Start with :mod:`~pyro_ebm.mcmc.base`, the contract ``init`` / ``step``.
"""

__all__ = [
    "Alternating",
    "ChEES",
    "ChainState",
    "DiscreteLangevin",
    "Gibbs",
    "HMC",
    "ImportanceResampling",
    "IndependentChains",
    "Kernel",
    "MALA",
    "MCMC",
    "PersistentChains",
    "PyroKernel",
    "ReplicaExchange",
    "Sampler",
    "SamplingDiagnostics",
    "StepInfo",
    "SwendsenWang",
    "ULA",
]

from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo
from pyro_ebm.mcmc.kernels.alternating import Alternating
from pyro_ebm.mcmc.kernels.chees import ChEES
from pyro_ebm.mcmc.kernels.discrete_langevin import DiscreteLangevin
from pyro_ebm.mcmc.kernels.gibbs import Gibbs
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.kernels.langevin import MALA, ULA
from pyro_ebm.mcmc.kernels.swendsen_wang import SwendsenWang
from pyro_ebm.mcmc.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.run.api import MCMC
from pyro_ebm.mcmc.samplers.independent import IndependentChains
from pyro_ebm.mcmc.samplers.persistent import PersistentChains
from pyro_ebm.mcmc.samplers.resampling import ImportanceResampling
from pyro_ebm.mcmc.samplers.sampler import Sampler, SamplingDiagnostics
from pyro_ebm.mcmc.tempering.tempering import ReplicaExchange
