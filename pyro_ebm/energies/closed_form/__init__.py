"""Energies whose normaliser is known, and the products that keep it known."""

__all__: list[str] = []
