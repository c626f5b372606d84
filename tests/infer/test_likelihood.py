"""The held-out log-likelihood with its two errors."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.infer import log_likelihood, log_likelihood_difference
from pyro_ebm.partition import LogPartitionEstimate

LOG_Z = math.log(2 * math.pi) / 2


def normal(loc, std_error=0.0):
    energy = FunctionEnergy(lambda x: (x - loc) ** 2 / 2, ())
    estimate = LogPartitionEstimate(
        LOG_Z, std_error, LOG_Z, LOG_Z, 100.0, "ok", "given", 0
    )
    return pyro_ebm.EnergyDistribution(energy, estimate)


def test_covers_the_truth_as_often_as_it_says():
    """Seen to fail with the standard deviation not divided by the root of N."""
    truth = -LOG_Z - 0.5
    covered = 0
    for _ in range(400):
        found = log_likelihood(normal(0.0), torch.randn(200))
        covered += abs(found.value - truth) < 1.96 * found.std_error
    assert 0.92 < covered / 400 < 0.98


def test_both_errors_add_up():
    found = log_likelihood(normal(0.0, 0.3), torch.randn(1000))
    assert found.std_error_log_partition == 0.3
    assert found.std_error == math.hypot(found.std_error_data, 0.3)
    assert found.is_normalized


def test_difference_of_two_models_is_paired():
    x = torch.randn(500)
    p, q = normal(0.0, 0.01), normal(0.1, 0.02)
    found = log_likelihood_difference(p, q, x)
    # log p - log q = ((x - .1)^2 - x^2) / 2 = .005 - .1 x
    assert abs(found.value - (0.005 - 0.1 * x.mean())) < 1e-9
    assert abs(found.std_error_data - 0.1 * x.std() / 500**0.5) < 1e-9
    assert found.std_error_log_partition == math.hypot(0.01, 0.02)
    assert found.std_error_data < 0.2 * log_likelihood(p, x).std_error_data


def test_an_unknown_log_partition_is_said():
    q = pyro_ebm.EnergyDistribution(normal(0.0).energy)
    assert not log_likelihood(q, torch.randn(10)).is_normalized
    assert "unknown" in str(log_likelihood(q, torch.randn(10)))
    assert not log_likelihood_difference(normal(0.0), q, torch.randn(9)).is_normalized


def test_other_distributions_are_refused():
    for other in (dist.Normal(0.0, 1.0), pyro_ebm.EnergyModel(normal(0.0).energy)):
        with pytest.raises(TypeError, match=r"EnergyDistribution, got.*averaged\(\)"):
            log_likelihood(other, torch.randn(10))


def test_one_point_has_no_error():
    with pytest.raises(ValueError, match="at least two points"):
        log_likelihood(normal(0.0), torch.randn(1))
    gaussian = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    energy = pyro_ebm.energies.DistributionEnergy(gaussian)
    with pytest.raises(ValueError, match=r"event_shape \(2,\)"):
        log_likelihood(pyro_ebm.EnergyDistribution(energy, 0.0), torch.randn(2))


def test_points_may_be_an_array():
    """As of a fit. Fault: arrays and tables had no .dim()."""
    energy = pyro_ebm.energies.NeuralEnergy((2,), (4,))
    q = pyro_ebm.EnergyDistribution(energy, 0.0)
    x = torch.randn(10, 2)
    expected = log_likelihood(q, x)
    assert log_likelihood(q, x.double().numpy()) == expected
    assert log_likelihood_difference(q, q, x.numpy().astype(np.float64)).value == 0
