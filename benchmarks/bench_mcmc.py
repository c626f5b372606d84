"""How fast chains move, beside bare gradients of the same energy.

The yardstick is ``torch.autograd.grad(energy(x).sum(), x)``, eagerly, at as many points
as there are chains: "rates" are medians, over interleaved rounds, of its CPU time over
that of a gradient of another. For HMC with ten leapfrog steps a gradient is a tenth of
a transition, momenta and acceptance included. One thread, single precision. "Compiled"
takes ``CompiledEnergy``, as ``MCMC(compile=True)`` does. The network's gradient is by
autograd; "closed form" is a ``NeuralEnergy`` of the same shape, which knows its own.

torchebm and ebmkit have the same step, leapfrog steps and chains. Pyro's HMC moves one
state, so all chains are put in one, to be accepted or rejected together: no way to
sample, but it tells what its steps cost. ULA of others does less than ours, which
bounds the drift and computes what MALA's acceptance would be, as a measure of its bias.

No kernel can do without random numbers: "gradient and noise" is the bare gradient and
what MALA draws for a step, a normal a coordinate and a uniform a chain. What it then
takes to propose, accept and select, some 30 small operators, eager torch does in 50 to
100 microseconds, whatever the energy; see the last table. There "the rest" is what the
parts, timed by themselves, leave of a step; it is below zero where they were slower.
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
from pyro_ebm.mcmc.base import accept

LENGTH, LONG = 10, 32
STEP_SIZES = {"ring": 0.1, "network": 0.2, "network, closed form": 0.2}
STEP_SIZES |= {"gaussian10": 0.03, "gaussian100": 0.02}
BARE = "bare gradient"
OTHER_HMC = ("Pyro HMC, chains in one", "torchebm HMC", "ebmkit HMC")


def build_energies():
    names = ("ring", "network", "gaussian10", "gaussian100")
    energies = {name: WORKLOADS[name]().energy() for name in names}
    energies["network, closed form"] = NeuralEnergy((2,), (128, 128))
    return energies


def is_installed(module):
    return importlib.util.find_spec(module) is not None


def draw_noise(x):
    torch.randn_like(x)
    torch.rand(len(x))


def bare_gradient(energy, x):
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(energy(leaf).sum(), leaf)


def own_contenders(energy, x, step_size):
    """Functions, and how many gradients of all chains a call takes."""
    compiled = CompiledEnergy(energy)
    kernels = {
        "HMC": HMC(step_size, num_leapfrog=LENGTH),
        f"HMC, {LONG} steps": HMC(step_size, num_leapfrog=LONG),
        "MALA": MALA(step_size**2 / 2),
        "ULA": ULA(step_size**2 / 2),
    }
    contenders = {
        BARE: (lambda: bare_gradient(energy, x), 1),
        "gradient and noise": (lambda: (bare_gradient(energy, x), draw_noise(x)), 1),
    }
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


def median_ratio(first, second):
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def parts_of_mala(energy, x, step_size, rounds, seconds):
    """Microseconds of the gradient, the random numbers, the acceptance and the rest."""
    kernel = MALA(step_size**2 / 2)
    state = kernel.init(energy, x)
    log_ratio = torch.zeros_like(state.energy)
    parts = {
        "step": lambda: kernel.step(energy, state),
        "gradient": lambda: bare_gradient(energy, x),
        "noise": lambda: draw_noise(x),
        "accept and select": lambda: accept(log_ratio, state, state),
        "drawing for that": lambda: torch.rand(len(x)),
    }
    times = measure({k: (f, 1) for k, f in parts.items()}, rounds, seconds)
    found = {name: statistics.median(values) for name, values in times.items()}
    found["accept and select"] -= found.pop("drawing for that")
    step = found.pop("step")
    return {**found, "the rest": step - sum(found.values()), "step": step}


def run(name, energy, num_chains, options):
    """Measurements by contender, and the parts of a step."""
    x = torch.randn(num_chains, *energy.event_shape)
    contenders = own_contenders(energy, x, STEP_SIZES[name])
    for module, build in OTHERS.items():
        if is_installed(module):
            contenders |= build(energy, x, STEP_SIZES[name])
    seconds = options.milliseconds / 1e3
    times = measure(contenders, options.rounds, seconds)
    parts = parts_of_mala(energy, x, STEP_SIZES[name], options.rounds, seconds)
    return times, {"energy": name, "chains": num_chains} | parts


def tabulate(all_times):
    """Tables from lists of microseconds by number of chains, energy and contender."""
    tables, rows = {}, []
    for num_chains, by_energy in all_times.items():
        names = {name: None for times in by_energy.values() for name in times}
        rates = {name: {"rate": name} for name in names}
        for energy, times in by_energy.items():
            for name, values in times.items():
                rates[name][energy] = median_ratio(times[BARE], values)
                rows.append(
                    {
                        "energy": energy,
                        "chains": num_chains,
                        "what": name,
                        "microseconds": statistics.median(values),
                        "fastest": min(values),
                        "slowest": max(values),
                        "over bare": rates[name][energy],
                        "HMC over it": median_ratio(values, times["HMC"]),
                    }
                )
        tables[f"Rates, {num_chains:,} chains"] = list(rates.values())
    bare = [row for row in rows if row["what"] == BARE]
    keys = ("energy", "chains", "microseconds", "fastest", "slowest")
    tables["The bare gradient"] = [{key: row[key] for key in keys} for row in bare]
    tables["Rate of HMC over that of other HMC, leapfrog step by step"] = [
        {
            "energy": first["energy"],
            "chains": first["chains"],
            **{
                row["what"]: row["HMC over it"]
                for row in rows
                if row["what"] in OTHER_HMC
                and (row["energy"], row["chains"]) == (first["energy"], first["chains"])
            },
        }
        for first in bare
    ]
    return tables | {"All": rows}


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
    all_times, parts = {}, []
    for num_chains in options.chains:
        all_times[num_chains] = {}
        for name, energy in energies.items():
            found = run(name, energy, num_chains, options)
            all_times[num_chains][name] = found[0]
            parts.append(found[1])
    tables = tabulate(all_times)
    tables["Where a step of eager MALA spends its microseconds"] = parts
    missing = [name for name in ("torchebm", "ebm") if not is_installed(name)]
    note = f"\n\nNot installed, and so left out: {missing}." if missing else ""
    text = save("mcmc", __doc__.strip() + note, tables, smoke_test=options.smoke_test)
    print(text)


if __name__ == "__main__":
    main()
