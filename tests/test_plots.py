"""The pictures: what is on the axes, and which arguments are refused."""

import builtins
import importlib
import math
import sys

import matplotlib.pyplot as plt
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm import plots
from pyro_ebm.infer import FitRecord, LogLikelihood

BOUNDS = [(-3.0, 3.0), (-2.0, 4.0)]
ESTIMATE = pyro_ebm.partition.LogPartitionEstimate(
    0.0, 0.1, -0.3, 0.3, 9.0, "ok", "walkers", 1
)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def record(step, *, validation=True):
    value = LogLikelihood(-2.0 + step / 100, 0.41, 0.4, 0.1, True)
    return FitRecord(step, 2.0, value, value if validation else None, ESTIMATE)


def test_density_has_its_peak_where_the_distribution_has(ax):
    distribution = dist.MultivariateNormal(torch.tensor([1.0, 2.0]), torch.eye(2) / 9)
    assert plots.density(distribution, BOUNDS, ax, num_points=61) is ax
    image = ax.images[0]
    row, column = divmod(image.get_array().argmax(), 61)
    assert (column / 10 - 3, row / 10 - 2) == pytest.approx((1.0, 2.0))
    assert image.get_extent() == [-3, 3, -2, 4]
    assert image.origin == "lower"


def test_log_density_is_cut_below_its_peak(ax):
    energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
    plots.density(pyro_ebm.EnergyDistribution(energy), BOUNDS, ax, log=True)
    low, high = ax.images[0].get_clim()
    assert high - low == pytest.approx(10.0)


def test_density_shows_points_over_the_image(ax):
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    data, samples = torch.zeros(3, 2), torch.ones(4, 2)
    plots.density(normal, BOUNDS, ax, data=data, samples=samples)
    assert [len(line.get_xdata()) for line in ax.lines] == [3, 4]
    assert ax.get_xlim() == (-3, 3)
    assert ax.get_ylim() == (-2, 4)


def test_density_uses_the_current_axes(ax):
    plt.sca(ax)
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    assert plots.density(normal, BOUNDS) is ax


@pytest.mark.parametrize(
    ("dim", "bounds"),
    [(3, BOUNDS), (2, BOUNDS[:1]), (2, [(0.0, 0.0), (0.0, 1.0)])],
)
def test_density_refuses(dim, bounds, ax):
    normal = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    with pytest.raises(ValueError, match="event_shape|bounds"):
        plots.density(normal, bounds, ax)


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
    assert ax.lines[0].get_xdata() == pytest.approx([2, 4])


def test_likelihood_curve_refuses_an_empty_history(ax):
    with pytest.raises(ValueError, match="history"):
        plots.likelihood_curve([], ax)


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
    monkeypatch.delitem(sys.modules, "pyro_ebm.plots")
    with pytest.raises(ImportError, match=r"pip install 'pyro-ebm\[plots\]'"):
        importlib.import_module("pyro_ebm.plots")
