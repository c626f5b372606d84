"""One run of many chains: target, driver, storage."""

__all__: list[str] = []
