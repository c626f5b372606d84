"""What the samplers are measured on, for torch, for Pyro and for JAX.

* ring: two dimensions, radius 2, width 0.2, with a gap to either side;
* network: an energy 2-128-128-1 with SiLU, over a wide Gaussian;
* gaussian10, gaussian100: standard deviations from 1 down to 0.0316, condition number
  1,000, axes turned at random, so that no diagonal metric helps much;
* eight_schools: Rubin's data, non-centred, standard deviation half-Cauchy(5);
* logistic: 1,000 rows, 25 columns, one of them constant; made-up data;
* neural: a regression by eight tanh units on 50 points of one input; judged by its
  predictions, as its weights have symmetries.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.energies import Energy, FunctionEnergy, PyroModelEnergy


class Workload(NamedTuple):
    """A target in three languages.

    ``target`` is an energy or, with ``args``, a Pyro model; ``jax_energy`` makes the
    same energy of one unconstrained point, up to a constant, from ``jax.numpy``.
    ``quantities`` maps unconstrained points ``(..., D)`` to what is judged.
    """

    target: Any
    args: tuple[Any, ...] = ()
    jax_energy: Callable[[Any], Callable[[Any], Any]] | None = None
    quantities: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def energy(self) -> Energy:
        """An energy of unconstrained points; for a model, newly traced."""
        if isinstance(self.target, Energy):
            return self.target
        return PyroModelEnergy(self.target, *self.args)


def ring():
    def energy(x):
        radius = x.square().sum(-1).sqrt()
        gaps = 4 * torch.exp(-((x[..., 1] / 0.5) ** 2))
        return (radius - 2) ** 2 / (2 * 0.2**2) + gaps

    return Workload(FunctionEnergy(energy, (2,)))


class Network(nn.Sequential):
    """A plain module, whose gradient comes from autograd."""

    def forward(self, x):
        return super().forward(x).squeeze(-1) + x.square().sum(-1) / 8


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
        return Workload(FunctionEnergy(Network(*layers, nn.Linear(128, 1)), (2,)))


def gaussian(dim):
    sd = torch.logspace(0, -1.5, dim, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    axes, _ = torch.linalg.qr(axes)
    precision = (axes / sd.square()) @ axes.T
    constant = precision.to(torch.get_default_dtype())

    def jax_energy(jnp):
        matrix = jnp.asarray(precision.numpy())
        return lambda x: ((x @ matrix) * x).sum(-1) / 2

    return Workload(
        FunctionEnergy(lambda x: ((x @ constant) * x).sum(-1) / 2, (dim,)),
        jax_energy=jax_energy,
    )


SCHOOLS = (
    (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0),
    (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0),
)


def eight_schools():
    def model(y, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    def jax_energy(jnp):
        y, sigma = (jnp.asarray(values) for values in SCHOOLS)

        def energy(u):
            mu, log_tau, z = u[0], u[1], u[2:]
            tau = jnp.exp(log_tau)
            prior = (mu / 5) ** 2 / 2 + jnp.log1p((tau / 5) ** 2) - log_tau
            residual = (y - mu - tau * z) / sigma
            return prior + (z**2).sum() / 2 + (residual**2).sum() / 2

        return energy

    return Workload(model, tuple(map(torch.tensor, SCHOOLS)), jax_energy)


def logistic(num_rows=1000, num_columns=25):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, num_columns, generator=generator)
    x = x + 0.5 * x.roll(1, -1)  # correlated
    x[:, 0] = 1.0
    w = torch.randn(num_columns, generator=generator) / math.sqrt(num_columns)
    y = (torch.rand(num_rows, generator=generator) < (x @ w).sigmoid()).to(x.dtype)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    def jax_energy(jnp):
        rows, signs = jnp.asarray(x.numpy()), jnp.asarray(2 * y.numpy() - 1)
        return lambda w: (w**2).sum() / 2 + jnp.logaddexp(0, -signs * (rows @ w)).sum()

    return Workload(model, (x, y), jax_energy)


def neural(num_units=8, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(50, generator=generator) - 2
    y = (2 * x).sin() / 2 + noise * torch.randn(50, generator=generator)

    def predict(w, x, tanh):
        """Predictions (..., N) at x from weights (..., 3 * num_units + 1)."""
        slope, shift, out = (
            w[..., k * num_units : (k + 1) * num_units, None] for k in range(3)
        )
        return (out * tanh(2 * slope * x + 2 * shift)).sum(-2) + w[..., -1:]

    def model(x, y):
        zeros = torch.zeros(3 * num_units + 1)
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(predict(w, x, torch.tanh), noise), obs=y)

    def jax_energy(jnp):
        inputs, outputs = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

        def energy(w):
            residual = (outputs - predict(w, inputs, jnp.tanh)) / noise
            return (w**2).sum() / 2 + (residual**2).sum() / 2

        return energy

    grid = torch.linspace(-2, 2, 9)
    return Workload(
        model, (x, y), jax_energy, lambda w: predict(w, grid.to(w), torch.tanh)
    )


WORKLOADS = {
    "ring": ring,
    "network": network,
    "gaussian10": lambda: gaussian(10),
    "gaussian100": lambda: gaussian(100),
    "eight_schools": eight_schools,
    "logistic": logistic,
    "neural": neural,
}
