"""Pyro's own inference on a model with an energy site."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO
from pyro.infer import autoguide as guides
from pyro.ops.stats import effective_sample_size

from pyro_ebm import EnergyDistribution, EnergyModel
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.mcmc import IndependentChains
from pyro_ebm.testing import CountingEnergy, assert_moments

LOC = torch.tensor([1.0, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
DATUM = torch.tensor([2.0, 1.0], dtype=torch.float64)
NOISE = 0.7


def energy_of(precision):
    def fn(x):
        residual = x - LOC
        return ((residual @ precision) * residual).sum(-1) / 2

    return FunctionEnergy(fn, (2,))


def gaussian():
    return EnergyDistribution(energy_of(COVARIANCE.inverse()))


def prior(q=None):
    return pyro.sample("x", gaussian() if q is None else q)


def posterior(q=None):
    x = prior(q)
    pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=DATUM)


POSTERIOR_COVARIANCE = (COVARIANCE.inverse() + torch.eye(2) / NOISE**2).inverse()
TRUTH = {
    prior: (LOC, COVARIANCE),
    posterior: (
        POSTERIOR_COVARIANCE @ (COVARIANCE.inverse() @ LOC + DATUM / NOISE**2),
        POSTERIOR_COVARIANCE,
    ),
}


def worst_z(x, mean, covariance):
    """Largest |z| of means, variances and the covariance, by effective sample size."""
    centred = x - mean
    product = centred[:, 0] * centred[:, 1]
    statistics = torch.cat([centred, centred**2, product[:, None]], -1)
    truth = torch.cat(
        [torch.zeros(2), covariance.diagonal(), covariance[0, 1].reshape(1)]
    )
    ess = effective_sample_size(statistics[None])
    error = statistics.std(0) / ess.sqrt()
    return ((statistics.mean(0) - truth) / error).abs().max()


def run(kernel, *args, num_samples=300):
    mcmc = MCMC(kernel, num_samples, 80, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()["x"]


@pytest.mark.parametrize("model", [prior, posterior])
@pytest.mark.parametrize(
    "kernel", [NUTS, lambda model: HMC(model, trajectory_length=1.5)]
)
def test_moments(kernel, model):
    """An energy of f / 2, so with covariances twice too large in the prior: seen
    to fail, as asserted for it below."""
    assert worst_z(run(kernel(model)), *TRUTH[model]) < 4


def test_moments_see_a_planted_fault():
    wrong = EnergyDistribution(energy_of(0.5 * COVARIANCE.inverse()))
    assert worst_z(run(NUTS(prior), wrong), *TRUTH[prior]) > 4


def test_nuts_on_a_constrained_support():
    gamma = dist.Gamma(torch.tensor(3.0), 2.0)
    energy = FunctionEnergy(lambda x: 2 * x - 2 * x.log(), (), gamma.support)

    def model():
        pyro.sample("x", EnergyDistribution(energy))

    x = run(NUTS(model))[:, None]
    centred = torch.cat([x - 1.5, (x - 1.5) ** 2 - 0.75], -1)
    error = centred.std(0) / effective_sample_size(centred[None]).sqrt()
    assert (centred.mean(0) / error).abs().max() < 4


def test_starting_nuts_draws_nothing_from_the_energy():
    """Nothing but the gradients of its own trajectories: 10 draws of one leapfrog.
    Without ``max_plate_nesting`` Pyro runs the model once more, to count the plates."""
    energy = CountingEnergy(energy_of(COVARIANCE.inverse()))
    kernel = NUTS(
        lambda: prior(EnergyDistribution(energy)),
        step_size=0.1,
        adapt_step_size=False,
        max_tree_depth=1,
        max_plate_nesting=0,
    )
    MCMC(kernel, 5, 5, disable_progbar=True).run()
    assert energy.num_gradients + energy.num_values < 40


def test_nuts_on_an_energy_model_leaves_it_alone():
    energy_model = EnergyModel(NeuralEnergy((2,), (4,), base=normal()), normal())
    run(NUTS(lambda: prior(energy_model())), num_samples=5)
    assert not energy_model.chains.is_started
    assert all(p.grad is None for p in energy_model.parameters())


def normal():
    return dist.Normal(torch.zeros(2), 1.5).to_event(1)


# The rest of Pyro --------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_draws_from_the_prior(parallel):
    def model():
        x = pyro.sample("x", gaussian())
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1))

    num_samples = 2000 if parallel else 3
    draws = Predictive(model, num_samples=num_samples, parallel=parallel)()
    x, y = draws["x"].reshape(-1, 2), draws["y"].reshape(-1, 2)
    assert x.shape == (num_samples, 2)
    if parallel:
        assert_moments(x, LOC, COVARIANCE.diagonal())
        assert_moments(y, LOC, COVARIANCE.diagonal() + NOISE**2)


def test_predictive_from_posterior_draws_of_the_energy_site():
    x = torch.randn(50, 4, 2)
    draws = Predictive(prior_and_data, {"x": x}, parallel=True)()
    assert (draws["y"] - x).abs().max() < 6 * NOISE


def prior_and_data():
    with pyro.plate("data", 4):
        x = pyro.sample("x", gaussian())
        pyro.sample("y", dist.Normal(x, NOISE).to_event(1))


def test_condition_replay_and_trace():
    trace = poutine.trace(poutine.condition(prior, data={"x": DATUM})).get_trace()
    assert trace.nodes["x"]["is_observed"]
    expected = gaussian().log_prob(DATUM)
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    trace = poutine.trace(prior).get_trace()
    again = poutine.trace(poutine.replay(prior, trace=trace)).get_trace()
    assert torch.equal(again.nodes["x"]["value"], trace.nodes["x"]["value"])


def test_importance_sampling_with_a_guide():
    """Self-normalised, so log Z is not needed; its evidence is off by just log Z."""

    def guide():
        pyro.sample("x", dist.Normal(LOC, 1.2).to_event(1))

    importance = Importance(posterior, guide, num_samples=2000).run()
    x = torch.stack([t.nodes["x"]["value"] for t in importance.exec_traces])
    weights = importance.get_normalized_weights()
    mean, covariance = TRUTH[posterior]
    error = (weights[:, None] ** 2 * (x - mean) ** 2).sum(0).sqrt()
    assert ((weights @ x - mean) / error).abs().max() < 4
    log_partition = math.log(2 * math.pi) + COVARIANCE.logdet() / 2
    evidence = dist.MultivariateNormal(LOC, COVARIANCE + NOISE**2 * torch.eye(2))
    expected = evidence.log_prob(DATUM) + log_partition
    error = (weights**2).sum().sqrt()
    assert abs(importance.get_log_normalizer() - expected) < 4 * error


def test_importance_sampling_from_the_prior():
    short = IndependentChains(warmup_steps=5, num_steps=5)
    q = EnergyDistribution(energy_of(COVARIANCE.inverse()), sampler=short)
    importance = Importance(posterior, num_samples=5).run(q)
    assert importance.get_log_normalizer().isfinite()


@pytest.mark.parametrize(
    ("guide", "has_covariance"),
    [
        (guides.AutoNormal, False),
        (guides.AutoMultivariateNormal, True),
        (guides.AutoDelta, None),
        (guides.AutoLowRankMultivariateNormal, None),
        (guides.AutoLaplaceApproximation, None),
    ],
)
def test_autoguides(guide, has_covariance):
    """The variational optimum of a Gaussian posterior is known for each family."""
    guide = guide(posterior)
    loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / 400)})
    svi = SVI(posterior, guide, optim, loss)
    for _ in range(400):
        svi.step()
    if isinstance(guide, guides.AutoLaplaceApproximation):
        guide = guide.laplace_approximation()
        has_covariance = True
    mean, covariance = TRUTH[posterior]
    median = guide.median()["x"]
    torch.testing.assert_close(median, mean, atol=0.03, rtol=0)
    if has_covariance:
        scale_tril = guide.scale_tril
        if guide.scale_tril.shape and hasattr(guide, "scale"):
            scale_tril = guide.scale[:, None] * scale_tril
        got = scale_tril @ scale_tril.mT
        torch.testing.assert_close(got, covariance, atol=0.05, rtol=0.1)
    elif has_covariance is False:  # mean field: the inverse of the precision's diagonal
        variance = 1 / covariance.inverse().diagonal()
        got = guide.quantiles([0.158655, 0.841345])["x"]
        width = (got[1] - got[0]) / 2
        torch.testing.assert_close(width, variance.sqrt(), atol=0.04, rtol=0)


def map_of(model, num_steps=200):
    guide = guides.AutoDelta(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(num_steps):
        svi.step()
    return guide.median()


def test_the_mode_of_a_latent_that_an_energy_is_given():
    """``x ~ N(z, 1)``, ``z ~ N(0, 1)``: seen to stay at 0 with a copy of ``z``."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        q = EnergyDistribution(QuadraticEnergy(z))
        pyro.sample("x", q, obs=torch.tensor([2.0, -2.0]))

    torch.testing.assert_close(
        map_of(model)["z"], torch.tensor([1.0, -1.0]), atol=1e-3, rtol=0
    )


def test_pyro_param_given_to_an_energy_is_learned():
    def model():
        loc = pyro.param("loc", torch.zeros(2))
        q = EnergyDistribution(QuadraticEnergy(loc))
        pyro.sample("x", q, obs=torch.tensor([2.0, -2.0]))

    map_of(model)
    expected = torch.tensor([2.0, -2.0])
    torch.testing.assert_close(pyro.param("loc").detach(), expected, atol=1e-3, rtol=0)


# Batches of energies ------------------------------------------------------------------


def test_energies_of_a_latent_in_a_plate():
    """``x_n ~ N(z_n, 1)``, ``z_n ~ N(mu, 1)``, ``mu ~ N(0, 1)``: a linear model."""
    x = torch.tensor([[2.0, -2.0], [0.0, 1.0], [4.0, 1.0]])

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", EnergyDistribution(QuadraticEnergy(z)), obs=x)

    found = map_of(model)
    mu = x.sum(0) / 5  # of 3 observations of variance 2 and a prior of variance 1
    torch.testing.assert_close(found["mu"], mu, atol=2e-3, rtol=0)
    torch.testing.assert_close(found["z"], (mu + x) / 2, atol=2e-3, rtol=0)


def test_particles_and_plates_around_a_batch():
    x = torch.randn(3, 2)

    def model(build):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", build(z), obs=x)

    def guide(build):
        loc = pyro.param("loc", torch.zeros(3, 2))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    elbo = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    losses = []
    for build in (
        lambda z: EnergyDistribution(QuadraticEnergy(z)),
        lambda z: dist.Normal(z, 1.0).to_event(1),
    ):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(model, guide, build))
    assert losses[0] == pytest.approx(losses[1])


def test_a_network_of_contexts_is_learned():
    """A conditional Gaussian by its energy, beside the same as Pyro's own."""
    c = torch.linspace(-1, 1, 200)[:, None]
    x = torch.cat([2 * c, 1 - c], -1) + 0.5 * torch.randn(200, 2)
    found = []
    for build in (
        lambda loc, a: EnergyDistribution(QuadraticEnergy(loc, a)),
        lambda loc, a: dist.MultivariateNormal(loc, precision_matrix=a),
    ):
        torch.manual_seed(0)
        pyro.clear_param_store()
        network = torch.nn.Linear(1, 2)

        def model(build=build, network=network):
            pyro.module("network", network)
            scale = pyro.param("scale", torch.tensor(1.0))
            with pyro.plate("data", 200):
                q = build(network(c), scale.exp() * torch.eye(2))
                pyro.sample("x", q, obs=x)

        svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(30):
            svi.step()
        found.append(torch.cat([network.weight.flatten(), pyro.param("scale")[None]]))
    torch.testing.assert_close(*found)
