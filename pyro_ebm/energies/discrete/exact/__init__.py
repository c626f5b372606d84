"""Exact sums over finite sites: trees, elimination, and the distributions they give."""

__all__: list[str] = []
