"""Bennett's ratio: right, with the right error, and aware of draws that are not."""

import math

import pytest
import torch

from pyro_ebm.partition.bridge.bennett import bennett, chains_ess


def shifted(count_1, count_2, shift=1.0, scale=1.0):
    """Log ratios of N(shift, scale^2) to N(0, 1), both unnormalised, at draws of each.

    The truth is ``log(scale)``.
    """
    x, y = torch.randn(count_1), shift + scale * torch.randn(count_2)
    return [(z**2 - ((z - shift) / scale) ** 2) / 2 for z in (x, y)]


def test_equal_densities_have_ratio_and_error_of_zero():
    result = bennett(torch.zeros(10), torch.zeros(20))
    assert result.log_ratio == pytest.approx(0.0, abs=1e-12)
    assert result.std_error == 0.0
    assert result.overlap == pytest.approx(1.0)


def test_constant_moves_the_ratio_by_it():
    first, second = shifted(100, 300)
    one = bennett(first, second)
    other = bennett(first + 700.0, second + 700.0)
    assert other.log_ratio == pytest.approx(one.log_ratio + 700.0, abs=1e-9)
    assert other.std_error == pytest.approx(one.std_error, rel=1e-6)
    assert other.slope_z == pytest.approx(one.slope_z, rel=1e-4)


def test_exchanging_the_densities_changes_the_sign_alone():
    first, second = shifted(100, 300, scale=0.7)
    one, other = bennett(first, second), bennett(-second, -first)
    assert other.log_ratio == pytest.approx(-one.log_ratio, abs=1e-9)
    assert other.std_error == pytest.approx(one.std_error, rel=1e-6)
    assert other.overlap == pytest.approx(one.overlap, rel=1e-6)


def test_solves_its_equation():
    first, second = shifted(50, 150)
    result = bennett(first, second)
    middle = result.log_ratio + math.log(50 / 150)
    left = (first - middle).sigmoid().sum()
    right = (middle - second).sigmoid().sum()
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    ("count_1", "count_2", "shift", "scale"),
    [(200, 200, 1.0, 1.0), (100, 500, 0.5, 0.8), (1000, 1000, 3.0, 1.0)],
)
def test_value_and_error(count_1, count_2, shift, scale):
    """Mean and variance of the standardised error over 400 runs, and of the slope.

    Planted faults: ``n_1`` and ``n_2`` exchanged in (1), which gives a mean far off for
    unequal numbers; either term of (2) left out.
    """
    runs = [bennett(*shifted(count_1, count_2, shift, scale)) for _ in range(400)]
    assert all(r.reason == "" for r in runs)
    error = torch.tensor([r.log_ratio - math.log(scale) for r in runs])
    assert abs(error.mean()) < 4 * error.std() / 20
    z = error / torch.tensor([r.std_error for r in runs])
    assert 0.8 < z.square().mean() < 1.25  # the standard error of this is 0.07
    covered = (z.abs() < 1.96).double().mean()
    assert 0.91 < covered < 0.99
    slope_z = torch.tensor([r.slope_z for r in runs])
    assert abs(slope_z.mean()) < 0.25
    assert 0.75 < slope_z.square().mean() < 1.3


def test_overlap_is_that_of_theory():
    """Against quadrature; planted fault: no division by the share of the second."""
    x = torch.linspace(-15, 15, 20_001)
    p_1, p_2 = [(-((x - m) ** 2) / 2).exp() / math.sqrt(2 * math.pi) for m in (0, 1.5)]
    share = 0.25
    integrand = p_1 * p_2 / ((1 - share) * p_1 + share * p_2)
    truth = torch.trapezoid(integrand, x).item()
    result = bennett(*shifted(30_000, 10_000, 1.5))
    assert result.overlap == pytest.approx(truth, abs=0.02)
    # Bennett's variance in terms of the overlap.
    variance = (1 / truth - 1) / (40_000 * share * (1 - share))
    assert result.std_error == pytest.approx(math.sqrt(variance), rel=0.05)


def test_infinite_ratios_are_densities_of_zero():
    """A uniform on [0, 1] and one on [1/2, 2], as densities 1 and 1: log(3/2)."""
    x, y = torch.rand(4000), 0.5 + 1.5 * torch.rand(4000)
    first = torch.where(x > 0.5, 0.0, -torch.inf)
    second = torch.where(y < 1, 0.0, torch.inf)
    result = bennett(first, second)
    assert result.reason == ""
    assert abs(result.log_ratio - math.log(1.5)) < 4 * result.std_error
    assert result.std_error < 0.05


@pytest.mark.parametrize(
    ("first", "second", "sign"),
    [(-math.inf, 0.0, -1), (0.0, math.inf, 1), (-math.inf, math.inf, 0)],
)
def test_no_overlap_at_all(first, second, sign):
    result = bennett(torch.full((50,), first), torch.full((50,), second))
    assert "no draw" in result.reason
    assert result.std_error == math.inf
    if sign:
        assert result.log_ratio == sign * math.inf
    else:
        assert math.isnan(result.log_ratio)


@pytest.mark.parametrize("shift", [5.0, 8.0, 40.0, 1000.0])
def test_poor_overlap_is_flagged(shift):
    result = bennett(*shifted(300, 300, shift))
    assert "poor overlap" in result.reason
    assert result.std_error > 0.3


def test_draws_of_another_density_are_found():
    """Planted fault: the sign of the second term of the score."""
    x, y = torch.randn(5000), 0.96 * torch.randn(5000)  # 20 % too wide
    first, second = [(z**2 - (z / 0.8) ** 2) / 2 for z in (x, y)]
    result = bennett(first, second)
    assert "not those of the two densities" in result.reason
    assert abs(result.slope_z) > 4


def test_effective_sizes_widen_the_error():
    first, second = shifted(1000, 1000)
    independent = bennett(first, second)
    correlated = bennett(first, second, ess_first=100, ess_second=100)
    assert correlated.log_ratio == pytest.approx(independent.log_ratio, abs=1e-9)
    factor = correlated.std_error / independent.std_error
    assert factor == pytest.approx(math.sqrt(10))
    assert bennett(first, second, ess_first=1e6).std_error == independent.std_error


def test_ess_of_chains():
    x = [torch.randn(8)]
    for _ in range(1999):
        x.append(0.8 * x[-1] + 0.6 * torch.randn(8))
    assert chains_ess(torch.stack(x, 1)) == pytest.approx(16_000 / 9, rel=0.2)
    assert chains_ess(torch.randn(4, 1000)) > 3000
    assert chains_ess(torch.ones(4, 100)) == 400


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (torch.zeros(2, 5), r"got shape \(2, 5\)"),
        (torch.zeros(1), r"got shape \(1,\)"),
        (torch.tensor([0.0, math.nan]), "with 1 nan"),
    ],
)
def test_bad_input_is_refused(first, message):
    with pytest.raises(ValueError, match="log_ratio_at_first.*" + message):
        bennett(first, torch.zeros(5))
    with pytest.raises(ValueError, match="log_ratio_at_second.*" + message):
        bennett(torch.zeros(5), first)
