"""Log Z from particles that travel a path from a base to the target."""

__all__: list[str] = []
