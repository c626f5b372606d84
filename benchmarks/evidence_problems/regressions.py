r"""Regressions: the coefficients in closed form, the noise by quadrature.

.. math::
    y = X \beta + \sigma \xi, \quad \beta \sim \mathcal N(0, c^2 I), \quad
    p(y \mid \sigma) = \mathcal N(y;\, 0,\, \sigma^2 I + c^2 X X^\top)      \tag{1}
"""

__all__ = [
    "gaussian_log_evidence",
    "linear",
    "linear_known_noise",
    "logistic",
    "near_collinear",
    "spike_and_slab",
    "straight_line",
]

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_ebm.testing.grid import GridDensity, log_integral

from .base import EvidenceProblem, log_normal, noise


def gaussian_log_evidence(x: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    r"""Log density (1) of the data, in double precision.

    Args:
        x: Columns times the prior scale of their coefficients, shape ``(N, D)``.
        y: Shape ``(N,)``.
        variance: :math:`\sigma^2`, shape ``(*batch,)``.

    Returns:
        Shape ``(*batch,)``.
    """
    axes, singular, _ = torch.linalg.svd(x.double(), full_matrices=False)
    along = axes.mT @ y.double()
    rest = (y.double() - axes @ along).square().sum()
    wide = variance[..., None] + singular**2
    missing = len(y) - len(singular)
    inside = log_normal(along, 0.0, wide).sum(-1)
    outside = missing * (2 * math.pi * variance).log() + rest / variance
    return inside - outside / 2


def linear_known_noise(
    x: Tensor, y: Tensor, dtype: torch.dtype, *, name: str, prior_scale: float = 10.0
) -> EvidenceProblem:
    """Regression with unit noise; ``x`` has shape ``(N, D)``."""
    x, y = x.to(dtype), y.to(dtype)
    zero = torch.zeros(x.shape[1], dtype=dtype)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(zero, prior_scale).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    one = torch.ones((), dtype=torch.float64)
    truth = gaussian_log_evidence(prior_scale * x.double(), y, one)
    return EvidenceProblem(name, model, None, truth.item())


def straight_line(dtype: torch.dtype) -> EvidenceProblem:
    """Intercept and slope over an ``x`` that is far from centred."""
    x = torch.linspace(20, 70, 50, dtype=torch.float64)
    y = (3 + x + noise(50)).to(dtype)
    zero, x = torch.zeros((), dtype=dtype), x.to(dtype)

    def model() -> None:
        a, b = (pyro.sample(name, dist.Normal(zero, 10.0)) for name in "ab")
        with pyro.plate("data", 50):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    columns = 10 * torch.stack([torch.ones_like(x), x], 1).double()
    one = torch.ones((), dtype=torch.float64)
    truth = gaussian_log_evidence(columns, y, one).item()
    return EvidenceProblem("straight_line", model, None, truth)


def linear(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    *,
    name: str,
    noise_prior: str = "HalfNormal",
    noise_scale: float = 10.0,
) -> EvidenceProblem:
    """Regression with ``Normal(0, 10)`` coefficients and unknown noise.

    Args:
        x: Shape ``(N, D)``, with a column of ones if there is an intercept.
        y: Shape ``(N,)``.
        dtype: Of the model and its data.
        name: Of the problem.
        noise_prior: Name of the prior's distribution: ``HalfNormal`` or ``HalfCauchy``.
        noise_scale: Scale of that prior.
    """
    x, y = x.to(dtype), y.to(dtype)
    zero = torch.zeros(x.shape[1], dtype=dtype)
    family, scale = getattr(dist, noise_prior), torch.tensor(noise_scale, dtype=dtype)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(zero, 10.0).to_event(1))
        sigma = pyro.sample("sigma", family(scale))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)

    def log_joint(log_sigma: Tensor) -> Tensor:
        data = gaussian_log_evidence(10 * x.double(), y, (2 * log_sigma).exp())
        return data + family(scale.double()).log_prob(log_sigma.exp()) + log_sigma

    truth = GridDensity(log_joint, -12.0, 14.0).log_integral
    return EvidenceProblem(name, model, None, truth)


def near_collinear(
    num_columns: int,
    dtype: torch.dtype,
    *,
    name: str,
    distance: float,
    scale: float = 1.0,
    is_noise_known: bool = False,
) -> EvidenceProblem:
    """Columns that differ from one another by ``distance`` of their ``scale``."""
    common, own = noise(40, 1), noise(40, num_columns, seed=1)
    x = scale * (common + distance * own)
    y = x @ torch.linspace(-1, 2, num_columns, dtype=torch.float64) + noise(40, seed=2)
    if is_noise_known:
        return linear_known_noise(x, y, dtype, name=name)
    return linear(x, y, dtype, name=name)


def logistic(
    num_columns: int, dtype: torch.dtype, *, is_separable: bool = False
) -> EvidenceProblem:
    """Logistic regression with an intercept and ``Normal(0, 5)`` coefficients.

    Separable data leave one direction to the prior alone. Up to three columns, the
    truth by quadrature over all of them.
    """
    columns = noise(30, num_columns - 1, seed=3).clamp(-2, 2)
    x = torch.cat([torch.ones(30, 1, dtype=torch.float64), columns], 1).to(dtype)
    spread = 0.0 if is_separable else 1.5
    y = (columns[:, 0] + spread * noise(30, seed=4) > 0.3).to(dtype)
    zero = torch.zeros(num_columns, dtype=dtype)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(zero, 5.0).to_event(1))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    signed = (2 * y.double() - 1)[:, None] * x.double()

    def log_joint(*beta: Tensor) -> Tensor:
        point = torch.stack(beta, -1)
        return logsigmoid(point @ signed.mT).sum(-1) + log_normal(point, 0, 25).sum(-1)

    # Wide where the data leave a direction to the prior; a quarter is fine enough.
    axes = [(-40.0, 40.0, 321) if is_separable else (-16.0, 16.0, 129)] * num_columns
    name = f"logistic_{num_columns}" + ("_separable" if is_separable else "")
    return EvidenceProblem(name, model, None, log_integral(log_joint, *axes))


def spike_and_slab(
    num_columns: int, dtype: torch.dtype, *, has_mixture_site: bool = False
) -> EvidenceProblem:
    """Each coefficient from a narrow or a wide normal; the truth sums over which.

    The prior is a mixture at a site, or a factor that makes one out of the wide normal.
    """
    x = (noise(20, 1, seed=5) + 0.3 * noise(20, num_columns, seed=6)).to(dtype)
    beta = torch.zeros(num_columns, dtype=torch.float64)
    beta[::3] = 2.0
    y = (x.double() @ beta + noise(20, seed=7)).to(dtype)
    scales = torch.tensor([0.1, 3.0], dtype=dtype).expand(num_columns, 2)
    which = dist.Categorical(logits=torch.zeros_like(scales))
    mixture = dist.MixtureSameFamily(which, dist.Normal(0 * scales, scales))
    slab = dist.Normal(0 * scales[:, 1], scales[:, 1])

    def model() -> None:
        prior = mixture if has_mixture_site else slab
        beta = pyro.sample("beta", prior.to_event(1))
        if not has_mixture_site:
            ratio = mixture.log_prob(beta) - slab.log_prob(beta)
            pyro.factor("prior", ratio.sum(-1))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)

    one = torch.ones((), dtype=torch.float64)
    terms = [
        gaussian_log_evidence(x.double() * one.new_tensor(choice), y, one)
        for choice in itertools.product(scales[0].tolist(), repeat=num_columns)
    ]
    truth = torch.logsumexp(torch.stack(terms), 0) - num_columns * math.log(2)
    return EvidenceProblem(f"spike_and_slab_{num_columns}", model, None, truth.item())
