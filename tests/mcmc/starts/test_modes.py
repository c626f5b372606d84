"""Descents to modes, and what is measured there.

Faults that a test is meant to catch are named with it.
"""

import math

import pytest
import torch

from pyro_ebm.mcmc.starts.modes import find_modes


def quadratic(loc, covariance, floor=0.0):
    """Energy and gradient of a Gaussian, whose log Z is :func:`log_mass` of it."""
    precision = torch.linalg.inv(covariance)

    def value_and_grad(x):
        grad = (x - loc) @ precision
        return ((x - loc) * grad).sum(-1) / 2 + floor, grad

    return value_and_grad


def log_mass(covariance, floor=0.0):
    return (2 * math.pi * covariance).logdet().item() / 2 - floor


def with_grad(energy):
    """Energy and gradient by autograd."""

    def value_and_grad(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = energy(x)
            (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad

    return value_and_grad


def test_a_quadratic_is_measured_exactly():
    """Fault: the scale of the starts left out of the mass, or of the covariance."""
    loc = torch.tensor([3.0, -1.0, 0.5])
    factor = torch.tensor([[2.0, 0.0, 0.0], [-0.5, 0.3, 0.0], [0.2, 0.1, 0.7]])
    covariance = factor @ factor.mT
    starts = 4 * torch.randn(32, 3) * torch.tensor([1.0, 0.5, 2.0])
    found = find_modes(quadratic(loc, covariance, 7.0), starts)
    assert found.is_complete
    assert found.loc.shape == (1, 3)
    torch.testing.assert_close(found.loc[0], loc, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found.scale_tril @ found.scale_tril.mT, covariance[None], atol=1e-6, rtol=1e-6
    )
    assert found.energy.item() == pytest.approx(7.0, abs=1e-9)
    assert found.log_mass.item() == pytest.approx(log_mass(covariance, 7.0), abs=1e-6)
    assert len(found.ends) == 32
    assert (found.ends - loc).abs().max() < 0.05


@pytest.mark.parametrize("condition", [1e4, 1e8])
def test_a_narrow_valley_in_five_dimensions(condition):
    """Condition number of the Hessian, in directions of no axis.

    Fault: steepest descent for the inverse Hessian.
    """
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    variance = torch.logspace(0, -math.log10(condition), 5)
    covariance = (rotation * variance) @ rotation.mT
    loc = torch.arange(5.0) / 5
    found = find_modes(quadratic(loc, covariance), torch.randn(64, 5))
    assert len(found.loc) == 1
    off = torch.linalg.solve_triangular(
        found.scale_tril[0], (found.loc[0] - loc)[:, None], upper=False
    )
    assert off.norm() < 0.05
    assert found.log_mass.item() == pytest.approx(log_mass(covariance), abs=0.05)
    assert quadratic(loc, covariance)(found.ends)[0].median() < 0.1


def test_newtons_method_finishes_what_the_descents_leave():
    """Fault: none of its steps is taken."""
    loc, covariance = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1e-4]).diag()
    energy = quadratic(loc, covariance)
    found = find_modes(energy, 3 * torch.randn(16, 2), max_rounds=3)
    assert energy(found.ends)[0].median() > 0.1
    assert energy(found.loc)[0].max() < 1e-6
    assert found.log_mass[0].item() == pytest.approx(log_mass(covariance), abs=1e-4)


def two_wells(x):
    near = (x + 2).square().sum(-1) / (2 * 0.25) - math.log(0.3) + 3 * math.log(0.5)
    far = (x - 4).square().sum(-1) / 2 - math.log(0.7)
    return -torch.logaddexp(-near, -far)


def test_two_wells_are_both_found_by_falling_mass():
    """Fault: only the lowest of the ends is polished; modes by rising mass."""
    found = find_modes(with_grad(two_wells), 5 * torch.randn(64, 3))
    assert len(found.loc) == 2
    torch.testing.assert_close(found.loc[0], torch.full((3,), 4.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.loc[1], torch.full((3,), -2.0), atol=1e-3, rtol=0)
    expected = torch.tensor([0.7, 0.3]).log() + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(found.log_mass, expected, atol=1e-3, rtol=0)
    widths = found.scale_tril.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(
        widths, torch.tensor([[1.0], [0.5]]).expand(2, 3), atol=1e-3, rtol=0
    )


def test_descents_that_have_arrived_are_kept():
    """Fault: the higher half is given up while all gain, or have just done so."""
    loc = torch.tensor([[-20.0, 0.0], [0.0, 0.0], [20.0, 0.0]])

    def three_wells(x):
        wells = (x[..., None, :] - loc).square().sum(-1) / 2
        return -(torch.tensor([0.0, -3.0, -6.0]) - wells).logsumexp(-1)

    starts = loc.repeat(300, 1) + 3 * torch.randn(900, 2)
    found = find_modes(with_grad(three_wells), starts)
    assert len(found.loc) == 3
    assert (found.hits > 250).all()


def test_more_modes_than_are_measured_is_said():
    """Fault: ``is_complete`` is always true."""
    energy = with_grad(lambda x: -5 * x.cos().sum(-1))
    few = find_modes(energy, 30 * torch.rand(64, 2), max_modes=4)
    assert not few.is_complete
    assert len(few.loc) <= 4
    assert find_modes(energy, 3 * torch.rand(16, 2), max_modes=64).is_complete


@pytest.mark.parametrize("outside", [math.inf, math.nan])
def test_starts_where_the_energy_is_not_finite_are_left_out(outside):
    """Fault: all ends are kept, finite or not; steps to such points are taken."""
    inside = quadratic(torch.tensor([0.5, 0.0]), torch.eye(2))

    def half(x):
        value, grad = inside(x)
        is_out = x[:, 0] < 0
        return value.where(~is_out, outside), grad.where(~is_out[:, None], math.nan)

    starts = 3 * torch.randn(64, 2)
    found = find_modes(half, starts)
    assert len(found.ends) == (starts[:, 0] >= 0).sum()
    assert (found.ends[:, 0] >= 0).all()
    torch.testing.assert_close(found.loc, torch.tensor([[0.5, 0.0]]), atol=1e-5, rtol=0)
    assert found.log_mass.item() == pytest.approx(log_mass(torch.eye(2)), abs=1e-5)


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: (torch.zeros(len(x)), torch.zeros_like(x)),
        lambda x: (torch.full((len(x),), math.inf), torch.full_like(x, math.nan)),
        lambda x: (x.sum(-1), torch.ones_like(x)),
        lambda x: (-x.square().sum(-1), -2 * x),
    ],
    ids=["flat", "nowhere finite", "a slope", "a hill"],
)
def test_no_mode_is_none(energy):
    """Fault: eigenvalues of zero count as a curvature."""
    assert find_modes(energy, torch.randn(16, 2)) is None


def test_starts_at_one_point():
    """A base that is nearly a point: the scale of the starts is zero."""
    found = find_modes(quadratic(torch.ones(2), torch.eye(2)), torch.zeros(8, 2))
    torch.testing.assert_close(found.loc, torch.ones(1, 2), atol=1e-6, rtol=0)
