"""How far off is the default estimate of log Z, and does it say so?

Each target of known log Z is estimated with several seeds by ``partition.refined_smc``.
"Inside" counts the 95 % intervals that hold the truth, of all runs and of those whose
verdict is ok; "misses flagged" the intervals that miss and are called unreliable; "good
flagged" those that hold the truth and are called unreliable all the same. The rule that
decides was tuned on these targets.

    python benchmarks/bench_partition.py --seeds 16 --budget 50000
"""

import argparse

import pyro
import torch
from report import save

from pyro_ebm.partition import refined_smc
from pyro_ebm.testing import targets

TARGETS = (
    "gaussian",
    "trap",
    "gamma",
    "student_t_product",
    "neals_funnel",
    "hybrid_rosenbrock",
    "gaussian_mixture",
    "many_well",
)


def summarise(name, seeds, budget):
    """One row: errors, intervals and verdicts over the seeds."""
    target, truth = getattr(targets, name)(), getattr(targets, name)().log_partition
    runs = []
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        runs.append(refined_smc(target.energy, target.base, budget=budget))
    inside = [run.lower <= truth <= run.upper for run in runs]
    is_ok = [run.status == "ok" for run in runs]
    pairs = list(zip(inside, is_ok, strict=True))
    return {
        "target": name,
        "mean abs error": sum(abs(run.value - truth) for run in runs) / seeds,
        "mean error": sum(run.value - truth for run in runs) / seeds,
        "half-width": sum(run.upper - run.value for run in runs) / seeds,
        "inside": f"{sum(inside)} of {seeds}",
        "inside if ok": f"{sum(i and ok for i, ok in pairs)} of {sum(is_ok)}",
        "misses flagged": f"{sum(not i and not ok for i, ok in pairs)} of "
        f"{seeds - sum(inside)}",
        "good flagged": f"{sum(i and not ok for i, ok in pairs)} of {sum(inside)}",
        "evaluations": sum(run.num_evaluations for run in runs) // seeds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--budget", type=int, default=50_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    names, seeds = (TARGETS[:1], 2) if args.smoke_test else (TARGETS, args.seeds)
    rows = [summarise(name, seeds, args.budget) for name in names]
    text = save(
        "partition",
        __doc__.split("\n\n    python")[0],
        {f"Budget {args.budget:,}, {seeds} seeds": rows},
        smoke_test=args.smoke_test,
    )
    print(text)


if __name__ == "__main__":
    main()
