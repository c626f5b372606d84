"""R-hat against its faults: shift, scale, drift, tails, short chains."""

import importlib
import math
import warnings

import pytest
import torch

from pyro_ebm.diagnostics import nested_r_hat, r_hat
from pyro_ebm.diagnostics.convergence import normal_scores

# The function of the same name hides the module.
module = importlib.import_module("pyro_ebm.diagnostics.convergence")


def arviz_r_hat(draws):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    return arviz.rhat(draws.numpy())


@pytest.mark.parametrize("num_draws", [4, 5, 50, 51])
@pytest.mark.parametrize("num_chains", [2, 3, 40])
def test_agrees_with_arviz(num_chains, num_draws):
    """Ties included, as rejected proposals leave them."""
    draws = torch.randn(num_chains, num_draws).exp()
    draws[:, 2] = draws[:, 1]
    assert r_hat(draws).item() == pytest.approx(arviz_r_hat(draws), rel=1e-10)


def test_a_single_chain_is_compared_with_itself():
    chain = torch.randn(1, 1000)
    assert r_hat(chain) < 1.01
    assert r_hat(chain + torch.linspace(0, 2, 1000)) > 1.1  # a drift


def test_what_r_hat_is_for():
    """Each fault alone. Planted faults of the code: see the last test."""
    draws = torch.randn(4, 1000)
    assert r_hat(draws) < 1.01
    shifted, wider = draws.clone(), draws.clone()
    shifted[0] += 1
    wider[0] *= 3
    assert r_hat(shifted) > 1.1
    assert r_hat(wider) > 1.05
    stuck = draws.clone()
    stuck[0] = stuck[0, 0]
    assert r_hat(stuck) > 1.1


def test_cauchy_tails():
    """Where the variance is infinite ranks still tell; moments do not."""
    draws = torch.randn(4, 1000) / torch.randn(4, 1000)
    assert r_hat(draws) < 1.01
    draws[0] += 3
    assert r_hat(draws) > 1.1


def test_increasing_maps_do_not_matter():
    draws = torch.randn(4, 100) + torch.arange(4.0)[:, None]
    assert torch.equal(normal_scores(draws), normal_scores(draws.exp()))
    assert module.ratio(normal_scores(draws[None])) > 1.2


def test_events_are_judged_one_by_one():
    draws = torch.randn(4, 40, 3, 2)
    found, nested = r_hat(draws), nested_r_hat(draws, 2)
    assert found.shape == nested.shape == (3, 2)
    torch.testing.assert_close(found[1, 1], r_hat(draws[..., 1, 1]))
    torch.testing.assert_close(nested[1, 1], nested_r_hat(draws[..., 1, 1], 2))


def test_ratio_in_closed_form():
    """Chains of independent draws with means of variance v: ``R^2 -> 1 + v``."""
    draws = torch.randn(200, 500) + math.sqrt(0.3) * torch.randn(200, 1)
    # Relative error of the variance of 200 means: sqrt(2 / 199).
    assert module.ratio(draws[None]).item() ** 2 - 1 == pytest.approx(0.3, rel=0.4)
    nested = module.nested_ratio(draws[None], 200).item() ** 2
    assert nested - 1 == pytest.approx(0.3, rel=0.4)
    plain = module.ratio(draws[None]).item() ** 2
    assert nested - plain == pytest.approx(1 / 500, rel=1e-6)


def test_nested_ratio_by_hand():
    """Two superchains of two chains of two draws: chain means 0, 4 and 2, 10, all of
    variance 2; superchain means 2 and 6, so between them 8, and within each the
    variance of the means, 8 and 32, and that of the draws, 2.

    Planted faults: (2) without the variance between the chains of a superchain;
    without that of the draws.
    """
    means = torch.tensor([0.0, 4.0, 2.0, 10.0])
    rows = means[:, None] + torch.tensor([-1.0, 1.0])
    wanted = 1 + 8 / ((8 + 32) / 2 + 2)
    assert module.nested_ratio(rows[None], 2).item() ** 2 == pytest.approx(wanted)
    found = module.nested_ratio_of_moments(means[None], torch.full((1, 4), 2.0), 2)
    assert found.item() ** 2 == pytest.approx(wanted)


def test_nested_ratio_in_closed_form():
    """Superchains at means of variance .2, their chains at means of variance .5 around
    those: ``1 + .2 / (1 + .5)`` for many long chains.

    Planted fault: (2) without the variance between the chains of a superchain, 1.2.
    """
    home = math.sqrt(0.2) * torch.randn(400, 1, 1)
    draws = home + math.sqrt(0.5) * torch.randn(400, 50, 1) + torch.randn(400, 50, 50)
    found = module.nested_ratio(draws.flatten(0, 1)[None], 400).item() ** 2
    # The means of 50 chains have a variance of their own; the error is that of the
    # variance of 400 means.
    wanted = (0.2 + 0.52 / 50) / 1.52
    assert found - 1 == pytest.approx(wanted, rel=4 * math.sqrt(2 / 399))


def test_superchains_of_short_chains():
    """512 chains of 8 draws are enough; superchains that stayed home are not."""
    draws = torch.randn(512, 8) + torch.randn(512, 1)  # that have hardly moved
    assert r_hat(draws) > 1.2
    assert nested_r_hat(draws, 16) < 1.03
    home = torch.randn(16, 1, 1).expand(16, 32, 8).reshape(512, 8)
    assert nested_r_hat(draws + home, 16) > 1.05
    # The same variance without memory of the start is no fault.
    assert nested_r_hat(draws + home[torch.randperm(512)], 16) < 1.03


def test_nested_sees_a_drift_that_all_chains_share():
    draws = torch.randn(512, 8)
    assert nested_r_hat(draws, 16) < 1.01
    assert nested_r_hat(draws + torch.linspace(0, 1, 8), 16) > 1.03


def test_nested_sees_scales():
    draws = torch.randn(16, 32, 8)
    draws[0] *= 4
    assert nested_r_hat(draws.flatten(0, 1), 16) > 1.03


def test_constants_and_bad_numbers():
    assert r_hat(torch.ones(4, 10)).isnan()
    apart = torch.arange(4.0)[:, None].expand(4, 10)
    assert r_hat(apart) == torch.inf
    assert r_hat(torch.full((4, 10), torch.nan)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32])
def test_float32():
    draws = torch.randn(4, 1000) + 1e4
    assert r_hat(draws).item() == pytest.approx(arviz_r_hat(draws), rel=1e-6)


def no_fold(monkeypatch):
    monkeypatch.setattr(module, "folded", lambda rows: rows)


def no_split(monkeypatch):
    monkeypatch.setattr(module, "split_chains", lambda rows: rows)


def no_ranks(monkeypatch):
    monkeypatch.setattr(module, "normal_scores", lambda rows: rows)


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (no_fold, test_what_r_hat_is_for),
        (no_fold, test_nested_sees_scales),
        (no_split, test_nested_sees_a_drift_that_all_chains_share),
        (no_ranks, test_cauchy_tails),
    ],
)
def test_planted_faults_are_caught(plant, check, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"4 draws, got \(4, 3\).*Draw more"):
        r_hat(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"num_chains, num_draws.*got \(10,\)"):
        r_hat(torch.zeros(10))
    with pytest.raises(ValueError, match="must divide.*got 3 for 4 chains"):
        nested_r_hat(torch.zeros(4, 10), 3)
