"""Kernels that move many chains at once."""

__all__: list[str] = []
