"""Nested sampling by dynesty on a Pyro model, or on an energy with a base.

Each number of the prior is a quantile of a uniform one. Where a distribution of torch
has no quantile function, SciPy's maps the numbers beforehand, so that its parameters
must not depend on other latent sites; what has none there either is not run.
"""

import time
import warnings
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

BY_TORCH = (
    dist.Cauchy,
    dist.Exponential,
    dist.HalfCauchy,
    dist.HalfNormal,
    dist.Laplace,
    dist.LogNormal,
    dist.Normal,
    dist.Uniform,
)


class NestedRun(NamedTuple):
    value: float
    std_error: float
    num_calls: int
    seconds: float
    note: str = ""


class NotRun(Exception):
    """Why dynesty was not run."""


def nested_sampling(target, base, seed, *, num_live=500, max_calls=1_000_000):
    """Run dynesty's defaults in double precision; CPU seconds without tracing.

    Raises:
        NotRun: If dynesty is missing, or the prior has no transform from the cube.
    """
    try:
        import dynesty
    except ImportError:
        raise NotRun("not installed: pip install 'pyro-ebm[bench]'") from None

    log_likelihood, transform, dim = on_unit_cube(target, base)
    start = time.process_time()
    sampler = dynesty.NestedSampler(
        log_likelihood,
        transform,
        dim,
        nlive=num_live,
        rstate=np.random.default_rng(seed),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler.run_nested(print_progress=False, maxcall=max_calls)
    results, seconds = sampler.results, time.process_time() - start
    num_calls = int(np.sum(results.ncall))
    note = f"stopped after {num_calls:,} calls" if num_calls >= max_calls else ""
    logz, error = float(results.logz[-1]), float(results.logzerr[-1])
    return NestedRun(logz, error, num_calls, seconds, note)


def on_unit_cube(target, base):
    """Log likelihood and transform for dynesty, and the number of dimensions."""
    model = target if base is None else as_model(target, base)
    sites = latent_sites(model)
    transform, dim = prior_transform(sites)

    def log_likelihood(v):
        with Quantiles(v), pyro.validation_enabled(False):
            trace = poutine.trace(model).get_trace()
        trace.compute_log_prob()
        seen = [node for node in trace.nodes.values() if is_seen(node)]
        return sum((node["log_prob"].sum() for node in seen), v.new_zeros(()))

    example = torch.as_tensor(transform(np.full(dim, 0.4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(log_likelihood, example, check_trace=False)
    for _ in range(3):  # torch optimises a trace while it first runs
        traced(example)

    def call(v):
        value = traced(torch.from_numpy(v)).item()
        return value if np.isfinite(value) else -1e300  # dynesty takes no infinity

    return call, transform, dim


def as_model(energy, base):
    """An energy as likelihood relative to its base."""

    def model():
        x = pyro.sample("x", base)
        pyro.factor("likelihood", -energy(x) - base.log_prob(x))

    return model


class Quantiles(Messenger):
    """Give latent sites their values from a vector, in order of appearance."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.used = numbers, 0

    def _pyro_sample(self, msg):
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        fn = msg["fn"]
        shape = fn.shape()
        part = self.numbers[self.used : self.used + shape.numel()].reshape(shape)
        self.used += shape.numel()
        kind = bare(fn)
        msg["value"] = kind.icdf(part) if isinstance(kind, BY_TORCH) else part
        msg["done"] = True


def bare(fn):
    """The distribution of single numbers below the wrappers of a site."""
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = getattr(fn, "base_dist", fn)
    return fn


def is_latent(node):
    return (
        node["type"] == "sample"
        and not node["is_observed"]
        and not site_is_subsample(node)
    )


def is_seen(node):
    return node["type"] == "sample" and node["is_observed"]


def latent_sites(model):
    """Name and node of each latent site, checked for what cannot be done."""
    first, second = (poutine.trace(model).get_trace().nodes for _ in range(2))
    sites = []
    for name, node in first.items():
        if not is_latent(node):
            continue
        kind, again = bare(node["fn"]), bare(second[name]["fn"])
        if isinstance(node["fn"], dist.MaskedDistribution) or name.endswith(
            "_unobserved"
        ):
            raise NotRun(f"{name} is masked")
        if not isinstance(kind, BY_TORCH) and scipy_quantile(kind) is None:
            raise NotRun(f"no quantiles of {type(kind).__name__}")
        if not isinstance(kind, BY_TORCH) and parameters(kind) != parameters(again):
            raise NotRun(f"no quantiles of {name}, which depends on other sites")
        sites.append((name, node))
    return sites


def parameters(fn):
    """The parameters of a distribution, in a form that compares."""
    return [getattr(fn, name).tolist() for name in sorted(fn.arg_constraints)]


def scipy_quantile(fn):
    """A function from uniform numbers to a site's values, or ``None``."""
    from scipy import special, stats

    if isinstance(fn, dist.Beta):
        a, b = (t.double().numpy() for t in (fn.concentration1, fn.concentration0))
        return lambda u: stats.beta.ppf(u, a, b)
    if isinstance(fn, dist.Gamma):
        a, rate = (t.double().numpy() for t in (fn.concentration, fn.rate))
        return lambda u: special.gammaincinv(a, u) / rate
    if isinstance(fn, dist.StudentT):
        df, loc, scale = (t.double().numpy() for t in (fn.df, fn.loc, fn.scale))
        return lambda u: stats.t.ppf(u, df, loc, scale)
    if isinstance(fn, dist.Dirichlet):
        a = fn.concentration.double().numpy()

        def quantile(u):
            gamma = special.gammaincinv(a, u)
            return gamma / gamma.sum(-1, keepdims=True)

        return quantile
    return None


def prior_transform(sites):
    """What dynesty calls with a point of the cube, and the dimension of that."""
    parts, dim = [], 0
    for _, node in sites:
        shape, kind = node["fn"].shape(), bare(node["fn"])
        quantile = None if isinstance(kind, BY_TORCH) else scipy_quantile(kind)
        parts.append((slice(dim, dim + shape.numel()), tuple(shape), quantile))
        dim += shape.numel()

    def transform(u):
        v = u.copy()
        for part, shape, quantile in parts:
            if quantile is not None:
                v[part] = quantile(u[part].reshape(shape)).flatten()
        return v

    return transform, dim
