"""Log Z, or a ratio of two, from draws of two densities: Bennett's ratio."""

__all__: list[str] = []
