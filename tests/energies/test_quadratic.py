"""The Gaussian: value, gradient, log Z and draws in closed form."""

import math

import pytest
import torch

from pyro_ebm.energies import QuadraticEnergy

LOC = [1.0, -2.0, 0.5]
PRECISION = [[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]]


@pytest.fixture
def energy():
    return QuadraticEnergy(torch.tensor(LOC), torch.tensor(PRECISION))


def test_value_is_the_quadratic_form(energy):
    x = torch.randn(5, 3)
    r = x - torch.tensor(LOC)
    expected = torch.einsum("ni,ij,nj->n", r, torch.tensor(PRECISION), r) / 2
    torch.testing.assert_close(energy(x), expected)


def test_closed_form_is_the_normalised_density(energy):
    x = torch.randn(5, 3)
    log_partition, gaussian = energy.closed_form()
    torch.testing.assert_close(gaussian.log_prob(x), -energy(x) - log_partition)
    expected = 1.5 * math.log(2 * math.pi) - torch.tensor(PRECISION).logdet() / 2
    torch.testing.assert_close(log_partition, expected)


def test_closed_form_is_differentiable(energy):
    """Minus the gradient of log Z is the mean gradient of the energy, eq. (1.8)."""
    log_partition, gaussian = energy.closed_form()
    (grad,) = torch.autograd.grad(log_partition, energy.log_diagonal)
    torch.testing.assert_close(grad, -torch.ones(3))
    assert gaussian.loc.requires_grad


def test_precision_is_kept(energy):
    torch.testing.assert_close(energy.precision, torch.tensor(PRECISION))
    torch.testing.assert_close(QuadraticEnergy(torch.zeros(2)).precision, torch.eye(2))


def test_optimiser_step_keeps_the_precision_positive_definite(energy):
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter += 3 * torch.randn_like(parameter)
    assert torch.linalg.eigvalsh(energy.precision).min() > 0


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (
            torch.eye(2),
            r"precision must have shape \(\*batch, 3, 3\) to match .*got \(2, 2\)",
        ),
        (-torch.eye(3), "positive definite"),
        (torch.eye(3) + torch.eye(3).roll(1, 0) / 9, "differs from its transpose"),
        (torch.full((3, 3), torch.nan), "positive definite"),
    ],
)
def test_wrong_precision_is_an_error(precision, message):
    with pytest.raises(ValueError, match=message):
        QuadraticEnergy(torch.zeros(3), precision.to(torch.get_default_dtype()))


def test_wrong_loc_is_an_error():
    with pytest.raises(ValueError, match=r"loc must have shape \(\*batch, D\), got \("):
        QuadraticEnergy(torch.zeros(()))
    with pytest.raises(ValueError, match=r"to match loc of shape \(3, 2\), got \(4, 2"):
        QuadraticEnergy(torch.zeros(3, 2), torch.eye(2).expand(4, 2, 2))


def test_tensors_with_a_graph_stay_live():
    """Seen to fail with ``precision.detach()`` in the constructor."""
    loc = torch.tensor(LOC, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    energy = QuadraticEnergy(2 * loc, scale * torch.tensor(PRECISION))
    assert not list(energy.parameters())
    r = torch.randn(4, 3) - 2 * loc
    expected = scale * torch.einsum("ni,ij,nj->n", r, torch.tensor(PRECISION), r) / 2
    inputs = [loc, scale]
    wanted = torch.autograd.grad(expected.sum(), inputs, retain_graph=True)
    value = energy((r + 2 * loc).detach())
    torch.testing.assert_close(value, expected.detach(), check_stride=False)
    got = torch.autograd.grad(value.sum(), inputs, retain_graph=True)
    torch.testing.assert_close(got, wanted)
    log_partition = energy.closed_form().log_partition
    (grad,) = torch.autograd.grad(log_partition, scale)
    torch.testing.assert_close(grad, torch.tensor(-0.75))  # -D / (2 scale)


def test_a_parameter_is_shared():
    loc, precision = (
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.eye(2)),
    )
    energy = QuadraticEnergy(loc, precision)
    assert set(energy.parameters()) == {loc, precision}
    with torch.no_grad():
        precision *= 4
    assert energy(torch.ones(2)).item() == 4.0
