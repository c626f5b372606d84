"""A restricted Boltzmann machine of binarised digits, with its exact likelihood.

Sixteen hidden units are few enough to sum over, so what chains have learned is read
off exactly; the lower half of digits is then drawn given the upper one.

Run: ``python examples/rbm_digits.py``, about two minutes.
"""

# %% Data: 8 x 8 pixels, on or off; 360 digits are kept for the end
import argparse

import pyro
import torch
from sklearn.datasets import load_digits

import pyro_ebm
from pyro_ebm.energies import RBMEnergy

parser = argparse.ArgumentParser()
parser.add_argument("--smoke-test", action="store_true")
args = parser.parse_args()
pyro.set_rng_seed(0)

images = torch.tensor(load_digits().data >= 8).float()
images = images[torch.randperm(len(images))]
train, test = images[:-360], images[-360:]

# %% Persistent chains between steps of Adam, whose rate falls within a minute;
# held-out digits say how much weights decay, and choose the best record
num_hidden = 6 if args.smoke_test else 16
model = pyro_ebm.EnergyModel(RBMEnergy(0.01 * torch.randn(64, num_hidden)))
result = pyro_ebm.fit(
    model,
    train,
    num_steps=200 if args.smoke_test else None,
    max_seconds=60,
    progress_bar=False,
)
print(result)

# %% The likelihood of test digits, with log Z by the sum over all hidden states
energy = model.energy
with torch.no_grad():
    log_partition = energy.closed_form().log_partition
    log_likelihood = (-energy(test) - log_partition).mean().item()
base = model.base.log_prob(test).mean().item()
print(f"test log-likelihood {log_likelihood:.2f}, of independent pixels {base:.2f}")


# %% Inpainting: the lower half by Gibbs sampling, the upper one held
def inpainted(image: torch.Tensor, num_draws: int = 64) -> torch.Tensor:
    """Draws of the lower half given the upper, beside it; shape (num_draws, 64)."""
    x = image.repeat(num_draws, 1)
    for _ in range(200):
        hidden = energy.draw_hidden(x)
        drawn = energy.draw_visible(hidden)
        x = torch.cat([x[:, :32], drawn[:, 32:]], 1)
    return x


with torch.no_grad():
    guesses = torch.stack([inpainted(image).mean(0) for image in test[:100]])
right = ((guesses > 0.5) == (test[:100] > 0.5))[:, 32:].double().mean().item()
always = ((train.mean(0) > 0.5) == (test[:100] > 0.5))[:, 32:].double().mean().item()
print(f"pixels of the lower half guessed right: {right:.2f}, by the mean {always:.2f}")

# %% Check
needed = base if args.smoke_test else -18.3
print("ok" if log_likelihood > needed - 20 * args.smoke_test else "worse than expected")
