"""The truth of the finite targets, against the written table and by other means."""

import math

import pytest
import torch

from pyro_ebm.energies import FunctionEnergy, IsingEnergy
from pyro_ebm.partition import enumeration
from pyro_ebm.testing import assert_moments
from pyro_ebm.testing.finite_targets import (
    ISING_CRITICAL,
    ising,
    kaufman,
    potts,
    rbm,
    transfer_matrix,
)

SPIN_BOND = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("build", [ising, potts, rbm])
def test_fields_agree(build):
    target = build()
    assert target.name == build.__name__
    event = target.energy.event_shape
    assert target.base.event_shape == target.mean.shape == event
    assert target.variance.shape == event
    x = target.base.sample((5,))
    assert target.energy.support.check(x).all()
    assert target.energy(x).isfinite().all()
    known = target.energy.closed_form().log_partition.item()
    assert known == pytest.approx(target.log_partition, abs=1e-8)


def test_written_truth():
    for target, expected in [
        (ising(4, 0.3), 12.78552333),
        (ising(4), 15.52191546),
        (ising(8, 0.3), 50.60933050),
        (ising(), 60.14178079),
        (ising(8, 0.6), 78.14164886),
        (potts(), 75.57195180),
    ]:
        assert target.log_partition == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("coupling", [0.1, ISING_CRITICAL, 0.9])
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (4, 5), (2, 6), (7, 4)])
def test_kaufman_is_the_transfer_matrix(rows, columns, coupling):
    """Seen to fail for ``gamma_0`` without its sign, above the critical temperature."""
    by_matrix = transfer_matrix(rows, columns, coupling * SPIN_BOND)
    assert kaufman(rows, columns, coupling) == pytest.approx(by_matrix, abs=1e-9)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ising(3, 0.4),
        ising,
        lambda: potts(3),
        lambda: potts(2, 4, 0.5),
        lambda: rbm(9, 4),
    ],
)
def test_by_enumeration(build):
    target = build(4) if build is ising else build()
    energy = target.energy
    plain = FunctionEnergy(energy, energy.event_shape, energy.support)
    assert enumeration(plain).value == pytest.approx(target.log_partition, abs=1e-9)


def test_odd_powers_of_negative_eigenvalues():
    """An antiferromagnet on an odd torus: frustrated, and eigenvalues of both signs."""
    energy = IsingEnergy((3, 4), -0.5)
    by_matrix = transfer_matrix(3, 4, -0.5 * SPIN_BOND)
    assert enumeration(energy).value == pytest.approx(by_matrix)


def test_exact_draws_of_the_machine():
    """Draws of the visible units at fair hidden ones: seen to fail, |z| > 30."""
    target = rbm(20, 6, scale=1.0)
    x = target.sample((4000,))
    assert target.sample((2, 3)).shape == (2, 3, 20)
    assert target.energy.support.check(x).all()
    assert_moments(x, target.mean, target.variance)
    # And all states of a small machine.
    small = rbm(8, 3, scale=2.0)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    p = (-small.energy(states).detach()).softmax(0)
    x = small.sample((20_000,))
    index = (x @ 2.0 ** torch.arange(7, -1, -1)).long()
    count = torch.bincount(index, minlength=256)
    common = p * 20_000 > 5
    expected = p[common] * 20_000
    chi_square = ((count[common] - expected) ** 2 / expected).sum()
    degrees = int(common.sum()) - 1
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_the_machine_is_the_same_at_every_call_and_in_every_dtype():
    torch.manual_seed(3)
    first = torch.rand(())
    torch.manual_seed(3)
    one = rbm()
    torch.set_default_dtype(torch.float32)
    two = rbm()
    torch.set_default_dtype(torch.float64)
    assert two.energy.weight.dtype == torch.float32
    assert two.log_partition == pytest.approx(one.log_partition, abs=1e-3)
    assert torch.rand(()) == first
