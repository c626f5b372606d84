"""Log Z of an energy that is being learned."""

__all__: list[str] = []
