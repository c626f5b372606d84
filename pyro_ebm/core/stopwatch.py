"""A stopwatch that discounts time taken by other processes."""

__all__ = ["Stopwatch"]

import time


class Stopwatch:
    """Measure the seconds since it was created.

    Example:
        >>> Stopwatch().seconds < 1.0
        True
    """

    def __init__(self) -> None:
        self._start = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> float:
        """By the clock, or by the processor where others share it."""
        wall, cpu = self._start
        return min(time.monotonic() - wall, time.process_time() - cpu)
