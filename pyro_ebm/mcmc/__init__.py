"""Kernels that move many chains at once, and what runs them.

Start with :mod:`~pyro_ebm.mcmc.base`, the contract ``init`` / ``step``.
"""

__all__ = [
    "ChEES",
    "ChainState",
    "Gibbs",
    "HMC",
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
    "StepSizeAdaptation",
    "ULA",
    "Warmup",
    "find_step_size",
]

from pyro_ebm.mcmc.adaptation import StepSizeAdaptation, find_step_size
from pyro_ebm.mcmc.api import MCMC
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo
from pyro_ebm.mcmc.chees import ChEES
from pyro_ebm.mcmc.gibbs import Gibbs
from pyro_ebm.mcmc.hmc import HMC
from pyro_ebm.mcmc.independent import IndependentChains
from pyro_ebm.mcmc.langevin import MALA
from pyro_ebm.mcmc.persistent import PersistentChains
from pyro_ebm.mcmc.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.sampler import Sampler, SamplingDiagnostics
from pyro_ebm.mcmc.tempering import ReplicaExchange
from pyro_ebm.mcmc.unadjusted import ULA
from pyro_ebm.mcmc.warmup import Warmup
