"""How fast chains move, beside bare gradients of the same energy.

The yardstick is ``torch.autograd.grad(energy(x).sum(), x)``, eagerly, at as many points
as there are chains. CPU time of one thread in microseconds a gradient of all chains;
for HMC with ten leapfrog steps that is a tenth of a transition, momenta and acceptance
included. Medians over interleaved rounds; "times the bare rate" is the median of the
ratios within a round. "Compiled" takes ``CompiledEnergy``, as ``MCMC(compile=True)``
does; seconds of compiling are in a table of their own.

The network's gradient is by autograd; ``NeuralEnergy`` knows a closed form, and the
rows "network, closed form" are that of the same shape over the yardstick by autograd.
Others: torchebm and ebmkit with the same step, leapfrog steps and chains. Pyro's HMC
moves one state, so all its chains are put in one, to be accepted or rejected together;
that is no way to sample, but tells what its gradients cost.
"""

import argparse
import functools
import importlib.util
import statistics
import time

import pyro
import torch
from pyro.infer import HMC as PyroHMC
from report import save
from workloads import WORKLOADS

from pyro_ebm.energies import CompiledEnergy, NeuralEnergy
from pyro_ebm.mcmc import HMC, MALA, ULA

LENGTH = 10
STEP_SIZES = {"ring": 0.1, "network": 0.2, "network, closed form": 0.2}
STEP_SIZES |= {"gaussian10": 0.03, "gaussian100": 0.02}
BARE = "bare gradient"


def build_energies():
    names = ("ring", "network", "gaussian10", "gaussian100")
    energies = {name: WORKLOADS[name]().energy() for name in names}
    energies["network, closed form"] = NeuralEnergy((2,), (128, 128))
    return energies


def is_installed(module):
    return importlib.util.find_spec(module) is not None


def bare_gradient(energy, x):
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(energy(leaf).sum(), leaf)


def own_contenders(energy, x, step_size):
    """Functions, and how many gradients of all chains a call takes."""
    compiled = CompiledEnergy(energy)
    kernels = {
        "HMC": HMC(step_size, num_leapfrog=LENGTH),
        "MALA": MALA(step_size**2 / 2),
        "ULA": ULA(step_size**2 / 2),
    }
    contenders = {BARE: (lambda: bare_gradient(energy, x), 1)}
    for prefix, target in {"": energy, "compiled ": compiled}.items():
        gradient = functools.partial(target.value_and_grad, x)
        contenders[f"{prefix}value_and_grad"] = (gradient, 1)
        for name, kernel in kernels.items():
            state = kernel.init(target, x)
            step = functools.partial(kernel.step, target, state)
            contenders[prefix + name] = (step, kernel.num_gradients)
    return contenders


def torchebm_contenders(energy, x, step_size):
    from torchebm.core import BaseModel
    from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

    class Model(BaseModel):
        def forward(self, x):
            return energy(x)

    hmc = HamiltonianMonteCarlo(Model(), step_size, LENGTH)
    langevin = LangevinDynamics(Model(), step_size=step_size**2 / 2)
    return {
        "torchebm HMC": (lambda: hmc.sample(x=x, n_steps=5), 5 * LENGTH),
        "torchebm Langevin": (lambda: langevin.sample(x=x, n_steps=50), 50),
    }


def ebmkit_contenders(energy, x, step_size):
    from ebm import samplers

    kernels = {
        "HMC": (samplers.HMC(step_size, leapfrog_steps=LENGTH), 5, LENGTH),
        "MALA": (samplers.MALA(step_size**2 / 2), 50, 1),
        "Langevin": (samplers.LangevinDynamics(step_size**2 / 2), 50, 1),
    }
    return {
        f"ebmkit {name}": (lambda k=kernel, n=n: k.sample(energy, x, steps=n), n * size)
        for name, (kernel, n, size) in kernels.items()
    }


def pyro_contenders(energy, x, step_size):
    kernel = PyroHMC(
        potential_fn=lambda z: energy(z["x"]).sum(),
        step_size=step_size,
        num_steps=LENGTH,
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    kernel.initial_params = {"x": x}
    kernel.setup(warmup_steps=0)
    return {"Pyro HMC, chains in one": (lambda: kernel.sample({"x": x}), LENGTH)}


OTHERS = {
    "pyro": pyro_contenders,
    "torchebm": torchebm_contenders,
    "ebm": ebmkit_contenders,
}


def cpu_seconds(function, calls):
    start = time.process_time()
    for _ in range(calls):
        function()
    return time.process_time() - start


def measure(contenders, rounds, seconds):
    """Microseconds a gradient, a list over the rounds for each contender."""
    calls = {}
    for name, (function, _) in contenders.items():
        cpu_seconds(function, 5)
        calls[name] = max(round(3 * seconds / max(cpu_seconds(function, 3), 1e-5)), 1)
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (function, gradients) in contenders.items():
            spent = cpu_seconds(function, calls[name])
            times[name].append(1e6 * spent / (calls[name] * gradients))
    return times


def as_rows(energy_name, times):
    return [
        {
            "energy": energy_name,
            "what": name,
            "microseconds": statistics.median(values),
            "fastest": min(values),
            "slowest": max(values),
            "times the bare rate": median_ratio(times[BARE], values),
        }
        for name, values in times.items()
    ]


def median_ratio(first, second):
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def compile_seconds(energy, x):
    """CPU and wall time until the leapfrog step and the gradient are compiled."""
    compiled, kernel = CompiledEnergy(energy), HMC(0.01, num_leapfrog=LENGTH)
    start = time.process_time(), time.perf_counter()
    for _ in range(2):
        kernel.step(compiled, kernel.init(compiled, x))
    return time.process_time() - start[0], time.perf_counter() - start[1]


def run(name, energy, num_chains, options):
    x = torch.randn(num_chains, *energy.event_shape)
    process, wall = compile_seconds(energy, x)
    step_size = STEP_SIZES[name]
    contenders = own_contenders(energy, x, step_size)
    for module, build in OTHERS.items():
        if is_installed(module):
            contenders |= build(energy, x, step_size)
    times = measure(contenders, options.rounds, options.milliseconds / 1e3)
    leapfrog = times["HMC"]
    against = {
        other: median_ratio(times[other], leapfrog) for other in times if "HMC" in other
    }
    comparison = {"energy": name, "chains": num_chains}
    comparison |= {f"over {other}": value for other, value in against.items()}
    compiling = {"energy": name, "chains": num_chains, "CPU s": process, "wall s": wall}
    return as_rows(name, times), comparison, compiling


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--chains", type=int, nargs="+", default=[1024, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=40, help="a measurement")
    options = parser.parse_args()
    energies = build_energies()
    if options.smoke_test:
        options.chains, options.rounds, options.milliseconds = [16], 2, 2
        energies = {"ring": energies["ring"]}
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    tables, comparisons, compilings = {}, [], []
    for num_chains in options.chains:
        rows = []
        for name, energy in energies.items():
            found, comparison, compiling = run(name, energy, num_chains, options)
            rows += found
            comparisons.append(comparison)
            compilings.append(compiling)
        tables[f"{num_chains:,} chains"] = rows
    tables["Rate of HMC's leapfrog steps over those of others"] = comparisons
    tables["Compiling, files of earlier runs cached"] = compilings
    missing = [name for name in ("torchebm", "ebm") if not is_installed(name)]
    note = f"\n\nNot installed, and so left out: {missing}." if missing else ""
    print(save("mcmc", __doc__ + note, tables, smoke_test=options.smoke_test))


if __name__ == "__main__":
    main()
