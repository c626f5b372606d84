"""Combine what was learned apart: and, or, not, and more of it.

In the plane a learned network meets a ring, and quadrature is the referee. On digits a
density meets two classifiers, "has a loop" and "leans", and the referee counts labels.
"""

# %%
import argparse
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import softplus

import pyro_ebm
from pyro_ebm import EnergyDistribution, EnergyModel, partition, plots
from pyro_ebm.datasets import two_moons
from pyro_ebm.distributions import MixtureOfExperts
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy

torch.set_num_threads(1)  # a second thread only slows so small a network down


# %% Two concepts in the plane, each with its log Z: one fitted, one by quadrature.
def combine_in_the_plane(num_steps):
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    model = EnergyModel(NeuralEnergy((2,), (32, 32), base=base), base)
    data, optim = 1.5 * two_moons(2000), pyro.optim.Adam({"lr": 5e-3})
    moons = pyro_ebm.fit(model, data, num_steps=num_steps, optim=optim).distribution
    energy = FunctionEnergy(lambda x: 12 * (x.norm(dim=-1) - 1.2) ** 2, (2,))
    ring = EnergyDistribution(energy, partition.estimate(energy))
    return {
        "moons": moons,
        "ring": ring,
        "moons and ring": moons * ring,
        "moons or ring": MixtureOfExperts([moons, ring]),  # which needs both log Z
        "ring, not moons": ring / moons**0.2,
        "more of moons": moons**3,
    }


# %% The share of draws in wrong cells of a board, by quadrature; and of exact draws.
def compare_with_quadrature(q, draws):
    line = torch.arange(-4, 4, 0.025) + 0.0125  # 20 x 20 points in each of 256 cells
    mass = q.log_prob(torch.cartesian_prod(line, line)).detach().softmax(0)
    mass = mass.reshape(16, 20, 16, 20).sum((1, 3)).flatten()
    row, column = ((draws + 4) * 2).long().clamp(0, 15).unbind(-1)
    exact = torch.multinomial(mass, len(draws), replacement=True)
    counts = (cells.bincount(minlength=256) for cells in (16 * row + column, exact))
    return [(c / len(draws) - mass).abs().sum().item() / 2 for c in counts]


# %% Digits as 20 principal components. Their density is an "or" of ten Gaussians; the
# energy of a concept is minus the log-probability that a classifier gives it.
def combine_digits():
    bunch, side = load_digits(), torch.arange(8.0) - 3.5
    slant = side @ torch.tensor(bunch.images).to(side) @ side
    digits, leans = torch.tensor(bunch.target), slant < slant.median()
    has_loop = torch.isin(digits, torch.tensor([0, 6, 8, 9]))
    learn, test = torch.randperm(len(digits)).split([1200, 597])
    pca = PCA(20, whiten=True).fit(bunch.data[learn.cpu()])
    x = torch.tensor(pca.transform(bunch.data)).to(side)

    def learn_concept(label):
        found = LogisticRegression().fit(x[learn].cpu(), label[learn].cpu())
        weight, bias = torch.tensor(found.coef_[0]).to(x), float(found.intercept_[0])
        return FunctionEnergy(lambda x: softplus(-(x @ weight + bias)), (20,))

    parts = [x[learn][digits[learn] == k] for k in range(10)]
    ridge = 0.05 * torch.eye(20)
    gaussians = [dist.MultivariateNormal(p.mean(0), p.T.cov() + ridge) for p in parts]
    anything = MixtureOfExperts(gaussians, [len(p) / 1200 for p in parts])
    both = anything * learn_concept(has_loop) * learn_concept(leans)
    return anything, both, x[test], (has_loop & leans)[test].to(x), pca


# %% One figure, and the probability of both concepts: it is the Z of their product with
# a normalised density, and the share of digits that have both labels.
def main(seed, output, num_steps=800, num_draws=1000):
    pyro.set_rng_seed(seed)
    plane = combine_in_the_plane(num_steps)
    mosaic = [[*plane][:3], [*plane][3:], ["anything"] * 3, ["both"] * 3]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(9, 9), layout="constrained")
    for name, q in plane.items():
        draws = q.sample((num_draws,))
        plots.density(q, [(-4, 4)] * 2, axes[name], samples=draws[:200])
        off, exact = compare_with_quadrature(q, draws)
        print(f"{name}: {off:.3f} of draws in a wrong cell, of exact ones {exact:.3f}")
    anything, both, test, truth, pca = combine_digits()
    for name, q in {"anything": anything, "both": both}.items():
        draws = q.sample((max(32, num_draws // 4),))
        share = truth[torch.cdist(draws, test).argmin(-1)].mean()
        print(f"{name}: the nearest digit has a loop and leans in {share:.0%} of draws")
        rows = pca.inverse_transform(draws[:32].cpu()).reshape(2, 16, 8, 8)
        axes[name].imshow(rows.swapaxes(1, 2).reshape(16, 128), cmap="gray_r", vmin=0)
    for name, ax in axes.items():
        ax.set(title=name, xticks=[], yticks=[])
    figure.savefig(output, dpi=150)
    share = math.exp(partition.estimate(both, anything, "importance").value)
    counted, error = truth.mean().item(), truth.std().item() / len(truth) ** 0.5
    print(f"both: {share:.3f} by log Z, {counted:.3f} +- {error:.3f} of the digits")
    return share, counted, error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda")
    parser.add_argument("--output", default="combined.png", help="the picture")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    quick = {"num_steps": 20, "num_draws": 100} if options.smoke_test else {}
    main(options.seed, options.output, **quick)
