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
    assert 0 < curve.log_partition_std_error < 0.04


def test_the_curve_falls(curve):
    assert (curve.mean.diff() < 3 * curve.std_error[1:]).all()
