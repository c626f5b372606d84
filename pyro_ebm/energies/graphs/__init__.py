"""Any callable recorded as a graph of operators, simplified, batched and compiled."""

__all__: list[str] = []
