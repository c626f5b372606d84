"""The Ising model over temperature: energy, heat capacity and magnetisation.

Small tori are summed exactly, and Kaufman's formula is the referee; larger ones are
drawn by Gibbs sampling, beside what Onsager and Yang found for an infinite lattice.
"""

# %%
import argparse
import math

import pyro
import torch

from pyro_ebm.energies import IsingEnergy
from pyro_ebm.mcmc import Gibbs
from pyro_ebm.testing.finite_targets import ISING_CRITICAL, kaufman

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


# %% Moments of the energy are derivatives of log Z in the coupling K, or 1 / T.
def exact(side, coupling):
    K = torch.tensor(coupling, requires_grad=True)
    log_partition = IsingEnergy((side, side), K).closed_form().log_partition
    (bonds,) = torch.autograd.grad(log_partition, K, create_graph=True)
    (variance,) = torch.autograd.grad(bonds, K)
    sites = side**2
    return -bonds.item() / sites, coupling**2 * variance.item() / sites


def by_kaufman(side, coupling, step=1e-3):
    low, mid, high = (kaufman(side, side, coupling + d) for d in (-step, 0.0, step))
    curvature = (high - 2 * mid + low) / step**2
    return -(high - low) / (2 * step) / side**2, coupling**2 * curvature / side**2


# %% Chains from all spins up, as a large torus below the critical temperature has one
# of two signs for a very long time.
def by_gibbs(side, coupling, num_sweeps, num_chains=32):
    energy = IsingEnergy((side, side), coupling)
    x = torch.ones(num_chains, side, side)
    if coupling < ISING_CRITICAL:
        x = 2.0 * torch.randint(2, x.shape) - 1
    kernel, found = Gibbs(), []
    state = kernel.init(energy, x)
    for sweep in range(num_sweeps):
        state, _ = kernel.step(energy, state)
        if sweep >= num_sweeps // 3:
            found.append((state.energy / coupling, state.x.mean((-2, -1)).abs()))
    per_site, magnetisation = (torch.stack(part) for part in zip(*found, strict=True))
    capacity = coupling**2 * per_site.var() / side**2
    return (
        (per_site.mean() / side**2).item(),
        capacity.item(),
        magnetisation.mean().item(),
    )


# %% Onsager (1944) for the energy, Yang (1952) for the magnetisation.
def onsager(K):
    k = 2 * math.sinh(2 * K) / math.cosh(2 * K) ** 2
    angle = (torch.arange(4000) + 0.5) * math.pi / 8000
    elliptic = (1 - (k * angle.sin()) ** 2).rsqrt().mean().item() * math.pi / 2
    tanh = math.tanh(2 * K)
    energy = -(1 + (2 / math.pi) * (2 * tanh**2 - 1) * elliptic) / tanh
    inside = 1 - math.sinh(2 * K) ** -4
    return energy, max(inside, 0.0) ** 0.125


# %%
def main(side, large, num_sweeps):
    pyro.set_rng_seed(0)
    print(f"torus of {side} x {side}, exact; in brackets what Kaufman's formula says")
    worst = 0.0
    for temperature in (1.5, 2.0, 1 / ISING_CRITICAL, 2.5, 3.5):
        found = exact(side, 1 / temperature)
        truth = by_kaufman(side, 1 / temperature)
        row = (f"{a:8.5f} [{b:8.5f}]" for a, b in zip(found, truth, strict=True))
        print(f"T = {temperature:.3f}: energy, heat capacity a site", *row)
        worst = max(worst, *(abs(a - b) for a, b in zip(found, truth, strict=True)))
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-4  # that of finite differences of the formula
    print(f"torus of {large} x {large} by Gibbs; in brackets an infinite lattice")
    for temperature in (1.8, 2.1, 2.6, 3.2):
        energy, capacity, size = by_gibbs(large, 1 / temperature, num_sweeps)
        e, m = onsager(1 / temperature)
        print(
            f"T = {temperature:.1f}: energy {energy:.4f} [{e:.4f}], heat capacity "
            f"{capacity:.3f}, magnetisation {size:.3f} [{m:.3f}]"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    main(*((4, 8, 30) if args.smoke_test else (8, 32, 600)))
