"""Checks of the arguments of :func:`pyro_ebm.fit`."""

__all__ = [
    "require_callbacks",
    "require_counts",
    "require_model",
    "require_no_patience",
]

import math
from collections.abc import Sequence
from typing import Any

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
