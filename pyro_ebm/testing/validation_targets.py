r"""Continuous targets of known :math:`\log Z` on which no estimator was tuned.

They are as those of :mod:`pyro_ebm.testing.targets`: each function returns a
:class:`~pyro_ebm.testing.targets.Target` whose truth is computed, in closed form or by
quadrature in one dimension, from the constants of its energy. A rule that was tuned on
those, say of an estimator that decides whether to trust itself, is judged on these.
"""

__all__ = [
    "banana",
    "beta_product",
    "dirichlet",
    "eight_schools",
    "laplace_product",
    "log_gamma_product",
    "multivariate_student_t",
    "shell",
    "two_modes",
]

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.testing.grid import GridDensity
from pyro_ebm.testing.targets import Target, standard_normal

#: Effects of coaching in eight schools, and their standard errors.
SCHOOL_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SCHOOL_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def log_gamma_product(dim: int = 10, low: float = 0.5, high: float = 3.0) -> Target:
    r"""Skewed coordinates: :math:`-f = \sum_i a_i x_i - e^{x_i}`.

    Each is the logarithm of a gamma draw of shape ``a_i``, from ``low`` to ``high``; of
    shape 1, minus a Gumbel draw. One tail is exponential, the other ends abruptly.

    Example:
        >>> round(log_gamma_product(dim=1, low=3.0).log_partition, 4)  # log 2!
        0.6931
    """
    shape = torch.linspace(low, high, dim)
    truth = dist.Gamma(shape, 1.0)
    return Target(
        "log_gamma_product",
        FunctionEnergy(lambda x: (x.exp() - shape * x).sum(-1), event_shape=(dim,)),
        shape.double().lgamma().sum().item(),
        standard_normal(dim),
        lambda sample_shape: truth.sample(torch.Size(sample_shape)).log(),
        shape.digamma(),
        torch.polygamma(1, shape),
    )


def multivariate_student_t(
    dim: int = 8, df: float = 4.0, correlation: float = 0.8
) -> Target:
    r"""Joint heavy tails: :math:`-f = -\frac{\nu+d}2 \log(1 + x^\top S^{-1} x / \nu)`.

    ``S_ij = correlation ** |i - j|``. All coordinates are far out together.

    Example:
        >>> multivariate_student_t(dim=2, df=4.0).variance
        tensor([2., 2.])
    """
    index = torch.arange(dim)
    scale = correlation ** (index - index[:, None]).abs().to(torch.empty(0))
    factor = torch.linalg.cholesky(scale)
    whiten = torch.linalg.inv(factor).mT

    def energy(x: Tensor) -> Tensor:
        square = (x @ whiten).square().sum(-1)
        return (df + dim) / 2 * (square / df).log1p()

    def sample(shape: Sequence[int]) -> Tensor:
        mixing = dist.Chi2(torch.tensor(df)).sample((*shape, 1)) / df
        return torch.randn(*shape, dim) @ factor.mT * mixing.rsqrt()

    log_det = (dim - 1) * math.log1p(-(correlation**2))
    log_norm = math.lgamma(df / 2) - math.lgamma((df + dim) / 2)
    return Target(
        "multivariate_student_t",
        FunctionEnergy(energy, event_shape=(dim,)),
        log_norm + dim / 2 * math.log(df * math.pi) + log_det / 2,
        standard_normal(dim),
        sample,
        torch.zeros(dim) if df > 1 else None,
        torch.full((dim,), df / (df - 2)) if df > 2 else None,
    )


def banana(dim: int = 10, bend: float = 0.03, scale: float = 10.0) -> Target:
    r"""A twisted Gaussian.

    .. math::
        -f = -\frac{x_1^2}{2 s^2} - \frac12 (x_2 + b x_1^2 - b s^2)^2
             - \frac12 \sum_{i > 2} x_i^2

    References:
        Haario, Saksman & Tamminen (1999), Computational Statistics 14, 375-395.

    Example:
        >>> banana(dim=2).variance  # 100 and 1 + 2 * 3 ** 2
        tensor([100.,  19.])
    """

    def energy(x: Tensor) -> Tensor:
        first = (x[..., 0] / scale).square()
        second = (x[..., 1] + bend * scale**2 * (first - 1)).square()
        return (first + second + x[..., 2:].square().sum(-1)) / 2

    def sample(shape: Sequence[int]) -> Tensor:
        first, rest = torch.randn(*shape, dim).split([1, dim - 1], -1)
        rest[..., :1] -= bend * scale**2 * (first.square() - 1)
        return torch.cat([scale * first, rest], -1)

    variance = torch.ones(dim)
    variance[0] = scale**2
    variance[1] = 1 + 2 * (bend * scale**2) ** 2
    return Target(
        "banana",
        FunctionEnergy(energy, event_shape=(dim,)),
        dim / 2 * math.log(2 * math.pi) + math.log(scale),
        dist.Normal(torch.zeros(dim), scale).to_event(1),
        sample,
        torch.zeros(dim),
        variance,
    )


def two_modes(dim: int = 6, distance: float = 9.0, weight: float = 0.7) -> Target:
    r"""Two far modes.

    .. math::
        -f = \log\left(w e^{-|x-m|^2/2} + (1-w) e^{-|x+m|^2/2}\right)

    ``m`` is on the diagonal and ``distance`` is that of the modes in units of their
    standard deviation: at 9 the way from one to the other climbs by 10 nats. The base
    has a standard deviation of a third of it.

    Example:
        >>> x = two_modes().sample((1000,))
        >>> abs((x.sum(-1) > 0).float().mean().item() - 0.7) < 0.05
        True
    """
    loc = torch.full((dim,), distance / 2 / math.sqrt(dim))
    log_weights = torch.tensor([math.log(weight), math.log1p(-weight)])

    def energy(x: Tensor) -> Tensor:
        square = torch.stack([x - loc, x + loc], -1).square().sum(-2)
        return -torch.logsumexp(log_weights - square / 2, -1)

    def sample(shape: Sequence[int]) -> Tensor:
        sign = torch.where(torch.rand(*shape, 1) < weight, 1.0, -1.0)
        return sign * loc + torch.randn(*shape, dim)

    return Target(
        "two_modes",
        FunctionEnergy(energy, event_shape=(dim,)),
        dim / 2 * math.log(2 * math.pi),
        dist.Normal(torch.zeros(dim), distance / 3).to_event(1),
        sample,
        (2 * weight - 1) * loc,
        1 + 4 * weight * (1 - weight) * loc.square(),
    )


def shell(dim: int = 5, radius: float = 3.0, width: float = 0.3) -> Target:
    r"""A spherical shell: :math:`-f = -(|x| - r)^2 / (2 w^2)`.

    The mass is on a surface that no correlation describes.

    Example:
        >>> shell(radius=3.0).sample((1000,)).norm(dim=-1).std() < 0.4
        tensor(True)
    """
    radial = GridDensity(
        lambda r: (dim - 1) * r.log() - (r - radius).square() / (2 * width**2),
        0.0,
        radius + 12 * width,
    )
    log_sphere = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)

    def energy(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1)
        return ((norm - radius) / width).square() / 2

    def sample(shape: Sequence[int]) -> Tensor:
        direction = torch.nn.functional.normalize(torch.randn(*shape, dim), dim=-1)
        return radial.sample((*shape, 1)) * direction

    return Target(
        "shell",
        FunctionEnergy(energy, event_shape=(dim,)),
        log_sphere + radial.log_integral,
        dist.Normal(torch.zeros(dim), radius / 2).to_event(1),
        sample,
        torch.zeros(dim),
        torch.full((dim,), radial.mean(radial.points.square()) / dim),
    )


def laplace_product(dim: int = 10, low: float = 0.5, high: float = 2.0) -> Target:
    r"""Cusps: :math:`-f = -\sum_i |x_i| / s_i`, ``s_i`` from ``low`` to ``high``.

    Example:
        >>> round(laplace_product(dim=1, low=0.5).log_partition, 4)  # log(2 * 0.5)
        0.0
    """
    scale = torch.linspace(low, high, dim)
    truth = dist.Laplace(torch.zeros(dim), scale)
    return Target(
        "laplace_product",
        FunctionEnergy(lambda x: (x.abs() / scale).sum(-1), event_shape=(dim,)),
        (2 * scale.double()).log().sum().item(),
        standard_normal(dim),
        lambda shape: truth.sample(torch.Size(shape)),
        torch.zeros(dim),
        2 * scale.square(),
    )


def dirichlet(
    concentration: Sequence[float] = (0.5, 0.7, 1.0, 2.0, 4.0, 8.0),
) -> Target:
    r"""On the simplex: :math:`-f = \sum_i (a_i - 1) \log x_i`.

    The base is the uniform distribution.

    Example:
        >>> dirichlet([1.0, 1.0, 2.0]).mean
        tensor([0.2500, 0.2500, 0.5000])
    """
    a = torch.tensor(concentration)
    truth = dist.Dirichlet(a)
    return Target(
        "dirichlet",
        FunctionEnergy(
            lambda x: ((1 - a) * x.log()).sum(-1),
            event_shape=(len(a),),
            support=constraints.simplex,
        ),
        (a.double().lgamma().sum() - a.double().sum().lgamma()).item(),
        dist.Dirichlet(torch.ones(len(a))),
        lambda shape: truth.sample(torch.Size(shape)),
        truth.mean,
        truth.variance,
    )


def beta_product(
    first: Sequence[float] = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0),
    second: Sequence[float] = (4.0, 0.8, 0.6, 3.0, 1.0, 2.0),
) -> Target:
    r"""Independent beta variables, in a box.

    .. math::
        -f = \sum_i (a_i - 1) \log x_i + (b_i - 1) \log(1 - x_i)

    The base is the uniform distribution.

    Example:
        >>> round(beta_product([2.0], [1.0]).log_partition, 4)  # log B(2, 1)
        -0.6931
    """
    a, b = torch.tensor(first), torch.tensor(second)
    truth = dist.Beta(a, b)
    log_beta = a.double().lgamma() + b.double().lgamma() - (a + b).double().lgamma()
    return Target(
        "beta_product",
        FunctionEnergy(
            lambda x: ((1 - a) * x.log() + (1 - b) * (-x).log1p()).sum(-1),
            event_shape=(len(a),),
            support=constraints.independent(constraints.unit_interval, 1),
        ),
        log_beta.sum().item(),
        dist.Uniform(torch.zeros(len(a)), 1.0).to_event(1),
        lambda shape: truth.sample(torch.Size(shape)),
        truth.mean,
        truth.variance,
    )


def eight_schools(prior_scale: float = 5.0) -> Target:
    r"""A hierarchical model: eight effects of coaching, each with its standard error.

    .. math::
        &y_i \sim \mathcal N(\mu + \tau z_i, s_i), \quad z_i \sim \mathcal N(0, 1) \\
        &\mu \sim \mathcal N(0, c), \quad \tau \sim \mathrm{HalfCauchy}(c)

    The coordinates are ``(mu, log tau, z_1, ..., z_8)`` and ``log Z`` is the evidence:
    with :math:`\mu` and :math:`z` summed out in closed form, an integral over
    :math:`\log \tau`. The base is about as wide as the prior.

    References:
        Rubin (1981), Journal of Educational Statistics 6, 377-401 (the data).

    Example:
        >>> target = eight_schools()
        >>> target.energy.event_shape, 4 < target.mean[0] < 5
        (torch.Size([10]), tensor(True))
    """
    y, errors = torch.tensor(SCHOOL_EFFECTS), torch.tensor(SCHOOL_ERRORS)
    dim = len(y)
    schools = _Schools(y.double(), errors.double(), prior_scale)
    log_tau = GridDensity(schools.log_evidence, -35.0, 15.0)
    loc, variance = schools.moments(log_tau.points)
    mean = log_tau.mass @ loc
    log_norm = errors.log().sum() + (2 * dim + 1) / 2 * math.log(2 * math.pi)
    log_norm = log_norm + math.log(prior_scale)

    def energy(x: Tensor) -> Tensor:
        mu, t, z = x[..., :1], x[..., 1], x[..., 2:]
        residual = (y - mu - t.exp()[..., None] * z) / errors
        squares = residual.square().sum(-1) + z.square().sum(-1)
        squares = squares + (mu[..., 0] / prior_scale).square()
        return squares / 2 + log_norm + _half_cauchy_energy(t, prior_scale)

    def sample(shape: Sequence[int]) -> Tensor:
        t = log_tau.sample(shape).double()
        mu, mu_variance = schools.posterior(t)
        mu = mu + mu_variance.sqrt() * torch.randn_like(mu)
        loc, variance = schools.effects(t, mu)
        z = loc + variance.sqrt() * torch.randn_like(loc)
        return torch.cat([mu[..., None], t[..., None], z], -1).to(y)

    center, scale = torch.zeros(2 + dim), torch.ones(2 + dim)
    center[1] = math.log(prior_scale)
    scale[:2] = torch.tensor([prior_scale, 2.0])
    return Target(
        "eight_schools",
        FunctionEnergy(energy, event_shape=(2 + dim,)),
        log_tau.log_integral,
        dist.Normal(center, scale).to_event(1),
        sample,
        mean.to(y),
        (log_tau.mass @ (variance + (loc - mean).square())).to(y),
    )


class _Schools(NamedTuple):
    """What the model of :func:`eight_schools` is given ``log tau``."""

    y: Tensor
    errors: Tensor
    prior_scale: float

    def posterior(self, log_tau: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``mu``, each of shape ``(*batch,)``."""
        precision = 1 / (self.errors.square() + (2 * log_tau).exp()[..., None])
        variance = 1 / (precision.sum(-1) + self.prior_scale**-2)
        return precision @ self.y * variance, variance

    def effects(self, log_tau: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ``z`` given ``mu`` too, each ``(*batch, 8)``."""
        tau, noise = log_tau.exp()[..., None], self.errors.square()
        total = noise + tau.square()
        return tau * (self.y - mu[..., None]) / total, noise / total

    def moments(self, log_tau: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of all coordinates, each of shape ``(*batch, 10)``."""
        mu, mu_variance = self.posterior(log_tau)
        z, z_variance = self.effects(log_tau, mu)
        slope, _ = self.effects(log_tau, mu - 1)
        z_variance = z_variance + (slope - z).square() * mu_variance[..., None]
        pairs = (mu, mu_variance), (log_tau, torch.zeros_like(log_tau))
        first, second = (torch.stack(parts, -1) for parts in zip(*pairs, strict=True))
        return torch.cat([first, z], -1), torch.cat([second, z_variance], -1)

    def log_evidence(self, log_tau: Tensor) -> Tensor:
        """Log joint density of the data and ``log tau``, shape ``(*batch,)``."""
        mu, variance = self.posterior(log_tau)
        scale = (self.errors.square() + (2 * log_tau).exp()[..., None]).sqrt()
        data = dist.Normal(mu[..., None], scale).log_prob(self.y).sum(-1)
        prior = dist.Normal(mu.new_zeros(()), self.prior_scale).log_prob(mu)
        at_mode = dist.Normal(mu, variance.sqrt()).log_prob(mu)
        return data + prior - at_mode - _half_cauchy_energy(log_tau, self.prior_scale)


def _half_cauchy_energy(log_tau: Tensor, scale: float) -> Tensor:
    """Minus the log density of ``log tau`` if ``tau`` is half Cauchy."""
    ratio = log_tau - math.log(scale)
    return softplus(2 * ratio) - ratio - math.log(2 / math.pi)
