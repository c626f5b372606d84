"""Independent coordinates: kernels and counts."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import partition
from pyro_ebm.bases import gaussian_mixture, independent, kernel_density
from pyro_ebm.bases.kernels import NormalKernels
from pyro_ebm.energies import DistributionEnergy


def test_it_is_normalised():
    for data, support in (
        (torch.randn(300) ** 3, None),
        (dist.Gamma(2.0, 1.0).sample((300,)), constraints.positive),
    ):
        energy = DistributionEnergy(independent(data, support=support))
        assert abs(partition.quadrature(energy, progress_bar=False).value) < 1e-4


def test_kernels_of_rows():
    """A density of rows, not of coordinates. Fault: the width of one dimension."""
    x = torch.randn(800, 1)
    data = torch.cat([x, x + 0.1 * torch.randn(800, 1)], 1)
    base = kernel_density(data)
    x = torch.linspace(-6, 6, 201)
    density = base.log_prob(torch.cartesian_prod(x, x)).exp().reshape(201, 201)
    assert abs(torch.trapezoid(torch.trapezoid(density, x), x) - 1) < 1e-3
    assert base.log_prob(data).mean() > independent(data).log_prob(data).mean() + 0.5
    draws = base.sample((20_000,))
    assert draws.T.corrcoef()[0, 1] > 0.9
    assert (draws.mean(0) - data.mean(0)).abs().max() < 0.05
    assert (draws.std(0) / data.std(0) - 1).abs().max() < 0.1
    widths = base.component_distribution.base_dist.scale[0] / data.std(0)
    assert (widths < 0.4).all()


def test_the_density_is_that_of_the_general_mixture(monkeypatch):
    """In one piece or many, far from 0 too. Fault: distances whose digits cancel."""
    base = kernel_density(1e3 + torch.randn(300, 3) * torch.tensor([1.0, 0.1, 10.0]))
    general = dist.MixtureSameFamily(
        base.mixture_distribution, base.component_distribution
    )
    x = base.sample((5, 4))
    wanted = general.log_prob(x)
    torch.testing.assert_close(base.log_prob(x), wanted, rtol=1e-4, atol=5e-3)
    monkeypatch.setattr("pyro_ebm.bases.kernels._CHUNK", 900)
    torch.testing.assert_close(base.log_prob(x), wanted, rtol=1e-4, atol=5e-3)


def test_the_width_is_that_of_the_best_kernels():
    """For normal data about 1.06 n^(-1/5). Fault: each datum counts for itself."""
    base = independent(torch.randn(1000))
    width = base.base_dist.base_dist.component_distribution.scale.max()
    assert 0.15 < width < 0.4


def test_coordinates_are_independent_and_have_their_marginals():
    x = torch.randn(1000, 1)
    data = torch.cat([x, x + torch.where(x > 0, 5.0, -5.0)], 1)
    draws = independent(data).sample((20_000,))
    assert abs(draws.T.corrcoef()[0, 1]) < 0.03
    for k in range(2):
        assert abs(draws[:, k].mean() - data[:, k].mean()) < 0.15
        assert abs(draws[:, k].std() / data[:, k].std() - 1) < 0.05


def test_counts():
    data = torch.tensor([[0, 2], [1, 2], [1, 0], [1, 2]])
    base = independent(data)
    wanted = torch.tensor([[1.5, 3.5, 0.5], [1.5, 0.5, 3.5]]) / 5.5
    values = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    expected = wanted[0][values[:, 0]] * wanted[1][values[:, 1]]
    torch.testing.assert_close(base.log_prob(values).exp(), expected)
    with pytest.raises(ValueError, match="whole numbers from 0.*got -1"):
        independent(torch.tensor([[0, -1]]))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_draws_are_of_the_kernel_that_was_chosen(shape):
    """Both moments, and batches. Fault: all kernels drawn with one weight."""
    torch.manual_seed(0)
    probs = torch.tensor([0.7, 0.2, 0.1]).expand(*shape, 3)
    loc = torch.tensor([[0.0, 5.0], [3.0, -1.0], [-4.0, 2.0]]).expand(*shape, 3, 2)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.1], [2.0, 1.0]]).expand(*shape, 3, 2)
    mixture = NormalKernels(probs, dist.Normal(loc, scale).to_event(1))
    x = mixture.sample((20_000,))
    assert x.shape == (20_000, *shape, 2)
    error = mixture.variance.sqrt() / 20_000**0.5
    assert ((x.mean(0) - mixture.mean).abs() < 4 * error).all()
    assert ((x.var(0) / mixture.variance - 1).abs() < 0.06).all()
    assert mixture.sample().shape == (*shape, 2)


@pytest.mark.parametrize(
    "fitted",
    [
        kernel_density,
        independent,
        functools.partial(gaussian_mixture, num_components=2),
        functools.partial(kernel_density, support=constraints.real),
    ],
)
def test_what_was_fitted_stands_in_a_plate(fitted):
    """Fault: classes with a constructor of their own, and torch's ``expand``."""
    x = torch.randn(60, 2)
    base = fitted(x)
    with pyro.plate("rows", 5):
        draws = pyro.sample("x", base)
    assert draws.shape == (5, 2)
    assert len(draws.unique(dim=0)) == 5
    many = base.expand([5])
    torch.testing.assert_close(many.log_prob(x[:5]), base.log_prob(x[:5]))
    torch.testing.assert_close(many.log_prob(x[0]), base.log_prob(x[0]).expand(5))


def test_draws_carry_no_gradient():
    """Fault: a gradient of zero, which would be believed."""
    loc = torch.zeros(3, requires_grad=True)
    mixture = NormalKernels(torch.ones(3), dist.Normal(loc, 1.0))
    assert not mixture.sample((2,)).requires_grad
