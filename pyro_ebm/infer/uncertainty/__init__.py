"""Standard errors of what was learned."""

__all__: list[str] = []
