"""The common style of all plots, light or dark.

Lines take the colours of Okabe & Ito, images the map ``cividis``; both stay readable
under the common kinds of colour blindness. Of the former the darker ones stand on a
light background and the lighter ones on a dark one, which each function reads off the
axes it draws on.

References:
    Okabe & Ito (2008), Color universal design. Nunez, Anderton & Renslow (2018),
    PLoS ONE 13(7), e0199239 (cividis).
"""

__all__ = ["axes_or_current", "palette_of", "style"]

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

try:
    import matplotlib.pyplot as plt
    from cycler import cycler
    from matplotlib.colors import to_rgba
except ImportError as error:
    raise ImportError(
        "pyro_ebm.plots needs matplotlib: pip install 'pyro-ebm[plots]'"
    ) from error


class _Palette(NamedTuple):
    """Colours of lines and text on one background."""

    first: str
    second: str
    third: str
    fourth: str
    text: str
    faint: str
    background: str

    @property
    def color_map(self) -> str:
        """Of all images; it rises in lightness throughout."""
        return "cividis"


_PALETTES = {
    "light": _Palette(
        "#0072B2", "#D55E00", "#009E73", "#B5608F", "#22262B", "#8A9099", "#FFFFFF"
    ),
    "dark": _Palette(
        "#56B4E9", "#E69F00", "#1FBF92", "#D98CB8", "#DDE1E6", "#858C95", "#15181C"
    ),
}
_COMMON = {
    "axes.grid": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
    "savefig.facecolor": "auto",
}


@contextmanager
def style(mode: Literal["light", "dark"] = "light") -> Iterator[None]:
    """Context that applies the style and restores matplotlib's settings afterwards.

    Figures keep the look they were made in, so that saving them may come later.

    Args:
        mode: Background.

    Raises:
        ValueError: If ``mode`` is neither.

    Example:
        >>> with style("dark"):
        ...     figure, ax = plt.subplots()
        >>> palette_of(ax).first
        '#56B4E9'
        >>> plt.close(figure)
    """
    if mode not in _PALETTES:
        raise ValueError(f'mode must be "light" or "dark", got {mode!r}.')
    palette = _PALETTES[mode]
    settings: Any = dict(_COMMON)
    settings["axes.prop_cycle"] = cycler(color=palette[:4])
    settings["image.cmap"] = palette.color_map
    for name in ("axes.facecolor", "figure.facecolor"):
        settings[name] = palette.background
    for name in (
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "text.color",
        "xtick.color",
        "ytick.color",
    ):
        settings[name] = palette.text
    with plt.rc_context(settings):
        yield


def palette_of(ax: Any) -> _Palette:
    """The colours that stand out from the background of some axes."""
    face = to_rgba(ax.get_facecolor())
    if face[3] < 0.5:  # transparent: what lies behind decides
        face = to_rgba(ax.figure.get_facecolor())
    lightness = 0.2126 * face[0] + 0.7152 * face[1] + 0.0722 * face[2]
    return _PALETTES["dark" if lightness < 0.5 and face[3] > 0.5 else "light"]


def axes_or_current(ax: Any) -> Any:
    """The axes, or matplotlib's current ones for ``None``."""
    return plt.gca() if ax is None else ax
