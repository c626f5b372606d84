"""Draws nearer to an edge than a floating-point number can be.

Seen to fail with the draws of torch, two fifths of which are the least number.
"""

import math
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy, PyroModelEnergy, unconstrained
from pyro_ebm.energies.pyro_model.runs import _edge_draw, run_model
from pyro_ebm.energies.views.double import in_double
from pyro_ebm.partition.base_check import check_draws

NUMBER = torch.tensor
DISTRIBUTIONS = {
    "gamma": lambda: dist.Gamma(NUMBER(2.5), 3.0),
    "small gamma": lambda: dist.Gamma(NUMBER(0.05), 3.0),
    "inverse gamma": lambda: dist.InverseGamma(NUMBER(0.7), 3.0),
    "chi2": lambda: dist.Chi2(NUMBER(3.0)),
    "beta": lambda: dist.Beta(NUMBER(0.1), 2.0),
    "dirichlet": lambda: dist.Dirichlet(NUMBER([0.1, 0.5, 3.0, 1.0])),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_their_law(name):
    """By one and each coordinate, weighed by a proposal: in double precision."""
    one = DISTRIBUTIONS[name]()
    u = _edge_draw(one.expand([40_000])).reshape(40_000, -1)
    flat, transform = unconstrained(DistributionEnergy(one))
    draws = transform(u.reshape(-1, *flat.event_shape))
    if name in ("gamma", "chi2", "dirichlet"):
        error = draws.std(0) / 200
        assert ((draws.mean(0) - one.mean).abs() < 4 * error).all()

    def model():
        pyro.sample("x", one)

    prior = in_double(PyroModelEnergy(model)).prior
    assert check_draws(prior) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_priors_with_little_concentration(dtype):
    def model():
        precision = pyro.sample("precision", dist.Gamma(0.01, 0.01))
        p = pyro.sample("p", dist.Dirichlet(0.5 * torch.ones(3)))
        with pyro.plate("groups", 2):
            q = pyro.sample("q", dist.Beta(0.1, 1.0))
            x = pyro.sample("x", dist.Normal(p[..., 0] + precision, 1.0))
            pyro.sample("y", dist.Normal(x + q, 1.0), obs=torch.zeros(2))

    energy = in_double(PyroModelEnergy(model))
    u = energy.prior.sample((20_000,))
    assert u.dtype == torch.float64
    assert u.isfinite().all()
    assert energy.prior._draw_many
    # The least numbers of double precision are about e^-745.
    known = energy.prior.log_prob(u).isfinite().double().mean()
    assert abs(known - 1 + math.exp(-7.45)) < 0.001
    # The logarithm of a gamma of concentration 0.01 and rate 0.01, by its digamma.
    wanted = torch.digamma(NUMBER(0.01)) - math.log(0.01)
    assert abs(u[:, 0].mean() - wanted) < 4 * u[:, 0].std() / 20_000**0.5
    assert check_draws(energy.prior) is None


def test_other_distributions_are_not_drawn():
    assert _edge_draw(dist.Normal(0.0, 1.0)) is None
    assert _edge_draw(dist.LKJCholesky(3, 1.0)) is None


def test_models_are_recorded_without_the_compiler(monkeypatch):
    """Whose import takes longer than many a model."""
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)

    def model():
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(2)).to_event(1))
        mean = pyro.sample("mean", dist.Uniform(-1.0, 3.0))
        errors = (mean - torch.ones(5)).clone()
        errors[1:3] *= scale.sum()  # writes into a tensor
        errors.masked_fill_(errors > 5, 5.0)
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(errors, scale[0]), obs=torch.zeros(5))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy = PyroModelEnergy(model)
    assert energy.is_traced


def test_a_factor_that_is_always_nan_is_placed():
    """Pyro's own words name no site. Fault: the name of the first one."""

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.log(-1 - b**2))

    with pytest.raises(ValueError, match="factor after the site 'b' is nan at each"):
        run_model(model, (), {})
