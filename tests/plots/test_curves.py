"""Curves of a fit, and the style of all pictures."""

import builtins
import importlib
import math
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_rgb

import pyro_ebm
from pyro_ebm import plots
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.infer import FitRecord, LogLikelihood

BOUNDS = [(-3.0, 3.0), (-2.0, 4.0)]
ESTIMATE = pyro_ebm.partition.LogPartitionEstimate(
    0.0, 0.1, -0.3, 0.3, 9.0, "ok", "walkers", 1
)


def record(step, *, validation=True):
    value = LogLikelihood(-2.0 + step / 100, 0.41, 0.4, 0.1, True)
    return FitRecord(step, 2.0, value, value if validation else None, ESTIMATE)


def test_likelihood_curve_shows_two_curves_with_bands(ax):
    history = [record(step) for step in (100, 200, 300)]
    assert plots.likelihood_curve(history, ax) is ax
    train = ax.lines[0]
    assert train.get_xdata() == pytest.approx([100, 200, 300])
    assert train.get_ydata() == pytest.approx([-1.0, 0.0, 1.0])
    outer, inner = (band.get_datalim(ax.transData) for band in ax.collections[:2])
    both = math.hypot(0.3, 1.96 * 0.4)
    assert (outer.y0, outer.y1) == pytest.approx((-1 - both, 1 + both))
    assert (inner.y0, inner.y1) == pytest.approx((-1 - 0.3, 1 + 0.3))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["train", "held out"]


def test_likelihood_curve_without_validation(ax):
    plots.likelihood_curve([record(100, validation=False)], ax)
    assert len(ax.lines) == 1


def test_likelihood_curve_of_a_fit(ax):
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    energy = pyro_ebm.energies.NeuralEnergy((2,), (4,), base=base)
    model = pyro_ebm.EnergyModel(energy, base)
    data = torch.randn(50, 2)
    result = pyro_ebm.fit(
        model,
        data,
        num_steps=4,
        record_interval=2,
        validation_data=data,
        progress_bar=False,
    )
    plots.likelihood_curve(result.history, ax)
    assert ax.lines[0].get_xdata() == pytest.approx([0, 2, 4])


def test_log_partition_curve_has_its_interval_and_marks_what_is_unreliable(ax):
    history = [record(step) for step in (100, 200, 300)]
    bad = ESTIMATE._replace(
        status=Status.UNRELIABLE, reasons=(Finding(Reason.NOT_MIXED, "why"),)
    )
    history[1] = history[1]._replace(log_partition=bad)
    assert plots.log_partition_curve(history, ax) is ax
    band = ax.collections[0].get_datalim(ax.transData)
    assert (band.y0, band.y1) == pytest.approx((-0.3, 0.3))
    assert ax.lines[0].get_ydata() == pytest.approx([0, 0, 0])
    assert ax.lines[1].get_xdata() == pytest.approx([200])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["tracked", "95 %", "unreliable"]
    assert "nats" in ax.get_ylabel()


def test_energy_gap_has_its_error_and_leaves_out_what_is_unknown(ax):
    gaps = [None, SimpleNamespace(value=0.5, std_error=0.1)]
    history = [SimpleNamespace(step=k, energy_gap=gap) for k, gap in enumerate(gaps)]
    assert plots.energy_gap_curve(history, ax) is ax
    assert ax.lines[-1].get_xdata() == [1]
    assert ax.lines[-1].get_ydata() == pytest.approx([0.5])
    band = ax.collections[0].get_datalim(ax.transData)
    assert (band.y0, band.y1) == pytest.approx((0.5 - 0.196, 0.5 + 0.196))
    assert "nats" in ax.get_ylabel()
    with pytest.raises(ValueError, match="none of 1 has one"):
        plots.energy_gap_curve(history[:1], ax)


def test_generalization_gap_is_the_difference_of_the_likelihoods(ax):
    low = LogLikelihood(-2.5, 0.31, 0.3, 0.1, True)
    history = [record(100)._replace(validation=low)]
    assert plots.generalization_gap_curve(history, ax) is ax
    assert ax.lines[-1].get_ydata() == pytest.approx([1.5])
    band = ax.collections[0].get_datalim(ax.transData)
    assert band.height == pytest.approx(2 * 1.96 * 0.5)  # without the error of log Z
    assert "nats" in ax.get_ylabel()


@pytest.mark.parametrize(
    "curve",
    [
        plots.likelihood_curve,
        plots.log_partition_curve,
        plots.energy_gap_curve,
        plots.generalization_gap_curve,
    ],
)
def test_curves_refuse_an_empty_history(curve, ax):
    with pytest.raises(ValueError, match="history must hold"):
        curve([], ax)


def test_generalization_gap_needs_held_out_points(ax):
    with pytest.raises(ValueError, match="1 of 2 have none"):
        plots.generalization_gap_curve([record(1), record(2, validation=False)], ax)


@pytest.mark.parametrize(("mode", "color"), [("light", "#0072B2"), ("dark", "#56B4E9")])
def test_style_sets_the_look_and_takes_it_back(mode, color):
    before = dict(plt.rcParams)
    with plots.style(mode):
        figure, ax = plt.subplots()
        background = ax.get_facecolor()
    assert dict(plt.rcParams) == before
    # Drawn later: what counts is the background of the axes.
    plots.likelihood_curve([record(100)], ax)
    assert ax.lines[0].get_color() == color
    assert (sum(background[:3]) < 1) == (mode == "dark")
    plt.close(figure)


def test_colours_follow_what_lies_behind_transparent_axes(ax):
    ax.figure.set_facecolor("black")
    ax.set_facecolor("none")
    plots.likelihood_curve([record(100)], ax)
    assert ax.lines[0].get_color() == "#56B4E9"


def test_style_refuses_another_name():
    with pytest.raises(ValueError, match="'sepia'"), plots.style("sepia"):
        pass


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_stand_out_from_their_background(mode):
    """By the contrast ratio of the web guidelines, at least 3 for graphics."""
    palette = sys.modules["pyro_ebm.plots.style"]._PALETTES[mode]

    def luminance(color):
        rgb = torch.tensor(to_rgb(color))
        linear = torch.where(
            rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4
        )
        return (linear @ torch.tensor([0.2126, 0.7152, 0.0722])).item()

    behind = luminance(palette.background)
    for color in palette[:-1]:
        low, high = sorted((luminance(color), behind))
        assert (high + 0.05) / (low + 0.05) > 3, color


def test_library_does_not_import_its_plots():
    # By its import graph, see test_layers.py; here for the top level alone.
    assert "plots" not in pyro_ebm.__all__


def test_missing_matplotlib_is_named_with_the_way_out(monkeypatch):
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    for name in [name for name in sys.modules if name.startswith("pyro_ebm.plots")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'pyro-ebm\[plots\]'"):
        importlib.import_module("pyro_ebm.plots")
