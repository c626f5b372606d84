"""Estimators that need no normaliser."""

__all__: list[str] = []
