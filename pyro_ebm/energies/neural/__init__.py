"""Energies that are networks, for vectors and images."""

__all__: list[str] = []
