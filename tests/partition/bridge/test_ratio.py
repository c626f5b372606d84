"""The ratio of two partition functions from draws of both."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy, FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc import IndependentChains
from pyro_ebm.partition.bridge import ratio
from pyro_ebm.partition.bridge.bridge import bridge_sampling
from pyro_ebm.partition.bridge.ratio import log_ratio
from pyro_ebm.testing import CountingEnergy, targets


def gaussian(dim, loc=0.0, scale=1.0):
    energy = QuadraticEnergy(torch.full((dim,), loc), torch.eye(dim) / scale**2)
    return energy, lambda count: loc + scale * torch.randn(count, dim)


@pytest.mark.parametrize(
    ("dim", "loc", "scale"), [(1, 1.0, 1.0), (10, 0.3, 0.7), (50, 0.1, 1.1)]
)
def test_interval_covers(dim, loc, scale):
    """Mean and variance of the standardised error over 120 runs.

    Planted faults: the sign of the ratio; only the draws of the first.
    """
    (f_1, draw_1), (f_2, draw_2) = gaussian(dim), gaussian(dim, loc, scale)
    truth = -dim * math.log(scale)
    runs = [log_ratio(f_1, f_2, draw_1(300), draw_2(300)) for _ in range(120)]
    assert all(r.status == "ok" for r in runs)
    z = torch.tensor([(r.value - truth) / r.std_error for r in runs])
    assert abs(z.mean()) < 4 * z.std() / math.sqrt(120)
    assert 0.65 < z.square().mean() < 1.5
    assert sum(r.lower <= truth <= r.upper for r in runs) > 106


def test_tighter_than_two_estimates():
    dim, scale = 20, 1.02
    (f_1, draw_1), (f_2, draw_2) = gaussian(dim), gaussian(dim, 0.0, scale)
    x, y = draw_1(1000), draw_2(1000)
    both = log_ratio(f_1, f_2, x, y)
    one, other = bridge_sampling(f_1, x), bridge_sampling(f_2, y)
    assert both.num_evaluations == one.num_evaluations + other.num_evaluations
    assert both.std_error < 0.25 * math.hypot(one.std_error, other.std_error)
    assert abs(both.value + dim * math.log(scale)) < 4 * both.std_error


def test_sign_and_antisymmetry():
    (f_1, draw_1), (f_2, draw_2) = gaussian(2), gaussian(2, 0.0, 0.5)
    x, y = draw_1(500), draw_2(500)
    forward, backward = log_ratio(f_1, f_2, x, y), log_ratio(f_2, f_1, y, x)
    assert forward.value == pytest.approx(2 * math.log(2), abs=0.3)
    assert backward.value == pytest.approx(-forward.value, abs=1e-9)
    assert backward.std_error == pytest.approx(forward.std_error, rel=1e-9)
    shifted = log_ratio(f_1 + 3.0, f_2, x, y)
    assert shifted.value == pytest.approx(forward.value - 3.0, abs=1e-9)


def test_draws_its_own():
    target = targets.gamma()
    other = FunctionEnergy(lambda x: 1.2 * x - 2.3 * x.log(), (), target.energy.support)
    result = log_ratio(target.energy, other, base=target.base, num_draws=2000)
    truth = math.lgamma(3) - (math.lgamma(3.3) - 3.3 * math.log(1.2))
    assert result.status == "ok"
    assert abs(result.value - truth) < 4 * result.std_error


def test_own_sampler():
    f_1, f_2 = gaussian(2)[0], gaussian(2, 0.2)[0]
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    result = log_ratio(f_1, f_2, sampler=IndependentChains(base), num_draws=500)
    assert result.status == "ok"
    assert abs(result.value) < 4 * result.std_error


def test_evaluations_are_counted():
    first, second = (CountingEnergy(gaussian(2, m)[0]) for m in (0.0, 0.3))
    result = log_ratio(first, second, torch.randn(100, 2), torch.randn(150, 2))
    assert result.num_evaluations == 500
    assert first.num_values == second.num_values == 250
    first.reset(), second.reset()
    result = log_ratio(first, second, num_draws=64)
    spent = sum(e.num_values + e.num_gradients for e in (first, second))
    assert result.num_evaluations == spent


def test_poor_overlap_is_flagged():
    (f_1, draw_1), (f_2, draw_2) = gaussian(5), gaussian(5, 5.0)
    result = log_ratio(f_1, f_2, draw_1(500), draw_2(500))
    assert result.status == "unreliable"
    assert not result.is_reliable
    assert "poor overlap" in result.reason
    assert "poor overlap" in str(result)


def test_chains_that_have_not_mixed_are_flagged():
    """Planted fault: no test of the slope."""

    def two_modes(weight):
        def energy(x):
            modes = torch.stack([-((x + 5) ** 2) * weight / 2, -((x - 5) ** 2) / 2])
            return -torch.logsumexp(modes, 0)

        return FunctionEnergy(energy, ())

    draws_2 = torch.where(torch.rand(2000) < 0.5, -5.0, 5.0) + torch.randn(2000)
    draws_1 = 5 + torch.randn(2000)
    result = log_ratio(two_modes(1.5), two_modes(1.0), draws_1, draws_2)
    assert result.status == "unreliable"
    assert "not those of the two densities" in result.reason


def test_correlated_chains_widen_the_error():
    x = [torch.randn(4, 2)]
    for _ in range(499):
        x.append(0.9 * x[-1] + math.sqrt(0.19) * torch.randn(4, 2))
    x = torch.stack(x, 1)
    f_1, f_2 = gaussian(2)[0], gaussian(2, 0.5)[0]
    by_chain = log_ratio(f_1, f_2, x, 0.5 + x)
    flat = log_ratio(f_1, f_2, x.flatten(0, 1), 0.5 + x.flatten(0, 1))
    assert 1.5 < by_chain.std_error / flat.std_error < 6


def test_estimate_prints_what_it_is():
    result = ratio.LogRatioEstimate(1.0, 0.1, 0.8, 1.2, 0.9, "ok", 1000)
    assert str(result) == (
        "log Z1 - log Z2 = 1.0000 +- 0.1000 [ok], 1,000 energy evaluations"
    )


def test_supports_that_differ_in_reach():
    """A uniform within another: infinite energy of one at draws of the other."""
    wide = FunctionEnergy(lambda x: torch.where(x.abs() < 2, 0 * x, torch.inf), ())
    narrow = FunctionEnergy(lambda x: torch.where(x.abs() < 1, 0 * x, torch.inf), ())
    x, y = 4 * torch.rand(2000) - 2, 2 * torch.rand(2000) - 1
    result = log_ratio(wide, narrow, x, y)
    assert result.status == "ok"
    assert abs(result.value - math.log(2)) < 4 * result.std_error


def test_bad_input_is_refused():
    f_1, f_2 = gaussian(2)[0], gaussian(3)[0]
    law = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match="event_shape and support of target1"):
        log_ratio(f_1, f_2)
    positive = DistributionEnergy(dist.HalfNormal(torch.ones(2)).to_event(1))
    with pytest.raises(ValueError, match="event_shape and support of target1"):
        log_ratio(f_1, positive)
    with pytest.raises(TypeError, match="target2 must be an Energy, got Independent"):
        log_ratio(f_1, law)
    with pytest.raises(ValueError, match="base or sampler, not both"):
        log_ratio(f_1, f_1, base=law, sampler=IndependentChains(law))
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        log_ratio(f_1, f_1, num_draws=1)
    with pytest.raises(ValueError, match=r"draws2 must have shape .* got \(5, 3\)"):
        log_ratio(f_1, f_1, torch.randn(50, 2), torch.randn(5, 3))
    half = FunctionEnergy(lambda x: x.log().sum(-1), (2,))
    with pytest.raises(ValueError, match="draws1 must have finite energy"):
        log_ratio(half, f_1, torch.randn(50, 2), torch.randn(50, 2))
    with pytest.raises(ValueError, match="must be defined at draws1"):
        log_ratio(f_1, half, torch.randn(50, 2), torch.randn(50, 2))
