r"""Hierarchies: scales, shrinkage and latent paths.

What is Gaussian given the scales integrates out in closed form; the scales are left to
quadrature in their logarithms, one after the other.

References:
    Rubin (1981), Journal of Educational Statistics 6, 377-401 (the eight schools).
    Carvalho, Polson & Scott (2010), Biometrika 97, 465-480 (the horseshoe).
    Neal (2003), Annals of Statistics 31, 705-767 (the funnel).
"""

__all__ = [
    "eight_schools",
    "funnel",
    "gaussian_process",
    "horseshoe",
    "laplace_means",
    "random_effects",
    "random_walk",
    "scale_of_noise",
    "student_t_means",
]

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.testing import validation_targets
from pyro_ebm.testing.grid import GridDensity, log_integral

from .base import EvidenceProblem, log_normal, noise
from .regressions import gaussian_log_evidence


def eight_schools(dtype: torch.dtype) -> EvidenceProblem:
    """The classic, non-centred: N(0, 5) on the mean, HalfCauchy(5) on the scale."""
    y = torch.tensor(validation_targets.SCHOOL_EFFECTS, dtype=dtype)
    errors = torch.tensor(validation_targets.SCHOOL_ERRORS, dtype=dtype)
    zero, five = torch.tensor(0.0, dtype=dtype), torch.tensor(5.0, dtype=dtype)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(zero, five))
        tau = pyro.sample("tau", dist.HalfCauchy(five))
        with pyro.plate("schools", 8):
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, errors), obs=y)

    truth = validation_targets.eight_schools().log_partition
    return EvidenceProblem("eight_schools_noncentered", model, None, truth)


def random_effects(
    num_groups: int, dtype: torch.dtype, *, spread: float = 1.0
) -> EvidenceProblem:
    """Centred group means of scale ``tau``, each seen once with unit noise."""
    y = (1 + spread * noise(num_groups, seed=8) + noise(num_groups, seed=9)).to(dtype)
    zero, one = torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(zero, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2 * one))
        with pyro.plate("groups", num_groups):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, one), obs=y)

    column = torch.full((num_groups, 1), 5.0, dtype=torch.float64)
    half_normal = dist.HalfNormal(torch.tensor(2.0, dtype=torch.float64))

    def log_joint(log_tau: Tensor) -> Tensor:
        data = gaussian_log_evidence(column, y, 1 + (2 * log_tau).exp())
        return data + half_normal.log_prob(log_tau.exp()) + log_tau

    truth = GridDensity(log_joint, -40.0, 5.0).log_integral
    return EvidenceProblem(f"random_effects_{num_groups}", model, None, truth)


def funnel(
    num_leaves: int, dtype: torch.dtype, *, error: float | None = None
) -> EvidenceProblem:
    """Neal's funnel as a prior, its leaves seen with an ``error`` or not at all."""
    zero = torch.tensor(0.0, dtype=dtype)
    y = noise(num_leaves, seed=10).to(dtype)

    def model() -> None:
        v = pyro.sample("v", dist.Normal(zero, 3.0))
        with pyro.plate("leaves", num_leaves):
            x = pyro.sample("x", dist.Normal(zero, (v / 2).exp()))
            if error is not None:
                pyro.sample("y", dist.Normal(x, error), obs=y)

    if error is None:
        return EvidenceProblem(f"funnel_{num_leaves}_prior", model, None, 0.0)
    variance = error**2

    def log_joint(v: Tensor) -> Tensor:
        data = log_normal(y.double(), 0.0, variance + v.exp()[:, None]).sum(-1)
        return data + log_normal(v, 0.0, 9.0)

    truth = GridDensity(log_joint, -40.0, 40.0).log_integral
    return EvidenceProblem(f"funnel_{num_leaves}", model, None, truth)


def horseshoe(num_means: int, dtype: torch.dtype) -> EvidenceProblem:
    """Non-centred means with a horseshoe prior, one large and the others near 0."""
    y = 0.5 * noise(num_means, seed=11)
    y[0] += 6.0
    y = y.to(dtype)
    zero, one = torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)

    def model() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(one))
        with pyro.plate("means", num_means):
            scale = pyro.sample("scale", dist.HalfCauchy(one))
            z = pyro.sample("z", dist.Normal(zero, one))
            pyro.sample("y", dist.Normal(tau * scale * z, one), obs=y)

    # In logarithms a half Cauchy is a hyperbolic secant, exponential on both sides.
    log_scale = torch.linspace(-45.0, 45.0, 1801, dtype=torch.float64)
    prior = _log_half_cauchy(log_scale) + math.log(90 / 1800)

    def log_joint(log_tau: Tensor) -> Tensor:
        variance = 1 + (2 * (log_tau[:, None, None] + log_scale)).exp()
        data = log_normal(y.double()[:, None], 0.0, variance)
        return (data + prior).logsumexp(-1).sum(-1) + _log_half_cauchy(log_tau)

    truth = GridDensity(log_joint, -45.0, 45.0, num_points=901).log_integral
    return EvidenceProblem(f"horseshoe_{num_means}", model, None, truth)


def _log_half_cauchy(log_scale: Tensor) -> Tensor:
    """Log density of the logarithm of a half-Cauchy number of scale 1."""
    both = torch.logaddexp(log_scale, -log_scale)
    return math.log(2 / math.pi) - both


def student_t_means(
    num_means: int, dtype: torch.dtype, *, df: float = 2.0, error: float = 0.1
) -> EvidenceProblem:
    """Heavy-tailed means seen with little error, some of them far out."""
    prior = dist.StudentT(torch.tensor(df, dtype=dtype))
    wide = dist.StudentT(torch.tensor(df, dtype=torch.float64))
    y = 3 * noise(num_means, seed=12)
    y[0] = 30.0
    name = f"student_t_means_{num_means}"
    return _independent_means(name, y, dtype, prior, wide.log_prob, error)


def laplace_means(
    num_means: int, dtype: torch.dtype, *, scale: float = 0.5, error: float = 1.0
) -> EvidenceProblem:
    """Means with a Laplace prior: a cusp of the posterior at 0."""
    b = torch.tensor(scale, dtype=dtype)
    wide = dist.Laplace(torch.tensor(0.0, dtype=torch.float64), b.double())
    y = 2 * noise(num_means, seed=13)
    name = f"laplace_means_{num_means}"
    prior = dist.Laplace(torch.zeros_like(b), b)
    return _independent_means(name, y, dtype, prior, wide.log_prob, error)


def _independent_means(
    name: str,
    y: Tensor,
    dtype: torch.dtype,
    prior: dist.TorchDistribution,
    log_prior: Callable[[Tensor], Tensor],
    error: float,
) -> EvidenceProblem:
    """Means of the same prior, each seen once; the truth one by one."""
    y = y.to(dtype)

    def model() -> None:
        with pyro.plate("means", len(y)):
            theta = pyro.sample("theta", prior)
            pyro.sample("y", dist.Normal(theta, error), obs=y)

    # The cusp of a Laplace prior, at 0, is on the grid of either half.
    truth = 0.0
    for value in y.double():
        halves = [_log_half_line(value, sign, log_prior, error) for sign in (1.0, -1.0)]
        truth += torch.tensor(halves, dtype=torch.float64).logsumexp(0).item()
    return EvidenceProblem(name, model, None, truth)


def _log_half_line(
    y: Tensor, sign: float, log_prior: Callable[[Tensor], Tensor], error: float
) -> float:
    """Log evidence of ``y`` from the means of one sign, in their logarithms."""

    def log_joint(log_size: Tensor) -> Tensor:
        theta = sign * log_size.exp()
        return log_prior(theta) + log_normal(y, theta, error**2) + log_size

    return GridDensity(log_joint, -45.0, 6.0, num_points=100_001).log_integral


def random_walk(num_steps: int, dtype: torch.dtype) -> EvidenceProblem:
    """A Gaussian random walk with known scales, seen at each step."""
    cov = torch.arange(1.0, num_steps + 1, dtype=torch.float64)
    cov = 0.25 * torch.minimum(cov, cov[:, None])
    cov = cov + torch.eye(num_steps, dtype=torch.float64)
    y = (torch.linalg.cholesky(cov) @ noise(num_steps, seed=14)).to(dtype)
    zero = torch.tensor(0.0, dtype=dtype)

    def model() -> None:
        with pyro.plate("data", num_steps):
            step = pyro.sample("step", dist.Normal(zero, 0.5))
            pyro.sample("y", dist.Normal(step.cumsum(-1), 1.0), obs=y)

    truth = dist.MultivariateNormal(torch.zeros_like(cov[0]), cov).log_prob(y.double())
    return EvidenceProblem(f"random_walk_{num_steps}", model, None, truth.item())


def scale_of_noise(dtype: torch.dtype, *, size: float) -> EvidenceProblem:
    """One scale with a half-Cauchy prior of scale 1, and data of scale ``size``."""
    y = (size * noise(30, seed=15)).to(dtype)
    one, zero = torch.tensor(1.0, dtype=dtype), torch.tensor(0.0, dtype=dtype)

    def model() -> None:
        sigma = pyro.sample("sigma", dist.HalfCauchy(one))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(zero, sigma), obs=y)

    def log_joint(log_sigma: Tensor) -> Tensor:
        variance = (2 * log_sigma).exp()[:, None]
        data = log_normal(y.double(), 0.0, variance).sum(-1)
        return data + _log_half_cauchy(log_sigma)

    truth = GridDensity(log_joint, -20.0, 20.0).log_integral
    return EvidenceProblem(f"scale_of_noise_{size:g}", model, None, truth)


def gaussian_process(dtype: torch.dtype, *, error: float = 0.003) -> EvidenceProblem:
    """Scale and length of a smooth process, its covariance nearly singular far out."""
    # Squares of halves are exact in single precision; else rounding would decide what
    # the smallest eigenvalues are.
    x = torch.arange(-5, 6, dtype=torch.float64) / 2
    y = (x.sin() + error * noise(11, seed=16)).to(dtype)
    square, one = ((x[:, None] - x) ** 2).to(dtype), torch.tensor(1.0, dtype=dtype)
    jitter = error**2 * torch.eye(11, dtype=dtype)
    zero = torch.zeros(11, dtype=dtype)

    def model() -> None:
        length = pyro.sample("length", dist.LogNormal(0 * one, one))
        scale = pyro.sample("scale", dist.LogNormal(0 * one, one))
        cov = scale**2 * (-square / (2 * length**2)).exp() + jitter
        factor = torch.linalg.cholesky(cov)
        pyro.sample("y", dist.MultivariateNormal(zero, scale_tril=factor), obs=y)

    def log_joint(log_length: Tensor, log_scale: Tensor) -> Tensor:
        length, scale = (t.exp()[:, None, None] for t in (log_length, log_scale))
        cov = scale**2 * (-square.double() / (2 * length**2)).exp() + jitter.double()
        factor = torch.linalg.cholesky(cov)
        normal = dist.MultivariateNormal(zero.double(), scale_tril=factor)
        prior = log_normal(log_length, 0.0, 1.0) + log_normal(log_scale, 0.0, 1.0)
        return normal.log_prob(y.double()) + prior

    # Beyond these ends the prior alone is below e^-32, and the data make it less.
    truth = log_integral(log_joint, (-4.0, 4.0, 401), (-5.0, 8.0, 261))
    return EvidenceProblem("gaussian_process", model, None, truth)
