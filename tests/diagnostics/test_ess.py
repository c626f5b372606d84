"""Effective sample sizes and standard errors, against AR(1) chains and ArviZ."""

import importlib
import warnings

import pytest
import torch

from pyro_ebm.diagnostics import (
    bulk_ess,
    mean_std_error,
    sd_std_error,
    tail_ess,
)

# The function of the same name hides the module.
module = importlib.import_module("pyro_ebm.diagnostics.convergence")


def ar1(rho, num_chains, num_draws, *event):
    """Stationary, of unit variance."""
    draws = torch.randn(num_chains, num_draws, *event)
    for n in range(1, num_draws):
        draws[:, n] = rho * draws[:, n - 1] + (1 - rho**2) ** 0.5 * draws[:, n]
    return draws


@pytest.mark.parametrize("num_draws", [10, 11, 100, 103])
@pytest.mark.parametrize("num_chains", [1, 4, 30])
@pytest.mark.parametrize("rho", [-0.6, 0.3, 0.95])
def test_agrees_with_arviz(rho, num_chains, num_draws):
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


def test_constants_and_bad_numbers():
    assert bulk_ess(torch.ones(4, 10)) == 40
    assert bulk_ess(torch.full((4, 10), torch.nan)).isnan()


def test_events_are_judged_one_by_one():
    draws = ar1(0.5, 4, 50, 3, 2)
    for function in (bulk_ess, tail_ess, mean_std_error, sd_std_error):
        found = function(draws)
        assert found.shape == (3, 2)
        torch.testing.assert_close(found[1, 1], function(draws[..., 1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_float32():
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


def test_bad_input_is_refused():
    for function in (bulk_ess, tail_ess, mean_std_error, sd_std_error):
        with pytest.raises(ValueError, match=r"4 draws, got \(4, 3\)"):
            function(torch.zeros(4, 3))
