"""The tail of the weights: k-hat and the standard error that allows for it."""

import math

import pytest
import torch

from pyro_ebm.diagnostics.pareto import pareto_k, pareto_std_error


def pareto(k, count):
    """Log-weights whose tail shape is exactly ``k``."""
    return k * torch.empty(count).exponential_()


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.7, 1.0, 2.0])
def test_k_is_recovered(k):
    """Planted fault: excesses over zero, not over the cutoff."""
    found = torch.tensor([pareto_k(pareto(k, 2_000)) for _ in range(50)])
    # The prior of the fit pulls k towards 1/2 with the strength of ten draws.
    tail = math.ceil(3 * math.sqrt(2_000))
    expected = (tail * k + 5) / (tail + 10)
    z = (found.mean() - expected) / (found.std() / math.sqrt(50))
    assert abs(z) < 4
    assert found.std() == pytest.approx((1 + k) / math.sqrt(tail), rel=0.4)


def test_k_of_gaussian_weights_is_that_of_theory():
    """From N(0, s^2) to N(0, 1) the tail has shape ``1 - s^2``, up to a logarithm."""
    for variance in (0.9, 0.5, 0.2):
        x = math.sqrt(variance) * torch.randn(100_000)
        log_weights = x**2 * (1 / variance - 1) / 2
        assert pareto_k(log_weights) == pytest.approx(1 - variance, abs=0.15)


def test_scale_and_zero_weights_do_not_matter():
    log_weights = pareto(0.4, 1000)
    k = pareto_k(log_weights)
    assert pareto_k(log_weights + 1e4) == pytest.approx(k, rel=1e-6)
    assert pareto_k(log_weights - 1e4) == pytest.approx(k, rel=1e-6)
    # Zeros lengthen the tail that is fitted, by the rule for N.
    padded = torch.cat([log_weights, torch.full((100,), -torch.inf)])
    assert pareto_k(padded) == pytest.approx(k, abs=0.15)


def test_equal_weights_have_no_tail():
    log_weights = torch.full((100,), 3.0)
    assert pareto_k(log_weights) == -math.inf
    assert pareto_std_error(log_weights) == 0.0
    half = torch.cat([log_weights, torch.full((100,), -torch.inf)])
    assert pareto_k(half) == -math.inf
    assert pareto_std_error(half) == pytest.approx(math.sqrt(1 / 199))


@pytest.mark.parametrize("num_larger", [0, 3, 30, 110])
def test_weights_of_a_few_values_have_no_tail(num_larger):
    """Faults: the shape of the rounding, 1.7 to 6; of 100 to 120 equals, an error."""
    larger = torch.full((num_larger,), 0.05)
    log_weights = torch.cat([torch.zeros(10_000 - num_larger), larger])
    log_weights += 1e-15 * torch.rand(10_000)
    assert pareto_k(log_weights) <= 0
    plain = log_weights.exp().std() / log_weights.exp().mean() / 100.0001
    assert plain <= pareto_std_error(log_weights) < 3 * plain + 1e-9
    few = torch.cat([torch.zeros(9_997), torch.ones(3)])  # who knows what comes next
    assert pareto_k(few) == math.inf


@pytest.mark.parametrize(
    "log_weights",
    [
        torch.zeros(3),
        torch.full((100,), -torch.inf),
        torch.cat([torch.zeros(1), torch.full((99,), -torch.inf)]),
        torch.cat([torch.zeros(1), torch.full((99,), -1000.0)]),
        torch.cat([torch.full((1,), torch.inf), torch.zeros(99)]),
    ],
    ids=["few", "none", "one", "far", "infinite"],
)
def test_what_cannot_be_fitted_is_infinite(log_weights):
    assert pareto_k(log_weights) == math.inf
    assert pareto_std_error(log_weights) == math.inf


def test_std_error_exceeds_the_delta_method_where_the_tail_is_heavy():
    light, heavy = 0.01 * torch.randn(5000), pareto(0.6, 5000)
    plain = [
        (w.exp().std() / w.exp().mean()).item() / math.sqrt(5000)
        for w in (light, heavy)
    ]
    assert pareto_std_error(light) == pytest.approx(plain[0], rel=0.02)
    assert pareto_std_error(heavy) > 1.05 * plain[1]


@pytest.mark.parametrize("dtype", [torch.float32])
def test_float32():
    log_weights = pareto(0.3, 5000)
    assert log_weights.dtype == torch.float32
    assert pareto_k(log_weights) == pytest.approx(0.3, abs=0.25)
    assert 0 < pareto_std_error(log_weights) < 0.1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"shape \(N,\), got \(2, 3\)"):
        pareto_k(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="nan, and 1 of 30 are"):
        pareto_k(torch.tensor([math.nan] + [0.0] * 29))
