"""Ten posteriors, each written once for Pyro and for NumPyro.

A model is a function of a *language*: the names that the two libraries share, and loops
over time, run by Python for Pyro, by ``lax.scan`` for JAX. ``MODELS`` maps a name to
what makes such a model:

* eight_schools: Rubin's data, non-centred;
* arK: five lags of a published series, ``data/arK.json``;
* garch11: 200 made-up returns, flat priors on a stationary triangle;
* hmm: 100 made-up points, two states, their order by the means;
* gp_pois: counts at 11 points under a Gaussian process, in double precision;
* earnings: log earnings on height, sex and their product in raw units, flat priors;
* irt_2pl: 20 items and 100 persons, made up;
* mixture: 1,000 made-up points of two normals, ordered means;
* logistic, neural: as in ``workloads.py``.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from evidence_problems.published import load, with_intercept
from torch import Tensor
from workloads import SCHOOLS, WORKLOADS

DOUBLE = torch.float64


class PeerModel(NamedTuple):
    """A model of a language; ``quantities`` maps draws by site to what is judged."""

    model: Callable[[Any], Callable[[], None]]
    quantities: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    is_double: bool = False


def pyro_language():
    def scan(step, state, inputs):
        outputs = []
        for value in inputs:
            state = step(state, value)
            outputs.append(state)
        return torch.stack(outputs)

    return SimpleNamespace(
        sample=pyro.sample,
        plate=pyro.plate,
        factor=pyro.factor,
        dist=dist,
        ops=torch,
        logsumexp=torch.logsumexp,
        array=lambda v: torch.as_tensor(v).to(torch.get_default_dtype()),
        scan=scan,
    )


def numpyro_language():
    import jax
    import jax.numpy as jnp
    import numpyro

    def scan(step, state, inputs):
        def both(state, value):
            state = step(state, value)
            return state, state

        return jax.lax.scan(both, state, inputs)[1]

    return SimpleNamespace(
        sample=numpyro.sample,
        plate=numpyro.plate,
        factor=numpyro.factor,
        dist=numpyro.distributions,
        ops=jnp,
        logsumexp=jax.nn.logsumexp,
        array=lambda v: jnp.asarray(v.numpy() if isinstance(v, Tensor) else v, float),
        scan=scan,
    )


def made_up(seed=0):
    """Normal and uniform numbers of a generator of its own, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=DOUBLE)

    return normal, uniform


def flat(of, name, support, size=None):
    shape = () if size is None else (size,)
    constraint = getattr(of.dist.constraints, support)
    return of.sample(name, of.dist.ImproperUniform(constraint, (), shape))


def eight_schools(of):
    y, sigma = map(of.array, SCHOOLS)

    def model():
        mu = of.sample("mu", of.dist.Normal(0.0, 5.0))
        tau = of.sample("tau", of.dist.HalfCauchy(5.0))
        with of.plate("schools", len(y)):
            z = of.sample("z", of.dist.Normal(0.0, 1.0))
            of.sample("y", of.dist.Normal(mu + tau * z, sigma), obs=y)

    return model


def ark(of, order=5):
    y = load("arK")["y"]
    lags = [y[order - k - 1 : len(y) - k - 1] for k in range(order)]
    x, y = of.array(torch.stack(lags, 1)), of.array(y[order:])

    def model():
        alpha = of.sample("alpha", of.dist.Normal(0.0, 10.0))
        prior = of.dist.Normal(of.ops.zeros(order), 10.0).to_event(1)
        beta = of.sample("beta", prior)
        sigma = of.sample("sigma", of.dist.HalfCauchy(2.5))
        with of.plate("times", len(y)):
            of.sample("y", of.dist.Normal(alpha + x @ beta, sigma), obs=y)

    return model


def garch11(of, size=200, first=0.5):
    normal, _ = made_up()
    noise, values, variance = normal(size).tolist(), [], first**2
    for z in noise:
        values.append(5.0 + math.sqrt(variance) * z)
        variance = 1.5 + 0.6 * (values[-1] - 5.0) ** 2 + 0.3 * variance
    y = of.array(torch.tensor(values, dtype=DOUBLE))

    def model():
        mu = of.sample("mu", of.dist.Normal(0.0, 100.0))
        alpha = flat(of, "alpha", "positive")
        # Share of the last square, of the last variance, and what both leave.
        w = of.sample("w", of.dist.Dirichlet(of.ops.ones(3)))

        def step(variance, value):
            return alpha + w[0] * (value - mu) ** 2 + w[1] * variance

        start = first**2 + 0.0 * mu
        rest = of.scan(step, start, y[:-1])
        variances = of.ops.concatenate([start[None], rest])
        with of.plate("times", size):
            of.sample("y", of.dist.Normal(mu, variances**0.5), obs=y)

    return model


def hmm(of, size=100):
    normal, uniform = made_up()
    stay, states = (0.7, 0.8), [0]
    for u in uniform(size - 1).tolist():
        last = states[-1]
        states.append(last if u < stay[last] else 1 - last)
    y = of.array(torch.tensor([3.0, 9.0], dtype=DOUBLE)[states] + normal(size))

    def model():
        prior = of.dist.Dirichlet(of.ops.ones(2))
        rows = [of.sample(f"row{k}", prior) for k in (1, 2)]
        mu = flat(of, "mu", "positive_ordered_vector", 2)
        of.factor(
            "prior", of.dist.Normal(of.array([3.0, 10.0]), 1.0).log_prob(mu).sum()
        )
        step_logits = of.ops.log(of.ops.stack(rows))
        logits = of.dist.Normal(mu, 1.0).log_prob(y[:, None])

        def step(message, emitted):
            return of.logsumexp(message[:, None] + step_logits, 0) + emitted

        last = of.scan(step, logits[0], logits[1:])[-1]
        of.factor("y", of.logsumexp(last, 0))

    return model


def gp_pois(of, size=11):
    normal, _ = made_up()
    grid = torch.linspace(-10.0, 10.0, size, dtype=DOUBLE)
    noise = normal(size)
    x, eye = of.array(grid), of.ops.eye(size)

    def factor(ops, x, eye, rho, alpha):
        squares = ((x[:, None] - x) / rho) ** 2
        return ops.linalg.cholesky(alpha**2 * ops.exp(-squares / 2) + 1e-10 * eye)

    root = factor(torch, grid, torch.eye(size, dtype=DOUBLE), 5.5, 1.5)
    y = of.array((1.5 + root @ noise).exp().round())

    def model():
        rho = of.sample("rho", of.dist.Gamma(25.0, 4.0))
        alpha = of.sample("alpha", of.dist.HalfNormal(2.0))
        prior = of.dist.Normal(of.ops.zeros(size), 1.0).to_event(1)
        z = of.sample("z", prior)
        rate = of.ops.exp(factor(of.ops, x, eye, rho, alpha) @ z)
        of.sample("y", of.dist.Poisson(rate).to_event(1), obs=y)

    return model


def earnings(of):
    data = load("earnings")
    height, male = data["height"], data["male"]
    x = of.array(with_intercept(height, male, height * male))
    y = of.array(data["earn"].log())

    def model():
        beta = flat(of, "beta", "real_vector", 4)
        sigma = flat(of, "sigma", "positive")
        with of.plate("rows", len(y)):
            of.sample("y", of.dist.Normal(x @ beta, sigma), obs=y)

    return model


def irt_2pl(of, items=20, persons=100):
    normal, uniform = made_up()
    slope, shift = (normal(items, 1) / 2).exp(), 1.0 + normal(items, 1)
    chance = (slope * (normal(persons) - shift)).sigmoid()
    y = of.array((uniform(items, persons) < chance).double())

    def model():
        sd_ability = of.sample("sd_ability", of.dist.HalfCauchy(2.0))
        sd_slope = of.sample("sd_slope", of.dist.HalfCauchy(2.0))
        middle = of.sample("middle", of.dist.Normal(0.0, 5.0))
        sd_shift = of.sample("sd_shift", of.dist.HalfCauchy(2.0))
        rows = of.plate("items", items, dim=-2)
        columns = of.plate("persons", persons, dim=-1)
        with columns:
            ability = of.sample("ability", of.dist.Normal(0.0, sd_ability))
        with rows:
            slope = of.sample("slope", of.dist.LogNormal(0.0, sd_slope))
            shift = of.sample("shift", of.dist.Normal(middle, sd_shift))
        with rows, columns:
            logits = slope * (ability - shift)
            of.sample("y", of.dist.Bernoulli(logits=logits), obs=y)

    return model


def mixture(of, size=1000):
    normal, uniform = made_up()
    is_second = uniform(size) > 0.4
    means, scales = torch.where(is_second, 2.8, -2.8), torch.where(is_second, 0.7, 1.0)
    y = of.array(means + scales * normal(size))

    def model():
        mu = flat(of, "mu", "ordered_vector", 2)
        of.factor("prior", of.dist.Normal(0.0, 2.0).log_prob(mu).sum())
        scale = of.dist.HalfNormal(2.0 * of.ops.ones(2)).to_event(1)
        sigma = of.sample("sigma", scale)
        theta = of.sample("theta", of.dist.Beta(5.0, 5.0))
        weights = of.dist.Categorical(of.ops.stack([theta, 1 - theta]))
        parts = of.dist.Normal(mu, sigma)
        with of.plate("rows", size):
            of.sample("y", of.dist.MixtureSameFamily(weights, parts), obs=y)

    return model


def logistic(of):
    x, y = map(of.array, WORKLOADS["logistic"]().args)

    def model():
        prior = of.dist.Normal(of.ops.zeros(x.shape[1]), 1.0).to_event(1)
        w = of.sample("w", prior)
        with of.plate("rows", len(y)):
            of.sample("y", of.dist.Bernoulli(logits=x @ w), obs=y)

    return model


def neural(of, units=8, noise=0.1):
    x, y = map(of.array, WORKLOADS["neural"]().args)

    def model():
        prior = of.dist.Normal(of.ops.zeros(3 * units + 1), 1.0).to_event(1)
        w = of.sample("w", prior)
        slope, shift, out = (w[k * units : (k + 1) * units, None] for k in range(3))
        mean = (out * of.ops.tanh(2 * slope * x + 2 * shift)).sum(0) + w[-1]
        with of.plate("rows", len(y)):
            of.sample("y", of.dist.Normal(mean, noise), obs=y)

    return model


def predictions(draws):
    return {"predictions": WORKLOADS["neural"]().quantities(draws["w"])}


MODELS = {
    "eight_schools": PeerModel(eight_schools),
    "arK": PeerModel(ark),
    "garch11": PeerModel(garch11),
    "hmm": PeerModel(hmm),
    "gp_pois": PeerModel(gp_pois, is_double=True),
    "earnings": PeerModel(earnings),
    "irt_2pl": PeerModel(irt_2pl),
    "mixture": PeerModel(mixture),
    "logistic": PeerModel(logistic),
    "neural": PeerModel(neural, predictions),
}
