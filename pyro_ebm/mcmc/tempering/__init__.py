"""Replica exchange along a path of energies."""

__all__: list[str] = []
