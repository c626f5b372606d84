"""Views of an energy: parts, conditionals, other coordinates, other precision."""

__all__: list[str] = []
