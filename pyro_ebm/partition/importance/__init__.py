"""Log Z from weighted independent draws, and proposals that make the weights even."""

__all__: list[str] = []
