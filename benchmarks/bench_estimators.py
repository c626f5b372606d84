"""Which estimator, at equal CPU time, by the exact divergence from the truth.

Three data sets of known density, 10,000 points each. One energy for all: a network
64-64-1 with SiLU on the point and 16 random Fourier features of it, over a Gaussian 1.5
times as wide as the data. Adam, batches of 256, a learning rate that falls from 0.002
to 0 with the CPU time used. Every estimator gets the same CPU seconds of one thread,
all that it prepares included (noise, flow, chains). Then

    KL(truth || model) = E_truth[log truth] + E_truth[f] + log Z

with both integrals by quadrature, and the negative log-likelihood (NLL) of 10,000 new
points with the same log Z; in nats, median and worst of the seeds. A run whose chains
cannot move any more, or whose energy is not finite, counts as infinite. Log Z is not
tracked on the way. Of two stages, the chains of the second start at data. Estimators
have the settings of the library where their names say nothing else; nothing but the
common learning rate was tuned.

The best recipe is noise contrast too: 32 Fourier features, batches of 512, learning
rate 0.005.

The cost of a step is what it takes with batches of 256: evaluations of the energy a
data point, counted, and the CPU time over that of one ``value_and_grad`` at 256 points;
medians over interleaved rounds. The step of the optimiser is in that time.
"""

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
import zuko
from report import RESULTS, save
from sklearn.mixture import GaussianMixture
from torch import nn

from pyro_ebm import EnergyDistribution, datasets, infer, partition
from pyro_ebm.core.errors import DivergenceError, UnreliableWarning
from pyro_ebm.energies import DistributionEnergy, FunctionEnergy
from pyro_ebm.infer.objectives.score.score_matching import Slopes
from pyro_ebm.mcmc import IndependentChains, PersistentChains
from pyro_ebm.testing import CountingEnergy

NUM_POINTS = 10_000


# Truth.


class Truth(NamedTuple):
    """Midpoints of a fine grid, their probability, and E[log p]."""

    sample: Callable
    x: torch.Tensor
    mass: torch.Tensor
    mean_log_prob: float


def tabulate(sample, density, half_width, num_cells=480):
    line = (torch.arange(num_cells, dtype=torch.float64) + 0.5) / num_cells
    line = half_width * (2 * line - 1)
    x = torch.cartesian_prod(line, line)
    log_prob = torch.cat([density.log_prob(part) for part in x.split(2**13)]).double()
    inside = log_prob > -40
    x, log_prob = x[inside], log_prob[inside]
    mass = log_prob.exp() * (2 * half_width / num_cells) ** 2
    if abs(mass.sum() - 1) > 1e-4:
        raise RuntimeError(f"the grid holds {mass.sum()} of the mass of {density}")
    return Truth(sample, x.float(), mass, (mass @ log_prob).item())


def build_truths():
    moons = datasets.two_moons_density
    eight, board = datasets.eight_gaussians_density, datasets.checkerboard_density
    return {
        "two moons": tabulate(datasets.two_moons, moons(), 3.0),
        "eight Gaussians": tabulate(datasets.eight_gaussians, eight(), 6.0),
        "checkerboard": tabulate(datasets.checkerboard, board(), 4.0),
    }


@torch.no_grad()
def judge(energy, truth, test):
    f = torch.cat([energy(part) for part in truth.x.split(2**15)]).double()
    log_z = partition.quadrature(energy, tolerance=1e-3, max_points=2**21)
    return {
        "KL": truth.mean_log_prob + (truth.mass @ f).item() + log_z.value,
        "test NLL": energy(test).mean().item() + log_z.value,
        "error of log Z": log_z.std_error,
        "quadrature": log_z.status,
    }


# What is compared: each makes stages (objective, share of the time that is left).


class Problem(NamedTuple):
    data: torch.Tensor
    base: dist.TorchDistribution
    seconds: float


def one(objective):
    return [(objective, 1.0)]


def fitted_mixture(problem, num_components=16, part=1.0):
    """Gaussians fitted to the data, and the base for the other part."""
    fitted = GaussianMixture(num_components, random_state=0).fit(problem.data.numpy())
    found = [fitted.weights_, fitted.means_, fitted.covariances_]
    weight, loc, cov = (torch.tensor(value).to(problem.data) for value in found)
    if part < 1:
        weight = torch.cat([part * weight, torch.tensor([1 - part])])
        loc = torch.cat([loc, problem.base.mean[None]])
        cov = torch.cat([cov, problem.base.variance.diag()[None]])
    gaussians = dist.MultivariateNormal(loc, cov)
    return dist.MixtureSameFamily(dist.Categorical(probs=weight), gaussians)


def fitted_flow(problem, share=0.3):
    """A flow, trained by its own likelihood for a share of the time."""
    flow = zuko.flows.RealNVP(2, transforms=4, hidden_features=(32, 32))
    optim = torch.optim.Adam(flow.parameters(), lr=5e-3)
    end = time.process_time() + share * problem.seconds
    while time.process_time() < end:
        loss = -flow().log_prob(batch_of(problem.data, 256)).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
    return flow


def generator(width=64):
    return nn.Sequential(
        nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
        nn.Linear(width, 2),
    )  # fmt: skip


ESTIMATORS = {
    "exact likelihood, 101 nodes a side": lambda p: one(
        infer.ExactMaximumLikelihood(num_nodes=101)
    ),
    "importance sampling": lambda p: one(infer.ImportanceSampledLikelihood(p.base)),
    "bounded likelihood": lambda p: one(infer.BoundedLikelihood(p.base)),
    "noise contrast": lambda p: one(infer.NoiseContrastive(p.base)),
    "noise contrast, 16 Gaussians fitted": lambda p: one(
        infer.NoiseContrastive(fitted_mixture(p))
    ),
    "noise contrast, half of it 16 Gaussians fitted": lambda p: one(
        infer.NoiseContrastive(fitted_mixture(p, part=0.5))
    ),
    "ranking noise contrast": lambda p: one(infer.RankingNoiseContrastive(p.base)),
    "flow contrast": lambda p: one(infer.FlowContrastive(fitted_flow(p))),
    "persistent chains": lambda p: one(infer.MaximumLikelihood()),
    "tempered chains": lambda p: one(infer.TemperedMaximumLikelihood(p.base)),
    "contrastive divergence, 10 moves": lambda p: one(
        infer.ContrastiveDivergence(num_steps=10)
    ),
    "energy discrepancy": lambda p: one(infer.EnergyDiscrepancy()),
    "denoising": lambda p: one(infer.DenoisingScoreMatching()),
    "score matching": lambda p: one(infer.ScoreMatching()),
    "sliced score matching": lambda p: one(infer.SlicedScoreMatching()),
    "amortised sampler": lambda p: one(infer.AmortizedSampler(generator(), (2,))),
    "denoising, then persistent chains": lambda p: [
        (infer.DenoisingScoreMatching(), 0.3),
        (infer.MaximumLikelihood(), 1.0),
    ],
    "noise contrast, then persistent chains": lambda p: [
        (infer.NoiseContrastive(p.base), 0.5),
        (infer.MaximumLikelihood(), 1.0),
    ],
    "best recipe": lambda p: one(infer.NoiseContrastive(p.base)),
}


# Training.


def batch_of(data, size):
    return data[torch.randint(len(data), (size,))]


def build_step(objective, energy, problem, batch_size=256, *, is_warm=False):
    """One parameter step as a function of the learning rate."""
    model = EnergyDistribution(energy, sampler=IndependentChains(base=problem.base))
    state, data = objective.make_state(), problem.data
    if is_warm and isinstance(state, PersistentChains):
        # From the base the chains would arrive late, and undo what has been learned.
        state.start(energy, batch_of(data, objective.num_chains), objective.kernel)
    optim = torch.optim.Adam([*energy.parameters(), *state.parameters()])

    def step(learning_rate):
        optim.param_groups[0]["lr"] = learning_rate
        loss = objective.loss(model, batch_of(data, batch_size), state)
        optim.zero_grad()
        loss.backward()
        optim.step()

    return step


def train(stages, energy, problem, settings):
    """Use up the time; the learning rate falls to nothing with it."""
    start, num_steps = time.process_time(), 0

    def used():
        return (time.process_time() - start) / problem.seconds

    for objective, share in stages(problem):
        step = build_step(
            objective, energy, problem, settings.batch_size, is_warm=num_steps > 0
        )
        now = used()
        end = now + share * (1 - now)
        while True:
            step(settings.learning_rate * max(1 - now, 0.0))
            num_steps += 1
            if (now := used()) >= end:
                break
    return num_steps, time.process_time() - start


class Settings(NamedTuple):
    num_features: int
    batch_size: int
    learning_rate: float


COMMON, BEST = Settings(16, 256, 2e-3), Settings(32, 512, 5e-3)


class Fourier(nn.Module):
    """The point with sines and cosines of random projections of it."""

    def __init__(self, num_features, scale):
        super().__init__()
        self.register_buffer("frequency", torch.randn(2, num_features) / scale[:, None])

    def forward(self, x):
        angle = x @ self.frequency
        return torch.cat([x, angle.sin(), angle.cos()], -1)


def build_energy(base, num_features, width=64):
    features = Fourier(num_features, base.stddev / 3)
    network = nn.Sequential(
        features, nn.Linear(2 + 2 * num_features, width), nn.SiLU(),
        nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1), nn.Flatten(-2),
    )  # fmt: skip
    nn.init.normal_(network[-2].weight, std=0.01 / width**0.5)
    return FunctionEnergy(network, (2,)) + DistributionEnergy(base)


def run(name, truth, seed, seconds, settings):
    pyro.set_rng_seed(seed)
    data, test = truth.sample(2 * NUM_POINTS).split(NUM_POINTS)
    base = dist.Normal(data.mean(0), 1.5 * data.std(0)).to_event(1)
    energy = build_energy(base, settings.num_features)
    problem, begin = Problem(data, base, seconds), time.process_time()
    found, ended = {"KL": math.inf, "test NLL": math.inf}, "diverged"
    try:
        num_steps, used = train(ESTIMATORS[name], energy, problem, settings)
        measured = judge(energy, truth, test)
        if math.isfinite(measured["KL"]):
            found, ended = measured, measured.pop("quadrature")
    except DivergenceError:
        num_steps, used = 0, time.process_time() - begin
    return {"seed": seed, **found, "ended": ended, "steps": num_steps, "CPU s": used}


# What a step costs.


def step_costs(names, problem, rounds):
    """CPU time and evaluations of a step of each estimator."""
    energy = build_energy(problem.base, COMMON.num_features)
    x, gradient, steps = batch_of(problem.data, 256), "one gradient", {}
    for name in names:
        objective, _ = ESTIMATORS[name](problem)[0]
        steps[name] = build_step(objective, energy, problem)
    contenders = {name: partial(step, 0.0) for name, step in steps.items()}
    contenders[gradient] = partial(energy.value_and_grad, x)
    times = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(milliseconds(contender, 5))
    rows = []
    for name in names:
        ratios = map(_ratio, times[name], times[gradient])
        cpu = {"CPU ms": statistics.median(times[name])}
        cpu["CPU in gradients"] = statistics.median(ratios)
        rows.append({"estimator": name, **evaluations(name, problem), **cpu})
    return rows


def evaluations(name, problem, num_steps=10):
    """Of the energy a data point, in a step; and what the objective says of itself."""
    objective, _ = ESTIMATORS[name](problem)[0]
    counting = CountingEnergy(build_energy(problem.base, COMMON.num_features))
    step = build_step(objective, counting, problem)
    counted = {"autospec": True, "side_effect": Slopes.curvature}
    with mock.patch.object(Slopes, "curvature", **counted) as products:
        step(0.0)
        counting.reset()
        products.reset_mock()
        for _ in range(num_steps):
            step(0.0)
    return {
        "objective": type(objective).__name__,
        "needs": ", ".join(sorted(objective.needs)) or "values",
        "log Z": objective.log_partition or "none",
        "values": counting.num_values / num_steps / 256,
        "gradients": counting.num_gradients / num_steps / 256,
        "Hessian products": products.call_count / num_steps,
    }


def milliseconds(function, repeats):
    start = time.process_time()
    for _ in range(repeats):
        function()
    return 1e3 * (time.process_time() - start) / repeats


def _ratio(first, second):
    return first / second


# Tables.


def summary(runs, names, truths, key):
    """One row an estimator: the median on each data set, and the worst."""
    rows = []
    for name in names:
        row = {"estimator": name}
        for data in truths:
            found = [
                r[key] for r in runs if (r["estimator"], r["data"]) == (name, data)
            ]
            row |= {data: statistics.median(found), f"{data}, worst": max(found)}
        steps = [run["steps"] for run in runs if run["estimator"] == name]
        rows.append({**row, "steps": int(statistics.median(steps))})
    return rows


def small_problem():
    data = datasets.two_moons(1000)
    return Problem(data, dist.Normal(torch.zeros(2), 1.5).to_event(1), seconds=0.2)


def tables_of(runs, costs, truths, options):
    """What is saved: summaries, and all that they were made from."""
    names = [name for name in ESTIMATORS if any(r["estimator"] == name for r in runs)]
    equal = [name for name in names if name != "best recipe"]
    at = f"at {options.seconds:g} CPU seconds"
    best = [run for run in runs if run["estimator"] == "best recipe"]
    tables = {
        f"KL {at}": summary(runs, equal, truths, "KL"),
        f"NLL {at}": summary(runs, equal, truths, "test NLL"),
        f"Best recipe at {options.best_seconds:g} CPU seconds": best,
        "Cost of a step": sorted(costs, key=lambda row: names.index(row["estimator"])),
        "Entropy of the truth": [
            {"data": name, "entropy": -truth.mean_log_prob}
            for name, truth in truths.items()
        ],
        "Runs": runs,
    }
    return {title: rows for title, rows in tables.items() if rows}


def rows_kept(names, title):
    """Of the last run, what is not measured anew."""
    last = json.loads((RESULTS / "estimators.json").read_text("utf-8"))
    return [row for row in last["tables"][title] if row["estimator"] not in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--rounds", type=int, default=3, help="seeds")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU, of each run")
    parser.add_argument("--best-seconds", type=float, default=20.0, help="best recipe")
    parser.add_argument("--only", nargs="*", help="measure these estimators anew")
    options = parser.parse_args()
    if options.smoke_test:
        options.rounds, options.seconds, options.best_seconds = 1, 0.05, 0.05
    torch.set_num_threads(1)
    # At the end the referee judges every energy; on the way the grid may be coarse.
    warnings.simplefilter("ignore", UnreliableWarning)
    pyro.set_rng_seed(0)
    truths, problem = build_truths(), small_problem()
    names, runs, costs = options.only or list(ESTIMATORS), [], []
    if options.only:
        runs, costs = rows_kept(names, "Runs"), rows_kept(names, "Cost of a step")
    single = [
        n for n in names if n != "best recipe" and len(ESTIMATORS[n](problem)) == 1
    ]
    costs += step_costs(single, problem, 1 if options.smoke_test else 15)
    for seed in range(options.rounds):
        for (data, truth), name in itertools.product(truths.items(), names):
            is_best = name == "best recipe"
            seconds = options.best_seconds if is_best else options.seconds
            found = run(name, truth, seed, seconds, BEST if is_best else COMMON)
            runs.append({"estimator": name, "data": data, **found})
            print(runs[-1], flush=True)
        # After each seed: a benchmark that is cut short leaves what it has.
        tables = tables_of(runs, costs, truths, options)
        text = save("estimators", __doc__, tables, smoke_test=options.smoke_test)
    print(text)


if __name__ == "__main__":
    main()
