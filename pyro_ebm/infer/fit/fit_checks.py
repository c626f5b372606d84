"""Checks of the arguments of :func:`pyro_ebm.fit`."""

__all__ = [
    "require_callbacks",
    "require_counts",
    "require_model",
    "require_no_patience",
    "require_points",
]

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_ebm.distributions import EnergyModel


def require_counts(**counts: int | None) -> None:
    """Check that counts are positive, where they are given.

    Raises:
        ValueError: If one is not.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")


def require_callbacks(callbacks: Any, max_grad_norm: float | None) -> None:
    """Check what is called at records, and the bound of the gradient.

    Raises:
        TypeError: If ``callbacks`` is no sequence of callables.
        ValueError: If ``max_grad_norm`` is not positive.
    """
    if not isinstance(callbacks, Sequence):
        raise TypeError(
            "callbacks must be a list of functions of a FitRecord, got "
            f"{callbacks!r}. A single one stands in a list, too."
        )
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(
                "callbacks must hold functions of a FitRecord, got "
                f"{type(callback).__name__} {callback!r}."
            )
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(
            f"max_grad_norm must be positive and finite, got {max_grad_norm}. Leave it "
            "out for gradients as they are."
        )


def require_model(energy_model: Any) -> None:
    """Check what is fitted.

    Raises:
        TypeError: If it is no :class:`~pyro_ebm.EnergyModel`.
    """
    if not isinstance(energy_model, EnergyModel):
        raise TypeError(
            f"energy_model must be an EnergyModel, got {type(energy_model).__name__}. "
            "Wrap an energy: EnergyModel(energy, base)."
        )


def require_no_patience(patience: int | None) -> None:
    """Check that nothing waits for held-out points where there are none.

    Raises:
        ValueError: If ``patience`` was given.
    """
    if patience is not None:
        raise ValueError(
            f"patience is {patience} but validation_data is None: early stopping needs "
            "held-out points. Give validation_data or leave patience out."
        )


def require_points(name: str, points: Tensor, energy_model: EnergyModel) -> None:
    """Check data.

    Args:
        name: Of the argument.
        points: What was given.
        energy_model: What is to be fitted to them.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If they have another dtype or shape, are not finite, or outside of
            the support.
    """
    event_shape = energy_model.energy.event_shape
    dtype = energy_model.energy.tensor_options()["dtype"]
    if not isinstance(points, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(points).__name__}. Convert it: "
            f"torch.as_tensor({name}, dtype={dtype})."
        )
    if points.dtype != dtype:
        raise ValueError(
            f"{name} must have the dtype {dtype} of the energy, got {points.dtype}. "
            f"Convert it: {name}.to({dtype}); or the model, by energy_model.to(dtype)."
        )
    if points.dim() != len(event_shape) + 1 or points.shape[1:] != event_shape:
        raise ValueError(
            f"{name} must have shape (N, *event), event_shape {tuple(event_shape)}, "
            f"got {tuple(points.shape)}."
        )
    if len(points) < 2 or not points.isfinite().all():
        raise ValueError(
            f"{name} must hold at least two points of finite numbers; got "
            f"{len(points)} points with {int((~points.isfinite()).sum())} nan or "
            "infinite numbers. Drop those rows."
        )
    inside = energy_model.energy.support.check(points)
    if not inside.all():
        raise ValueError(
            f"{name} must lie in the support {energy_model.energy.support}; "
            f"{int((~inside).sum())} of {len(points)} points do not. Transform the "
            "data, or give the energy their support."
        )
