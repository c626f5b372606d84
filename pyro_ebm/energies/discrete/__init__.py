"""Energies over finitely many states: lattices, spins and Boltzmann machines."""

__all__: list[str] = []
