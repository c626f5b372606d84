r"""Continuous targets whose :math:`\log Z` is known.

Each function returns a :class:`Target`. The truth is computed, in closed form or by
quadrature in one dimension, from the constants that the energy is built with. The
energies are plain functions: none of them hands its closed form to an estimator.
"""

__all__ = [
    "Target",
    "gamma",
    "gaussian",
    "gaussian_mixture",
    "hybrid_rosenbrock",
    "many_well",
    "neals_funnel",
    "product_of_gaussians",
    "student_t_product",
    "trap",
    "unnormalizable",
]

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.energies import Energy, FunctionEnergy
from pyro_ebm.testing.grid import GridDensity


class Target(NamedTuple):
    r"""An energy and what is known of it.

    Attributes:
        name: Name of the function that built it.
        energy: The energy :math:`f`.
        log_partition: The true :math:`\log Z` in nats; ``inf`` if :math:`e^{-f}` is not
            normalisable.
        base: A normalised distribution on the same space, to start from.
        sample: Maps a ``sample_shape`` to exact draws of ``(*sample_shape, *event)``,
            from torch's global stream; ``None`` where there are none.
        mean: True mean, shape ``event``, or ``None``.
        variance: True variance of each coordinate, shape ``event``, or ``None``.

    Exactness: ``log_partition`` is *exact*, to rounding.

    Example:
        >>> target = product_of_gaussians()
        >>> found = pyro_ebm.partition.importance_sampling(target.energy, target.base)
        >>> abs(found.value - target.log_partition) < 0.1
        True
    """

    name: str
    energy: Energy
    log_partition: float
    base: dist.TorchDistribution
    sample: Callable[[Sequence[int]], Tensor] | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None


def gaussian(dim: int = 10, condition_number: float = 1e4) -> Target:
    r"""A dense Gaussian: :math:`-f = -\frac12 (x-m)^\top A (x-m)`.

    The eigenvalues of ``A`` run from 1 to ``condition_number`` on a log scale, its axes
    are those of a Householder reflection, and ``m`` runs from -1 to 1.

    Example:
        >>> round(gaussian(2, condition_number=1.0).log_partition, 4)  # log(2 pi)
        1.8379
    """
    eigenvalues = torch.logspace(0, math.log10(condition_number), dim)
    axes = torch.eye(dim) - 2 / dim
    loc = torch.linspace(-1, 1, dim)
    whiten = axes * eigenvalues.sqrt()
    log_det = eigenvalues.log().sum().item()
    return Target(
        "gaussian",
        FunctionEnergy(
            lambda x: ((x - loc) @ whiten).square().sum(-1) / 2, event_shape=(dim,)
        ),
        dim / 2 * math.log(2 * math.pi) - log_det / 2,
        standard_normal(dim),
        lambda shape: loc + torch.randn(*shape, dim) @ (axes / eigenvalues.sqrt()).mT,
        loc,
        (axes.square() / eigenvalues).sum(-1),
    )


def product_of_gaussians() -> Target:
    r"""The product of N(0, 1) and N(2, 1): :math:`-f = -x^2/2 - (x - 2)^2/2`.

    Example:
        >>> target = product_of_gaussians()
        >>> round(target.log_partition, 4), target.mean  # log(pi) / 2 - 1
        (-0.4276, tensor(1.))
    """
    return Target(
        "product_of_gaussians",
        FunctionEnergy(lambda x: x**2 / 2 + (x - 2) ** 2 / 2, event_shape=()),
        math.log(math.pi) / 2 - 1,
        dist.Normal(torch.tensor(0.0), 1.0),
        lambda shape: 1 + math.sqrt(0.5) * torch.randn(tuple(shape)),
        torch.tensor(1.0),
        torch.tensor(0.5),
    )


def hybrid_rosenbrock(
    dim: int = 5, loc: float = 0.5, a: float = 4.0, b: float = 20.0
) -> Target:
    r"""A curved ridge: :math:`-f = -a(x_1 - \mu)^2 - b \sum_i (x_{i+1} - x_i^2)^2`.

    References:
        Pagani, Wiegand & Nadarajah (2022), Scandinavian Journal of Statistics.

    Example:
        >>> hybrid_rosenbrock(dim=2).energy(torch.tensor([0.5, 0.25]))  # on the ridge
        tensor(0.)
    """

    def energy(x: Tensor) -> Tensor:
        ridge = (x[..., 1:] - x[..., :-1] ** 2).square().sum(-1)
        return a * (x[..., 0] - loc) ** 2 + b * ridge

    def sample(shape: Sequence[int]) -> Tensor:
        x = [loc + torch.randn(tuple(shape)) / math.sqrt(2 * a)]
        for _ in range(dim - 1):
            x.append(x[-1] ** 2 + torch.randn(tuple(shape)) / math.sqrt(2 * b))
        return torch.stack(x, -1)

    return Target(
        "hybrid_rosenbrock",
        FunctionEnergy(energy, event_shape=(dim,)),
        dim / 2 * math.log(math.pi) - math.log(a) / 2 - (dim - 1) / 2 * math.log(b),
        standard_normal(dim),
        sample,
    )


def neals_funnel(dim: int = 10, scale: float = 3.0) -> Target:
    r"""A funnel: :math:`-f = -v^2/(2 s^2) - \frac12 \sum_i [x_i^2 e^{-v} + v]`.

    ``v`` is the first coordinate. The others have so heavy tails that their sample
    variance is of no use.

    Example:
        >>> neals_funnel(dim=2).variance  # 9 and exp(9 / 2)
        tensor([ 9.0000, 90.0171])
    """

    def energy(x: Tensor) -> Tensor:
        v, rest = x[..., 0], x[..., 1:]
        tail = rest.square().sum(-1) * (-v).exp() + (dim - 1) * v
        return v.square() / (2 * scale**2) + tail / 2

    def sample(shape: Sequence[int]) -> Tensor:
        v = scale * torch.randn(*shape, 1)
        return torch.cat([v, (v / 2).exp() * torch.randn(*shape, dim - 1)], -1)

    variance = torch.full((dim,), math.exp(scale**2 / 2))
    variance[0] = scale**2
    return Target(
        "neals_funnel",
        FunctionEnergy(energy, event_shape=(dim,)),
        math.log(scale) + dim / 2 * math.log(2 * math.pi),
        standard_normal(dim),
        sample,
        torch.zeros(dim),
        variance,
    )


def gaussian_mixture(num_modes: int = 40, log_partition: float = 3.0) -> Target:
    """Unit-variance modes of equal weight, uniform in the square [-40, 40]^2.

    The modes are the same at every call. The energy is minus the log of the normalised
    mixture, minus ``log_partition``.

    Example:
        >>> target = gaussian_mixture()
        >>> target.log_partition, target.sample((5,)).shape
        (3.0, torch.Size([5, 2]))
    """
    generator = torch.Generator().manual_seed(0)
    locs = 80 * torch.rand(num_modes, 2, generator=generator) - 40
    mixture = dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(num_modes)),
        dist.Normal(locs, 1.0).to_event(1),
        validate_args=False,
    )

    def energy(x: Tensor) -> Tensor:
        square = (x.unsqueeze(-2) - locs).square().sum(-1)
        log_norm = math.log(2 * math.pi * num_modes)
        return log_norm - log_partition - torch.logsumexp(-square / 2, -1)

    return Target(
        "gaussian_mixture",
        FunctionEnergy(energy, event_shape=(2,)),
        log_partition,
        dist.Normal(torch.zeros(2), 25.0).to_event(1),
        lambda shape: mixture.sample(torch.Size(shape)),
        locs.mean(0),
        locs.var(0, correction=0) + 1,
    )


def many_well(num_pairs: int = 16) -> Target:
    r"""Independent double wells: a pair has :math:`-f = u/2 + 6u^2 - u^4 - v^2/2`.

    The coordinates are ``(u_1, v_1, u_2, v_2, ...)``, so there are ``2**num_pairs``
    modes. The well's integral, moments and draws come from a grid.

    Example:
        >>> many_well(2).log_partition / many_well(1).log_partition
        2.0
    """

    def negative_energy(u: Tensor) -> Tensor:
        return u / 2 + 6 * u**2 - u**4

    def energy(x: Tensor) -> Tensor:
        u, v = x[..., ::2], x[..., 1::2]
        return (v**2 / 2 - negative_energy(u)).sum(-1)

    def sample(shape: Sequence[int]) -> Tensor:
        u = well.sample((*shape, num_pairs))
        v = torch.randn(*shape, num_pairs)
        return torch.stack([u, v], -1).flatten(-2)

    well = GridDensity(negative_energy, -5.0, 5.0)
    mean = well.mean(well.points)
    variance = well.mean((well.points - mean).square())
    return Target(
        "many_well",
        FunctionEnergy(energy, event_shape=(2 * num_pairs,)),
        num_pairs * (well.log_integral + math.log(2 * math.pi) / 2),
        standard_normal(2 * num_pairs),
        sample,
        torch.tensor([mean, 0.0] * num_pairs),
        torch.tensor([variance, 1.0] * num_pairs),
    )


def student_t_product(dim: int = 20, df: float = 3.0) -> Target:
    r"""Heavy tails: :math:`-f = -\frac{\nu+1}2 \sum_i \log(1 + x_i^2/\nu)`.

    With ``df <= 4`` the fourth moment is infinite, with ``df <= 2`` the variance.

    Example:
        >>> student_t_product(dim=2, df=3.0).variance
        tensor([3., 3.])
    """
    log_one = math.lgamma(df / 2) - math.lgamma((df + 1) / 2)
    one = dist.StudentT(torch.tensor(df))
    return Target(
        "student_t_product",
        FunctionEnergy(
            lambda x: (df + 1) / 2 * (x**2 / df).log1p().sum(-1), event_shape=(dim,)
        ),
        dim * (log_one + math.log(df * math.pi) / 2),
        standard_normal(dim),
        lambda shape: one.sample((*shape, dim)),
        torch.zeros(dim) if df > 1 else None,
        torch.full((dim,), df / (df - 2)) if df > 2 else None,
    )


def gamma(concentration: float = 3.0, rate: float = 1.0) -> Target:
    r"""On :math:`x > 0`: :math:`-f = (a - 1) \log x - b x`.

    Example:
        >>> round(gamma(concentration=3.0).log_partition, 4)  # log 2!
        0.6931
    """
    truth = dist.Gamma(torch.tensor(concentration), rate)
    return Target(
        "gamma",
        FunctionEnergy(
            lambda x: rate * x - (concentration - 1) * x.log(),
            event_shape=(),
            support=constraints.positive,
        ),
        math.lgamma(concentration) - concentration * math.log(rate),
        dist.LogNormal(torch.tensor(0.0), 1.0),
        lambda shape: truth.sample(torch.Size(shape)),
        truth.mean,
        truth.variance,
    )


def trap(dim: int = 10, loc: float = 2.0, scale: float = 0.3) -> Target:
    r"""A small, far Gaussian: :math:`-f = -\frac12 \sum_i ((x_i - m)/s)^2`.

    Far from its base in every coordinate, so that annealing with too few temperatures
    gives a wrong number and a delta-method error bar that does not show it.

    Example:
        >>> trap(dim=2).mean, trap(dim=2).base.mean
        (tensor([2., 2.]), tensor([0., 0.]))
    """
    return Target(
        "trap",
        FunctionEnergy(
            lambda x: ((x - loc) / scale).square().sum(-1) / 2, event_shape=(dim,)
        ),
        dim * (math.log(2 * math.pi) / 2 + math.log(scale)),
        standard_normal(dim),
        lambda shape: loc + scale * torch.randn(*shape, dim),
        torch.full((dim,), loc),
        torch.full((dim,), scale**2),
    )


def unnormalizable(dim: int = 2) -> Target:
    r"""No distribution: :math:`-f = +\lVert x \rVert^2 / 2` has :math:`Z = \infty`.

    Example:
        >>> unnormalizable().log_partition
        inf
    """
    return Target(
        "unnormalizable",
        FunctionEnergy(lambda x: -x.square().sum(-1) / 2, event_shape=(dim,)),
        math.inf,
        standard_normal(dim),
    )


def standard_normal(dim: int) -> dist.TorchDistribution:
    """The base of most targets: N(0, I) over vectors of size ``dim``."""
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)
