"""The curve of the mean energy along the path."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.partition import thermodynamic_integration

BASE_SCALE = 3.0


@pytest.fixture
def curve():
    """From N(0, 9 I) to N(0, I) in three dimensions."""
    energy = FunctionEnergy(lambda x: x.square().sum(-1) / 2, (3,))
    base = dist.Normal(torch.zeros(3), BASE_SCALE).to_event(1)
    return thermodynamic_integration(energy, base, num_particles=4096)


def test_the_curve_is_that_of_a_gaussian(curve):
    """The tempered density is Gaussian with a known precision at every beta."""
    ratio = 1 / BASE_SCALE**2
    precision = (1 - curve.inverse_temperatures) * ratio + curve.inverse_temperatures
    constant = 1.5 * math.log(2 * math.pi * BASE_SCALE**2)
    truth = 1.5 * (1 - ratio) / precision - constant
    assert ((curve.mean - truth).abs() < 5 * curve.std_error + 0.01).all()
    assert curve.inverse_temperatures[0] == 0
    assert curve.inverse_temperatures[-1] == 1


def test_its_integral_is_log_z(curve):
    """Seen to fail without the minus sign, and by 0.3 without the correction of (2)."""
    error = curve.log_partition - 1.5 * math.log(2 * math.pi)
    assert abs(error) < 4 * curve.log_partition_std_error + 0.02
    assert 0 < curve.log_partition_std_error < 0.06


def test_the_curve_falls(curve):
    assert (curve.mean.diff() < 3 * curve.std_error[1:]).all()


def test_log_z_of_the_tempered_energies(curve):
    """Each is that of a Gaussian."""
    ratio = 1 / BASE_SCALE**2
    precision = (1 - curve.inverse_temperatures) * ratio + curve.inverse_temperatures
    base_part = (1 - curve.inverse_temperatures) * math.log(2 * math.pi * BASE_SCALE**2)
    truth = 1.5 * ((2 * math.pi / precision).log() - base_part)
    error = (curve.log_partitions - truth).abs()
    assert (error < 4 * curve.log_partitions_std_error + 1e-6).all()
    torch.testing.assert_close(
        curve.log_partitions[-1].item(), curve.log_partition, rtol=1e-6, atol=1e-6
    )


def test_the_spacing_of_few_temperatures_counts_as_an_error():
    """Seen to fail with the spread of the islands alone: 0.7 nats, its error 0.09."""
    modes = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    energy = FunctionEnergy(
        lambda x: -torch.logsumexp(-3 * (x[..., None, :] - modes).square().sum(-1), -1),
        (2,),
    )
    base = dist.Normal(torch.zeros(2), 6.0).to_event(1)
    for threshold in (0.5, 0.9):
        curve = thermodynamic_integration(energy, base, ess_threshold=threshold)
        error = curve.log_partitions[-1] - math.log(math.pi)
        assert abs(error) < 3 * curve.log_partitions_std_error[-1]
    assert abs(error) < 0.3
    with pytest.raises(ValueError, match="ess_threshold"):
        thermodynamic_integration(energy, base, ess_threshold=1.0)
