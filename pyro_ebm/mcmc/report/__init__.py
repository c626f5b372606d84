"""Diagnostics, summaries and export of a run of MCMC."""

__all__: list[str] = []
