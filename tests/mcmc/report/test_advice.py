"""What to change, told from draws of known faults, one at a time."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core import Reason
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.report.analysis import advise
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
