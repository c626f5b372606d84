"""The leapfrog step, and an energy that brings its own."""

import pytest
import torch

from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import HMC
from pyro_ebm.mcmc.kernels.leapfrog import leapfrog, trajectory
from pyro_ebm.mcmc.kernels.metric import LowRank, times_scale
from pyro_ebm.testing import CountingEnergy

PRECISION = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
TRIL = torch.tensor([[0.7, 0.0], [-0.3, 1.1]], dtype=torch.float64)
LOW_RANK = LowRank(
    torch.tensor([0.7, 1.1], dtype=torch.float64),
    torch.tensor([[0.6], [0.8]], dtype=torch.float64),
    torch.tensor([3.0], dtype=torch.float64),
)
FACTORS = pytest.mark.parametrize(
    "factor", [None, TRIL, LOW_RANK], ids=["none", "dense", "low-rank"]
)


def quadratic():
    return QuadraticEnergy(torch.tensor([1.0, -1.0]), PRECISION)


class Fused(QuadraticEnergy):
    """Counts its own steps, which are the usual ones."""

    num_steps = 0

    def leapfrog(self, x, r, eps, half, factor):
        self.num_steps += 1
        plain = FunctionEnergy(self.forward, (2,))
        return leapfrog(plain, x, r, eps, half, factor)


@FACTORS
@pytest.mark.parametrize("half", [0.5, 1.0])
def test_step_is_that_of_the_equations(factor, half):
    x, r, eps = torch.randn(5, 2), torch.randn(5, 2), torch.rand(5, 2)
    scale = times_scale(torch.eye(2), factor).mT
    energy = quadratic()
    x_new, value, grad, r_new = leapfrog(energy, x, r, eps, half, factor)
    want = x + eps * (scale @ r[..., None])[..., 0]
    torch.testing.assert_close(x_new, want)
    torch.testing.assert_close((value, grad), energy.value_and_grad(want))
    force = (scale.mT @ grad[..., None])[..., 0]
    torch.testing.assert_close(r_new, r - half * eps * force)


@FACTORS
def test_a_trajectory_comes_back_when_its_momentum_is_turned(factor, monkeypatch):
    energy, eps = quadratic(), torch.full((7, 2), 0.1)
    start = HMC().init(energy, torch.randn(7, 2))
    there = trajectory(energy, start, eps, 20, factor)
    assert (there.end.x - start.x).norm(dim=-1).min() > 0.1
    monkeypatch.setattr(torch, "randn_like", lambda _: -there.momentum)
    back = trajectory(energy, there.end, eps, 20, factor)
    torch.testing.assert_close(back.end, start)
    torch.testing.assert_close(back.log_ratio, -there.log_ratio, atol=1e-10, rtol=0.0)


@pytest.mark.parametrize("num_leapfrog", [1, 2, 7])
def test_a_trajectory_costs_a_gradient_a_step(num_leapfrog):
    energy = CountingEnergy(quadratic())
    start = HMC().init(energy, torch.randn(7, 2))
    energy.reset()
    trajectory(energy, start, torch.full((7, 2), 0.1), num_leapfrog)
    assert (energy.num_gradients, energy.num_values) == (7 * num_leapfrog, 0)


@pytest.mark.parametrize("setting", [{}, {"scale_tril": TRIL}, {"low_rank": LOW_RANK}])
def test_an_energy_may_bring_its_own_step(setting):
    fused, plain = Fused(torch.tensor([1.0, -1.0]), PRECISION), quadratic()
    kernel = HMC(step_size=0.3, num_leapfrog=4, **setting)
    x, results = torch.randn(6, 2), []
    for energy in (fused, plain):
        torch.manual_seed(1)
        results.append(kernel.step(energy, kernel.init(energy, x))[0])
    assert fused.num_steps == 4
    torch.testing.assert_close(*results)
