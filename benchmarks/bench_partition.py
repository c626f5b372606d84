"""How often is the default estimate of log Z right, and does it say so?

Every problem of known log Z is given to ``partition.estimate`` as it is, without a
setting: the problems of ``evidence_problems`` and the variants of each kind there,
regressions and hierarchies on published data, and the targets of ``pyro_ebm.testing``.
A run is right if its 95 % interval holds the truth, and ok if its verdict is exact or
ok. Those flagged have an interval and are called unreliable; those called infinite are
said not to be normalisable; those that failed raise an error or exceed a limit of
seconds. Half-widths, errors and CPU seconds, on one thread, are medians.

dynesty runs beside it with 500 live points and its defaults otherwise, on the
likelihood traced by torch, in double precision and with one seed.

    python benchmarks/bench_partition.py                # all of it; many hours
    python benchmarks/bench_partition.py --quick        # 3 seeds, without dynesty
    python benchmarks/bench_partition.py --quick --only problems data --dtype float64
"""

import argparse
import contextlib
import functools
import math
import signal
import statistics
import time
import warnings
from typing import NamedTuple

import evidence_problems
import pyro
import torch
from nested_sampling import NotRun, nested_sampling
from report import as_markdown, save

from pyro_ebm.partition import estimate
from pyro_ebm.testing import targets, validation_targets

DTYPES = {"float64": torch.float64, "float32": torch.float32}
#: None of the seeds with which anything was tuned.
FIRST_SEED = 2000
KINDS = "right and ok", "wrong and ok", "flagged", "infinite", "failed"


def from_target(build, dtype):
    """A target of ``pyro_ebm.testing`` as a problem; it has the default dtype."""
    with default_dtype(dtype):
        target = build()
    return evidence_problems.EvidenceProblem(
        target.name, target.energy, target.base, target.log_partition
    )


def targets_of(module):
    """Builders of the targets of a module, by name."""
    names = [name for name in module.__all__ if name != "Target"]
    return {
        name: functools.partial(from_target, getattr(module, name)) for name in names
    }


GROUPS = {
    "problems": evidence_problems.problems(),
    "data": evidence_problems.DATA_PROBLEMS,
    "targets": {**targets_of(targets), **targets_of(validation_targets)},
    "variants": evidence_problems.variants(),
}


class Run(NamedTuple):
    """One estimate; the names of its fields are columns of the table of runs."""

    problem: str
    dtype: str
    seed: int
    value: float
    truth: float
    std_error: float
    lower: float
    upper: float
    status: str
    kind: str
    reasons: str
    seconds: float
    evaluations: int

    def __str__(self):
        return (
            f"{self.problem:22s} {self.dtype} {self.seed} {self.value:12.4f} "
            f"truth {self.truth:12.4f} error {self.value - self.truth:8.4f} "
            f"se {self.std_error:.4f} [{self.lower:.4f}, {self.upper:.4f}] "
            f"{self.status} = {self.kind.upper() if self.is_bad else self.kind} "
            f"{self.seconds:.2f} s {self.evaluations:,} {self.reasons[:100]}"
        )

    @property
    def is_bad(self):
        return self.kind not in ("right and ok", "flagged")

    @property
    def half_width(self):
        return (self.upper - self.lower) / 2


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise ``TimeoutError`` after so many CPU seconds, once back in Python."""

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds} CPU s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def measure(name, problem, dtype, seed, limit):
    """One run of the default estimate."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    common = {"problem": name, "dtype": dtype, "seed": seed, "truth": problem.truth}
    start = time.process_time()
    try:
        with warnings.catch_warnings(), time_limit(limit), default_dtype(DTYPES[dtype]):
            warnings.simplefilter("ignore")
            found = estimate(problem.target, problem.base, progress_bar=False)
    except Exception as error:  # a failure is a result here
        seconds = time.process_time() - start
        reasons = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        nan = dict.fromkeys(("value", "std_error", "lower", "upper"), math.nan)
        others = {"status": "failed", "kind": "failed", "evaluations": 0}
        return Run(**common, **nan, **others, reasons=reasons, seconds=seconds)
    return Run(
        **common,
        value=found.value,
        std_error=found.std_error,
        lower=found.lower,
        upper=found.upper,
        status=str(found.status),
        kind=kind_of(found, problem),
        reasons=reasons_of(found),
        seconds=time.process_time() - start,
        evaluations=found.num_evaluations,
    )


def kind_of(found, problem):
    """Which of ``KINDS`` an estimate is."""
    if found.status == "not_normalizable":
        return "right and ok" if problem.truth == math.inf else "infinite"
    if found.status not in ("exact", "ok"):
        return "flagged"
    return "right and ok" if is_inside(found, problem) else "wrong and ok"


def is_inside(found, problem):
    """Whether the interval holds the truth, which may itself be a little off."""
    slack = problem.truth_error
    return found.lower - slack <= problem.truth <= found.upper + slack


def reasons_of(found):
    """What an estimate holds against itself, in one line."""
    reasons = getattr(found, "reasons", None)
    if reasons is None:
        return getattr(found, "reason", "")
    return "; ".join(str(reason) for reason in reasons)


def summarise(runs):
    """One row of counts and medians over runs, of one problem or of many."""
    finished = [run for run in runs if run.kind not in ("infinite", "failed")]
    errors = [abs(run.value - run.truth) for run in finished]
    trusted = sum(run.kind in KINDS[:2] for run in runs)
    return {
        "runs": len(runs),
        **{kind: sum(run.kind == kind for run in runs) for kind in KINDS},
        "share ok": trusted / len(runs),
        "half-width": median([run.half_width for run in finished]),
        "error": median(errors),
        "CPU s": median([run.seconds for run in runs]),
        "evaluations": int(median([run.evaluations for run in finished], 0)),
    }


def median(values, otherwise=math.nan):
    """The median of the finite values."""
    values = [value for value in values if math.isfinite(value)]
    return statistics.median(values) if values else otherwise


def run_dynesty(name, problem, settings):
    """One row: what dynesty gives for a problem, or why it was not run."""
    truth = problem.truth
    empty = dict.fromkeys(("value", "error", "std error", "calls", "CPU s"), "")
    pyro.set_rng_seed(FIRST_SEED)
    try:
        with warnings.catch_warnings(), default_dtype(torch.float64):
            warnings.simplefilter("ignore")
            found = nested_sampling(
                problem.target, problem.base, FIRST_SEED, **settings
            )
    except (NotRun, ArithmeticError, RuntimeError, ValueError) as error:
        note = str(error).partition("\n")[0]
        return {"problem": name, "truth": f"{truth:.4f}", **empty, "note": note}
    return {
        "problem": name,
        "truth": f"{truth:.4f}",
        "value": f"{found.value:.4f}",
        "error": found.value - truth,
        "std error": found.std_error,
        "calls": found.num_calls,
        "CPU s": found.seconds,
        "note": found.note,
    }


def tables_of(runs, dynesty):
    """All tables by title: totals, each group, dynesty, what was wrong, every run."""
    totals, groups = [], {}
    for group, builders in GROUPS.items():
        for dtype in DTYPES:
            part = [r for r in runs if r.problem in builders and r.dtype == dtype]
            by_name = {
                name: [r for r in part if r.problem == name] for name in builders
            }
            rows = [
                {"problem": name, "truth": f"{found[0].truth:.4f}", **summarise(found)}
                for name, found in by_name.items()
                if found
            ]
            if rows:
                totals.append({"problems": group, "dtype": dtype, **summarise(part)})
                groups[f"{group}, {dtype}"] = rows
    tables = {
        "Verdicts": totals,
        **{f"Verdicts: {title}": rows for title, rows in groups.items()},
        "dynesty": dynesty,
        "Wrong and ok": [row_of(run) for run in runs if run.kind == "wrong and ok"],
        "Runs": [run._asdict() for run in runs],
    }
    return {title: rows for title, rows in tables.items() if rows}


def row_of(run):
    """A row of the table of runs that are wrong and called ok."""
    return {
        "problem": run.problem,
        "dtype": run.dtype,
        "seed": str(run.seed),
        "truth": f"{run.truth:.4f}",
        "error": run.value - run.truth,
        "half-width": run.half_width,
        "status": run.status,
    }


def chosen(only):
    """Builders by name: all, or those of the groups and with the names given."""
    names = [name for builders in GROUPS.values() for name in builders]
    assert len(names) == len(set(names)), "two problems have the same name"
    unknown = set(only or ()) - set(GROUPS) - set(names)
    if unknown:
        raise SystemExit(f"no such problem or group: {', '.join(sorted(unknown))}")
    return {
        name: build
        for group, builders in GROUPS.items()
        for name, build in builders.items()
        if not only or group in only or name in only
    }


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="3 seeds, no dynesty; nothing is saved"
    )
    parser.add_argument("--seeds", type=int, default=None, help="default 20")
    parser.add_argument("--dtype", choices=DTYPES, help="default: both")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"these problems or groups ({', '.join(GROUPS)}); nothing is saved",
    )
    parser.add_argument("--no-dynesty", action="store_true")
    parser.add_argument("--limit", type=int, default=120, help="CPU seconds of a run")
    args = parser.parse_args()
    args.dtypes = [args.dtype] if args.dtype else list(DTYPES)
    args.is_saved = not (args.quick or args.only or args.dtype)
    args.settings = {}
    args.seeds = args.seeds or (3 if args.quick else 20)
    if args.smoke_test:
        args.seeds, args.only, args.is_saved = 1, ["coin", "trap"], True
        args.settings = {"num_live": 50, "max_calls": 5_000}
    return args


def main():
    args = parse()
    torch.set_num_threads(1)
    runs, dynesty = [], []
    for name, build in chosen(args.only).items():
        for dtype in args.dtypes:
            problem = build(DTYPES[dtype])
            for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
                runs.append(measure(name, problem, dtype, seed, args.limit))
                print(runs[-1], flush=True)
        if not (args.quick or args.no_dynesty):
            dynesty.append(run_dynesty(name, build(torch.float64), args.settings))
            print("dynesty:", dynesty[-1], flush=True)
    tables = tables_of(runs, dynesty)
    if args.is_saved:
        save("partition", description(), tables, smoke_test=args.smoke_test)
    tables.pop("Runs")
    for title, rows in tables.items():
        print(f"\n## {title}\n\n{as_markdown(rows)}")


def description():
    return __doc__.split("\n\n    python")[0]


if __name__ == "__main__":
    main()
