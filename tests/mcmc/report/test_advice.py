"""What to change, told from draws of known faults, one at a time."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core import Reason
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.mcmc.report.advice import advise
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
    """Planted: the lowest group as reference; energies of the first half too."""
    energy = 3 + torch.randn(CHAINS, DRAWS)
    energy[:, :10] += 1000.0  # forgotten since
    energy[8:16] += 40.0
    energy[40:48] += 100.0
    (found,) = advice({"x": normal()}, energy, num_superchains=num_superchains)
    assert found.reason is Reason.CHAINS_BEHIND
    count = "2 of 8 groups of chains" if num_superchains == 8 else "16 of 64 chains"
    assert str(found).startswith(f"{count} did not arrive where the others are, ")


def test_one_group_that_is_lower_is_no_fault_of_the_others():
    energy = torch.randn(CHAINS, DRAWS)
    energy[:8] -= 100
    assert advice({"x": normal()}, energy) == []


def test_separate_modes():
    """Both coordinates differ by mode and are no ridge. Planted: chains not centred."""
    x = normal(2, 2)
    x[:24] += 30.0
    (found,) = advice({"x": x})
    assert found.reason is Reason.SEPARATE_MODES
    assert "64 in 2" not in str(found)
    assert "the 8 groups of chains are in 2 places that they do not leave" in str(found)


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
