"""Data that nothing, or little, can be learned from: refused, or as documented."""

import logging

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyModel, fit
from pyro_ebm.energies import NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import MaximumLikelihood
from pyro_ebm.partition import importance_sampling

pytest.importorskip("sklearn")


def network(base=None):
    energy = NeuralEnergy((2,), (8,), base=base)
    return EnergyModel(energy) if base is None else EnergyModel(energy, base)


def quick(model, data, *given, **settings):
    settings = {"num_steps": 30, "progress_bar": False} | settings
    return fit(model, data, *given, **settings)


def test_a_base_that_does_not_cover_the_data_is_refused():
    """Data at a million under a standard normal. Fault: a verdict of ok."""
    far = 1e6 + torch.randn(100, 2)
    standard = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match="not cover the data.*without a base: fit"):
        quick(network(standard), far)
    with pytest.raises(ValueError, match="not cover.*Leave objective at 'auto'"):
        quick(network(), far, MaximumLikelihood())
    quick(network(standard), 5 + torch.randn(100, 2))  # far, but not hopeless


def test_a_base_that_is_fitted_covers_it():
    result = quick(network(), 1e6 + 1e3 * torch.randn(150, 2))
    assert result.status == "ok"
    assert abs(result.validation.value + 2 * 8.33) < 0.5  # entropy of the normal


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.randn(50, 3), r"\(N, \*event\), event_shape \(2,\), got \(50, 3\)"),
        (torch.randn(50), r"event_shape \(2,\), got \(50,\)"),
        (torch.empty(0, 2), "at least two points, got 0"),
        (torch.randn(1, 2), "at least two points, got 1"),
        (torch.full((50, 2), torch.inf), "50 points with 100 nan or infinite"),
    ],
)
def test_what_is_refused(data, match):
    with pytest.raises(ValueError, match=match):
        quick(network(), data)


def test_a_constant_column_is_nearly_constant_in_the_model():
    """Of a spread of a thousandth, for want of any scale."""
    data = torch.cat([torch.randn(100, 1), torch.full((100, 1), 7.0)], 1)
    result = quick(network(), data)
    draws = result.distribution.sample((500,))
    assert result.status == "ok"
    assert (draws[:, 1] - 7).abs().max() < 2
    assert abs(draws[:, 0].std() / data[:, 0].std() - 1) < 0.3


def test_duplicates_are_no_spikes():
    """Log Z is right, and the density is that of three points, not of 120."""
    data = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, 1.0]]).repeat(40, 1)
    result = quick(network(), data)
    energy = result.distribution.energy
    found = importance_sampling(energy, result.base.distribution, num_samples=20_000)
    assert abs(found.value - result.log_partition.value) < 0.02
    draws = result.distribution.sample((200,))
    assert (draws.std(0) / data.std(0)).log().abs().max() < 0.8  # of three points
    assert torch.cdist(draws, data[:3]).amin(1).median() > 0.1


def test_three_rows_are_the_fewest_for_a_base():
    with pytest.raises(ValueError, match="at least 3 rows to compare bases by, got 2"):
        quick(network(), torch.randn(2, 2))
    result = quick(network(), torch.randn(3, 2))
    assert result.validation is None
    assert result.log_partition.value == pytest.approx(0.0, abs=0.2)


def test_of_few_rows_the_base_is_kept(caplog):
    """No row says whether the network helps. Fault: it learns the rows by heart."""
    data, test = torch.randn(16, 2), torch.randn(200, 2)
    with caplog.at_level(logging.WARNING, "pyro_ebm.infer.fit.automatic"):
        result = quick(network(), data, num_steps=200)
    base = result.base.distribution.log_prob(test)
    torch.testing.assert_close(result.distribution.log_prob(test).detach(), base)
    assert "too few rows to hold some out" in caplog.text
    assert (result.stopped, result.verdict) == ("too few rows", "ok")
    assert result.log_partition.value == pytest.approx(0.0, abs=1e-6)


def test_a_gap_of_a_base_of_three_rows_is_no_fault_of_learning():
    """It is far, as the base knows them by heart. Fault: "not at equilibrium"."""
    data = torch.tensor([[0.0, 0.0], [1e-3, 1e-3], [50.0, 1.0]])
    result = quick(network(), data, num_steps=200)
    assert (result.stopped, result.verdict) == ("too few rows", "ok")


def test_parameters_are_learned_from_few_rows():
    """An energy that is no correction of its base has no other way."""
    energy = QuadraticEnergy(torch.zeros(2))
    optim = torch.optim.Adam(energy.parameters(), 0.05)
    quick(EnergyModel(energy), 3 + torch.randn(16, 2), num_steps=200, optim=optim)
    assert energy.loc.min() > 0.2
