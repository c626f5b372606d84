"""Distributions given a part of their event, as priors, in Pyro, and learned."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.ops.stats import effective_sample_size
from torch import nn

from pyro_ebm import EnergyDistribution, EnergyModel, partition
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.distributions import Conditional, MixtureOfExperts
from pyro_ebm.energies import (
    ClampedEnergy,
    DistributionEnergy,
    FunctionEnergy,
    IsingEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
)
from pyro_ebm.infer import Learn, MaximumLikelihood
from pyro_ebm.mcmc import HMC, IndependentChains, ReplicaExchange
from pyro_ebm.testing import assert_moments
from pyro_ebm.testing.grid import GridDensity


class Banana(nn.Module):
    """Of a plane, bent; ``curvature`` bends it."""

    def __init__(self, curvature=0.7):
        super().__init__()
        self.curvature = nn.Parameter(torch.tensor(curvature))

    def forward(self, x):
        first, second = x.unbind(-1)
        residual = second - self.curvature * (first**2 - 1)
        return first.square() / 2 + residual.square() / 0.5


def banana(**settings):
    return EnergyDistribution(FunctionEnergy(Banana(), (2,)), **settings)


def normal(*loc, scale=1.5):
    return dist.Normal(torch.tensor(loc), scale).to_event(1)


def grid_of(conditional, low=-6, high=6):
    """The conditional of one free coordinate on a grid."""
    return GridDensity(lambda u: -conditional.energy(u[:, None]), low, high, 4001)


def moments(grid):
    mean = grid.mean(grid.points)
    return mean, grid.mean((grid.points - mean) ** 2)


# What it is --------------------------------------------------------------------------


def test_draws_are_those_of_the_conditional():
    """Draws of the marginal: planted, and seen to fail.

    There are two modes that no chain travels between. Their shares are right by
    symmetry, which the verdict cannot know.
    """
    conditional = banana().condition({1: 1.2})
    assert isinstance(conditional, Conditional)
    mean, variance = moments(grid_of(conditional))
    with pytest.warns(UnreliableWarning, match="in modes that they do not leave"):
        draws = conditional.sample((1000,))
    assert_moments(draws, mean, variance)
    with pytest.raises(AssertionError):  # planted
        assert_moments(banana().sample((1000,))[..., :1], mean, variance)


def test_log_prob_is_normalised_once_log_z_is_estimated():
    conditional = banana().condition({0: 1.5})
    assert not conditional.is_normalized
    estimate = partition.estimate(conditional)
    known = conditional.with_log_partition(estimate)
    assert known.is_normalized
    assert type(known) is Conditional
    assert not conditional.is_normalized
    # Given the first coordinate, the second is normal.
    truth = dist.Normal(0.7 * 1.25, 0.5)
    u = torch.randn(5, 1)
    expected = truth.log_prob(u[:, 0])
    torch.testing.assert_close(known.log_prob(u), expected, atol=1e-5, rtol=0)
    # Its log Z less that of the whole is the log marginal density of what is observed.
    whole = partition.quadrature(banana().energy).value
    marginal = dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.5))
    assert abs(estimate.value - whole - marginal) < 1e-4
    unreliable = estimate._replace(
        status=Status.UNRELIABLE, reasons=(Finding(Reason.NOT_MIXED, "why"),)
    )
    with pytest.warns(UnreliableWarning, match="why"):
        assert not conditional.with_log_partition(unreliable).is_normalized


def test_bayes_rule():
    """q(u | v) q(v) = q(u, v), with all three log Z estimated apart."""
    q = EnergyDistribution(banana().energy, partition.quadrature(banana().energy))
    given = q.condition({1: 0.4})
    given = given.with_log_partition(partition.estimate(given))
    log_marginal = given.log_partition - q.log_partition
    u = torch.randn(5, 1)
    total = given.log_prob(u) + log_marginal
    torch.testing.assert_close(total, q.log_prob(given.expand_event(u)))


def test_marginals_are_coordinates_of_draws():
    """Of the correlated Gaussian 0.6, whose conditionals are narrower by 0.64."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
    p = EnergyDistribution(QuadraticEnergy(torch.zeros(2), covariance.inverse()))
    assert_moments(p.sample((4000,))[..., 1:], 0.0, 1.0, fourth_central_moment=3.0)
    given = p.condition({0: 1.0})
    assert_moments(given.sample((4000,)), 0.6, 0.64, fourth_central_moment=3 * 0.64**2)


def test_gaussians_and_mixtures_are_exact_at_once():
    p = EnergyDistribution(QuadraticEnergy(torch.randn(4)) + 2.0)
    mixture = MixtureOfExperts([p, normal(0.0, 0.0, 1.0, 2.0)])
    for q in (p, mixture, EnergyDistribution(DistributionEnergy(normal(0.0, 1.0)))):
        given = q.condition({0: 0.3})
        assert given.is_normalized
        assert given.sampler is None
        u = given.sample((5,))
        truth = given.closed_form().distribution
        torch.testing.assert_close(given.log_prob(u), truth.log_prob(u))
        assert partition.estimate(given).status == "exact"


def test_a_latent_prior_and_its_observation_need_no_operator_of_their_own():
    """An energy as the prior of x and a Pyro likelihood: NUTS, the traced model with
    its evidence, and quadrature agree. Seen to fail with the datum left out."""
    q, y = banana(), torch.tensor([0.8, 1.5])

    def model():
        x = pyro.sample("x", q)
        pyro.sample("y", dist.Normal(x, 0.6).to_event(1), obs=y)

    likelihood = FunctionEnergy(
        lambda x: -dist.Normal(x, 0.6).log_prob(y).sum(-1), (2,)
    )
    joint = q.energy + likelihood
    line = torch.linspace(-5, 6, 301)
    points = torch.cartesian_prod(line, line)
    mass = (-joint(points)).softmax(0).detach()
    mean = mass @ points
    variance = mass @ (points - mean) ** 2
    mcmc = MCMC(NUTS(model), 250, 60, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["x"]

    def worst(mean, variance):
        statistics = torch.cat([x - mean, (x - mean) ** 2 - variance], -1)
        error = statistics.std(0) / effective_sample_size(statistics[None]).sqrt()
        return (statistics.mean(0) / error).abs().max()

    assert worst(mean, variance) < 4
    prior = (-q.energy(points)).softmax(0).detach()
    assert worst(prior @ points, prior @ (points - prior @ points) ** 2) > 4  # planted
    energy = PyroModelEnergy(model)
    assert energy.is_traced
    evidence = partition.quadrature(joint).value
    assert abs(partition.quadrature(energy).value - evidence) < 1e-4
    draws = IndependentChains()(energy, 500)
    assert_moments(energy.constrain(draws)["x"], mean, variance)


# Bases and samplers ------------------------------------------------------------------


def test_base_and_sampler_are_derived():
    whole = normal(1.0, 2.0, 3.0)
    energy = FunctionEnergy(lambda x: (x**2).sum(-1) + x.prod(-1).sin(), (3,))
    sampler = IndependentChains(whole, HMC(0.3), warmup_steps=7)
    for q in (
        EnergyModel(energy, whole)(),
        EnergyDistribution(energy, sampler=sampler),
        EnergyDistribution(energy, sampler=ReplicaExchange(whole)),
    ):
        given = q.condition({1: 0.0})
        assert given.base.mean.tolist() == [1.0, 3.0]
        assert type(given.sampler) is type(q.sampler)
        assert given.sampler.base is given.base
        assert given.sampler.kernel == q.sampler.kernel
        assert q.condition({1: 0.0}).sampler.start(given.energy, 4).shape == (4, 2)
    assert given.sample((3,)).shape == (3, 2)
    exact = partition.quadrature(given.energy).value
    found = partition.estimate(given, method="smc", budget=8_000)
    assert abs(found.value - exact) < 4 * found.std_error + 0.01
    own = normal(0.0, 0.0)
    assert q.condition({1: 0.0}, base=own).sampler.base is own
    assert q.condition({1: 0.0}, sampler=sampler).sampler is sampler


def test_the_base_of_a_mixture_is_a_mixture():
    ring = FunctionEnergy(lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,))
    ring = EnergyDistribution(
        ring, partition.quadrature(ring), sampler=IndependentChains(normal(0.0, 0.0))
    )
    given = MixtureOfExperts([ring, normal(3.0, 4.0)], [0.6, 0.4]).condition({0: 1.0})
    assert given.base.weights.tolist() == [0.6, 0.4]
    assert [part.mean.item() for part in given.base.experts] == [0.0, 4.0]
    assert given.sampler.base is given.base


def test_without_a_base_one_is_taken_or_asked_for():
    energy = FunctionEnergy(lambda x: (x**2).sum(-1) + x.prod(-1).sin(), (4,))
    given = EnergyDistribution(energy).condition({1: 0.0})
    assert given.base is None
    assert given.sampler == IndependentChains()
    found = partition.estimate(given, progress_bar=False)
    assert found.is_reliable
    assert found.method.endswith("base: standard normal")
    student = dist.MultivariateStudentT(5.0, torch.zeros(4), torch.eye(4))
    q = EnergyDistribution(energy, sampler=ReplicaExchange(student))
    with pytest.raises(ValueError, match="base must be given: ReplicaExchange"):
        q.condition({1: 0.0})
    assert EnergyModel(energy, student)().condition({1: 0.0}).sampler.base is None


def test_a_constrained_support_is_kept():
    gamma = dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1)
    energy = DistributionEnergy(gamma) + FunctionEnergy(
        lambda x: x.prod(-1), (2,), gamma.support
    )
    given = EnergyDistribution(energy).condition({0: 2.0})
    assert_moments(given.sample((1000,)), 1.0, 1 / 3)  # Gamma(3, 3)
    with pytest.raises(ValueError, match="x must lie in the support"):
        given.log_prob(torch.tensor([-1.0]))


# In Pyro -----------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_shapes(exact):
    q = EnergyDistribution(QuadraticEnergy(torch.zeros(2))) if exact else banana()
    given = q.condition({0: 0.5}).expand([3])
    x = given.sample((2,))
    assert x.shape == (2, 3, 1)
    assert given.log_prob(x).shape == (2, 3)
    assert given.expand_event(x).shape == (2, 3, 2)
    assert (given.expand_event(x)[..., 0] == 0.5).all()


@pytest.mark.filterwarnings("ignore:R-hat of the chains of the draws")
def test_plates_and_nuts():
    given = banana().condition({1: 1.2})

    def model():
        with pyro.plate("plate", 2):
            return pyro.sample("u", given)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["u"]["log_prob"].shape == (2,)
    mcmc = MCMC(
        NUTS(lambda: pyro.sample("u", banana().condition({0: 1.5}))),
        200,
        60,
        disable_progbar=True,
    )
    mcmc.run()
    u = mcmc.get_samples()["u"]
    residual = (u[:, 0] - 0.7 * 1.25) / 0.5
    statistics = torch.stack([residual, residual**2 - 1], -1)
    error = statistics.std(0) / effective_sample_size(statistics[None]).sqrt()
    assert (statistics.mean(0) / error).abs().max() < 4


def test_gradient_of_the_likelihood_is_that_of_quadrature():
    """As prediction of one coordinate by another is learned. The gradient of the joint
    likelihood: planted, and seen to fail."""
    q, data = banana(), torch.tensor([[0.3], [-1.7], [1.1], [1.4]])

    def model(given):
        pyro.module("energy", q.energy)
        with pyro.plate("data", len(data)):
            value = (
                data if given else torch.cat([data, torch.full_like(data, -0.8)], -1)
            )
            pyro.sample("u", q.condition({1: -0.8}) if given else q, obs=value)

    def worst(given):
        grads = []
        for _ in range(15):
            learned = Learn(model, MaximumLikelihood(num_chains=200, num_steps=40))
            loss = Trace_ELBO().differentiable_loss(learned, lambda _: None, given)
            grads += torch.autograd.grad(-loss, list(q.energy.parameters()))
        grads = torch.stack(grads)
        return abs(grads.mean() - exact) / grads.std() * math.sqrt(len(grads))

    line = torch.linspace(-6, 6, 2001)[:, None]
    energy = ClampedEnergy(q.energy, {1: -0.8})
    log_prob = -energy(data) - torch.logsumexp(-energy(line), 0)
    (exact,) = torch.autograd.grad(log_prob.sum(), list(q.energy.parameters()))
    assert worst(True) < 4
    assert worst(False) > 4  # planted


def test_composes_again():
    """A conditional of a conditional, a mixture of conditionals."""
    p = EnergyDistribution(QuadraticEnergy(torch.randn(4), torch.eye(4) + 0.3))
    twice = p.condition({1: 0.5}).condition({2: -1.0})
    once = p.condition({1: 0.5, 3: -1.0})
    u = torch.randn(5, 2)
    torch.testing.assert_close(twice.log_prob(u), once.log_prob(u))
    either = MixtureOfExperts([once, normal(0.0, 0.0)], [0.5, 0.5])
    expected = torch.logaddexp(once.log_prob(u), normal(0.0, 0.0).log_prob(u))
    torch.testing.assert_close(either.log_prob(u), expected - math.log(2))


def test_repr_pickle_and_deepcopy():
    given = EnergyDistribution(FunctionEnergy(torch.sum, (5,)), 1.0).condition(
        {0: 1.0, 3: 2.0}
    )
    assert repr(given).startswith(
        "Conditional(FunctionEnergy | 2 observed, batch_shape: (), event_shape: (3,)"
    )
    given = EnergyDistribution(QuadraticEnergy(torch.ones(3)).requires_grad_(False))
    given = given.condition({0: 1.0}).expand([2])
    u = torch.randn(2, 2)
    for other in (pickle.loads(pickle.dumps(given)), copy.deepcopy(given)):
        assert torch.equal(other.log_prob(u), given.log_prob(u))
        assert torch.equal(other.expand_event(u), given.expand_event(u))


# Bad input ---------------------------------------------------------------------------


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match="must be an EnergyDistribution, got Independ"):
        Conditional(normal(0.0, 1.0), {0: 1.0})
    with pytest.raises(ValueError, match="Condition first, then expand"):
        banana().expand([3]).condition({0: 1.0})
    with pytest.raises(ValueError, match=r"index 2 is not in an event of shape \(2,\)"):
        banana().condition({2: 1.0})
    with pytest.raises(ValueError, match="holds all 2 numbers"):
        banana().condition({0: 1.0, 1: 1.0})
    counts = constraints.independent(constraints.nonnegative_integer, 1)
    energy = FunctionEnergy(lambda x: x.sum(-1), (2,), counts)
    with pytest.raises(NotImplementedError, match="continuous or finite support"):
        EnergyDistribution(energy).condition({0: 1.0})
    with pytest.raises(ValueError, match="lie in the support"):
        EnergyDistribution(IsingEnergy((2, 2), 0.5)).condition({(0, 0): 0.0})
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 1\)"):
        banana().condition({0: 1.0}).log_prob(torch.zeros(2))


def test_a_log_partition_given_later_makes_it_a_guide_for_importance():
    energy = FunctionEnergy(lambda x: (x**4 + x**2).sum(-1), (2,))
    conditional = EnergyDistribution(energy).condition({0: 1.0})

    def run(q):
        def model():
            pyro.sample("u", dist.Normal(torch.zeros(1), 2.0).to_event(1))

        guide = lambda: pyro.sample("u", q)  # noqa: E731
        return pyro.infer.Importance(model, guide, num_samples=2).run()

    with pytest.raises(NotImplementedError, match="stands in a guide"):
        run(conditional)
    run(conditional.with_log_partition(0.5))
