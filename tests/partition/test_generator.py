"""Generators: their density, their weights, and what is said of them."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    IsingEnergy,
    QuadraticEnergy,
)
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.mcmc import ImportanceResampling
from pyro_ebm.mcmc.samplers.resampling import weighted_draws
from pyro_ebm.partition import fit_generator, generator

DIM = 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair_of_modes():
    """Widths .45 and 1 in six dimensions, two thirds and one third of the mass."""
    at = torch.full((DIM,), 3 / math.sqrt(DIM))

    def energy(x):
        narrow = -((x - at) / 0.45).square().sum(-1) / 2 - DIM * math.log(0.45)
        wide = -(x + at).square().sum(-1) / 2 + math.log(0.5)
        return -torch.logaddexp(narrow, wide)

    return FunctionEnergy(energy, (DIM,)), DIM / 2 * math.log(2 * math.pi)


def test_two_modes_of_different_widths():
    """Worth, log Z and shares. Fault: the base left out of the density."""
    energy, log_norm = pair_of_modes()
    base = dist.Normal(torch.zeros(DIM), 2.0).to_event(1)
    found = fit_generator(energy, base, progress_bar=False)
    assert found.is_reliable
    assert found.effective_fraction > 0.7
    estimate = found.log_partition
    assert abs(estimate.value - log_norm - math.log(1.5)) < 4 * estimate.std_error
    drawn = ImportanceResampling(found.distribution).draw_diagnosed(energy, 5000)
    share = (drawn.x.sum(-1) > 0).double().mean().item()
    assert share == pytest.approx(2 / 3, abs=0.03)
    assert drawn.diagnostics.effective_fraction == pytest.approx(
        found.effective_fraction, abs=0.05
    )


def test_a_light_tail_comes_before_a_larger_fraction(monkeypatch):
    """Fault: the largest fraction alone, whatever its weights."""
    worths = iter([(True, 0.1), (False, 0.9), (True, 0.8), (True, 0.7), (True, 0.6)])
    monkeypatch.setattr(generator._Rounds, "weigh", lambda *_: next(worths))
    wide = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    found = fit_generator(QuadraticEnergy(torch.ones(2)), wide, progress_bar=False)
    assert found.num_components == 4
    assert next(worths) == (True, 0.6)  # Two rounds without a larger fraction: no more.


def test_the_error_of_the_effective_fraction_is_its_spread():
    """Fault: the spread of the weights in its place."""
    energy = FunctionEnergy(lambda x: x.abs().sum(-1), (2,))
    base = dist.StudentT(5.0, torch.zeros(2), 2.0).to_event(1)
    found = fit_generator(energy, base, max_seconds=0.5, progress_bar=False)
    again = torch.stack(
        [weighted_draws(energy, found.distribution, 20_000)[1] for _ in range(60)]
    )
    fractions = effective_sample_fraction(again)
    assert found.std_error == pytest.approx(fractions.std().item(), rel=0.5)
    assert abs(found.effective_fraction - fractions.mean()) < 4 * found.std_error


@pytest.mark.parametrize(
    ("energy", "base"),
    [
        (DistributionEnergy(dist.Gamma(3.0, 2.0)), dist.LogNormal(0.0, 1.5)),
        (
            DistributionEnergy(dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]))),
            dist.Dirichlet(torch.ones(3)),
        ),
    ],
    ids=["positive", "simplex"],
)
def test_other_supports(energy, base):
    found = fit_generator(energy, base, max_seconds=2, progress_bar=False)
    assert found.effective_fraction > 0.8
    assert abs(found.log_partition.value) < 4 * found.log_partition.std_error + 1e-3
    assert energy.support.check(found.distribution.sample((100,))).all()


def test_what_a_mixture_cannot_follow_is_unreliable():
    """A thin shell in twenty dimensions. Fault: a verdict by log Z alone."""
    shell = FunctionEnergy(lambda x: (x.norm(dim=-1) - 6).square() * 2e4, (20,))
    base = dist.Normal(torch.zeros(20), 1.5).to_event(1)
    found = fit_generator(shell, base, max_seconds=2, progress_bar=False)
    assert found.effective_fraction < 0.1
    assert not found.is_reliable
    assert "unreliable" in str(found)
    assert "max_seconds" in str(found)


def test_the_density_is_that_of_its_parts():
    energy = QuadraticEnergy(torch.ones(2))
    base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    found = fit_generator(energy, base, max_seconds=2, progress_bar=False)
    x, learned = torch.randn(5, 2), found.distribution.parts[1]
    wanted = torch.logaddexp(
        base.log_prob(x) + math.log(0.05), learned.log_prob(x) + math.log(0.95)
    )
    assert torch.allclose(found.distribution.log_prob(x), wanted, atol=1e-5)
    assert found.distribution.support.event_dim == constraints.real_vector.event_dim


def test_what_it_refuses():
    energy = QuadraticEnergy(torch.zeros(2))
    base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    with pytest.raises(ValueError, match=r"max_seconds must be positive, got 0"):
        fit_generator(energy, base, max_seconds=0)
    with pytest.raises(ValueError, match=r"base must be one distribution"):
        fit_generator(energy, dist.Normal(0.0, 1.0))
    spins = IsingEnergy((2, 2), 0.3)
    with pytest.raises(NotImplementedError, match=r"continuous support"):
        fit_generator(spins, IndependentSites.uniform(spins.support, (2, 2)))
