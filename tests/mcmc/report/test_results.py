"""The verdict, one fault at a time."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from pyro_ebm.core import Reason
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.diagnostics import Convergence
from pyro_ebm.energies import QuadraticEnergy
from pyro_ebm.mcmc import HMC, MALA, MCMC, ULA, Gibbs
from pyro_ebm.mcmc.base import bias_of
from pyro_ebm.mcmc.report.results import Diagnostics


def convergence(**values):
    good = dict.fromkeys(("r_hat", "nested_r_hat"), torch.ones(2))
    good |= dict.fromkeys(("bulk_ess", "tail_ess"), torch.full((2,), 1000.0))
    good |= dict.fromkeys(("mean_std_error", "sd_std_error"), torch.full((2,), 0.1))
    return Convergence(**(good | values))


def diagnostics(site=None, **values):
    good = {
        "sites": {"a": convergence(), "b": site or convergence()},
        "accept_prob": 0.8,
        "step_size": 0.5,
        "num_divergences": 0,
        "num_stuck": 0,
        "energy_bfmi": torch.ones(4),
        "num_chains": 4,
        "num_draws": 1000,
        "num_superchains": 4,
    }
    return Diagnostics(**(good | values)).judged(1000)


def test_good():
    found = diagnostics()
    assert (found.status, found.reason, found.is_reliable) == ("ok", "", True)
    assert str(found) == (
        "4 chains of 1,000 draws [ok], acceptance 0.80, step size 0.5, 0 divergences"
    )


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ({"r_hat": torch.tensor([1.0, 1.02])}, "R-hat of 'b' is 1.020 > 1.01"),
        ({"r_hat": torch.tensor([math.nan, math.inf])}, "R-hat of 'b' is inf > 1.01"),
        ({"bulk_ess": torch.tensor([99.0, 1e4])}, "bulk ESS of 'b' is 99 < 400"),
        ({"tail_ess": torch.tensor([1e4, 99.0])}, "tail ESS of 'b' is 99 < 400"),
        (
            {"mean_std_error": torch.tensor([math.nan, 1.0])},
            "draws of 'b' are not finite",
        ),
    ],
)
def test_bad_site(site, reason):
    found = diagnostics(convergence(**site))
    assert (found.status, found.reason) == ("unreliable", reason)
    assert reason in str(found)


def test_many_draws_that_are_not_finite_are_not_too_few():
    """Fault: nan at all sites taken for few draws."""
    nan = convergence(mean_std_error=torch.full((2,), math.nan))
    found = diagnostics(sites={"a": nan})
    assert found.reason.startswith("draws of 'a' are not finite")
    assert "too few" in diagnostics(sites={"a": nan}, num_draws=3).reason


def test_a_biased_kernel_is_never_ok():
    """``MCMC(ULA(0.1))`` was ok, with a standard deviation of 1.033 +- .006 for 1."""
    energy = QuadraticEnergy(torch.zeros(2))
    for kernel in (ULA(0.1), MALA(0.1)):
        chains = MCMC(kernel, 1000, 300, progress_bar=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            chains.run(energy)
        found = chains.diagnostics()
        rules = [finding.reason for finding in found.reasons]
        assert rules == ([] if kernel.is_exact else [Reason.BIASED_KERNEL])
        assert found.is_reliable == kernel.is_exact


def test_a_kernel_of_ones_own_says_that_it_is_biased_or_nothing():
    """By an attribute of the contract, whatever its class."""
    silent, honest = SimpleNamespace(), SimpleNamespace(is_exact=False)
    assert bias_of(silent) == bias_of(None) == bias_of(HMC()) == bias_of(Gibbs()) == ()
    (finding,) = bias_of(honest)
    assert finding.reason is Reason.BIASED_KERNEL
    assert "SimpleNamespace does not leave the target invariant" in str(finding)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_divergences": 42}, "1.05% of the transitions diverged"),
        ({"num_stuck": 1}, "1 of 4 chains are stuck"),
        (
            {"num_stray": 1},
            "1 of 4 chains stay in another place than the others, by their energies",
        ),
        (
            {"energy_bfmi": torch.tensor([0.1, 0.2, 0.2, 1.0])},
            "the energy fraction of missing information is 0.20, below 0.3: chains are "
            "slow to reach the tails",
        ),
    ],
)
def test_bad_chains(values, reason):
    assert diagnostics(**values).reason == reason


@pytest.mark.parametrize(
    "values",
    [
        {"num_divergences": 39},
        {"energy_bfmi": torch.tensor([0.1, 0.5, 1.0, 1.0])},
        {"energy_bfmi": torch.full((4,), math.nan)},
    ],
)
def test_not_bad_enough(values):
    assert diagnostics(**values).is_reliable


def test_constants_have_no_r_hat():
    constant = {"r_hat": torch.full((2,), math.nan)}
    assert diagnostics(convergence(**constant)).is_reliable


def test_superchains_decide():
    """Single chains need not be long where there are groups of them."""
    short = convergence(r_hat=torch.full((2,), 1.3))
    assert diagnostics(short, num_superchains=2).is_reliable
    apart = convergence(nested_r_hat=torch.full((2,), 1.3))
    assert diagnostics(apart).is_reliable
    found = diagnostics(apart, num_superchains=2)
    assert found.reason == "nested R-hat of 'b' is 1.300 > 1.01"
    assert torch.equal(found.r_hat("b"), apart.nested_r_hat)


def test_all_reasons_are_given():
    found = diagnostics(convergence(tail_ess=torch.zeros(2)), num_stuck=2)
    assert found.reason == "tail ESS of 'b' is 0 < 400; 2 of 4 chains are stuck"


def test_without_a_step_size():
    assert "step size" not in str(diagnostics(step_size=math.nan))
