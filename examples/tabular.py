"""A density for a table in one call, and what it is good for.

The table has ten logarithms of means of 569 cell images (scikit-learn's breast cancer
data). The density of the 357 benign rows is learned, held against its base, and asked
how unusual the malignant rows are.
"""

# %%
import argparse

import numpy as np
import pyro
import torch
from sklearn.datasets import load_breast_cancer

import pyro_ebm
from pyro_ebm.infer import log_likelihood, log_likelihood_difference

torch.set_num_threads(1)  # a second thread only slows so small a network down


# %% Benign rows to learn from and to test on; malignant ones, which it never sees.
def load_data():
    table = load_breast_cancer()
    rows = torch.tensor(np.log(table.data[:, :10] + 1e-3), dtype=torch.float32)
    benign, malignant = rows[table.target == 1], rows[table.target == 0]
    benign = benign[torch.randperm(len(benign))]
    return benign[:280], benign[280:], malignant


# %% One call: rows held out, a base fitted, the network learned as its correction.
def learn(train, **settings):
    model = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((train.shape[1],)))
    return model, pyro_ebm.fit(model, train, **settings)


# %% Its likelihood on rows that it has not seen, and over its base.
def main(seed=0, **settings):
    pyro.set_rng_seed(seed)
    train, test, malignant = load_data()
    model, result = learn(train, **settings)
    print(result)
    learned = result.distribution
    base = pyro_ebm.EnergyDistribution(pyro_ebm.energies.DistributionEnergy(model.base))
    gain = log_likelihood_difference(learned, base, test)
    print(f"test: {log_likelihood(learned, test)}, over the base {gain}")

    # p-values are uniform on rows of the same kind: a twentieth is below .05.
    rates = {
        name: (result.anomaly(rows).p_value <= 0.05).float().mean().item()
        for name, rows in (("benign", test), ("malignant", malignant))
    }
    print("unusual at .05:", ", ".join(f"{k} {v:.0%}" for k, v in rates.items()))

    # Draws, and the model again from its state alone.
    draws = learned.sample((1000,))
    print(
        "means of draws and data differ by", (draws.mean(0) - train.mean(0)).abs().max()
    )
    again = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((train.shape[1],)))
    again.load_state_dict(model.state_dict())
    assert torch.allclose(again.eval()().log_prob(test), learned.log_prob(test))
    return result, gain, rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quick = {"num_steps": 50, "max_seconds": 3} if options.smoke_test else {}
    main(options.seed, **quick)
