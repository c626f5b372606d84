"""A run in ArviZ: draws, deterministic sites, log-likelihood, data and statistics."""

import functools
import sys
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import PyroModelEnergy, QuadraticEnergy
from pyro_ebm.energies.pyro_model.outputs import model_outputs
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.report import export

unreliable_is_fine = pytest.mark.filterwarnings(
    "ignore::pyro_ebm.core.errors.UnreliableWarning"
)
Y = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    pyro.deterministic("total", scale.sum())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale.sum()), obs=y)
    pyro.factor("nothing", torch.zeros(()))


@functools.cache
def model_energy():
    """Traced once for all tests."""
    return PyroModelEnergy(model, Y)


def gaussian():
    return QuadraticEnergy(torch.zeros(2))


def sampler(num_samples=10, num_chains=16):
    return MCMC(HMC(num_leapfrog=3), num_samples, 30, num_chains, progress_bar=False)


def many():
    """More chains than draws, which ArviZ takes for a slip."""
    chains = sampler(num_samples=8, num_chains=64)
    chains.run(gaussian())
    return chains


def funnel():
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(5.0, tau).expand([4]).to_event(1))
    pyro.deterministic("z", (x - 5) / tau)
    pyro.sample("y", dist.Normal(x.sum(), 30.0), obs=torch.tensor(20.0))


@unreliable_is_fine
def test_standardised_sites_are_exported_as_those_of_the_model():
    """Seen to fail with the outputs of the standardised model."""
    pytest.importorskip("arviz")
    pyro.set_rng_seed(3)
    chains = MCMC(num_samples=20, num_chains=64, progress_bar=False)
    chains.run(funnel)
    assert chains.diagnostics().non_centred == ("x",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = chains.to_arviz()
    x, tau, z = (torch.tensor(data["posterior"][k].values) for k in ("x", "tau", "z"))
    torch.testing.assert_close(z, (x - 5) / tau[..., None], rtol=1e-4, atol=1e-4)
    want = dist.Normal(x.sum(-1), 30.0).log_prob(torch.tensor(20.0))
    got = torch.tensor(data["log_likelihood"]["y"].values)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@unreliable_is_fine
def test_to_arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    chains = sampler(num_samples=20)
    chains.run(model_energy())
    data = chains.to_arviz()
    assert data.posterior["scale"].shape == (16, 20, 2)
    assert data.sample_stats["acceptance_rate"].shape == (16, 20)
    assert data.sample_stats["diverging"].dtype == bool
    assert data.warmup_sample_stats["step_size"].shape == (16, 30)
    samples = chains.get_samples(group_by_chain=True)
    assert (data.posterior["loc"].values == samples["loc"].numpy()).all()
    found = chains.diagnostics().sites["loc"]
    r_hat = arviz.rhat(data, var_names="loc")["loc"].item()
    assert found.r_hat.item() == pytest.approx(r_hat, rel=1e-10)
    ess = arviz.ess(data, var_names="loc")["loc"].item()
    assert found.bulk_ess.item() == pytest.approx(ess, rel=1e-10)
    assert many().to_arviz().posterior["x"].shape == (64, 8, 2)
    # What the model computes at the draws.
    total = samples["scale"].sum(-1)
    assert data.posterior["total"].values == pytest.approx(total.numpy())
    normal = dist.Normal(samples["loc"][..., None], total[..., None])
    assert data.log_likelihood["y"].values == pytest.approx(normal.log_prob(Y).numpy())
    assert (data.observed_data["y"].values == Y.numpy()).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of three data, one may weigh much
        assert arviz.loo(data).n_data_points == 3
    assert "total" not in chains.to_arviz(log_likelihood=False).posterior
    # lp is the log density where the chains move.
    lp = -model_energy()(model_energy().unconstrain(samples))
    torch.testing.assert_close(torch.tensor(data.sample_stats["lp"].values), lp)


def test_without_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    chains = sampler(num_samples=4)
    with pytest.warns(UnreliableWarning):
        chains.run(gaussian())
    with pytest.raises(ImportError, match=r"pip install 'pyro-ebm\[arviz\]'"):
        chains.to_arviz()


@unreliable_is_fine
def test_arviz_would_drop_a_site_called_chain():
    pytest.importorskip("arviz")
    chains = sampler(num_samples=4)
    chains.run(lambda: pyro.sample("chain", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"not be called \['chain'\] in ArviZ"):
        chains.to_arviz()


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


@pytest.mark.parametrize("is_new", [False, True])
def test_both_signatures_of_arviz(is_new):
    """ArviZ 1 takes one dictionary, ArviZ 0 a group an argument."""

    def new(data, *, name=None, save_warmup=None, **kwargs):
        return data, save_warmup

    def old(posterior=None, *, log_likelihood=None, save_warmup=None, **kwargs):
        groups = {"posterior": posterior, "log_likelihood": log_likelihood, **kwargs}
        return groups, save_warmup

    arviz = SimpleNamespace(from_dict=new if is_new else old)
    groups = {"posterior": {"a": 1}, "log_likelihood": {"y": 2}}
    assert export._from_dict(arviz, groups) == (groups, False)
    groups["warmup_sample_stats"] = {"step_size": 3}
    assert export._from_dict(arviz, groups) == (groups, True)
