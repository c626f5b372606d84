"""Checks of the arguments of :func:`pyro_ebm.fit`."""

__all__ = [
    "require_callbacks",
    "require_counts",
    "require_cover",
    "require_model",
    "require_no_patience",
    "require_points",
    "require_weights",
]

import math
from collections.abc import Sequence
from typing import Any

import torch
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
    if len(points) < 2:
        raise ValueError(
            f"{name} must hold at least two points, got {len(points)}: nothing can be "
            "learned from fewer."
        )
    if not points.isfinite().all():
        raise ValueError(
            f"{name} must hold finite numbers; got {len(points)} points with "
            f"{int((~points.isfinite()).sum())} nan or infinite numbers. Drop those "
            "rows. Where fit chooses the estimator, and the energy is one of vectors "
            "of real numbers, or with categorical columns, nan counts as missing."
        )
    inside = energy_model.energy.support.check(points)
    if not inside.all():
        raise ValueError(
            f"{name} must lie in the support {energy_model.energy.support}; "
            f"{int((~inside).sum())} of {len(points)} points do not. Transform the "
            "data, or give the energy their support."
        )


def require_weights(weights: Any, number: int) -> Tensor:
    """Check the weights of rows.

    Args:
        weights: What was given.
        number: Of rows.

    Returns:
        Shape ``(number,)``, double.

    Raises:
        ValueError: If there is not one for each row, or one is negative or not finite,
            or fewer than two are positive.
    """
    found = torch.as_tensor(
        weights.to_numpy() if hasattr(weights, "to_numpy") else weights
    )
    if found.shape != (number,):
        raise ValueError(
            f"weights must have shape ({number},), one for each row of the data, got "
            f"{tuple(found.shape)}."
        )
    found = found.detach().double()
    is_bad = ~(found.isfinite() & (found >= 0))
    if bool(is_bad.any()):
        at = int(is_bad.nonzero()[0])
        raise ValueError(
            f"weights must be finite and not negative; {int(is_bad.sum())} are not, "
            f"the first of them {float(found[at])} at row {at}."
        )
    if int((found > 0).sum()) < 2:
        raise ValueError(
            "weights must be positive for at least two rows, got "
            f"{int((found > 0).sum())}. Leave weights out for rows that count the same."
        )
    return found


@torch.no_grad()
def require_cover(base: Any, rows: Tensor, *, awaits_base: bool) -> None:
    """Check that a base that was not fitted to the rows is somewhere near them.

    Args:
        base: Of the model.
        rows: Shape ``(N, *event)``.
        awaits_base: Whether the base is the one that stands in for one to be fitted.

    Raises:
        ValueError: If half of the rows have a density lower by 1,000 nats a number
            than all of 1,000 draws.
    """
    with torch.random.fork_rng(devices=[]):
        draws = base.sample((1000,))
    lowest = base.log_prob(draws).min()
    typical = base.log_prob(rows[:2000].to(draws)).median()
    if typical > lowest - 1000 * max(1, rows[0].numel()):
        return
    advice = "Build the EnergyModel without a base: fit then fits one"
    if awaits_base:
        advice = "Leave objective at 'auto', which fits a base"
    raise ValueError(
        f"the base of the model does not cover the data: their log density there is "
        f"{float(typical):.3g} in the median, and at least {float(lowest):.3g} at "
        f"1,000 of its draws. {advice}; or standardise the data."
    )
