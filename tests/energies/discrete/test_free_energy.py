"""Free energies against sums over the states of the hidden sites."""

import itertools

import pytest
import torch

from pyro_ebm.energies import (
    BoltzmannEnergy,
    ChainEnergy,
    ClampedEnergy,
    FactorGraphEnergy,
    FreeEnergy,
    FunctionEnergy,
    IsingEnergy,
    RBMEnergy,
)
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.mcmc import Gibbs
from pyro_ebm.partition import enumeration
from tests.energies.discrete.test_chain import chi_square


def deep(sizes=(4, 3, 2)):
    """A deep machine: layer upon layer, each tied to the next."""
    first = [0, *itertools.accumulate(sizes)]
    layers = [range(a, b) for a, b in itertools.pairwise(first)]
    edges = [e for a, b in itertools.pairwise(layers) for e in itertools.product(a, b)]
    tables = torch.zeros(len(edges), 2, 2)
    tables[:, 1, 1] = torch.randn(len(edges))
    bias = torch.stack([torch.zeros(first[-1]), torch.randn(first[-1])], -1)
    sites = torch.arange(first[-1])[:, None]
    pairs = (torch.tensor(edges), tables)
    return FactorGraphEnergy([2] * first[-1], [pairs, (sites, bias)])


def tree():
    sizes = {"a": 2, "b": 3, "c": 2, "d": 4}
    edges = [("a", "b"), ("b", "c"), ("b", "d")]
    return FactorGraphEnergy(
        sizes, [(e, torch.randn(sizes[e[0]], sizes[e[1]])) for e in edges]
    )


def boltzmann(*, spins):
    weight = torch.randn(6, 6).triu(1)
    return BoltzmannEnergy(weight, torch.randn(6), spins=spins)


CASES = {
    "deep": (deep, [4, 5, 6, 7, 8]),
    "tree": (tree, ["b", "d"]),
    "spins": (lambda: boltzmann(spins=True), [1, 4]),
    "bits": (lambda: boltzmann(spins=False), torch.arange(6) % 2 == 0),
    "lattice": (lambda: IsingEnergy((2, 3), 0.4), torch.eye(2, 3, dtype=torch.bool)),
    "chain": (lambda: ChainEnergy(torch.randn(4, 3), torch.randn(3, 3)), [1, 2]),
}


@pytest.fixture(params=CASES)
def case(request):
    """An energy, its free energy, all visible points and minus the free energies."""
    build, hidden = CASES[request.param]
    energy = build()
    visible = FreeEnergy(energy, hidden)
    x, points = all_points(energy), all_points(visible)
    seen = x.flatten(1)[:, visible.visible]
    same = (seen[:, None] == points).all(-1)
    terms = (-energy(x))[:, None].where(same, -torch.inf).logsumexp(0)
    return energy, visible, points, terms


def all_points(energy):
    space = energy.support, energy.event_shape
    return finite_points(*space, torch.arange(num_points(*space)), torch.ones(1))


def test_values_log_z_and_gradients(case):
    """Planted faults: the observed state of the first point for all; a hidden site
    without its own potential."""
    energy, visible, points, terms = case
    torch.testing.assert_close(-visible(points), terms)
    known, truth = visible.closed_form(), terms.logsumexp(0)
    torch.testing.assert_close(known.log_partition, truth)
    assert enumeration(visible).value == pytest.approx(truth.item(), abs=1e-10)
    own = list(energy.parameters())
    weights = torch.randn(len(points))
    for a, b, c in zip(
        torch.autograd.grad(-visible(points) @ weights, own),
        torch.autograd.grad(terms @ weights, own, retain_graph=True),
        torch.autograd.grad(truth, own),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert c.isfinite().all()
    wrong = points[:1] + 0.5
    assert visible(wrong).item() == torch.inf


def test_draws_and_chains(case):
    """Planted fault: the hidden sites looked at."""
    energy, visible, points, terms = case
    exact = visible.closed_form().distribution
    draws = exact.sample((10_000,))
    place = lambda x: (x[:, None] == points).all(-1).long().argmax(-1)  # noqa: E731
    assert chi_square(place(draws), terms.detach()) < 4
    state = Gibbs().init(visible, draws)
    moved = Gibbs(2).step(visible, state)[0].x
    assert chi_square(place(moved), terms.detach()) < 4
    seen = points[0, 0]
    part = ClampedEnergy(visible, {0: seen}).closed_form()
    inside = points[:, 0] == seen
    torch.testing.assert_close(part.log_partition, terms[inside].logsumexp(0))
    with pytest.raises(NotImplementedError, match="most probable state of visible"):
        _ = exact.mode


def test_a_machine_of_two_layers_is_restricted():
    weight, biases = torch.randn(5, 3), torch.randn(8)
    whole = torch.zeros(8, 8)
    whole[:5, 5:] = weight
    visible = FreeEnergy(BoltzmannEnergy(whole, biases), hidden=[5, 6, 7])
    machine = RBMEnergy(weight, biases[:5], biases[5:])
    v = torch.randint(2, (7, 5)).double()
    torch.testing.assert_close(visible(v), machine(v))
    assert visible.float()(v.float()).dtype == torch.float32
    found = enumeration(visible).value
    assert found == pytest.approx(machine.closed_form().log_partition.item(), rel=1e-6)


def test_batches():
    tables = torch.randn(3, 2, 2), torch.randn(2, 2)
    energy = FactorGraphEnergy([2] * 3, [((0, 1), tables[0]), ((1, 2), tables[1])])
    visible = FreeEnergy(energy, [1])
    v = torch.randint(2, (5, 3, 2)).double()
    for i in range(3):
        parts = [((0, 1), tables[0][i]), ((1, 2), tables[1])]
        one = FreeEnergy(FactorGraphEnergy([2] * 3, parts), [1])
        torch.testing.assert_close(visible(v)[:, i], one(v[:, i]))
        log_z = visible.closed_form().log_partition[i]
        torch.testing.assert_close(log_z, one.closed_form().log_partition)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="must be made of factors.*FunctionEnergy"):
        FreeEnergy(FunctionEnergy(lambda x: x.sum(-1), (3,)), [0])
    for hidden in ([], [0, 1, 2, 3, 4, 5], [1, 1], [6], ["a"], [-1]):
        with pytest.raises(ValueError, match="some of the 6 sites and not all"):
            FreeEnergy(boltzmann(spins=True), hidden)
    with pytest.raises(ValueError, match=r"event's shape \(6,\), got \(5,\)"):
        FreeEnergy(boltzmann(spins=True), torch.ones(5, dtype=torch.bool))
    large = BoltzmannEnergy(torch.ones(40, 40).triu(1))
    with pytest.raises(ValueError, match="sum over 39 hidden sites.*mcmc.Gibbs"):
        FreeEnergy(large, range(1, 40))
