"""The truth of the evidence problems, by other means than those they are built with.

Most by brute force: many draws of the prior, and the likelihood that the Pyro model
itself gives them. Where the prior is too wide for that, by draws of a better proposal,
on a grid, or by another formula.
"""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from scipy import special

from benchmarks.evidence_problems import (
    boxes,
    counts,
    hierarchies,
    problems,
    regressions,
    supports,
    variants,
)
from pyro_ebm.energies import Energy, PyroModelEnergy

BUILDERS = {**problems(), **variants()}
DOUBLE = torch.float64


def test_there_are_enough_variants():
    assert len(variants()) >= 25
    assert len(BUILDERS) == len(problems()) + len(variants())


@pytest.mark.parametrize("name", BUILDERS)
def test_fields(name):
    """In single precision, whatever the default: what is drawn and observed has it."""
    problem = BUILDERS[name](torch.float32)
    assert problem.name == name
    assert math.isfinite(problem.truth)
    assert 0 <= problem.truth_error < 0.01
    if isinstance(problem.target, Energy):
        x = problem.base.sample((7,))
        assert x.dtype == problem.target(x).dtype == torch.float32
        assert problem.base.event_shape == problem.target.event_shape
        return
    assert problem.base is None
    trace = poutine.trace(problem.target).get_trace()
    for node in trace.nodes.values():
        if node["type"] == "sample" and torch.is_floating_point(node["value"]):
            assert node["value"].dtype == torch.float32, node["name"]


def run(model, num_draws, values=None):
    """Log densities of latent and of seen sites, each of shape ``(num_draws,)``."""
    if values is not None:
        model = poutine.condition(model, values)
    with pyro.plate("draws", num_draws, dim=-3):
        trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    latent, seen = torch.zeros(num_draws), torch.zeros(num_draws)
    for node in trace.nodes.values():
        if node["type"] == "sample" and not site_is_subsample(node):
            given = node["is_observed"] and node["name"] not in (values or {})
            part = seen if given else latent
            part += node["log_prob"].reshape(num_draws, -1).sum(-1)
    return latent, seen


def assert_mean_weight(log_weights, truth, largest_error=0.05):
    """The mean of the weights is ``exp(truth)`` to within four standard errors."""
    weights = (log_weights - truth).exp()
    error = weights.std().item() / math.sqrt(len(weights))
    assert error < largest_error
    assert abs(weights.mean().item() - 1) < 4 * error + 1e-9


@pytest.mark.parametrize(
    "build",
    [
        partial(boxes.gaussian_shells, 2),
        partial(boxes.gaussian_shells, 3),
        partial(
            boxes.gaussian_modes,
            2,
            name="modes",
            weights=(0.3, 0.9),
            locs=(-3.0, 8.0),
            scales=(0.5, 1.5),
        ),
        partial(boxes.log_gamma, 2),
        partial(boxes.corner, 1, rate=10.0),
        partial(boxes.corner, 3, rate=3.0),
        partial(boxes.ball, 2),
        partial(boxes.ball, 5, radius=2.0),
        partial(boxes.torus, width=0.3),
        partial(boxes.rosenbrock, 2),
        partial(supports.ring, 2),
        partial(supports.ring, 3, width=0.3),
        partial(supports.square_root, 1),
        partial(supports.outliers, 2),
        partial(supports.label_switching, 2),
        partial(supports.von_mises, 2),
        partial(supports.upper_end, num_data=3),
        counts.coin,
        partial(counts.binomial_rates, [2.0, 0.0], 10.0, name="few"),
        partial(counts.dirichlet_multinomial, [3, 1, 0], name="few"),
        partial(counts.poisson_rates, [4.0, 0.0], name="few", prior=(2.0, 0.5)),
        partial(counts.exponential_rate, 1.0, num_data=5),
        partial(counts.change_point, num_steps=6),
        partial(hierarchies.random_effects, 3),
        partial(hierarchies.funnel, 2, error=1.0),
        partial(hierarchies.funnel, 3),
        partial(hierarchies.horseshoe, 2),
        partial(hierarchies.student_t_means, 2, df=1.0, error=6.0),
        partial(hierarchies.laplace_means, 3),
        partial(hierarchies.random_walk, 3),
        partial(hierarchies.scale_of_noise, size=1.0),
    ],
    ids=lambda build: build(DOUBLE).name,
)
def test_truth_by_draws_of_the_prior(build):
    problem = build(DOUBLE)
    _, seen = run(problem.target, 100_000)
    assert_mean_weight(seen, problem.truth)


def test_log_gamma_of_six_dimensions():
    """By draws around one of its four modes, all of which weigh the same."""
    problem = boxes.log_gamma(6, DOUBLE)
    proposal = dist.StudentT(5.0, 9.7, 1.4 * torch.ones(6)).to_event(1)
    x = proposal.sample((100_000, 1, 1))
    latent, seen = run(problem.target, len(x), {"x": x.clamp(-29, 29)})
    log_weights = latent + seen - proposal.log_prob(x).flatten()
    is_of_mode = (x[..., :2] > 0).all(-1).flatten()
    log_weights = log_weights.where(is_of_mode, -math.inf)
    assert_mean_weight(log_weights, problem.truth - math.log(4))


def test_truncated_normal():
    """By draws around the mode: far below it, the model's own number is not finite."""
    problem = supports.truncated_normal(DOUBLE)
    proposal = dist.StudentT(5.0, 1.0, 0.3)
    mu = proposal.sample((100_000, 1, 1))
    latent, seen = run(problem.target, len(mu), {"mu": mu})
    log_weights = latent + seen - proposal.log_prob(mu).flatten()
    assert_mean_weight(log_weights, problem.truth)


def test_eggbox_of_two_dimensions():
    """The rule of midpoints is exact: all derivatives vanish at the edges."""
    problem = boxes.eggbox(2, DOUBLE)
    axis = 10 * math.pi * (torch.arange(1000) + 0.5) / 1000
    x = torch.cartesian_prod(axis, axis)
    _, seen = run(problem.target, len(x), {"x": x[:, None, None]})
    found = seen.logsumexp(0) - math.log(len(x))
    assert found.item() == pytest.approx(problem.truth, abs=1e-6)


def test_rosenbrock_of_two_dimensions():
    """The second coordinate is normal given the first, and cut off at 5."""
    x = np.linspace(-5, 5, 20_001)
    normal = special.ndtr([(edge - x**2) * math.sqrt(200) for edge in (-5, 5)])
    inner = math.sqrt(math.pi / 100) * (normal[1] - normal[0])
    found = np.trapezoid(np.exp(-((1 - x) ** 2)) * inner, x) / 100
    truth = boxes.rosenbrock(2, DOUBLE).truth
    assert math.log(found) == pytest.approx(truth, abs=1e-6)


def test_eggbox_of_three_dimensions():
    """Its mean over half periods, as in two dimensions."""
    angle = (np.arange(300) + 0.5) * np.pi / 300
    pairs = np.cos(angle)[:, None] * np.cos(angle)
    mean = np.mean([np.exp((2 + c * pairs) ** 5).mean() for c in np.cos(angle)])
    assert math.log(mean) == pytest.approx(boxes.eggbox(3, DOUBLE).truth, abs=1e-6)


def test_written_truth():
    """Values that were published or found by others."""
    for name, expected in {
        "eight_schools_noncentered": -31.31134735,
        "gaussian_shells_5d": -5.6736,
        "gaussian_shells_10d": -14.5905,
        "eggbox_2d": 235.8559,
        "two_modes_10d": -29.9573,
        "two_modes_6d": -17.7921,
        "rosenbrock_10d": -43.1084,
        "log_gamma_10d": -40.9434,
        "rare_events": -27.631,
        "dirichlet_edge": -18.937,
        "no_events": -13.8155,
        "coin": -0.6931,
        "ball_3d": -3.9429,
        "lkj_5": 0.0,
    }.items():
        assert BUILDERS[name](DOUBLE).truth == pytest.approx(expected, abs=5e-4), name


def weights_from(proposal, problem, num_draws):
    """Log weights of draws of a proposal over the model's unconstrained space."""
    x = proposal.sample((num_draws,))
    return -PyroModelEnergy(problem.target)(x) - proposal.log_prob(x)


@pytest.mark.parametrize(
    ("problem", "scale"),
    [
        (regressions.logistic(2, DOUBLE), 5.0),
        (regressions.logistic(2, DOUBLE, is_separable=True), 5.0),
        (regressions.logistic(3, DOUBLE), 5.0),
        (regressions.spike_and_slab(2, DOUBLE), 3.0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_truth_by_draws_of_a_normal(problem, scale):
    dim = PyroModelEnergy(problem.target).event_shape.numel()
    proposal = dist.Normal(torch.zeros(dim), scale).to_event(1)
    assert_mean_weight(weights_from(proposal, problem, 200_000), problem.truth)


@pytest.mark.parametrize(("is_known", "scale"), [(True, 1.0), (False, 5.0)])
def test_regression_by_a_covariance_of_the_data(is_known, scale):
    problem = regressions.near_collinear(
        3, DOUBLE, name="x", distance=0.01, scale=scale, is_noise_known=is_known
    )
    # What the model is given, found again from its mean at three unit vectors.
    rows = torch.eye(3)
    sites = {"beta": rows, "sigma": torch.ones(())}
    traces = [
        poutine.trace(
            poutine.condition(problem.target, {**sites, "beta": row})
        ).get_trace()
        for row in rows
    ]
    x = torch.stack([trace.nodes["y"]["fn"].loc for trace in traces], 1)
    y = traces[0].nodes["y"]["value"]
    cov = 100 * x @ x.mT

    def log_evidence(variance):
        full = cov + variance * torch.eye(len(y))
        return dist.MultivariateNormal(torch.zeros(len(y)), full).log_prob(y)

    if is_known:
        found = log_evidence(1.0).item()
    else:  # Simpson's rule in sigma itself
        sigma = torch.linspace(0.2, 8.2, 4001)
        values = torch.stack([log_evidence(s**2) for s in sigma])
        values = values + dist.HalfNormal(10.0).log_prob(sigma)
        simpson = torch.tensor([1.0, *[4.0, 2.0] * 1999, 4.0, 1.0]) * 0.002 / 3
        found = (values + simpson.log()).logsumexp(0).item()
    assert found == pytest.approx(problem.truth, abs=1e-5)


def test_straight_line():
    problem = regressions.straight_line(DOUBLE)
    zero, one = torch.zeros(()), torch.ones(())
    means = [
        poutine.trace(poutine.condition(problem.target, {"a": a, "b": b}))
        .get_trace()
        .nodes["y"]
        for a, b in [(one, zero), (zero, one)]
    ]
    x, y = torch.stack([node["fn"].loc for node in means], 1), means[0]["value"]
    normal = dist.MultivariateNormal(torch.zeros(50), torch.eye(50) + 100 * x @ x.mT)
    assert normal.log_prob(y).item() == pytest.approx(problem.truth, abs=1e-6)


def test_missing_data_one_after_the_other():
    problem = supports.missing_data(DOUBLE)
    trace = poutine.trace(problem.target).get_trace()
    node = trace.nodes["y_observed"]
    total, mean, variance = 0.0, 0.0, 100.0
    for value in node["value"][node["mask"]].tolist():
        total -= (value - mean) ** 2 / (2 * (variance + 1))
        total -= math.log(2 * math.pi * (variance + 1)) / 2
        gain = variance / (variance + 1)
        mean, variance = mean + gain * (value - mean), variance * (1 - gain)
    assert total == pytest.approx(problem.truth, abs=1e-9)


def test_upper_end_by_an_exponential_integral():
    truth = math.log(0.1) - 49 * math.log(7) + math.log(special.expn(50, 0.7))
    assert supports.upper_end(DOUBLE).truth == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize(
    ("problem", "ends", "abs_error"),
    [
        (supports.lkj(3, DOUBLE), [(-9, 9)] * 3, 1e-3),
        (supports.scales_and_correlation(DOUBLE), None, 1e-5),
        (supports.correlated_gaussian(2, DOUBLE, correlation=0.6), [(-9, 9)] * 2, 1e-8),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_truth_on_an_unconstrained_grid(problem, ends, abs_error):
    energy = problem.target
    if not isinstance(energy, Energy):
        energy = PyroModelEnergy(energy)
    # Two scales in logarithms, near log 5, and an unbounded correlation.
    ends = ends or [(0.8, 2.6), (0.8, 2.6), (-1.5, 1.5)]
    axes = [torch.linspace(*pair, 41) for pair in ends]
    x = torch.cartesian_prod(*axes)
    total = torch.logsumexp(-torch.cat([energy(part) for part in x.split(100_000)]), 0)
    steps = sum(math.log((high - low) / 40) for low, high in ends)
    assert total.item() + steps == pytest.approx(problem.truth, abs=abs_error)


def test_gaussian_process_in_natural_coordinates():
    """Solving with the covariance, and Gauss-Legendre nodes in length and scale."""
    problem = hierarchies.gaussian_process(DOUBLE)
    y = poutine.trace(problem.target).get_trace().nodes["y"]["value"].numpy()
    x = np.arange(-5, 6) / 2
    nodes, weights = np.polynomial.legendre.leggauss(100)
    total = 0.0
    for length, width in zip(4 + 3.6 * nodes, 3.6 * weights, strict=True):
        kernel = np.exp(-((x[:, None] - x) ** 2) / (2 * length**2))
        # In the logarithm of the scale, whose posterior is skewed.
        for log_scale, part in zip(1 + 4 * nodes, 4 * weights, strict=True):
            cov = np.exp(2 * log_scale) * kernel + 9e-6 * np.eye(11)
            data = -(
                y @ np.linalg.solve(cov, y) + np.linalg.slogdet(2 * np.pi * cov)[1]
            )
            prior = np.exp(-(np.log(length) ** 2 + log_scale**2) / 2) / (2 * np.pi)
            total += width * part * prior / length * np.exp(data / 2)
    assert math.log(total) == pytest.approx(problem.truth, abs=1e-4)


def test_binomial_hierarchy_by_conditional_draws():
    """Hyperparameters from their prior, and the rates given them and the data."""
    problem = counts.binomial_hierarchy(DOUBLE)
    node = poutine.trace(problem.target).get_trace().nodes["k"]
    n, k = node["fn"].total_count, node["value"]
    mean = dist.Beta(1.0, 1.0).sample((100_000, 1, 1))
    size = dist.LogNormal(2.0, 1.0).sample((100_000, 1, 1))
    posterior = dist.Beta(mean * size + k, (1 - mean) * size + n - k)
    p = posterior.sample().clamp(1e-300, 1 - 1e-16)
    latent, seen = run(problem.target, 100_000, {"mean": mean, "size": size, "p": p})
    drawn = dist.Beta(1.0, 1.0).log_prob(mean) + dist.LogNormal(2.0, 1.0).log_prob(size)
    drawn = drawn + posterior.log_prob(p).sum(-1, keepdim=True)
    assert_mean_weight(latent + seen - drawn.flatten(), problem.truth)
