"""What a run says of itself: diagnosis, summary, tables, export."""

__all__: list[str] = []
