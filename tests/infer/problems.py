"""Energies, noise and a solver that several tests of the estimators share."""

import functools

import pyro.distributions as dist
import torch
from torch import nn

from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.infer import ObjectiveLoss
from pyro_ebm.testing.grid import GridDensity

THETA = torch.tensor([0.3, 0.2], dtype=torch.float64)


class Quartic(nn.Module):
    """f = sum_s a_s x_s + b_s x_s^2 + x_s^4 / 4: an exponential family, normalised for
    any (a, b), in as many dimensions as there are pairs of them."""

    def __init__(self, theta=THETA):
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x):
        terms = self.theta[..., 0] * x + self.theta[..., 1] * x**2 + x**4 / 4
        return terms.sum(-1) if self.theta.dim() > 1 else terms


def quartic_energy(theta=THETA):
    return FunctionEnergy(Quartic(theta), theta.shape[:-1])


@functools.cache
def quartic_density():
    a, b = THETA.tolist()
    return GridDensity(lambda t: -(a * t + b * t**2 + t**4 / 4), -7, 7)


class GammaEnergy(nn.Module):
    def __init__(self, concentration, rate):
        super().__init__()
        self.concentration = nn.Parameter(torch.tensor(concentration))
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, x):
        return self.rate * x - (self.concentration - 1) * x.log()


class Affine(nn.Module):
    """The least of all flows."""

    def __init__(self, event=(2,), start=0.0):
        super().__init__()
        self.loc = nn.Parameter(torch.full(event, start))
        self.log_scale = nn.Parameter(torch.zeros(event))

    def forward(self):
        normal = dist.Normal(self.loc, self.log_scale.exp())
        return normal.to_event(self.loc.dim())


def wide():
    """Noise wider than the quartic."""
    return dist.Normal(torch.tensor(0.0), 1.2)


def base(event=(2,)):
    return dist.Normal(torch.zeros(event), 1.5).to_event(len(event))


def solve(energy, objective, data, seed):
    """Fit by a solver of torch, with the same random numbers at each evaluation."""
    loss = ObjectiveLoss(energy, objective)
    solver = torch.optim.LBFGS(
        [p for p in loss.parameters() if p.requires_grad],
        max_iter=60,
        tolerance_grad=1e-8,
        line_search_fn="strong_wolfe",
    )

    def closure():
        torch.manual_seed(seed)
        solver.zero_grad()
        value = loss(data)
        value.backward()
        return value

    solver.step(closure)
    return loss.state
