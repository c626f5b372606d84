"""An energy of images: what a network adds to a density of their pixels, and its draws.

Pixels of scikit-learn's digits have 17 levels. Uniform noise makes them continuous, a
logit makes them real numbers, and a convolutional network corrects the density that is
fitted to them first. Its held-out likelihood is set beside that density's and beside a
single Gaussian's; log Z is estimated from both sides, by draws of the base and of the
model; a generator without a density learns to draw at once; and draws of both are shown
beside digits. Takes about two minutes; ``--size 16`` makes the digits larger first.
"""

# %%
import argparse

import pyro
import torch
from sklearn.datasets import load_digits
from torch import nn

import pyro_ebm
from pyro_ebm.infer import log_likelihood, log_likelihood_difference

torch.set_num_threads(1)  # a second thread only slows so small a network down


# %% Real numbers from counts, and back.
def load_data(size):
    counts = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    counts = nn.functional.interpolate(counts, size=size, mode="bilinear")
    share = (counts + torch.rand_like(counts)) / 17
    images = (0.01 + 0.98 * share).logit()
    return images[torch.randperm(len(images))].split([1500, 297])


def to_pixels(images):
    return ((images.sigmoid() - 0.01) / 0.98).clamp(0, 1)


# %% One call: a base, then the network as its correction.
def learn(train, channels=(16, 32), **settings):
    energy = pyro_ebm.energies.ConvolutionalEnergy(train.shape[1:], channels)
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
    return 2 * torch.cdist(x, y).mean() - within


# %% A generator without a density: one pass of a network, and no chain.
def learn_generator(energy, base, num_steps=2000, num_draws=50_000):
    """Make its draws as near to the model's weighted ones in energy distance."""
    y = base.sample((num_draws,))
    with torch.no_grad():
        parts = [-energy.correction(part) for part in y.split(5000)]
    weights, loc, scale = torch.cat(parts).softmax(0), y.mean(0), y.std(0)
    size = loc.numel()
    layers = [nn.Linear(size, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()]
    network = nn.Sequential(*layers, nn.Linear(256, size), nn.Unflatten(1, loc.shape))
    optim = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_steps)
    for _ in range(num_steps):
        real = (y[torch.multinomial(weights, 256, replacement=True)] - loc) / scale
        loss = energy_distance(network(torch.randn(256, size)), real)
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    network.requires_grad_(requires_grad=False)
    return lambda number: loc + scale * network(torch.randn(number, size))


def show(path, **rows):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.5 * len(rows)))
    for axis, (title, images) in zip(axes, rows.items(), strict=True):
        size = images.shape[-1]
        tiles = to_pixels(images[:32, 0]).reshape(2, 16, size, size)
        tiles = tiles.permute(0, 2, 1, 3).reshape(2 * size, 16 * size)
        axis.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(
    seed=0, size=8, picture=None, num_rows=1500, num_draws=200, passes=2000, **settings
):
    pyro.set_rng_seed(seed)
    train, test = load_data(size)
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
    made = learn_generator(energy, model.base, passes)(num_draws)
    print(f"energy distance of generator to draws {energy_distance(made, draws):.3f}")
    for name, images in (("draws", draws), ("generator", made), ("training", train)):
        near = energy_distance(images[:num_draws], test)
        print(f"energy distance of {name} to test images {near:.3f}")
    if picture is not None:
        show(picture, model=draws, generator=made, data=test)
    return result, gain, both


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=8, help="pixels along a side")
    options = parser.parse_args()
    if options.smoke_test:
        few = {"num_rows": 100, "num_draws": 50, "channels": (2, 4), "passes": 5}
        main(options.seed, 4, **few, num_steps=5, max_seconds=3)
    else:
        main(options.seed, options.size, "images.png")
