"""Ladders of temperatures and thermodynamic curves on axes."""

import matplotlib.pyplot as plt
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import plots
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC, ReplicaExchange
from pyro_ebm.mcmc.tempering.tempered_draws import TemperedDraws
from pyro_ebm.partition import thermodynamic_integration


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
