"""Samplers that give draws of an energy while it changes."""

__all__: list[str] = []
