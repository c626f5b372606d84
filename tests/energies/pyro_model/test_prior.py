"""The prior of a model: its draws, and what it makes of the evidence."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import EnergyDistribution
from pyro_ebm.core.errors import CompilationWarning
from pyro_ebm.energies import DistributionEnergy, FunctionEnergy, PyroModelEnergy


def observe(name, fn, value):
    return pyro.sample(name, fn, obs=torch.as_tensor(value))


def eight_schools():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        observe("y", dist.Normal(mu + tau * eta, sigma), y)


def test_eight_schools_evidence():
    """Direct Monte Carlo over the prior; the truth is from quadrature, -31.31134735.

    Seen to fail with ``mu`` and ``tau`` shared between the draws, and with the standard
    deviation of ``eta`` doubled."""
    energy = PyroModelEnergy(eight_schools)
    u = energy.prior.sample((20_000,))
    log_weight = energy.prior.energy(u) - energy(u)
    weight = (log_weight - log_weight.max()).exp()
    value = weight.mean().log() + log_weight.max()
    std_error = weight.std() / weight.mean() / math.sqrt(len(u))
    assert abs(value + 31.31134735) < 4 * std_error < 0.1


def normal_normal(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe("y", dist.Normal(z, 1.0), y)
    observe("w", dist.LogNormal(scale.log(), 1.0), 1.0)


def test_conjugate_evidence_is_the_closed_form():
    """Both are Gaussian in u: the log evidence is a sum of two log densities."""
    energy = PyroModelEnergy(normal_normal, torch.tensor(0.7))
    expected = dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(0.7))
    expected = expected + dist.Normal(0.0, math.sqrt(1.25)).log_prob(torch.tensor(0.0))
    line = torch.linspace(-8, 8, 201)
    u = torch.cartesian_prod(line, line)
    cell = (line[1] - line[0]).log() * 2
    torch.testing.assert_close((-energy(u)).logsumexp(0) + cell, expected)
    zero = energy.prior.log_prob(u).logsumexp(0) + cell
    torch.testing.assert_close(zero, torch.zeros(()), atol=1e-9, rtol=0)


def test_moments_of_the_priors_draws():
    """Seen to fail with ``mu`` and ``tau`` shared between the draws, and with the
    standard deviation of ``eta`` doubled."""
    u = PyroModelEnergy(eight_schools).prior.sample((4000,))
    normal = u[:, [0, 2, 5, 9]] / torch.tensor([5.0, 1.0, 1.0, 1.0])
    assert (normal.mean(0).abs() * math.sqrt(4000) < 4).all()
    assert ((normal.square().mean(0) - 1).abs() * math.sqrt(4000 / 2) < 4).all()
    off_diagonal = (normal.mT @ normal / 4000).triu(1)
    assert (off_diagonal.abs() * math.sqrt(4000) < 4).all()
    # log(tau / 5) of a half-Cauchy tau: mean 0, variance (pi / 2)^2, kurtosis 5.
    log_tau = (u[:, 1] - math.log(5.0)) / (math.pi / 2)
    assert log_tau.mean().abs() * math.sqrt(4000) < 4
    assert (log_tau.square().mean() - 1).abs() * math.sqrt(4000 / 4) < 4


def test_many_draws_are_one_run():
    runs = []

    def counted():
        runs.append(1)
        eight_schools()

    prior = PyroModelEnergy(counted).prior
    prior.sample((7,))
    runs.clear()
    assert prior.sample((1000,)).shape == (1000, 10)
    assert len(runs) == 1


@pytest.mark.parametrize("vectorized", [True, False])
def test_draws_of_a_model_for_single_values_are_right(vectorized):
    """A model that mixes its draws when they come many at a time is run one by one."""

    def single():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = x[..., 0] if vectorized else x[0].mean()
        pyro.sample("y", dist.Normal(mean, 0.1))
        pyro.factor("likelihood", -x.sum())

    u = PyroModelEnergy(single).prior.sample((50,))
    assert (u[:, 3] - u[:, 0]).abs().max() < 0.5
    assert u[:, 3].std() > 0.5


def test_prior_and_joint_meet_on_a_path():
    energy = PyroModelEnergy(eight_schools)
    base = DistributionEnergy(energy.prior)
    u = energy.initial_points(4)
    for got, expected in zip(
        base.value_and_grad(u), energy.prior.energy.value_and_grad(u), strict=True
    ):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(base(u), base.value_and_grad(u)[0])
    assert energy.prior.expand([3]).sample().shape == (3, 10)
    assert energy.prior.expand([3]).log_prob(u[0]).shape == (3,)


def improper():
    x = pyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()))
    observe("y", dist.Normal(x, 1.0), 1.0)


def test_improper_prior_is_no_path():
    energy = PyroModelEnergy(improper)
    u = torch.linspace(-1, 1, 5).unsqueeze(-1)
    expected = -dist.Normal(u.exp(), 1.0).log_prob(torch.tensor(1.0)) - u
    torch.testing.assert_close(energy(u), expected.squeeze(-1))
    with pytest.raises(NotImplementedError, match="site 'x' is improper"):
        energy.prior.sample()


def test_an_energy_of_unknown_log_partition_is_no_prior():
    well = EnergyDistribution(FunctionEnergy(lambda x: x.square() / 8, ()))

    def model():
        x = pyro.sample("x", well)
        observe("y", dist.Normal(x, 1.0), 1.0)

    with pytest.raises(NotImplementedError, match="log Z is unknown"):
        PyroModelEnergy(model).prior.sample()


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (poutine.scale(scale=2.0), "is scaled"),
        (poutine.mask(mask=torch.tensor(False)), "is masked"),
    ],
)
def test_a_prior_that_is_not_normalised_is_refused(handler, reason):
    def model():
        with handler:
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        observe("y", dist.Normal(x, 1.0), 1.0)

    with pytest.raises(NotImplementedError, match=reason):
        PyroModelEnergy(model).prior.sample()


def bad_likelihood():
    """Half of the draws of the prior have no covariance."""
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    covariance = torch.eye(3) * r.unsqueeze(-1).unsqueeze(-1)
    normal = dist.MultivariateNormal(torch.zeros(3), covariance)
    pyro.sample("y", normal, obs=torch.ones(3))


def bad_latent():
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    covariance = torch.eye(2) * r.unsqueeze(-1).unsqueeze(-1)
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance))
    observe("y", dist.Normal(x.sum(-1), 1.0), 0.3)


def bad_latent_one_by_one():
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    if r.dim():
        raise ValueError("not written for batches")
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.eye(2) * r))
    observe("y", dist.Normal(x.sum(-1), 1.0), 0.3)


def bad_scale():
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    x = pyro.sample("x", dist.Normal(0.0, r, validate_args=True))
    observe("y", dist.Normal(x, 1.0), 0.3)


@pytest.mark.parametrize(
    "model", [bad_likelihood, bad_latent, bad_latent_one_by_one, bad_scale]
)
def test_a_bad_draw_is_one_bad_point(model):
    """Seen to fail without each of these: no validation, factors that are nan where
    they fail, a run that fails at one draw."""
    is_traced = model is not bad_scale
    with contextlib.nullcontext() if is_traced else pytest.warns(CompilationWarning):
        energy = PyroModelEnergy(model)
        prior = energy.prior
    for num in (1, 7, 400):
        u = prior.sample((num,))
        assert u.shape == (num, *energy.event_shape)
    assert bool(prior._draw_many) is (model in (bad_likelihood, bad_latent))
    is_good = u[:, 0] > 0
    assert 0.4 < is_good.double().mean() < 0.6 or len(energy.site_shapes) > 1
    value, grad = energy.value_and_grad(u)
    assert (value.isfinite() == is_good).all()
    assert (grad.isfinite().all(-1) >= is_good).all()
    is_drawn = u.isfinite().all(-1)
    if model is bad_likelihood:
        assert is_drawn.all()
    else:
        assert (prior.log_prob(u).isfinite() == is_good).all()
    assert 100 < is_good.sum() < 300
    x = u[is_good, 1:] / u[is_good, :1].sqrt() if model is not bad_scale else u[:0]
    assert not x.numel() or abs(x.square().mean() - 1) < 4 * (2 / x.numel()) ** 0.5


def test_a_prior_that_never_works_says_why():
    is_broken = []

    def model():
        if is_broken:
            raise ValueError("no density anywhere")
        pyro.sample("x", dist.Normal(0.0, 1.0))

    prior = PyroModelEnergy(model).prior
    assert prior.sample((30,)).isfinite().all()
    is_broken.append(True)
    with pytest.raises(ValueError, match="no density anywhere"):
        prior.sample((30,))


def rare(x):
    """Zero likelihood on 98 % of the prior."""
    return torch.where(x.square().sum(-1) < 1, 0.0, -math.inf)


def test_a_likelihood_that_is_mostly_zero():
    def model():
        x = pyro.sample("x", dist.Uniform(-3.0, 3.0).expand([3]).to_event(1))
        pyro.factor("f", rare(x))

    energy = PyroModelEnergy(model)
    assert energy.is_traced
    start = energy.initial_points(50)
    assert energy(start).isfinite().all()
    u = energy.prior.sample((20_000,))
    share = (energy(u).isfinite()).double().mean()
    assert abs(share - 4 / 3 * math.pi / 216) < 0.005


def one_at_a_time():
    """A scale outside of any plate: more draws at once would not broadcast."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    pyro.sample("normal", dist.Normal(torch.zeros(2), scale).to_event(1))
    pyro.sample("student", dist.StudentT(4.0, torch.zeros(2), scale).to_event(1))
    pyro.sample("exponential", dist.Exponential(scale * torch.ones(2)).to_event(1))
    pyro.sample("cauchy", dist.HalfCauchy(scale * torch.ones(2)).to_event(1))
    pyro.sample("uniform", dist.Uniform(0.0, 3 * torch.ones(2)).to_event(1))
    pyro.sample("gumbel", dist.Gumbel(scale, torch.ones(2)).to_event(1))


def test_draws_of_a_model_that_is_written_for_one():
    """They are made at once, independent, and of the law of draws one by one.

    Seen to fail with one number for all draws, with exponential noise of twice the
    scale, and without draws at once."""
    prior = PyroModelEnergy(one_at_a_time).prior
    torch.manual_seed(0)
    u = prior.sample((4000,))
    assert prior._draw_many.func == prior._mapped
    expected = prior._one_by_one(2000)
    for mine, theirs in zip(u.mT, expected.mT, strict=True):
        assert len(mine.unique()) == len(mine)
        both = torch.cat([mine, theirs]).sort().values
        gap = torch.searchsorted(mine.sort().values, both, right=True) / len(mine)
        gap = gap - torch.searchsorted(theirs.sort().values, both, right=True) / 2000
        # Kolmogorov and Smirnov's distance, at a chance of 1e-5 in each of 13 columns.
        assert gap.abs().max() < 2.5 * math.sqrt(1 / 4000 + 1 / 2000)
