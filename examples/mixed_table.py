"""A table with real and categorical columns: learned, conditioned, and held to its law.

Three columns are real and two categorical. The table is made, so that its law is known:
what is learned is compared with it, as a whole and given some of the columns.

Run: ``python examples/mixed_table.py``, about a minute.
"""

# %%
import argparse

import pyro
import pyro.distributions as dist
import torch
from scipy import stats

import pyro_ebm
from pyro_ebm import mcmc

torch.set_num_threads(1)  # a second thread only slows so small a network down
constraints = dist.constraints

# %% A label of three kinds, a coin by it, and three numbers by both.
SUPPORT = constraints.cat(
    [constraints.real, constraints.integer_interval(0, 2), constraints.boolean],
    dim=-1,
    lengths=[3, 1, 1],
)
SHARES, ODDS = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.8])
MEANS = torch.tensor([0.0, 1.5, -1.5])


def conditionals(x, y, label, coin):
    """The laws of the three numbers, each given those before it."""
    bent = 1.5 * x.sin() * (2 * coin - 1)
    means = MEANS[label.long()], bent, y / 2 - label
    return [dist.Normal(mean, 1.0) for mean in means]


def make_table(number):
    label = torch.multinomial(SHARES, number, replacement=True).float()
    coin = torch.bernoulli(ODDS[label.long()])
    x = y = z = torch.zeros(number)
    x = conditionals(x, y, label, coin)[0].sample()
    y = conditionals(x, y, label, coin)[1].sample()
    z = conditionals(x, y, label, coin)[2].sample()
    return torch.stack([x, y, z, label, coin], 1)


def log_law(table):
    x, y, z, label, coin = table.unbind(-1)
    laws = conditionals(x, y, label, coin)
    real = sum(law.log_prob(v) for law, v in zip(laws, (x, y, z), strict=True))
    odds = dist.Bernoulli(ODDS[label.long()])
    return real + SHARES.log()[label.long()] + odds.log_prob(coin)


# %% One call: latent classes as the base, a network over codes as their correction.
def learn(table, **settings):
    energy = pyro_ebm.energies.NeuralEnergy((5,), (64, 64), support=SUPPORT)
    model = pyro_ebm.EnergyModel(energy)
    return model, pyro_ebm.fit(model, table, **settings)


# %% Categories given numbers are exact; numbers given categories are resampled.
def compare_conditionals(q, test, num_rows):
    states = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0))
    gaps = []
    for row in test[:num_rows]:
        whole = torch.cat([row[:3].expand(6, 3), states], 1)
        learned = q.condition(list(enumerate(row[:3].tolist()))).log_prob(states).exp()
        gaps.append((learned - log_law(whole).softmax(0)).abs().sum() / 2)
    given = q.condition([(3, 1), (4, 0)]).sample((1000,))
    rows = test[(test[:, 3] == 1) & (test[:, 4] == 0)]
    far = [stats.ks_2samp(given[:, k], rows[:, k]).statistic for k in range(3)]
    return torch.stack(gaps).mean().item(), max(far)


def main(seed=0, number=10_000, num_draws=300, num_rows=50, **settings):
    pyro.set_rng_seed(seed)
    train, test = make_table(number), make_table(20_000)
    model, result = learn(train, **settings)
    print(result)
    q = model()
    with torch.no_grad():
        learned, known = q.log_prob(test).mean().item(), log_law(test).mean().item()
        gap, far = compare_conditionals(q, test, num_rows)
    print(f"held-out log-likelihood {learned:.3f}, of the law {known:.3f}")
    print(f"categories given numbers: {gap:.3f} of the chance is elsewhere")
    print(f"numbers given categories: Kolmogorov-Smirnov distance {far:.3f}")

    # The same by chains: a kernel for each part, in turn.
    kernel = mcmc.Alternating({"real": mcmc.HMC(), "finite": mcmc.Gibbs()})
    run = mcmc.MCMC(kernel, num_draws, num_draws, 64, progress_bar=False)
    run.run(model)
    shares = torch.bincount(run.get_samples()[:, 3].long(), minlength=3).float()
    print("labels by chains", shares / shares.sum(), "of the law", SHARES)
    return learned - known, gap, far


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quick = {"number": 300, "num_steps": 20, "num_draws": 10, "num_rows": 5}
    main(options.seed, **(quick if options.smoke_test else {}))
