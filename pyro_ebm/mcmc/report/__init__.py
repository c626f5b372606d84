"""Diagnostics and summaries of a run of MCMC."""

__all__: list[str] = []
