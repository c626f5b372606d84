"""The quickstart over ten seeds: is the exact log Z inside the tracked interval?

Each seed draws another split of the data, network, and chains. "Inside" asks whether the
95 % interval of the tracked log Z holds the value by quadrature.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

from report import save

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"


def load_example():
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLE)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    return quickstart


def run_seed(quickstart, seed, **settings):
    start = time.perf_counter()
    result = quickstart.main(seed, **settings)
    log_z, exact = result.log_z, result.exact.value
    error = log_z.value - exact
    return {
        "seed": seed,
        "tracked": log_z.value,
        "std_error": log_z.std_error,
        "lower": log_z.lower,
        "upper": log_z.upper,
        "status": log_z.status,
        "exact": exact,
        "error": error,
        "inside": log_z.lower <= exact <= log_z.upper,
        "test": result.test.value + error,
        "test_std_error": result.test.std_error_data,
        "gaussian": result.gaussian,
        "seconds": time.perf_counter() - start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    quick = {"num_steps": 200} if options.smoke_test else {}
    quickstart = load_example()
    rows = []
    for seed in range(2 if options.smoke_test else options.seeds):
        rows.append(run_seed(quickstart, seed, **quick))
        print(rows[-1], flush=True)
    gains = [row["test"] - row["gaussian"] for row in rows]
    summary = {
        "seeds": len(rows),
        "inside their 95 % interval": sum(row["inside"] for row in rows),
        "largest error of log Z": max(abs(row["error"]) for row in rows),
        "flagged unreliable": sum(row["status"] != "ok" for row in rows),
        "mean test log-likelihood": statistics.fmean(row["test"] for row in rows),
        "mean of the Gaussian": statistics.fmean(row["gaussian"] for row in rows),
        "smallest gain over the Gaussian": min(gains),
    }
    save("quickstart", rows, summary, smoke_test=options.smoke_test)


if __name__ == "__main__":
    main()
