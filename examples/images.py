"""An energy of images: what a network adds to a density of 64 pixels, and its draws.

Pixels of scikit-learn's digits have 17 levels. Uniform noise makes them continuous, a
logit makes them real numbers, and a convolutional network corrects the density that is
fitted to them first. Its held-out likelihood is set beside that density's and beside a
single Gaussian's; log Z is estimated from both sides, by draws of the base and of the
model; and draws are shown beside digits. Takes about two minutes.
"""

# %%
import argparse

import pyro
import torch
from sklearn.datasets import load_digits

import pyro_ebm
from pyro_ebm.infer import log_likelihood, log_likelihood_difference

torch.set_num_threads(1)  # a second thread only slows so small a network down


# %% Real numbers from counts, and back.
def load_data():
    counts = torch.tensor(load_digits().data, dtype=torch.float32)
    share = (counts + torch.rand_like(counts)) / 17
    images = (0.01 + 0.98 * share).logit().reshape(-1, 1, 8, 8)
    return images[torch.randperm(len(images))].split([1500, 297])


def to_pixels(images):
    return ((images.sigmoid() - 0.01) / 0.98).clamp(0, 1)


# %% One call: a base, then the network as its correction.
def learn(train, channels=(16, 32), **settings):
    energy = pyro_ebm.energies.ConvolutionalEnergy((1, 8, 8), channels)
    model = pyro_ebm.EnergyModel(energy)
    return model, pyro_ebm.fit(model, train, **settings)


# %% Against the base, and against the Gaussian that everybody knows.
def compare(model, result, train, test):
    def of(density):
        energy = pyro_ebm.energies.DistributionEnergy(density)
        return pyro_ebm.EnergyDistribution(energy)

    gaussian = of(pyro_ebm.bases.normal(train))
    over_base = log_likelihood_difference(result.distribution, of(model.base), test)
    over_gaussian = log_likelihood_difference(result.distribution, gaussian, test)
    print(f"test: {log_likelihood(result.distribution, test)} nats an image")
    print(f"      over its base {over_base}\n      over a Gaussian {over_gaussian}")
    return over_gaussian


# %% Draws; energy distance to images that were not learned.
def energy_distance(x, y):
    x, y = x.flatten(1), y.flatten(1)
    within = sum(torch.cdist(z, z).sum() / len(z) / (len(z) - 1) for z in (x, y))
    return (2 * torch.cdist(x, y).mean() - within).item()


def show(draws, test, path):
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, 1, figsize=(8, 3))
    for axis, images, title in zip(rows, (draws, test), ("model", "data"), strict=True):
        tiles = to_pixels(images[:32]).reshape(2, 16, 8, 8).permute(0, 2, 1, 3)
        axis.imshow(tiles.reshape(16, 128), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(seed=0, picture=None, num_rows=1500, num_draws=200, **settings):
    pyro.set_rng_seed(seed)
    train, test = load_data()
    train = train[:num_rows]
    model, result = learn(train, **settings)
    print(result)
    gain = compare(model, result, train, test)
    # From weighted draws of the base, or by chains where too few of them count.
    energy = result.distribution.energy
    draws, found = pyro_ebm.mcmc.ImportanceResampling(model.base).draw_diagnosed(
        energy, num_draws
    )
    print(f"draws by {found.method} [{found.status}]")
    both = pyro_ebm.partition.bridge_sampling(
        energy,
        draws,
        proposal=model.base,
        num_proposal_draws=100 * num_draws,
        progress_bar=False,
    )
    print(f"log Z by draws of base and model {both}")
    print(
        f"energy distance of draws to test images {energy_distance(draws, test):.3f}, "
        f"of training images {energy_distance(train[:num_draws], test):.3f}"
    )
    if picture is not None:
        show(draws, test, picture)
    return result, gain, both


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.smoke_test:
        few = {"num_rows": 100, "num_draws": 50, "channels": (2, 4)}
        main(options.seed, **few, num_steps=5, max_seconds=3)
    else:
        main(options.seed, "images.png")
