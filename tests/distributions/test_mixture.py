"""Mixtures of experts: weights of normalised densities, in plates, NUTS and SVI."""

import copy
import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.ops.stats import effective_sample_size
from torch import nn

from pyro_ebm import EnergyDistribution, EnergyModel, partition
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.distributions import MixtureOfExperts
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    NeuralEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
)
from pyro_ebm.infer import Learn, MaximumLikelihood, handler
from pyro_ebm.mcmc import IndependentChains
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.testing import CountingEnergy
from pyro_ebm.testing.grid import GridDensity

WEIGHTS = (0.25, 0.75)


class Well(nn.Module):
    """A well of one number at ``centre``; its Z depends on all parameters."""

    def __init__(self, centre, log_rate, offset=0.0):
        super().__init__()
        self.centre = nn.Parameter(torch.tensor(centre))
        self.log_rate = nn.Parameter(torch.tensor(log_rate))
        self.offset = offset

    def forward(self, x):
        z = self.log_rate.exp() * (x - self.centre)
        return z**4 / 4 + z**2 / 2 + self.offset


def wells():
    """Their log Z are -39.2 and +10.3."""
    return [
        FunctionEnergy(Well(-3.0, 2.0, 38.0), ()),
        FunctionEnergy(Well(1.0, 0.0, -10.0), ()),
    ]


def known(energy, **settings):
    return EnergyDistribution(energy, partition.quadrature(energy), **settings)


@functools.cache
def estimates_of_wells():
    return [partition.quadrature(well) for well in wells()]


def two_wells(weights=WEIGHTS):
    """Chains of each start around it."""
    experts = []
    places, estimates = ((-3.0, 0.1), (1.0, 0.7)), estimates_of_wells()
    for energy, place, estimate in zip(wells(), places, estimates, strict=True):
        energy.requires_grad_(False)
        sampler = IndependentChains(
            dist.Normal(*map(torch.tensor, place)), num_steps=50
        )
        experts.append(EnergyDistribution(energy, estimate, sampler=sampler))
    return MixtureOfExperts(experts, weights)


def gaussians():
    return MixtureOfExperts(
        [
            dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            EnergyDistribution(QuadraticEnergy(torch.ones(2), 9 * torch.eye(2))),
        ],
        WEIGHTS,
    )


# The weights -------------------------------------------------------------------------


def test_weights_are_those_of_normalised_densities():
    """Logits without the log Z: planted, and seen to fail by 50 nats."""
    q = two_wells()
    grid = GridDensity(q.log_prob, -8, 8)
    assert abs(grid.log_integral) < 1e-6
    assert abs(grid.mean((grid.points < -2).double()) - 0.25) < 1e-6
    x = torch.linspace(-4, 4, 50)
    torch.testing.assert_close(-q.energy(x), q.log_prob(x))
    torch.testing.assert_close(q.unnormalized_log_prob(x), q.log_prob(x))
    assert abs(partition.quadrature(q.energy, scale=3.0).value) < 1e-5
    assert q.is_normalized
    assert q.log_partition == 0


def test_draws_fill_the_bins():
    """Chi-square with 11 degrees of freedom, of which 33 is the 0.9995 quantile.
    Draws with the weights exchanged, of either expert alone, or expert by expert are
    seen to fail."""

    def chi_square(q):
        draws = q.sample((6000,))[:3000]  # in no order
        truth = GridDensity(two_wells().log_prob, -8, 8)
        levels = truth.mass.cumsum(0)
        edges = [truth.points[(levels < k / 12).sum()] for k in range(1, 12)]
        counts = torch.bucketize(draws, torch.stack(edges)).bincount(minlength=12)
        return ((counts - 250) ** 2 / 250).sum()

    assert chi_square(two_wells()) < 33
    assert chi_square(two_wells((0.35, 0.65))) > 33  # planted
    assert chi_square(two_wells().experts[1]) > 33


def test_equal_weights_are_the_default():
    assert MixtureOfExperts([dist.Normal(0.0, 1.0)] * 4).weights.tolist() == [0.25] * 4


def test_one_expert_is_itself():
    expert, x = two_wells().experts[1], torch.randn(5)
    mixture = MixtureOfExperts([expert])
    torch.testing.assert_close(mixture.log_prob(x), expert.log_prob(x))


def test_errors_of_the_parts_add_up():
    """Against the spread of the true log Z over 20,000 pairs of estimates. Errors added
    without their weights: planted, and seen to fail."""
    std_errors = torch.tensor([0.04, 0.07])
    nan = math.nan
    experts = [
        EnergyDistribution(
            energy, LogPartitionEstimate(0.0, e.item(), nan, nan, nan, Status.OK, "", 1)
        )
        for energy, e in zip(wells(), std_errors, strict=True)
    ]
    q = MixtureOfExperts(experts, WEIGHTS)
    errors = std_errors * torch.randn(20_000, 2)
    log_partitions = (torch.tensor(WEIGHTS).log() - errors).logsumexp(-1)
    assert abs(q.log_partition_std_error / log_partitions.std() - 1) < 0.02
    nested = MixtureOfExperts([q, experts[0]], [0.5, 0.5])
    expected = torch.stack([q.log_partition_std_error, std_errors[0]]).norm() / 2
    torch.testing.assert_close(nested.log_partition_std_error, expected)


# Experts -----------------------------------------------------------------------------


def test_experts_of_all_kinds():
    torch.manual_seed(3)
    model = EnergyModel(NeuralEnergy((2,), (8,), base=wide()), wide())
    model.log_partition.refresh(model.energy)
    student = dist.StudentT(3.0, torch.zeros(2)).to_event(1)
    quadratic = EnergyDistribution(QuadraticEnergy(torch.ones(2)))  # knows its log Z
    q = MixtureOfExperts([model, student, quadratic, gaussians()])
    x = torch.randn(7, 2)
    densities = [
        model().log_prob(x),
        student.log_prob(x),
        dist.Normal(torch.ones(2), 1.0).to_event(1).log_prob(x),
        gaussians().log_prob(x),
    ]
    expected = torch.stack(densities).logsumexp(0) - math.log(4)
    torch.testing.assert_close(q.log_prob(x), expected)
    torch.testing.assert_close(-q.energy(x), expected)
    assert q.log_partition_std_error == model().log_partition_std_error / 4
    assert q.sample((3,)).shape == (3, 2)
    assert repr(q).startswith(
        "MixtureOfExperts(0.25 NeuralEnergy + 0.25 StudentT + 0.25 QuadraticEnergy + "
        "0.25 ExpertsEnergy, batch_shape: (), event_shape: (2,), log Z: 0.0"
    )


def wide():
    return dist.Normal(torch.zeros(2), 1.5).to_event(1)


def test_a_mixture_of_known_distributions_is_known():
    """Gaussians, and others: drawn without one evaluation of their energies."""
    gammas = [dist.Gamma(2.0, torch.tensor(r)) for r in (1.0, 5.0)]
    energies = [CountingEnergy(DistributionEnergy(gamma)) for gamma in gammas]
    mixture = MixtureOfExperts([EnergyDistribution(f) for f in energies], WEIGHTS)
    for q in (gaussians(), mixture):
        log_partition, exact = q.closed_form()
        assert abs(log_partition) < 1e-12
        assert partition.estimate(q).status == "exact"
        x = q.sample((6,))
        torch.testing.assert_close(exact.log_prob(x), q.log_prob(x))
        assert exact.sample((2,)).shape == (2, *q.event_shape)
    assert all(f.num_values == 6 for f in energies)  # by log_prob alone
    assert two_wells().closed_form() is None


def test_starting_points_are_cheap_and_in_the_wells():
    energies = [CountingEnergy(f) for f in wells()]
    bases = [dist.Normal(torch.tensor(m), 0.1) for m in (-3.0, 1.0)]
    q = MixtureOfExperts(
        [
            EnergyDistribution(f, 0.0, sampler=IndependentChains(base))
            for f, base in zip(energies, bases, strict=True)
        ]
    )
    start = q.sampler.start(q.energy, 200)
    assert ((start + 3).abs() < 1).any()
    assert ((start - 1).abs() < 1).any()
    InitMessenger(init_to_sample)(lambda: pyro.sample("x", q))()
    assert all(f.num_values + f.num_gradients == 0 for f in energies)


@pytest.mark.filterwarnings("ignore:R-hat of the chains of the draws")
def test_its_base_is_a_mixture_so_that_a_product_finds_all_wells():
    """From a standard normal all draws are in the nearer well."""
    q = two_wells()
    assert q.base.log_prob(torch.tensor(-3.0)) > -1
    assert gaussians().base.closed_form().distribution is not None
    product = q * FunctionEnergy(lambda x: x.square() / 20, ())
    assert product.base.weights.tolist() == list(WEIGHTS)
    share = (product.sample((200,)) < -2).double().mean()
    assert 0.1 < share < 0.4
    ring = known(FunctionEnergy(lambda x: (x.norm(dim=-1) - 1) ** 2, (2,)))
    assert MixtureOfExperts([ring, wide()]).base is None


def test_gradients_of_the_experts_and_weights():
    """Of a mixture of Gaussians, against torch's own."""
    logits = torch.randn(2, requires_grad=True)
    loc = torch.randn(2, requires_grad=True)
    x = torch.randn(9)
    parts = [dist.Normal(loc[0], 1.0), dist.Normal(loc[1], 2.0)]
    q = MixtureOfExperts(parts, logits.softmax(-1))
    truth = dist.MixtureSameFamily(
        dist.Categorical(logits=logits), dist.Normal(loc, torch.tensor([1.0, 2.0]))
    )
    expected = torch.autograd.grad(truth.log_prob(x).sum(), (logits, loc))
    for value in (q.log_prob(x).sum(), -q.energy(x).sum()):
        grads = torch.autograd.grad(value, (logits, loc), retain_graph=True)
        torch.testing.assert_close(grads, expected)


# In Pyro -----------------------------------------------------------------------------


@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("batch_shape", [(), (4,), (5, 4)])
def test_shapes(sample_shape, batch_shape):
    q = gaussians().expand(batch_shape)
    x = q.sample(sample_shape)
    assert x.shape == (*sample_shape, *batch_shape, 2)
    assert q.log_prob(x).shape == (*sample_shape, *batch_shape)
    assert q.to_event().log_prob(x).shape == sample_shape
    assert len(x.reshape(-1, 2).unique(dim=0)) == x.numel() / 2


def test_plates_expand_it():
    def model():
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            return pyro.sample("x", gaussians())

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (3, 4, 2)
    assert trace.nodes["x"]["log_prob"].shape == (3, 4)


def nuts(model, site, num_samples=200):
    mcmc = MCMC(NUTS(model), num_samples, 60, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()[site]


def assert_moments_by_ess(draws, grid):
    mean = grid.mean(grid.points)
    variance = grid.mean((grid.points - mean) ** 2)
    statistics = torch.stack([draws - mean, (draws - mean) ** 2 - variance], -1)
    error = statistics.std(0) / effective_sample_size(statistics[None]).sqrt()
    assert (statistics.mean(0) / error).abs().max() < 4


def near():
    """Two wells that a chain can pass between."""
    energies = [FunctionEnergy(Well(m, r), ()) for m, r in ((-0.7, 0.3), (0.5, 0.0))]
    return MixtureOfExperts([known(f.requires_grad_(False)) for f in energies], WEIGHTS)


def test_as_a_prior_under_nuts_and_as_a_traced_model():
    q, y = near(), torch.tensor(1.1)

    def model():
        x = pyro.sample("x", q)
        pyro.sample("y", dist.Normal(x, 0.8), obs=y)

    grid = GridDensity(
        lambda x: q.log_prob(x) + dist.Normal(x, 0.8).log_prob(y), -8, 8, 4001
    )
    assert_moments_by_ess(nuts(model, "x"), grid)
    energy = PyroModelEnergy(model)
    assert energy.is_traced
    assert abs(partition.quadrature(energy).value - grid.log_integral) < 1e-5


def test_weights_may_be_latent():
    """With a Dirichlet over them: nothing is doubly intractable."""
    experts = near().experts
    x = near().sample((30,))

    def model():
        weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 2.0])))
        q = MixtureOfExperts(experts, weights)
        with pyro.plate("data", len(x)):
            pyro.sample("x", q, obs=x)

    first, second = (q.log_prob(x).double() for q in experts)

    def log_joint(w):
        w = w.clamp(1e-9, 1 - 1e-9)
        parts = torch.stack([w[:, None].log() + first, (-w[:, None]).log1p() + second])
        return w.log() + (-w).log1p() + parts.logsumexp(0).sum(-1)

    grid = GridDensity(log_joint, 0, 1, 2001)
    assert_moments_by_ess(nuts(model, "weights", 120)[:, 0], grid)


def test_an_energy_of_a_latent_is_still_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        bad = EnergyDistribution(FunctionEnergy(lambda x: (x - z) ** 2, ()), 0.5)
        q = MixtureOfExperts([bad, dist.Normal(z, 1.0)])
        pyro.sample("x", q, obs=torch.tensor(0.3))

    with pytest.raises(NotImplementedError, match="doubly intractable"):
        nuts(model, "z", 2)


def test_guides():
    gaussian = QuadraticEnergy(torch.zeros(2))
    exact = gaussian.closed_form().log_partition

    def loss(q):
        def model():
            pyro.sample("x", wide())

        return Trace_ELBO().differentiable_loss(model, lambda: pyro.sample("x", q))

    q = MixtureOfExperts([EnergyDistribution(gaussian, exact), wide()])
    assert loss(q).requires_grad
    detached = MixtureOfExperts([EnergyDistribution(gaussian, exact.detach()), wide()])
    ring = known(FunctionEnergy(lambda x: (x.norm(dim=-1) - 1) ** 2, (2,)))
    for wrong in (detached, MixtureOfExperts([ring, wide()])):
        with pytest.raises(NotImplementedError, match="stands in a guide"):
            loss(wrong)


# Learning ----------------------------------------------------------------------------

DATA = torch.tensor([-3.3, -2.9, -3.1, -2.6, -3.0, 0.2, 1.9], dtype=torch.float64)


def learned_wells():
    return [
        FunctionEnergy(Well(-3.2, 0.5, 3.0), ()),
        FunctionEnergy(Well(0.6, 0.2, -1.0), ()),
    ]


def exact_gradient(energies, logits):
    """Of the log-likelihood, with each Z_k by the trapezoidal rule."""
    line = torch.linspace(-12, 12, 4001)
    densities = [
        -f(DATA) - torch.logsumexp(-f(line), 0) - math.log(24 / 4000) for f in energies
    ]
    value = torch.logsumexp(logits.log_softmax(-1) + torch.stack(densities, -1), -1)
    return torch.autograd.grad(value.sum(), parameters_of(energies, logits))


def parameters_of(energies, logits):
    return [logits, *(p for f in energies for p in f.parameters())]


def stochastic_gradients(energies, logits, count=8):
    """Of the loss of maximum likelihood, each with new chains."""
    modules = nn.ModuleList(energies)
    samplers = [
        IndependentChains(dist.Normal(torch.tensor(m), 0.6)) for m in (-3.2, 0.6)
    ]
    estimates = [partition.quadrature(f) for f in energies]

    def model():
        pyro.module("energies", modules)
        experts = [
            EnergyDistribution(f, estimate, sampler=sampler)
            for f, estimate, sampler in zip(energies, estimates, samplers, strict=True)
        ]
        with pyro.plate("data", len(DATA)):
            q = MixtureOfExperts(experts, logits.softmax(-1))
            pyro.sample("x", q, obs=DATA)

    grads = []
    for _ in range(count):
        learned = Learn(model, MaximumLikelihood(num_chains=200, num_steps=25))
        loss = Trace_ELBO().differentiable_loss(learned, lambda: None)
        parameters = parameters_of(energies, logits)
        grads.append(torch.stack(torch.autograd.grad(-loss, parameters[1:])))
    (weight_grad,) = torch.autograd.grad(
        -Trace_ELBO().differentiable_loss(model, lambda: None), logits
    )
    return torch.stack(grads), weight_grad


def test_gradient_of_the_likelihood_is_that_of_quadrature(monkeypatch):
    """For every expert's parameters. The weights 0.4 and 0.6 are far from the data's
    5/7 and 2/7: as one energy with fixed logits the mixture has another gradient, which
    is planted below and seen to fail."""
    energies, logits = learned_wells(), torch.tensor([0.4, 0.6]).log()
    logits.requires_grad_()
    weights, *exact = exact_gradient(energies, logits)
    exact = torch.stack(exact)

    def worst():
        grads, _ = stochastic_gradients(energies, logits)
        error = grads.std(0) / len(grads) ** 0.5
        return ((grads.mean(0) - exact) / error).abs().max()

    assert worst() < 4
    torch.testing.assert_close(stochastic_gradients(energies, logits, 1)[1], weights)
    monkeypatch.setattr(handler, "MixtureOfExperts", type(None))
    monkeypatch.setattr(handler, "require_learnable", lambda *_: None)
    monkeypatch.setattr(
        "pyro_ebm.distributions.mixture.ExpertsEnergy.forward",
        lambda self, x: self.mixture(x),
    )
    assert worst() > 4  # planted


def test_svi_learns_models_and_weights_together():
    """The optimum of the likelihood, found from a start that is off in all of it."""
    torch.manual_seed(5)
    data = torch.cat([0.5 * torch.randn(150, 1) - 2, torch.randn(50, 1) + 2])
    base = dist.Normal(torch.zeros(1), 3.0).to_event(1)
    models = nn.ModuleList(
        EnergyModel(QuadraticEnergy(torch.tensor([m])), base) for m in (-1.0, 1.0)
    )

    def model():
        pyro.module("models", models)
        weights = pyro.param(
            "weights", torch.ones(2) / 2, constraint=dist.constraints.simplex
        )
        q = MixtureOfExperts(list(models), weights)
        with pyro.plate("data", len(data)):
            pyro.sample("x", q, obs=data)

    learn = Learn(model, MaximumLikelihood(num_chains=200, num_steps=3))
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.02 ** (1 / 200)})
    svi = SVI(learn, lambda: None, optim, Trace_ELBO())
    for _ in range(200):
        svi.step()
    assert set(learn.chains) == set()  # the models' own serve
    left, right = data[:150], data[150:]
    for energy_model, part in zip(models, (left, right), strict=True):
        energy = energy_model.energy
        assert energy_model.chains.is_started
        assert abs(energy.loc - part.mean()) < 0.25
        assert abs(energy.precision.item() ** -0.5 - part.std()) < 0.25
    assert abs(pyro.param("weights")[0] - 0.75) < 0.05


def test_chains_of_experts_without_a_model_are_saved():
    energies = nn.ModuleList(learned_wells())

    def model():
        pyro.module("energies", energies)
        with pyro.plate("data", len(DATA)):
            pyro.sample("x", MixtureOfExperts([known(f) for f in energies]), obs=DATA)

    first = Learn(model, MaximumLikelihood(num_chains=8, num_steps=1))
    SVI(first, lambda: None, pyro.optim.Adam({}), Trace_ELBO()).step()
    assert set(first.chains) == {"x/0", "x/1"}
    assert not torch.equal(first.chains["x/0"].u, first.chains["x/1"].u)
    second = Learn(model, MaximumLikelihood(num_chains=8, num_steps=1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.chains["x/1"].u, first.chains["x/1"].u)


def test_without_gradient_of_log_z_the_energy_cannot_be_learned():
    """As a factor of a product, where the handler does not see the experts."""
    q = MixtureOfExperts([known(f) for f in wells()], WEIGHTS)
    product = q.energy + FunctionEnergy(torch.square, ())
    x = torch.randn(5, requires_grad=True)
    value = product(x).sum()
    (grad,) = torch.autograd.grad(value, x, retain_graph=True)  # NUTS asks for no more
    torch.testing.assert_close(grad, product.value_and_grad(x)[1])
    with pytest.raises(NotImplementedError, match=r"gradient .* is not known here"):
        value.backward()
    score = torch.autograd.grad(product(x).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"gradient .* is not known here"):
        score.square().sum().backward()
    for energy in (two_wells().energy, gaussians().energy):
        energy(torch.randn(5, *energy.event_shape).requires_grad_()).sum().backward()


# Copies and refusals -----------------------------------------------------------------


def test_pickle_and_deepcopy():
    q, x = two_wells().expand([3]), torch.randn(3)
    for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert torch.equal(other.log_prob(x), q.log_prob(x))
        assert other.sample((2,)).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_dtype_is_the_experts(dtype):
    energy = QuadraticEnergy(torch.zeros(2))
    for weights in (None, WEIGHTS, torch.tensor(WEIGHTS, dtype=torch.float64)):
        q = MixtureOfExperts([EnergyDistribution(energy), wide()], weights)
        assert q.log_prob(q.sample((2,))).dtype == torch.float32
        assert q.energy(q.sample((2,))).dtype == torch.float32


@pytest.mark.gpu
def test_on_the_gpu(device):
    energy = QuadraticEnergy(torch.zeros(2)).to("cuda")
    normal = dist.Normal(torch.zeros(2, device="cuda"), 1.0).to_event(1)
    q = MixtureOfExperts([EnergyDistribution(energy), normal], WEIGHTS)
    assert q.log_prob(q.sample((2,))).device.type == "cuda"


def test_unknown_log_partitions_are_refused():
    ring = FunctionEnergy(lambda x: (x.norm(dim=-1) - 1) ** 2, (2,))
    message = r"experts\[1\] must know its log Z.*FunctionEnergy is unknown.*estimate"
    with pytest.raises(ValueError, match=message):
        MixtureOfExperts([wide(), EnergyDistribution(ring)])
    with pytest.raises(ValueError, match=r"experts\[0\] must know.*refresh\(energy\)"):
        MixtureOfExperts([EnergyModel(NeuralEnergy((2,), base=wide()), wide()), wide()])
    with pytest.raises(ValueError, match="free parameter"):
        MixtureOfExperts([EnergyDistribution(ring, nn.Parameter(torch.tensor(0.0)))])


def test_unreliable_log_partitions_are_flagged():
    nan = math.nan
    why = (Finding(Reason.NOT_MIXED, "why"),)
    bad = LogPartitionEstimate(1.0, 0.5, 0.0, 2.0, nan, Status.UNRELIABLE, "x", 1, why)
    energy = FunctionEnergy(lambda x: (x.norm(dim=-1) - 1) ** 2, (2,))
    with pytest.warns(UnreliableWarning, match="why"):
        expert = EnergyDistribution(energy, bad)
    with pytest.warns(UnreliableWarning, match=r"experts\[1\], 1 \+- 0.5, is unrel"):
        q = MixtureOfExperts([wide(), expert])
    assert not q.is_normalized
    assert q.log_partition_std_error == 0.25
    assert "log Z: unknown" in repr(q)


@pytest.mark.parametrize(
    "weights",
    [
        [0.5, 0.6],
        [1.0, 0.0],
        [1.5, -0.5],
        [0.2, 0.3, 0.5],
        [math.nan, 1.0],
        torch.full((3, 2), 0.5),
    ],
)
def test_wrong_weights_are_errors(weights):
    with pytest.raises(ValueError, match="weights must be 2 positive numbers that sum"):
        MixtureOfExperts([wide(), wide()], weights)


def test_wrong_experts_are_errors():
    with pytest.raises(ValueError, match="at least one distribution, got none"):
        MixtureOfExperts([])
    with pytest.raises(
        TypeError, match=r"experts\[1\] must be a Pyro distribution, got"
    ):
        MixtureOfExperts([wide(), QuadraticEnergy(torch.zeros(2))])
    with pytest.raises(
        ValueError, match=r"experts\[0\] must have an empty batch_shape"
    ):
        MixtureOfExperts([dist.Normal(torch.zeros(2), 1.0)])
    with pytest.raises(
        ValueError, match=r"experts\[0\] must have an empty batch_shape"
    ):
        MixtureOfExperts([gaussians().expand([3])])
    with pytest.raises(ValueError, match="share one event_shape"):
        MixtureOfExperts([wide(), dist.Normal(0.0, 1.0)])
    with pytest.raises(ValueError, match="share one support"):
        MixtureOfExperts([dist.Gamma(1.0, 1.0), dist.Normal(0.0, 1.0)])


def test_its_draws_are_of_no_other_energy():
    q = gaussians()
    with pytest.raises(ValueError, match="draws from that mixture only"):
        EnergyDistribution(QuadraticEnergy(torch.zeros(2)), sampler=q.sampler).sample()


def test_mean_and_variance_are_those_of_the_experts():
    """Seen to recurse for ever: its closed form is a mixture of experts itself."""
    experts = [dist.Normal(-1.0, 1.0), dist.Normal(3.0, 2.0)]
    mixture = MixtureOfExperts(experts, [0.25, 0.75]).expand([2])
    pyro_mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.25, 0.75])),
        dist.Normal(torch.tensor([-1.0, 3.0]), torch.tensor([1.0, 2.0])),
    )
    torch.testing.assert_close(mixture.mean, pyro_mixture.mean.expand(2))
    torch.testing.assert_close(mixture.variance, pyro_mixture.variance.expand(2))
    with pytest.raises(NotImplementedError, match="no entropy in closed form"):
        mixture.entropy()
