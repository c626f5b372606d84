"""The gradient of a Pyro model: of one chain by Pyro, of many by ``PyroModelEnergy``.

Pyro's is ``initialize_model``'s potential with ``potential_grad``, as its NUTS calls
them at each leapfrog step: one chain. ``vmap`` is ``torch.func`` over the same
potential. ``PyroModelEnergy`` records the model's operators once, and compiles them
with ``compile=True``. CPU time of one thread in microseconds, medians over interleaved
rounds; "time over Pyro's" is the median of the ratios to Pyro's one chain within a
round, and "rate a chain" is how many times more chains' gradients come out of a CPU
second. What it takes to build the energies and to compile is in a table of its own.
"""

import argparse
import resource
import statistics
import time

import pyro
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from report import save
from workloads import WORKLOADS

from pyro_ebm.energies import PyroModelEnergy

NAMES = ("eight_schools", "logistic", "neural")


def by_pyro(workload, *, jit=False):
    initial, potential, _, _ = initialize_model(
        workload.target, workload.args, jit_compile=jit, skip_jit_warnings=True
    )
    return potential, {name: value.detach() for name, value in initial.items()}


def by_vmap(workload, num_chains):
    potential, initial = by_pyro(workload)
    points = {k: torch.randn(num_chains, *v.shape) for k, v in initial.items()}
    function = torch.func.vmap(torch.func.grad_and_value(potential))

    def evaluate():
        # Checks of arguments branch on values, which vmap cannot do.
        with pyro.validation_enabled(False):
            return function(points)

    return evaluate


def cpu_seconds():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def build(workload, num_chains, *, compile):
    """The gradient, and the CPU seconds until it is ready."""
    start = cpu_seconds()
    energy = PyroModelEnergy(workload.target, *workload.args, compile=compile)
    x = torch.randn(num_chains, *energy.event_shape)
    for _ in range(3):
        energy.value_and_grad(x)
    return lambda: energy.value_and_grad(x), cpu_seconds() - start


def contenders(workload, all_chains):
    """Functions with the number of chains, and what it took to build them."""
    potential, point = by_pyro(workload)
    compiled, _ = by_pyro(workload, jit=True)
    functions = {
        "Pyro, 1 chain": (lambda: potential_grad(potential, point), 1),
        "Pyro, jit_compile, 1 chain": (lambda: potential_grad(compiled, point), 1),
    }
    seconds = {}
    for num_chains in all_chains:
        name = f"vmap, {num_chains:,} chains"
        functions[name] = by_vmap(workload, num_chains), num_chains
        for compile in (False, True):
            name = "PyroModelEnergy" + (", compiled" if compile else "")
            name = f"{name}, {num_chains:,} chains"
            function, seconds[name] = build(workload, num_chains, compile=compile)
            functions[name] = function, num_chains
    return functions, seconds


def microseconds(function, calls):
    start = time.process_time()
    for _ in range(calls):
        function()
    return 1e6 * (time.process_time() - start) / calls


def measure(functions, rounds, milliseconds):
    calls = {}
    for name, (function, _) in functions.items():
        microseconds(function, 2)
        once = max(microseconds(function, 2), 10.0)
        calls[name] = max(round(1e3 * milliseconds / once), 1)
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, (function, _) in functions.items():
            times[name].append(microseconds(function, calls[name]))
    return times


def as_rows(workload_name, functions, times):
    pyro_times = times["Pyro, 1 chain"]
    rows = []
    for name, values in times.items():
        ratio = statistics.median(
            value / one for value, one in zip(values, pyro_times, strict=True)
        )
        rows.append(
            {
                "model": workload_name,
                "what": name,
                "microseconds": statistics.median(values),
                "fastest": min(values),
                "slowest": max(values),
                "time over Pyro's": ratio,
                "rate a chain": functions[name][1] / ratio,
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--chains", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=30, help="a measurement")
    options = parser.parse_args()
    names = NAMES
    if options.smoke_test:
        names, options.chains, options.rounds, options.milliseconds = (
            NAMES[:1],
            [4],
            2,
            2,
        )
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    rows, building = [], []
    for name in names:
        functions, seconds = contenders(WORKLOADS[name](), options.chains)
        times = measure(functions, options.rounds, options.milliseconds)
        rows += as_rows(name, functions, times)
        building += [
            {"model": name, "what": what, "CPU s": value}
            for what, value in seconds.items()
        ]
    tables = {"Time of a gradient": rows, "Time to build": building}
    print(save("model", __doc__, tables, smoke_test=options.smoke_test))


if __name__ == "__main__":
    main()
