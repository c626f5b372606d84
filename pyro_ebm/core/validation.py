"""Checks of shapes, and those of distributions switched off for a while."""

__all__ = ["expands_to", "without_validation"]

import contextlib
from collections.abc import Iterator

import pyro
import torch
from pyro.distributions.util import broadcast_shape
from torch.distributions import Distribution


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
