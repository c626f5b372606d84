"""Every estimator shows what it is doing, if asked to, and does the same without."""

import inspect
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import partition
from pyro_ebm.distributions import EnergyModel, ProductOfExperts
from pyro_ebm.energies import FunctionEnergy, IsingEnergy
from pyro_ebm.partition.progress import CountedEnergy, watched

BASE = dist.Normal(torch.zeros(2).double(), 1.5).to_event(1)
#: They take no time, or show a bar for each of their stages.
WITHOUT = {"check_normalizability", "closed_form", "fit_generator"}
MODULES = (
    "progress",
    "exact.budget",
    "exact.enumeration",
    "exact.quadrature",
    "bridge.ratio",
    "importance.evidence",
    "particles.gibbs_annealing",
)


def bowl(x):
    return x.square().sum(-1) / 2


def one_at_a_time():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(abs(z.item()), 1.0), obs=torch.tensor(0.0))


ENERGY = FunctionEnergy(bowl, (2,))
OTHER = FunctionEnergy(lambda x: bowl(x) * 1.2, (2,))
CALLS = {
    "annealed_importance_sampling": lambda f, **s: f(
        ENERGY, BASE, num_chains=32, num_temperatures=10, **s
    ),
    "bidirectional": lambda f, **s: f(
        ENERGY, BASE, torch.randn(64, 2), num_chains=64, num_temperatures=10, **s
    ),
    "bridge_sampling": lambda f, **s: f(ENERGY, torch.randn(500, 2), **s),
    "enumeration": lambda f, **s: f(IsingEnergy((3, 3), 0.3), **s),
    "estimate": lambda f, **s: f(ENERGY, BASE, "importance", budget=500, **s),
    "evidence": lambda f, **s: f(one_at_a_time, None, budget=500, **s),
    "gibbs_annealing": lambda f, **s: f(IsingEnergy((4, 4), 0.3), budget=6_000, **s),
    "importance_sampling": lambda f, **s: f(ENERGY, BASE, num_samples=500, **s),
    "log_ratio": lambda f, **s: f(
        ENERGY, OTHER, torch.randn(500, 2), torch.randn(500, 2) / 1.2**0.5, **s
    ),
    "quadrature": lambda f, **s: f(ENERGY, **s),
    "smc": lambda f, **s: f(ENERGY, BASE, num_particles=64, **s),
    "thermodynamic_integration": lambda f, **s: f(ENERGY, BASE, num_particles=64, **s),
}


class Bar:
    """Stands in for tqdm, and keeps count."""

    shown = []

    def __init__(self, *, disable=False, **settings):
        self.count, self.is_closed, self.settings = 0, False, settings
        if not disable:
            Bar.shown.append(self)

    def update(self, number=1):
        self.count += number

    def close(self):
        self.is_closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def bars(monkeypatch):
    for module in MODULES:
        # A function of the same name hides some of the modules.
        monkeypatch.setattr(sys.modules[f"pyro_ebm.partition.{module}"], "tqdm", Bar)
    monkeypatch.setattr(Bar, "shown", [])
    return Bar


def test_every_estimator_has_a_progress_bar():
    functions = {
        name
        for name in partition.__all__
        if inspect.isfunction(getattr(partition, name))
    }
    assert functions == CALLS.keys() | WITHOUT


@pytest.mark.filterwarnings("ignore::pyro_ebm.core.errors.UnreliableWarning")
@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_bar_counts_and_is_closed(name, bars):
    function = getattr(partition, name)
    torch.manual_seed(0)
    quiet = CALLS[name](function, progress_bar=False)
    assert not bars.shown
    torch.manual_seed(0)
    loud = CALLS[name](function)
    (bar,) = bars.shown
    assert bar.is_closed
    assert bar.settings["delay"] == 1
    if hasattr(loud, "num_seconds"):  # which the clock decides
        quiet, loud = (e._replace(num_seconds=0.0) for e in (quiet, loud))
    _assert_same(quiet, loud)
    if name == "gibbs_annealing":  # it counts temperatures
        assert bar.count == bar.settings["total"]
        return
    assert 0.5 * loud.num_evaluations <= bar.count <= 1.1 * loud.num_evaluations
    total = bar.settings.get("total")
    assert total is None or 0.5 * total <= bar.count <= 1.5 * total


def _assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other or (math.isnan(one) and math.isnan(other))


def test_the_bar_is_closed_after_an_error(bars):
    def broken(x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        partition.importance_sampling(FunctionEnergy(broken, (2,)), BASE)
    assert bars.shown[0].is_closed


def test_a_product_passes_it_on(bars):
    tails = dist.StudentT(3.0).expand([4]).to_event(1)
    product = ProductOfExperts([tails, dist.Normal(torch.zeros(4), 3.0).to_event(1)])
    assert product.estimate_log_partition(5_000, progress_bar=False).is_reliable
    assert not bars.shown
    product.estimate_log_partition(5_000)
    assert bars.shown


def test_an_estimate_taken_over_and_learning_show_no_bar_but_refresh_does(bars):
    """Seen to fail with a bar in each run from the base."""
    model = EnergyModel(ENERGY, BASE)
    found = partition.estimate(model, budget=10_000, progress_bar=False)
    model.set_log_partition(found)
    model.log_partition.follow(ENERGY)  # its walkers must start
    model.log_partition.refresh(ENERGY, progress_bar=False)
    model.log_partition.adopt_average(ENERGY)
    EnergyModel(ENERGY, BASE).log_partition.follow(ENERGY)
    assert not bars.shown
    EnergyModel(ENERGY, BASE).log_partition.refresh(ENERGY)
    assert bars.shown
    for bar in bars.shown:
        assert bar.is_closed
        assert bar.count
        assert bar.settings["delay"] == 1


def test_a_ratio_shows_one_bar_for_its_draws_too(bars, monkeypatch):
    """Seen to fail with the default bar of the chains."""
    monkeypatch.setattr("pyro_ebm.mcmc.samplers.independent.tqdm", Bar)
    partition.log_ratio(ENERGY, OTHER, num_draws=100)
    assert len(bars.shown) == 1
    bars.shown.clear()
    partition.log_ratio(ENERGY, OTHER, num_draws=100, progress_bar=False)
    assert not bars.shown


class Single(FunctionEnergy):
    """In single precision, though nothing in it says so."""

    def tensor_options(self, like=None):
        return {"dtype": torch.float32, "device": torch.device("cpu")}


def test_a_watched_energy_keeps_its_type():
    """Seen to fail where the bar asks for tensors of torch's default type."""
    single = Single(bowl, (2,))
    with watched(single, is_shown=True) as energy:
        assert energy is not single
        assert energy.tensor_options() == single.tensor_options()
    with watched(single, is_shown=False) as energy:
        assert energy is single


# What is counted, and in which pieces -------------------------------------------------


class Watched(FunctionEnergy):
    """Keeps the sizes of the batches that it is given."""

    def __init__(self):
        super().__init__(lambda x: x.square().sum(-1) / 2, (3,))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize("max_bytes", [1.0, 1e3, 1e4, 1e5, 2**29])
def test_pieces_give_the_same_values(max_bytes):
    """Of any size, and count those points alone that were asked for. Fault: the
    copies that fill up the last piece are returned, or counted; the pieces are joined
    in another order."""
    counted = CountedEnergy(Watched(), max_bytes=max_bytes)
    spent = 0
    for shape in [(1,), (63,), (64,), (65,), (0,), (257,), (4, 5), (), (1025,)]:
        x = torch.randn(*shape, 3)
        spent += 2 * x[..., 0].numel()
        torch.testing.assert_close(counted(x), x.square().sum(-1) / 2)
        value, grad = counted.value_and_grad(x)
        torch.testing.assert_close(value, x.square().sum(-1) / 2)
        torch.testing.assert_close(grad, x)
        assert counted.num_evaluations == spent


def test_an_evaluation_keeps_within_its_memory():
    """As many points as fit, and few sizes. Fault: the limit is not looked at; one
    by one where fewer than the smallest size fit."""
    sizes = {}
    for max_bytes in (1.0, 2e3, 1e5):
        energy = Watched()
        counted = CountedEnergy(energy, max_bytes=max_bytes)
        counted(torch.randn(1000, 3))
        sizes[max_bytes] = energy.sizes[1:]  # the first is what it is measured by
    assert set(sizes[1.0]) == {1}
    assert 2 <= max(sizes[2e3]) < 64
    assert len(set(sizes[2e3])) == 1
    assert 64 <= max(sizes[1e5]) < 1000
    # No tensor of a piece is larger than its share.
    assert max(sizes[2e3]) * 3 * 8 < 2e3
    assert max(sizes[1e5]) * 3 * 8 < 1e5


def test_seconds_are_those_of_the_cheapest_call():
    counted = CountedEnergy(Watched())
    assert counted.seconds_each == math.inf
    counted(torch.randn(64, 3))
    first = counted.seconds_each
    for _ in range(20):
        counted(torch.randn(4096, 3))
    assert 0 <= counted.seconds_each <= first < 1


def test_a_counted_energy_keeps_support_and_type():
    positive = dist.constraints.independent(dist.constraints.positive, 1)
    energy = FunctionEnergy(lambda x: x.sum(-1), (2,), positive)
    counted = CountedEnergy(energy)
    assert counted.support is positive
    assert counted.event_shape == (2,)
    assert CountedEnergy(Single(bowl, (2,))).tensor_options()["dtype"] == torch.float32
