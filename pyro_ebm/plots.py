r"""Pictures of a density in the plane and of a likelihood curve, on matplotlib axes.

A leaf that nothing in the library imports. Colours are those of Okabe & Ito and the map
``cividis``, which stay apart under the common kinds of colour blindness.
"""

__all__ = ["density", "likelihood_curve"]

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.infer import FitRecord, LogLikelihood

try:
    import matplotlib.pyplot as plt
except ImportError as error:
    raise ImportError(
        "pyro_ebm.plots needs matplotlib: pip install 'pyro-ebm[plots]'"
    ) from error

_BLUE, _VERMILLION = "#0072B2", "#D55E00"


@torch.no_grad()
def density(
    distribution: Any,
    bounds: Sequence[tuple[float, float]],
    ax: Any = None,
    *,
    log: bool = False,
    num_points: int = 200,
    data: Tensor | None = None,
    samples: Tensor | None = None,
) -> Any:
    r"""Draw the density of a distribution over the plane as an image.

    Args:
        distribution: Any Pyro distribution with event shape ``(2,)``.
        bounds: ``(low, high)`` of each coordinate.
        ax: Axes to draw on; default: the current ones.
        log: Show :math:`\log q`, down to 10 nats below its peak, instead of :math:`q`.
        num_points: Points of the grid a side.
        data: Points of shape ``(N, 2)``, drawn over the image.
        samples: Draws of shape ``(N, 2)``, in another colour and marker.

    Returns:
        The axes.

    Exactness: as exact as ``distribution.log_prob``.

    Raises:
        ValueError: If the event is not a vector of two numbers, or ``bounds`` are not
            two intervals.
    """
    if tuple(distribution.event_shape) != (2,):
        raise ValueError(
            "distribution must have event_shape (2,) to be drawn in the plane, got "
            f"{tuple(distribution.event_shape)}."
        )
    if len(bounds) != 2 or not all(low < high for low, high in bounds):
        raise ValueError(
            f"bounds must be two intervals (low, high) with low < high, got {bounds}."
        )
    ax = plt.gca() if ax is None else ax
    axes = [torch.linspace(low, high, num_points) for low, high in bounds]
    log_prob = distribution.log_prob(torch.cartesian_prod(*axes))
    log_prob = log_prob.reshape(num_points, num_points).T.cpu().numpy()
    ax.imshow(
        log_prob if log else np.exp(log_prob),
        origin="lower",
        extent=[*bounds[0], *bounds[1]],
        aspect="auto",
        cmap="cividis",
        vmin=log_prob.max() - 10 if log else 0.0,
        interpolation="bilinear",
    )
    for points, style in ((data, "wo"), (samples, "y+")):
        if points is not None:
            ax.plot(*points.cpu().numpy().T, style, markersize=2, alpha=0.5)
    ax.set(xlim=bounds[0], ylim=bounds[1])
    return ax


def likelihood_curve(history: Sequence[FitRecord], ax: Any = None) -> Any:
    r"""Draw train and held-out log-likelihood against the parameter step.

    The dark band is what :math:`\log Z` leaves open, its 95 % interval; the light one
    adds that the points are a finite sample, by 1.96 standard errors to each side.

    Args:
        history: Of :class:`pyro_ebm.infer.FitResult`; its validation may be ``None``.
        ax: Axes to draw on; default: the current ones.

    Returns:
        The axes.

    Raises:
        ValueError: If the history is empty.
    """
    if not history:
        raise ValueError(
            "history must hold at least one record, got none. Fit with num_steps of at "
            "least record_interval."
        )
    ax = plt.gca() if ax is None else ax
    _curve(ax, history, [record.train for record in history], "train", _BLUE, "-")
    held_out = [r.validation for r in history if r.validation is not None]
    if len(held_out) == len(history):
        _curve(ax, history, held_out, "held out", _VERMILLION, "--")
    ax.set(xlabel="parameter step", ylabel="log-likelihood a point (nats)")
    ax.legend(frameon=False)
    return ax


def _curve(
    ax: Any,
    history: Sequence[FitRecord],
    values: Sequence[LogLikelihood],
    label: str,
    color: str,
    style: str,
) -> None:
    steps = [record.step for record in history]
    middle = np.array([value.value for value in values])
    estimates = [record.log_partition for record in history]
    dark = np.array([(estimate.upper - estimate.lower) / 2 for estimate in estimates])
    light = np.hypot(dark, 1.96 * np.array([value.std_error_data for value in values]))
    ax.plot(steps, middle, style, color=color, label=label)
    for half, alpha in ((light, 0.15), (dark, 0.35)):
        ax.fill_between(
            steps, middle - half, middle + half, color=color, alpha=alpha, linewidth=0
        )
