"""Estimators of energies, one class each."""

__all__: list[str] = []
