"""Pure functions of draws and weights."""

__all__ = [
    "Convergence",
    "bulk_ess",
    "convergence",
    "effective_sample_fraction",
    "energy_bfmi",
    "log_mean_exp",
    "mean_std_error",
    "nested_r_hat",
    "pareto_k",
    "pareto_std_error",
    "r_hat",
    "sd_std_error",
    "tail_ess",
]

from pyro_ebm.diagnostics.convergence import (
    Convergence,
    bulk_ess,
    convergence,
    mean_std_error,
    nested_r_hat,
    r_hat,
    sd_std_error,
    tail_ess,
)
from pyro_ebm.diagnostics.energy_bfmi import energy_bfmi
from pyro_ebm.diagnostics.pareto import pareto_k, pareto_std_error
from pyro_ebm.diagnostics.weights import effective_sample_fraction, log_mean_exp
