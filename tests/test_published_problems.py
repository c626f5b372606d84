"""The evidence problems on published data: the truth again, from the models."""

import math

import pyro.distributions as dist
import pytest
import torch

from benchmarks.evidence_problems import published
from benchmarks.evidence_problems.published import DATA_PROBLEMS, load, with_intercept
from pyro_ebm.energies import PyroModelEnergy

DOUBLE = torch.float64
REGRESSIONS = set(DATA_PROBLEMS) - {"brownian", "seeds"}


@pytest.mark.parametrize("name", DATA_PROBLEMS)
def test_fields(name):
    problem = DATA_PROBLEMS[name](torch.float32)
    assert problem.name == name
    assert problem.truth == pytest.approx(DATA_PROBLEMS[name](DOUBLE).truth, abs=1e-3)
    energy = PyroModelEnergy(problem.target)
    x = torch.zeros(2, *energy.event_shape, dtype=torch.float32)
    assert energy(x).dtype == torch.float32
    assert energy(x).isfinite().all()


def test_written_truth():
    """Values that others found."""
    for name, expected in {
        "ark": 58.5876,
        "sblrc": -194.9676,
        "brownian": 1.18774910,
        "seeds": -73.407,
    }.items():
        truth = DATA_PROBLEMS[name](DOUBLE).truth
        assert truth == pytest.approx(expected, abs=5e-5), name


def assert_mean_weight(log_weights, truth, largest_error=0.03):
    """The mean of the weights is ``exp(truth)`` to within four standard errors."""
    weights = (log_weights - truth).exp()
    error = weights.std().item() / math.sqrt(len(weights))
    assert error < largest_error
    assert abs(weights.mean().item() - 1) < 4 * error


@pytest.mark.parametrize("name", sorted(REGRESSIONS))
def test_regression_by_conditional_draws(name, monkeypatch):
    """The noise from around its mode, the coefficients exactly given the noise."""
    seen = {}
    monkeypatch.setattr(
        published, "linear", lambda x, y, *_, **__: seen.update(x=x, y=y)
    )
    DATA_PROBLEMS[name](DOUBLE)
    monkeypatch.undo()
    problem, x, y = DATA_PROBLEMS[name](DOUBLE), seen["x"], seen["y"]
    energy = PyroModelEnergy(problem.target)

    def conditional(log_sigma):
        noise = (-2 * log_sigma).exp()[..., None, None]
        precision = noise * (x.mT @ x) + 0.01 * torch.eye(x.shape[1])
        loc = torch.linalg.solve(precision, noise[..., 0] * (x.mT @ y))
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def log_marginal(log_sigma):
        beta = conditional(log_sigma).loc
        points = torch.cat([beta, log_sigma[..., None]], -1)
        return -energy(points) - conditional(log_sigma).log_prob(beta)

    grid = torch.linspace(-2, 10, 2001)
    mass = log_marginal(grid).softmax(0)
    center = mass @ grid
    spread = (mass @ (grid - center) ** 2).sqrt()
    noise = dist.StudentT(5.0, center, spread)
    log_sigma = noise.sample((5_000,))
    beta = conditional(log_sigma).sample()
    points = torch.cat([beta, log_sigma[..., None]], -1)
    drawn = noise.log_prob(log_sigma) + conditional(log_sigma).log_prob(beta)
    assert_mean_weight(-energy(points) - drawn, problem.truth)


def test_seeds_by_conditional_draws():
    """Each random effect from the normal at its mode, given all the others."""
    r, n, x1, x2 = (load("seeds")[key] for key in ("r", "n", "x1", "x2"))
    x, num = with_intercept(x1, x2, x1 * x2), 100_000
    p = torch.tensor([-0.55, 0.1, 1.35, -0.82])
    cov = torch.linalg.inv(x.mT @ (x * (n / 4)[:, None])) * 2
    shift = dist.MultivariateStudentT(5.0, p, torch.linalg.cholesky(cov))
    # Few distant effects, or none: the prior of the precision has a long upper end.
    width = dist.Laplace(2.5, 1.2)
    a, log_tau = shift.sample((num,)), width.sample((num,))
    tau, mean = log_tau.exp()[:, None], a @ x.mT
    b = torch.zeros(num, len(n))
    for _ in range(8):  # Newton
        chance = (mean + b).sigmoid()
        slope = n * chance * (1 - chance) + tau
        b = b - (n * chance - r + tau * b) / slope
    chance = (mean + b).sigmoid()
    scale = (n * chance * (1 - chance) + tau).rsqrt()
    effect = dist.StudentT(20.0, b, scale).to_event(1)
    b = effect.sample()
    points = torch.cat([a, log_tau[:, None], b], -1)
    drawn = shift.log_prob(a) + width.log_prob(log_tau) + effect.log_prob(b)
    problem = DATA_PROBLEMS["seeds"](DOUBLE)
    energy = PyroModelEnergy(problem.target)
    weights = torch.cat([-energy(part) for part in points.split(20_000)]) - drawn
    assert_mean_weight(weights, problem.truth)


def test_brownian_by_conditional_draws():
    """The path exactly, given the scales and the data."""
    problem = DATA_PROBLEMS["brownian"](DOUBLE)
    energy = PyroModelEnergy(problem.target)
    y, num = load("brownian")["y"], 5_000
    seen, times = y.isfinite(), 1.0 + torch.arange(len(y))
    scales = dist.StudentT(5.0, torch.tensor([-2.2, -2.0]), 0.4).to_event(1)
    log_scales = scales.sample((num,))
    innovation, observation = (2 * log_scales).exp()[..., None, None].unbind(1)
    prior = innovation * torch.minimum(times, times[:, None])
    between = prior[:, :, seen]
    cov = between[:, seen] + observation * torch.eye(int(seen.sum()))
    gain = torch.linalg.solve(cov, between, left=False)
    posterior = dist.MultivariateNormal(
        gain @ y[seen], prior - gain @ between.mT + 1e-12 * torch.eye(len(y))
    )
    path = posterior.sample()
    points = torch.cat([log_scales, path], -1)
    drawn = scales.log_prob(log_scales) + posterior.log_prob(path)
    assert_mean_weight(-energy(points) - drawn, problem.truth, 0.05)
