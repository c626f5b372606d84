"""Chains, ladders of temperatures and thermodynamic curves on axes."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import plots
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC, MCMC, ReplicaExchange
from pyro_ebm.mcmc.tempering.tempered_draws import TemperedDraws
from pyro_ebm.partition import thermodynamic_integration


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.fixture(scope="module")
def run():
    """On a model of two sites."""

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    torch.manual_seed(0)
    return short_run(model)


def short_run(target):
    """64 chains in 16 superchains, too few draws to be relied on."""
    mcmc = MCMC(HMC(), 60, 60, 64, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        mcmc.run(target)
    return mcmc


def test_few_chains_have_a_line_each(ax):
    draws = torch.randn(3, 20)
    assert plots.trace(draws, ax) is ax
    assert len(ax.lines) == 3
    assert ax.lines[1].get_ydata() == pytest.approx(draws[1].numpy())
    assert ax.get_title() == "3 chains of 20 draws"
    assert ax.get_ylabel() == "x"


def test_many_chains_are_a_band(ax):
    draws = torch.randn(200, 20, 2)
    plots.trace(draws, ax, index=1)
    middle = ax.lines[-1].get_ydata()
    assert middle == pytest.approx(draws[:, :, 1].quantile(0.5, 0).numpy())
    low, high = draws[:, :, 1].quantile(torch.tensor([0.05, 0.95]), 0)
    band = ax.collections[0].get_datalim(ax.transData)
    assert (band.y0, band.y1) == pytest.approx((low.min().item(), high.max().item()))
    assert len(ax.lines) == 4  # three chains and the median
    assert ax.get_ylabel() == "x[1]"


def test_traces_of_a_run_take_a_site(run, ax):
    plots.trace(run, ax, site="b", index=2)
    draws = run.get_samples(group_by_chain=True)["b"][..., 2]
    assert ax.lines[-1].get_ydata() == pytest.approx(draws.quantile(0.5, 0).numpy())
    assert ax.get_ylabel() == "b[2]"


def test_a_run_on_an_energy_has_one_site(ax):
    plots.trace(short_run(QuadraticEnergy(torch.zeros(2))), ax, index=0)
    assert ax.get_ylabel() == "x[0]"


def test_ranks_of_a_run_are_by_superchain(run, ax):
    assert plots.rank(run, ax, site="a") is ax
    assert len(ax.patches) == run.diagnostics().num_superchains
    for patch in ax.patches:
        assert patch.get_data().values.mean() == pytest.approx(1.0)
        assert patch.get_data().values.max() < 4
    assert "16 groups" in ax.get_title()


def test_ranks_show_a_chain_that_is_elsewhere(ax):
    draws = torch.randn(4, 500)
    draws[3] += 10
    plots.rank(draws, ax)
    apart = ax.patches[3].get_data().values
    assert apart[-5:] == pytest.approx(4.0)
    assert apart[:15] == pytest.approx(0.0)
    assert ax.patches[0].get_data().values[-5:] == pytest.approx(0.0)


def test_autocorrelation_is_that_of_an_autoregression(ax):
    """x' = a x + noise has a^t at lag t.

    Seen to fail, by 0.05 to 0.24, with the mean of each chain in place of that of all.
    """
    a, num_chains, length = 0.8, 2000, 40
    x = torch.randn(num_chains)
    rows = []
    for _ in range(length):
        rows.append(x)
        x = a * x + (1 - a**2) ** 0.5 * torch.randn(num_chains)
    assert plots.autocorrelation(torch.stack(rows, 1), ax, max_lag=10) is ax
    lags, values = ax.lines[0].get_data()
    assert lags == pytest.approx(np.arange(11))
    assert values == pytest.approx(a ** np.arange(11), abs=0.03)
    assert "2,000 chains" in ax.get_title()


def test_autocorrelation_of_stuck_chains_stays(ax):
    plots.autocorrelation(torch.randn(30)[:, None].expand(30, 20), ax)
    assert ax.lines[0].get_ydata() == pytest.approx(1.0)
    assert len(ax.lines[0].get_ydata()) == 11


@pytest.mark.parametrize("plot", [plots.trace, plots.rank, plots.autocorrelation])
@pytest.mark.parametrize(
    ("draws", "settings", "message"),
    [
        (torch.randn(5), {}, "shape"),
        ([1.0, 2.0], {}, "MCMC"),
        (torch.randn(5, 6, 2), {}, r"index .* \(2,\), got \(\)"),
        (torch.randn(5, 6, 2), {"index": 2}, "index"),
        (torch.randn(5, 6), {"index": 0}, "index"),
    ],
)
def test_chains_are_refused(plot, draws, settings, message, ax):
    with pytest.raises(ValueError, match=message):
        plot(draws, ax, **settings)


def test_a_site_of_several_must_be_named(run, ax):
    with pytest.raises(ValueError, match=r"\['a', 'b'\], got None"):
        plots.rank(run, ax)
    with pytest.raises(ValueError, match="max_lag"):
        plots.autocorrelation(run, ax, site="a", max_lag=60)
    with pytest.raises(RuntimeError, match="run first"):
        plots.trace(MCMC(HMC()), ax)


def tempered(num_temperatures=4, trips=(0, 3, 3, 2)):
    """A result with these numbers."""
    rates = torch.linspace(0.9, 0.5, num_temperatures - 1)
    return TemperedDraws(
        draws=torch.zeros(len(trips), 5),
        inverse_temperatures=torch.linspace(0, 1, num_temperatures) ** 2,
        swap_rates=rates,
        round_trips=torch.tensor(trips),
        barrier=(1 - rates).sum().item(),
        accept_prob=rates.flip(0),
        step_sizes=rates,
        log_partition=0.0,
        log_partition_std_error=0.1,
        num_evaluations=10,
        status="ok",
    )


def test_ladder_has_swaps_between_and_moves_at_the_temperatures(ax):
    assert plots.ladder(tempered(), ax) is ax
    heights = [bar.get_height() for bar in ax.patches]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert heights == pytest.approx([0.9, 0.7, 0.5])
    assert centres == pytest.approx([0.5, 1.5, 2.5])
    assert ax.lines[0].get_xdata() == pytest.approx([1, 2, 3])
    assert ax.lines[0].get_ydata() == pytest.approx([0.5, 0.7, 0.9])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.11", "0.44", "1"]
    assert "= 0.90" in ax.get_title()


def test_long_ladders_have_few_labels(ax):
    plots.ladder(tempered(40), ax)
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert len(labels) == 9
    assert (labels[0], labels[-1]) == ("0", "1")


def test_round_trips_are_counted(ax):
    assert plots.round_trips(tempered(), ax) is ax
    assert [bar.get_height() for bar in ax.patches] == [1, 0, 1, 2]
    assert ax.get_title() == "8 round trips, 1 of 4 chains without one"
    assert ax.lines[0].get_xdata()[0] == 2.0


@pytest.mark.parametrize("trips", [(0, 0), (0, 1000, 999)])
def test_round_trips_of_none_and_of_many(trips, ax):
    plots.round_trips(tempered(trips=trips), ax)
    assert sum(bar.get_height() for bar in ax.patches) == len(trips)


def test_a_run_of_replica_exchange_can_be_drawn(ax):
    energy = FunctionEnergy(lambda x: x**2 / 2, ())
    sampler = ReplicaExchange(dist.Normal(torch.tensor(0.0), 2.0), HMC(), 3)
    found = sampler.run(energy, 20, 16)
    plots.ladder(found, ax)
    plots.round_trips(found, ax)
    plots.trace(found.draws, ax)


def test_thermodynamic_curve_ends_at_log_z():
    energy = QuadraticEnergy(torch.zeros(2))
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    curve = thermodynamic_integration(energy, base, ess_threshold=0.8)
    axes = plots.thermodynamic_curve(curve)
    left, right = (ax.lines[0].get_ydata() for ax in axes)
    assert left == pytest.approx(-curve.mean.numpy())
    assert right[0] == 0
    assert right[-1] == pytest.approx(curve.log_partition)
    assert all("nats" in ax.get_ylabel() for ax in axes)
    assert f"{curve.log_partition:.3f}" in axes[1].get_title()
    with pytest.raises(ValueError, match="two"):
        plots.thermodynamic_curve(curve, axes[:1])
    plt.close(axes[0].figure)
