"""Associative memories."""

__all__: list[str] = []
