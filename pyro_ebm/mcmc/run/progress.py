"""A progress bar that asks the device for numbers a few times a second, no more."""

__all__ = ["Progress"]

import time
from collections.abc import Callable

from tqdm.auto import tqdm

#: Seconds between two looks at the chains.
_INTERVAL = 0.3


class Progress:
    """A bar over transitions, with a line of text that is made only when shown.

    Args:
        total: Transitions.
        name: What stands before the bar.
        is_shown: Whether there is a bar at all.
    """

    def __init__(self, total: int, name: str, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._bar = tqdm(total=total, desc=name, disable=not is_shown)
        self._next = 0.0

    def update(self, describe: Callable[[], str]) -> None:
        """Count a transition; ``describe`` is called if the text is due."""
        if not self._is_shown:
            return
        self._bar.update()
        if time.monotonic() >= self._next or self._bar.n == self._bar.total:
            self._bar.set_postfix_str(describe(), refresh=False)
            self._next = time.monotonic() + _INTERVAL

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
