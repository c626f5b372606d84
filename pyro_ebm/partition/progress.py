"""Counting of energy evaluations, with a progress bar and a limit on memory."""

__all__ = ["CountedEnergy", "Limits", "MAX_BYTES", "bar_settings", "watched"]

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from pyro_ebm.core.stopwatch import Stopwatch
from pyro_ebm.energies import Energy
from pyro_ebm.energies.views.unconstrained import is_finite_support

#: Memory that one evaluation may take, in bytes.
MAX_BYTES = 2**29
#: Points by which the memory of an evaluation is measured.
_NUM_MEASURED = 4
#: Sizes of the pieces.
_SIZES = tuple(4**power for power in range(2, 9))


def bar_settings(*, is_shown: bool) -> dict[str, Any]:
    """Settings of a progress bar that appears after a second.

    Args:
        is_shown: Whether there is one; if so, ``TQDM_DISABLE`` may still switch it off.
    """
    return {"delay": 1} if is_shown else {"delay": 1, "disable": True}


@final
class CountedEnergy(Energy):
    """An energy that counts the points at which it is evaluated.

    Args:
        energy: What is evaluated.
        total: Evaluations expected, for the bar; ``None`` where they are not known.
        is_shown: Whether there is a progress bar; it appears after a second.
        max_bytes: What an evaluation may allocate: points are given to the energy in
            as many pieces as it takes, of a few sizes. Default: all at once.
        bar: One that several energies share; default: a bar of its own.

    Attributes:
        num_evaluations: Points so far.
        seconds_each: CPU seconds of an evaluation in the cheapest call so far: the
            first of a kind also pay for tracing. Infinite before the first call.
        bar: The progress bar, closed by its owner.
    """

    def __init__(
        self,
        energy: Energy,
        total: int | None = None,
        *,
        is_shown: bool = False,
        max_bytes: float | None = None,
        bar: tqdm | None = None,
    ) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self.max_bytes = max_bytes
        self.num_evaluations, self.seconds_each = 0, math.inf
        self._max_points: int | None = None
        if bar is None:
            shown = bar_settings(is_shown=is_shown)
            bar = tqdm(total=total, desc="log Z", unit="", unit_scale=True, **shown)
        self.bar = bar

    def tensor_options(self, like: Tensor | None = None) -> dict[str, Any]:
        """Those of the energy."""
        return self.energy.tensor_options(like)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the energy."""
        return self._in_pieces(lambda part: (self.energy(part),), x)[0]

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the energy and its gradient."""
        value, grad = self._in_pieces(self.energy.value_and_grad, x)
        return value, grad

    def _in_pieces(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
    ) -> tuple[Tensor, ...]:
        start = time.process_time()
        batch_shape = self.batch_shape_of(x)
        if not batch_shape.numel():
            return function(x)
        self.num_evaluations += batch_shape.numel()
        self.bar.update(batch_shape.numel())
        if self.max_bytes is None:
            parts = [function(x.reshape(-1, *self.event_shape))]
        else:
            if self._max_points is None:
                self._max_points = self._measured(x, self.max_bytes)
            pieces_of_x = self._pieces(x.reshape(-1, *self.event_shape))
            parts = [function(piece) for piece in pieces_of_x]
        if len(parts) > 1:
            joined = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        else:
            joined = (piece for piece in parts[0])
        number = batch_shape.numel()
        result = tuple(
            piece[:number].reshape(batch_shape + piece.shape[1:]) for piece in joined
        )
        each = (time.process_time() - start) / max(batch_shape.numel(), 1)
        self.seconds_each = min(self.seconds_each, each)
        return result

    def _pieces(self, x: Tensor) -> Iterator[Tensor]:
        """Points in pieces of a few sizes; the last piece is filled up with copies.

        An energy that is traced or compiled has a graph for each size.
        """
        most = self._max_points or 1
        sizes = [size for size in _SIZES if size <= most] or [most]
        while len(x) > sizes[0]:
            size = max(size for size in sizes if size <= len(x))
            yield x[:size]
            x = x[size:]
        if len(x):
            yield torch.cat([x, x[-1:].expand(sizes[0] - len(x), *x.shape[1:])])

    def _measured(self, x: Tensor, max_bytes: float) -> int:
        """How many points fit into the memory, by what a few allocate."""
        few = x.detach().reshape(-1, *self.event_shape)[:_NUM_MEASURED]
        if not len(few):
            return 1
        with _Allocations() as found:
            self.energy.value_and_grad(few)
        return max(1, int(max_bytes * len(few) / max(found.num_bytes, 1)))


class _Allocations(TorchDispatchMode):
    """Adds up the memory of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_bytes += sum(
            part.numel() * part.element_size()
            for part in tree_leaves(result)
            if isinstance(part, Tensor)
        )
        return result


class Limits:
    """Limits on the error, the time and the evaluations of an estimate.

    Args:
        tolerance: Standard error wanted, in nats.
        max_seconds: Seconds after which it ends with what there is.
        budget: Energy evaluations aimed at; ``None`` for no limit.
    """

    def __init__(
        self, tolerance: float, max_seconds: float, budget: int | None
    ) -> None:
        self.tolerance, self.max_seconds, self.budget = tolerance, max_seconds, budget
        self._watch = Stopwatch()

    @property
    def seconds(self) -> float:
        """Seconds of computing since the start; see :class:`Stopwatch`."""
        return self._watch.seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(self.max_seconds - self.seconds, 0.0)

    def affordable(self, energy: CountedEnergy, share: float) -> float:
        """Evaluations that a share of what is left pays for."""
        seconds = self.left * share
        number = seconds / max(energy.seconds_each, 1e-9)
        if self.budget is not None:
            number = min(number, (self.budget - energy.num_evaluations) * share)
        return max(number, 0.0)

    def is_over(self, energy: CountedEnergy) -> bool:
        """Whether time or evaluations are spent."""
        is_spent = self.budget is not None and energy.num_evaluations >= self.budget
        return is_spent or self.seconds > self.max_seconds


@contextmanager
def watched(
    energy: Energy, total: int | None = None, *, is_shown: bool
) -> Iterator[Energy]:
    """Context in which evaluations of an energy move a progress bar.

    Args:
        energy: What is evaluated.
        total: Evaluations expected; default: not known before.
        is_shown: Whether there is a bar at all; if not, and over a finite support, the
            energy stays as it is.
    """
    if not is_shown or is_finite_support(
        energy.support
    ):  # whose blocks would be hidden
        yield energy
        return
    under_bar = CountedEnergy(energy, total, is_shown=True)
    try:
        yield under_bar
    finally:
        under_bar.bar.close()
