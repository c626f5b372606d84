r"""Likelihoods over a uniform box, most of them from the literature on nested sampling.

.. math::
    x \sim \mathrm{Uniform}(a, b)^d, \qquad
    \log Z = \log \int e^{\ell(x)}\,dx - d \log (b - a)                      \tag{1}

References:
    Feroz, Hobson & Bridges (2009), MNRAS 398, 1601-1614 (eggbox, Gaussian shells).
    Beaujean & Caldwell (2013), arXiv 1304.7808 (LogGamma).
"""

__all__ = [
    "ball",
    "corner",
    "eggbox",
    "gaussian_modes",
    "gaussian_shells",
    "log_gamma",
    "rosenbrock",
    "torus",
]

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.testing.grid import GridDensity

from .base import EvidenceProblem


def _on_box(
    name: str,
    log_likelihood: Callable[[Tensor], Tensor],
    ends: tuple[float, float],
    dim: int,
    dtype: torch.dtype,
    log_integral: float,
) -> EvidenceProblem:
    """The problem (1), given the logarithm of the integral over the box."""
    low, high = torch.tensor(ends, dtype=dtype)

    def model() -> None:
        x = pyro.sample("x", dist.Uniform(low, high).expand([dim]).to_event(1))
        pyro.factor("likelihood", log_likelihood(x))

    truth = log_integral - dim * (high.double() - low.double()).log().item()  # (1)
    return EvidenceProblem(name, model, None, truth)


def gaussian_shells(
    dim: int, dtype: torch.dtype, *, radius: float = 2.0, width: float = 0.1
) -> EvidenceProblem:
    """Two spherical shells in (-6, 6)^d, their centres 3.5 to each side of 0."""
    center = torch.zeros(dim, dtype=dtype)
    center[0] = 3.5
    log_norm = math.log(width) + math.log(2 * math.pi) / 2

    def log_shell(x: Tensor) -> Tensor:
        distance = torch.linalg.vector_norm(x, dim=-1) - radius
        return -((distance / width) ** 2) / 2 - log_norm

    log_integral = math.log(2) + _log_shell_volume(dim, radius, width) - log_norm
    return _on_box(
        f"gaussian_shells_{dim}d",
        lambda x: torch.logaddexp(log_shell(x - center), log_shell(x + center)),
        (-6.0, 6.0),
        dim,
        dtype,
        log_integral,
    )


def _log_shell_volume(dim: int, radius: float, width: float) -> float:
    """Log integral of ``exp(-(|x| - radius)^2 / (2 width^2))`` over all of space."""
    radial = GridDensity(
        lambda r: (dim - 1) * r.log() - ((r - radius) / width) ** 2 / 2,
        0.0,
        radius + 12 * width,
    )
    log_sphere = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    return log_sphere + radial.log_integral


def torus(
    dtype: torch.dtype, *, ring: float = 3.0, tube: float = 1.0, width: float = 0.05
) -> EvidenceProblem:
    """The surface of a torus in (-6, 6)^3; ``tube`` is well below ``ring``."""

    def log_likelihood(x: Tensor) -> Tensor:
        to_ring = torch.linalg.vector_norm(x[..., :2], dim=-1) - ring
        distance = torch.hypot(to_ring, x[..., 2]) - tube
        return -((distance / width) ** 2) / 2

    # Around the ring, and in polar coordinates within the tube.
    log_tube = _log_shell_volume(2, tube, width)
    log_integral = math.log(2 * math.pi * ring) + log_tube
    return _on_box("torus", log_likelihood, (-6.0, 6.0), 3, dtype, log_integral)


def eggbox(dim: int, dtype: torch.dtype) -> EvidenceProblem:
    r"""Hundreds of equal modes: :math:`(2 + \prod_i \cos(x_i / 2))^5`.

    Over a whole number of half periods, :math:`E[\cos^k] = \binom{k}{k/2} 2^{-k}` for
    even k, and :math:`e^{(2 + p)^5} = \sum_k a_k p^k`, so that
    :math:`E[e^\ell] = \sum_k a_k E[\cos^k]^d`.
    """
    outer = [math.comb(5, j) * 2 ** (5 - j) for j in range(6)]  # (2 + p)^5
    series = [math.exp(outer[0])]
    for k in range(1, 2001):  # a = exp(q) has a' = q' a
        terms = (j * outer[j] * series[k - j] for j in range(1, min(k, 5) + 1))
        series.append(sum(terms) / k)
    total, moment = 0.0, 1.0
    for k in range(0, 2001, 2):
        total += series[k] * moment**dim
        moment *= (k + 1) / (k + 2)
    length = torch.tensor(10 * math.pi, dtype=dtype).item()
    return _on_box(
        f"eggbox_{dim}d",
        lambda x: (2 + (x / 2).cos().prod(-1)) ** 5,
        (0.0, length),
        dim,
        dtype,
        math.log(total) + dim * math.log(length),
    )


def gaussian_modes(
    dim: int,
    dtype: torch.dtype,
    *,
    name: str,
    weights: Sequence[float],
    locs: Sequence[float],
    scales: Sequence[float],
) -> EvidenceProblem:
    """A weighted sum of ``N(loc, scale^2 I)`` in (-10, 10)^d, all coordinates alike."""
    weight, loc, scale = (
        torch.tensor(values, dtype=dtype) for values in (weights, locs, scales)
    )

    def log_likelihood(x: Tensor) -> Tensor:
        modes = dist.Normal(loc, scale).log_prob(x.unsqueeze(-1)).sum(-2)
        return torch.logsumexp(modes + weight.log(), -1)

    exact = dist.Normal(loc.double(), scale.double(), validate_args=False)
    ten = torch.tensor(10.0, dtype=torch.float64)
    inside = (exact.cdf(ten) - exact.cdf(-ten)) ** dim
    log_integral = (weight.double() @ inside).log().item()
    return _on_box(name, log_likelihood, (-10.0, 10.0), dim, dtype, log_integral)


def rosenbrock(dim: int, dtype: torch.dtype) -> EvidenceProblem:
    r"""A curved valley: :math:`-\sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2`.

    In (-5, 5)^d. The integral over the last coordinate, then the one before it, and so
    on, by Simpson's rule, since the valley goes through the faces of the box; its step
    is a third of the narrowest width.
    """

    def log_likelihood(x: Tensor) -> Tensor:
        first, second = x[..., :-1], x[..., 1:]
        return -(100 * (second - first**2) ** 2 + (1 - first) ** 2).sum(-1)

    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    step = torch.tensor([1.0, *[4.0, 2.0] * 999, 4.0, 1.0]).to(grid) * 0.005 / 3
    pairs = -100 * (grid - grid[:, None] ** 2) ** 2 - (1 - grid[:, None]) ** 2
    value, kernel = torch.ones_like(grid), pairs.exp() * step
    for _ in range(dim - 1):
        value = kernel @ value
    log_integral = (value @ step).log().item()
    name = f"rosenbrock_{dim}d"
    return _on_box(name, log_likelihood, (-5.0, 5.0), dim, dtype, log_integral)


def log_gamma(dim: int, dtype: torch.dtype) -> EvidenceProblem:
    """Four modes, skewed and Gaussian coordinates, in (-30, 30)^d, ``d`` even.

    The first coordinate has a LogGamma mode at -10 and one at 10, the second has two
    normal ones; half of the others are LogGamma and half normal, at 10.
    """

    def log_skewed(x: Tensor) -> Tensor:
        return x - x.exp()

    def log_normal(x: Tensor) -> Tensor:
        return -(x**2 + math.log(2 * math.pi)) / 2

    def log_likelihood(x: Tensor) -> Tensor:
        first, second, rest = x[..., 0], x[..., 1], x[..., 2:]
        skewed, normal = rest.chunk(2, -1) if dim > 2 else (rest, rest)
        modes = torch.logaddexp(log_skewed(first - 10), log_skewed(first + 10))
        modes = modes + torch.logaddexp(
            log_normal(second - 10), log_normal(second + 10)
        )
        others = log_skewed(skewed - 10).sum(-1) + log_normal(normal - 10).sum(-1)
        return modes - 2 * math.log(2) + others

    # What lies outside of the box is less than 1e-8.
    name = f"log_gamma_{dim}d"
    return _on_box(name, log_likelihood, (-30.0, 30.0), dim, dtype, 0.0)


def corner(dim: int, dtype: torch.dtype, *, rate: float = 1000.0) -> EvidenceProblem:
    """All mass in a corner of the unit cube: ``-rate * sum(x)``."""
    log_integral = dim * (math.log(-math.expm1(-rate)) - math.log(rate))
    name = f"corner_{dim}d"
    return _on_box(
        name, lambda x: -rate * x.sum(-1), (0.0, 1.0), dim, dtype, log_integral
    )


def ball(dim: int, dtype: torch.dtype, *, radius: float = 1.0) -> EvidenceProblem:
    """Zero likelihood in (-3, 3)^d outside of a ball, and one within it."""

    def log_likelihood(x: Tensor) -> Tensor:
        inside = x.square().sum(-1) < radius**2
        return torch.where(inside, x.new_tensor(0.0), x.new_tensor(-math.inf))

    volume = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    log_integral = volume + dim * math.log(radius)
    name = f"ball_{dim}d"
    return _on_box(name, log_likelihood, (-3.0, 3.0), dim, dtype, log_integral)
