"""What a set of weights is worth."""

import math

import pytest
import torch

from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp


def test_log_mean_exp():
    w = torch.rand(3, 5)
    torch.testing.assert_close(log_mean_exp(w.log()), w.mean(-1).log())
    torch.testing.assert_close(log_mean_exp(w.log(), 0), w.mean(0).log())
    torch.testing.assert_close(log_mean_exp(w.log() + 800), w.mean(-1).log() + 800)
    assert log_mean_exp(torch.tensor([0.0, -torch.inf])).item() == -math.log(2)
    assert log_mean_exp(torch.full((2,), -torch.inf)) == -torch.inf
    assert log_mean_exp(torch.tensor([0.0, math.nan])).isnan()


def test_effective_sample_fraction():
    w = torch.rand(3, 5)
    expected = w.sum(-1) ** 2 / (w**2).sum(-1) / 5
    torch.testing.assert_close(effective_sample_fraction(w.log()), expected)
    torch.testing.assert_close(effective_sample_fraction(w.log() - 900), expected)
    torch.testing.assert_close(effective_sample_fraction(w.log().mT, 0), expected)


@pytest.mark.parametrize(
    ("log_weights", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 1.0),
        ([5.0, -torch.inf, -torch.inf, -torch.inf], 0.25),
        ([-torch.inf] * 4, 0.0),
        ([0.0, 0.0, math.nan, 0.0], 0.0),
        ([0.0, 0.0, torch.inf, 0.0], 0.0),
    ],
)
def test_effective_sample_fraction_of_extremes(log_weights, expected):
    fraction = effective_sample_fraction(torch.tensor(log_weights))
    assert fraction.item() == pytest.approx(expected)
