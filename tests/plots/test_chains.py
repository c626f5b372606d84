"""Traces, ranks and autocorrelation of chains on axes."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import plots
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import QuadraticEnergy
from pyro_ebm.mcmc import HMC, MCMC


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
