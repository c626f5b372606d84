"""What a model computes at given draws: deterministic sites, data, log-likelihood."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies.pyro_model.outputs import model_outputs

Y = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    pyro.deterministic("total", scale.sum())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale.sum()), obs=y)
    pyro.factor("nothing", torch.zeros(()))


def points(num_draws=7):
    return {"loc": torch.randn(num_draws), "scale": torch.rand(num_draws, 2) + 0.1}


def check_outputs(run, y, values, log_prob):
    found = model_outputs(run, (y,), {}, values)
    torch.testing.assert_close(found.log_likelihood["y"], log_prob)
    assert torch.equal(found.observed["y"], y)
    return found


@pytest.mark.parametrize("chunk", [2**20, 12])
def test_outputs_are_the_models(chunk, monkeypatch):
    """Planted: scales of plates in the log-likelihood; a chunk left out."""
    monkeypatch.setattr("pyro_ebm.energies.pyro_model.outputs._CHUNK", chunk)
    values = points()
    total = values["scale"].sum(-1)
    normal = dist.Normal(values["loc"][:, None], total[:, None])
    state = torch.get_rng_state()
    found = check_outputs(model, Y, values, normal.log_prob(Y))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found.deterministic, {"total": total})
    assert set(found.observed) == {"y"}


def test_outputs_of_a_model_that_branches():
    """A run a draw, as it can be evaluated in no other way."""

    def branching(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = 1.0 if loc.item() > 0 else 2.0
        pyro.sample("y", dist.Normal(loc, scale).expand([3]).to_event(1), obs=y)

    loc = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    expected = dist.Normal(loc[:, None], scale[:, None]).log_prob(Y).sum(-1)
    check_outputs(branching, Y, {"loc": loc}, expected)


def test_outputs_of_missing_data_are_nan():
    mask = torch.tensor([True, False, True])

    def missing(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    loc = torch.randn(4, dtype=torch.float64)
    expected = dist.Normal(loc[:, None], 1.0).log_prob(Y)
    found = model_outputs(missing, (Y,), {}, {"loc": loc})
    torch.testing.assert_close(
        found.log_likelihood["y"], expected.where(mask, torch.nan), equal_nan=True
    )


def test_only_data_where_there_are_discrete_latents_or_subsamples():
    """Planted: log-likelihoods given a class that was drawn from the prior."""

    def mixture(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)

    def subsampled(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[rows])

    for run in (mixture, subsampled):
        found = model_outputs(run, (Y,), {}, {"loc": torch.randn(4)})
        assert (found.deterministic, found.log_likelihood) == ({}, {})
        assert "y" in found.observed
