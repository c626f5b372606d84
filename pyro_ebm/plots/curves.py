r"""Curves of a fit: likelihood, log Z and differences of energies."""

__all__ = [
    "energy_gap_curve",
    "generalization_gap_curve",
    "likelihood_curve",
    "log_partition_curve",
]

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_ebm.infer import FitRecord, LogLikelihood
from pyro_ebm.plots.style import axes_or_current, palette_of

#: Standard errors to each side of a 95 % interval of a mean of many.
_NUM_ERRORS = 1.96


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

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> model, data = pyro_ebm.EnergyModel(energy), torch.randn(50, 2)
        >>> settings = {"num_steps": 4, "record_interval": 2, "progress_bar": False}
        >>> result = pyro_ebm.fit(model, data, **settings)
        >>> ax = likelihood_curve(result.history)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['train', 'held out']
        >>> ax.figure.clear()
    """
    _require_records(history)
    ax = axes_or_current(ax)
    first, second = palette_of(ax)[:2]
    _curve(ax, history, [record.train for record in history], "train", first, "-")
    held_out = [r.validation for r in history if r.validation is not None]
    if len(held_out) == len(history):
        _curve(ax, history, held_out, "held out", second, "--")
    ax.set(
        xlabel="parameter step",
        ylabel="log-likelihood a point (nats)",
        title="log-likelihood of the averaged model",
    )
    ax.legend(frameon=False)
    return ax


def log_partition_curve(history: Sequence[FitRecord], ax: Any = None) -> Any:
    r"""Draw the tracked :math:`\log Z` with its 95 % interval; crosses: not reliable.

    Args:
        history: Of :class:`pyro_ebm.infer.FitResult`.
        ax: Axes to draw on; default: the current ones.

    Returns:
        The axes.

    Raises:
        ValueError: If the history is empty.

    Example:
        >>> base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> energy = pyro_ebm.energies.NeuralEnergy((2,), (8,), base=base)
        >>> model, data = pyro_ebm.EnergyModel(energy, base), torch.randn(50, 2)
        >>> settings = {"num_steps": 4, "record_interval": 2, "progress_bar": False}
        >>> result = pyro_ebm.fit(model, data, **settings)
        >>> ax = log_partition_curve(result.history)
        >>> ax.get_ylabel()
        '$\\log Z$ (nats)'
        >>> ax.figure.clear()
    """
    _require_records(history)
    ax = axes_or_current(ax)
    palette = palette_of(ax)
    steps = np.array([record.step for record in history])
    estimates = [record.log_partition for record in history]
    values, lower, upper, reliable = (
        np.array([getattr(estimate, name) for estimate in estimates])
        for name in ("value", "lower", "upper", "is_reliable")
    )
    ax.plot(steps, values, color=palette.first, label="tracked")
    ax.fill_between(
        steps, lower, upper, color=palette.first, alpha=0.3, linewidth=0, label="95 %"
    )
    if not reliable.all():
        style = {"color": palette.second, "linestyle": "none", "marker": "x"}
        ax.plot(steps[~reliable], values[~reliable], label="unreliable", **style)
    ax.set(
        xlabel="parameter step",
        ylabel=r"$\log Z$ (nats)",
        title=r"$\log Z$ of the averaged model",
    )
    ax.legend(frameon=False)
    return ax


def energy_gap_curve(history: Sequence[FitRecord], ax: Any = None) -> Any:
    r"""Draw the mean energy of training points less that of the model's own draws.

    It is zero where likelihood has no slope left: above, training points are less
    likely than they should be, below, more. Records without the number are left out;
    the band is 1.96 standard errors to each side.

    Args:
        history: Of :class:`pyro_ebm.infer.FitResult`; of each record ``energy_gap``.
        ax: Axes to draw on; default: the current ones.

    Returns:
        The axes.

    Raises:
        ValueError: If the history is empty, or no record has an energy gap.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> model, data = pyro_ebm.EnergyModel(energy), torch.randn(50, 2)
        >>> settings = {"num_steps": 4, "record_interval": 2, "progress_bar": False}
        >>> result = pyro_ebm.fit(model, data, **settings)
        >>> ax = energy_gap_curve(result.history)
        >>> ax.lines[-1].get_xdata().tolist(), ax.get_ylabel()
        ([0, 2, 4], 'training minus model energy (nats)')
        >>> ax.figure.clear()
    """
    _require_records(history)
    gaps = [(r.step, getattr(r, "energy_gap", None)) for r in history]
    known = [(step, gap) for step, gap in gaps if gap is not None]
    if not known:
        raise ValueError(
            f"history must have an energy gap in some record, and none of {len(gaps)} "
            "has one: log Z was never known. See log_partition_curve."
        )
    ax = axes_or_current(ax)
    steps = [step for step, _ in known]
    values = np.array([gap.value for _, gap in known])
    half = _NUM_ERRORS * np.array([gap.std_error for _, gap in known])
    _around_zero(ax, steps, values, half)
    ax.set(ylabel="training minus model energy (nats)", title="energy gap")
    return ax


def generalization_gap_curve(history: Sequence[FitRecord], ax: Any = None) -> Any:
    r"""Draw how much higher the energy is at held-out points than at training points.

    The difference of their log-likelihoods, from which :math:`\log Z` cancels: where it
    grows the energy learns the training points by heart, and no error in
    :math:`\log Z` can feign or hide that. The band is 1.96 standard errors to each
    side, from the finite number of points.

    Args:
        history: Of :class:`pyro_ebm.infer.FitResult`, with validation data.
        ax: Axes to draw on; default: the current ones.

    Returns:
        The axes.

    Raises:
        ValueError: If the history is empty or has no held-out points.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> model, data = pyro_ebm.EnergyModel(energy), torch.randn(50, 2)
        >>> settings = {"num_steps": 4, "record_interval": 2, "progress_bar": False}
        >>> held_out = torch.randn(50, 2)
        >>> result = pyro_ebm.fit(model, data, validation_data=held_out, **settings)
        >>> ax = generalization_gap_curve(result.history)
        >>> ax.get_ylabel()
        'held-out minus training energy (nats)'
        >>> ax.figure.clear()
    """
    _require_records(history)
    pairs = [(r.train, r.validation) for r in history if r.validation is not None]
    if len(pairs) < len(history):
        raise ValueError(
            "history must have a validation log-likelihood in each record, and "
            f"{len(history) - len(pairs)} of {len(history)} have none. Fit with "
            "validation_data."
        )
    ax = axes_or_current(ax)
    gap = np.array([train.value - held.value for train, held in pairs])
    errors = [np.hypot(t.std_error_data, h.std_error_data) for t, h in pairs]
    _around_zero(ax, [r.step for r in history], gap, _NUM_ERRORS * np.array(errors))
    ax.set(ylabel="held-out minus training energy (nats)", title="generalization gap")
    return ax


def _around_zero(ax: Any, steps: Sequence[int], values: Any, half: Any) -> None:
    """A curve with a band, and a line at zero."""
    palette = palette_of(ax)
    ax.axhline(0.0, color=palette.faint, linewidth=0.8)
    ax.plot(steps, values, color=palette.first)
    _band(ax, steps, values, half, palette.first, 0.3)
    ax.set_xlabel("parameter step")


def _require_records(history: Sequence[FitRecord]) -> None:
    if not history:
        raise ValueError(
            "history must hold at least one record, got none. Fit with num_steps of at "
            "least record_interval."
        )


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
    errors = np.array([value.std_error_data for value in values])
    ax.plot(steps, middle, style, color=color, label=label)
    _band(ax, steps, middle, np.hypot(dark, _NUM_ERRORS * errors), color, 0.15)
    _band(ax, steps, middle, dark, color, 0.35)


def _band(
    ax: Any, x: Sequence[float], middle: Any, half: Any, color: str, alpha: float
) -> None:
    ax.fill_between(
        x, middle - half, middle + half, color=color, alpha=alpha, linewidth=0
    )
