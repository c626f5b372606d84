"""Toy data: where it lies, and its exact densities."""

import math

import pytest
import torch

from pyro_ebm import datasets
from pyro_ebm.testing import assert_moments


@pytest.mark.parametrize(
    "sample", [datasets.two_moons, datasets.eight_gaussians, datasets.checkerboard]
)
def test_shape_dtype_range_and_seed(sample):
    torch.manual_seed(1)
    x = sample(1000)
    assert x.shape == (1000, 2)
    assert x.dtype == torch.get_default_dtype()
    assert x.abs().max() < 4.5
    torch.manual_seed(1)
    assert torch.equal(sample(1000), x)


def test_two_moons_moments():
    """The lower moon shifted by 1 in place of 1/2: planted, and seen to fail with
    |z| = 40 in the mean of the first coordinate."""
    noise = 0.1
    x = datasets.two_moons(20_000, noise=noise)
    # Upper moon: (cos t - 1/2, sin t - 1/4), t uniform in [0, pi]; lower: minus it.
    variance = torch.tensor([1 / 2 + 1 / 4, 1 / 2 - 1 / math.pi + 1 / 16]) + noise**2
    assert_moments(x, torch.zeros(2), variance)


def test_two_moons_are_half_circles_of_radius_one():
    x = datasets.two_moons(500, noise=0.0)
    upper = (x - torch.tensor([-0.5, -0.25])).norm(dim=-1)
    lower = (x - torch.tensor([0.5, 0.25])).norm(dim=-1)
    off = torch.minimum((upper - 1).abs(), (lower - 1).abs())
    assert off.max() < 1e-12


def test_negative_noise_is_an_error():
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        datasets.two_moons(10, noise=-1.0)
    with pytest.raises(ValueError, match="noise must be positive and finite, got 0"):
        datasets.two_moons_density(noise=0.0)
    with pytest.raises(ValueError, match="num_nodes must be at least 1, got 0"):
        datasets.two_moons_density(num_nodes=0)


@pytest.mark.parametrize(("noise", "num_nodes"), [(0.1, 80), (0.3, 30)])
def test_two_moons_density_of_few_nodes(noise, num_nodes):
    """Both moments exactly, and the value at draws by a much finer rule."""
    density = datasets.two_moons_density(noise=noise, num_nodes=num_nodes)
    torch.testing.assert_close(density.mean, torch.zeros(2))
    variance = torch.tensor([1 / 2 + 1 / 4, 1 / 2 - 1 / math.pi + 1 / 16]) + noise**2
    torch.testing.assert_close(density.variance, variance)
    x = datasets.two_moons(500, noise=noise)
    finer = datasets.two_moons_density(noise=noise, num_nodes=200)
    torch.testing.assert_close(density.log_prob(x), finer.log_prob(x))


def test_two_moons_have_their_density():
    """Counts in cells, by chi-square; the nodes with equal weights, which crowd the
    ends of the moons: planted, and seen to fail with z = 331."""
    noise, count = 0.2, 50_000
    x = datasets.two_moons(count, noise=noise)
    fine = (torch.arange(240) + 0.5) / 50 - 2.4
    log_prob = datasets.two_moons_density(noise=noise).log_prob(
        torch.cartesian_prod(fine, fine)
    )
    cells = log_prob.exp().reshape(24, 10, 24, 10).sum((1, 3)) / 50**2
    cell = ((x[x.abs().amax(-1) < 2.4] + 2.4) * 5).long()
    seen = torch.bincount(cell[:, 0] * 24 + cell[:, 1], minlength=24**2)
    wanted = count * cells.flatten()
    often = wanted > 10
    chi_square = ((seen - wanted)[often].square() / wanted[often]).sum()
    degrees = often.sum()
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(
    "density",
    [
        datasets.two_moons_density,
        datasets.eight_gaussians_density,
        datasets.checkerboard_density,
    ],
)
def test_density_integrates_to_one(density):
    line = (torch.arange(240) + 0.5) / 20 - 6
    log_prob = density().log_prob(torch.cartesian_prod(line, line))
    assert (log_prob.exp().sum() / 20**2).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("sample", "variance", "fourth"),
    [
        # r = 3: E cos^2 = 1/2, E cos^4 = 3/8; sd = 0.3
        (datasets.eight_gaussians, 4.5 + 0.09, 81 * 3 / 8 + 27 * 0.09 + 3 * 0.09**2),
        # each coordinate is uniform in [-4, 4]
        (datasets.checkerboard, 16 / 3, 4**4 / 5),
    ],
)
def test_moments(sample, variance, fourth):
    """Radius 3.1 in place of 3, and squares of side 2.1: planted, and seen to fail with
    |z| = 13 in the variance and 5 in the mean."""
    x = sample(20_000)
    assert_moments(x, 0.0, variance, fourth_central_moment=fourth)


def test_checkerboard_is_on_alternate_squares():
    x = datasets.checkerboard(1000)
    assert (((x + 4) / 2).floor().sum(-1) % 2 == 0).all()
    density = datasets.checkerboard_density()
    assert density.log_prob(x).unique().item() == pytest.approx(-math.log(32))
    assert density.log_prob(x + torch.tensor([2.0, 0.0])).eq(-torch.inf).all()
