"""The fraction of missing information, against the series that defines it."""

import math
import warnings

import pytest
import torch

from pyro_ebm.diagnostics import energy_bfmi


@pytest.mark.parametrize("angle", [0.4, math.pi / 2])
def test_limit_of_betancourts_estimate(angle):
    """Exact Hamiltonian flow on a Gaussian, whose total energies ArviZ judges.

    Planted fault: ``D`` for ``D / 2`` in the denominator.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    dim = 5
    x = torch.randn(20, dim)
    potential, total = [], []
    for _ in range(3000):
        r = torch.randn(20, dim)
        total.append((x**2 + r**2).sum(-1) / 2)
        x = x * math.cos(angle) + r * math.sin(angle)
        potential.append((x**2).sum(-1) / 2)
    energies, totals = torch.stack(potential, -1), torch.stack(total, -1)
    found = energy_bfmi(energies, dim)
    assert found.shape == (20,)
    expected = torch.from_numpy(arviz.bfmi(totals.numpy()))
    z = (found - expected).mean() / (found - expected).std() * math.sqrt(20)
    # Both converge to 1, from a biased variance of a correlated series.
    assert abs(z) < 4 or (found - expected).mean().abs() < 0.01
    assert found.mean().item() == pytest.approx(1.0, abs=0.03)


def test_heavy_tails_are_found():
    """A Student target with 3 degrees of freedom in 20 dimensions."""
    chi2 = torch.distributions.Chi2(3.0).sample((4, 5000))
    x = torch.randn(4, 5000, 20) * (3 / chi2).sqrt()[..., None]
    energy = (3 + 20) / 2 * (1 + (x**2).sum(-1) / 3).log()
    # Var f is far larger than D / 2 here: f spans a wide range.
    assert (energy_bfmi(energy, 20) < 0.3).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 draws.*got \(4, 1\)"):
        energy_bfmi(torch.zeros(4, 1), 3)
    with pytest.raises(ValueError, match=r"got \(\)"):
        energy_bfmi(torch.tensor(0.0), 3)
