"""Does the log Z tracked while learning agree with quadrature, and at what cost?

Maximum likelihood with persistent chains on three planar data sets; at several times
the tracked log Z of the averaged parameters is compared with that by quadrature. The
errors are in nats, their root mean square and the largest of the runs; "flagged" is the
share of runs whose verdict is not ok. The last column is how many energy evaluations a
fit takes for each that it would take without tracking.

    python benchmarks/bench_tracking.py --seeds 20 --processes 2
"""

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pyro_ebm
from pyro_ebm.infer import MaximumLikelihood
from pyro_ebm.testing import CountingEnergy

RESULTS = Path(__file__).parent / "results"
DATASETS = ("two_moons", "eight_gaussians", "checkerboard")
OBJECTIVE = MaximumLikelihood(num_chains=256, num_steps=10, restart_fraction=0.02)
BATCH = 256


def run(task):
    """Train one model; return the error of log Z at four times, and the cost."""
    name, seed, num_steps = task
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    points = getattr(pyro_ebm.datasets, name)(7000)
    train, test = points[:5000], points[5000:]
    base = dist.Normal(train.mean(0), 1.2 * train.std(0)).to_event(1)
    energy = pyro_ebm.energies.NeuralEnergy((2,), (64, 64), base=base)
    counted = CountingEnergy(energy)
    model = pyro_ebm.EnergyModel(counted, base)

    def pyro_model(batch):
        pyro.module("model", model)
        with pyro.poutine.scale(scale=1 / BATCH), pyro.plate("data", BATCH):
            pyro.sample("x", model(), obs=batch)

    svi = pyro.infer.SVI(
        pyro_ebm.infer.Learn(pyro_model, OBJECTIVE),
        lambda batch: None,
        pyro.optim.Adam({"lr": 1e-3}),
        pyro.infer.Trace_ELBO(),
    )
    start, exact_cost, times = time.process_time(), 0.0, []
    for step in range(1, num_steps + 1):
        svi.step(train[torch.randint(len(train), (BATCH,))])
        if step % (num_steps // 4) == 0:
            pause = time.process_time()
            times.append(compare(model, test, step))
            exact_cost += time.process_time() - pause
    tracker = model.log_partition
    # The tracker evaluates a copy of the energy, which this counter does not see, and
    # at each update the energy itself once at every walker, which it does.
    reads = (
        tracker.num_islands * tracker.num_walkers * (num_steps // tracker.interval + 1)
    )
    learning = counted.num_values + counted.num_gradients - reads
    return {
        "dataset": name,
        "seed": seed,
        "times": times,
        "tracking_evaluations": tracker.num_evaluations,
        "learning_evaluations": learning,
        "cpu_seconds": time.process_time() - start - exact_cost,
    }


def compare(model, test, step):
    """Tracked against exact log Z of the averaged parameters."""
    estimate = model.log_partition.averaged()
    energy = model.log_partition.averaged_energy
    exact = pyro_ebm.partition.quadrature(energy, tolerance=1e-4)
    with torch.no_grad():
        nll = energy(test).mean().item() + exact.value
    return {
        "step": step,
        "error": estimate.value - exact.value,
        "half_width": estimate.upper - estimate.value,
        "covered": estimate.lower <= exact.value <= estimate.upper,
        "status": estimate.status,
        "quadrature": exact.status,
        "test_nll": nll,
    }


def table(runs):
    """One row a data set, and one for each time in it."""
    lines = [
        "| data | step | runs | RMSE of log Z | worst | coverage of 95 % | flagged | "
        "test NLL | evaluations, tracked / not |",
        "|---" + 8 * "|---:" + "|",
    ]
    for name in DATASETS:
        chosen = [run for run in runs if run["dataset"] == name]
        if not chosen:
            continue
        cost = 1 + sum(r["tracking_evaluations"] for r in chosen) / sum(
            r["learning_evaluations"] for r in chosen
        )
        for k in range(4):
            rows = [run["times"][k] for run in chosen]
            errors = [row["error"] for row in rows]
            rmse = math.sqrt(sum(e**2 for e in errors) / len(errors))
            covered = sum(row["covered"] for row in rows) / len(rows)
            flagged = sum(row["status"] != "ok" for row in rows) / len(rows)
            nll = sum(row["test_nll"] for row in rows) / len(rows)
            lines.append(
                f"| {name} | {rows[0]['step']} | {len(rows)} | {rmse:.3f} | "
                f"{max(map(abs, errors)):.3f} | {covered:.2f} | {flagged:.2f} | "
                f"{nll:.3f} | {cost:.3f} |"
            )
    return "\n".join(lines)


def save(runs):
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "tracking.md").write_text(table(runs) + "\n")
    (RESULTS / "tracking.json").write_text(json.dumps(runs, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    if args.smoke_test:
        args.seeds, args.num_steps = 1, 40
    tasks = [
        (name, seed, args.num_steps) for seed in range(args.seeds) for name in DATASETS
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        runs = []
        for result in pool.imap_unordered(run, tasks):
            runs.append(result)
            last = result["times"][-1]
            print(result["dataset"], result["seed"], last, flush=True)
            if not args.smoke_test:  # a run that is cut short leaves what it has
                save(runs)
    print(table(runs))


if __name__ == "__main__":
    main()
