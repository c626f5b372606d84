"""Limits on the evaluations, the time and the memory of a computation.

The cost of a point is not known beforehand: a model that sums out a discrete site may
take megabytes for one. So the first chunk of points is small, and the next ones are
twice as large while the last was quick and the memory of the process has not grown by
half of what it may.
"""

__all__ = ["Budget", "OutOfBudgetError"]

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.core.stopwatch import Stopwatch

try:
    import resource
except ImportError:  # on Windows, where the memory is not measured
    resource = None  # type: ignore[assignment]

#: Points in the first chunk, and in the largest.
_FIRST, _LARGEST = 64, 2**17
#: Seconds of a chunk from which on chunks do not grow.
_LONG = 0.25


class OutOfBudgetError(RuntimeError):
    """Raised when a limit would be exceeded; its message says which."""


class Budget:
    """Limits of a computation, and how much of them is spent.

    Args:
        max_evaluations: Points at which an energy may be evaluated.
        max_seconds: Seconds from now on.
        max_bytes: By how much the memory of the process may grow.
        bar: A progress bar that counts points.

    Attributes:
        num_evaluations: Points so far.
    """

    def __init__(
        self, max_evaluations: int, max_seconds: float, max_bytes: float, bar: tqdm
    ) -> None:
        self.max_evaluations, self.max_seconds = max_evaluations, max_seconds
        self.max_bytes, self.bar = max_bytes, bar
        self.num_evaluations = 0
        self._watch, self._memory = Stopwatch(), _peak_memory()
        self._chunk, self._longest, self._each = _FIRST, 0.0, math.inf

    @property
    def seconds(self) -> float:
        """Seconds of computing since the beginning."""
        return self._watch.seconds

    @property
    def left(self) -> int:
        """Points that are left."""
        return self.max_evaluations - self.num_evaluations

    def evaluate(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
    ) -> tuple[Tensor, ...]:
        """Call a function on chunks of points.

        Args:
            function: Maps points of shape ``(N, *event)`` to tensors of ``N`` rows.
            x: Shape ``(N, *event)``.

        Returns:
            The tensors of all points.

        Raises:
            OutOfBudgetError: If that would pass a limit.
        """
        if len(x) > self.left:
            raise OutOfBudgetError(
                f"{self.max_evaluations:,} evaluations (max_evaluations) do not suffice"
            )
        parts: list[tuple[Tensor, ...]] = []
        done = 0
        while done < len(x) or not parts:
            parts.append(self._call(function, x[done : done + self._chunk]))
            done += len(parts[-1][0])
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    def require_time(self, total: int) -> None:
        """Check that the time may do for so many points at the best pace so far.

        The first points also pay for tracing.

        Args:
            total: All points that are wanted.

        Raises:
            OutOfBudgetError: If they would take more than twice as long.
        """
        wanted = self.seconds + self._each * (total - self.num_evaluations)
        if wanted > 2 * self.max_seconds:
            raise OutOfBudgetError(
                f"{self.max_seconds:g} seconds (max_seconds) do not suffice for "
                f"{total:,} points, which take about {wanted:.2g}"
            )

    def _call(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
    ) -> tuple[Tensor, ...]:
        if self.seconds + self._longest > self.max_seconds:
            raise OutOfBudgetError(
                f"{self.max_seconds:g} seconds (max_seconds) do not suffice"
            )
        watch = Stopwatch()
        result = function(x)
        took = watch.seconds
        self._each = min(self._each, took / max(len(x), 1))
        self.num_evaluations += len(x)
        self.bar.update(len(x))
        if len(x) == self._chunk:
            self._longest = took
            has_room = 2 * (_peak_memory() - self._memory) < self.max_bytes
            if has_room and took < _LONG and self._chunk < _LARGEST:
                self._chunk *= 2
                self._longest = 2 * took
        return result


def _peak_memory() -> float:
    """The most memory that the process has held so far, in bytes."""
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024)
