"""What to change, told from draws of known faults, one at a time."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.core import Reason
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.mcmc import HMC, MCMC, ChEES
from pyro_ebm.mcmc.kernels.chees import TrajectoryAdaptation
from pyro_ebm.mcmc.report.analysis import advise, hole_in_support, starts_in_a_tail
from pyro_ebm.mcmc.report.results import Diagnostics

CHAINS, GROUPS, DRAWS = 64, 8, 50


def diagnostics(sites, num_superchains=GROUPS):
    shapes = {
        name: type("Shape", (), {"r_hat": torch.zeros(v.shape[2:])})
        for name, v in sites.items()
    }
    return Diagnostics(
        shapes, 0.8, 0.5, 0, 0, torch.ones(CHAINS), CHAINS, DRAWS, num_superchains
    )


def advice(sites, energy=None, **settings):
    if energy is None:
        energy = torch.randn(CHAINS, DRAWS)
    return advise(sites, energy, diagnostics(sites, **settings))


def normal(*shape):
    return torch.randn(CHAINS, DRAWS, *shape)


def test_nothing_is_said_of_good_draws():
    tau = normal().exp()
    assert advice({"x": normal(3), "tau": tau, "theta": normal(8)}) == []


@pytest.mark.parametrize("num_superchains", [GROUPS, CHAINS])
def test_groups_that_did_not_arrive(num_superchains):
    """Planted: the lowest chain as reference; energies of the first half too."""
    energy = 3 + torch.randn(CHAINS, DRAWS)
    energy[:, :10] += 1000.0  # forgotten since
    energy[8:16] += 40.0
    energy[40:48] += 100.0
    (found,) = advice({"x": normal()}, energy, num_superchains=num_superchains)
    assert found.reason is Reason.CHAINS_BEHIND
    assert str(found).startswith("16 of 64 chains did not arrive where the others are")


def test_groups_are_looked_at_where_chains_are_short():
    short = {"x": torch.randn(CHAINS, 12)}
    energy = torch.randn(CHAINS, 12)
    energy[8:16] += 40.0
    (found,) = advise(short, energy, diagnostics(short))
    assert str(found).startswith("1 of 8 groups of chains did not arrive")


def test_one_group_that_is_lower_is_no_fault_of_the_others():
    energy = torch.randn(CHAINS, DRAWS)
    energy[:8] -= 100
    assert advice({"x": normal()}, energy) == []


def test_separate_modes():
    """Both coordinates differ by mode and are no ridge. Planted: chains not centred.

    Chains of one group are in both.
    """
    x = normal(2, 2)
    x[:30] += 30.0
    (found,) = advice({"x": x})
    assert found.reason is Reason.SEPARATE_MODES
    assert "the 64 chains are in 2 places that they hardly leave" in str(found)
    assert "(34) and 30" in str(found)


def test_three_modes_and_a_chain_that_has_been_in_two():
    x = normal()
    x[:20] += 20.0
    x[40:] -= 20.0
    x[50, -8:] += 40.0
    (found,) = advice({"x": x})
    assert "in 3 places" in str(found)


def test_modes_that_are_apart_in_no_coordinate():
    """4 standard deviations in each of 10. Seen to fail without the direction."""
    x = normal(10)
    x[:30] += 3.0
    (found,) = advice({"x": x})
    assert found.reason is Reason.SEPARATE_MODES


def test_chains_that_move_slowly_are_in_no_modes():
    """Far from each other, and alone. Seen to fail without bounds on the places."""
    slow = 0.05 * normal(2) + torch.randn(CHAINS, 1, 2)
    assert advice({"x": slow}) == []
    walks = torch.randn(CHAINS, DRAWS, 2).cumsum(1)
    assert advice({"x": walks}) == []


def test_a_higher_mode_is_not_told_from_chains_on_their_way_by_its_energy():
    """Planted: a mode that is higher in energy called a late arrival."""
    x, energy = normal(2), torch.randn(CHAINS, DRAWS)
    x[:12] += 30.0
    energy[:12] += 40.0
    (found,) = advice({"x": x}, energy)
    assert found.reason is Reason.SEPARATE_MODES
    energy[:12] -= torch.linspace(0.0, 30.0, DRAWS)
    (found,) = advice({"x": x}, energy)
    assert found.reason is Reason.CHAINS_BEHIND


def test_chains_that_are_stuck_are_in_no_mode():
    x, energy = normal(2), torch.randn(CHAINS, DRAWS)
    x[:2], energy[:2] = 30.0, 0.5
    assert advice({"x": x}, energy) == []


def test_collinear_coordinates_are_named():
    """The pair with the strongest correlation, by site and index."""
    slope = normal(2)
    intercept = -70 * slope[..., 1] + normal()
    sites = {"intercept": intercept, "other": normal(3), "slope": slope}
    (found,) = advice(sites)
    assert found.reason is Reason.COLLINEAR
    assert str(found).startswith("intercept and slope[1] correlate at -0.9999: center")


def test_a_coordinate_that_is_there_twice_is_no_ridge():
    half = normal(1)
    assert advice({"symmetric": torch.cat([half, half], -1)}) == []


def test_a_funnel():
    """Planted: any positive site; positive sites by their own spread."""
    tau = normal().exp()
    sites = {"mu": normal(), "tau": tau, "theta": tau[..., None] * normal(8)}
    (found,) = advice(sites)
    assert found.reason is Reason.FUNNEL
    assert "the spread of 'theta' follows tau (their logarithms" in str(found)
    assert "try a non-centred form, theta = location + tau * z, by " in str(found)
    assert str(found).endswith("LocScaleReparam")
    # Of several scales it is the right one.
    scales = normal(3).exp()
    (found,) = advice({"tau": scales, "theta": scales[..., 1:2] * normal(8)})
    assert "follows tau[1] (" in str(found)


def test_a_funnel_of_a_logarithm():
    """Planted: the logarithm taken of all that may be a scale."""
    v = normal()
    (found,) = advice({"v": v, "x": v.exp()[..., None] * normal(8)})
    assert "the spread of 'x' follows v (its logarithm and v correlate at" in str(found)
    assert "x = location + its scale exp(... v) * z" in str(found)


def test_a_funnel_goes_before_a_ridge():
    """Planted: what a funnel squeezes together told to center."""
    tau = normal().exp()
    location = 1000 * normal()
    theta = location[..., None] + tau[..., None] * normal(8)
    (found,) = advice({"mu": location, "tau": tau, "theta": theta})
    assert found.reason is Reason.FUNNEL


def test_a_funnel_within_a_vector():
    """Neal's, of unlike scales. Planted: no correlation is too small."""
    v = 3 * normal(1)
    rest = (v / 2).exp() * normal(9) * torch.logspace(-2, 2, 9)
    (found,) = advice({"x": torch.cat([rest, v], -1)})
    assert found.reason is Reason.FUNNEL
    assert "follows x[9] (" in str(found)
    assert "exp(0.5 * x[9]) * z" in str(found)
    assert advice({"x": normal(10)}) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_draws_that_are_not_finite(bad):
    x, energy = normal(2), normal()
    x[3, -1] = bad
    assert advice({"x": x}) == []
    energy[3, -1] = bad
    assert advice({"x": normal(2)}, energy) == []


def test_matrices_scalars_and_few_draws():
    assert advice({"x": normal(2, 3), "y": normal()}) == []
    few = {"x": torch.randn(CHAINS, 2)}
    assert advise(few, few["x"], diagnostics(few, CHAINS)) == []


def test_a_line_far_from_its_origin_is_told_to_center():
    """End to end. By a kernel that takes no metric from draws, in too few steps."""
    x = 66.6 + 3.8 * torch.randn(200)
    y = 3 + 0.02 * x + 0.4 * torch.randn(200)

    def line():
        intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.4).to_event(1), obs=y)

    mcmc = MCMC(HMC(num_leapfrog=3), 40, 20, 64, progress_bar=False)
    with pytest.warns(UnreliableWarning, match="R-hat"):
        mcmc.run(line)
    found = mcmc.diagnostics()
    assert not found.is_reliable
    kinds = {finding.reason for finding in found.reasons}
    assert kinds & {Reason.COLLINEAR, Reason.CHAINS_BEHIND, Reason.SEPARATE_MODES}


def test_a_flat_prior_without_an_end_is_named():
    """Of two sites, the one that the data know nothing of. Planted: all flat priors."""

    def model():
        for name in ("free", "known"):
            x = pyro.sample(name, dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    mcmc = MCMC(num_samples=100, progress_bar=False)
    with pytest.warns(UnreliableWarning, match="the prior of 'free' is flat, and"):
        mcmc.run(model)


CHAINS, DRAWS = 64, 200


def draws(*shape):
    return torch.randn(CHAINS, DRAWS, *shape)


def test_starts_anywhere_are_in_no_tail():
    """At most 1 of 200 runs of 20 coordinates. Seen to fail with a score of 2."""
    found = 0
    for _ in range(200):
        is_divergent = torch.rand(CHAINS, DRAWS) < 0.002
        found += bool(starts_in_a_tail({"x": draws(20)}, draws(), is_divergent))
    assert found <= 1


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        (lambda x, _: x[..., 1] > 2.3, "the upper end of x[1]"),
        (lambda x, _: x[..., 0] < -2.3, "the lower end of x[0]"),
        (lambda x, _: x[..., 0].abs() > 2.5, "both ends of x[0]"),
        (lambda _, energy: energy > 2.3, "the upper end of the energy"),
    ],
)
def test_starts_in_a_tail(tail, words):
    """Half of the transitions from there. Planted: ranks among the starts alone."""
    x, energy = draws(2), draws()
    is_divergent = tail(x, energy) & (torch.rand(CHAINS, DRAWS) < 0.5)
    assert starts_in_a_tail({"x": x, "y": draws()}, energy, is_divergent) == words


def test_a_chain_that_stays_is_one_start():
    """Seen to fail where each of its divergent transitions counts."""
    x, energy, is_divergent = draws(2), draws(), torch.zeros(CHAINS, DRAWS) > 0
    for chain in range(3):
        x[chain, 50:90], energy[chain, 50:90] = 5.0, 3.0 + chain
        is_divergent[chain, 51:90:2] = True
    assert starts_in_a_tail({"x": x}, energy, is_divergent) == ""


def test_holes():
    energy = torch.zeros(100)
    assert hole_in_support(energy) == []
    energy[:20] = math.inf
    (found,) = hole_in_support(energy)
    assert found.reason is Reason.ZERO_DENSITY
    assert str(found).startswith("the density is zero at 20% of the points")


def test_a_bound_of_the_data_is_named():
    """End to end. Planted: points that are looked for beyond the draws."""
    y = torch.rand(30) * 7.3

    def model():
        b = pyro.sample("b", dist.Uniform(0.0, 100.0))
        uniform = dist.Uniform(0.0, b, validate_args=False)
        with pyro.plate("rows", 30):
            pyro.sample("y", uniform, obs=y)

    mcmc = MCMC(num_samples=40, warmup_steps=60, progress_bar=False)
    with pytest.warns(UnreliableWarning, match="the density is zero"):
        mcmc.run(model)


@pytest.mark.slow
def test_a_ridge_whose_tips_are_closed_is_unreliable(monkeypatch):
    """End to end, without the small steps that open them; it was ok, and wrong by 20 %.

    Seen to fail without the rule, with 1 % of divergent transitions as the only one.
    """
    monkeypatch.setattr(TrajectoryAdaptation, "SMALL_STEPS", 0.0)
    ridge = FunctionEnergy(
        lambda x: x[..., 0] ** 2 / 200 + (x[..., 1] + 0.1 * x[..., 0] ** 2) ** 2 / 2,
        (2,),
    )
    mcmc = MCMC(ChEES(small_steps=0.0), 200, progress_bar=False)
    with pytest.warns(UnreliableWarning, match="start at .* of (x|the energy)"):
        mcmc.run(ridge)
