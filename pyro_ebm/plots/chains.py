r"""Trace, rank and autocorrelation plots of many chains.

For a handful of chains ArviZ has these and more, from ``mcmc.to_arviz()``: there each
chain has a line or a panel of its own, which no one can read of hundreds.

References:
    Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), Bayesian Analysis 16(2),
    667-718 (rank plots).
"""

__all__ = ["autocorrelation", "rank", "trace"]

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ebm.mcmc import MCMC
from pyro_ebm.plots.style import axes_or_current, palette_of

#: More chains than this are drawn as bands, and ranked in groups.
_MANY = 8
_NUM_BINS = 20
_NUM_THIN = 3


def trace(
    draws: "MCMC | Tensor", ax: Any = None, *, site: str | None = None, index: Any = ()
) -> Any:
    """Draw a coordinate of all chains against the number of the draw.

    Of more than 8 chains the median over chains, the bands that hold 50 and 90 % of
    them, and three single chains. Bands that drift or narrow have not mixed.

    Args:
        draws: A run that has kept its draws, or a tensor of shape ``(C, N, *event)``,
            such as the draws of :class:`~pyro_ebm.mcmc.ReplicaExchange`.
        ax: Axes to draw on; default: the current ones.
        site: Of a Pyro model; needed where it has several.
        index: Of the coordinate in the site: a number, or one a dimension.

    Returns:
        The axes.

    Raises:
        RuntimeError: If nothing was run, or the draws were not kept.
        ValueError: If the site is missing or unknown, or the index does not fit.

    Example:
        >>> ax = trace(torch.randn(256, 50, 2), index=1)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('draw of each chain', 'x[1]')
        >>> ax.figure.clear()
    """
    chosen = _choose(draws, site, index)
    ax = axes_or_current(ax)
    palette = palette_of(ax)
    rows = chosen.rows.numpy()
    number = np.arange(1, rows.shape[1] + 1)
    if len(rows) <= _MANY:
        for k, row in enumerate(rows):
            ax.plot(number, row, color=palette[k % 4], linewidth=0.8, alpha=0.8)
    else:
        _fan(ax, number, rows)
    ax.set(
        xlabel="draw of each chain",
        ylabel=chosen.name,
        title=f"{len(rows):,} chains of {rows.shape[1]:,} draws",
        xlim=(1, max(rows.shape[1], 2)),
    )
    return ax


def rank(
    draws: "MCMC | Tensor", ax: Any = None, *, site: str | None = None, index: Any = ()
) -> Any:
    """Draw how the ranks of each group of chains are spread over all ranks.

    Groups are the superchains of a run, or up to 8 sets of neighbouring chains; few
    chains stand for themselves. Where all have mixed, each has its share in each bin,
    the line at 1. A group that stays low or high, or at the edges, has not.

    Args:
        draws: See :func:`trace`, as all that follow, and their errors.
        ax: Axes to draw on; default: the current ones.
        site: Of a Pyro model.
        index: Of the coordinate.

    Returns:
        The axes.

    Raises:
        RuntimeError: See :func:`trace`.
        ValueError: See :func:`trace`.

    Example:
        >>> ax = rank(torch.randn(4, 250))  # chains that agree stay near the line at 1
        >>> ax.get_title()
        'ranks of x, 4 groups of chains'
        >>> ax.figure.clear()
    """
    chosen = _choose(draws, site, index)
    ax = axes_or_current(ax)
    palette = palette_of(ax)
    rows, num_groups = chosen.rows, chosen.num_groups
    order = rows.flatten().argsort(stable=True).argsort().reshape(rows.shape)
    bins = order * _NUM_BINS // order.numel()
    edges = np.linspace(0, 1, _NUM_BINS + 1)
    ax.axhline(1.0, color=palette.faint, linewidth=0.8)
    width = 1.2 if num_groups <= _MANY else 0.7
    for k, group in enumerate(bins.tensor_split(num_groups)):
        counts = group.flatten().bincount(minlength=_NUM_BINS)
        share = (counts / group.numel() * _NUM_BINS).numpy()
        look = {"color": palette[k % 4], "linewidth": width, "alpha": 0.85}
        ax.stairs(share, edges, baseline=None, **look)
    ax.set(
        xlabel="rank among all draws (fraction)",
        ylabel="share relative to equal shares",
        title=f"ranks of {chosen.name}, {num_groups} groups of chains",
        xlim=(0, 1),
    )
    ax.set_ylim(0, max(2.0, ax.get_ylim()[1]))
    return ax


def autocorrelation(
    draws: "MCMC | Tensor",
    ax: Any = None,
    *,
    site: str | None = None,
    index: Any = (),
    max_lag: int | None = None,
) -> Any:
    r"""Draw the autocorrelation over all chains together.

    Deviations are taken from the mean of all chains, so that chains which differ never
    fall to zero, and short chains are not biased by a mean of their own. The band is
    :math:`\pm 1.96 / \sqrt{C N}`, what independent draws would show.

    Args:
        draws: See :func:`trace`, with its errors.
        ax: Axes to draw on; default: the current ones.
        site: Of a Pyro model.
        index: Of the coordinate.
        max_lag: Last lag; default: half the draws of a chain, at most 100.

    Returns:
        The axes.

    Raises:
        RuntimeError: See :func:`trace`.
        ValueError: See :func:`trace`; or if ``max_lag`` is not between 1 and the draws
            of a chain less one.

    Example:
        >>> ax = autocorrelation(torch.randn(8, 100), max_lag=5)
        >>> values = ax.lines[-1].get_ydata().tolist()  # of lags 0 to 5
        >>> round(values[0], 6), max(map(abs, values[1:])) < 0.2
        (1.0, True)
        >>> ax.figure.clear()
    """
    chosen = _choose(draws, site, index)
    rows = chosen.rows - chosen.rows.mean()
    length = rows.shape[1]
    max_lag = min(100, length // 2) if max_lag is None else max_lag
    if not 0 < max_lag < length:
        raise ValueError(
            f"max_lag must be between 1 and {length - 1}, the draws of a chain less "
            f"one, got {max_lag}."
        )
    variance = rows.square().mean()
    rho = [(rows[:, t:] * rows[:, : length - t]).mean() for t in range(max_lag + 1)]
    values = (torch.stack(rho) / variance).numpy()
    ax = axes_or_current(ax)
    palette = palette_of(ax)
    half = 1.96 / rows.numel() ** 0.5
    ax.axhspan(-half, half, color=palette.faint, alpha=0.3, linewidth=0)
    ax.vlines(range(max_lag + 1), 0, values, color=palette.first, alpha=0.6)
    ax.plot(range(max_lag + 1), values, ".", color=palette.first, markersize=4)
    ax.set(
        xlabel="lag (draws)",
        ylabel=f"autocorrelation of {chosen.name}",
        title=f"autocorrelation over {len(rows):,} chains",
    )
    return ax


class _Chosen(NamedTuple):
    """A coordinate of all chains."""

    name: str
    rows: Tensor  # (C, N), double precision, on the CPU
    num_groups: int


def _choose(draws: Any, site: str | None, index: Any) -> _Chosen:
    num_groups = 0
    if isinstance(draws, MCMC):
        found = draws.diagnostics()
        num_groups = found.num_superchains if found.is_nested else 0
        draws = draws.get_samples(group_by_chain=True)
    if isinstance(draws, dict):
        site = next(iter(draws)) if site is None and len(draws) == 1 else site
        if site not in draws:
            raise ValueError(f"site must be one of {sorted(draws)}, got {site!r}.")
        draws = draws[site]
    if not isinstance(draws, Tensor) or draws.dim() < 2:
        raise ValueError(
            "draws must be an MCMC that was run or a tensor of shape (C, N, *event), "
            f"got {tuple(draws.shape) if isinstance(draws, Tensor) else type(draws)}."
        )
    index = index if isinstance(index, tuple) else (index,)
    event = tuple(draws.shape[2:])
    fits = len(index) == len(event) and all(
        -size <= k < size for k, size in zip(index, event, strict=True)
    )
    if not fits:
        raise ValueError(
            f"index must name one coordinate of the event shape {event}, got {index}."
        )
    rows = draws[(slice(None), slice(None), *index)].detach().double().cpu()
    name = ("x" if site is None else site) + (
        f"[{', '.join(map(str, index))}]" if index else ""
    )
    few = len(rows) if len(rows) <= _MANY else _MANY
    return _Chosen(name, rows, num_groups or few)


def _fan(ax: Any, number: Any, rows: Any) -> None:
    palette = palette_of(ax)
    low, left, middle, right, high = np.quantile(
        rows, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0
    )
    for k in np.linspace(0, len(rows) - 1, _NUM_THIN).astype(int):
        ax.plot(number, rows[k], color=palette.second, linewidth=0.6, alpha=0.7)
    for below, above, alpha, label in (
        (low, high, 0.2, "90 % of the chains"),
        (left, right, 0.35, "50 %"),
    ):
        band = {"color": palette.first, "alpha": alpha, "linewidth": 0}
        ax.fill_between(number, below, above, label=label, **band)
    ax.plot(number, middle, color=palette.first, label="median")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.12 * (top - bottom))  # room for the legend
    ax.legend(frameon=False, ncols=3, fontsize="small", loc="upper right")
