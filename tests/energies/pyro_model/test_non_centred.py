"""Standardised sites of a model: which there are, the map, and the energy.

Faults that a test is meant to catch are named with it, and were seen to be caught.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.pyro_model.non_centred import NonCentring, sites_to_standardise


def funnel():
    loc = pyro.sample("loc", dist.Normal(3.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 4):
        x = pyro.sample("x", dist.Normal(loc, tau))
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.arange(4.0))


def nested():
    """Two levels, of which the second needs the values of the first."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    a = pyro.sample("a", dist.Normal(torch.zeros(2), tau).to_event(1))
    pyro.sample("b", dist.Normal(a, (a.sum() / 2 + tau.log()).exp()).to_event(1))


def walk():
    """Under ``pyro.markov``, whose scope Pyro loses where a site is standardised."""
    tau, x = pyro.sample("tau", dist.HalfNormal(1.0)), torch.tensor(0.0)
    for t in pyro.markov(range(4)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, tau))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=torch.tensor(0.3))


def slopes():
    """Pairs that vary together, of rows that a plate holds, and a fixed covariance."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
    pyro.sample("fixed", dist.MultivariateNormal(tau, 2 * torch.eye(2)))
    with pyro.plate("rows", 3):
        fn = dist.MultivariateNormal(tau, scale_tril=tau[:, None] * factor)
        x = pyro.sample("x", fn)
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.arange(3.0))


def test_latent_normal_sites_of_a_latent_scale():
    """Faults: runs at the same values; observed sites; fixed scales;
    weighted sites, whose volume counts once; multivariate ones left out."""

    def model():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("fixed", dist.Normal(loc, 2.0))
        pyro.sample("cauchy", dist.Cauchy(loc, tau))
        pyro.sample("grouped", dist.Normal(loc, tau).expand([3]).to_event(1))
        pyro.sample("seen", dist.Normal(loc, tau), obs=torch.tensor(0.3))
        with pyro.poutine.scale(scale=2.0):
            pyro.sample("weighted", dist.Normal(loc, tau))
        with pyro.poutine.mask(mask=torch.tensor(False)):
            pyro.sample("masked", dist.Normal(loc, tau))

    random = torch.get_rng_state()
    assert sites_to_standardise(PyroModelEnergy(model)) == ("grouped",)
    assert torch.equal(torch.get_rng_state(), random)
    assert sites_to_standardise(PyroModelEnergy(nested)) == ("a", "b")
    assert sites_to_standardise(PyroModelEnergy(slopes)) == ("x",)


def test_none_of_a_model_with_plates_that_subsample_or_discrete_sites():
    def subsampled():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        x = pyro.sample("x", dist.Normal(0.0, tau))
        with pyro.plate("rows", 10, subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(10)[rows])

    @pyro.infer.config_enumerate
    def discrete():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        x = pyro.sample("x", dist.Normal(0.0, tau))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(x * k, 1.0), obs=torch.tensor(0.2))

    for model in (subsampled, discrete):
        assert sites_to_standardise(PyroModelEnergy(model)) == ()


def test_the_map_is_the_closed_form():
    """Fault: the loc left out."""
    map = NonCentring(PyroModelEnergy(funnel), ["x"])
    v = torch.randn(5, 6)
    want = torch.cat([v[:, :2], v[:, :1] + v[:, 1:2].exp() * v[:, 2:]], 1)
    torch.testing.assert_close(map.to_model(v), want)
    torch.testing.assert_close(map.from_model(want), v)
    torch.testing.assert_close(map.to_model(v.reshape(5, 1, 6))[:, 0], want)


@pytest.mark.parametrize("model", [funnel, nested, slopes, walk])
@pytest.mark.parametrize("in_double", [False, True])
def test_energy_and_gradient_are_those_of_the_change_of_variables(model, in_double):
    """By autograd through the map; the nested map is triangular.

    Faults: the Cholesky factor transposed; the log-volume with the other sign; sites
    one after the other in the standardised values of those before.
    """
    centred = PyroModelEnergy(model)
    centred = centred.in_double() if in_double else centred
    sites = sites_to_standardise(centred)
    map = NonCentring(centred, sites)
    energy, v = map.energy(), torch.randn(4, *centred.event_shape) / 2
    u = map.to_model(v)
    torch.testing.assert_close(map.from_model(u), v)
    jacobian = torch.stack(
        [torch.func.jacrev(lambda v: map._moved(v, inverse=False)[0])(row) for row in v]
    )
    volume = torch.linalg.slogdet(jacobian).logabsdet
    value, grad = energy.value_and_grad(v)
    torch.testing.assert_close(value, centred(u) - volume)
    torch.testing.assert_close(map.gradient(v, centred.value_and_grad(u)[1]), grad)


def test_standardised_values_are_standard_normal_without_data():
    """``f_v`` of a normal given its scale is a sum of two terms."""

    def prior():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(7.0, tau).expand([3]).to_event(1))

    energy, v = NonCentring(PyroModelEnergy(prior), ["x"]).energy(), torch.randn(6, 4)
    want = v.square().sum(1) / 2 + 4 * math.log(2 * math.pi) / 2
    torch.testing.assert_close(energy(v), want)


def test_points_of_no_batch():
    map = NonCentring(PyroModelEnergy(funnel), ["x"])
    assert map.to_model(torch.zeros(0, 6)).shape == (0, 6)
