"""Moves of clusters leave ``e^-f`` invariant, and forget a phase at once.

Chains start from exact draws and must stay there: a chi-square on all states.
"""

import math

import pytest
import torch
from torch import Tensor

from pyro_ebm.energies import (
    BoltzmannEnergy,
    ChainEnergy,
    FactorGraphEnergy,
    IsingEnergy,
    PottsEnergy,
    RBMEnergy,
)
from pyro_ebm.mcmc import Gibbs, SwendsenWang
from pyro_ebm.mcmc.kernels import swendsen_wang as module
from tests.mcmc.kernels.test_discrete_langevin import states

NUM_CHAINS = 20_000
RING = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3], [0, 2]])


def tables():
    """Pairs with fields inside, of three states; one state is forbidden at a site."""
    unary = torch.randn(4, 3)
    unary[1, 2] = -torch.inf
    pairs = 0.7 * torch.eye(3) + torch.randn(3, 1) + torch.randn(3)
    return FactorGraphEnergy(
        [3] * 4, [(RING, pairs), (torch.arange(4)[:, None], unary)]
    )


ENERGIES = {
    "ising": lambda: IsingEnergy((2, 4), 0.3),
    "ising-field": lambda: IsingEnergy((3, 3), 0.4, torch.randn(3, 3), periodic=False),
    "potts": lambda: PottsEnergy((2, 3), 3, 0.9),
    "graph": lambda: FactorGraphEnergy.ising(RING, torch.rand(5), torch.randn(4)),
    "tables": tables,
    "bits": lambda: BoltzmannEnergy(torch.rand(7, 7).triu(1), torch.randn(7) - 2),
}


def excess(energy, kernel, num_steps=2):
    """Standardised chi-square of all states after some steps from exact draws."""
    points = states(energy)
    p = (-energy(points)).detach().softmax(0)
    start = torch.multinomial(p, NUM_CHAINS, replacement=True)
    state = kernel.init(energy, points[start])
    for _ in range(num_steps):
        state, info = kernel.step(energy, state)
    assert info.accepted.all()
    torch.testing.assert_close(state.energy, energy(state.x).detach())
    place = {tuple(row): i for i, row in enumerate(points.flatten(1).tolist())}
    found = torch.tensor([place[tuple(row)] for row in state.x.flatten(1).tolist()])
    count = torch.bincount(found, minlength=len(p))
    assert not count[p == 0].any()
    common = p * NUM_CHAINS > 5
    expected = p[common] * NUM_CHAINS
    chi_square = ((count[common] - expected) ** 2 / expected).sum()
    degrees = int(common.sum()) - 1
    return ((chi_square - degrees) / math.sqrt(2 * degrees)).item()


@pytest.mark.parametrize("num_sweeps", [0, 1])
@pytest.mark.parametrize("name", ENERGIES)
def test_exact_draws_stay(name, num_sweeps):
    assert excess(ENERGIES[name](), SwendsenWang(num_sweeps)) < 5


def weak_bonds(monkeypatch):
    """Spins take the coupling of categories, which is half of theirs."""
    right = module._split

    def faulty(sites, table, fields):
        edges, strength = right(sites, table, fields)
        return edges, strength / 2

    monkeypatch.setattr(module, "_split", faulty)


def no_fields(monkeypatch):
    right = module._Couplings.of.__func__
    monkeypatch.setattr(
        module._Couplings,
        "of",
        classmethod(lambda cls, energy: right(cls, energy)._replace(fields=None)),
    )


def torn(monkeypatch):
    """Clusters that have met once are not joined any further."""
    monkeypatch.setattr(module, "_components", lambda first, *_: one_round(first, *_))

    def one_round(first, second, number):
        root = torch.arange(number)
        root[torch.maximum(first, second)] = torch.minimum(first, second)
        return root


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("ising", weak_bonds),
        ("potts", weak_bonds),
        ("ising-field", no_fields),
        ("bits", no_fields),
        ("potts", torn),
    ],
)
def test_planted_faults_are_caught(name, plant, monkeypatch):
    plant(monkeypatch)
    assert excess(ENERGIES[name](), SwendsenWang(0)) > 8


def test_components_are_those_of_a_depth_first_search():
    """Of random graphs, a long path in random order among them."""
    for edges in (torch.randint(300, (2, 180)), torch.randperm(300).unfold(0, 2, 1).mT):
        near: list[set[int]] = [set() for _ in range(300)]
        for i, j in edges.T.tolist():
            near[i].add(j)
            near[j].add(i)
        wanted = list(range(300))
        for start in range(300):
            stack = [start] if wanted[start] == start else []
            while stack:
                for j in near[stack.pop()]:
                    if wanted[j] > start:
                        wanted[j] = start
                        stack.append(j)
        assert module._components(*edges, 300).tolist() == wanted


def correlation(kernel, energy, lag):
    """Of the magnetisation with itself, from chains that start where it is large."""
    state = kernel.init(energy, torch.ones(64, *energy.event_shape))
    seen = []
    for _ in range(20 + lag):
        state, _ = kernel.step(energy, state)
        seen.append(state.x.mean((-2, -1)))
    return (seen[-1] * seen[-1 - lag]).mean() / seen[-1 - lag].square().mean()


def test_magnetisation_is_forgotten_at_the_critical_point():
    """After 10 steps, where sweeps remember nearly all of it after 40."""
    energy = IsingEnergy((16, 16), math.log(1 + math.sqrt(2)) / 2)
    assert abs(correlation(SwendsenWang(), energy, 10)) < 0.4
    assert correlation(Gibbs(), energy, 40) > 0.8


def test_the_reversal_sweeps_first():
    """``p(x) T(x, y) = p(y) T'(y, x)``; without the reversal it is far from that."""
    energy = IsingEnergy((3,), 0.5, torch.tensor([0.4, -0.2, 0.0]))
    points, number = states(energy), 100_000
    p = (-energy(points)).detach().softmax(0)

    def flow(kernel):
        start = torch.multinomial(p, number, replacement=True)
        end = kernel.sweep(energy, points[start])
        place = ((end + 1) / 2 * 2 ** torch.arange(3)).sum(1).long()
        return torch.bincount(8 * start + place, minlength=64).reshape(8, 8).double()

    def worst(first, second):
        there, back = flow(first), flow(second).mT
        return ((there - back) / (there + back).clamp(min=1).sqrt()).abs().max()

    assert worst(SwendsenWang(2), SwendsenWang(2, is_reversed=True)) < 4.5
    assert worst(SwendsenWang(0), SwendsenWang(0)) < 4.5


@pytest.mark.parametrize(
    ("energy", "match"),
    [
        (IsingEnergy((4, 4), -0.3), "must not be negative.*have -0.6"),
        (RBMEnergy(torch.ones(3, 2)), "RBMEnergy is not known as one"),
        (ChainEnergy(torch.zeros(2, 4, 3), torch.eye(3)), "ChainEnergy is not known"),
        (
            FactorGraphEnergy([2] * 3, [((0, 1, 2), torch.zeros(2, 2, 2))]),
            "one of 3 sites",
        ),
        (
            FactorGraphEnergy([2, 3], [((0, 1), torch.zeros(2, 3))]),
            r"of pairs with the same states.*\(2, 3\)",
        ),
        (
            FactorGraphEnergy([2, 2], [((0, 1), torch.eye(2).log())]),
            "finite",
        ),
        (
            FactorGraphEnergy([3] * 2, [((0, 1), torch.arange(9.0).view(3, 3) ** 2)]),
            "coupling of equal states",
        ),
    ],
)
def test_energies_without_clusters(energy, match):
    x: Tensor = torch.ones(5, *energy.event_shape)
    with pytest.raises(ValueError, match=match):
        SwendsenWang().init(energy, x)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_sweeps must not be negative, got -1"):
        SwendsenWang(-1)
    with pytest.raises(ValueError, match=r"3 of 3 points do not.*uniform"):
        SwendsenWang().init(IsingEnergy((2, 2), 0.1), torch.zeros(3, 2, 2))
