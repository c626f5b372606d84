"""Which base is taken, and what is said of it."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm import bases
from pyro_ebm.bases import choice as module

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_the_best_of_held_out_rows_is_taken():
    clusters = torch.cat([torch.randn(200, 4) - 5, torch.randn(200, 4) + 5])
    found = bases.fit(clusters)
    assert found.kind == "committee"
    assert found.compared[found.kind] >= max(found.compared.values()) - 0.05
    assert found.log_likelihood == found.compared[found.kind]
    assert str(found).startswith(f"committee: {found.log_likelihood:.3f} +- ")
    correlated = torch.randn(300, 4) @ torch.ones(4, 4).tril()
    assert bases.fit(correlated).kind == "normal"
    signs = torch.randn(400, 8).sign()  # 256 clusters, or two a coordinate
    assert bases.fit(signs + 0.2 * torch.randn(400, 8)).kind == "independent"


def test_the_likelihood_is_that_of_rows_that_were_not_seen(monkeypatch):
    """Within its error over fits. Fault: fitted to all rows before they are scored."""
    seen = []

    def spy(data, **settings):
        seen.append(len(data))
        return bases.normal(data, **settings)

    monkeypatch.setattr(module, "normal", spy)
    data = torch.randn(200, 3)
    found = bases.fit(data, "normal")
    assert seen == [170, 200]
    wanted = -3 / 2 * math.log(2 * math.pi * math.e)
    assert abs(found.log_likelihood - wanted) < 5 * found.std_error


def test_a_base_serves_an_energy():
    data = torch.cat([torch.randn(100, 2) - 3, torch.randn(100, 2) + 3])
    base = bases.fit(data, "gaussian_mixture").distribution
    energy = pyro_ebm.energies.FunctionEnergy(lambda x: -base.log_prob(x), (2,))
    model = pyro_ebm.EnergyModel(energy, base)
    found = pyro_ebm.partition.estimate(model.energy, base, progress_bar=False)
    assert abs(found.value) < 1e-3


def test_whole_numbers_have_counts():
    found = bases.fit(torch.randint(0, 3, (100, 2)))
    assert (found.kind, list(found.compared)) == ("independent", ["independent"])
    assert isinstance(found.distribution.base_dist, dist.Categorical)


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="'auto' or one of .*'flow'.*got 'spline'"):
        bases.fit(torch.randn(10, 2), "spline")


def slope(number):
    return torch.randn(number, 1) + 0.2 * torch.randn(number, 2)


def test_rows_that_lack_entries_serve_all_kinds():
    """Nearly as well as whole ones. Fault: kernels at rows that are not filled."""
    whole, held_out = slope(300), slope(200)
    gone = torch.rand(300, 2) < 0.1
    gone[:, 0] &= ~gone[:, 1]
    data, settings = whole.where(~gone, torch.nan), {"progress_bar": False}
    found = bases.fit(data, held_out=held_out, max_seconds=1.0, **settings)
    assert all(math.isfinite(value) for value in found.compared.values())
    wanted = bases.normal(whole).log_prob(held_out).mean().item()
    assert abs(found.log_likelihood - wanted) < 0.1
    assert found.compared["kernel_density"] > wanted - 0.3
    with pytest.raises(ValueError, match="data must be finite"):
        bases.fit(data, max_seconds=1.0, **settings)


def test_what_was_chosen_is_fitted_to_other_rows():
    """With its weights. Fault: the parts in another order."""
    parts = {"normal": 0.25, "kernel_density": 0.75}
    first = bases.normal(slope(50))
    found = bases.FittedBase(first, "stack", 0.0, 0.1, {}, parts)
    data = slope(100)
    again = found.fitted_to(data)
    assert again.probs.tolist() == [0.25, 0.75]
    assert torch.equal(again.parts[0].loc, bases.normal(data).loc)
    with pytest.raises(ValueError, match=r"none of \[\]"):
        found._replace(shares={}).fitted_to(data)
