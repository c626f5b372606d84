"""Energies that show another energy differently: parts, conditions, coordinates."""

__all__: list[str] = []
