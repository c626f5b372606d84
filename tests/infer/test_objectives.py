"""What every objective owes to the library, whatever its algorithm.

The common problem is a Gaussian of two dimensions that knows its log Z, which the
objectives do not use.
"""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ebm import EnergyModel, fit, infer
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import (
    AmortizedSampler,
    BoundedLikelihood,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    EnergyPenalty,
    ExactMaximumLikelihood,
    FlowContrastive,
    ImportanceSampledLikelihood,
    Learn,
    MaximumLikelihood,
    NoiseContrastive,
    Objective,
    ObjectiveLoss,
    RankingNoiseContrastive,
    ScoreMatching,
    SlicedScoreMatching,
    TemperedMaximumLikelihood,
)
from pyro_ebm.infer.objectives.contrast.noise import LearnedLogPartition
from pyro_ebm.mcmc import HMC, MALA
from pyro_ebm.partition import LogPartition
from pyro_ebm.testing import CountingEnergy
from tests.infer.problems import Affine, GammaEnergy, base

LOC = torch.tensor([0.4, -0.3], dtype=torch.float64)
PRECISION = torch.tensor([[1.6, 0.5], [0.5, 1.1]], dtype=torch.float64)
SIGMA = 0.3


class Generator(nn.Module):
    def __init__(self, event=(2,)):
        super().__init__()
        self.event = event
        self.linear = nn.Linear(3, math.prod(event))

    def forward(self, z):
        return self.linear(z).reshape(len(z), *self.event)


class ExactStart:
    """A sampler for chains that start where they should be."""

    def start(self, energy, num_draws):
        return energy.closed_form().distribution.sample((num_draws,))

    __call__ = start


# Each for events of a given shape.
OBJECTIVES = {
    "maximum-likelihood": lambda event: MaximumLikelihood(num_chains=200, num_steps=5),
    "tempered": lambda event: TemperedMaximumLikelihood(base(event), num_chains=100),
    "exact": lambda event: ExactMaximumLikelihood(num_nodes=61),
    "contrastive-divergence": lambda event: ContrastiveDivergence(num_steps=2),
    "noise-contrastive": lambda event: NoiseContrastive(base(event)),
    "ranking": lambda event: RankingNoiseContrastive(base(event), num_noise=5),
    "flow-contrastive": lambda event: FlowContrastive(Affine(event)),
    "importance": lambda event: ImportanceSampledLikelihood(base(event)),
    "bounded": lambda event: BoundedLikelihood(base(event)),
    "score-matching": lambda event: ScoreMatching(),
    "sliced": lambda event: SlicedScoreMatching(),
    "denoising": lambda event: DenoisingScoreMatching(SIGMA),
    "denoising-levels": lambda event: DenoisingScoreMatching((0.1, 1.0)),
    "discrepancy": lambda event: EnergyDiscrepancy(num_copies=64),
    "generator": lambda event: AmortizedSampler(Generator(event), (3,), num_draws=50),
    "penalty": lambda event: EnergyPenalty(
        MaximumLikelihood(num_chains=200, num_steps=5)
    ),
}
# At what parameters the mean gradient is nil: those of the data, or of noisy data. Not
# so of energy discrepancy at finite M, of a generator that is not the model, and of a
# penalty.
UNBIASED = [
    name
    for name in OBJECTIVES
    if name not in ("denoising-levels", "discrepancy", "generator", "penalty")
]
# Values and gradients of the energy that a data point costs, and those besides.
COSTS = {
    "maximum-likelihood": ((1, 0), (200, 200 * 6)),
    "tempered": ((1, 0), (100, 100 * (6 + 3 * (5 * 3 + 1)))),
    "exact": ((1, 0), None),
    "contrastive-divergence": ((2, 3), (0, 0)),
    "noise-contrastive": ((5, 0), (0, 0)),
    "ranking": ((6, 0), (0, 0)),
    "flow-contrastive": ((1, 1), (0, 0)),
    "importance": ((1, 0), (1024, 0)),
    "bounded": ((1, 0), (1024, 0)),
    "score-matching": ((0, 1), (0, 0)),
    "sliced": ((0, 1), (0, 0)),
    "denoising": ((1, 1), (0, 0)),
    "denoising-levels": ((1, 1), (0, 0)),
    "discrepancy": ((65, 0), (0, 0)),
    "generator": ((1, 0), (50 + 64, 50)),
    "penalty": ((1, 0), (400, 200 * 6)),
}


def objective_of(name, event=(2,)):
    torch.manual_seed(7)  # some have a module of their own
    return OBJECTIVES[name](event)


@pytest.fixture(params=OBJECTIVES)
def name(request):
    return request.param


def test_every_public_objective_is_covered():
    public = [getattr(infer, name) for name in infer.__all__]
    classes = {c for c in public if isinstance(c, type) and issubclass(c, Objective)}
    # Those for finite supports are tested there.
    classes -= {Objective, infer.Pseudolikelihood, infer.RatioMatching}
    assert {type(objective_of(name)) for name in OBJECTIVES} == classes
    assert COSTS.keys() == OBJECTIVES.keys()


def test_what_it_says_of_itself(name):
    objective = objective_of(name)
    state = objective.make_state()
    assert objective.log_partition in (None, "exact", "consistent")
    assert (objective.log_partition is not None) == hasattr(state, "log_partition")
    for word in ("Exactness:", "Cost:", "Example:"):
        if (type(objective), word) != (MaximumLikelihood, "Example:"):
            assert word in type(objective).__doc__, word
    assert hash(objective) is not None  # frozen: settings only


def gaussian(loc=LOC, precision=PRECISION):
    return QuadraticEnergy(loc.clone(), precision)


def gradients(name, energy, batches):
    """Of the loss at fixed parameters, one a batch, shape ``(len(batches), P)``."""
    objective = objective_of(name)
    state = objective.make_state()
    known = energy.closed_form().log_partition
    if isinstance(state, LearnedLogPartition):
        state.log_partition.data.copy_(known)
        state.is_started.fill_(True)
    q = EnergyDistribution(energy, sampler=ExactStart())
    found = []
    for x in batches:
        loss = objective.loss(q, x, state)
        grads = torch.autograd.grad(loss, list(energy.parameters()))
        found.append(torch.cat([g.flatten() for g in grads])[[0, 1, 2, 3, 6]])
    return torch.stack(found)


def worst_z(grads):
    error = grads.std(0) / len(grads) ** 0.5
    return ((grads.mean(0)).abs() / error).max()


@pytest.mark.parametrize("name", UNBIASED)
def test_the_gradient_is_nil_at_the_truth(name):
    """In the mean over data of the model: five parameters, two of the mean and three
    of the precision, hence first and second moments. A fault of 10 % in the precision
    of the data is planted, and seen to fail."""
    precision = PRECISION
    if name == "denoising":
        precision = (PRECISION.inverse() + SIGMA**2 * torch.eye(2)).inverse()
    truth = dist.MultivariateNormal(LOC, precision_matrix=PRECISION)
    energy = gaussian(LOC, precision)
    data = truth.sample((60, 250))
    assert worst_z(gradients(name, energy, data)) < 4
    planted = LOC + (data - LOC) / 1.1
    assert worst_z(gradients(name, energy, planted)) > 4


# Two ways to train -------------------------------------------------------------------


def network():
    torch.manual_seed(11)
    energy = NeuralEnergy((2,), (8,), base=base())
    few = LogPartition(energy, base(), num_islands=2, num_walkers=8)
    return EnergyModel(energy, base(), log_partition=few)


def trained_by_svi(objective, energy_model, data, num_steps=6):
    def model(x):
        pyro.module("energy", energy_model)
        with pyro.poutine.scale(scale=1 / len(x)), pyro.plate("data", len(x)):
            pyro.sample("x", energy_model(), obs=x)

    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    learn = Learn(model, objective)
    svi = SVI(learn, lambda x: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(num_steps)]
    return learn, losses


def trained_by_torch(objective, energy_model, data, num_steps=6):
    pyro.set_rng_seed(5)
    loss = ObjectiveLoss(energy_model, objective)
    optim = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(num_steps):
        optim.zero_grad()
        loss(data).backward()
        optim.step()
    return loss


def test_svi_and_a_loop_of_torch_give_the_same(name):
    data = torch.randn(50, 2)
    first, second = network(), network()
    before = copy.deepcopy(first.energy.state_dict())
    learn, losses = trained_by_svi(objective_of(name), first, data)
    loss = trained_by_torch(objective_of(name), second, data)
    for key, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[key], equal_nan=True)
    for key, value in learn.states.state_dict().items():
        mine = loss.state.state_dict()[key.removeprefix("x.")]
        torch.testing.assert_close(value, mine, equal_nan=True)
    assert not torch.equal(before["network.0.weight"], first.energy.network[0].weight)
    assert first.log_partition.is_started  # log Z follows, whatever the objective
    assert all(torch.tensor(losses).isfinite())


def test_the_value_under_svi_is_that_of_log_prob(name):
    energy_model, data = network(), torch.randn(20, 2)
    _, losses = trained_by_svi(objective_of(name), energy_model, data, 1)
    # Of the parameters that the step began with, as log Z is until it is read again.
    value = network().energy(data).mean() + energy_model.log_partition.value
    assert losses[0] == pytest.approx(value.item(), abs=1e-9)


def test_what_is_learned_beside_the_energy_is_saved(name):
    objective, data = objective_of(name), torch.randn(30, 2)
    learn, _ = trained_by_svi(objective, network(), data, 2)
    fresh = Learn(lambda: None, objective)
    fresh.load_state_dict(learn.state_dict())
    for key, value in learn.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key
    assert {p for p in map(id, learn.states.parameters())} <= {
        id(p) for p in pyro.get_param_store().values()
    }


def test_fit_takes_it_and_log_partition_follows(name):
    energy_model = network()
    result = fit(
        energy_model, torch.randn(600, 2), objective_of(name), num_steps=12,
        record_interval=6, progress_bar=False,
    )  # fmt: skip
    assert result.stopped == "finished"
    assert result.log_partition.is_reliable
    exact = infer.ExactMaximumLikelihood(num_nodes=101)
    state = exact.make_state()
    exact.loss(result.distribution, torch.randn(60, 2), state)
    assert abs(result.log_partition.value - state.log_partition) < 0.1
    if objective_of(name).log_partition is not None:
        assert abs(result.state.log_partition - state.log_partition) < 0.2


# Shapes, types, cost -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event", [(), (2,), (1, 2)])
def test_shapes_and_dtype(name, event, dtype):
    weight = nn.Parameter(torch.tensor(0.5))

    def value(x):
        terms = weight * x**4 + x**2 / 2
        return terms.sum(tuple(range(-len(event), 0))) if event else terms

    objective = objective_of(name, event)
    q = EnergyDistribution(FunctionEnergy(value, event))
    state = objective.make_state().to(dtype)
    terms = objective.surrogate(q, state)(torch.randn((4, 3, *event)))
    assert terms.objective.shape == terms.energy.shape == (4, 3)
    assert terms.objective.dtype == terms.energy.dtype == dtype
    (grad,) = torch.autograd.grad(terms.objective.sum(), weight)
    assert grad.isfinite()
    assert grad != 0


def test_cost_of_a_step(name):
    objective, data = objective_of(name), torch.randn(30, 2)
    counting = CountingEnergy(FunctionEnergy(gaussian(), (2,)))
    loss = ObjectiveLoss(counting, objective)
    for _ in range(2):
        counting.reset()
        loss(data)
    (values, grads), rest = COSTS[name]
    if rest is None:  # a grid, and once more where the weight is
        assert 61**2 + 30 < counting.num_values < 2 * 61**2 + 30
        assert counting.num_gradients == 0
        return
    assert counting.num_values == 30 * values + rest[0]
    assert counting.num_gradients == 30 * grads + rest[1]


# Supports ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        ExactMaximumLikelihood(),
        ScoreMatching(),
        SlicedScoreMatching(),
        NoiseContrastive(dist.LogNormal(torch.tensor(0.5), 1.0), num_noise=10),
        RankingNoiseContrastive(dist.LogNormal(torch.tensor(0.5), 1.0)),
        BoundedLikelihood(dist.LogNormal(torch.tensor(0.5), 1.0)),
        EnergyDiscrepancy(num_copies=16),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_positive_data(objective):
    """A Gamma distribution of concentration 3 and rate 2, to 4 standard errors of
    maximum likelihood at 2,000 points (0.1, 0.07), twice that for the others."""
    pyro.set_rng_seed(3)
    data = dist.Gamma(3.0, 2.0).sample((2000,))
    energy = FunctionEnergy(GammaEnergy(2.0, 1.5), (), dist.constraints.positive)
    loss = ObjectiveLoss(energy, objective)
    optim = torch.optim.Adam(loss.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.97)
    for _ in range(150):
        optim.zero_grad()
        loss(data).backward()
        optim.step()
        schedule.step()
    factor = 1 if isinstance(objective, ExactMaximumLikelihood) else 2
    assert abs(energy.fn.concentration - 3) < factor * 4 * 0.1
    assert abs(energy.fn.rate - 2) < factor * 4 * 0.07


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if "nois" not in n])
def test_discrete_supports(name):
    """Enumerated exactly, or refused with the way out."""
    logits = nn.Parameter(torch.tensor([0.3, -0.4, 0.1]))
    support = dist.constraints.independent(dist.constraints.boolean, 1)
    energy = FunctionEnergy(lambda x: -(x * logits).sum(-1), (3,), support)
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    objective = objective_of(name)
    loss = ObjectiveLoss(energy, objective)
    if name == "exact":
        bernoulli = dist.Bernoulli(logits=logits).to_event(1)
        expected = -bernoulli.log_prob(x).mean()
        torch.testing.assert_close(loss(x), expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, logits) for value in (loss(x), expected))
        )
    elif name in ("ranking", "importance", "bounded", "tempered"):
        with pytest.raises(ValueError, match=r"must .*event_shape \(?3"):
            loss(x)
    elif name in (
        "maximum-likelihood", "contrastive-divergence", "penalty", "discrepancy"
    ):  # fmt: skip
        assert loss(x).isfinite()  # by Gibbs sampling, or flips
    else:
        with pytest.raises(NotImplementedError, match=r"discrete.*NoiseContrastive"):
            loss(x)


# Bad input ---------------------------------------------------------------------------


def relu(activation):
    return NeuralEnergy((2,), (8,), base=base(), activation=activation)


@pytest.mark.parametrize("objective", [ScoreMatching(), SlicedScoreMatching()])
def test_networks_without_curvature_are_warned_of(objective):
    with pytest.warns(UserWarning, match=r"curvature.*nn\.ReLU have none.*nn\.SiLU"):
        ObjectiveLoss(relu(nn.ReLU), objective)(torch.randn(5, 2))
    ObjectiveLoss(relu(nn.SiLU), objective)(torch.randn(5, 2))
    # What is learned is where it is: the Hessian does not know, and need not.
    shifted = gaussian()
    shifted.log_diagonal.requires_grad_(False)
    shifted.lower.requires_grad_(False)
    ObjectiveLoss(shifted, objective)(torch.randn(5, 2))


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (dist.Normal(torch.zeros(2), 1.0), ValueError, r"batch_shape \(2,\).*to_event"),
        (
            dist.Normal(torch.zeros(3), 1.0).to_event(1),
            ValueError,
            r"event_shape \(2,\)",
        ),
        (dist.LogNormal(torch.zeros(2), 1.0).to_event(1), ValueError, "support of the"),
        (nn.Linear(2, 2), TypeError, "forward"),
        (object(), TypeError, "object has no sample"),
        (None, ValueError, "noise is None.*no EnergyModel"),
    ],
)
@pytest.mark.parametrize("objective", [NoiseContrastive, RankingNoiseContrastive])
def test_noise_that_does_not_fit(objective, noise, error, message):
    with pytest.raises(error, match=message):
        ObjectiveLoss(gaussian(), objective(noise))(torch.randn(5, 2))


def test_noise_is_the_base_by_default():
    energy_model = EnergyModel(gaussian(), base())
    pyro.set_rng_seed(1)
    first = ObjectiveLoss(energy_model, NoiseContrastive())(torch.zeros(5, 2))
    pyro.set_rng_seed(1)
    energy_model = EnergyModel(gaussian(), base())
    second = ObjectiveLoss(energy_model, NoiseContrastive(base()))(torch.zeros(5, 2))
    assert first == second


@pytest.mark.parametrize(
    "name", [n for n in OBJECTIVES if "gradient" in objective_of(n).needs]
)
def test_an_energy_that_is_not_differentiable(name):
    weight = nn.Parameter(torch.tensor(1.0))
    energy = FunctionEnergy(lambda x: weight * (x > 0).to(x).sum(-1), (2,))
    with pytest.raises(ValueError, match=r"needs the gradient.*detaches x"):
        ObjectiveLoss(energy, objective_of(name))(torch.randn(5, 2))


def test_an_objective_with_a_state_needs_it():
    with pytest.raises(ValueError, match=r"make_state\(\).*ObjectiveLoss"):
        NoiseContrastive(base()).loss(gaussian(), torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseContrastive(num_noise=0), "num_noise must be at least 1, got 0"),
        (lambda: RankingNoiseContrastive(num_noise=0), "num_noise must be at least 1"),
        (lambda: SlicedScoreMatching(0), "num_directions must be at least 1, got 0"),
        (
            lambda: DenoisingScoreMatching(0.0),
            "noise_scale must be positive and finite",
        ),
        (lambda: DenoisingScoreMatching(()), "noise_scale must be positive and finite"),
        (lambda: ContrastiveDivergence(0), "num_steps must be at least 1, got 0"),
        (
            lambda: ImportanceSampledLikelihood(num_draws=1),
            "num_draws must be at least",
        ),
        (lambda: BoundedLikelihood(num_draws=1), "num_draws must be at least 2, got 1"),
        (lambda: EnergyDiscrepancy(0.0), "time must be positive and finite, got 0.0"),
        (lambda: EnergyDiscrepancy(num_copies=0), "num_copies must be at least 1"),
        (
            lambda: EnergyDiscrepancy(stabilizer=-1.0),
            "stabilizer must be finite",
        ),
        (lambda: TemperedMaximumLikelihood(num_temperatures=1), "must be at least 2"),
        (lambda: FlowContrastive(Affine(), 0), "num_noise must be at least 1, got 0"),
        (lambda: AmortizedSampler(Affine(), (2,), 0.0), "noise_scale must be positive"),
        (lambda: AmortizedSampler(Affine(), (2,), num_draws=0), "num_draws must be at"),
        (lambda: AmortizedSampler(Affine(), (2,), num_posterior=6), "multiple of 4"),
        (lambda: AmortizedSampler(Affine(), (2,), num_noise=-1), "num_noise must be"),
        (lambda: ExactMaximumLikelihood(num_nodes=2), "num_nodes must be at least 5"),
        (lambda: ExactMaximumLikelihood(max_states=0), "max_states must be at least 1"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    with pytest.raises(TypeError, match="model must be an Energy or EnergyModel"):
        ObjectiveLoss(lambda x: x, ScoreMatching())
    with pytest.raises(TypeError, match=r"model must be an Energy, .*FunctionEnergy"):
        ScoreMatching().loss(lambda x: x, torch.zeros(2))
    for take in (
        lambda o: ObjectiveLoss(gaussian(), o),
        lambda o: Learn(id, o),
    ):
        with pytest.raises(TypeError, match="objective must be an Objective"):
            take("ml")
    with pytest.raises(TypeError, match="kernel must be a pyro_ebm.mcmc.Kernel"):
        ContrastiveDivergence(kernel=HMC)
    with pytest.raises(TypeError, match="kernel must be HMC.*got MALA"):
        TemperedMaximumLikelihood(kernel=MALA())
    with pytest.raises(TypeError, match="flow must be a module .*NoiseContrastive"):
        FlowContrastive(base())
    with pytest.raises(TypeError, match="generator must be a module"):
        AmortizedSampler(torch.tanh, (2,))
    loss = ObjectiveLoss(gaussian(), AmortizedSampler(nn.Linear(2, 3), (2,)))
    with pytest.raises(ValueError, match=r"of shape \(256, 2\), got \(256, 3\)"):
        loss(torch.zeros(5, 2))


def test_one_generator_is_for_one_energy():
    energies = nn.ModuleList([gaussian(), gaussian(-LOC)])

    def model():
        pyro.module("energies", energies)
        for k, energy in enumerate(energies):
            with pyro.plate(f"data {k}", 5):
                pyro.sample(f"x {k}", EnergyDistribution(energy), obs=torch.zeros(5, 2))

    learn = Learn(model, objective_of("generator"))
    with pytest.raises(ValueError, match="one module for one energy.*one by one"):
        Trace_ELBO().loss(learn, lambda: None)


def test_a_mixture_needs_the_gradient_at_each_point():
    from pyro_ebm.distributions import MixtureOfExperts

    experts = nn.ModuleList([EnergyModel(gaussian()), EnergyModel(gaussian(-LOC))])

    def model():
        pyro.module("experts", experts)
        with pyro.plate("data", 5):
            q = MixtureOfExperts(list(experts), torch.ones(2) / 2)
            pyro.sample("x", q, obs=torch.zeros(5, 2))

    with pytest.raises(NotImplementedError, match="no gradient of log q"):
        Trace_ELBO().loss(Learn(model, ScoreMatching()), lambda: None)


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x @ self.weight


def test_an_unknown_log_partition_says_what_to_do():
    """Score matching does not mind an energy without a partition function."""
    energy = FunctionEnergy(Slope(), (2,))
    objective, settings = DenoisingScoreMatching(0.5), {"progress_bar": False}
    result = fit(
        EnergyModel(energy), torch.randn(50, 2), objective, num_steps=5, **settings
    )
    assert result.log_partition.status == "unreliable"
    assert "run pyro_ebm.partition.estimate" in result.log_partition.reason
