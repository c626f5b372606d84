"""Checks of arguments, and those of distributions switched off for a while."""

__all__ = ["as_tensor", "expands_to", "without_validation"]

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import Distribution

#: How the names of the types of dates and durations begin.
_TIMES = ("date", "time")


@contextlib.contextmanager
def without_validation() -> Iterator[None]:
    """Run a block without the checks of Pyro and torch, at any depth.

    Pyro's own switch gives torch's default the value of Pyro's flag at its end, not the
    value that torch's had; and zuko and ``torch.compile`` switch torch's off for good
    when they are first used, which a block round them undoes.

    Example:
        >>> with without_validation():
        ...     d = dist.Normal(0.0, -1.0)
        >>> dist.Normal(0.0, -1.0)
        Traceback (most recent call last):
        ...
        ValueError: Expected parameter scale ...
    """
    before: bool = Distribution._validate_args
    try:
        with pyro.validation_enabled(is_validate=False):
            yield
    finally:
        Distribution.set_default_validate_args(before)


def expands_to(batch_shape: torch.Size, shape: torch.Size) -> bool:
    """Whether tensors of a batch shape expand to a shape."""
    try:
        return tuple(broadcast_shape(batch_shape, shape)) == tuple(shape)
    except ValueError:
        return False


def as_tensor(name: str, data: Any, **options: Any) -> Tensor:
    """Numbers as people have them, as a tensor; what is missing is ``nan``.

    Args:
        name: Of the argument.
        data: A tensor, an array, a table of pandas, or lists of numbers.
        **options: ``dtype`` and ``device`` for what is no floating-point tensor;
            default: its own.

    Returns:
        A floating-point tensor as it is, and a copy of anything else.

    Raises:
        TypeError: If it holds words, dates or anything else that is no number.

    Example:
        >>> as_tensor("x", [[1, 2.5]])
        tensor([[1.0000, 2.5000]])
    """
    if isinstance(data, Tensor):
        return data if data.is_floating_point() else data.to(**options)
    if hasattr(data, "to_numpy") or isinstance(data, np.ndarray):
        data = _numbers_of(name, data)
    try:
        return torch.tensor(data).to(**options)  # a copy: an array may be read-only
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, an array or a table of numbers, got "
            f"{type(data).__name__}: {error}."
        ) from error


def _numbers_of(name: str, data: Any) -> Any:
    """Numbers of a table or an array of objects; what is missing there is ``nan``."""
    found = data.to_numpy() if hasattr(data, "to_numpy") else data
    if found.dtype.kind not in "OUSMm":
        return found
    columns = dict(enumerate(found.T)) if found.ndim > 1 else {0: data}
    if hasattr(data, "items") and data.ndim > 1:
        columns = dict(data.items())
    dates = [k for k, column in columns.items() if str(column.dtype)[:4] in _TIMES]
    if dates:
        raise TypeError(
            f"{name} must be a tensor, an array or a table of numbers, got dates or "
            f"times in the column(s) {dates}. Count them in a unit of yours: "
            "(column - column.min()) / pandas.Timedelta(days=1)."
        )
    try:  # columns of several types, such as flags and counts, or with pandas.NA
        return _as_floats(data)
    except (TypeError, ValueError):
        words = [key for key, column in columns.items() if not _is_numeric(column)]
        raise TypeError(
            f"{name} must be a tensor, an array or a table of numbers, got words or "
            f"categories in the column(s) {words}. Number them from 0 on, as "
            "table[column].astype('category').cat.codes does, where -1 is missing, or "
            "numpy.unique(column, return_inverse=True)[1]."
        ) from None


def _as_floats(column: Any) -> Any:
    if hasattr(column, "to_numpy"):
        return column.to_numpy(dtype=float, na_value=math.nan)
    return column.astype(float)


def _is_numeric(column: Any) -> bool:
    try:
        _as_floats(column)
    except (TypeError, ValueError):
        return False
    return True
