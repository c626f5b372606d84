"""Normal distributions and mixtures, fitted to data."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import partition
from pyro_ebm.bases import gaussian_mixture, normal
from pyro_ebm.bases.mixture import NormalMixture
from pyro_ebm.energies import DistributionEnergy
from pyro_ebm.testing import assert_moments

pytest.importorskip("sklearn")


def two_clusters(number=2000):
    near = torch.randn(number, 2) * torch.tensor([0.5, 1.0]) - 3
    far = torch.randn(number // 2, 2) + torch.tensor([10.0, 3.0])
    return torch.cat([near, far])


def test_a_normal_has_the_moments_of_the_data():
    data = torch.randn(500, 3) @ torch.randn(3, 3) + 7
    base = normal(data)
    torch.testing.assert_close(base.mean, data.mean(0))
    covariance = data.T.cov(correction=0)
    torch.testing.assert_close(base.covariance_matrix, covariance, rtol=1e-4, atol=1e-4)


def test_the_mixture_is_that_of_the_clusters():
    base = gaussian_mixture(two_clusters(), 2)
    order = base.component_distribution.loc[:, 0].argsort()
    probs = base.mixture_distribution.probs[order]
    torch.testing.assert_close(probs, torch.tensor([2 / 3, 1 / 3]), atol=0.01, rtol=0)
    parts = base.component_distribution
    wanted = torch.tensor([[-3.0, -3.0], [10.0, 3.0]])
    torch.testing.assert_close(parts.loc[order], wanted, atol=0.1, rtol=0)
    sd = parts.variance.sqrt()[order]
    wanted = torch.tensor([[0.5, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(sd, wanted, atol=0.08, rtol=0)


def test_units_do_not_matter():
    """The density of scaled data is the scaled density. Fault: an absolute floor."""
    data, scale = two_clusters(400), torch.tensor([1e-5, 1e4])
    base, scaled = gaussian_mixture(data, 2), gaussian_mixture(data * scale, 2)
    wanted = base.log_prob(data) - scale.log().sum()
    torch.testing.assert_close(scaled.log_prob(data * scale), wanted)


@pytest.mark.parametrize("fitter", [normal, gaussian_mixture])
def test_on_a_support_it_is_normalised_and_near_the_data(fitter):
    data = dist.Beta(2.0, 5.0).sample((1000,))
    base = fitter(data, support=constraints.unit_interval)
    energy = DistributionEnergy(base)
    assert abs(partition.quadrature(energy, progress_bar=False).value) < 1e-5
    draws = base.sample((4000,))
    assert ((draws > 0) & (draws < 1)).all()
    assert abs(draws.mean() - data.mean()) < 0.02
    assert abs(draws.std() - data.std()) < 0.02


@pytest.mark.parametrize("fitter", [normal, gaussian_mixture])
def test_an_event_may_have_any_shape(fitter):
    data = torch.randn(100, 2, 3)
    base = fitter(data)
    assert base.event_shape == (2, 3)
    flat = fitter(data.reshape(100, 6))
    torch.testing.assert_close(base.log_prob(data), flat.log_prob(data.reshape(100, 6)))
    scalars = fitter(data[:, 0, 0])
    assert scalars.event_shape == ()
    assert scalars.log_prob(data[:, 0, 0]).shape == (100,)


@pytest.mark.parametrize("fitter", [normal, gaussian_mixture])
def test_columns_may_be_constant_or_equal(fitter):
    data = torch.randn(200, 1).expand(200, 2)
    data = torch.cat([data, torch.ones(200, 1)], 1)
    base = fitter(data)
    assert base.log_prob(data).isfinite().all()
    assert base.sample((10,)).isfinite().all()


def test_the_density_is_that_of_the_general_mixture(monkeypatch):
    """In one piece or many. Fault: pieces that are put together wrongly."""
    base = gaussian_mixture(two_clusters(200), 4)
    general = dist.MixtureSameFamily(
        base.mixture_distribution, base.component_distribution
    )
    x = base.sample((3, 7))
    torch.testing.assert_close(base.log_prob(x), general.log_prob(x))
    monkeypatch.setattr("pyro_ebm.bases.mixture._CHUNK", 16)
    torch.testing.assert_close(base.log_prob(x), general.log_prob(x))


def test_draws_are_those_of_the_mixture():
    """Correlated, too. Fault: a factor of the covariance that is transposed."""
    data = two_clusters()
    data[:, 1] += data[:, 0].sub(data[:, 0].mean()).mul(0.5) + 0.8 * data[:, 0].sin()
    base = gaussian_mixture(data, 2)
    draws = base.sample((2, 10_000)).reshape(-1, 2)
    wanted = torch.einsum(
        "k,kij->ij",
        base.mixture_distribution.probs,
        base.component_distribution.covariance_matrix,
    ) + base.loc.mT.cov(correction=0, aweights=base.mixture_distribution.probs)
    torch.testing.assert_close(draws.mT.cov(), wanted, rtol=0.05, atol=0.1)
    torch.testing.assert_close(draws.mean(0), base.mean, atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), base.stddev, atol=0.1, rtol=0)
    left = (draws[:, 0] < 3).double()  # in no order
    assert abs(left[:10_000].mean() - left[10_000:].mean()) < 0.03
    assert abs(left.mean() - 2 / 3) < 0.02


def test_torch_keeps_its_stream():
    data = two_clusters(200)
    before = torch.get_rng_state()
    gaussian_mixture(data)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("data", "settings", "error", "match"),
    [
        (torch.zeros(5, 2).long(), {}, TypeError, "floating-point tensor, got torch.i"),
        ([[1.0]], {}, TypeError, "got list"),
        (torch.zeros(1, 2), {}, ValueError, r"N >= 2, got \(1, 2\)"),
        (torch.tensor([1.0, torch.nan, 2.0]), {}, ValueError, "1 of 3 rows.*row 1"),
        (
            torch.tensor([1.0, -1.0]),
            {"support": constraints.positive},
            ValueError,
            "inside of",
        ),
        (torch.randn(5, 2), {"num_components": 6}, ValueError, "from 1 to.* 5; got 6"),
    ],
)
def test_bad_input(data, settings, error, match):
    with pytest.raises(error, match=match):
        gaussian_mixture(data, **settings)


def test_density_and_draws_of_a_mixture_are_those_of_its_parent():
    """Far from the origin. Faults: the offset left out; a factor transposed."""
    loc = torch.tensor([[98.0, 100.0], [102.0, 99.0], [100.0, 103.0]])
    factors = (
        torch.tensor([[0.5, 0.0], [0.9, 0.3]])
        * torch.tensor([1.0, 2.0, 0.2])[:, None, None]
    )
    fast = NormalMixture(torch.tensor([0.2, 0.5, 0.3]), loc, factors)
    slow = dist.MixtureSameFamily(
        fast.mixture_distribution, fast.component_distribution
    )
    draws = fast.sample((3, 2000))
    assert torch.allclose(fast.log_prob(draws), slow.log_prob(draws))
    assert_moments(draws.flatten(0, 1), slow.mean, slow.variance)
    rotated = (draws.flatten(0, 1) - slow.mean).sum(-1)
    known = slow.sample((6000,)) - slow.mean
    assert rotated.var().item() == pytest.approx(known.sum(-1).var().item(), rel=0.1)
