"""Factor graphs against sums over all of their states."""

import itertools
import math
import sys
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_ebm
from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import (
    ClampedEnergy,
    FactorGraphEnergy,
    IsingEnergy,
    PottsEnergy,
    PyroModelEnergy,
    grid_edges,
    torus_edges,
)
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.partition import enumeration, estimate
from tests.energies.discrete.test_chain import chi_square


def tree():
    """Two trees: 4 - 1 - 0 - 2, 1 - 5, and 3 alone; numbers of states differ."""
    sizes = (2, 3, 2, 4, 1, 2)
    edges = [(1, 0), (0, 2), (1, 4), (5, 1)]
    factors = [(e, torch.randn(sizes[e[0]], sizes[e[1]])) for e in edges]
    factors += [(i, torch.randn(sizes[i])) for i in (0, 1, 3)]
    return FactorGraphEnergy(sizes, factors)


def loopy():
    """Three sites in one potential, a ring of pairs, and a site without any."""
    sizes = (2, 3, 2, 3, 2)
    factors = [((0, 2, 1), torch.randn(2, 2, 3)), ((2, 3), torch.randn(2, 3))]
    factors += [((3, 0), torch.randn(3, 2)), (1, torch.randn(3))]
    return FactorGraphEnergy(sizes, factors)


def spins():
    edges = torus_edges((3, 3))
    return FactorGraphEnergy.ising(edges, torch.randn(18) / 2, torch.randn(9) / 2)


def functions():
    """A module over three sites, and one table that all pairs share."""
    pairs = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    ring = (pairs, torch.randn(3, 3))
    odd = nn.Bilinear(1, 1, 1)

    def parity(x, y, z):
        x, y, z = torch.broadcast_tensors(x, y, z)
        return odd((x * y)[..., None], z[..., None]).squeeze(-1)

    module = nn.Module()
    module.odd, module.forward = odd, parity
    return FactorGraphEnergy([3] * 4, [ring, ((0, 1, 3), module)])


CASES = {f.__name__: f for f in (tree, loopy, spins, functions)}


@pytest.fixture(params=CASES)
def energy(request):
    return CASES[request.param]()


def states(energy):
    number = torch.arange(num_points(energy.support, energy.event_shape))
    x = finite_points(energy.support, energy.event_shape, number, energy.values)
    return x, -energy(x)


def one_hot(energy, x):
    return (x[..., None] == energy.values).to(x)


def test_energy_is_the_sum_of_its_potentials():
    a, b = torch.randn(2, 3), torch.randn(3)
    energy = FactorGraphEnergy({"a": 2, "b": 3}, [(("a", "b"), a), ("b", b)])
    x, log_terms = states(energy)
    expected = torch.stack([a[i, j] + b[j] for i, j in x.long()])
    torch.testing.assert_close(log_terms, expected)
    assert energy(torch.tensor([2.0, 0.0])) == math.inf  # the site has two states
    assert energy(torch.tensor([0.5, 0.0])) == math.inf
    assert energy(torch.tensor([math.nan, 0.0])).isnan()
    order = FactorGraphEnergy({"b": 3, "a": 2}, [(("a", "b"), a), ("b", b)])
    torch.testing.assert_close(order(x.flip(-1)), -expected)


def test_log_partition_and_gradient(energy):
    """Planted fault: an edge of a tree not turned towards its parent."""
    _, log_terms = states(energy)
    found = energy.closed_form().log_partition
    torch.testing.assert_close(found, log_terms.logsumexp(0), rtol=1e-12, atol=1e-12)
    own = [p for p in energy.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found, own, allow_unused=True),
        torch.autograd.grad(log_terms.logsumexp(0), own, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_marginals_and_mode(energy):
    """Planted fault: the unary potential of marginals left out of a bucket."""
    x, log_terms = states(energy)
    exact = energy.closed_form().distribution
    expected = torch.einsum("n,ndq->dq", log_terms.softmax(0), one_hot(energy, x))
    torch.testing.assert_close(exact.marginals(), expected)
    torch.testing.assert_close(exact.mode, x[log_terms.argmax()])
    torch.testing.assert_close(exact.log_prob(x), log_terms.log_softmax(0))
    mean = log_terms.softmax(0) @ x
    torch.testing.assert_close(exact.mean, mean)
    torch.testing.assert_close(exact.variance, log_terms.softmax(0) @ (x - mean) ** 2)


def test_marginals_have_a_gradient(energy):
    x, log_terms = states(energy)
    weight = torch.randn(len(energy.event_shape) and energy.event_shape[0])
    own = list(energy.parameters())[:1]
    expected = torch.autograd.grad(log_terms.softmax(0) @ x @ weight, own)
    found = torch.autograd.grad(energy.closed_form().distribution.mean @ weight, own)
    torch.testing.assert_close(found, expected)


def test_draws(energy):
    """Planted fault: sites drawn without what was eliminated after them."""
    x, log_terms = states(energy)
    draws = energy.closed_form().distribution.sample((20_000,))
    assert energy.support.check(draws).all()
    weights = 5.0 ** torch.arange(x.shape[-1])
    key = (x @ weights).sort()
    number = torch.searchsorted(key.values, draws @ weights)
    assert chi_square(number, log_terms[key.indices].detach()) < 4


def test_site_logits_and_blocks(energy):
    x = energy.closed_form().distribution.sample((4,))
    logits = energy.site_logits(x)
    assert logits.shape == (len(energy.values), 4, *energy.event_shape)
    for site in range(energy.event_shape[0]):
        changed = x.expand(len(energy.values), *x.shape).clone()
        changed[..., site] = energy.values[:, None]
        expected = (-energy(changed)).log_softmax(0)
        torch.testing.assert_close(logits[..., site].log_softmax(0), expected)
    assert (energy.blocks.sum(0) == 1).all()
    for block in energy.blocks:  # what a site sees is the same whatever its block does
        other = torch.where(block, x[[1, 2, 3, 0]], x)
        torch.testing.assert_close(
            energy.site_logits(other)[:, :, block], logits[:, :, block]
        )


def test_condition(energy):
    x, log_terms = states(energy)
    value = x[1, 2].item()
    given = energy.closed_form().distribution.condition({2: value})
    inside = x[:, 2] == value
    log_part = log_terms[inside]
    free = [i for i in range(x.shape[1]) if i != 2]
    torch.testing.assert_close(given.log_partition, log_part.logsumexp(0))
    rest = x[inside][:, free]
    torch.testing.assert_close(given.log_prob(rest), log_part.log_softmax(0))
    expected = torch.einsum("n,ndq->dq", log_part.softmax(0), one_hot(energy, rest))
    torch.testing.assert_close(given.marginals(), expected)
    torch.testing.assert_close(given.mode, rest[log_part.argmax()])
    assert given.support.check(given.sample((9,))).all()
    few = dict.fromkeys(free[1:], None)
    few = {i: rest[0, free.index(i)].item() for i in few}
    last = given.condition({free.index(i): v for i, v in few.items()})
    both = (rest[:, 1:] == rest[0, 1:]).all(-1)
    torch.testing.assert_close(last.log_partition, log_part[both].logsumexp(0))


@pytest.mark.parametrize("ring", [False, True], ids=["tree", "ring"])
def test_extreme_and_forbidden(ring):
    edges = torch.tensor([[0, 1], [1, 2], [2, 0]] if ring else [[0, 1], [1, 2]])
    table = torch.tensor([[-torch.inf, 1e3], [-1e3, -torch.inf]])
    table = torch.stack([table] * len(edges))
    if ring:
        table[2] = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    energy = FactorGraphEnergy([2] * 3, [(edges, table), (0, torch.tensor([60.0, 0]))])
    known = energy.closed_form()
    assert known.log_partition.item() == pytest.approx(60 + 1e3 - 1e3)
    grads = torch.autograd.grad(known.log_partition, list(energy.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    expected = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    torch.testing.assert_close(known.distribution.marginals(), expected)
    assert (known.distribution.sample((20,)) == torch.tensor([0.0, 1, 0])).all()
    nothing = FactorGraphEnergy([2] * 3, [(edges, torch.full((2, 2), -torch.inf))])
    assert nothing.closed_form().log_partition == -torch.inf
    assert nothing(torch.zeros(3)) == math.inf


@pytest.mark.parametrize(
    ("shape", "coupling", "expected"),
    [((8, 8), 0.3, 50.60933050), ((8, 8), math.log(1 + 2**0.5) / 2, 60.14178079)],
)
def test_written_truth_of_lattices(shape, coupling, expected):
    energy = IsingEnergy(shape, coupling)
    assert estimate(energy).status == "exact"
    assert estimate(energy).value == pytest.approx(expected, abs=1e-7)
    graph = FactorGraphEnergy.ising(torus_edges(shape), coupling)
    assert graph.exact().log_partition.item() == pytest.approx(expected, abs=1e-7)


def test_potts_lattice():
    energy = PottsEnergy((6, 6), 3, math.log(1 + math.sqrt(3)))
    assert estimate(energy).value == pytest.approx(75.57195180, abs=1e-7)
    graph = FactorGraphEnergy.potts(torus_edges((6, 6)), 3, energy.coupling)
    x = energy.closed_form().distribution.sample((3,))
    torch.testing.assert_close(graph(x.flatten(1)), energy(x))


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 4), (2, 2, 3), (1, 1)])
@pytest.mark.parametrize("periodic", [True, False])
def test_lattices(shape, periodic):
    if periodic and min(shape) < 2:
        pytest.skip("no torus")
    ising = IsingEnergy(shape, 0.4, torch.randn(shape), periodic=periodic)
    for energy in (ising, PottsEnergy(shape[:2], 3, -0.7, periodic=periodic)):
        found = energy.closed_form().log_partition.item()
        assert found == pytest.approx(enumeration(energy).value, abs=1e-9)
    x = ising.closed_form().distribution.sample((2, 3))
    assert x.shape == (2, 3, *shape)


def test_what_costs_too_much_has_no_closed_form():
    edges = torus_edges((16, 16))
    energy = FactorGraphEnergy.ising(edges, 0.4)
    assert energy.closed_form() is None
    assert IsingEnergy((64, 64), 0.4).closed_form() is None
    with pytest.raises(ValueError, match=r"256 sites .* max_cost = 3\.4e\+07 .*Gibbs"):
        energy.exact()
    small = FactorGraphEnergy.ising(torus_edges((4, 4)), 0.4)
    with pytest.raises(ValueError, match=r"max_cost = 1\.0e\+01 terms, got 6\."):
        small.exact(max_cost=10)


def test_graphs_of_other_libraries():
    pairs = [(0, 1), (1, 2), (0, 3)]
    x = torch.tensor([1.0, 1, -1, -1])
    expected = FactorGraphEnergy.ising(pairs, 0.5)(x)
    sparse = pytest.importorskip("scipy.sparse")
    full = torch.zeros(4, 4)
    for i, j in pairs:
        full[i, j] = full[j, i] = 2.0
    for matrix in (full, full.triu()):
        graph = sparse.csr_array(matrix.numpy())
        torch.testing.assert_close(FactorGraphEnergy.ising(graph, 0.5)(x), expected)
    # What networkx has: nodes in an order, and edges as pairs of them.
    graph = SimpleNamespace(nodes="abcd", edges=["ab", "bc", "ad"])
    torch.testing.assert_close(FactorGraphEnergy.ising(graph, 0.5)(x), expected)
    if "networkx" in sys.modules:
        graph = sys.modules["networkx"].Graph(pairs)
        torch.testing.assert_close(FactorGraphEnergy.ising(graph, 0.5)(x), expected)


def test_tensors_stay_live_or_are_learned():
    latent = torch.randn(3, requires_grad=True)
    shared = nn.Parameter(torch.randn(2, 2))
    energy = FactorGraphEnergy(
        [2] * 4,
        [
            (
                torch.tensor([[0, 1], [1, 2], [2, 3]]),
                latent[:, None, None].expand(3, 2, 2),
            ),
            ((0, 3), shared),
            ((0, 2), torch.zeros(2, 2)),
            ((1, 3), torch.zeros(2, 2)),
        ],
    )
    assert any(p is shared for p in energy.parameters())
    assert sorted(p.shape for p in energy.parameters()) == [(2, 2), (2, 2, 2)]
    (grad,) = torch.autograd.grad(energy.closed_form().log_partition, latent)
    torch.testing.assert_close(grad, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_the_dtype_is_that_of_the_potentials():
    coupling = torch.tensor(0.3, dtype=torch.float64)
    energy = FactorGraphEnergy.ising(torus_edges((3, 3)), coupling)
    assert energy.exact().sample().dtype == torch.float64
    expected = enumeration(IsingEnergy((3, 3), coupling)).value
    assert energy.exact().log_partition.item() == pytest.approx(expected, abs=1e-12)


def test_condition_by_name():
    sizes = {"a": 2, (0, 1): 3, 5: 2}
    energy = FactorGraphEnergy(
        sizes, [(("a", (0, 1)), torch.randn(2, 3)), (((0, 1), 5), torch.randn(3, 2))]
    )
    exact = energy.closed_form().distribution
    expected = exact.condition({0: 1.0, 1: 2.0}).log_partition
    by_name = exact.condition({"a": 1.0, (0, 1): 2.0})
    torch.testing.assert_close(by_name.log_partition, expected)
    step = exact.condition({"a": 1.0}).condition({(0, 1): 2.0})
    torch.testing.assert_close(step.log_partition, expected)
    clamped = ClampedEnergy(energy, {"a": 1.0, (0, 1): 2.0})
    torch.testing.assert_close(clamped.closed_form().log_partition, expected)
    with pytest.raises(ValueError, match=r"name of a site in \['a', .*got \['b'\]"):
        exact.condition({"b": 1.0})
    with pytest.raises(ValueError, match=r"site 0 must be a number .*shape \(2,\)"):
        exact.condition({"a": torch.tensor([0.0, 1.0])})


def test_single_and_double_precision_together():
    single, double = torch.randn(2, 2).float(), torch.randn(2, 2)
    tables = [((0, 1), single), ((1, 2), nn.Parameter(double)), ((2, 0), double)]
    for factors in (tables, tables[:2], tables[::-1]):
        energy = FactorGraphEnergy([2] * 3, factors)
        found = energy.closed_form().log_partition
        assert found.dtype == energy(torch.zeros(3)).dtype == torch.float64
        torch.testing.assert_close(found, states(energy)[1].logsumexp(0))


def test_deep_tree_in_single_precision():
    """Planted fault: messages that grow on the way to the root."""
    number = torch.arange(2000)
    edges = torch.stack([number[:-1], number[1:]], -1)
    pair, own = (10 * torch.randn(shape).float() for shape in [(3, 3), (2000, 3)])
    single, exact = (
        FactorGraphEnergy(
            [3] * 2000, [(edges, pair.to(dtype)), (number[:, None], own.to(dtype))]
        )
        .closed_form()
        .distribution
        for dtype in (torch.float32, torch.float64)
    )
    found, expected = single.log_partition, exact.log_partition.item()
    assert found.item() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(found, single.energy.table_1)
    marginals, one = exact.marginals().float(), torch.ones(2000).float()
    for probs, atol in ((single.marginals(), 1e-5), (grad, 1e-4)):
        torch.testing.assert_close(probs.sum(-1), one, rtol=0, atol=atol)
        torch.testing.assert_close(probs, marginals, rtol=0, atol=atol)


def test_sites_without_an_edge():
    chain = FactorGraphEnergy.ising([(0, 1)], 0.5, torch.zeros(4), num_sites=4)
    assert chain.event_shape == (4,)
    expected = 4 * math.log(2) + math.log(math.cosh(0.5))
    assert chain.closed_form().log_partition.item() == pytest.approx(expected)
    potts = FactorGraphEnergy.potts([(0, 1)], 3, 0.5, num_sites=3)
    assert potts.closed_form().log_partition.item() == pytest.approx(
        math.log(3 * (3 * math.exp(0.5) + 6))
    )
    with pytest.raises(ValueError, match="num_sites must be at least 2"):
        FactorGraphEnergy.ising([(0, 1)], 0.5, num_sites=1)


def test_wrong_arguments():
    pair = torch.zeros(2, 2)
    cases = [
        (([2, 0], [((0, 1), pair)]), "num_states must give each"),
        (([2, 2.5], [((0, 1), pair)]), "a whole number from 1 on, got 2, 2.5"),
        (([2, "2"], [((0, 1), pair)]), "a whole number from 1 on"),
        (([2, 2], []), "factors must hold at least one"),
        (([2, 2], [((0, 2), pair)]), "sites of a factor must be among 0, 1, got 2"),
        (([2, 2], [((0, 0), pair)]), r"each of its sites once, got \(0, 0\)"),
        (
            ([2, 3], [((0, 1), pair)]),
            r"in the shape \(2, 3\) or \(\*batch, 2, 3\)",
        ),
        (([2, 2], [((0, 1), pair + torch.inf)]), r"no nan and no \+inf"),
        (([2, 2], [(torch.tensor([[0, 5]]), pair)]), "numbers from 0 to 1, got 0 to 5"),
        (([2, 2], [(torch.tensor([0, 1]), pair)]), r"integers of shape \(F, k\)"),
        (([2, 2, 3], [(torch.tensor([[0, 1], [1, 2]]), pair)]), "several groups"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            FactorGraphEnergy(*arguments)
    with pytest.raises(TypeError, match="tensor or a function"):
        FactorGraphEnergy([2, 2], [((0, 1), 3.0)])
    energy = FactorGraphEnergy([2, 2], [((0, 1), lambda x, y: torch.zeros(7, 2, 2))])
    with pytest.raises(ValueError, match=r"must give a tensor of shape \(2, 2\)"):
        energy(torch.zeros(2))
    energy = FactorGraphEnergy([2, 2], [((0, 1), lambda x, y: 0.0)])
    with pytest.raises(TypeError, match="must give a tensor, got float"):
        energy.closed_form()
    for edges, message in [
        ([(0, 0)], "a loop at site 0"),
        ([(0, 1), (1, 0)], r"\(0, 1\) is there more than once"),
        ([(0.5, 1.0)], "pairs of integers"),
        ([(-1, 1)], "numbers from 0 on"),
        ([("a", "b")], r"numbers of sites, from 0 on, got \('a', 'b'\)"),
        ([(0, 1), (1, 2, 3)], "pairs of numbers of sites"),
        ([], "at least one edge, got none"),
        (SimpleNamespace(nodes=[0, 1, 2], edges=[]), "at least one edge, got none"),
        (torch.ones(3, 3), r"scipy\.sparse\.csr_array"),
        (
            SimpleNamespace(nodes=[0, 1], edges=[(0, 1)], is_directed=lambda: True),
            r"must be undirected.*to_undirected",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            FactorGraphEnergy.ising(edges, 1.0)
    with pytest.raises(ValueError, match="coupling must be finite"):
        FactorGraphEnergy.ising([(0, 1)], torch.tensor(torch.nan))
    with pytest.raises(TypeError, match="graph must be pairs"):
        FactorGraphEnergy.ising(3, 1.0)
    with pytest.raises(ValueError, match=r"coupling must be a number or .*batch, 1\)"):
        FactorGraphEnergy.ising([(0, 1)], torch.zeros(2))
    with pytest.raises(ValueError, match="at least 3 sites"):
        torus_edges((2, 4))


def test_sites_in_bytes():
    """Fault: indices of unsigned bytes are masks, of the sites and of the tables."""
    edges, table = torch.tensor([[0, 1], [1, 2]]), torch.randn(2, 2, 2)
    x = torch.tensor([1.0, 0.0, 1.0])
    wanted = FactorGraphEnergy([2, 2, 2], [(edges, table)])
    found = FactorGraphEnergy([2, 2, 2], [(edges.byte(), table)])
    torch.testing.assert_close(found(x), wanted(x))
    log_z = wanted.closed_form().log_partition
    torch.testing.assert_close(found.closed_form().log_partition, log_z)
    ring = FactorGraphEnergy.ising(edges.byte(), 0.4)
    wanted = FactorGraphEnergy.ising(edges, 0.4)
    log_z = wanted.closed_form().log_partition
    torch.testing.assert_close(ring.closed_form().log_partition, log_z)


def graph(ring, tables):
    """A graph of three sites with 2, 3 and 2 states, and further spins beside it."""
    edges = [(0, 1), (1, 2), (2, 0)] if ring else [(0, 1), (1, 2)]
    factors = list(zip(edges, tables, strict=False))
    factors.append((torch.tensor([[3, 4]]), tables[3]))
    return FactorGraphEnergy([2, 3, 2, 2, 2], factors)


@pytest.mark.parametrize("ring", [False, True])
def test_batches_are_their_members(ring):
    """Planted faults: the table of the last member taken for all; the first state
    observed for all."""
    shapes = [(4, 2, 3), (3, 1, 3, 2), (2, 2), (3, 4, 1, 2, 2)]
    tables = [torch.randn(shape, requires_grad=True) for shape in shapes]
    batch = graph(ring, tables)
    assert batch.batch_shape == (3, 4)
    x = torch.stack([torch.randint(q, (5, 3, 4)) for q in (2, 3, 2, 2, 2)], -1).double()
    exact = batch.closed_form().distribution
    log_z, marginals, mode = exact.log_partition, exact.marginals(), exact.mode
    seen = torch.arange(4.0).expand(3, 4) % 2
    given = exact.condition({0: seen, 4: 1.0})
    grads = [torch.zeros_like(table) for table in tables]
    for i, j in itertools.product(range(3), range(4)):
        parts = [
            t.expand(3, 4, *t.shape[-own:])[i, j]
            for t, own in zip(tables, (2, 2, 2, 3), strict=True)
        ]
        one = graph(ring, parts)
        known = one.closed_form().distribution
        torch.testing.assert_close(batch(x)[:, i, j], one(x[:, i, j]))
        logits = batch.site_logits(x)[:, :, i, j]
        torch.testing.assert_close(logits, one.site_logits(x[:, i, j]))
        torch.testing.assert_close(log_z[i, j], known.log_partition)
        torch.testing.assert_close(marginals[i, j], known.marginals())
        assert one(mode[i, j]) <= one(known.mode)
        part = known.condition({0: seen[i, j], 4: 1.0})
        torch.testing.assert_close(given.log_partition[i, j], part.log_partition)
        torch.testing.assert_close(given.marginals()[i, j], part.marginals())
        own = torch.autograd.grad(known.log_partition, tables, allow_unused=True)
        for total, grad in zip(grads, own, strict=True):
            total += 0 if grad is None else grad
    found = torch.autograd.grad(log_z.sum(), tables, allow_unused=True)
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)
    draws = exact.sample((4000,))
    share = torch.stack([(draws == v).double().mean(0) for v in range(3)], -1)
    error = (marginals * (1 - marginals) / 4000).sqrt() + 1e-9
    assert ((share - marginals) / error).abs().max() < 4.5
    assert given.sample((2,)).shape == (2, 3, 4, 3)
    torch.testing.assert_close(exact.log_prob(x), -batch(x) - log_z)


def test_batches_that_do_not_fit():
    tables = [torch.zeros(4, 2), torch.zeros(3, 2)]
    with pytest.raises(ValueError, match="batch shapes broadcast, got"):
        FactorGraphEnergy([2, 2], [(0, tables[0]), (1, tables[1])])
    wide = FactorGraphEnergy.ising([(0, 1), (1, 2), (2, 0)], torch.zeros(2**23, 3))
    assert wide.closed_form() is None


def test_a_graph_for_each_row_is_learned_by_svi():
    """Potentials from a context, at a Pyro site. Planted fault: log Z detached."""
    edges = torch.tensor([(0, 1), (1, 2), (2, 0)])
    context = torch.randn(2000, 1)
    weight = torch.tensor([[0.8, -0.5, 0.3]])
    with torch.no_grad():
        truth = FactorGraphEnergy.ising(edges, context @ weight)
        data = truth.closed_form().distribution.sample()

    def model():
        found = pyro.param("weight", torch.zeros(1, 3))
        energy = FactorGraphEnergy.ising(edges, context @ found)
        with pyro.plate("rows", 2000):
            pyro.sample("x", pyro_ebm.EnergyDistribution(energy), obs=data)

    adam, loss = pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO()
    svi = pyro.infer.SVI(model, lambda: None, adam, loss)
    for _ in range(60):
        svi.step()
    assert (pyro.param("weight") - weight).abs().max() < 0.15


def test_couplings_that_a_graph_has():
    """Fault: weights of the edges not looked at, and none said what they are for."""
    networkx = pytest.importorskip("networkx")
    graph = networkx.Graph()
    graph.add_edge("a", "b", weight=2.0)
    graph.add_edge("b", "c", weight=-1)
    x = torch.tensor([1.0, 1.0, -1.0])
    assert FactorGraphEnergy.ising(graph, "weight")(x).item() == -3
    assert FactorGraphEnergy.potts(graph, 2, "weight")((x + 1) / 2).item() == -2
    assert FactorGraphEnergy.ising(graph, 1.0)(x).item() == 0
    for given, name in ((graph, "strength"), ([(0, 1)], "weight")):
        with pytest.raises(ValueError, match=f"got '{name}'"):
            FactorGraphEnergy.ising(given, name)


@pytest.mark.parametrize("kind", ["ising", "potts"])
def test_a_coupling_that_is_a_latent_site_has_its_gradient(kind):
    """Of a Pyro model, value and slope in the coupling are those of the prior, of the
    data's statistic, and of log Z by enumeration. Planted faults, seen to fail: a
    coupling without its graph; one that is a parameter while it is traced."""
    edges = grid_edges((2, 3))
    values = torch.tensor([-1.0, 1.0]) if kind == "ising" else torch.arange(2.0)
    every = torch.cartesian_prod(*[values] * 6)
    pairs = every[:, edges]
    is_ising = kind == "ising"
    same = pairs.prod(-1) if is_ising else (pairs[..., 0] == pairs[..., 1]).double()
    statistic, data = same.sum(-1), every[[3, 17, 40]]

    def model():
        coupling = pyro.sample("coupling", dist.Normal(0.0, 1.0))
        energy = FactorGraphEnergy.potts(edges, 2, coupling)
        if is_ising:
            energy = FactorGraphEnergy.ising(edges, coupling)
        with pyro.plate("rows", 3):
            pyro.sample("x", EnergyDistribution(energy), obs=data)

    energy = PyroModelEnergy(model)
    assert energy.is_traced
    at = torch.tensor([0.3], requires_grad=True)
    log_joint = dist.Normal(0.0, 1.0).log_prob(at).sum()
    log_joint = log_joint + at[0] * statistic[[3, 17, 40]].sum()
    log_joint = log_joint - 3 * (at * statistic).logsumexp(0)
    (slope,) = torch.autograd.grad(-log_joint, at)
    value, grad = energy.value_and_grad(at.detach()[None])
    torch.testing.assert_close(value[0], -log_joint.detach())
    torch.testing.assert_close(grad[0], slope)
