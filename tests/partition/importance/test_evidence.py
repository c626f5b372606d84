"""Log evidence of Pyro models, from the prior and from a guide."""

import contextlib
import functools
import math
import sys
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import nn

from pyro_ebm import EnergyDistribution
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.verdict import Reason
from pyro_ebm.energies import FunctionEnergy, PyroModelEnergy
from pyro_ebm.partition import evidence, quadrature

module = sys.modules[evidence.__module__]

DATA = torch.tensor([0.3, -0.2, 1.1, 0.8, 0.4], dtype=torch.float64)
#: By quadrature over mu and tau.
EIGHT_SCHOOLS = -31.3113


def truth(data=DATA):
    """z ~ N(0, 1), y_i ~ N(z, 1): the data are jointly Gaussian."""
    covariance = torch.eye(len(data)) + 1
    zeros = torch.zeros(len(data))
    return dist.MultivariateNormal(zeros, covariance).log_prob(data).item()


def model(data=DATA):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)


def guide(data=DATA):
    pyro.sample("z", dist.Normal(0.4, 0.6))


def deep(data=DATA, dim=4):
    """The same, with the latent number a sum of four: no quadrature."""
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), dim**-0.5).to_event(1))
    with pyro.plate("data", len(data)):
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=data)


def deep_guide(data=DATA, dim=4):
    pyro.sample("z", dist.Normal(torch.full((dim,), 0.1), 0.4).to_event(1))


def eight_schools():
    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=effect)


def trained(program, auto, *args, steps=150):
    svi = SVI(program, auto, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return auto


def assert_right(estimate, truth, *, most=0.1):
    assert estimate.is_reliable, estimate
    half = max(2 * estimate.std_error, estimate.upper - estimate.value)
    assert abs(estimate.value - truth) < 2 * half + 1e-5, estimate
    assert estimate.std_error < most


@pytest.mark.parametrize("proposal", [guide, None])
def test_conjugate_model(proposal):
    estimate = evidence(model, proposal)
    assert estimate.status == "exact"
    assert estimate.value == pytest.approx(truth(), abs=1e-6)


def test_a_guide_and_the_prior_agree():
    estimate = evidence(deep, deep_guide, budget=200_000)
    assert_right(estimate, truth())
    assert estimate.status == "ok"
    assert not estimate.reasons
    assert "from the guide and the prior, held against" in estimate.method
    assert estimate.num_evaluations > 9_000


def test_arguments_are_passed_on():
    for found in (
        evidence(model, guide, DATA[:3]),
        evidence(model, None, DATA[:3]),
        evidence(model, guide, data=DATA[:3]),
        evidence(functools.partial(model, DATA[:3])),
    ):
        assert found.value == pytest.approx(truth(DATA[:3]), abs=1e-6)
    deeper = evidence(deep, deep_guide, DATA[:3], dim=3, budget=200_000)
    assert_right(deeper, truth(DATA[:3]))


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_trained_autoguides(auto):
    start = init_to_value(values={"z": torch.full((4,), 0.1)})
    proposal = trained(deep, auto(deep, init_loc_fn=start, init_scale=0.4))
    estimate = evidence(deep, proposal, budget=200_000)
    assert_right(estimate, truth())
    assert not estimate.reasons
    assert "the guide and the prior" in estimate.method


@pytest.mark.parametrize("auto", [AutoMultivariateNormal, AutoNormal])
def test_eight_schools_with_an_autoguide(auto):
    proposal = trained(eight_schools, auto(eight_schools, init_scale=0.3))
    estimate = evidence(eight_schools, proposal, budget=16_000)
    assert_right(estimate, EIGHT_SCHOOLS)
    assert "the guide and the prior" in estimate.method


@pytest.mark.parametrize("auto", [AutoLowRankMultivariateNormal, AutoIAFNormal])
def test_autoguides_as_they_begin(auto):
    estimate = evidence(deep, auto(deep), budget=200_000)
    assert_right(estimate, truth())
    assert "the guide and the prior" in estimate.method


def test_a_laplace_approximation():
    proposal = trained(deep, AutoLaplaceApproximation(deep))
    with pytest.raises(ValueError, match=r"is a point.*\.laplace_approximation\(\)"):
        evidence(deep, proposal)
    estimate = evidence(deep, proposal.laplace_approximation(), budget=200_000)
    assert_right(estimate, truth())


def test_points_are_refused():
    def point():
        pyro.sample("z", dist.Delta(torch.tensor(0.3)))

    for wrong in (AutoDelta(model), point):
        with pytest.raises(ValueError, match="guide must have a density"):
            evidence(lambda: model(), wrong)


def test_a_module_as_guide():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, data):
            pyro.module("net", self)
            loc = self.layer(data.to(self.layer.weight)).squeeze(-1)
            pyro.sample("z", dist.Normal(loc, 1.0))

    assert evidence(model, Net(), DATA).value == pytest.approx(truth(), abs=1e-6)


def test_a_distribution_over_the_points_of_the_energy():
    normal = dist.Normal(torch.full((4,), 0.1), 0.4).to_event(1)
    for proposal in (normal, lambda: normal):
        estimate = evidence(deep, proposal, budget=200_000)
        assert_right(estimate, truth())
        assert "the guide and the prior" in estimate.method
    with pytest.raises(ValueError, match=r"guide must be one distribution over.*\(4,"):
        evidence(deep, dist.Normal(torch.zeros(3), 1.0).to_event(1))
    bare = EnergyDistribution(FunctionEnergy(lambda x: x.square().sum(-1), (4,)))
    with pytest.raises(ValueError, match="guide must be normalised"):
        evidence(deep, bare)


def test_a_flow():
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(1)
    flow = zuko.flows.NSF(4, transforms=1, hidden_features=(16,))
    optimiser = torch.optim.Adam(flow.parameters(), 0.02)
    energy = PyroModelEnergy(deep)
    for _ in range(60):
        u, log_q = flow().rsample_and_log_prob((128,))
        loss = (energy(u) + log_q).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for proposal in (flow, flow()):
        estimate = evidence(deep, proposal, budget=10_000)
        assert_right(estimate, truth())
        assert "the guide and the prior" in estimate.method


def test_constrained_sites_take_their_jacobian():
    """Planted fault: the volume left out of the guide's density."""

    def program():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        pyro.sample("k", dist.Bernoulli(p), obs=torch.tensor(1.0))
        pyro.sample("n", dist.Poisson(rate).to_event(1), obs=torch.tensor([1.0, 3.0]))

    def proposal():
        pyro.sample("p", dist.Beta(2.5, 2.0))
        pyro.sample("rate", dist.Gamma(4.0, 2.0).expand([2]).to_event(1))

    # Gamma(2, 1) and Poisson: (n + 1) / 2^(n + 2).
    right = math.log(0.5) + math.log(2 / 8) + math.log(4 / 32)
    estimate = evidence(program, proposal, budget=200_000)
    assert_right(estimate, right)
    assert not estimate.reasons


def test_plates_and_several_sites():
    data = torch.randn(3, 4)

    def nested():
        scale = pyro.sample("scale", dist.Gamma(3.0, 3.0))
        columns = pyro.plate("columns", 4, dim=-1)
        with pyro.plate("rows", 3, dim=-2):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with columns:
                pyro.sample("y", dist.Normal(loc, scale + 0.5), obs=data)

    def proposal():
        pyro.sample("scale", dist.Gamma(4.0, 4.0))
        with pyro.plate("rows", 3, dim=-2):
            loc = 0.7 * data.mean(-1, keepdim=True)
            pyro.sample("loc", dist.Normal(loc, 0.6))

    def single():
        """Written so that no two draws can be made at once."""
        pyro.sample("scale", dist.Gamma(4.0, 4.0))
        with pyro.plate("rows", 3, dim=-2):
            loc = 0.7 * data.mean(-1, keepdim=True)
            loc = pyro.sample("loc", dist.Normal(loc, 0.6))
            assert loc.shape == (3, 1)

    alone = evidence(nested, None, budget=200_000)
    for found in (
        evidence(nested, proposal, budget=200_000),
        evidence(nested, single, budget=4000),
    ):
        assert found.is_reliable  # single runs come with a note
        error = math.hypot(found.std_error, alone.std_error)
        assert abs(found.value - alone.value) < 4 * error


def test_a_guide_that_is_too_narrow_is_made_up_for():
    """Seen to be off by a half and more with the guide's draws alone."""

    def narrow():
        pyro.sample("z", dist.Normal(torch.full((4,), 0.1), 0.05).to_event(1))

    assert_right(evidence(deep, narrow, budget=200_000), truth())


def test_a_guide_that_is_far_off_is_said_to_be():
    def far():
        pyro.sample("z", dist.Normal(torch.full((4,), 30.0), 0.1).to_event(1))

    estimate = evidence(deep, far, budget=200_000)
    assert_right(estimate, truth())


@pytest.mark.filterwarnings("ignore::pyro_ebm.core.errors.UnreliableWarning")
def test_a_bad_guide_does_not_spoil_a_good_estimate():
    """Weights of neither the guide nor the prior reach so small a posterior."""

    def small():
        z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.1).to_event(1), obs=torch.full((8,), 2.0))

    def beside():
        pyro.sample("z", dist.Normal(torch.full((8,), -2.0), 0.1).to_event(1))

    scale = math.sqrt(1.01)
    right = 8 * dist.Normal(0.0, scale).log_prob(torch.tensor(2.0)).item()
    found = evidence(small, beside, budget=400_000)
    assert_right(found, right)
    assert "the guide is a bad proposal" in found.reason


def test_a_mode_that_only_the_guide_knows():
    """Two routes that disagree: the prior never draws where .9 of Z is."""

    def program():
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        spike = dist.Normal(4.0, 0.02).log_prob(z).sum() + 56
        pyro.factor("f", torch.logaddexp(spike, torch.zeros(())))

    def knows():
        pyro.sample("z", dist.Normal(torch.full((6,), 4.0), 0.02).to_event(1))

    with pytest.warns(UnreliableWarning):
        found = evidence(program, knows, budget=200_000)
    assert found.reasons[0].reason == Reason.ROUTES_DISAGREE
    assert "by the guide" in found.reason
    assert "from the prior" in found.reason


def test_zero_likelihood_on_most_of_the_prior():
    """On 98 % of it; the guide is the prior of a smaller box, or there is none."""

    def ball():
        box = dist.Uniform(-3.0, 3.0).expand([3]).to_event(1)
        x = pyro.sample("x", box)
        pyro.factor("f", torch.where(x.square().sum(-1) < 1, 0.0, -torch.inf))

    def smaller():
        pyro.sample("x", dist.Uniform(-1.0, 1.0).expand([3]).to_event(1))

    right = math.log(4 * math.pi / 3 / 6**3)
    assert_right(evidence(ball, smaller, budget=200_000), right)
    assert_right(evidence(ball, budget=200_000), right)


def test_a_guide_that_leaves_the_support():
    """Draws outside have weight zero, and the density of the guide counts inside."""

    def program():
        x = pyro.sample("x", dist.Exponential(1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.ones(3))

    def real():
        pyro.sample("x", dist.Normal(torch.full((3,), 0.8), 0.8).to_event(1))

    one = FunctionEnergy(
        lambda x: x - dist.Normal(1.0, 1.0).log_prob(x), (), dist.constraints.positive
    )
    right = 3 * quadrature(one).value
    found = evidence(program, real, budget=200_000)
    assert_right(found, right)
    assert not found.reasons


def test_a_guide_with_less_support_than_the_prior():
    """Planted fault: the density of an exponential left as it is below zero."""

    def program():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.full((3,), 1.0))

    def positive():
        pyro.sample("x", dist.Exponential(2.0).expand([3]).to_event(1))

    right = 3 * dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(1.0)).item()
    assert_right(evidence(program, positive, budget=200_000), right)


def test_rows_behind_an_obs_mask():
    """Not normalised if taken as it is: the rows that are seen are drawn as well."""
    seen = torch.tensor([True, True, False, True])
    data = torch.tensor([0.3, -0.2, 99.0, 1.1], dtype=torch.float64)

    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(z, 1.0), obs=data, obs_mask=seen)

    def proposal():
        z = pyro.sample("z", dist.Normal(0.3, 0.5))
        with pyro.plate("data", 4):
            pyro.sample("y_unobserved", dist.Normal(z, 1.0))

    assert_right(evidence(program, budget=200_000), truth(data[seen]))
    found = evidence(program, proposal, budget=200_000)
    assert_right(found, truth(data[seen]))
    assert not found.reasons


def test_classes_behind_an_obs_mask():
    seen = torch.tensor([True] * 3 + [False])
    data = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def program(mask):
        p = pyro.sample("p", dist.Beta(torch.ones(()), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Bernoulli(p), obs=data, obs_mask=mask)

    found = evidence(program, None, seen)
    assert found.value == pytest.approx(-math.log(12), abs=1e-6)


@pytest.mark.parametrize("size", [3, 5])
def test_correlations(size):
    """From torch's own draws -0.0444 +- 0.0018 and ok, for five."""

    def program():
        pyro.sample("corr", dist.LKJCholesky(size, torch.tensor(2.0)))

    assert_right(evidence(program, budget=16_000), 0.0)


class Wider(dist.Normal):
    """A normal that draws a tenth too wide."""

    def rsample(self, sample_shape=()):
        return self.loc + 1.1 * (super().rsample(sample_shape) - self.loc)


@pytest.mark.parametrize("proposal", [deep_guide, None])
def test_a_prior_whose_draws_are_not_those_of_its_density(proposal):
    def program():
        z = pyro.sample("z", Wider(torch.zeros(4), 0.5).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.3))

    right = dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(0.3)).item()
    found = evidence(program, proposal, budget=16_000)
    assert_right(found, right)
    assert found.reasons[-1].reason == Reason.BASE_INCONSISTENT
    assert "started from a standard normal, not from the prior" in found.reason


def local_level(y, plate="none"):
    """A level that walks at random, and what is seen of it at each step.

    Args:
        y: Shape ``(T,)``, or ``(T, N)`` with a plate.
        plate: ``"around"`` the steps and ``"within"`` each, a level for each row, or
            ``"data"``, one level that all rows show, of which plates take two.
    """
    x, size = 0.0, y[0].numel()
    with pyro.plate("rows", size) if plate == "around" else contextlib.nullcontext():
        for t in pyro.markov(range(len(y))):
            if plate == "within":
                with pyro.plate(f"rows{t}", size):
                    x = pyro.sample(f"x{t}", dist.Normal(x, 0.5))
                    pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[t])
                continue
            x = pyro.sample(f"x{t}", dist.Normal(x, 0.5))
            if plate == "data":
                with pyro.plate(f"rows{t}", size, subsample_size=2) as rows:
                    pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[t, rows])
            else:
                pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=y[t])


def kalman(y):
    """Log evidence of one level, of which ``y[t]`` is seen at step ``t``."""
    mean, variance, total = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for seen in y:
        variance = variance + 0.25
        for value in torch.atleast_1d(seen):
            sd = (variance + 1).sqrt()
            total = total + dist.Normal(mean, sd).log_prob(value)
            mean = mean + variance / (variance + 1) * (value - mean)
            variance = variance / (variance + 1)
    return total.item()


STEPS = torch.tensor(
    [[0.3, -0.5, 1.5], [-1.2, 0.1, 2.0], [0.8, 0.4, 2.5], [2.0, -0.9, 1.0]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("plate", ["none", "around", "within", "data"])
def test_an_observation_at_each_step_of_a_markov_chain(plate):
    """Planted fault: the names of the observations are left to the steps after them,
    and the prior, which has none, cannot be built."""
    y = STEPS[:, 0] if plate == "none" else STEPS
    program = functools.partial(local_level, plate=plate)
    found = evidence(program, None, y, budget=200_000)
    rows = y.unbind(1) if plate in ("around", "within") else [y]
    assert_right(found, sum(map(kalman, rows)))


@pytest.mark.parametrize("batch", [(), (4,)])
def test_a_latent_mixture(batch):
    """Of Gaussians, the evidence is that of a mixture; one for each of four numbers."""
    loc, scale, weights = (
        torch.tensor(values) for values in ([-2.0, 1.0], [0.5, 1.0], [0.3, 0.7])
    )

    def mixture(scale):
        parts = dist.Normal(loc.expand(*batch, 2), scale)
        choice = dist.Categorical(weights.expand(*batch, 2))
        return dist.MixtureSameFamily(choice, parts).to_event(len(batch))

    def program(y):
        x = pyro.sample("x", mixture(scale))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(len(batch)), obs=y)

    y = torch.tensor([0.5, -1.0, 2.0, -3.0])[: torch.Size(batch).numel()].reshape(batch)
    truth = mixture((scale**2 + 1).sqrt()).log_prob(y).item()
    assert_right(evidence(program, None, y), truth)


def test_an_improper_prior():
    def program():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), (3,)))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.ones(3))

    found = evidence(program, budget=200_000)
    assert_right(found, 0.0)
    assert "not from the prior" in found.reason


def test_subsampled_data_are_taken_whole():
    def subsampled():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA[rows])

    for proposal in (None, lambda: guide()):
        found = evidence(subsampled, proposal)
        assert found.value == pytest.approx(truth(), abs=1e-6)


def test_an_energy_of_unknown_log_z_is_refused_in_model_and_guide():
    bare = EnergyDistribution(FunctionEnergy(lambda x: x**2, ()))

    def program():
        pyro.sample("z", bare)
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def proposal():
        pyro.sample("z", bare)

    with pytest.raises(ValueError, match="site 'z' must be normalised"):
        evidence(program)
    with pytest.raises(ValueError, match="site 'z' must be normalised"):
        evidence(lambda: model(), proposal)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(
        ValueError, match="budget must be a whole number of at least 50"
    ):
        evidence(model, guide, budget=3)
    with pytest.raises(ValueError, match="method must be one of"):
        evidence(model, guide, method="magic")
    with pytest.raises(TypeError, match="cannot be called with the arguments"):
        evidence(lambda data: model(data))
    with pytest.raises(TypeError, match=r"guide must .*Tensor.*\(model, None, y\)"):
        evidence(model, torch.zeros(3))  # the data in the place of the guide


def one_at_a_time(data=DATA):
    """The same, written so that it cannot be vectorised nor traced."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    offset = 0.0 if z.item() > 1e6 else z
    pyro.factor("y", dist.Normal(offset, 1.0).log_prob(data).sum())


@pytest.mark.parametrize("proposal", [guide, None])
def test_a_model_that_cannot_be_traced(proposal):
    """As it was: its runs are weighed."""
    found = evidence(one_at_a_time, proposal, budget=2_000)
    assert_right(found, truth())
    assert "one by one" in found.method
    assert found.num_evaluations == 2_000
    assert found.reasons[0].reason == Reason.ONE_ROUTE


def test_weights_alone_must_be_excellent():
    def wide(data=DATA):
        pyro.sample("z", dist.Normal(0.0, 20.0))

    with pytest.warns(UnreliableWarning, match="nothing to hold the weights against"):
        found = evidence(one_at_a_time, wide, budget=4_000)
    assert found.lower < truth() < found.upper


def test_discrete_latents():
    def alone():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def counts():
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(2.0))

    def more():
        pyro.sample("k", dist.Poisson(2.3))

    normal = dist.Normal(torch.arange(60.0), 1.0)
    two = torch.tensor([0.7, 0.3]).log() + normal.log_prob(torch.tensor(1.0))[:2]
    assert_right(evidence(alone), two.logsumexp(0).item())
    terms = dist.Poisson(3.0).log_prob(normal.loc) + normal.log_prob(torch.tensor(2.0))
    right = terms.logsumexp(0).item()
    for proposal in (None, more):
        found = evidence(counts, proposal)
        assert_right(found, right)
        assert "vectorised" in found.method


def test_classes_that_the_guide_draws_too():
    """The energy sums them, the guide does not: both are routes to one number."""

    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + k, 0.7), obs=torch.tensor([0.1, 1.0, 2.0]))

    def proposal():
        pyro.sample("z", dist.Normal(0.4, 0.8))
        with pyro.plate("data", 3):
            pyro.sample("k", dist.Bernoulli(torch.tensor([0.3, 0.5, 0.7])))

    summed = evidence(program)
    found = evidence(program, proposal)
    assert found.status == "exact"
    assert found.value == pytest.approx(summed.value, abs=1e-6)
    assert "from the guide, vectorised, held against" in found.method
    assert not found.reasons


@pytest.mark.filterwarnings("ignore::pyro_ebm.core.errors.UnreliableWarning")
@pytest.mark.parametrize("is_vectorized", [True, False])
def test_a_prior_that_takes_long_is_not_checked(is_vectorized, monkeypatch):
    """Where twenty thousand draws of it would take more than the time that there is."""
    checked = []
    monkeypatch.setattr(module, "check_draws", lambda *given: checked.append(given))

    def slow():
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 0.5).to_event(1))
        loc = z.sum(-1) if is_vectorized else float(z.detach().sum(-1))
        time.sleep(0.005)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))

    evidence(slow, budget=50, max_seconds=5.0, method="importance")
    assert bool(checked) == is_vectorized


def test_the_clock_ends_it():
    with pytest.warns(UnreliableWarning, match="effective sample size"):
        found = evidence(one_at_a_time, guide, max_seconds=0.0, tolerance=1e-9)
    assert found.num_evaluations < 200


def test_guide_with_other_sites_is_refused():
    def other():
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"missing are \['z'\], not in the model"):
        evidence(lambda: model(), other)


def vague_regression(x, y, rate=0.001):
    """Written for one draw at a time, as a vector with a scale outside any plate is."""
    tau = pyro.sample("tau", dist.Gamma(torch.tensor(rate), torch.tensor(rate)))
    scale = 3 / tau.sqrt()
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), scale).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, 1 / tau.sqrt()), obs=y)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64]
)
def test_a_prior_whose_draws_are_hundreds_of_orders_apart(dtype):
    """Nearly all draws of tau are below 1e-30. Given tau, the data are Gaussian.

    Seen to fail with the median of such draws as the scale of descents (no mode found),
    and with a ray to where the energy is a thousand nats above the bulk for a doubt."""
    torch.manual_seed(1)
    x = torch.randn(60, 2, dtype=dtype)
    y = x @ torch.tensor([1.0, -2.0], dtype=dtype) + 0.5 * torch.randn(60, dtype=dtype)
    covariance = (torch.eye(60) + 9 * x @ x.mT).double()
    rate, half = 0.001, 30.0
    square = y.double() @ torch.linalg.solve(covariance, y.double())
    truth = (
        -half * math.log(2 * math.pi)
        - torch.logdet(covariance).item() / 2
        + rate * math.log(rate)
        - math.lgamma(rate)
        + math.lgamma(rate + half)
        - (rate + half) * math.log(rate + square.item() / 2)
    )
    program = functools.partial(vague_regression, x, y)
    found = evidence(program, budget=200_000, progress_bar=False)
    assert_right(found, truth)
