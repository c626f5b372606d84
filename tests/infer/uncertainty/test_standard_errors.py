"""Standard errors: closed forms, coverage over repeated data, and what is refused."""

import copy
import functools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import EnergyDistribution, EnergyModel, fit
from pyro_ebm.core import Reason
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import (
    AmortizedSampler,
    BoundedLikelihood,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    ExactMaximumLikelihood,
    FlowContrastive,
    ImportanceSampledLikelihood,
    MaximumLikelihood,
    NoiseContrastive,
    ObjectiveLoss,
    RankingNoiseContrastive,
    ScoreMatching,
    SlicedScoreMatching,
    parameter_errors,
)
from pyro_ebm.infer.uncertainty.estimating_equations import (
    Equation,
    _derivatives,
)
from pyro_ebm.mcmc import MALA, ULA
from pyro_ebm.mcmc.warmup.adaptation import StepSizeAdaptation
from tests.infer.problems import (
    THETA,
    GammaEnergy,
    Quartic,
    quartic_density,
    quartic_energy,
    solve,
    wide,
)


def gaussian_fitted(data):
    covariance = torch.cov(data.mT, correction=0).reshape(2 * [data.shape[1]])
    return QuadraticEnergy(data.mean(0), covariance.inverse())


# Closed forms ------------------------------------------------------------------------


def test_derivatives_are_those_of_torch():
    values, weights = torch.randn(7, 3), torch.rand(7)

    def numbers(a, b):
        return (values @ a).exp() * b + (values @ a).square().sum(-1, keepdim=True)

    a, b = torch.randn(3, requires_grad=True), torch.randn((), requires_grad=True)
    found = _derivatives(numbers(a, b), [a, b], weights)
    rows = torch.autograd.functional.jacobian(numbers, (a, b))
    torch.testing.assert_close(found.rows, torch.cat([rows[0], rows[1][:, None]], -1))
    (aa, ab), (ba, bb) = torch.autograd.functional.hessian(
        lambda a, b: weights @ numbers(a, b), (a, b)
    )
    hessian = torch.cat(
        [torch.cat([aa, ab[:, None]], 1), torch.cat([ba, bb[None]])[None]]
    )
    torch.testing.assert_close(found.hessian, hessian)


def test_errors_of_a_gaussian_in_closed_form():
    """Of the mean s^2 / n; of -log s a quarter of the variance of the squares."""
    data = dist.Laplace(torch.tensor([1.0]), 2.0).sample((500,))
    energy = gaussian_fitted(data)
    squares = (data - data.mean()).square() / data.var(correction=0)
    found = parameter_errors(energy, data)
    wanted = torch.stack([data.var() / 500, squares.var() / 4 / 500])
    torch.testing.assert_close(found.std_error.square(), wanted)
    found = parameter_errors(energy, data, covariance="information")
    wanted = torch.stack([data.var(correction=0) / 500, torch.tensor(0.5 / 500)])
    torch.testing.assert_close(found.std_error.square(), wanted)
    torch.testing.assert_close(
        found.upper - found.lower, 2 * 1.959964 * found.std_error
    )
    assert found.names == ("loc[0]", "log_diagonal[0]")
    array = parameter_errors(energy, data.numpy(), covariance="information")
    torch.testing.assert_close(array.std_error, found.std_error)
    assert found.status == "ok"
    assert "information of the likelihood by a sum" in str(found)


def test_information_of_a_gamma_distribution():
    """On a constrained support; the closed form holds whatever the data are."""
    a, r = torch.tensor(3.0), torch.tensor(2.0)
    energy = FunctionEnergy(GammaEnergy(3.0, 2.0), (), dist.constraints.positive)
    data = dist.Gamma(a, r).sample((400,))
    found = parameter_errors(energy, data, covariance="information")
    information = torch.tensor([[torch.polygamma(1, a), -1 / r], [-1 / r, a / r**2]])
    torch.testing.assert_close(
        found.covariance, information.inverse() / 400, rtol=1e-6, atol=0
    )


def test_information_of_booleans():
    logits = nn.Parameter(torch.tensor([0.3, -0.4, 0.1]))
    module = nn.Module()
    module.logits = logits
    module.forward = lambda x: -(x * logits).sum(-1)
    support = dist.constraints.independent(dist.constraints.boolean, 1)
    energy = FunctionEnergy(module, (3,), support)
    data = dist.Bernoulli(logits=logits.detach()).sample((300,))
    p = logits.detach().sigmoid()
    found = parameter_errors(energy, data, covariance="information")
    torch.testing.assert_close(found.covariance.inverse() / 300, (p * (1 - p)).diag())


def test_draws_of_the_model_do_for_a_sum():
    data = torch.randn(1000, 2) @ torch.tensor([[1.0, 0.4], [0.0, 0.7]])
    energy = gaussian_fitted(data)
    by_sum = parameter_errors(energy, data)
    draws = energy.closed_form().distribution.sample((40_000,))
    by_draws = parameter_errors(energy, data, draws=draws)
    # Relative error of an element of the information: about sqrt(2 / 40,000).
    torch.testing.assert_close(by_draws.std_error, by_sum.std_error, rtol=0.04, atol=0)
    assert by_draws.status == "ok"
    assert "by 40,000 draws" in by_draws.method


def test_many_dimensions_are_drawn():
    data = torch.randn(2000, 5)
    found = parameter_errors(gaussian_fitted(data), data)
    assert found.status == "ok"
    assert "by 4,096 draws" in found.method
    # n^-1/2 of means and of elements below the diagonal, (2 n)^-1/2 on it.
    wanted = torch.tensor([1.0] * 5 + [0.5] * 5 + [1.0] * 10).div(2000).sqrt()
    torch.testing.assert_close(found.std_error, wanted, rtol=0.2, atol=0)


def test_chains_that_were_drawn_once_add_their_part():
    """1 / n becomes 1 / n + 1 / C, and with T times as many draws 1 / n + 1 / (T C)."""
    data = quartic_density().sample((300,))
    energy = quartic_energy()
    objective = MaximumLikelihood(num_chains=100)
    settings = {"covariance": "information"}
    alone = parameter_errors(energy, data, objective, **settings).covariance
    for redraws in (1, 5):
        found = parameter_errors(
            energy, data, objective, num_redraws=redraws, **settings
        )
        torch.testing.assert_close(
            found.covariance, alone * (1 + 300 / 100 / redraws), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("num_redraws", [1, math.inf])
def test_noise_contrast_by_quadrature(num_redraws):
    """A and B as integrals over x (Gutmann & Hyvarinen 2012, theorem 3), at 40,000
    points to 5 %. With the noise part of B left out, the two are 30 % apart."""
    nu, grid = 2, quartic_density()
    t, p = grid.points, grid.mass
    energy = quartic_energy()
    noise_mass = wide().log_prob(t).exp() * (t[1] - t[0])
    g = -torch.stack([t, t**2, torch.ones_like(t)], -1)  # of log q in (a, b, c)
    weight = nu * noise_mass / (p + nu * noise_mass)

    def integral(mass, first, second):
        return (mass[:, None] * first).mT @ second

    a = integral(p * weight, g, g)
    pull, push = weight[:, None] * g, (1 - weight)[:, None] * g
    spread = integral(p, pull, pull) - (p @ pull).outer(p @ pull)
    if num_redraws == 1:
        mean = noise_mass @ push
        spread = spread + nu * (integral(noise_mass, push, push) - mean.outer(mean))
    wanted = a.inverse() @ spread @ a.inverse() / 40_000

    objective = NoiseContrastive(wide(), nu)
    state = objective.make_state()
    state.log_partition.data.fill_(grid.log_integral)
    state.is_started.fill_(True)
    found = parameter_errors(
        energy, grid.sample((40_000,)), objective, state=state, num_redraws=num_redraws
    )
    assert found.names == ("fn.theta[0]", "fn.theta[1]", "log_partition")
    torch.testing.assert_close(
        found.std_error, wanted.diagonal().sqrt(), rtol=0.05, atol=0
    )


def contrast_by_short_chains(theta, data):
    """CD-2 at a fixed step size, with the same random numbers each time."""
    objective, energy = ContrastiveDivergence(2, MALA(0.3)), quartic_energy(theta)
    state = objective.make_state()
    state.start(energy, data[:10], MALA(0.3))
    state.adaptation.reset(0.3)
    torch.manual_seed(1)
    return EnergyDistribution(energy), objective, state, [energy.fn.theta]


def test_contrastive_divergence_has_the_slope_that_is_claimed(monkeypatch):
    """(3), against differences of the mean step. That of the likelihood, the planted
    fault, is 40 % too large."""
    monkeypatch.setattr(StepSizeAdaptation, "update", lambda *_: None)
    data, h = quartic_density().sample((40_000,)), 0.2
    equation = Equation.of_objective(
        *contrast_by_short_chains(THETA, data), data, math.inf
    )
    columns = []
    for direction in h * torch.eye(2):
        ends = []
        for theta in (THETA - direction, THETA + direction):
            q, objective, state, parameters = contrast_by_short_chains(theta, data)
            loss = objective.loss(q, data, state)
            ends.append(torch.autograd.grad(loss, parameters)[0])
        columns.append((ends[1] - ends[0]) / (2 * h))
    slope = torch.stack(columns, -1)
    torch.testing.assert_close(equation.curvature, slope, rtol=0, atol=0.04)
    likelihood = torch.cov(torch.stack([data, data**2]))
    assert (likelihood - slope).abs().max() > 0.1


# Coverage ----------------------------------------------------------------------------

# Objective, settings of the errors of a fit with held noise; about the truth.
COVERAGE = {
    "exact": (ExactMaximumLikelihood(num_nodes=257), {}),
    "information": (
        ExactMaximumLikelihood(num_nodes=257),
        {"covariance": "information"},
    ),
    "score-matching": (ScoreMatching(), {}),
    "noise-contrastive": (NoiseContrastive(wide(), 1), {"num_redraws": 1}),
    "ranking": (RankingNoiseContrastive(wide(), 3), {"num_redraws": 1}),
    "importance": (ImportanceSampledLikelihood(wide(), 400), {"num_redraws": 1}),
    "discrepancy": (EnergyDiscrepancy(0.5, 8), {"num_redraws": 1}),
    "bounded": (BoundedLikelihood(wide(), 400), {"num_redraws": 1}),
}
NUM_POINTS = 500


@functools.cache
def fits(name, count):
    """Fitted energies, states and data."""
    torch.manual_seed(0)
    data = quartic_density().sample((count, NUM_POINTS))
    found = []
    for index, x in enumerate(data):
        energy = quartic_energy()
        state = solve(energy, COVERAGE[name][0], x, seed=1000 + index)
        found.append((energy, state, x))
    return found


def z_scores(name, count, **settings):
    """Of each fit and parameter, shape ``(count, P)``."""
    objective, own = COVERAGE[name]
    known = torch.cat([THETA, torch.tensor([quartic_density().log_integral])])
    found = []
    for energy, state, x in fits(name, count):
        errors = parameter_errors(
            energy, x, objective, state=state, **{**own, **settings}
        )
        error = errors.estimate - known[: len(errors.names)]
        found.append(error / errors.std_error)
    return torch.stack(found)


def assert_standard(z):
    """First and second moments of scores that should be standard normal."""
    count = len(z)
    assert (z.mean(0).abs() < 4 / count**0.5).all(), z.mean(0)
    assert ((z.square().mean(0) - 1).abs() < 4 * (2 / count) ** 0.5).all(), z.std(0)


@pytest.mark.parametrize("name", ["exact", "score-matching", "noise-contrastive"])
def test_errors_are_as_large_as_they_say(name):
    assert_standard(z_scores(name, 30))


def test_the_noise_of_noise_contrast_counts():
    """The planted fault: errors as if the noise, which was held, had been averaged."""
    z = z_scores("noise-contrastive", 30, num_redraws=math.inf)
    with pytest.raises(AssertionError):
        assert_standard(z)


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERAGE)
def test_intervals_cover_in_90_to_98_percent(name):
    """Over 200 data sets of 500 points, each parameter; the ends are three standard
    errors away. Seen to fail for noise contrast with its noise left out."""
    covered = (z_scores(name, 200).abs() < 1.959964).double().mean(0)
    assert ((covered >= 0.90) & (covered <= 0.98)).all(), covered


def misspecified_scores(count, covariance):
    """Gaussians fitted to Laplace data, of known mean and -log of the deviation."""
    torch.manual_seed(3)
    known, found = torch.tensor([1.0, -math.log(2**0.5)]), []
    for data in dist.Laplace(torch.tensor([1.0]), 1.0).sample((count, NUM_POINTS)):
        errors = parameter_errors(gaussian_fitted(data), data, covariance=covariance)
        found.append((errors.estimate - known) / errors.std_error)
    return torch.stack(found)


def test_the_sandwich_holds_where_the_energy_is_wrong():
    """The information, the planted fault, covers about 80 % of the second parameter."""
    assert_standard(misspecified_scores(60, "sandwich"))
    with pytest.raises(AssertionError):
        assert_standard(misspecified_scores(60, "information"))


def test_denoising_is_judged_about_what_it_learns():
    """The variance and that of its noise, drawn once."""
    torch.manual_seed(5)
    objective, known = DenoisingScoreMatching(0.7), -math.log(1.49) / 2
    found = []
    for index, data in enumerate(torch.randn(20, NUM_POINTS, 1)):
        energy = gaussian_fitted(data)
        solve(energy, objective, data, seed=500 + index)
        errors = parameter_errors(energy, data, objective, num_redraws=1)
        assert [f.reason for f in errors.reasons] == [Reason.INCONSISTENT_ESTIMATOR]
        assert "noise_scale squared" in errors.reason
        found.append((errors.estimate - torch.tensor([0.0, known])) / errors.std_error)
    assert_standard(torch.stack(found))


# Verdicts ----------------------------------------------------------------------------


def test_parameters_that_are_not_the_solution_are_told():
    data = quartic_density().sample((1000,))
    energy = quartic_energy(THETA + torch.tensor([0.0, 0.5]))
    for objective in (ExactMaximumLikelihood(), ScoreMatching()):
        found = parameter_errors(energy, data, objective)
        assert found.status == "unreliable"
        assert not found.is_reliable
        assert "fn.theta[1] is" in found.reason
        assert "standard errors from the solution" in found.reason


@pytest.mark.parametrize(
    ("objective", "rule", "reason"),
    [
        (
            EnergyDiscrepancy(stabilizer=0.0),
            Reason.INCONSISTENT_ESTIMATOR,
            "num_copies",
        ),
        (ContrastiveDivergence(), Reason.INCONSISTENT_ESTIMATOR, "short chains"),
        (MaximumLikelihood(kernel=ULA()), Reason.BIASED_KERNEL, "ULA"),
    ],
)
def test_biased_objectives_say_so(objective, rule, reason):
    data = quartic_density().sample((500,))
    energy = quartic_energy()
    solve(energy, ExactMaximumLikelihood(num_nodes=257), data, 0)
    found = parameter_errors(energy, data, objective)
    assert found.status == "unreliable"
    assert [finding.reason for finding in found.reasons] == [rule]
    assert reason in found.reason


def test_a_flow_that_was_trained_counts_as_noise():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.2))

        def forward(self):
            return dist.Normal(torch.zeros(()), self.log_scale.exp())

    data, flow, energy = quartic_density().sample((500,)), Flow(), quartic_energy()
    flow.log_scale.requires_grad_(False)
    state = solve(energy, objective := FlowContrastive(flow, 2), data, 0)
    flow.log_scale.requires_grad_(True)
    found = parameter_errors(energy, data, objective, state=state, num_redraws=1)
    noise = NoiseContrastive(flow, 2)
    own = noise.make_state()
    own.load_state_dict(state.state_dict(), strict=False)
    same = parameter_errors(energy, data, noise, state=own, num_redraws=1)
    assert found.names == same.names
    assert found.status == "ok"
    torch.testing.assert_close(found.std_error, same.std_error, rtol=0.1, atol=0)


class WithConstant(Quartic):
    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return super().forward(x) + self.constant


@pytest.mark.parametrize(
    "objective",
    [
        ExactMaximumLikelihood(),
        ScoreMatching(),
        RankingNoiseContrastive(dist.Normal(torch.tensor(0.0), 1.2)),
        EnergyDiscrepancy(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_a_constant_that_log_partition_cancels_is_named(objective):
    energy = FunctionEnergy(WithConstant(), ())
    with pytest.raises(ValueError, match=r"does not change along fn\.constant, .*held"):
        parameter_errors(energy, quartic_density().sample((300,)), objective)


def test_noise_contrast_knows_a_constant_if_its_own_is_held():
    data, objective = quartic_density().sample((500,)), NoiseContrastive(wide(), 4)
    energy = FunctionEnergy(WithConstant(), ())
    loss = ObjectiveLoss(energy, objective)
    loss(data)  # c begins
    with pytest.raises(
        ValueError,
        match=r"along fn\.constant - log_partition,",
    ):
        parameter_errors(energy, data, objective, state=loss.state)
    loss.state.log_partition.requires_grad_(False).fill_(0.0)
    energy.fn.constant.data.fill_(quartic_density().log_integral)
    found = parameter_errors(energy, data, objective, state=loss.state)
    assert found.names[2] == "fn.constant"
    assert 0 < found.std_error[2] < 0.2


def test_two_parameters_that_do_one_work_are_named():
    class Twice(Quartic):
        def forward(self, x):
            return (self.theta[0] + 2 * self.theta[1]) * x + x**2 / 2

    energy = FunctionEnergy(Twice(), ())
    with pytest.raises(ValueError, match=r"along fn\.theta\[0\] -0\.5 fn\.theta\[1\]"):
        parameter_errors(energy, torch.randn(100), ScoreMatching())


def test_a_saddle_is_no_maximum():
    """Two modes whose distance is a parameter, at zero, for data that have two."""

    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.distance = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            ends = torch.stack([x - self.distance, x + self.distance], -1)
            return -(-ends.square() / 2).logsumexp(-1)

    data = torch.randn(400) + 3 * torch.tensor([-1.0, 1.0]).repeat(200)
    found = parameter_errors(FunctionEnergy(Modes(), ()), data)
    assert found.status == "unreliable"
    assert "curves upwards along fn.distance" in found.reason


def test_few_points_and_few_draws_are_said():
    data = torch.randn(20, 2)
    energy = gaussian_fitted(data)
    assert "20 points are few for 5 parameters" in parameter_errors(energy, data).reason
    data = torch.randn(3000, 2)
    found = parameter_errors(gaussian_fitted(data), data, draws=torch.randn(300, 2))
    assert "give draws, about 3,000" in found.reason
    found = parameter_errors(
        energy, data, DenoisingScoreMatching(0.01), num_redraws=math.inf
    )
    assert "drowns the data" in found.reason


def test_a_grid_that_is_too_coarse_is_warned_of():
    class Steep(Quartic):
        def forward(self, x):
            return self.theta[0].exp() * (40 * x).square() + self.theta[1] * x

    with pytest.warns(UnreliableWarning, match="log Z"):
        parameter_errors(FunctionEnergy(Steep(), ()), 9 * torch.randn(100))


def test_entries_without_effect_are_left_out():
    found = parameter_errors(QuadraticEnergy(torch.zeros(2)), torch.randn(100, 2))
    assert found.names == (
        "loc[0]", "loc[1]", "log_diagonal[0]", "log_diagonal[1]", "lower[1,0]",
    )  # fmt: skip
    sliced = SlicedScoreMatching()
    same = parameter_errors(
        QuadraticEnergy(torch.zeros(2)), torch.randn(100, 2), sliced
    )
    assert same.names == found.names


def test_parameters_that_are_held_are_taken_for_known():
    data = torch.randn(400, 1)
    energy = gaussian_fitted(data)
    energy.log_diagonal.requires_grad_(False)
    energy.lower.requires_grad_(False)
    found = parameter_errors(energy, data, ScoreMatching())
    assert found.names == ("loc[0]",)
    torch.testing.assert_close(found.std_error[0], data.std() / 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_either_precision(dtype):
    data = (quartic_density().sample((2, 150)) + 0.1).to(dtype)
    energy = quartic_energy(THETA.to(dtype))
    for objective in (ExactMaximumLikelihood(), ScoreMatching()):
        found = parameter_errors(energy, data, objective)
        assert found.std_error.dtype == torch.float64
        same = parameter_errors(quartic_energy(), data.double(), objective)
        torch.testing.assert_close(found.std_error, same.std_error, rtol=1e-3, atol=0)
        constant = FunctionEnergy(WithConstant().to(dtype), ())
        with pytest.raises(ValueError, match="does not change along fn.constant"):
            parameter_errors(constant, data, objective)


def test_after_a_fit_the_model_has_errors():
    data = quartic_density().sample((300,))
    energy_model = EnergyModel(quartic_energy(), wide())
    objective = NoiseContrastive(num_noise=8)
    optim = torch.optim.Adam(energy_model.parameters(), lr=0.03)
    result = fit(
        energy_model, data, objective, num_steps=150, optim=optim, progress_bar=False
    )
    before = copy.deepcopy(result.state.state_dict())
    found = parameter_errors(energy_model, data, objective, state=result.state)
    assert found.names[-1] == "log_partition"
    assert ((found.estimate[:2] - THETA).abs() < 4 * found.std_error[:2]).all()
    for key, value in result.state.state_dict().items():
        assert torch.equal(value, before[key])  # nothing is moved
    with pytest.raises(ValueError, match=r"frozen copy"):
        parameter_errors(result.distribution, data)


# Bad input ---------------------------------------------------------------------------


def test_too_many_parameters_are_refused():
    energy = NeuralEnergy((2,), (64, 64))
    with pytest.raises(
        ValueError, match=r"4,417 parameters, more than 1,000.*requires"
    ):
        parameter_errors(energy, torch.randn(10, 2))


def test_a_generator_has_no_equation():
    objective = AmortizedSampler(nn.Linear(2, 2), (2,))
    with pytest.raises(NotImplementedError, match=r"AmortizedSampler.*bootstrap"):
        parameter_errors(QuadraticEnergy(torch.zeros(2)), torch.randn(50, 2), objective)


def test_derivatives_that_are_not_finite_or_nil_are_refused():
    class Root(Quartic):
        def forward(self, x):
            return x**2 + (self.theta[0] - 0.3).sqrt() + self.theta[1] * x

    with pytest.raises(ValueError, match=r"must be finite at the data.*theta\[0\]"):
        parameter_errors(FunctionEnergy(Root(), ()), torch.randn(50))

    class Nothing(Quartic):
        def forward(self, x):
            return x**2 + 0 * self.theta.sum()

    with pytest.raises(
        ValueError, match=r"that its energy depends on, got \['fn.theta"
    ):
        parameter_errors(FunctionEnergy(Nothing(), ()), torch.randn(50))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"objective": 3}, TypeError, "objective must be an Objective"),
        ({"objective": NoiseContrastive(wide())}, ValueError, r"learns log Z.*state"),
        (
            {"objective": NoiseContrastive(wide()), "state": nn.Linear(1, 1)},
            TypeError,
            r"state must be the LearnedLogPartition",
        ),
        ({"covariance": "bootstrap"}, ValueError, r"'sandwich' or 'information'"),
        (
            {"objective": ScoreMatching(), "covariance": "information"},
            ValueError,
            r"says nothing of ScoreMatching",
        ),
        ({"num_redraws": 0.5}, ValueError, r"num_redraws must be at least 1, got 0.5"),
        ({"data": torch.randn(2)}, ValueError, r"more points than there are"),
        ({"data": torch.full((9,), torch.inf)}, ValueError, r"be finite, got 9 num"),
        ({"model": abs}, TypeError, r"model must be an Energy"),
    ],
)  # fmt: skip
def test_bad_input(settings, error, message):
    arguments = {"model": quartic_energy(), "data": torch.randn(50)} | settings
    with pytest.raises(error, match=message):
        parameter_errors(**arguments)
