"""Exact sums and Gibbs sweeps over finite sites, beside loops and other libraries.

CPU time of one thread in milliseconds, medians over interleaved rounds, and the ratio
of each contender to ours within its round. Chains: log Z of 64 sequences with its
gradient, in single precision. A tree of 100 sites with 4 states: log Z with all
marginals. A grid of 8 x 8 spins with a free boundary: log Z. Orders and paths are
found beforehand. Sweeps: all sites once, of 1,024 chains (256 for Potts). The plain
sweep draws block after block from ``site_logits`` by ``bernoulli`` or ``Categorical``;
the bare products are the two of a restricted machine with ``rand < sigmoid``. Peers
that are not installed are left out: pytorch-crf, pgmpy, thrml.
"""

import argparse
import functools
import importlib.util
import logging
import os
import statistics
import time

import numpy as np
import opt_einsum
import pyro
import torch
from report import save

from pyro_ebm.energies import (
    BoltzmannEnergy,
    ChainEnergy,
    FactorGraphEnergy,
    IsingEnergy,
    PottsEnergy,
    RBMEnergy,
    grid_edges,
)
from pyro_ebm.mcmc import Gibbs


def has(name):
    return importlib.util.find_spec(name) is not None


# Chains ------------------------------------------------------------------------------


def looped(unary, transition):
    message = unary[:, 0]
    for t in range(1, unary.shape[1]):
        message = (message[..., None] + transition).logsumexp(-2) + unary[:, t]
    return message.logsumexp(-1)


def of_crf(unary, transition):
    from torchcrf import CRF

    crf = CRF(unary.shape[-1], batch_first=False)
    zeros = torch.zeros_like(crf.start_transitions)
    for name, value in (
        ("start_transitions", zeros),
        ("end_transitions", zeros),
        ("transitions", transition),
    ):
        delattr(crf, name)
        setattr(crf, name, value)
    mask = torch.ones(unary.shape[1], len(unary), dtype=torch.bool)
    return crf._compute_normalizer(unary.transpose(0, 1), mask)


def chains(length, num_states, batch=64):
    unary = torch.randn(batch, length, num_states, requires_grad=True)
    transition = torch.randn(num_states, num_states, requires_grad=True)

    def with_gradient(function):
        value = function(1 * unary, 1 * transition)
        grads = torch.autograd.grad(value.sum(), (unary, transition))
        return value.detach(), *grads

    def ours(unary, transition):
        return ChainEnergy(unary, transition).closed_form().log_partition

    functions = {"ours": ours, "loop of logsumexp": looped}
    if has("torchcrf"):
        functions["pytorch-crf"] = of_crf
    return {name: functools.partial(with_gradient, f) for name, f in functions.items()}


# Graphs ------------------------------------------------------------------------------


def tree(num_sites=100, num_states=4):
    parents = [int(torch.randint(i, ())) for i in range(1, num_sites)]
    edges = torch.tensor(list(zip(range(1, num_sites), parents, strict=True)))
    pairs = torch.randn(len(edges), num_states, num_states)
    unary = torch.randn(num_sites, num_states)
    sites = torch.arange(num_sites)[:, None]
    energy = FactorGraphEnergy(
        [num_states] * num_sites, [(edges, pairs), (sites, unary)]
    )

    def ours():
        exact = energy.closed_form().distribution
        with torch.no_grad():
            return exact.log_partition, exact.marginals()

    symbols = [opt_einsum.get_symbol(i) for i in range(num_sites)]
    terms = [symbols[i] + symbols[j] for i, j in edges.tolist()] + symbols
    equation = ",".join(terms) + "->"
    shapes = [(num_states,) * len(term) for term in terms]
    contract = opt_einsum.contract_expression(equation, *shapes, optimize="greedy")

    def by_einsum():
        own = unary.clone().requires_grad_()
        backend = "pyro.ops.einsum.torch_log"
        value = contract(*pairs.unbind(), *own.unbind(), backend=backend)
        return value.detach(), *torch.autograd.grad(value, own)

    return {"ours": ours, "opt_einsum": by_einsum}


def grid(side=8, coupling=0.3):
    edges = grid_edges((side, side))

    def ours():
        energy = FactorGraphEnergy.ising(edges, coupling)
        with torch.no_grad():
            return (energy.closed_form().log_partition,)

    found = {"ours, graph and all": ours}
    energy = IsingEnergy((side, side), coupling, periodic=False)

    def lattice():
        with torch.no_grad():
            return (energy.closed_form().log_partition,)

    found["ours, a lattice"] = lattice
    if has("pgmpy"):
        found["pgmpy"] = by_pgmpy(edges.tolist(), coupling)
    return found


def by_pgmpy(edges, coupling):
    logging.disable(logging.WARNING)
    from pgmpy.factors.discrete import DiscreteFactor
    from pgmpy.inference import VariableElimination
    from pgmpy.models import DiscreteMarkovNetwork

    table = np.exp(coupling * np.outer([-1, 1], [-1, 1]))
    model = DiscreteMarkovNetwork([(str(i), str(j)) for i, j in edges])
    factors = [DiscreteFactor([str(i), str(j)], [2, 2], table) for i, j in edges]
    model.add_factors(*factors)

    inference = VariableElimination(model)
    inference._initialize_structures()
    *order, last = sorted(model.nodes(), key=int)  # row by row

    def run():
        # Of one site the factor that is left, not normalised: its sum is Z.
        left = inference._variable_elimination(
            [last], "marginalize", elimination_order=order, show_progress=False
        )
        return (torch.tensor(float(np.log(left.values.sum()))),)

    return run


# Sweeps ------------------------------------------------------------------------------


def plain_sweep(energy, x):
    """Block after block, by torch's own distributions."""
    for block in energy.blocks:
        logits = energy.site_logits(x)
        if len(logits) == 2:
            index = torch.bernoulli((logits[1] - logits[0]).sigmoid()).long()
        else:
            logits = logits.movedim(0, -1)
            index = torch.distributions.Categorical(logits=logits).sample()
        x = torch.where(block, energy.values[index], x)
    return x


def bare_products(energy, x):
    hidden = torch.addmm(energy.hidden_bias, x, energy.weight).sigmoid_()
    hidden = (torch.rand_like(hidden) < hidden).to(x)
    visible = torch.addmm(energy.visible_bias, hidden, energy.weight.mT).sigmoid_()
    return (torch.rand_like(visible) < visible).to(x)


def sweeps(energy, num_chains):
    kernel = Gibbs()
    shape = (num_chains, *energy.event_shape)
    values = getattr(energy, "values", torch.tensor([0.0, 1.0]))
    x = values[torch.randint(len(values), shape)]
    plain = bare_products if isinstance(energy, RBMEnergy) else plain_sweep
    name = "bare products" if plain is bare_products else "plain sweep"
    contenders = {"ours": kernel.sweep, name: plain}
    found = {n: lambda f=f: (f(energy, x),) for n, f in contenders.items()}
    if isinstance(energy, IsingEnergy) and has("thrml"):
        found["thrml"] = by_thrml(energy, num_chains)
    return {name: torch.no_grad()(f) for name, f in found.items()}


def by_thrml(energy, num_chains):
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ.setdefault("XLA_FLAGS", flags)
    import jax
    from thrml import Block, SamplingSchedule, SpinNode, sample_states
    from thrml.models import IsingEBM, IsingSamplingProgram

    shape = energy.event_shape
    nodes = [SpinNode() for _ in range(shape.numel())]
    pairs = energy.factors()[0][0].tolist()
    edges = [(nodes[i], nodes[j]) for i, j in pairs]
    biases, weights = jax.numpy.zeros(len(nodes)), jax.numpy.ones(len(edges))
    beta = jax.numpy.array(energy.coupling.item())
    model = IsingEBM(nodes, edges, biases, weights, beta)
    blocks = [
        Block([nodes[i] for i in mask.flatten().nonzero().flatten().tolist()])
        for mask in energy.blocks
    ]
    program = IsingSamplingProgram(model, blocks, clamped_blocks=[])
    key = jax.random.key(0)
    start = [jax.random.bernoulli(key, 0.5, (len(block.nodes),)) for block in blocks]
    # Differences of runs leave out what is not a sweep.
    counts = (2, 22)

    def run(num):
        schedule = SamplingSchedule(n_warmup=num, n_samples=1, steps_per_sample=1)
        one = lambda k: sample_states(k, program, schedule, start, [], [Block(nodes)])  # noqa: E731
        return jax.jit(jax.vmap(one))

    few, many = run(counts[0]), run(counts[1])
    keys = jax.random.split(key, num_chains)

    def sweep():
        jax.block_until_ready(many(keys))
        return (torch.zeros(()),)

    sweep.base = lambda: jax.block_until_ready(few(keys))
    sweep.base()  # compiled
    sweep.number = counts[1] - counts[0]
    return sweep


# Timing ------------------------------------------------------------------------------


def milliseconds(function, repeats):
    start = time.process_time()
    for _ in range(repeats):
        function()
    took = 1e3 * (time.process_time() - start) / repeats
    if not hasattr(function, "base"):
        return took
    start = time.process_time()
    function.base()
    return (took - 1e3 * (time.process_time() - start)) / function.number


def rows_of(name, contenders, rounds, seconds):
    """Medians, and the ratios to the first within a round."""
    values = {what: f() for what, f in contenders.items()}
    first, *others = values.values()
    if "sweep" not in name:
        for other in others:  # the same answers
            for a, b in zip(first, other, strict=False):
                torch.testing.assert_close(a, b.to(a), rtol=1e-3, atol=1e-3)
    repeats = {}
    for what, f in contenders.items():
        once = max(milliseconds(f, 1), 1e-3)
        is_whole = hasattr(f, "base")
        repeats[what] = 1 if is_whole else max(1, int(1e3 * seconds / once))
    times = {what: [] for what in contenders}
    for _ in range(rounds):
        for what, f in contenders.items():
            times[what].append(milliseconds(f, repeats[what]))
    ours = next(iter(times.values()))
    return [
        {
            "case": name,
            "contender": what,
            "median ms": statistics.median(own),
            "over ours": statistics.median(map(_ratio, own, ours)),
        }
        for what, own in times.items()
    ]


def _ratio(first, second):
    return first / second


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke-test", action="store_true", help="in a few seconds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each, a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    num = 16 if options.smoke_test else 1024
    if options.smoke_test:
        options.rounds, options.seconds = 2, 0.01
    sums = {
        "chain of 200 sites, 5 states": lambda: chains(200, 5),
        "chain of 50 sites, 20 states": lambda: chains(50, 20),
        "tree of 100 sites": tree,
        "grid of 8 x 8 spins": grid,
    }
    dense = torch.randn(100, 100).triu(1) / 10
    machine = torch.randn(784, 64) / 20
    moves = {
        "sweep, Ising 32 x 32": lambda: sweeps(IsingEnergy((32, 32), 0.44), num),
        "sweep, Potts 16 x 16": lambda: sweeps(PottsEnergy((16, 16), 3, 1.0), num // 4),
        "sweep, dense machine of 100": lambda: sweeps(BoltzmannEnergy(dense), num),
        "sweep, restricted machine 784 x 64": lambda: sweeps(RBMEnergy(machine), num),
    }
    tables = {
        title: [
            row
            for name, build in cases.items()
            for row in rows_of(name, build(), options.rounds, options.seconds)
        ]
        for title, cases in (("Exact sums", sums), ("Gibbs sweeps", moves))
    }
    print(save("discrete", __doc__, tables, smoke_test=options.smoke_test))


if __name__ == "__main__":
    main()
