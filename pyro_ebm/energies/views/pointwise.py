"""Check that an energy is a function of one point.

Chains and estimators evaluate many points at once, in batches of any size, and again.
Batch norm and dropout in training mode, a spectral norm that improves at each call, or
a closure over as many rows as there happen to be points give numbers that mean nothing.
"""

__all__ = ["check_pointwise"]

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_ebm.energies.base import Energy, require_no_batch

#: Points that are evaluated alone.
_NUM_ALONE = 3
#: Relative error of the same evaluation again, in units of the last place.
_ROUNDING = 32


@torch.no_grad()
def check_pointwise(energy: Energy, x: Tensor) -> None:
    """Check that the energy of a point is the same in a batch, alone, and twice.

    Neither the buffers of the energy nor the stream of random numbers are changed.

    Args:
        energy: Any energy.
        x: Two points or more, shape ``(*batch, *event)``, in the support.

    Raises:
        ValueError: If it is not, or is a batch of energies.

    Example:
        >>> energy = pyro_ebm.energies.FunctionEnergy(lambda x: x - x.mean(), ())
        >>> check_pointwise(energy, torch.randn(8))
        Traceback (most recent call last):
        ValueError: energy must be a function of one point...
    """
    require_no_batch(energy)
    points = x.detach().reshape(-1, *energy.event_shape)
    with _unchanged(energy):
        together = energy(points)
        again = energy(points)
        if not _agree(together, again, torch.finfo(together.dtype).eps * _ROUNDING):
            raise ValueError(_message("evaluated twice", together, again))
        for index in range(min(_NUM_ALONE, len(points))):
            try:
                alone = energy(points[index : index + 1])
            except (ValueError, RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{_message('alone')}: {type(error).__name__}: {error}"
                ) from error
            if not _agree(together[index : index + 1], alone):
                raise ValueError(_message("alone", together[index], alone))


@contextlib.contextmanager
def _unchanged(energy: Energy) -> Iterator[None]:
    """Restore the buffers, and the random numbers, at the end."""
    before = [(buffer, buffer.clone()) for buffer in energy.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for buffer, value in before:
                if (buffer != value).any():  # writing would be noticed
                    buffer.copy_(value)


def _agree(first: Tensor, second: Tensor, tolerance: float | None = None) -> bool:
    """Whether energies are equal up to rounding, and finite at the same points."""
    is_finite = first.isfinite()
    if not is_finite.equal(second.isfinite()):
        return False
    tolerance = tolerance or torch.finfo(first.dtype).eps ** 0.5
    first, second = first[is_finite], second[is_finite]
    return bool(((first - second).abs() <= tolerance * (1 + first.abs())).all())


def _message(how: str, *values: Tensor) -> str:
    seen = " and then ".join(
        f"{value.flatten()[:_NUM_ALONE].tolist()}" for value in values
    )
    return (
        "energy must be a function of one point, the same in a batch, alone and twice; "
        f"it is another {how}{', got ' if seen else ''}{seen}. Put modules with batch "
        "norm, dropout or a spectral norm into eval mode, energy.eval(), and let "
        "nothing but x have a row for each point; what is learned is in train mode, "
        "and must do without them"
    )
