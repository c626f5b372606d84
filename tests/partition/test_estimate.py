"""The one door to all estimators."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.errors import UnreliableWarning
from pyro_ebm.partition import estimate
from pyro_ebm.testing import targets

GAUSSIAN = FunctionEnergy(lambda x: (x**2).sum(-1) / 2, (4,))
TRUTH = 2 * math.log(2 * math.pi)
BASE = dist.Normal(torch.zeros(4), 1.5).to_event(1)


def test_auto_takes_what_is_exact():
    known = estimate(QuadraticEnergy(torch.zeros(3)))
    assert (known.status, known.method) == ("exact", "closed form")
    planar = estimate(FunctionEnergy(lambda x: (x**2).sum(-1) / 2, (2,)))
    assert (planar.status, planar.method) == ("exact", "quadrature")
    assert abs(planar.value - math.log(2 * math.pi)) < 1e-6


def test_annealing_alone_bounds_one_side():
    with pytest.warns(UnreliableWarning, match="one-sided only"):
        found = estimate(GAUSSIAN, BASE, method="ais", budget=20_000)
    assert found.lower < TRUTH
    assert abs(found.value - TRUTH) < 0.3


@pytest.mark.parametrize("method", ["auto", "smc", "importance", "bridge"])
def test_every_method_finds_a_gaussian(method):
    found = estimate(GAUSSIAN, BASE, method=method, budget=20_000)
    assert found.status == "ok", found
    assert abs(found.value - TRUTH) < 0.15
    assert found.lower <= found.value <= found.upper
    assert 0 < found.num_evaluations < 60_000


def test_targets_that_have_an_energy():
    q = pyro_ebm.EnergyDistribution(GAUSSIAN)
    assert abs(estimate(q, BASE, budget=10_000).value - TRUTH) < 0.15
    model = pyro_ebm.EnergyModel(GAUSSIAN, BASE)  # brings its own base
    found = estimate(model, budget=10_000)
    assert abs(found.value - TRUTH) < 0.15
    normalized = pyro_ebm.EnergyDistribution(GAUSSIAN, found)
    assert normalized.is_normalized
    assert normalized.log_partition_std_error == found.std_error


def test_the_trap_is_no_trap():
    """30 temperatures with 64 chains and a delta-method error bar say -7.3 +- 0.8."""
    trap = targets.trap()
    found = estimate(trap.energy, trap.base, budget=12_000)
    assert found.lower <= trap.log_partition <= found.upper or not found.is_reliable
    assert abs(found.value - trap.log_partition) < 0.2


def test_no_partition_function_is_no_number():
    bad = targets.unnormalizable()
    with pytest.warns(UnreliableWarning, match="not_normalizable"):
        found = estimate(bad.energy, bad.base, method="smc")
    assert found.status == "not_normalizable"
    assert found.value == math.inf
    with pytest.raises(ValueError, match="no partition function"):
        pyro_ebm.EnergyDistribution(bad.energy, found)


def test_unreliable_warns_and_is_not_normalized():
    narrow = dist.Normal(torch.full((4,), 8.0), 0.1).to_event(1)
    with pytest.warns(UnreliableWarning):
        found = estimate(GAUSSIAN, narrow, method="importance", budget=1000)
    with pytest.warns(UnreliableWarning):
        assert not pyro_ebm.EnergyDistribution(GAUSSIAN, found).is_normalized


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"target": GAUSSIAN}, ValueError, "base is None"),
        ({"target": GAUSSIAN, "base": BASE, "budget": 0}, ValueError, "budget"),
        ({"target": GAUSSIAN, "base": BASE, "budget": 100}, ValueError, "budget must"),
        ({"target": GAUSSIAN, "base": BASE, "method": "magic"}, ValueError, "magic"),
        ({"target": 3.0}, TypeError, "float"),
        ({"target": lambda: None}, NotImplementedError, "Pyro model"),
        (
            {"target": GAUSSIAN, "base": BASE, "num_replicates": 1},
            ValueError,
            "num_replicates must be at least 4",
        ),
        (
            {"target": GAUSSIAN, "base": dist.Normal(torch.zeros(3), 1.0).to_event(1)},
            ValueError,
            "event_shape",
        ),
        (
            {"target": GAUSSIAN, "base": dist.Gamma(torch.ones(4), 1.0).to_event(1)},
            ValueError,
            "support",
        ),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        estimate(**kwargs)
