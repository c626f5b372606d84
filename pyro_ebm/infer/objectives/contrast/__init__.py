"""Estimators that tell data from noise."""

__all__: list[str] = []
