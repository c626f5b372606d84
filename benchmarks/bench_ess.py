"""What draws are worth: effective sample size a gradient and a CPU second.

The ESS is the smallest bulk ESS of all coordinates (of the predictions for ``neural``),
by the same estimator for everyone. A *lockstep gradient* is one gradient of all chains
at once; the ESS a thousand of them is that of a single chain, the total over the number
of chains, and counts the gradients of the draws alone. CPU seconds run from the model
to the last draw, on one thread: tracing, compiling and warmup are in them, compilers in
other processes too. Imports are not, except that of torch's compiler, nor is the
judging of the draws, which ``MCMC.run`` always does and which has a column of its own.
All compute in single precision, with as many transitions of warmup and draws.

Each run is a process of its own; a round has one of each method, with the same seed.
Medians over the rounds, and medians of ratios within a round. Compiled code is not
reused; but what torch's compiler finds out about the machine once and for all, in some
ten CPU seconds, it does find in its cache.

* pyro_ebm: ``MCMC(ChEES())``.
* blackjax: ``chees_adaptation`` with the diagonal metric, then ``dynamic_hmc``, both
  compiled; Adam's learning rate is 0.5, the best of 0.02, 0.1 and 0.5 on gaussian10.
* numpyro: NUTS, all chains vectorised.
* Pyro: NUTS, a single chain.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from report import RESULTS, save
from workloads import WORKLOADS

from pyro_ebm import mcmc
from pyro_ebm.diagnostics import convergence
from pyro_ebm.energies import CompiledEnergy, Energy
from pyro_ebm.mcmc.kernels.leapfrog import leapfrog
from pyro_ebm.mcmc.report.analysis import diagnose
from pyro_ebm.mcmc.run.driver import ChainRun
from pyro_ebm.mcmc.run.target import resolve_target
from pyro_ebm.mcmc.starts.start import start_chains

NUM_WARMUP, NUM_DRAWS = 300, {1: 1000, 64: 1000, 1024: 200}
ONE_THREAD = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # none in processes that outlive a run
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


class Task(NamedTuple):
    workload: str
    num_chains: int
    method: str
    seed: int
    num_warmup: int
    num_draws: int


class Counter(Energy):
    """Counts the leapfrog steps of all chains."""

    def __init__(self, energy):
        super().__init__(energy.event_shape, energy.support)
        self.energy, self.num_steps = energy, 0

    def forward(self, x):
        return self.energy(x)

    def value_and_grad(self, x):
        return self.energy.value_and_grad(x)

    def leapfrog(self, *args):
        self.num_steps += 1
        return leapfrog(self.energy, *args)


def run_pyro_ebm(workload, task, *, compile=False, **settings):
    """Draws ``(C, N, D)``, CPU seconds, gradients."""
    start, kernel = cpu_seconds(), mcmc.ChEES(**settings)
    target = resolve_target(workload.target, kernel, workload.args, {}, compile=compile)
    counter = Counter(target.energy)
    target = target._replace(energy=counter)
    start_of = start_chains(target, kernel, task.num_chains)
    run = ChainRun(
        target,
        start_of.kernel,
        start_of.state,
        num_superchains=start_of.num_groups,
        warmup_steps=task.num_warmup,
        keep_draws=True,
    )
    run.warm_up(progress_bar=False)
    num_warmup_steps = counter.num_steps
    run.sample(task.num_draws, 1, progress_bar=False)
    end = cpu_seconds()
    diagnose(run)
    return {
        "draws": run.draws["u"].transpose(0, 1),
        "cpu": end - start,
        "judging": cpu_seconds() - end,
        "gradients": counter.num_steps - num_warmup_steps,
        "warmup gradients": num_warmup_steps,
    }


def run_blackjax(workload, task, *, learning_rate=0.5):
    import blackjax
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    position = start_points(workload, task.num_chains)
    start = cpu_seconds()
    energy = workload.jax_energy(jnp)
    keys = jax.random.split(jax.random.key(task.seed), 2)
    warmup = blackjax.chees_adaptation(
        lambda x: -energy(x),
        task.num_chains,
        mass_matrix_estimation="diagonal",
        adaptation_info_fn=lambda state, info, _: Steps(info.num_integration_steps[0]),
    )
    (state, parameters), warmup_steps = warmup.run(
        keys[0],
        jnp.asarray(position.numpy()),
        0.1,
        optax.adam(learning_rate),
        task.num_warmup,
        max_sampling_steps=task.num_draws,
    )
    kernel = blackjax.dynamic_hmc(lambda x: -energy(x), **parameters).step

    def step(state, key):
        state, info = jax.vmap(kernel)(jax.random.split(key, task.num_chains), state)
        return state, (state.position, info.num_integration_steps[0])

    sample = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[1])
    draws, steps = sample(state, jax.random.split(keys[1], task.num_draws))
    jax.block_until_ready(draws)
    return {
        "cpu": cpu_seconds() - start,
        "draws": torch.from_numpy(np.array(draws)).transpose(0, 1),
        "gradients": int(steps.sum()),
        "warmup gradients": int(warmup_steps.number.sum()),
    }


class Steps(NamedTuple):
    number: Any


def run_numpyro(workload, task):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from numpyro.infer import MCMC, NUTS

    position = start_points(workload, task.num_chains)
    start = cpu_seconds()
    chains = MCMC(
        NUTS(potential_fn=workload.jax_energy(jnp)),
        num_warmup=task.num_warmup,
        num_samples=task.num_draws,
        num_chains=task.num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    chains.run(
        jax.random.key(task.seed),
        init_params=jnp.asarray(position.numpy()),
        extra_fields=("num_steps",),
    )
    draws = jax.block_until_ready(chains.get_samples(group_by_chain=True))
    seconds = cpu_seconds() - start
    steps = chains.get_extra_fields(group_by_chain=True)["num_steps"]
    return {
        "cpu": seconds,
        "draws": torch.from_numpy(np.array(draws)),
        "gradients": int(steps.max(0).sum()),  # all wait for the longest trajectory
    }


def run_pyro(workload, task, *, jit_compile=False):
    settings, initial = {"model": workload.target}, None
    if isinstance(workload.target, Energy):
        settings = {"potential_fn": lambda z: workload.target(z["x"])}
        initial = {"x": start_points(workload, 1)[0]}
    start = cpu_seconds()
    chains = pyro.infer.MCMC(
        pyro.infer.NUTS(jit_compile=jit_compile, ignore_jit_warnings=True, **settings),
        num_samples=task.num_draws,
        warmup_steps=task.num_warmup,
        initial_params=initial,
        disable_progbar=True,
    )
    chains.run(*workload.args)
    seconds = cpu_seconds() - start
    draws = [v.reshape(1, len(v), -1) for v in chains.get_samples().values()]
    return {"cpu": seconds, "draws": torch.cat(draws, -1)}


def start_points(workload, num_chains):
    """As ``MCMC`` has them, but each chain at its own: uniform for models, or normal"""
    energy = workload.energy()
    if isinstance(workload.target, Energy):
        return torch.randn(num_chains, *energy.event_shape)
    return energy.initial_points(num_chains)


def cpu_seconds():
    """Of this process and of those that it has started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Method(NamedTuple):
    """Who draws, where, and what must be installed for it."""

    run: Any
    num_chains: tuple[int, ...] = (64, 1024)
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    needs: str = "pyro"
    is_slow: bool = False


PAIR = ("gaussian10", "eight_schools")
METHODS = {
    "pyro_ebm": Method(run_pyro_ebm),
    "pyro_ebm, compiled": Method(functools.partial(run_pyro_ebm, compile=True)),
    "blackjax": Method(run_blackjax, needs="blackjax"),
    "numpyro": Method(run_numpyro, (64,), PAIR, needs="numpyro", is_slow=True),
    "Pyro": Method(run_pyro, (1,), PAIR, is_slow=True),
    "Pyro, compiled": Method(
        functools.partial(run_pyro, jit_compile=True), (1,), PAIR, is_slow=True
    ),
}
#: Workloads, numbers of chains, and whether all rounds are run.
PLAN = {
    "gaussian10": ((1, 64, 1024), True),
    "gaussian100": ((64, 1024), True),
    "eight_schools": ((1, 64, 1024), True),
    "logistic": ((64,), False),
    "neural": ((64,), False),
}


def is_installed(module):
    return importlib.util.find_spec(module) is not None


def work(task, cache):
    """One run, in a process of its own."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch.set_num_threads(1)
    pyro.set_rng_seed(task.seed)
    warnings.simplefilter("ignore")
    workload = WORKLOADS[task.workload]()
    start = time.perf_counter()
    found = METHODS[task.method].run(workload, task)
    wall = time.perf_counter() - start
    judged = convergence(workload.quantities(found.pop("draws")))
    ess = judged.bulk_ess.min().item()
    missing = {"judging": 0.0, "gradients": 0, "warmup gradients": 0}
    r_hat = judged.r_hat.max().item()
    return {**task._asdict(), **missing, **found, "wall": wall, "ess": ess, "r": r_hat}


def prime(cache):
    """Let torch's compiler find out about the machine."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    compiled, start = CompiledEnergy(WORKLOADS["ring"]().energy()), cpu_seconds()
    for _ in range(2):
        compiled.value_and_grad(torch.zeros(3, 2))
    return cpu_seconds() - start


def in_new_process(function, *args):
    # A fork has what was imported, but nothing compiled. JAX must not be among it.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def tasks_of_round(number, options):
    for name, (all_chains, is_full) in PLAN.items():
        for num_chains in all_chains:
            for method_name, method in METHODS.items():
                limit = options.rounds
                if method.is_slow or not is_full:
                    limit = min(limit, options.slow_rounds)
                if (
                    number < limit
                    and name in options.workloads
                    and num_chains in options.chains
                    and num_chains in method.num_chains
                    and name in method.workloads
                    and is_installed(method.needs)
                ):
                    num_draws = options.draws or NUM_DRAWS[num_chains]
                    num_warmup = options.warmup or NUM_WARMUP
                    yield Task(
                        name, num_chains, method_name, number, num_warmup, num_draws
                    )


def measure(options, report):
    runs = kept_runs(options.workloads) if options.update else []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seconds = in_new_process(prime, folder / "primed")
        for number in range(options.rounds):
            for task in tasks_of_round(number, options):
                shutil.copytree(folder / "primed", folder / "run")
                runs.append(in_new_process(work, task, folder / "run"))
                shutil.rmtree(folder / "run")
                report(runs, seconds)  # a run that is cut short leaves what it has


def kept_runs(workloads):
    """Runs of other workloads, from the file of results."""
    tables = json.loads((RESULTS / "ess.json").read_text("utf-8"))["tables"]
    return [run for run in tables["Runs"] if run["workload"] not in workloads]


def summarise(runs):
    """A row for each workload, number of chains and method; and ratios of rates."""
    groups = {}
    for run in runs:
        key = run["workload"], run["num_chains"], run["method"]
        groups.setdefault(key, {})[run["seed"]] = run
    gradients, seconds = [], []
    for (name, num_chains, method), group in groups.items():
        rows = list(group.values())
        head = {"workload": name, "chains": num_chains, "method": method}
        head["rounds"] = len(rows)

        def middle(of, rows=rows):
            return statistics.median(map(of, rows))

        if middle(lambda r: r["gradients"]):
            values = [1e3 * r["ess"] / r["num_chains"] / r["gradients"] for r in rows]
            gradients.append(
                head
                | {
                    "ESS per 1,000 gradients": statistics.median(values),
                    "least": min(values),
                    "largest": max(values),
                    "gradients a draw": middle(
                        lambda r: r["gradients"] / r["num_draws"]
                    ),
                    "gradients of warmup": middle(lambda r: r["warmup gradients"]),
                    "R-hat": middle(lambda r: r["r"]),
                }
            )
        seconds.append(
            head
            | {
                "CPU s": middle(lambda r: r["cpu"]),
                "judging": middle(lambda r: r["judging"]),
                "ESS": middle(lambda r: r["ess"]),
                "ESS per CPU s": middle(rate),
                "over blackjax": over(
                    group, groups.get((name, num_chains, "blackjax"))
                ),
                "over Pyro": over(group, groups.get((name, 1, "Pyro"))),
                "over Pyro, compiled": over(
                    group, groups.get((name, 1, "Pyro, compiled"))
                ),
            }
        )
    return gradients, seconds


def rate(run):
    return run["ess"] / run["cpu"]


def over(group, other):
    """Median over the rounds that both have."""
    shared = group.keys() & (other or {}).keys()
    if not shared:
        return ""
    return statistics.median(rate(group[seed]) / rate(other[seed]) for seed in shared)


def write(runs, seconds, *, smoke_test):
    gradients, rates = summarise(runs)
    tables = {"ESS a CPU second": rates, "Runs": runs}
    if gradients:
        tables = {"ESS of one chain a gradient": gradients, **tables}
    missing = [name for name in ("blackjax", "numpyro") if not is_installed(name)]
    note = f"\n\nWhat torch's compiler did once for the machine took {seconds:.0f} s."
    note += f" Not installed, and so left out: {missing}." if missing else ""
    return save("ess", __doc__ + note, tables, smoke_test=smoke_test)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--workloads", nargs="+", default=list(PLAN))
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--update", action="store_true", help="keep other workloads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, help="transitions; default: 300")
    parser.add_argument("--draws", type=int, help="of a chain")
    options = parser.parse_args()
    if options.smoke_test:
        options.workloads, options.chains = ["eight_schools"], [64]
        options.rounds, options.warmup, options.draws = 1, 20, 20
    os.environ.update(ONE_THREAD)
    report = functools.partial(write, smoke_test=options.smoke_test)
    texts = []
    measure(options, lambda runs, seconds: texts.append(report(runs, seconds)))
    print(texts[-1])


if __name__ == "__main__":
    main()
