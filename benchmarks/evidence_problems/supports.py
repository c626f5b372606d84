r"""Supports and shapes that a transform to real space does not do justice to.

Circles, correlation matrices, rings and ridges, hard edges, numbers that are masked.
"""

__all__ = [
    "correlated_gaussian",
    "label_switching",
    "lkj",
    "missing_data",
    "outliers",
    "ring",
    "scales_and_correlation",
    "square_root",
    "truncated_normal",
    "upper_end",
    "von_mises",
]

import math
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import i0e, log_ndtr

from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.testing.grid import GridDensity, log_integral

from .base import EvidenceProblem, log_normal, noise
from .regressions import gaussian_log_evidence


def correlated_gaussian(
    dim: int, dtype: torch.dtype, *, correlation: float
) -> EvidenceProblem:
    """An unnormalised Gaussian with all correlations equal, from N(0, 2^2 I)."""
    eye = torch.eye(dim, dtype=torch.float64)
    cov = correlation + (1 - correlation) * eye
    precision = torch.linalg.inv(cov).to(dtype)

    def energy(x: Tensor) -> Tensor:
        return ((x @ precision) * x).sum(-1) / 2

    truth = dim * math.log(2 * math.pi) - torch.logdet(precision.double()).item()
    return EvidenceProblem(
        f"correlated_gaussian_{dim}d",
        FunctionEnergy(energy, (dim,)),
        dist.Normal(torch.zeros(dim, dtype=dtype), 2.0).to_event(1),
        truth / 2,
    )


def truncated_normal(dtype: torch.dtype) -> EvidenceProblem:
    """Data above 0 only, truncated by hand with ``log1p(-cdf)``."""
    y = (1 + noise(60, seed=17)).to(dtype)
    y = y[y > 0]
    zero = torch.tensor(0.0, dtype=dtype)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(zero, 10.0))
        normal = dist.Normal(mu, 1.0)
        log_above = torch.log1p(-normal.cdf(zero))
        with pyro.plate("data", len(y)):
            pyro.factor("y", normal.log_prob(y) - log_above)

    def log_joint(mu: Tensor) -> Tensor:
        data = log_normal(y.double(), mu[:, None], 1.0) - log_ndtr(mu)[:, None]
        return data.sum(-1) + log_normal(mu, 0.0, 100.0)

    truth = GridDensity(log_joint, -60.0, 60.0).log_integral
    return EvidenceProblem("truncated_normal", model, None, truth)


def von_mises(
    num_angles: int, dtype: torch.dtype, *, prior: float = 1.0, seen: float = 3.0
) -> EvidenceProblem:
    r"""Angles around pi, each seen once with an error on the circle.

    The evidence of one is :math:`I_0(r) / (2 \pi I_0(a) I_0(b))`, with ``r`` the length
    of the sum of the two mean directions times their concentrations ``a`` and ``b``.
    """
    zero, one = torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    y = (math.pi - 0.05 + noise(num_angles, seed=18) / 2).to(dtype)
    y = torch.remainder(y + math.pi, 2 * math.pi) - math.pi

    def model() -> None:
        with pyro.plate("angles", num_angles):
            angle = pyro.sample("angle", dist.VonMises(zero, prior * one))
            pyro.sample("y", dist.VonMises(angle, seen * one), obs=y)

    def log_bessel(x: Tensor) -> Tensor:
        return i0e(x).log() + x

    data, a, b = y.double(), *torch.tensor([prior, seen], dtype=torch.float64)
    length = (a**2 + b**2 + 2 * a * b * data.cos()).sqrt()
    terms = log_bessel(length) - log_bessel(a) - log_bessel(b) - math.log(2 * math.pi)
    return EvidenceProblem(f"von_mises_{num_angles}", model, None, terms.sum().item())


def lkj(dim: int, dtype: torch.dtype, *, concentration: float = 2.0) -> EvidenceProblem:
    """A prior over correlation matrices alone: the evidence is 1."""
    eta = torch.tensor(concentration, dtype=dtype)

    def model() -> None:
        pyro.sample("factor", dist.LKJCholesky(dim, eta))

    return EvidenceProblem(f"lkj_{dim}", model, None, 0.0)


def scales_and_correlation(dtype: torch.dtype) -> EvidenceProblem:
    """Two scales of 5 and their correlation, from 80 pairs; three numbers."""
    y = (5 * noise(80, 2, seed=19)).to(dtype)
    one, zero = torch.tensor(1.0, dtype=dtype), torch.zeros(2, dtype=dtype)

    def model() -> None:
        rate = (0.2 * one).expand(2)
        scale = pyro.sample("scale", dist.Exponential(rate).to_event(1))
        factor = pyro.sample("factor", dist.LKJCholesky(2, 2 * one))
        tril = scale[:, None] * factor
        with pyro.plate("data", 80):
            pyro.sample("y", dist.MultivariateNormal(zero, scale_tril=tril), obs=y)

    first, cross, _, second = (y.double().mT @ y.double()).flatten()
    rate = (0.2 * one).double()

    def log_joint(a: Tensor, b: Tensor, z: Tensor) -> Tensor:  # logarithms, artanh
        rho, log_open = z.tanh(), -2 * torch.cosh(z).log()  # log(1 - rho^2)
        squares = first * (-2 * a).exp() + second * (-2 * b).exp()
        squares = (squares - 2 * rho * cross * (-a - b).exp()) * (-log_open).exp()
        data = -80 * (a + b + log_open / 2 + math.log(2 * math.pi)) - squares / 2
        prior = 2 * rate.log() - rate * (a.exp() + b.exp()) + a + b
        # LKJ(2) of a pair: 3/4 (1 - rho^2), and the same again for d rho / d z.
        return data + prior + math.log(0.75) + 2 * log_open

    sides = (0.8, 2.6, 91)
    truth = log_integral(log_joint, sides, sides, (-1.2, 1.2, 91))
    return EvidenceProblem("scales_and_correlation", model, None, truth)


def ring(
    dim: int, dtype: torch.dtype, *, radius: float = 2.0, width: float = 0.05
) -> EvidenceProblem:
    """A sphere within a N(0, 3^2 I) prior, known by its radius alone."""
    zero = torch.zeros(dim, dtype=dtype)

    def model() -> None:
        x = pyro.sample("x", dist.Normal(zero, 3.0).to_event(1))
        distance = torch.linalg.vector_norm(x, dim=-1) - radius
        pyro.factor("likelihood", -((distance / width) ** 2) / 2)

    def log_radial(r: Tensor) -> Tensor:
        return (dim - 1) * r.log() - r**2 / 18 - ((r - radius) / width) ** 2 / 2

    log_sphere = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    truth = log_sphere + GridDensity(log_radial, 0.0, radius + 2).log_integral
    truth -= dim / 2 * math.log(18 * math.pi)
    return EvidenceProblem(f"ring_{dim}d", model, None, truth)


def square_root(
    num_pairs: int, dtype: torch.dtype, *, error: float = 0.1
) -> EvidenceProblem:
    """Two bent ridges a pair: ``a**2 + b`` is 4, seen with an error."""
    zero = torch.tensor(0.0, dtype=dtype)
    four = torch.full((num_pairs,), 4.0, dtype=dtype)

    def model() -> None:
        with pyro.plate("pairs", num_pairs):
            a = pyro.sample("a", dist.Normal(zero, 3.0))
            b = pyro.sample("b", dist.Normal(zero, 3.0))
            pyro.sample("y", dist.Normal(a**2 + b, error), obs=four)

    def log_joint(a: Tensor) -> Tensor:
        return log_normal(a, 0.0, 9.0) + log_normal(a**2, 4.0, 9 + error**2)

    truth = num_pairs * GridDensity(log_joint, -12.0, 12.0).log_integral
    return EvidenceProblem(f"square_root_{num_pairs}", model, None, truth)


def label_switching(num_groups: int, dtype: torch.dtype) -> EvidenceProblem:
    """Means of a mixture of equal parts: as many modes as they have orders."""
    centers = 4 * torch.arange(num_groups, dtype=torch.float64) - 4
    y = (centers.repeat(10) + noise(10 * num_groups, seed=20)).to(dtype)
    zero, even = torch.zeros(num_groups, dtype=dtype), math.log(num_groups)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(zero, 5.0).to_event(1))
        with pyro.plate("data", len(y)):
            parts = dist.Normal(mean, 1.0).log_prob(y[:, None])
            pyro.factor("y", parts.logsumexp(-1) - even)

    def log_joint(*means: Tensor) -> Tensor:
        data = torch.stack([log_normal(y.double(), m[..., None], 1.0) for m in means])
        prior = sum(log_normal(m, 0.0, 25.0) for m in means)
        return (data.logsumexp(0) - even).sum(-1) + prior

    axes = [(-12.0, 12.0, 97)] * num_groups
    truth = log_integral(log_joint, *axes)
    return EvidenceProblem(f"label_switching_{num_groups}", model, None, truth)


def outliers(num_means: int, dtype: torch.dtype) -> EvidenceProblem:
    """Two modes for each mean: Cauchy errors, and two values that disagree."""
    zero, one = torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    y = torch.tensor([[-6.0], [7.0]], dtype=dtype).expand(2, num_means)

    def model() -> None:
        with pyro.plate("means", num_means):
            mu = pyro.sample("mu", dist.Normal(zero, 5.0))
            with pyro.plate("twice", 2):
                pyro.sample("y", dist.Cauchy(mu, one), obs=y)

    def log_joint(mu: Tensor) -> Tensor:
        data = -sum((1 + (v - mu) ** 2).log() + math.log(math.pi) for v in (-6.0, 7.0))
        return data + log_normal(mu, 0.0, 25.0)

    truth = num_means * GridDensity(log_joint, -60.0, 60.0).log_integral
    return EvidenceProblem(f"outliers_{num_means}", model, None, truth)


def upper_end(dtype: torch.dtype, *, num_data: int = 50) -> EvidenceProblem:
    """The upper end of uniform data: zero likelihood below the largest of them."""
    largest = torch.tensor(7.0, dtype=dtype)
    rate = torch.tensor(0.1, dtype=dtype)

    def model() -> None:
        end = pyro.sample("end", dist.Exponential(rate))
        seen = -num_data * end.log()
        pyro.factor("y", torch.where(end < largest, seen.new_tensor(-math.inf), seen))

    def log_joint(log_excess: Tensor) -> Tensor:
        end = 7 + log_excess.exp()
        prior = rate.double().log() - rate.double() * end
        return prior - num_data * end.log() + log_excess

    truth = GridDensity(log_joint, -40.0, 8.0).log_integral
    return EvidenceProblem("upper_end", model, None, truth)


def missing_data(dtype: torch.dtype, *, num_data: int = 20) -> EvidenceProblem:
    """A mean and 20 data of which a third are masked out by ``obs_mask``."""
    y = (2 + noise(num_data, seed=21)).to(dtype)
    mask = cast("torch.BoolTensor", torch.arange(num_data) % 3 > 0)
    zero = torch.tensor(0.0, dtype=dtype)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(zero, 10.0))
        with pyro.plate("data", num_data):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=mask)

    seen, one = y.double()[mask], torch.ones((), dtype=torch.float64)
    column = torch.full((len(seen), 1), 10.0, dtype=torch.float64)
    truth = gaussian_log_evidence(column, seen, one).item()
    return EvidenceProblem("missing_data", model, None, truth)
