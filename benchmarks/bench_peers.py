"""Chains beside NumPyro's NUTS, blackjax's ChEES and nutpie, on posteriors of others.

The models are those of ``peer_models.py``, each one text for Pyro and for NumPyro. The
ESS is the smallest bulk ESS of all coordinates of all sites (for ``neural`` of its
predictions), by the same estimator for everyone. CPU seconds *all told* run from the
model to draws of its sites on one thread: recording or compiling, start, warm-up and
draws. What XLA needed to compile is in them, and in a column of its own (its wall time,
by the share of its core that the process had), as are the rates without it. Judging is
in those of pyro_ebm alone, whose ``run`` always ends with a verdict. Imports are in
none.

Each run is a process of its own, and a round has one of each method with the same seed.
Medians over rounds, and medians of ratios within a round. A run with an R-hat above
1.05 has drawn something else: its rate counts as nothing. So does one that takes more
than 120 CPU seconds, whose least ESS is given as 0.

* pyro_ebm: ``MCMC()`` with its defaults: 64 chains of 1,000 after 300 of warm-up.
* numpyro: NUTS, 4 chains of 1,000 after 1,000, vectorised.
* blackjax: ``chees_adaptation`` with the diagonal metric, then ``dynamic_hmc``: 64
  chains of 1,000 after 300, from uniform points in (-2, 2), Adam's learning rate 0.5.
* nutpie: 4 chains of 1,000 after its own warm-up, on NumPyro's density through JAX.

JAX computes in single precision, but for ``gp_pois``; pyro_ebm computes the energies of
all models in double precision, as is its default.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pyro
import torch
from peer_models import MODELS, numpyro_language, pyro_language
from report import RESULTS, save

from pyro_ebm import mcmc
from pyro_ebm.diagnostics import convergence

NUM_DRAWS, LIMIT = 1000, 120
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def run_pyro_ebm(model, seed, num_draws):
    chains = mcmc.MCMC(num_samples=num_draws, progress_bar=False)
    chains.run(model.model(pyro_language()))
    return chains.get_samples(group_by_chain=True)


def run_numpyro(model, seed, num_draws):
    import jax
    from numpyro.infer import MCMC, NUTS

    chains = MCMC(
        NUTS(model.model(numpyro_language())),
        num_warmup=num_draws,
        num_samples=num_draws,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    chains.run(jax.random.key(seed))
    return jax.block_until_ready(chains.get_samples(group_by_chain=True))


def run_blackjax(model, seed, num_draws, num_chains=64, num_warmup=300):
    import blackjax
    import jax
    import optax

    keys = jax.random.split(jax.random.key(seed), 3)
    start = Density(model, keys[0], (num_chains,))
    warmup = blackjax.chees_adaptation(
        start.log_density, num_chains, mass_matrix_estimation="diagonal"
    )
    (state, parameters), _ = warmup.run(
        keys[1],
        start.points,
        0.1,
        optax.adam(0.5),
        min(num_warmup, num_draws),
        max_sampling_steps=num_draws,
    )
    kernel = blackjax.dynamic_hmc(start.log_density, **parameters).step

    def step(state, key):
        state, _ = jax.vmap(kernel)(jax.random.split(key, num_chains), state)
        return state, state.position

    sample = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[1])
    draws = sample(state, jax.random.split(keys[2], num_draws))
    sites = jax.jit(jax.vmap(jax.vmap(start.constrain)))(draws)
    return {name: v.swapaxes(0, 1) for name, v in jax.block_until_ready(sites).items()}


def run_nutpie(model, seed, num_draws, num_chains=4):
    import jax
    import numpy as np
    import nutpie
    from nutpie.compiled_pyfunc import from_pyfunc

    start = Density(model, jax.random.key(seed))
    gradient, dtype = jax.jit(jax.value_and_grad(start.log_density)), start.points.dtype
    dim = len(start.points)

    def log_density(x):
        value, slope = gradient(x.astype(dtype))
        return float(value), np.asarray(slope, "float64")

    compiled = from_pyfunc(
        dim,
        lambda: log_density,
        lambda *_: lambda x: {"x": np.asarray(x, "float64")},
        [np.dtype("float64")],
        [(dim,)],
        ["x"],
    )
    found = nutpie.sample(
        compiled,
        draws=num_draws,
        chains=num_chains,
        cores=1,
        seed=seed,
        progress_bar=False,
    )
    draws = found.posterior["x"].to_numpy().astype(dtype)
    return jax.block_until_ready(jax.jit(jax.vmap(jax.vmap(start.constrain)))(draws))


class Density:
    """NumPyro's log-density of unconstrained points, and where chains start."""

    def __init__(self, model, key, batch_shape=()):
        import jax.flatten_util
        from numpyro.infer.util import initialize_model

        found = initialize_model(key, model.model(numpyro_language()))
        like, restored = jax.flatten_util.ravel_pytree(found.param_info.z)
        shape = (*batch_shape, len(like))
        self.points = jax.random.uniform(key, shape, like.dtype, -2, 2)
        self.log_density = lambda x: -found.potential_fn(restored(x))
        self.constrain = lambda x: found.postprocess_fn(restored(x))


METHODS = {
    "pyro_ebm": run_pyro_ebm,
    "numpyro": run_numpyro,
    "blackjax": run_blackjax,
    "nutpie": run_nutpie,
}


def is_installed(method):
    return importlib.util.find_spec(method) is not None


def cpu_seconds():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def watch_compiler(is_double):
    """A list that grows by the wall seconds of each compilation of XLA."""
    import jax

    jax.config.update("jax_enable_x64", is_double)
    jax.numpy.zeros(1).block_until_ready()  # starts the backend
    seconds = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def stop_at_limit():
    """A thread; not every kernel keeps to ``RLIMIT_CPU``."""
    while time.process_time() < LIMIT:
        time.sleep(1)
    os._exit(1)


def work(name, method, seed, num_draws):
    """One run, in a process of its own."""
    threading.Thread(target=stop_at_limit, daemon=True).start()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    os.environ["XLA_FLAGS"] = ONE_THREAD
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = MODELS[name]
    if model.is_double:
        torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(seed)
    compiling = []
    if method != "pyro_ebm":
        importlib.import_module(method)
        compiling = watch_compiler(model.is_double)
    start, wall = cpu_seconds(), time.perf_counter()
    draws = METHODS[method](model, seed, num_draws)
    seconds, wall = cpu_seconds() - start, time.perf_counter() - wall
    draws = {k: torch.from_dlpack(v).clone() for k, v in draws.items()}
    judged = [convergence(v) for v in model.quantities(draws).values()]
    return {
        "cpu": seconds,
        "compiling": sum(compiling) * min(seconds / wall, 1.0),
        "ess": min(c.bulk_ess.min().item() for c in judged),
        "r_hat": max(c.r_hat.max().item() for c in judged),
    }


def run(name, method, seed, num_draws):
    # A fork has what was imported, but nothing compiled. JAX must not be among it.
    context = multiprocessing.get_context("fork")
    row = {"model": name, "method": method, "seed": seed, "num_draws": num_draws}
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return row | pool.submit(work, name, method, seed, num_draws).result()
        except BrokenProcessPool:  # killed at the limit
            return row | {"cpu": LIMIT, "compiling": 0.0, "ess": 0.0, "r_hat": 9.0}


def rate(run, *, with_compiling=True):
    seconds = run["cpu"] - (0 if with_compiling else run["compiling"])
    return run["ess"] / seconds if run["r_hat"] < 1.05 else 0.0


def summarise(runs):
    """A row for each model and method, and for each model the ratios."""
    groups = {}
    for row in runs:
        groups.setdefault((row["model"], row["method"]), {})[row["seed"]] = row
    rows = []
    for (name, method), group in groups.items():

        def middle(of, group=group):
            return statistics.median(map(of, group.values()))

        rows.append(
            {
                "model": name,
                "method": method,
                "rounds": len(group),
                "CPU s all told": middle(lambda r: r["cpu"]),
                "of these compiling": middle(lambda r: r["compiling"]),
                "least ESS": middle(lambda r: r["ess"]),
                "R-hat": middle(lambda r: r["r_hat"]),
                "ESS a CPU s": middle(rate),
                "without compiling": middle(lambda r: rate(r, with_compiling=False)),
            }
        )
    ratios = []
    for name in dict.fromkeys(row["model"] for row in runs):
        own, row = groups.get((name, "pyro_ebm"), {}), {"model": name}
        for other, with_compiling in itertools.product([*METHODS][1:], (True, False)):
            theirs = groups.get((name, other), {})
            title = f"over {other}" + ("" if with_compiling else ", not compiling")
            row[title] = over(own, theirs, with_compiling=with_compiling)
        ratios.append(row)
    return ratios, rows


def over(own, theirs, *, with_compiling):
    """Median over the rounds that both have; empty where the other has no rate."""
    values = []
    for seed in own.keys() & theirs.keys():
        both = [rate(r[seed], with_compiling=with_compiling) for r in (own, theirs)]
        values.append(both[0] / both[1] if both[1] else float("inf"))
    return statistics.median(values) if values else ""


def write(runs, *, smoke_test):
    ratios, rows = summarise(runs)
    tables = {"Rates of pyro_ebm over those of others": ratios}
    tables |= {"Effective draws a CPU second": rows, "Runs": runs}
    missing = [name for name in METHODS if not is_installed(name)]
    note = f"\n\nNot installed, and so left out: {missing}." if missing else ""
    return save("peers", __doc__ + note, tables, smoke_test=smoke_test)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=NUM_DRAWS, help="of a chain")
    parser.add_argument("--update", action="store_true", help="keep other runs")
    options = parser.parse_args()
    if options.smoke_test:
        options.models, options.methods = ["eight_schools"], ["pyro_ebm"]
        options.seeds, options.draws = [0], 20
    asked = itertools.product(options.seeds, options.models, options.methods)
    asked = [task for task in asked if is_installed(task[2])]
    runs = []
    if options.update:
        tables = json.loads((RESULTS / "peers.json").read_text("utf-8"))["tables"]
        keys = {(name, method, seed) for seed, name, method in asked}
        kept = (r for r in tables["Runs"])
        runs = [r for r in kept if (r["model"], r["method"], r["seed"]) not in keys]
    text = ""
    for seed, name, method in asked:
        runs.append(run(name, method, seed, options.draws))
        text = write(runs, smoke_test=options.smoke_test)
    print(text)


if __name__ == "__main__":
    main()
