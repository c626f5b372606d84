"""Pure functions of draws and weights."""

__all__ = [
    "effective_sample_fraction",
    "log_mean_exp",
    "pareto_k",
    "pareto_std_error",
]

from pyro_ebm.diagnostics.pareto import pareto_k, pareto_std_error
from pyro_ebm.diagnostics.weights import effective_sample_fraction, log_mean_exp
