r"""Posteriors of Pyro models against the truth: simulation-based calibration, schools.

Of parameters drawn from the prior, with data drawn from the model, the rank of the
truth among independent posterior draws is uniform (Talts et al. 2018,
arXiv:1804.06788). All data sets are plates of one model, so that one run serves them
all; the last draws of the chains are independent, so that no thinning is needed.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.mcmc import HMC, MCMC, ULA
from pyro_ebm.mcmc.kernels.chees import ChEES

NUM_SETS, NUM_CHAINS, NUM_BINS = 256, 31, 16
#: Quantile of the chi-square distribution with 15 degrees of freedom at 1e-4.
LIMIT = 44.3

pytestmark = pytest.mark.filterwarnings(
    "ignore::pyro_ebm.core.errors.UnreliableWarning"
)

X = torch.tensor([[-1.0], [0.0], [0.5], [2.0]], dtype=torch.float64)


def regression(y=None, prior_scale=1.0):
    """Intercept, slope and noise of four observations in each data set."""
    with pyro.plate("sets", NUM_SETS):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, prior_scale))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 4):
            return pyro.sample("y", dist.Normal(loc + slope * X, scale), obs=y)


def gamma_poisson(y=None, prior_scale=1.0):
    """The rate of three counts in each data set, on a constrained support."""
    with pyro.plate("sets", NUM_SETS):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0 / prior_scale))
        with pyro.plate("data", 3):
            return pyro.sample("y", dist.Poisson(rate), obs=y)


def ranks(model, kernel, warmup_steps=120, thinning=20, **wrong):
    """Rank of the truth among one draw of each chain, ``(NUM_SETS,)`` a site."""
    trace = pyro.poutine.trace(model).get_trace()
    y = trace.nodes["y"]["value"]
    settings = {"thinning": thinning, "progress_bar": False}
    mcmc = MCMC(kernel, 1, warmup_steps, NUM_CHAINS, **settings)
    mcmc.run(model, y, **wrong)
    draws = mcmc.get_samples()
    return {k: (v < trace.nodes[k]["value"]).sum(0) for k, v in draws.items()}


def assert_uniform(ranks):
    bins = ranks * NUM_BINS // (NUM_CHAINS + 1)
    counts = torch.bincount(bins, minlength=NUM_BINS).double()
    expected = NUM_SETS / NUM_BINS
    assert ((counts - expected) ** 2 / expected).sum() < LIMIT


def calibrate(*args, **settings):
    for found in ranks(*args, **settings).values():
        assert_uniform(found)


MODELS = [regression, gamma_poisson]


@pytest.mark.parametrize(
    ("model", "kernel"),
    [
        (regression, HMC(num_leapfrog=4)),
        (gamma_poisson, HMC(num_leapfrog=4)),
        (gamma_poisson, ChEES()),
        pytest.param(regression, ChEES(), marks=pytest.mark.slow),
    ],
)
def test_ranks_of_the_truth_are_uniform(model, kernel):
    """Planted faults below."""
    calibrate(model, kernel)


@pytest.mark.parametrize(
    "model", [gamma_poisson, pytest.param(regression, marks=pytest.mark.slow)]
)
def test_wrong_prior_is_caught(model):
    with pytest.raises(AssertionError):
        calibrate(model, HMC(num_leapfrog=4), prior_scale=0.5)


@pytest.mark.parametrize("model", MODELS)
def test_moves_without_a_test_are_caught(model):
    """Langevin moves of a fixed length, all taken: harmless only where short."""
    calibrate(model, ULA(step_size=0.02), warmup_steps=0, thinning=300)
    with pytest.raises(AssertionError):
        calibrate(model, ULA(step_size=0.2), warmup_steps=0, thinning=300)


def test_a_forgotten_jacobian_is_caught(monkeypatch):
    monkeypatch.setattr(
        "torch.distributions.transforms.ExpTransform.log_abs_det_jacobian",
        lambda self, x, y: torch.zeros_like(x),
    )
    with pytest.raises(AssertionError):
        calibrate(gamma_poisson, HMC(num_leapfrog=4))


EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def eight_schools(y, prior=dist.HalfCauchy):
    """Non-centred; Rubin (1981)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", prior(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, ERRORS), obs=y)


def exact_moments():
    """First and second moments by quadrature over log tau: the rest is Gaussian.

    Of tau itself the second moment converges slowly, so its logarithm is judged.
    """
    log_tau = torch.linspace(-15, 12, 20_001)
    tau = log_tau.exp()[:, None]
    variance = tau**2 + ERRORS**2
    precision = 1 / 25 + (1 / variance).sum(-1)
    mean = (EFFECTS / variance).sum(-1) / precision
    likelihood = dist.Normal(0.0, variance.sqrt()).log_prob(EFFECTS).sum(-1)
    likelihood = likelihood + precision * mean**2 / 2 - precision.log() / 2
    prior = dist.HalfCauchy(5.0).log_prob(tau[:, 0]) + log_tau
    weights = (likelihood + prior).softmax(0)
    shrink = tau**2 / variance  # given mu, theta is around (1 - shrink) mu + shrink y
    theta = (1 - shrink) * mean[:, None] + shrink * EFFECTS
    spread = shrink * ERRORS**2 + (1 - shrink) ** 2 / precision[:, None]
    moments = {
        "mu": (mean, mean**2 + 1 / precision),
        "log tau": (log_tau, log_tau**2),
        "theta": (theta, theta**2 + spread),
    }
    return {
        name: [torch.tensordot(weights, value, 1) for value in pair]
        for name, pair in moments.items()
    }


def run_eight_schools(*args):
    """Run; hold first and second moments to quadrature, with ``|z| < 4``."""
    mcmc = MCMC(ChEES(), 100, 150, 512, progress_bar=False)
    mcmc.run(eight_schools, EFFECTS, *args)
    draws = mcmc.get_samples(group_by_chain=True)
    mu, tau = draws["mu"], draws["tau"]
    theta = mu[..., None] + tau[..., None] * draws["eta"]
    for name, value in {"mu": mu, "log tau": tau.log(), "theta": theta}.items():
        for power, truth in enumerate(exact_moments()[name], start=1):
            means = (value**power).mean(1)  # of independent chains
            z = (means.mean(0) - truth) / (means.std(0) / math.sqrt(512))
            assert z.abs().max() < 4, (name, power)
    return mcmc


def test_eight_schools():
    """And the figures that everybody quotes; planted fault below."""
    mcmc = run_eight_schools()
    summary = mcmc.summary().sites
    assert summary["mu"].mean.item() == pytest.approx(4.4, abs=0.15)
    assert summary["mu"].sd.item() == pytest.approx(3.3, abs=0.15)
    assert summary["tau"].mean.item() == pytest.approx(3.6, abs=0.15)
    assert summary["tau"].sd.item() == pytest.approx(3.2, abs=0.3)
    assert mcmc.diagnostics().is_reliable, mcmc.diagnostics().reason


def test_eight_schools_with_a_slightly_wrong_prior_is_caught():
    with pytest.raises(AssertionError):
        run_eight_schools(dist.HalfNormal)
