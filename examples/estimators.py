"""Which estimator? All get the same CPU time, and quadrature says what was learned.

Two moons made of 128 narrow Gaussians, so that their density is known; an energy that
is a network over a wide Gaussian. The divergence of what was learned from the truth is
an integral in the plane, and so is log Z: neither is estimated.
"""

# %%
import argparse
import math
import time
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_ebm import EnergyDistribution, infer, partition, plots
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import NeuralEnergy
from pyro_ebm.mcmc import IndependentChains

torch.set_num_threads(1)  # a second thread only slows so small a network down


# %% A trained Gaussian, for the estimator that wants a flow; and all estimators.
class LearnedGaussian(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.loc = nn.Parameter(base.mean)
        self.log_scale = nn.Parameter(base.stddev.log())

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def list_estimators(base):
    generator = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 2))
    return [
        [infer.ExactMaximumLikelihood(num_nodes=101)],
        [infer.ImportanceSampledLikelihood(base)],
        [infer.BoundedLikelihood(base)],
        [infer.NoiseContrastive(base)],
        [infer.RankingNoiseContrastive(base)],
        [infer.FlowContrastive(LearnedGaussian(base))],
        [infer.MaximumLikelihood()],
        [infer.TemperedMaximumLikelihood(base)],
        [infer.ContrastiveDivergence(num_steps=10)],
        [infer.EnergyDiscrepancy()],
        [infer.DenoisingScoreMatching()],
        [infer.ScoreMatching()],
        [infer.SlicedScoreMatching()],
        [infer.AmortizedSampler(generator, (2,))],
        [infer.NoiseContrastive(base), infer.MaximumLikelihood()],  # a warm start
    ]


# %% A plain loop: Adam, at a learning rate that falls to nothing as the time runs out.
def learn(energy, base, objectives, data, seconds):
    model = EnergyDistribution(energy, sampler=IndependentChains(base=base))
    start, used = time.process_time(), 0.0
    for k, objective in enumerate(objectives, start=1):
        state = objective.make_state()
        optim = torch.optim.Adam([*energy.parameters(), *state.parameters()])
        while used < k / len(objectives):
            optim.param_groups[0]["lr"] = 5e-3 * (1 - used)
            optim.zero_grad()
            batch = data[torch.randint(len(data), (256,))]
            objective.loss(model, batch, state).backward()
            optim.step()
            used = (time.process_time() - start) / seconds


# %% A table and a picture; the referee is KL = E[log p] + E[f] + log Z under the truth.
# The known answer: by so much the truth is ahead in log-likelihood on new points.
def main(seed, output, seconds):
    pyro.set_rng_seed(seed)
    warnings.simplefilter("ignore", UnreliableWarning)  # of the grid while learning
    angle = (torch.arange(64) + 0.5) * math.pi / 64
    moon = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
    along = dist.Normal(torch.cat([moon, -moon]), 0.1).to_event(1)
    truth = dist.MixtureSameFamily(dist.Categorical(torch.ones(128)), along)
    data, test = truth.sample((20_000,)).split(10_000)
    line, bounds = torch.arange(-2.5, 2.5, 0.025), [(-2.2, 2.2), (-1.7, 1.7)]
    grid = torch.cartesian_prod(line, line)
    log_p, log_p_test = truth.log_prob(grid), truth.log_prob(test)
    base = dist.Normal(data.mean(0), 1.5 * data.std(0)).to_event(1)
    figure, axes = plt.subplots(4, 4, figsize=(9, 8), layout="constrained")
    panels, found = iter(axes.flat), []
    plots.density(truth, bounds, next(panels)).set_title("the truth")
    for objectives in list_estimators(base):
        name = ", ".join(type(objective).__name__ for objective in objectives)
        energy = NeuralEnergy((2,), (64, 64), base=base)
        learn(energy, base, objectives, data, seconds)
        log_z = partition.quadrature(energy, tolerance=1e-4).value
        with torch.no_grad():
            kl = (log_p.softmax(0) * (log_p + energy(grid) + log_z)).sum().item()
            ahead = log_p_test + energy(test) + log_z
        found.append((kl, ahead.mean().item(), ahead.std().item() / len(ahead) ** 0.5))
        print("KL {:.4f}, on test points {:.4f} +- {:.4f}: ".format(*found[-1]) + name)
        ax = plots.density(EnergyDistribution(energy), bounds, next(panels))
        ax.set_title(name.replace(", ", ",\n") + f"\nKL {kl:.3f}", fontsize=8)
    plt.setp(axes, xticks=[], yticks=[], xlabel="", ylabel="")
    figure.savefig(output, dpi=120)
    print("best: KL {:.4f}, on test points {:.4f} +- {:.4f}".format(*min(found)))
    return min(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda")
    parser.add_argument("--output", default="estimators.png", help="the picture")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    main(options.seed, options.output, seconds=0.02 if options.smoke_test else 8.0)
