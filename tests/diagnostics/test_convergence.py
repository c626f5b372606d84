"""R-hat, ranks, effective sample sizes and standard errors, alone and together."""

import importlib
import math
import warnings

import pytest
import torch

from pyro_ebm import diagnostics
from pyro_ebm.diagnostics import (
    bulk_ess,
    convergence,
    mean_std_error,
    nested_r_hat,
    r_hat,
    sd_std_error,
    tail_ess,
)
from pyro_ebm.diagnostics.convergence import Convergence, normal_scores

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


def test_normal_scores_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rows = torch.randint(0, 7, (3, 2, 10)).double()
    expected = stats.rankdata(rows.flatten(1).numpy(), axis=1)
    scores = stats.norm.ppf((expected - 0.375) / 20.25)
    torch.testing.assert_close(
        module.normal_scores(rows).flatten(1), torch.from_numpy(scores)
    )


def test_quantiles_are_those_of_torch():
    rows = torch.randn(3, 4, 25)
    for prob in (0.0, 0.05, 0.5, 0.95, 1.0):
        expected = rows.flatten(1).quantile(prob, 1)
        torch.testing.assert_close(module.quantiles(rows, prob), expected)


def test_halves():
    rows = torch.arange(10.0).reshape(1, 2, 5)
    expected = torch.tensor([[[0.0, 1], [5, 6], [3, 4], [8, 9]]])
    assert torch.equal(module.split_chains(rows), expected)


def test_folded_is_the_distance_from_the_median():
    rows = torch.tensor([[[1.0, 2.0], [4.0, 5.0]]])
    assert torch.equal(module.folded(rows), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))


def test_rows():
    draws = torch.randn(2, 4, 3, 5, dtype=torch.float32)
    rows = module.to_rows(draws)
    assert rows.dtype == torch.float64
    assert torch.equal(rows[7].float(), draws[..., 1, 2])
    assert module.to_rows(draws[..., 0, 0]).shape == (1, 2, 4)


def ar1(rho, num_chains, num_draws, *event):
    """Stationary, of unit variance."""
    draws = torch.randn(num_chains, num_draws, *event)
    for n in range(1, num_draws):
        draws[:, n] = rho * draws[:, n - 1] + (1 - rho**2) ** 0.5 * draws[:, n]
    return draws


@pytest.mark.parametrize("num_draws", [10, 11, 100, 103])
@pytest.mark.parametrize("num_chains", [1, 4, 30])
@pytest.mark.parametrize("rho", [-0.6, 0.3, 0.95])
def test_ess_agrees_with_arviz(rho, num_chains, num_draws):
    """From ten draws a chain; of fewer ArviZ forgets the correlation altogether.

    No equal draws at a quantile either: ArviZ rounds it below them by chance.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    draws = ar1(rho, num_chains, num_draws).exp()
    middle = (draws - 1).abs() < 0.3
    draws = torch.where(middle, 1.0, draws)  # ties
    for ours, theirs in [
        (bulk_ess(draws), arviz.ess(draws.numpy(), method="bulk")),
        (tail_ess(draws), arviz.ess(draws.numpy(), method="tail")),
        (mean_std_error(draws), arviz.mcse(draws.numpy(), method="mean")),
        (sd_std_error(draws), arviz.mcse(draws.numpy(), method="sd")),
    ]:
        assert ours.item() == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.5, 0.9])
def test_ar1_in_closed_form(rho):
    """``ESS(x) = S (1 - rho) / (1 + rho)``; of ``x^2`` the same with ``rho^2``.

    The mean over coordinates has |z| < 4, beside a bias of 2 %. Planted below: the
    variance within chains alone.
    """
    draws = ar1(rho, 8, 1000, 100)
    total, square = 8000, rho**2
    for estimate, truth in [
        (mean_std_error(draws) ** -2, total * (1 - rho) / (1 + rho)),
        # Var x^2 = 2: se(s)^2 = 2 / (4 ESS).
        (sd_std_error(draws) ** -2 / 2, total * (1 - square) / (1 + square)),
    ]:
        error = estimate.std().item() / 10
        assert abs(estimate.mean().item() - truth) < 4 * error + 0.02 * truth


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_errors_are_those_of_repetition(rho):
    """Mean and sd over their errors have variance 1 over 2,000 coordinates."""
    draws = ar1(rho, 4, 400, 2000)
    for z in (
        draws.mean((0, 1)) / mean_std_error(draws),
        (draws.std((0, 1)) - 1) / sd_std_error(draws),
    ):
        # Errors themselves err by some 7 %, which a longer tail of z shows.
        assert z.mean().abs() < 0.25
        assert z.var().item() == pytest.approx(1.0, abs=0.15)


def test_short_chains_that_are_many():
    """Of 8 draws the autocorrelation cannot be followed, but chains are many."""
    rho = 0.5
    draws = ar1(rho, 2000, 8)
    # Variance of the mean of eight: (1 + 2 sum (1 - k/8) rho^k) / 8.
    lags = torch.arange(1, 8)
    tau = 1 + 2 * ((1 - lags / 8) * rho**lags).sum()
    size = mean_std_error(draws).item() ** -2
    assert size == pytest.approx(16_000 / tau.item(), rel=0.2)
    stuck = torch.randn(2000, 1).expand(2000, 8)
    assert bulk_ess(stuck).item() == pytest.approx(2000, rel=0.2)


def test_chains_apart_are_worth_little():
    draws = torch.randn(4, 1000) + 10 * torch.arange(4)[:, None]
    assert bulk_ess(draws) < 10


def test_heavy_tails():
    draws = torch.randn(4, 1000) / torch.randn(4, 1000)
    assert bulk_ess(draws).item() == pytest.approx(4000, rel=0.25)
    assert tail_ess(draws).item() == pytest.approx(4000, rel=0.25)


def test_tail_is_the_worse_one():
    """Draws that go far to the right stay there for a while."""
    draws = torch.randn(4, 1000)
    draws[:, 400:450] = 5 + torch.rand(4, 50)
    assert tail_ess(draws) < 0.3 * bulk_ess(-draws.abs())
    torch.testing.assert_close(tail_ess(draws), tail_ess(-draws), rtol=0.2, atol=0)


def test_ess_of_constants_and_bad_numbers():
    assert bulk_ess(torch.ones(4, 10)) == 40
    assert bulk_ess(torch.full((4, 10), torch.nan)).isnan()


def test_ess_of_events_one_by_one():
    draws = ar1(0.5, 4, 50, 3, 2)
    for function in (bulk_ess, tail_ess, mean_std_error, sd_std_error):
        found = function(draws)
        assert found.shape == (3, 2)
        torch.testing.assert_close(found[1, 1], function(draws[..., 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_ess_in_float32():
    draws = torch.randn(4, 1000)
    shifted = draws.double() + 1e3
    assert bulk_ess(draws).item() == pytest.approx(bulk_ess(shifted).item())
    assert bulk_ess(draws).dtype == torch.float64


def test_planted_fault_is_caught(monkeypatch):
    """The autocorrelation against the variance within chains, without pairs."""
    plain = module._autocorrelation
    monkeypatch.setattr(module, "_autocorrelation", lambda rows: plain(rows) * 0.9)
    with pytest.raises(AssertionError):
        test_ar1_in_closed_form(0.5)


def test_bad_input_to_ess_is_refused():
    for function in (bulk_ess, tail_ess, mean_std_error, sd_std_error):
        with pytest.raises(ValueError, match=r"4 draws, got \(4, 3\)"):
            function(torch.zeros(4, 3))


def limits(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_agrees_with_the_single_functions():
    draws = torch.randn(6, 31, 2, 3).exp()
    expected = Convergence(
        diagnostics.r_hat(draws),
        diagnostics.nested_r_hat(draws, 3),
        diagnostics.bulk_ess(draws),
        diagnostics.tail_ess(draws),
        diagnostics.mean_std_error(draws),
        diagnostics.sd_std_error(draws),
    )
    assert_equal(convergence(draws, 3), expected)


def test_chunks_do_not_matter(monkeypatch):
    draws = torch.randn(6, 20, 7)
    whole = convergence(draws)
    limits(monkeypatch, _CHUNK=250)
    assert_equal(convergence(draws), whole)


def test_a_part_of_the_chains_stands_for_all(monkeypatch):
    draws = torch.randn(800, 50, 3)
    whole = convergence(draws, 16)
    limits(monkeypatch, _MAX_NUMBERS=50 * 3 * 160)
    part = convergence(draws, 16)
    kept = draws.reshape(16, 50, 50, 3)[:, :10].reshape(160, 50, 3)
    torch.testing.assert_close(part.nested_r_hat, convergence(kept, 16).nested_r_hat)
    for name in ("bulk_ess", "tail_ess", "mean_std_error", "sd_std_error"):
        ratio = getattr(part, name) / getattr(whole, name)
        assert (ratio - 1).abs().max() < 0.15, name
    # Never fewer than 64 chains.
    limits(monkeypatch, _MAX_NUMBERS=1)
    smallest = convergence(draws, 16)
    kept = draws.reshape(16, 50, 50, 3)[:, :4].reshape(64, 50, 3)
    torch.testing.assert_close(smallest.r_hat, convergence(kept).r_hat)


def test_chains_without_groups_may_be_left_out(monkeypatch):
    draws = torch.randn(300, 20)
    limits(monkeypatch, _MAX_NUMBERS=20 * 100)
    part = convergence(draws)
    torch.testing.assert_close(part.r_hat, convergence(draws[:100]).r_hat)


def test_shapes():
    for event in [(), (1,), (2, 3)]:
        found = convergence(torch.randn(4, 10, *event))
        assert all(value.shape == event for value in found)


def test_bad_chains_are_refused():
    with pytest.raises(ValueError, match="must divide.*got 4 for 6 chains"):
        convergence(torch.randn(6, 10), 4)
    with pytest.raises(ValueError, match="4 draws"):
        convergence(torch.randn(6, 3))
