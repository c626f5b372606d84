"""Closed forms of log Z: Gaussians, products within a family, and marginals."""

__all__: list[str] = []
