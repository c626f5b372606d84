"""Evidence problems on data that others published, from the files in ``data``.

They are as the others here: ``DATA_PROBLEMS`` maps a name to a function of the dtype.
Regressions have ``Normal(0, 10)`` coefficients and ``HalfNormal(10)`` noise, in the
units of the data.
"""

import functools
import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_ebm.testing.grid import log_integral

from .base import EvidenceProblem, log_normal
from .regressions import linear

DATA = Path(__file__).resolve().parents[1] / "data"


@functools.cache
def load(name):
    """The columns of a file in double precision; numbers that are missing are nan."""
    content = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    return {
        key: torch.tensor(
            [math.nan if v is None else v for v in value], dtype=torch.float64
        )
        for key, value in content.items()
        if isinstance(value, list)
    }


def with_intercept(*columns):
    """Columns side by side, behind one of ones."""
    return torch.stack([torch.ones_like(columns[0]), *columns], 1)


def ark(dtype, order=5):
    y = load("arK")["y"]
    lags = [y[order - k - 1 : len(y) - k - 1] for k in range(order)]
    prior = {"noise_prior": "HalfCauchy", "noise_scale": 2.5}
    return linear(with_intercept(*lags), y[order:], dtype, name="ark", **prior)


def sblrc(dtype):
    d = load("sblrc")
    return linear(d["X"], d["y"], dtype, name="sblrc")


def mesquite(dtype):
    d = load("mesquite")
    names = "diam1", "diam2", "canopy_height", "total_height", "density", "group"
    x = with_intercept(*(d[name] for name in names))
    return linear(x, d["weight"], dtype, name="mesquite")


def kidscore_momiq(dtype):
    d = load("kidiq")
    x = with_intercept(d["mom_iq"])
    return linear(x, d["kid_score"], dtype, name="kidscore_momiq")


def kidscore_interaction(dtype):
    d = load("kidiq")
    school, iq = d["mom_hs"], d["mom_iq"]
    x = with_intercept(school, iq, school * iq)
    return linear(x, d["kid_score"], dtype, name="kidscore_interaction")


def earn_height(dtype):
    d = load("earnings")
    return linear(with_intercept(d["height"]), d["earn"], dtype, name="earn_height")


def logearn_height(dtype):
    d = load("earnings")
    x, y = with_intercept(d["height"]), d["earn"].log()
    return linear(x, y, dtype, name="logearn_height")


def nes(dtype):
    d = load("nes1972")
    ages = [(d["age_discrete"] == group).double() for group in (2, 3, 4)]
    others = d["educ1"], d["gender"], d["income"]
    x = with_intercept(d["real_ideo"], d["race_adj"], *ages, *others)
    return linear(x, d["partyid7"], dtype, name="nes")


def brownian(dtype):
    """A Brownian path with unknown scales, not seen in its middle: 32 numbers.

    The path integrates out; the logarithms of the scales are left to quadrature.
    """
    seen = load("brownian")["y"].isfinite()
    y = load("brownian")["y"][seen].to(dtype)
    zero, num_steps = torch.tensor(0.0, dtype=dtype), len(seen)

    def model():
        innovation = pyro.sample("innovation", dist.LogNormal(zero, 2.0))
        observation = pyro.sample("observation", dist.LogNormal(zero, 2.0))
        x = pyro.sample("x_1", dist.Normal(zero, innovation))
        path = [x]
        for step in range(2, num_steps + 1):
            x = pyro.sample(f"x_{step}", dist.Normal(x, innovation))
            path.append(x)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.stack(path)[seen], observation), obs=y)

    times = 1 + torch.arange(num_steps, dtype=torch.float64)[seen]
    eigenvalues, axes = torch.linalg.eigh(torch.minimum(times, times[:, None]))
    along = axes.mT @ y.double()

    def log_joint(innovation, observation):
        wide = (2 * innovation).exp()[..., None] * eigenvalues
        variance = wide + (2 * observation).exp()[..., None]
        data = log_normal(along, 0.0, variance).sum(-1)
        return data + sum(log_normal(t, 0.0, 4.0) for t in (innovation, observation))

    axis = (-12.0, 6.0, 721)
    return EvidenceProblem("brownian", model, None, log_integral(log_joint, axis, axis))


def seeds(dtype):
    """Logistic regression with a random effect for each of 21 plates: 26 numbers.

    The truth is from long runs; ``tests/test_published_problems.py`` has another way.
    """
    r, n, x1, x2 = (load("seeds")[key].to(dtype) for key in ("r", "n", "x1", "x2"))
    x = with_intercept(x1, x2, x1 * x2)
    zero, small = torch.tensor(0.0, dtype=dtype), torch.tensor(0.01, dtype=dtype)

    def model():
        names = "a_0", "a_1", "a_2", "a_12"
        a = [pyro.sample(name, dist.Normal(zero, 10.0)) for name in names]
        tau = pyro.sample("tau", dist.Gamma(small, small))
        with pyro.plate("plates", len(n)):
            b = pyro.sample("b", dist.Normal(zero, tau.rsqrt()))
            logits = x @ torch.stack(a) + b
            pyro.sample("r", dist.Binomial(n, logits=logits), obs=r)

    return EvidenceProblem("seeds", model, None, -73.407, truth_error=0.002)


DATA_PROBLEMS = {
    build.__name__: build
    for build in (
        ark,
        sblrc,
        mesquite,
        kidscore_momiq,
        kidscore_interaction,
        earn_height,
        logearn_height,
        nes,
        brownian,
        seeds,
    )
}
