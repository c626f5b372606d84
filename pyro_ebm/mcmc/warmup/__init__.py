"""Adaptation of steps and metric before draws are kept."""

__all__: list[str] = []
