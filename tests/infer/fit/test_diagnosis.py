"""The judgement on a fit: each rule by numbers, and by a good fit and a bad one."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyModel, fit
from pyro_ebm.bases import FittedBase, normal
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.energies import NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import (
    DenoisingScoreMatching,
    EnergyDifference,
    EnergyPenalty,
    FitDiagnostics,
    FitRecord,
    ImportanceSampledLikelihood,
    LogLikelihood,
    MaximumLikelihood,
    NoiseContrastive,
    RankingNoiseContrastive,
)
from pyro_ebm.infer.fit import automatic, settling
from pyro_ebm.infer.fit.diagnosis import (
    _drift,
    _run_at_rest,
    _walker_mean,
    diagnose,
    energy_gap,
    judge,
    learned_gap,
)
from pyro_ebm.mcmc import MALA, ULA
from pyro_ebm.partition import LogPartition, LogPartitionEstimate
from pyro_ebm.partition.tracking.weighted_draws import WeightedDraws
from tests.infer.problems import base

KNOWN = LogPartitionEstimate(1.0, 0.01, 0.9, 1.1, 100.0, Status.OK, "walkers", 10)
UNKNOWN = KNOWN._replace(
    status=Status.UNRELIABLE,
    reasons=(Finding(Reason.ISLANDS_DISAGREE, "the islands disagree"),),
)
UNKNOWN_WORDS = "log Z unknown: run partition.estimate"


def off(value, std_error=0.01, relative=None):
    return EnergyDifference(value, std_error, value if relative is None else relative)


def record(step, value, held_out=None, log_z_error=0.005, stage=0):
    def likelihood(v):
        return LogLikelihood(v, 0.1, 0.1, log_z_error, True)

    held_out = None if held_out is None else likelihood(held_out)
    return FitRecord(step, 1.0, likelihood(value), held_out, KNOWN, stage)


def verdict(found=None, log_partition=KNOWN, stopped="finished", history=()):
    """The first reason in a few words, and all of them in sentences."""
    reasons = judge(found or FitDiagnostics(), log_partition, stopped, history)
    first = reasons[0].reason if reasons else Status.OK
    return first, tuple(map(str, reasons))


@pytest.mark.parametrize(
    ("found", "wanted", "reason"),
    [
        (FitDiagnostics(), "ok", None),
        (FitDiagnostics(energy_gap=off(0.3)), "ok", None),  # too little to matter
        (FitDiagnostics(energy_gap=off(0.9, 0.3)), "ok", None),  # perhaps by chance
        (FitDiagnostics(energy_gap=off(0.4)), "not at equilibrium", "data differs"),
        (FitDiagnostics(energy_gap=off(-0.4)), "not at equilibrium", "more steps"),
        # Of energies that hardly differ, by rounding: its square overflows.
        (FitDiagnostics(energy_gap=off(0.4, relative=1e200)), "not at equilibrium", ""),
        # A base that knows its rows by heart, whatever is learned beside it; or not.
        (FitDiagnostics(energy_gap=off(0.4), learned_gap=off(0.0)), "ok", None),
        (FitDiagnostics(energy_gap=off(0.4), learned_gap=off(0.2)), "ok", None),
        (
            FitDiagnostics(energy_gap=off(0.4), learned_gap=off(-0.4)),
            "not at equilibrium",
            "data differs",
        ),
        (FitDiagnostics(learned_gap=off(0.4)), "ok", None),
        (FitDiagnostics(drift=off(-0.4)), "not at equilibrium", "lower the learning"),
        (FitDiagnostics(drift=off(-0.1)), "ok", None),
        (FitDiagnostics(r_hat=1.04), "ok", None),
        (FitDiagnostics(r_hat=1.06), "not at equilibrium", "R-hat .* 1.060"),
        (FitDiagnostics(noise_ess=6.0), "ok", None),
        (FitDiagnostics(noise_ess=4.0), "noise too far from data", "only 4.0 count"),
        (FitDiagnostics(noise_separation=0.99), "ok", None),
        (FitDiagnostics(noise_separation=0.999), "noise too far from data", "99.9%"),
    ],
)
def test_rules_of_the_measured(found, wanted, reason):
    said, reasons = verdict(found)
    assert said == wanted
    assert (reasons == ()) == (wanted == "ok")
    if reason:
        assert len(reasons) == 1
        assert re.search(reason, reasons[0])


def test_the_gravest_is_said_and_all_are_listed():
    found = FitDiagnostics(energy_gap=off(1.0), noise_ess=1.0)
    assert verdict(found, UNKNOWN, "loss not finite")[0] == "loss not finite"
    said, reasons = verdict(found, UNKNOWN)
    assert said == "noise too far from data"
    assert len(reasons) == 3
    assert verdict(None, UNKNOWN) == (UNKNOWN_WORDS, ("the islands disagree",))


def rising(gain, **settings):
    return [record(100 * k, gain * k / 4, **settings) for k in range(1, 9)]


@pytest.mark.parametrize(
    ("history", "wanted"),
    [
        ([], "ok"),
        ([record(100, -9.0)], "ok"),
        (rising(0.09), "ok"),  # 0.045 in the last quarter
        (rising(0.11), "still learning"),
        (rising(0.11, log_z_error=0.02), "ok"),  # perhaps that of log Z
        (rising(-0.3), "ok"),
        (rising(0.3, held_out=-1.0), "ok"),  # training points by heart
        ([record(100, -9.0, -1.0), record(200, -9.0, -0.9)], "still learning"),
        # Another stage is another story.
        ([*rising(0.5), record(900, 3.0, stage=1), record(950, 3.0, stage=1)], "ok"),
    ],
)
def test_rule_of_progress(history, wanted):
    assert verdict(history=history)[0] == wanted


# What is measured --------------------------------------------------------------------


DATA = torch.randn(500, 2, dtype=torch.float64, generator=torch.manual_seed(0)) + 0.5


def quadratic(scale=1.0, loc=0.5):
    precision = torch.eye(2) / scale**2
    return EnergyModel(QuadraticEnergy(torch.full((2,), loc), precision), base())


def test_energy_gap_of_a_closed_form():
    """Of a Gaussian with the moments of the data it is 0; of one half as wide, it is 3
    in expectation, 4 less 1. With the sign turned the second fails."""
    for scale, wanted in ((1.0, 0.0), (0.5, 3.0)):
        model = quadratic(scale)
        model.log_partition.refresh(model.energy)
        gap = energy_gap(model, DATA)
        assert abs(gap.value - wanted) < 4 * gap.std_error
        assert gap.std_error < 0.4
        sd = scale**-2  # of a chi-squared with two degrees of freedom, halved
        assert gap.relative == pytest.approx(gap.value / sd, rel=0.2)


def test_energy_gap_by_walkers():
    """At a neural energy that is that of the base, known in mean and spread."""
    energy = NeuralEnergy((2,), (8,), base=base())
    torch.nn.init.zeros_(energy.network[-1].weight)
    model = EnergyModel(energy, base())
    assert energy_gap(model, DATA) is None  # log Z is not known yet
    model.log_partition.refresh(energy)
    draws = base().sample((2000,))
    gap = energy_gap(model, draws)
    assert abs(gap.value) < 4 * gap.std_error
    wanted = (DATA.square().sum(-1).mean() / 4.5 - 1).item()
    gap = energy_gap(model, DATA)
    assert abs(gap.value - wanted) < 4 * gap.std_error
    assert 0.02 < gap.std_error < 0.2


def test_energy_gap_by_weighted_draws():
    """Fault: draws of the base for those of the model, or what is learned alone."""
    energy, draws = NeuralEnergy((2,), (8,), base=base()), WeightedDraws()
    torch.nn.init.normal_(energy.network[-1].weight)
    model = EnergyModel(energy, base())
    draws.start(energy, base(), 40_000)
    model.log_partition.follow_by(energy, draws)
    gap = energy_gap(model, DATA)
    weights = draws.log_weights(energy).softmax(0)
    with torch.no_grad():
        wanted = energy(DATA).mean() - weights @ energy(draws.x)
        plain = energy(DATA).mean() - energy(draws.x).mean()
        learned = energy.correction(DATA).mean() - weights @ energy.correction(draws.x)
    error = energy(draws.x).std().item() / 4000**0.5
    assert gap.value == pytest.approx(wanted.item(), abs=4 * error)
    assert min(abs(plain - wanted), abs(learned - wanted)) > 4 * error
    assert 0 < gap.std_error < 0.2


def test_learned_gap_is_the_nearer_to_zero_of_two_kinds_of_rows():
    """By weighted draws and by walkers, for an energy of the correction x. Between rows
    on either side of the model it is 0.

    Planted fault: the whole energy, that of the base included.
    """
    energy = NeuralEnergy((2,), (), base=base())
    output = energy.network[-1]
    torch.nn.init.zeros_(output.bias)
    with torch.no_grad():
        output.weight.copy_(torch.tensor([[1.0, 0.0]]))
    model, draws = EnergyModel(energy, base()), WeightedDraws()
    assert learned_gap(model, DATA, DATA) is None
    draws.start(energy, base(), 40_000)
    with torch.no_grad():
        mean = (draws.log_weights(energy).softmax(0) @ draws.x)[0].item()
    at = {k: torch.randn(400, 2) + mean + k for k in (-2, 1, 3)}
    for source in (draws, None):
        model.log_partition.follow_by(energy, source)
        if source is None:
            model.log_partition.refresh(energy)
        for held_out, train, wanted in ((3, 1, 1), (1, 3, 1), (-2, 3, 0), (1, -2, 0)):
            gap = learned_gap(model, at[held_out], at[train])
            assert abs(gap.value - wanted) <= 4 * gap.std_error * bool(wanted)
            assert 0 < gap.std_error < 0.4


def test_the_mean_over_the_walkers_weighs_their_islands():
    """An island that holds nearly all of Z gives the mean, and the number of walkers
    that its error is for.

    Planted fault: the weights without the offsets of the islands.
    """
    energy = NeuralEnergy((2,), (8,), base=base())
    model = EnergyModel(energy, base())
    model.log_partition.refresh(energy)
    walkers = model.log_partition.walkers
    walkers.log_offset[3] += 60.0
    weights, energies = walkers.log_weights[3].softmax(0), walkers.energy[3]
    mean, error = _walker_mean(model)
    assert mean.item() == pytest.approx((weights @ energies).item())
    variance = weights @ (energies - mean).square()
    least = (variance * weights.square().sum()).sqrt()
    assert error.item() >= 0.999 * least.item()


def still(x, scale=1.0, num_steps=500):
    model, objective = quadratic(scale), MaximumLikelihood(len(x), 2)
    model.chains.start(model.energy, x, MALA())
    model.chains.advance(model.energy, MALA(), 1)
    model.chains.u = x.clone()  # where the test wants them
    return diagnose(model, objective, model.chains, DATA, num_steps, 64)


def test_drift_of_chains():
    """Draws of the model stay; draws of one twice as wide lose 3 nats in the mean."""
    found = still(torch.randn(200, 2) + 0.5)
    assert found.num_moves == 20
    assert abs(found.drift.value) < 4 * found.drift.std_error
    assert found.r_hat < 1.05
    assert 0.4 < found.acceptance < 0.8
    assert 200 < found.ess <= 200 * 20 * math.log10(4000)
    assert found.chain_lag == pytest.approx(200 * 20 / found.ess / 2)
    found = still(2 * torch.randn(200, 2) + 0.5)
    assert abs(found.drift.value + 3) < 4 * found.drift.std_error
    assert verdict(found)[0] == "not at equilibrium"


def test_drift_is_that_of_the_end_of_the_run():
    """The last quarter less the start: chains that move by 1 a step, in a run of 20,
    have moved by 18 in the middle of it. Chains that begin to move late are seen, and
    those that have come home again are not.

    Planted fault: the mean of the whole run less the start.
    """
    steps = torch.arange(21.0) + torch.randn(50, 1)
    assert _drift(steps).value == pytest.approx(18.0)
    late = (steps - steps[:, :1] - 15).clamp(min=0.0)
    assert _drift(late).value == pytest.approx(3.0)
    home = torch.cat([steps[:, :10], steps[:, :1].expand(-1, 11)], 1)
    assert _drift(home).value == pytest.approx(0.0, abs=1e-12)


def test_drift_of_chains_that_relax_slowly():
    """A step size of .01 takes chains of twice the width a third of the way home in 20
    moves: the energy of the mean of all moves, and that at their end, differ by more
    than 4 standard errors.

    Planted fault: the mean of the whole run less the start.
    """
    model = quadratic()
    x = 2 * torch.randn(4000, 2) + 0.5
    energies, _ = _run_at_rest(model.energy, x, MALA(torch.tensor(0.01)), 20)
    found = _drift(energies)
    # The excess of the mean square over 1 falls as e^(-2 t): 3 at first, t of .185.
    wanted = 3 * (math.exp(-2 * 0.01 * 18) - 1)
    assert abs(found.value - wanted) < 4 * found.std_error
    whole = (energies.mean(1) - energies[:, 0]).mean().item()
    assert abs(whole - wanted) > 4 * found.std_error


def test_chain_age():
    """Two moves a step; of 200 chains one is begun anew in each step."""
    assert still(torch.randn(200, 2), num_steps=1).chain_age == pytest.approx(2)
    long = still(torch.randn(200, 2), num_steps=10_000).chain_age
    assert long == pytest.approx(2 * 200)


def overlap(objective, loc=0.5):
    model = quadratic(loc=loc)
    state = objective.make_state()
    return diagnose(model, objective, state, DATA + loc - 0.5, 100, 64)


def noise(loc, scale):
    return dist.Normal(torch.full((2,), loc), scale).to_event(1)


def test_overlap_with_noise():
    """Noise that is the model has all its weight, and is told from data by chance."""
    same = overlap(NoiseContrastive(noise(0.5, 1.0), num_noise=3))
    assert same.noise_ess == pytest.approx(64 * 3)
    assert abs(same.noise_separation - 0.5) < 0.05 or same.noise_k == -math.inf
    wide = overlap(ImportanceSampledLikelihood(noise(0.5, 2.0), num_draws=100))
    # E[w]^2 / E[w^2] of a Gaussian in one of twice the width: 7 / 16 in two dimensions.
    assert wide.noise_ess == pytest.approx(100 * 7 / 16, rel=0.1)
    assert wide.noise_k < 0.5
    # A datum is nearer to the centre: F(2, 2) below 4, with probability 4 / 5.
    assert wide.noise_separation == pytest.approx(0.8, abs=0.05)
    far = overlap(RankingNoiseContrastive(noise(9.0, 1.0)))
    assert far.noise_separation == 1.0
    assert verdict(far)[0] == "noise too far from data"
    assert overlap(DenoisingScoreMatching()) == FitDiagnostics()


# Whole fits --------------------------------------------------------------------------


def neural():
    energy = NeuralEnergy((2,), (16,), base=base())
    return EnergyModel(
        energy, base(), log_partition=LogPartition(energy, base(), num_walkers=64)
    )


def fitted(objective, num_steps=100, lr=0.03, **settings):
    pyro.set_rng_seed(1)
    model = neural()
    optim = torch.optim.Adam(model.parameters(), lr=lr)
    return fit(
        model,
        DATA,
        objective,
        num_steps=num_steps,
        optim=optim,
        progress_bar=False,
        **settings,
    )


ML = MaximumLikelihood(num_chains=64, num_steps=3)
SLOW = MaximumLikelihood(num_chains=64, num_steps=1, restart_fraction=0)
#: After 100 steps the energy gap is still .3.
LONG = {"num_steps": 300}
FITS = {
    "chains": (ML, LONG, "ok"),
    "chains that lag": (SLOW, {"lr": 2.0, "num_steps": 40}, "not at equilibrium"),
    "too few steps": (ML, {"lr": 1e-3, "num_steps": 10}, "not at equilibrium"),
    "near noise": (NoiseContrastive(), LONG, "ok"),
    "far noise": (NoiseContrastive(noise(8.0, 1.0)), {}, "noise too far from data"),
    "near ranking noise": (RankingNoiseContrastive(), LONG, "ok"),
    "far ranking noise": (
        RankingNoiseContrastive(noise(8.0, 1.0)),
        {},
        "noise too far from data",
    ),
    "near proposal": (ImportanceSampledLikelihood(), LONG, "ok"),
    "far proposal": (
        ImportanceSampledLikelihood(noise(8.0, 1.0)),
        {"num_steps": 40, "lr": 1e-3},
        "noise too far from data",
    ),
    "scores": (DenoisingScoreMatching(0.2), LONG, "ok"),
    "scores of blurred data": (DenoisingScoreMatching(1.5), {}, "not at equilibrium"),
}


def test_a_fit_by_biased_chains_is_never_ok():
    biased = MaximumLikelihood(num_chains=64, num_steps=3, kernel=ULA())
    result = fitted(EnergyPenalty(biased, 1e-3))
    assert result.reasons[0].reason is Reason.BIASED_KERNEL
    assert result.verdict == "the kernel is biased"
    assert not result.is_reliable


@pytest.mark.parametrize("name", FITS)
def test_fits_good_and_bad(name):
    objective, settings, wanted = FITS[name]
    result = fitted(objective, **settings)
    assert result.verdict == wanted, str(result)
    assert result.is_reliable == (wanted == "ok") == (not result.reasons)
    assert f"verdict: {wanted}" in str(result)


def test_a_log_partition_that_is_not_known(monkeypatch):
    """The walkers cannot follow a learning rate of 2, and nothing else is known."""
    monkeypatch.setattr(settling, "_estimated", lambda *_: None)
    result = fitted(SLOW, 40, 2.0)
    assert not result.log_partition.is_reliable
    assert any(result.log_partition.reason.startswith(str(r)) for r in result.reasons)
    assert result.diagnostics.energy_gap is None


# Bases that know their rows by heart ------------------------------------------------


def corrected(monkeypatch, base, data, **settings):
    """A default fit from a base that stands for the fitted one."""
    found = FittedBase(base, "normal", 0.0, 0.1, {"normal": 0.0})
    monkeypatch.setattr(automatic.bases, "fit", lambda *_, **__: found)
    pyro.set_rng_seed(0)
    model = EnergyModel(NeuralEnergy(data.shape[1:], (32,)))
    return fit(model, data, progress_bar=False, **settings)


def test_rows_that_the_base_knows_by_heart_are_no_fault_of_the_fit(monkeypatch):
    """A normal with all covariances of 20 columns from 60 rows: others have an energy
    that lies a standard deviation above that of the model, by no fault of what corrects
    it.

    Planted fault: the gap of the whole energy.
    """
    data, held_out = torch.randn(60, 20), torch.randn(400, 20)
    settings = {"num_steps": 20, "validation_data": held_out}
    result = corrected(monkeypatch, normal(data), data, **settings)
    gap = result.diagnostics.energy_gap
    assert gap.value > 4 * gap.std_error
    assert gap.relative > 0.5
    assert result.verdict == "ok", str(result)


def test_what_is_half_learned_is_seen_beside_a_fitted_base(monkeypatch):
    """A base of three times the width, whose correction has only begun.

    Planted fault: a gap of what is learned that is 0.
    """
    data = torch.randn(600, 2)
    result = corrected(monkeypatch, normal(3 * data), data, num_steps=150)
    assert result.diagnostics.gain.value > 0.05
    assert result.verdict == "not at equilibrium", str(result)
