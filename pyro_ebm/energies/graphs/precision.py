"""Replay recorded operators in double precision.

Constants and live tensors of single precision are converted first, so that what follows
from them, such as the normalising constant of a prior, is rounded to double only. Types
that operators were given are replaced, and so are the limits of single precision that
bijections clamp to: a sigmoid then saturates where it does in double precision.
"""

__all__ = ["in_double_precision", "is_rounded", "is_single_precision", "wide"]

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from pyro_ebm.energies.graphs.recording import Recording

_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


#: Of single precision, relative, after a good many operators.
_TOLERANCE = 1e-3


def _limits(dtype: torch.dtype) -> tuple[float, ...]:
    info = torch.finfo(dtype)
    return (info.eps, info.tiny, info.max, info.min, 1 - info.eps, info.eps - 1)


_DOUBLE_LIMITS = dict(zip(_limits(torch.float32), _limits(torch.float64), strict=True))


def is_single_precision(recording: Recording) -> bool:
    """Whether any tensor of a recording is of single precision."""
    tensors = (v for v in recording.values.values() if isinstance(v, Tensor))
    return any(tensor.dtype in _DOUBLE for tensor in tensors)


def in_double_precision(recording: Recording) -> Callable[..., Any]:
    """The function that was recorded, in double precision.

    Args:
        recording: Without operators that write into their arguments.

    Returns:
        A function of the inputs of the recording, of single or double precision.
    """
    constants = [wide(constant) for constant in recording.constants()]

    def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(_wide_setting, (args, kwargs))
        value = recording.values.get(node)
        if isinstance(value, Tensor) and value.dtype in _DOUBLE:
            args, kwargs = _promoted(node.target, args, kwargs)
        operator: Any = node.target
        return tree_map_only(Tensor, wide, operator(*args, **kwargs))

    def function(*inputs: Tensor) -> Any:
        return recording.replay(*map(wide, inputs), *constants, call=call)

    return function


def is_rounded(single: Iterable[Tensor], double: Iterable[Tensor]) -> bool:
    """Whether results of single precision are those of double precision, rounded.

    Args:
        single: Tensors with a number or more for each of some points.
        double: The same in double precision.
    """
    return all(map(_is_rounded, single, double))


def _is_rounded(single: Tensor, double: Tensor) -> bool:
    """Whether numbers agree as far as single precision can be expected to.

    By their median, as sums that nearly cancel may be far off at some points.
    """
    is_known = single.isfinite()
    if not bool(double[is_known].isfinite().all()):
        return False
    wanted = double[is_known]
    error = (single[is_known] - wanted).abs() / (1 + wanted.abs())
    return not error.numel() or bool(error.median() < _TOLERANCE)


def _promoted(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with which integers alone give a result of double precision."""
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if any(t.is_floating_point() or t.is_complex() for t in tensors):
        return args, kwargs
    names = [argument.name for argument in operator._schema.arguments]
    if not tensors and "dtype" in names:  # else torch's default decides
        kwargs = {**kwargs, "dtype": torch.float64}
    return tree_map_only(Tensor, _from_integer, (args, kwargs))


def _from_integer(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.bool else tensor.double()


def wide(tensor: Tensor) -> Tensor:
    """A tensor of single precision in double precision; others as they are."""
    dtype = _DOUBLE.get(tensor.dtype)
    return tensor if dtype is None else tensor.to(dtype)


def _wide_setting(setting: Any) -> Any:
    """A type or a number among the arguments of an operator."""
    if isinstance(setting, torch.dtype):
        return _DOUBLE.get(setting, setting)
    if isinstance(setting, float):
        return _DOUBLE_LIMITS.get(setting, setting)
    return setting
