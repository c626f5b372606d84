"""Fit a model in one call, and judge the fit."""

__all__: list[str] = []
