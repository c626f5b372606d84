"""How many patterns does a memory hold, and what does holding them cost?

Spins: the share of cues that lead back to their pattern, for energies of growing degree
and for the exponential one, beside the best decoder there is. Vectors: a memory that
stores a data set, as a density of further data.
"""

# %%
import argparse

import matplotlib.pyplot as plt
import pyro
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.datasets import two_moons
from pyro_ebm.energies import HopfieldEnergy, SpinMemoryEnergy, VectorMemoryEnergy

torch.set_num_threads(1)


# %% Ways to turn cues into patterns. Where each spin of a cue was turned independently,
# the nearest pattern is the likeliest: nothing can do better.
def descend(build, **settings):
    return lambda patterns, cues: build(patterns, **settings).retrieve(cues).state


DECODERS = {
    "degree 2 (Hopfield)": descend(HopfieldEnergy),
    "degree 3": descend(HopfieldEnergy, degree=3),
    "degree 4": descend(HopfieldEnergy, degree=4),
    "exponential": descend(SpinMemoryEnergy),
    "nearest pattern": lambda patterns, cues: patterns[(cues @ patterns.T).argmax(-1)],
}


# %% The share of cues that lead back to their pattern, of the same cues for all.
def recover(num_patterns, share_turned, num_rounds):
    shares = dict.fromkeys(DECODERS, 0.0)
    for _ in range(num_rounds):
        patterns = 2.0 * torch.randint(2, (num_patterns, 64)) - 1
        wanted = patterns[:100]
        cues = torch.where(torch.rand_like(wanted) < share_turned, -wanted, wanted)
        for name, decode in DECODERS.items():
            right = (decode(patterns, cues) == wanted).all(-1)
            shares[name] += right.float().mean().item() / num_rounds
    return shares


def compare(ax, values, found):
    for name in DECODERS:
        shares = [shares[name] for shares in found]
        ax.plot(values, shares, "--" if name == "nearest pattern" else "o-", label=name)
        print(f"{name:20}", *(f"{share:5.2f}" for share in shares))


# %% Store points as vectors. With these logits the memory is their kernel density
# estimate. How many of the points does it keep as minima, and how good is the density?
def store_points(ax, num_points):
    stored, test = two_moons(num_points + 2000).split([num_points, 2000])
    sharpness, kept, loss = torch.logspace(0, 4, 13).tolist(), [], []
    for beta in sharpness:
        logits = -beta / 2 * stored.square().sum(-1)
        memory = VectorMemoryEnergy(stored, beta, logits)
        q = EnergyDistribution(memory)
        loss.append(-q.log_prob(test).mean().item())
        distance = (memory.retrieve(stored).state - stored).norm(dim=-1)
        kept.append((distance < 0.01).float().mean().item())
        print(f"sharpness {beta:8.1f}: keeps {kept[-1]:4.0%}, test {loss[-1]:.3f} nats")
    above = [nats - min(loss) for nats in loss]
    ax.semilogx(sharpness, kept, "o-", label="share of points kept")
    ax.semilogx(sharpness, above, "s-", label="test loss above its least, nats")
    ax.set(title=f"vectors: {num_points} points stored", xlabel="sharpness")
    ax.set_ylim(-0.05, 2.6)


# %% One figure.
def main(seed, output, num_rounds=5, most_patterns=1024):
    pyro.set_rng_seed(seed)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    counts = [2**k for k in range(2, 11) if 2**k <= most_patterns]
    turned = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45]
    print("patterns", counts)
    compare(axes[0], counts, [recover(n, 0.1, num_rounds) for n in counts])
    print(f"share of spins turned, {counts[-1]} patterns", turned)
    found = [recover(counts[-1], share, num_rounds) for share in turned]
    compare(axes[1], turned, found)
    store_points(axes[2], 200)
    axes[0].set(title="spins: a tenth turned", xlabel="patterns", xscale="log")
    axes[1].set(title=f"spins: {counts[-1]} patterns", xlabel="share turned")
    axes[0].set_ylabel("recovered")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5
    )
    axes[2].legend(loc="upper left")
    figure.savefig(output, dpi=120)
    reached, bound = found[3]["exponential"], found[3]["nearest pattern"]
    print(f"a quarter turned: exponential {reached:.3f}, the best there is {bound:.3f}")
    return reached, bound


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda")
    parser.add_argument("--output", default="memory.png", help="the picture")
    options = parser.parse_args()
    torch.set_default_device(options.device)
    quick = {"num_rounds": 1, "most_patterns": 64} if options.smoke_test else {}
    main(options.seed, options.output, **quick)
