"""Pure functions of draws and weights."""

__all__ = ["effective_sample_fraction", "log_mean_exp"]

from pyro_ebm.diagnostics.weights import effective_sample_fraction, log_mean_exp
