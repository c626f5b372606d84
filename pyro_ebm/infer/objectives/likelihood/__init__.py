"""Estimators that climb the likelihood."""

__all__: list[str] = []
