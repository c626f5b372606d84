"""Counts and rates: posteriors near an edge, or far narrower than their prior.

The truth is the ratio of two normalising constants of a conjugate family, times that of
the likelihood.
"""

__all__ = [
    "binomial_hierarchy",
    "binomial_rates",
    "change_point",
    "coin",
    "dirichlet_multinomial",
    "exponential_rate",
    "poisson_rates",
]

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.testing.grid import log_integral

from .base import (
    EvidenceProblem,
    log_beta,
    log_normal,
)


def coin(dtype: torch.dtype) -> EvidenceProblem:
    """One head, and a Beta(2, 2) prior: one constrained latent number."""
    two, one = torch.tensor(2.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)

    def model() -> None:
        p = pyro.sample("p", dist.Beta(two, two))
        pyro.sample("head", dist.Bernoulli(p), obs=one)

    truth = torch.tensor(0.5, dtype=torch.float64).log().item()
    return EvidenceProblem("coin", model, None, truth)


def binomial_rates(
    counts: Sequence[float],
    total: float,
    dtype: torch.dtype,
    *,
    name: str,
    prior: tuple[float, float] = (1.0, 1.0),
) -> EvidenceProblem:
    """A rate for each count of ``total``, with a ``Beta(*prior)`` prior."""
    k, n = torch.tensor(counts, dtype=dtype), torch.tensor(total, dtype=dtype)
    a, b = torch.tensor(prior, dtype=dtype)

    def model() -> None:
        with pyro.plate("groups", len(k)):
            p = pyro.sample("p", dist.Beta(a, b))
            pyro.sample("k", dist.Binomial(n, p), obs=k)

    k, n, a, b = (t.double() for t in (k, n, a, b))
    choose = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    terms = choose + log_beta(a + k, b + n - k) - log_beta(a, b)
    k, n, a, b = (t.to(dtype) for t in (k, n, a, b))
    return EvidenceProblem(name, model, None, terms.sum().item())


def dirichlet_multinomial(
    counts: Sequence[float],
    dtype: torch.dtype,
    *,
    name: str,
    concentration: float = 1.0,
) -> EvidenceProblem:
    """Probabilities of categories, of which some were seen seldom or never."""
    n = torch.tensor(counts, dtype=dtype)
    prior = torch.full((len(n),), concentration, dtype=dtype)
    total = int(sum(counts))

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(prior))
        pyro.sample("n", dist.Multinomial(total, p), obs=n)

    a, k = prior.double(), n.double()
    choose = (k.sum() + 1).lgamma() - (k + 1).lgamma().sum()
    before = a.lgamma().sum() - a.sum().lgamma()
    after = (a + k).lgamma().sum() - (a + k).sum().lgamma()
    return EvidenceProblem(name, model, None, (choose + after - before).item())


def poisson_rates(
    counts: Sequence[float],
    dtype: torch.dtype,
    *,
    name: str,
    prior: tuple[float, float] = (1.0, 1.0),
) -> EvidenceProblem:
    """A rate for each count, with a ``Gamma(*prior)`` prior."""
    k, (a, b) = torch.tensor(counts, dtype=dtype), torch.tensor(prior, dtype=dtype)

    def model() -> None:
        with pyro.plate("groups", len(k)):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("k", dist.Poisson(rate), obs=k)

    terms = _log_gamma_poisson(k.double(), 1.0, a.double(), b.double())
    return EvidenceProblem(
        name, model, None, (terms - (k.double() + 1).lgamma()).sum().item()
    )


def _log_gamma_poisson(
    total: Tensor, exposure: Tensor | float, a: Tensor, b: Tensor
) -> Tensor:
    """Log evidence of counts of one rate, but for the factorials of the counts."""
    shape, rate = a + total, b + exposure
    before, after = a * b.log() - a.lgamma(), shape.lgamma() - shape * rate.log()
    return before + after


def exponential_rate(
    scale: float, dtype: torch.dtype, *, num_data: int = 20
) -> EvidenceProblem:
    """A rate with a ``Gamma(0.5, 0.5)`` prior and waiting times of mean ``scale``."""
    level = (torch.arange(num_data, dtype=torch.float64) + 0.5) / num_data
    y = (-scale * torch.log1p(-level)).to(dtype)
    half = torch.tensor(0.5, dtype=dtype)

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(half, half))
        with pyro.plate("data", num_data):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    a = half.double()
    truth = _log_gamma_poisson(a.new_tensor(num_data), y.double().sum(), a, a)
    return EvidenceProblem(f"exponential_rate_{scale:g}", model, None, truth.item())


def binomial_hierarchy(dtype: torch.dtype) -> EvidenceProblem:
    """Rates of 20 groups around a mean, 22 numbers in all.

    The rates integrate out, to beta-binomial counts; the mean and the logarithm of the
    concentration by quadrature.
    """
    n = torch.tensor([20.0] * 10 + [10.0] * 6 + [50.0] * 4, dtype=dtype)
    k = torch.tensor(
        [0.0, 0, 0, 1, 1, 2, 2, 3, 5, 6, 0, 1, 1, 2, 3, 4, 3, 7, 9, 16], dtype=dtype
    )
    one = torch.tensor(1.0, dtype=dtype)

    def model() -> None:
        mean = pyro.sample("mean", dist.Beta(one, one))
        size = pyro.sample("size", dist.LogNormal(2 * one, one))
        with pyro.plate("groups", len(n)):
            p = pyro.sample("p", dist.Beta(mean * size, (1 - mean) * size))
            pyro.sample("k", dist.Binomial(n, p), obs=k)

    seen, size = k.double(), n.double()
    choose = (size + 1).lgamma() - (seen + 1).lgamma() - (size - seen + 1).lgamma()

    def log_joint(logit: Tensor, log_size: Tensor) -> Tensor:
        mean, jacobian = logit.sigmoid(), -2 * torch.cosh(logit / 2).log()
        a, b = mean * log_size.exp(), (-logit).sigmoid() * log_size.exp()
        a, b = a[..., None], b[..., None]
        groups = choose + log_beta(a + seen, b + size - seen) - log_beta(a, b)
        prior = jacobian - 2 * torch.tensor(2.0).log() + log_normal(log_size, 2.0, 1.0)
        return groups.sum(-1) + prior

    truth = log_integral(log_joint, (-12.0, 8.0, 401), (-6.0, 10.0, 321))
    return EvidenceProblem("binomial_hierarchy", model, None, truth)


def change_point(dtype: torch.dtype, *, num_steps: int = 112) -> EvidenceProblem:
    """Two Poisson rates and the time between them, which the model enumerates."""
    late = torch.arange(num_steps) >= num_steps * 2 // 5
    wave = 2 * torch.sin(torch.arange(num_steps) * 2.4)
    y = (torch.where(late, 2.0, 5.0) + wave).round().clamp(min=0).to(dtype)
    steps = torch.arange(num_steps)
    two, one = torch.tensor(2.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    uniform = torch.zeros(num_steps, dtype=dtype)

    def model() -> None:
        first = pyro.sample("first", dist.Gamma(two, one))
        second = pyro.sample("second", dist.Gamma(two, one))
        time = pyro.sample(
            "time", dist.Categorical(logits=uniform), infer={"enumerate": "parallel"}
        )
        with pyro.plate("data", num_steps):
            rate = torch.where(steps < time, first, second)
            pyro.sample("y", dist.Poisson(rate), obs=y)

    a, b, data = two.double(), one.double(), y.double()
    before = torch.cat([data.new_zeros(1), data.cumsum(0)[:-1]])
    length = steps.double()
    terms = _log_gamma_poisson(before, length, a, b)
    terms = terms + _log_gamma_poisson(data.sum() - before, num_steps - length, a, b)
    truth = terms.logsumexp(0) - length.new_tensor(num_steps).log()
    truth = truth - (data + 1).lgamma().sum()
    return EvidenceProblem("change_point", model, None, truth.item())
