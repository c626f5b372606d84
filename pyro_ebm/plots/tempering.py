r"""Plots of tempering: swap rates, round trips and log Z by temperature."""

__all__ = ["ladder", "round_trips", "thermodynamic_curve"]

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from pyro_ebm.mcmc.tempering.tempered_draws import TemperedDraws
from pyro_ebm.partition import ThermodynamicCurve
from pyro_ebm.plots.style import axes_or_current, palette_of

#: Temperatures that get a label of their own.
_MAX_LABELS = 9


def ladder(found: TemperedDraws, ax: Any = None) -> Any:
    r"""Draw swap and acceptance rates along the ladder of temperatures.

    Swap rates should be about equal, and none near zero: there the ladder is cut.

    Args:
        found: What :meth:`pyro_ebm.mcmc.ReplicaExchange.run` returned.
        ax: Axes to draw on; default: the current ones.

    Returns:
        The axes. The title holds the communication barrier :math:`\Lambda`.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> base = dist.Normal(torch.zeros(1), 3.0).to_event(1)
        >>> exchange = pyro_ebm.mcmc.ReplicaExchange(base, num_temperatures=4)
        >>> found = exchange.run(energy, 20)
        >>> ax = ladder(found)
        >>> len(ax.patches)  # a bar for each pair of neighbours
        3
        >>> plt.close(ax.figure)
    """
    ax = axes_or_current(ax)
    palette = palette_of(ax)
    betas = found.inverse_temperatures.double().cpu().numpy()
    rungs = np.arange(len(betas))
    swaps = found.swap_rates.double().cpu().numpy()
    accepted = found.accept_prob.double().cpu().numpy()
    between = rungs[:-1] + 0.5
    ax.bar(between, swaps, 0.7, color=palette.first, alpha=0.6, label="swaps")
    style = {"color": palette.second, "marker": "o", "markersize": 4, "linewidth": 1.0}
    ax.plot(rungs[1:], accepted, label="moves accepted", **style)
    shown = np.unique(np.linspace(0, len(betas) - 1, _MAX_LABELS).round().astype(int))
    ax.set_xticks(shown, [f"{betas[k]:.2g}" for k in shown])
    ax.set(
        xlabel=r"inverse temperature $\beta_k$ (0: base, 1: energy)",
        ylabel="rate",
        ylim=(0, 1.2),
        yticks=np.linspace(0, 1, 6),
        title=rf"ladder of {len(betas)} temperatures, barrier "
        rf"$\Lambda$ = {found.barrier:.2f}",
    )
    ax.legend(frameon=False, ncols=2, loc="upper right")
    return ax


def round_trips(found: TemperedDraws, ax: Any = None) -> Any:
    """Draw how many points of the base have arrived at the energy, chain by chain.

    A chain with none knows only the modes that it started in.

    Args:
        found: What :meth:`pyro_ebm.mcmc.ReplicaExchange.run` returned.
        ax: Axes to draw on; default: the current ones.

    Returns:
        The axes. The title says in how many chains none has arrived.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> base = dist.Normal(torch.zeros(1), 3.0).to_event(1)
        >>> exchange = pyro_ebm.mcmc.ReplicaExchange(base, num_temperatures=4)
        >>> ax = round_trips(exchange.run(energy, 20))
        >>> ax.get_xlabel()
        'round trips in a chain (number)'
        >>> plt.close(ax.figure)
    """
    ax = axes_or_current(ax)
    palette = palette_of(ax)
    trips = found.round_trips.cpu().numpy()
    largest = int(trips.max())
    width = max(1, -(-(largest + 1) // 25))
    edges = np.arange(0, largest + width + 1, width) - 0.5
    ax.hist(trips, edges, color=palette.first, alpha=0.7, rwidth=0.9)
    mean = trips.mean()
    ax.axvline(mean, color=palette.second, linestyle="--", label=f"mean {mean:.3g}")
    ax.legend(frameon=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    none = int((trips == 0).sum())
    ax.set(
        xlabel="round trips in a chain (number)",
        ylabel="chains (number)",
        title=f"{int(trips.sum()):,} round trips, {none:,} of {len(trips):,} chains "
        "without one",
    )
    return ax


def thermodynamic_curve(curve: ThermodynamicCurve, axes: Any = None) -> Any:
    r"""Draw the mean energy difference, and :math:`\log Z` that comes of it.

    Left :math:`-u(\beta) = \mathbb{E}_\beta[f_0 - f]`, whose integral is
    :math:`\log Z`, on a scale that is linear around zero and logarithmic beyond;
    right the integral up to :math:`\beta`, where it is :math:`\log Z` of the tempered
    energy. Bands are 1.96 standard errors to each side; the right one counts the
    spacing of the temperatures as an error, and is wide where they are few.

    Args:
        curve: Of :func:`pyro_ebm.partition.thermodynamic_integration`, better with
            ``ess_threshold=0.9``.
        axes: Two; default: a new figure with them.

    Returns:
        The axes, an array of two.

    Raises:
        ValueError: If ``axes`` are not two.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.ones(2))
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> curve = pyro_ebm.partition.thermodynamic_integration(energy, base)
        >>> left, right = thermodynamic_curve(curve)
        >>> right.get_ylabel()
        '$\\log Z_\\beta$ (nats)'
        >>> plt.close(left.figure)
    """
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    axes = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    if len(axes) != 2:
        raise ValueError(f"axes must be two, got {len(axes)}.")
    panels = (
        (-curve.mean, curve.std_error, r"$\mathbb{E}_\beta[f_0 - f]$ (nats)"),
        (
            curve.log_partitions,
            curve.log_partitions_std_error,
            r"$\log Z_\beta$ (nats)",
        ),
    )
    betas = curve.inverse_temperatures.double().cpu().numpy()
    for ax, (mean, std_error, label) in zip(axes, panels, strict=True):
        color = palette_of(ax).first
        middle = mean.double().cpu().numpy()
        half = 1.96 * std_error.double().cpu().numpy()
        ax.plot(betas, middle, ".-", color=color, markersize=4, linewidth=1.2)
        band = {"color": color, "alpha": 0.3, "linewidth": 0}
        ax.fill_between(betas, middle - half, middle + half, **band)
        ax.set(xlabel=r"inverse temperature $\beta$ (0: base, 1: energy)", ylabel=label)
        ax.set_xlim(0, 1)
    axes[0].set_yscale("symlog", linthresh=1.0)
    axes[0].set_title("thermodynamic curve")
    value, std_error = curve.log_partitions[-1], curve.log_partitions_std_error[-1]
    axes[1].set_title(rf"$\log Z$ = {value:.3f} $\pm$ {std_error:.3f} nats")
    return axes
