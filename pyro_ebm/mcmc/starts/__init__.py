"""Where chains start: modes and approximations on the way to them."""

__all__: list[str] = []
