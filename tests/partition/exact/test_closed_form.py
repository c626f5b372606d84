"""Closed forms, where the energy knows one."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import DistributionEnergy, FactorGraphEnergy, QuadraticEnergy
from pyro_ebm.partition import closed_form, estimate
from pyro_ebm.testing import targets


def test_closed_form():
    estimate = closed_form(QuadraticEnergy(torch.zeros(5)))
    assert estimate.status == "exact"
    assert estimate.std_error == estimate.num_evaluations == 0
    gamma = DistributionEnergy(dist.Gamma(torch.tensor(3.0), 2.0))
    assert closed_form(gamma).value == 0
    assert closed_form(targets.gamma().energy) is None


@pytest.mark.parametrize("edges", [[(0, 1)], [(0, 1), (1, 2), (2, 0)]], ids=str)
@pytest.mark.parametrize(
    ("potential", "value", "reason"),
    [(math.nan, math.nan, "nan or inf"), (-math.inf, -math.inf, "no point is allowed")],
)
def test_what_is_not_finite_is_not_exact(edges, potential, value, reason):
    """Planted fault: nan taken for forbidden, as it is not above the threshold."""

    def table(x, y):
        return 0 * (x + y) + potential

    energy = FactorGraphEnergy([2] * 3, [(torch.tensor(edges), table)])
    with pytest.warns(UnreliableWarning, match=reason):
        estimated = estimate(energy)
    for found in (closed_form(energy), estimated):
        assert found.value == pytest.approx(value, nan_ok=True)
        assert found.status == "unreliable"
        assert found.reasons[0].reason == "not finite"
        assert reason in str(found)
    with pytest.raises(ValueError, match="must be finite"):
        energy.closed_form().distribution.sample()
