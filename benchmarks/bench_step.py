"""What a step of persistent contrastive divergence costs beside bare energy gradients.

A network 2-128-128-1 on a Gaussian, 1,024 chains, 20 MALA moves a step, batches of 256,
by SVI. The yardstick is 20 gradients of the same energy at 1,024 points: by autograd on
the sum of the batch, and in the closed form that the energy has. CPU time of one thread
in milliseconds; medians over interleaved rounds. What tracking log Z does every 1,000
steps is in its time with a thousandth part a step.
"""

import argparse
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from report import save

import pyro_ebm
from pyro_ebm.testing import CountingEnergy

NUM_CHAINS, NUM_MOVES, BATCH_SIZE = 1024, 20, 256


def build_energy():
    gaussian = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    return pyro_ebm.energies.NeuralEnergy((2,), (128, 128), base=gaussian), gaussian


def build_step(name, module, distribution, data):
    """A parameter step by SVI; ``distribution()`` stands at the energy site."""

    def model(batch):
        pyro.module(name, module)
        with pyro.plate("data", len(batch)):
            pyro.sample("x", distribution(), obs=batch)

    objective = pyro_ebm.infer.MaximumLikelihood(
        num_chains=NUM_CHAINS, num_steps=NUM_MOVES
    )
    learned = pyro_ebm.infer.Learn(model, objective)
    optim = pyro.optim.Adam({"lr": 1e-4})
    svi = pyro.infer.SVI(learned, lambda batch: None, optim, pyro.infer.Trace_ELBO())
    return lambda: svi.step(data[torch.randint(len(data), (BATCH_SIZE,))])


def build_untracked(name, energy, gaussian, data):
    sampler = pyro_ebm.mcmc.IndependentChains(base=gaussian)
    return build_step(
        name,
        energy,
        lambda: pyro_ebm.EnergyDistribution(energy, sampler=sampler),
        data,
    )


def autograd_gradients(energy, x):
    for _ in range(NUM_MOVES):
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(energy(leaf).sum(), leaf)


def own_gradients(energy, x):
    for _ in range(NUM_MOVES):
        energy.value_and_grad(x)


def milliseconds(function, repeats):
    start = time.process_time()
    for _ in range(repeats):
        function()
    return 1e3 * (time.process_time() - start) / repeats


def evaluations_a_step(data, num_steps=20):
    """Points at which the energy is evaluated in a step without tracking."""
    energy, gaussian = build_energy()
    counting = CountingEnergy(energy)
    step = build_untracked("counted", counting, gaussian, data)
    step()
    counting.reset()
    for _ in range(num_steps):
        step()
    return counting.num_gradients / num_steps, counting.num_values / num_steps


def measure(data, rounds, repeats):
    energy, gaussian = build_energy()
    x = gaussian.sample((NUM_CHAINS,))
    tracked = pyro_ebm.EnergyModel(*build_energy())
    tracked_step = build_step("tracked", tracked, tracked, data)
    contenders = {
        "20 gradients by autograd": lambda: autograd_gradients(energy, x),
        "20 gradients by value_and_grad": lambda: own_gradients(energy, x),
        "step": build_untracked("untracked", energy, gaussian, data),
        "step with tracking": tracked_step,
    }
    for function in contenders.values():
        function()
    times = {name: [] for name in contenders}
    checks = []
    for _ in range(rounds):
        for name, function in contenders.items():
            times[name].append(milliseconds(function, repeats))
        checks.append(milliseconds(tracked.log_partition.check, 1))
        interval = tracked.log_partition.check_interval
        times["step with tracking"][-1] += checks[-1] / interval
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20, help="multiple of 10")
    options = parser.parse_args()
    if options.smoke_test:
        options.rounds, options.repeats = 2, 10
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    data = pyro_ebm.datasets.two_moons(10_000)
    times = measure(data, options.rounds, options.repeats)
    bare, own = list(times.values())[:2]
    rows = [
        {
            "what": name,
            "median ms": statistics.median(values),
            "fastest ms": min(values),
            "slowest ms": max(values),
            "over autograd": statistics.median(map(_ratio, values, bare)),
            "over value_and_grad": statistics.median(map(_ratio, values, own)),
        }
        for name, values in times.items()
    ]
    gradients, values = evaluations_a_step(data)
    counts = {
        "gradients a step": gradients,
        "values a step": values,
        "over 20 gradients": (gradients + values) / (NUM_MOVES * NUM_CHAINS),
    }
    tables = {"CPU time": rows, "Energy evaluations, without tracking": [counts]}
    print(save("step", __doc__, tables, smoke_test=options.smoke_test))


def _ratio(first, second):
    return first / second


if __name__ == "__main__":
    main()
