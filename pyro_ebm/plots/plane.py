r"""Plots of densities and energies over the plane."""

__all__ = ["density", "energy_landscape", "product_panels"]

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from pyro_ebm.distributions import ProductOfExperts
from pyro_ebm.energies import Energy
from pyro_ebm.plots.style import axes_or_current, palette_of

#: Depth of an image of log density below its peak, in nats.
_DEPTH = 10.0
#: Chains that are drawn, and arrows a side.
_MAX_CHAINS = 20
_NUM_ARROWS = 16
#: Points over an image: marker and fill, all with a dark edge to stand out anywhere.
_DATA = {"marker": "o", "markerfacecolor": "white"}
_SAMPLES = {"marker": "D", "markerfacecolor": "#E69F00"}

Bounds = Sequence[tuple[float, float]]


@torch.no_grad()
def density(
    distribution: Any,
    bounds: Bounds,
    ax: Any = None,
    *,
    log: bool = False,
    num_points: int = 200,
    data: Tensor | None = None,
    samples: Tensor | None = None,
    colorbar: bool = False,
) -> Any:
    r"""Draw the density of a distribution over the plane as an image.

    Args:
        distribution: Any Pyro distribution with event shape ``(2,)``. Outside of its
            support the image is empty.
        bounds: ``(low, high)`` of each coordinate.
        ax: Axes to draw on; default: the current ones.
        log: Show :math:`\log q`, down to 10 nats below its peak, instead of :math:`q`.
        num_points: Points of the grid a side.
        data: Points of shape ``(N, 2)``, drawn over the image as circles.
        samples: Draws of shape ``(N, 2)``, drawn as diamonds in another colour.
        colorbar: Whether to show the scale beside the image.

    Returns:
        The axes.

    Raises:
        ValueError: If the event is not a vector of two numbers, or ``bounds`` are not
            two intervals.

    Exactness: as exact as ``distribution.log_prob``; the title says so where the
    distribution is not normalised.

    Example:
        >>> normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> ax = density(normal, [(-3, 3), (-3, 3)], samples=normal.sample((50,)))
        >>> ax.get_xlabel(), ax.get_title()
        ('$x_1$', 'density $q(x)$')
        >>> plt.close(ax.figure)
    """
    grid = _grid("distribution", distribution, bounds, num_points)
    ax = axes_or_current(ax)
    log_prob = grid.values(distribution.log_prob, distribution.support)
    name = "log density" if log else "density"
    formula = r"$\log q(x)$" if log else "$q(x)$"
    if not getattr(distribution, "is_normalized", True):
        name, formula = f"unnormalised {name}", "$-f(x)$" if log else "$e^{-f(x)}$"
    label = f"{name} {formula}"
    image = _show(ax, grid, log_prob, log)
    if colorbar:
        unit = " (nats)" if log else ""
        ax.figure.colorbar(image, ax=ax, label=formula + unit)
    for points, kind in ((data, _DATA), (samples, _SAMPLES)):
        if points is not None:
            _dots(ax, points, kind)
    ax.set(title=label, **grid.frame)
    return ax


@torch.no_grad()
def energy_landscape(
    energy: Any,
    bounds: Bounds,
    ax: Any = None,
    *,
    max_height: float = 10.0,
    num_points: int = 120,
    gradient: bool = False,
    chains: Tensor | None = None,
    colorbar: bool = True,
) -> Any:
    r"""Draw an energy over the plane by its contours, one a nat at first.

    Args:
        energy: An :class:`~pyro_ebm.energies.Energy` with event shape ``(2,)``, or what
            has one as ``energy``: an ``EnergyDistribution``, an ``EnergyModel``.
        bounds: ``(low, high)`` of each coordinate.
        ax: Axes to draw on; default: the current ones.
        max_height: Highest contour, in nats above the lowest point of the grid.
        num_points: Points of the grid a side.
        gradient: Whether to draw arrows along :math:`-\nabla f`, where a chain is
            drawn to; long ones are cut.
        chains: Paths of chains, shape ``(C, N, 2)``, such as those of
            ``mcmc.get_samples(group_by_chain=True)``; the first 20 are drawn, each from
            its circle.
        colorbar: Whether to show the scale beside the image.

    Returns:
        The axes.

    Raises:
        TypeError: If ``energy`` is no energy and has none.
        ValueError: If the event is not a vector of two numbers, ``bounds`` are not two
            intervals, ``max_height`` is not positive or ``chains`` have another shape.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> ax = energy_landscape(energy, [(-3, 3), (-3, 3)], gradient=True)
        >>> ax.get_title()
        'energy $f(x)$ and $-\\nabla f$'
        >>> plt.close(ax.figure)
    """
    found = energy if isinstance(energy, Energy) else getattr(energy, "energy", None)
    if not isinstance(found, Energy):
        raise TypeError(
            f"energy must be an Energy or have one, got {type(energy).__name__}. Of a "
            "Pyro distribution take pyro_ebm.energies.DistributionEnergy."
        )
    if not max_height > 0:
        raise ValueError(f"max_height must be positive, in nats, got {max_height}.")
    if chains is not None and (chains.dim() != 3 or chains.shape[-1] != 2):
        raise ValueError(
            f"chains must have shape (C, N, 2), got {tuple(chains.shape)}. A single "
            "chain is chain[None]."
        )
    grid = _grid("energy", found, bounds, num_points)
    ax = axes_or_current(ax)
    _contours(ax, grid, grid.values(found, found.support), max_height, colorbar)
    title = "energy $f(x)$"
    if gradient:
        _arrows(ax, _grid("energy", found, bounds, _NUM_ARROWS, inset=True), found)
        title += r" and $-\nabla f$"
    if chains is not None:
        _paths(ax, chains[:_MAX_CHAINS])
        title += f", {min(len(chains), _MAX_CHAINS)} chains"
    ax.set(title=title, **grid.frame)
    return ax


@torch.no_grad()
def product_panels(
    product: ProductOfExperts,
    bounds: Bounds,
    axes: Any = None,
    *,
    log: bool = False,
    num_points: int = 150,
    samples: Tensor | None = None,
    titles: Sequence[str] | None = None,
) -> Any:
    r"""Draw the factors of a product and the product side by side.

    Each panel shows :math:`e^{-w_k f_k}` on a scale of its own, from 0 to its peak.

    Args:
        product: Over the plane, event shape ``(2,)``.
        bounds: ``(low, high)`` of each coordinate.
        axes: As many as there are factors, and one; default: a new figure with them.
        log: Show logarithms, down to 10 nats below each peak.
        num_points: Points of the grid a side.
        samples: Draws of the product, shape ``(N, 2)``, drawn over it.
        titles: Of the factors; default: their formulas.

    Returns:
        The axes, an array.

    Raises:
        TypeError: If ``product`` is no ``ProductOfExperts``.
        ValueError: If the event is not a vector of two numbers, ``bounds`` are not two
            intervals, or axes or titles are too many or too few.

    Example:
        >>> p = dist.Normal(torch.zeros(2), torch.tensor([0.5, 2.0])).to_event(1)
        >>> q = dist.Normal(torch.zeros(2), torch.tensor([2.0, 0.5])).to_event(1)
        >>> product = pyro_ebm.distributions.ProductOfExperts([p, q])
        >>> axes = product_panels(product, [(-3, 3), (-3, 3)], titles=["thin", "flat"])
        >>> [ax.get_title() for ax in axes]
        ['thin', '$\\times$ flat', '$=$ product']
        >>> plt.close(axes[0].figure)
    """
    if not isinstance(product, ProductOfExperts):
        raise TypeError(
            f"product must be a ProductOfExperts, got {type(product).__name__}. "
            "p * q is one, for an EnergyDistribution p."
        )
    terms = product.terms
    grid = _grid("product", product, bounds, num_points)
    axes = _panels(axes, len(terms) + 1)
    names = [_formula(term) for term in terms] if titles is None else list(titles)
    if len(names) != len(terms):
        raise ValueError(f"titles must be {len(terms)}, one a factor, got {names}.")
    for k, (ax, term) in enumerate(zip(axes, terms, strict=False)):
        weight = float(term.weight)
        energies = grid.values(term.energy, product.support)
        _show(ax, grid, -weight * energies, log, is_scaled=True)
        ax.set(title=("$\\times$ " if k else "") + names[k], **grid.frame)
    energies = grid.values(product.energy, product.support)
    _show(axes[-1], grid, -energies, log, is_scaled=True)
    if samples is not None:
        _dots(axes[-1], samples, _SAMPLES)
    axes[-1].set(title="$=$ product", **grid.frame)
    for ax in axes[1:]:
        ax.set_ylabel("")
    return axes


def _panels(axes: Any, count: int) -> Any:
    if axes is None:
        size = (3.2 * count, 3.4)
        _, axes = plt.subplots(1, count, figsize=size, layout="constrained")
    axes = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
    if len(axes) != count:
        raise ValueError(
            f"axes must be {count}, one a factor and one for the product, got "
            f"{len(axes)}."
        )
    return axes


class _Grid(NamedTuple):
    """A grid of points over the plane."""

    x: Tensor  # (N,)
    y: Tensor  # (N,)
    points: Tensor  # (N * N, 2)
    frame: dict[str, Any]  # limits and labels of the axes

    def values(self, fn: Callable[[Tensor], Tensor], support: Any) -> Any:
        """The function at the points, rows along y; ``nan`` outside of the support."""
        inside = support.check(self.points)
        values = self.points.new_full((len(self.points),), torch.nan)
        values[inside] = fn(self.points[inside]).to(values)
        return values.reshape(len(self.x), len(self.y)).T.double().cpu().numpy()


def _grid(
    name: str,
    target: Any,
    bounds: Bounds,
    num_points: int,
    inset: bool = False,  # noqa: FBT001, FBT002
) -> _Grid:
    if tuple(target.event_shape) != (2,):
        raise ValueError(
            f"{name} must have event_shape (2,) to be drawn in the plane, got "
            f"{tuple(target.event_shape)}."
        )
    if len(bounds) != 2 or not all(low < high for low, high in bounds):
        raise ValueError(
            f"bounds must be two intervals (low, high) with low < high, got {bounds}."
        )
    margins = [(high - low) / 2 / num_points * inset for low, high in bounds]
    x, y = (
        torch.linspace(low + margin, high - margin, num_points, **_options(target))
        for (low, high), margin in zip(bounds, margins, strict=True)
    )
    frame = {
        "xlim": tuple(bounds[0]),
        "ylim": tuple(bounds[1]),
        "xlabel": "$x_1$",
        "ylabel": "$x_2$",
    }
    return _Grid(x, y, torch.cartesian_prod(x, y), frame)


def _options(target: Any) -> dict[str, Any]:
    """Type and device of the tensors behind an energy or a distribution."""
    while not isinstance(target, Energy):
        inner = getattr(target, "energy", getattr(target, "base_dist", None))
        if inner is None:
            tensors = [v for v in vars(target).values() if isinstance(v, Tensor)]
            like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
            return {"dtype": like.dtype, "device": like.device}
        target = inner
    return target.tensor_options()


def _show(
    ax: Any,
    grid: _Grid,
    log_values: Any,
    log: bool,  # noqa: FBT001
    is_scaled: bool = False,  # noqa: FBT001, FBT002
) -> Any:
    """An image of a density, given its logarithm."""
    peak = np.nanmax(log_values, initial=-np.inf, where=log_values < np.inf)
    shift = peak if is_scaled else 0.0
    low = peak - _DEPTH
    image = np.maximum(log_values, low) if log else np.exp(log_values - shift)
    return ax.imshow(
        image - shift if log else image,
        origin="lower",
        extent=[*grid.frame["xlim"], *grid.frame["ylim"]],
        aspect="auto",
        cmap=palette_of(ax).color_map,
        vmin=low - shift if log else 0.0,
        interpolation="bilinear",
    )


def _dots(ax: Any, points: Tensor, kind: dict[str, str]) -> None:
    """Points over an image."""
    x, y = points.detach().cpu().numpy().T
    edge = {"markeredgecolor": "#15181C", "markeredgewidth": 0.4, "markersize": 2.7}
    ax.plot(x, y, linestyle="none", alpha=0.9, **kind, **edge)


def _contours(
    ax: Any,
    grid: _Grid,
    values: Any,
    max_height: float,
    colorbar: bool,  # noqa: FBT001
) -> None:
    finite = np.ma.masked_invalid(values)
    height = np.minimum(finite - finite.min(), 2 * max_height)
    x, y = grid.x.cpu().numpy(), grid.y.cpu().numpy()
    levels = np.linspace(0.0, max_height, 11)
    reverse = f"{palette_of(ax).color_map}_r"
    filled = ax.contourf(
        x, y, height, levels, cmap=reverse, extend="max", antialiased=True
    )
    ax.contour(x, y, height, levels, colors="#15181C", linewidths=0.3, alpha=0.6)
    if colorbar:
        label = r"$f(x) - \min f$ (nats)"
        ax.figure.colorbar(filled, ax=ax, label=label)


def _arrows(ax: Any, grid: _Grid, energy: Energy) -> None:
    points = grid.points[energy.support.check(grid.points)]
    _, grad = energy.value_and_grad(points)
    length = grad.norm(dim=-1, keepdim=True)
    # Short where the gradient is, and of one length where it is long.
    force = -grad / (length + length[length.isfinite()].median())
    ax.quiver(
        *points.double().cpu().numpy().T,
        *force.double().cpu().numpy().T,
        angles="xy",
        pivot="mid",
        scale=1.05 * _NUM_ARROWS,
        width=0.008,
        headwidth=3.5,
        headlength=3.5,
        headaxislength=3.0,
        minlength=0.5,
        color="white",
        edgecolor="#15181C",
        linewidth=0.5,
    )


def _paths(ax: Any, chains: Tensor) -> None:
    for path in chains.detach().cpu().numpy():
        (line,) = ax.plot(*path.T, color="#15181C", linewidth=2.0, alpha=0.5)
        ax.plot(*path.T, color="white", linewidth=0.9, zorder=line.get_zorder())
        _dots(ax, torch.as_tensor(path[:1]), {**_SAMPLES, "marker": "o"})
        ax.lines[-1].set_markersize(5)


def _formula(term: Any) -> str:
    weight = float(term.weight)
    power = "" if weight == 1 else f" ** {weight:.3g}"
    # Of what wraps an energy, its kind is enough for a title.
    is_own = hasattr(term.expert, "energy")
    name = type(term.energy).__name__ if is_own else term.name
    return "\n".join(textwrap.wrap(name + power, 30, break_long_words=False))
