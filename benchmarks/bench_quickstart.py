"""The quickstart over seeds: is log Z right, and does the fit beat what it should?

Each seed draws another split of the data and another network. "Inside" asks whether the
95 % interval of log Z, widened by .001 for the grid, holds the sum over a fine grid.
Test log-likelihoods are a point, in nats, and use the log Z of the grid; the mixture
and the kernels have their sizes by rows held out.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

from report import RESULTS, save

GRID_ERROR = 1e-3  # of the sum over 501 x 501 points
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"


def load_example():
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLE)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    return quickstart


def run_seed(quickstart, seed, **settings):
    start = time.perf_counter()
    picture = RESULTS / f"quickstart-{seed}.png"
    log_z, exact, test, exact_test, others = quickstart.main(seed, picture, **settings)
    base, mixture, kernels = others
    return {
        "seed": seed,
        "log Z": log_z.value,
        "std_error": log_z.std_error,
        "lower": log_z.lower,
        "upper": log_z.upper,
        "status": log_z.status,
        "exact": exact,
        "error": log_z.value - exact,
        "inside": log_z.lower - GRID_ERROR <= exact <= log_z.upper + GRID_ERROR,
        "test": exact_test,
        "test_std_error": test.std_error_data,
        "base": base,
        "mixture": mixture,
        "kernels": kernels,
        "seconds": time.perf_counter() - start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    quick = {"num_steps": 200} if options.smoke_test else {}
    quickstart = load_example()
    seeds = range(2 if options.smoke_test else options.seeds)
    RESULTS.mkdir(exist_ok=True)
    rows = []
    for seed in seeds:  # a run that is cut short leaves what it has
        rows.append(run_seed(quickstart, seed, **quick))
        tables = {"Summary": [summarise(rows)], "Seeds": rows}
        text = save("quickstart", __doc__, tables, smoke_test=options.smoke_test)
    print(text)


def summarise(rows):
    return {
        "seeds": len(rows),
        "inside": sum(row["inside"] for row in rows),
        "largest error": max(abs(row["error"]) for row in rows),
        "unreliable": sum(row["status"] != "ok" for row in rows),
        "mean test": statistics.fmean(row["test"] for row in rows),
        "mean base": statistics.fmean(row["base"] for row in rows),
        "mean mixture": statistics.fmean(row["mixture"] for row in rows),
        "mean kernels": statistics.fmean(row["kernels"] for row in rows),
        "smallest gain over both": min(
            row["test"] - max(row["mixture"], row["kernels"]) for row in rows
        ),
    }


if __name__ == "__main__":
    main()
