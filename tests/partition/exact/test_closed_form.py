"""Closed forms, where the energy knows one."""

import pyro.distributions as dist
import torch

from pyro_ebm.energies import DistributionEnergy, QuadraticEnergy
from pyro_ebm.partition import closed_form
from pyro_ebm.testing import targets


def test_closed_form():
    estimate = closed_form(QuadraticEnergy(torch.zeros(5)))
    assert estimate.status == "exact"
    assert estimate.std_error == estimate.num_evaluations == 0
    gamma = DistributionEnergy(dist.Gamma(torch.tensor(3.0), 2.0))
    assert closed_form(gamma).value == 0
    assert closed_form(targets.gamma().energy) is None
