"""Ranks of draws: ties, quantiles, halves."""

import importlib

import pytest
import torch

# The function of the same name hides the module.
module = importlib.import_module("pyro_ebm.diagnostics.convergence")


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
