"""Everything at once, and of a part of the chains where there are very many."""

import pytest
import torch

from pyro_ebm import diagnostics
from pyro_ebm.diagnostics import convergence
from pyro_ebm.diagnostics import convergence as function
from pyro_ebm.diagnostics.convergence import Convergence


def limits(monkeypatch, **values):
    # The function hides its module.
    for name, value in values.items():
        monkeypatch.setitem(function.__globals__, name, value)


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


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="must divide.*got 4 for 6 chains"):
        convergence(torch.randn(6, 10), 4)
    with pytest.raises(ValueError, match="4 draws"):
        convergence(torch.randn(6, 3))
