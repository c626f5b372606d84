"""Committees of mixtures: who has seen what, and what they are worth."""

import importlib
import time

import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm import bases
from pyro_ebm.bases.mixture import NormalMixture, imported, joined_mixture

pytest.importorskip("sklearn")
# The function of the same name hides the module.
module = importlib.import_module("pyro_ebm.bases.committee")


def ring(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    angle = 6.2832 * torch.rand(number, generator=generator)
    noise = 0.1 * torch.randn(number, 2, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], 1) + noise


def test_each_row_is_scored_by_a_fit_that_has_not_seen_it(monkeypatch):
    """Fault: weights from rows that the members were fitted to."""
    scored = []

    class Spy(NormalMixture):
        def log_prob(self, value):
            scored.append(not {*map(tuple, value.tolist())} & self.seen)
            return super().log_prob(value)

    def fitted(u, number, seed, floor):
        mixture = Spy(torch.ones(1), u.mean(0)[None], torch.eye(2)[None])
        mixture.seen = {*map(tuple, u.tolist())}
        assert len(u) == 80
        return mixture

    monkeypatch.setattr(module, "fitted_mixture", fitted)
    bases.committee(ring(100))
    assert len(scored) % 15 == 0
    assert all(scored)


def test_it_beats_the_best_single_mixture():
    data, test = ring(200), ring(2000, seed=1)
    single = bases.gaussian_mixture(data).log_prob(test).mean()
    assert bases.committee(data).log_prob(test).mean() > single + 0.05


def test_floors_serve_few_rows_in_many_dimensions():
    """Fault: without them a committee of 40 rows in 12 dimensions is lost."""
    data = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    test = torch.randn(500, 12, generator=torch.Generator().manual_seed(1))
    normal = bases.normal(data).log_prob(test).mean()
    assert bases.committee(data).log_prob(test).mean() > normal + 0.5


def test_it_is_normalised_and_on_its_support():
    data = dist.Beta(2.0, 5.0).sample((150, 1))
    support = dist.constraints.independent(dist.constraints.unit_interval, 1)
    base = bases.committee(data, support=support)
    x = torch.linspace(1e-4, 1 - 1e-4, 5001)
    assert abs(torch.trapezoid(base.log_prob(x[:, None]).exp(), x) - 1) < 2e-3
    assert abs(base.sample((4000,)).mean() - data.mean()) < 0.02


def test_no_larger_mixtures_after_its_time():
    small = bases.committee(ring(100), max_seconds=0.0)
    assert len(small.loc) <= 15  # three floors of one component, in five parts


def test_the_time_of_an_import_counts_for_nothing(monkeypatch):
    """As in a process that has not used it. Fault: one normal for eight of them."""
    takes = [1.5]

    def slow():
        end = time.process_time() + (takes.pop() if takes else 0.0)
        while time.process_time() < end:
            pass
        return imported()

    for name in ("committee", "mixture"):
        module = importlib.import_module(f"pyro_ebm.bases.{name}")
        monkeypatch.setattr(module, "imported", slow)
    data = pyro_ebm.datasets.eight_gaussians(300)
    assert len(bases.committee(data, max_seconds=3.0).loc) > 15
    assert not takes


def test_mixtures_joined_are_their_mixture():
    parts = [bases.gaussian_mixture(ring(100, seed), 2) for seed in range(2)]
    joined, x = joined_mixture(parts, torch.tensor([0.3, 0.7])), ring(50, 2)
    first, second = (part.log_prob(x).exp() for part in parts)
    torch.testing.assert_close(joined.log_prob(x).exp(), 0.3 * first + 0.7 * second)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_few_rows(number):
    data = ring(number)
    if number == 1:
        with pytest.raises(ValueError, match="N >= 2, got"):
            bases.committee(data)
    elif number == 2:
        with pytest.raises(ValueError, match="at least 3 rows"):
            bases.committee(data)
    else:
        assert bases.committee(data).log_prob(data).isfinite().all()


def test_weights_are_repetitions():
    """Whole ones, exactly, in fits and in (1). Fault: they count in neither."""
    data = torch.cat([torch.randn(60, 2) - 3, torch.randn(60, 2) + 3])
    weights = torch.ones(120)
    weights[60:] = 3.0
    share = torch.tensor(0.75)
    for scale in (1.0, 0.37):
        base = bases.committee(data, weights=scale * weights)
        right = (base.sample((20_000,))[:, 0] > 0).float().mean()
        assert abs(right - share) < 0.02
    dropped = bases.committee(data, weights=(data[:, 0] > 0).float())
    assert (dropped.sample((1000,))[:, 0] > 0).float().mean() > 0.99
    one = torch.zeros(120)
    one[:2] = 1.0
    with pytest.raises(ValueError, match="at least 3 rows for a committee, got 2"):
        bases.committee(data, weights=one)


def test_missing_entries_are_filled():
    """The law of whole rows. Fault: what was not seen replaced by its column."""
    x = torch.randn(400, 1)
    data = torch.cat([x, x + 0.3 * torch.randn(400, 1), -x], 1)
    data = data + 0.2 * torch.randn(400, 3)
    gone = torch.rand(250, 3) < 0.2
    base = bases.committee(data[:250].where(~gone, torch.nan))
    whole, normal = bases.committee(data[:250]), bases.independent(data[:250])
    scores = [b.log_prob(data[250:]).mean() for b in (normal, base, whole)]
    assert scores[1] > scores[2] - 0.1 * (scores[2] - scores[0])
    empty = data[:250].clone()
    empty[:, 1] = torch.nan
    with pytest.raises(ValueError, match="no entry at all in column 1. Leave it out"):
        bases.committee(empty)


def test_many_rows_have_the_time_for_large_mixtures(monkeypatch):
    """Two parts, no floor. Fault: five and three, whose time is over at two normals."""
    seen = []

    def fitted(u, number, seed, floor):
        seen.append((number, len(u), floor))
        return original(u, number, seed, floor)

    original = module.fitted_mixture
    monkeypatch.setattr(module, "fitted_mixture", fitted)
    bases.committee(ring(9500), max_seconds=0.0)
    assert len(seen) == 15
    seen.clear()
    found = bases.committee(ring(9600), max_seconds=0.0)
    assert seen == [(1, 4800, 1e-6)] * 2
    assert len(found.loc) == 2


def test_larger_mixtures_of_more_rows(monkeypatch):
    """Five rows a parameter, by weight. Faults: 32 at most; rows of no weight count."""
    seen = []

    def fitted(u, number, seed, floor):
        seen.append(number)
        return NormalMixture(torch.ones(1), u.mean(0)[None], torch.eye(2)[None])

    monkeypatch.setattr(module, "fitted_mixture", fitted)
    for number, largest in ((2300, 32), (2500, 64), (5000, 128)):
        seen.clear()
        bases.committee(ring(number))
        assert max(seen) == largest
    for heavy, parts in ((1e3, 5), (1.0, 2)):
        seen.clear()
        weights = torch.ones(10_000).index_fill(0, torch.arange(1000), heavy)
        bases.committee(ring(10_000), weights=weights)
        assert seen.count(1) == (2 if parts == 2 else 15)
