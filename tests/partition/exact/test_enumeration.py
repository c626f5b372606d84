"""Sums over finite supports, against closed forms and written truth."""

import importlib
import itertools
import math
import time
import types

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.verdict import Reason, Status
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    IsingEnergy,
    PottsEnergy,
    RBMEnergy,
    spins,
)
from pyro_ebm.partition import LogPartitionEstimate, enumeration, estimate
from pyro_ebm.partition.exact import budget
from pyro_ebm.testing import CountingEnergy, finite_targets

LOOKED = LogPartitionEstimate(*[0.0] * 5, Status.OK, "sampled", 1)
BETA_C = math.log(1 + math.sqrt(2)) / 2


def linear(event, support):
    """Independent sites: log Z is a sum over sites of a sum over values."""
    a = torch.linspace(-1, 2, math.prod(event)).reshape(event)
    dims = tuple(range(-len(event), 0))
    return a, FunctionEnergy(
        lambda x: (a * x).sum(dims) if dims else a * x,
        event,
        constraints.independent(support, len(event)),
    )


@pytest.mark.parametrize(
    ("energy", "expected"),
    [
        (IsingEnergy((4, 4), 0.3), 12.78552333),
        (IsingEnergy((4, 4), BETA_C), 15.52191546),
        (IsingEnergy((3, 3), 0.3, periodic=False), 6.80154),
    ],
)
def test_written_truth(energy, expected):
    found = enumeration(energy.double())
    assert found.status == "exact"
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert found.lower <= found.value <= found.upper
    assert found.std_error < 1e-13  # rounding
    assert found.num_evaluations == 2 ** energy.event_shape.numel()


@pytest.mark.parametrize("event", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("support", "values"),
    [
        (constraints.boolean, (0, 1)),
        (constraints.integer_interval(-2, 1), (-2, -1, 0, 1)),
        (constraints.integer_interval(5, 5), (5,)),
        (spins, (-1, 1)),
    ],
    ids=["boolean", "interval", "one-value", "spins"],
)
def test_independent_sites(event, support, values):
    a, energy = linear(event, support)
    expected = torch.stack([-value * a for value in values]).logsumexp(0).sum()
    assert enumeration(energy).value == pytest.approx(expected.item())


def test_every_state_once(monkeypatch):
    """In chunks that do not divide their number, too."""
    module = importlib.import_module("pyro_ebm.partition.exact.enumeration")
    monkeypatch.setattr(module, "_CHUNK", 7)
    seen = []

    def fn(x):
        seen.append(x)
        return x.sum((-2, -1))

    support = constraints.independent(constraints.integer_interval(0, 2), 2)
    enumeration(FunctionEnergy(fn, (5, 1), support))
    assert max(map(len, seen)) == 7
    found = [tuple(x.flatten().tolist()) for x in torch.cat(seen)]
    assert sorted(found) == sorted(itertools.product((0.0, 1.0, 2.0), repeat=5))


@pytest.mark.parametrize(("num_visible", "num_hidden"), [(7, 3), (3, 7), (4, 4)])
def test_machine_over_its_smaller_layer(num_visible, num_hidden):
    energy = RBMEnergy(
        torch.randn(num_visible, num_hidden),
        torch.randn(num_visible),
        torch.randn(num_hidden),
    )
    found = enumeration(energy)
    assert found.num_evaluations == 2 ** min(num_visible, num_hidden)
    plain = FunctionEnergy(energy, energy.event_shape, energy.support)
    assert found.value == pytest.approx(enumeration(plain).value)


def test_a_constant_moves_log_partition_alone():
    energy = IsingEnergy((2, 3), 0.4)
    value = enumeration(energy).value
    for c in (3.0, 1000.0, -1000.0):
        assert enumeration(energy + c).value == pytest.approx(value - c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_energies_are_summed_in_double(dtype):
    found = enumeration(PottsEnergy((3, 3), 3, 0.7).to(torch.float32)).value
    assert found == pytest.approx(
        finite_targets.transfer_matrix(3, 3, 0.7 * torch.eye(3)), abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32])
def test_the_error_is_the_rounding_of_the_energies(dtype):
    """What insists on single precision, with a large constant."""

    def insists(x):
        single = x.detach().numpy().astype("float32")
        return torch.from_numpy(0.3 * single.sum(-1) + 1e4)

    energy = FunctionEnergy(
        insists, (6,), constraints.independent(constraints.boolean, 1)
    )
    found = enumeration(energy)
    expected = 6 * math.log1p(math.exp(-0.3)) - 1e4
    assert found.status == "exact"
    assert 1e-4 < found.std_error < 1e-2
    assert found.lower <= expected <= found.upper


def test_single_precision_energies_are_computed_in_double():
    coupling = torch.tensor(0.3, dtype=torch.float32)
    found = enumeration(IsingEnergy((3, 3), coupling, periodic=False).float())
    again = enumeration(IsingEnergy((3, 3), coupling.double(), periodic=False))
    assert found.value == pytest.approx(again.value, abs=1e-12)
    assert found.std_error < 1e-13


def test_one_site_without_a_dimension():
    """Fault: points of an event of shape () taken for vectors."""

    class Bowl(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = torch.nn.Parameter(torch.tensor(3.2, dtype=torch.float32))

        def forward(self, x):
            return (x - self.middle).square() / 2

    energy = FunctionEnergy(Bowl(), (), constraints.integer_interval(0, 9))
    states = torch.arange(10, dtype=torch.float32)
    found = estimate(energy, progress_bar=False)
    log_z = torch.logsumexp(-energy(states), 0)
    assert found.status == "exact"
    assert found.value == pytest.approx(log_z.item(), abs=1e-6)


def test_limits_are_kept():
    """Planted fault: time not looked at; all 2^16 states are summed."""

    def slow(x):
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass
        return x.sum(-1)

    boolean = constraints.independent(constraints.boolean, 1)
    found = enumeration(FunctionEnergy(slow, (16,), boolean), max_seconds=0.05)
    assert found.status == "unreliable"
    assert found.reasons[0].reason is Reason.OUT_OF_BUDGET
    assert "of the states were summed" in found.reason
    assert found.num_evaluations < 2**16
    assert found.value < 16 * math.log1p(math.exp(-1))


def test_a_million_black_box_states_where_there_is_time(monkeypatch):
    """By default, and not where they would take most of it: then it is seen early.
    Planted fault: the pace not looked at."""
    module = importlib.import_module("pyro_ebm.partition.estimate")
    a, energy = linear((20,), constraints.boolean)
    found = estimate(energy, progress_bar=False)
    exact = torch.nn.functional.softplus(-a).sum().item()
    assert (found.status, found.num_evaluations) == ("exact", 2**20)
    assert found.value == pytest.approx(exact, abs=1e-9)
    # Two seconds each time that it looks, for the first 64 states alone as well.
    pace = types.SimpleNamespace(seconds=2.0)
    monkeypatch.setattr(budget, "Stopwatch", lambda: pace)
    found = enumeration(energy, max_seconds=60.0)
    assert found.reasons[0].reason is Reason.OUT_OF_BUDGET
    assert "take about 3.2e+04" in found.reason
    assert found.num_evaluations == 2**14
    monkeypatch.setattr(module, "_annealed", lambda *_, **__: LOOKED)
    assert estimate(energy, max_seconds=60.0) is LOOKED
    assert estimate(energy, budget=2**19) is LOOKED
    assert estimate(linear((23,), constraints.boolean)[1]) is LOOKED


def test_evaluations_are_counted():
    energy = CountingEnergy(IsingEnergy((2, 3), 0.4))
    assert enumeration(energy).num_evaluations == energy.num_values == 64


def test_forbidden_states_have_no_mass():
    _, energy = linear((3,), constraints.boolean)
    hard = FunctionEnergy(
        lambda x: torch.where(x[..., 0] == 1, torch.inf, energy(x)),
        (3,),
        energy.support,
    )
    a = torch.linspace(-1, 2, 3)
    expected = (-a[1:]).exp().log1p().sum().item()
    assert enumeration(hard).value == pytest.approx(expected)
    assert enumeration(hard).status == "exact"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (torch.nan, "nan or -inf"),
        (-torch.inf, "nan or -inf"),
        (torch.inf, "infinite at all"),
    ],
)
def test_what_is_no_number_is_unreliable(bad, reason):
    energy = FunctionEnergy(
        lambda x: torch.where(x.sum(-1) > (-1 if bad == torch.inf else 2), bad, 0.0),
        (3,),
        constraints.independent(constraints.boolean, 1),
    )
    found = enumeration(energy)
    assert found.status == "unreliable"
    assert reason in found.reason


def test_too_many_states_and_continuous_ones():
    with pytest.raises(ValueError, match=r"has 2\^64 states .*4,194,304.*gibbs_anneal"):
        enumeration(IsingEnergy((8, 8), 0.3))
    with pytest.raises(ValueError, match=r"more than max_states = 10"):
        enumeration(IsingEnergy((2, 2), 0.3), max_states=10)
    with pytest.raises(ValueError, match=r"finite support to be enumerated.*estimate"):
        enumeration(FunctionEnergy(lambda x: x**2, ()))


def black_box(energy):
    """The same energy, of which nothing is known."""
    return FunctionEnergy(energy, energy.event_shape, energy.support)


def test_estimate_enumerates_what_is_small():
    for energy in (
        black_box(IsingEnergy((4, 4), BETA_C)),
        linear((2,), constraints.boolean)[1],
        linear((), constraints.integer_interval(0, 3))[1],
    ):
        found = estimate(energy)
        assert (found.status, found.method) == ("exact", "enumeration")
    # Larger, but not too large to be asked for.
    energy = black_box(IsingEnergy((4, 5), 0.3, periodic=False))
    assert estimate(energy, method="exact").method == "enumeration"
    with pytest.raises(ValueError, match=r"2\^64 states"):
        estimate(black_box(IsingEnergy((8, 8), 0.3)), method="exact")
    assert estimate(IsingEnergy((8, 8), 0.3)).method == "closed form"
    known = estimate(DistributionEnergy(dist.Bernoulli(torch.tensor(0.3))))
    assert known.method == "closed form"


def test_particles_and_importance_agree_with_the_sum():
    energy = IsingEnergy((2, 2), 0.3)
    base = finite_targets.ising(2).base
    exact = estimate(energy).value
    found = estimate(energy, base, method="smc")
    assert abs(found.value - exact) < 4 * found.std_error
    with pytest.warns(UnreliableWarning, match="one-sided"):
        found = estimate(energy, base, method="ais")
    assert abs(found.value - exact) < 4 * found.std_error
    found = estimate(energy, base, method="importance")
    assert abs(found.value - estimate(energy).value) < 4 * found.std_error
