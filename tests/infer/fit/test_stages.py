"""Fits in stages, and what may be hooked into a fit: schedules, bounds, callbacks."""

import copy
import math

import pyro
import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from pyro_ebm import EnergyModel, fit
from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyPenalty,
    ImportanceSampledLikelihood,
    MaximumLikelihood,
    NoiseContrastive,
    RankingNoiseContrastive,
    ScoreMatching,
    Stage,
    TemperedMaximumLikelihood,
)
from pyro_ebm.infer.fit.optimiser import GradientNoise
from pyro_ebm.infer.fit.stages import begin_chains
from pyro_ebm.mcmc import PersistentChains
from pyro_ebm.partition import LogPartition, quadrature
from tests.infer.problems import base

ML = MaximumLikelihood(num_chains=32, num_steps=2)
DSM = DenoisingScoreMatching(0.3)
DATA = torch.randn(200, 2, dtype=torch.float64, generator=torch.manual_seed(0)) + 0.5


def neural():
    energy = NeuralEnergy((2,), (8,), base=base())
    tracker = LogPartition(energy, base(), num_walkers=64)
    return EnergyModel(energy, base(), log_partition=tracker)


def quick(model, objective=ML, **settings):
    settings = {"record_interval": 10, "progress_bar": False, **settings}
    return fit(model, DATA, objective, **settings)


def adam(model, lr=0.02):
    return torch.optim.Adam(model.parameters(), lr=lr)


# Stages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages",
    [
        [Stage(DSM, 40), Stage(ML, 30)],
        [Stage(NoiseContrastive(), 40), Stage(NoiseContrastive(num_noise=9), 30)],
        [Stage(ML, 40), Stage(NoiseContrastive(), 20), Stage(ML, 10)],
        [Stage(ContrastiveDivergence(), 40), Stage(EnergyPenalty(ML), 30)],
        [Stage(ML, 40), Stage(ScoreMatching(), 30)],
    ],
    ids=lambda stages: "-".join(stage.name for stage in stages),
)
def test_log_partition_is_right_after_all_stages(stages):
    """The walkers follow whatever the objective is, and the energy goes farther than
    the error that is allowed. Walkers that followed only in the first stage were
    planted, and seen to fail."""
    model = neural()
    before = model.energy(DATA).detach()
    result = quick(model, stages, optim=adam(model, 0.1))
    exact = quadrature(result.distribution.energy).value
    assert result.log_partition.is_reliable
    assert abs(result.log_partition.value - exact) < 0.1
    assert (model.energy(DATA) - before).std() > 0.1
    assert model.log_partition.num_steps == 69  # all but the first, where it begins
    assert result.num_steps == 70
    counts = [stage.num_steps for stage in stages]
    assert result.stages == tuple((s.name, s.num_steps) for s in stages)
    wanted = [k for k, count in enumerate(counts) for _ in range(count // 10)]
    assert [record.stage for record in result.history] == wanted
    assert [record.step for record in result.history] == [*range(10, 71, 10)]
    assert f"40 by {stages[0].name}, then" in str(result)


def test_state_is_that_of_the_last_stage():
    model = neural()
    result = quick(model, [Stage(ML, 10), Stage(NoiseContrastive(), 10)])
    assert result.state.log_partition.isfinite()
    assert result.diagnostics.noise_ess > 5
    assert result.diagnostics.drift is None
    result = quick(model, [Stage(NoiseContrastive(), 10), Stage(ML, 10)])
    assert isinstance(result.state, PersistentChains)
    assert result.diagnostics.noise_ess is None
    assert result.diagnostics.num_moves == 10


def test_one_stage_is_an_objective():
    results = []
    for objective, settings in ((ML, {"num_steps": 20}), ([Stage(ML, 20)], {})):
        pyro.set_rng_seed(3)
        results.append(quick(neural(), objective, **settings))
    assert results[0].history == results[1].history
    assert results[0].diagnostics == results[1].diagnostics


def test_a_stage_has_an_optimiser_of_its_own():
    """The last stage, with a rate of nothing, changes nothing but the average."""
    model = neural()
    seen = []

    def note(record):
        seen.append(model.energy.network[0].weight.detach().clone())

    still = torch.optim.SGD(model.parameters(), lr=0.0)
    stages = [Stage(DSM, 20), Stage(ML, 10), Stage(ML, 10, optim=still)]
    quick(model, stages, optim=adam(model), callbacks=[note])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])


def test_chains_of_a_later_stage_start_at_the_model():
    """A narrow energy far from the base: chains from the base would have a mean of 0.
    That they start at the base was planted, and seen to fail."""
    precision = torch.eye(2) / 0.3**2
    centre = torch.full((2,), 2.5)
    target = QuadraticEnergy(centre, precision)
    nothing = NeuralEnergy((2,), (4,))
    torch.nn.init.zeros_(nothing.network[-1].weight)
    model = EnergyModel(target + nothing, base())  # which knows no log Z
    model.log_partition.refresh(model.energy)
    objective = MaximumLikelihood(num_chains=200)
    begin_chains(model, objective, model.chains)
    x = model.chains.u
    # Walkers are copied, so that 200 chains are worth about 150.
    assert ((x.mean(0) - 2.5).abs() < 4 * 0.3 / 150**0.5).all()
    assert ((x.var(0) - 0.09).abs() < 4 * 0.09 * (2 / 150) ** 0.5).all()
    begin_chains(model, DSM, model.chains)
    assert model.chains.u is x  # of no concern to others


def test_a_fit_does_not_change_the_optimiser_it_was_given():
    model = neural()
    optim = adam(model)
    groups = copy.deepcopy([len(group["params"]) for group in optim.param_groups])
    quick(model, [Stage(NoiseContrastive(), 10), Stage(ML, 10)], optim=optim)
    assert [len(group["params"]) for group in optim.param_groups] == groups
    held = {id(p) for p in model.parameters()}
    assert {id(p) for p in optim.state} <= held


@pytest.mark.parametrize(
    ("objective", "settings", "error", "message"),
    [
        ([], {}, ValueError, "at least one Stage, got none"),
        ([ML], {}, TypeError, r"list of Stage, got a list with Max.*Wrap it: Stage"),
        ([Stage(ML, 5)], {"num_steps": 5}, ValueError, "left out with stages.*got 5"),
        ("ml", {}, TypeError, "must be an Objective .*got 'ml'"),
        (3, {}, TypeError, "must be an Objective .*got 3"),
        (ML, {"callbacks": print}, TypeError, "list of functions.*in a list, too"),
        (ML, {"callbacks": [3]}, TypeError, "functions of a FitRecord, got int 3"),
        (ML, {"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive.*0.0"),
        ([Stage(ML, 5, optim="sgd")], {}, TypeError, "torch.optim optimiser or learn"),
    ],
)
def test_wrong_arguments(objective, settings, error, message):
    model = neural()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        quick(model, objective, **settings)
    assert before.keys() == model.state_dict().keys()


def test_wrong_stages():
    with pytest.raises(TypeError, match="must be an Objective"):
        Stage("ml", 5)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        Stage(ML, 0)


# What ends a fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        MaximumLikelihood(num_chains=32, num_steps=2),
        TemperedMaximumLikelihood(num_chains=8, num_temperatures=3),
        EnergyPenalty(ML),
        ContrastiveDivergence(),
        NoiseContrastive(),
        RankingNoiseContrastive(),
        ImportanceSampledLikelihood(num_draws=64),
        DSM,
        ScoreMatching(),
    ],
    ids=lambda objective: type(objective).__name__,
)
@pytest.mark.parametrize("after", ["record", "step"])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_nan_goes_back_to_the_last_record(objective, after):
    """A weight becomes nan in the second stage: at once after a record, or by the very
    step after which there is one, where it was once kept as the last good state."""
    model = neural()
    seen, count = [], 0
    optim = adam(model)

    def note(record):
        seen.append(model.energy.network[0].weight.detach().clone())
        if after == "record" and record.step == 20:
            poison()

    def poison(*_):
        nonlocal count
        count += 1
        if after == "record" or count == 30:
            model.energy.network[0].weight.data[0, 0] = math.nan

    if after == "step":
        optim.register_step_post_hook(poison)
    stages = [Stage(DSM, 10), Stage(objective, 30)]
    settings = {"optim": optim, "callbacks": [note]}
    chains = "chains" in objective.needs
    if chains and after == "record":
        with pytest.raises(DivergenceError):
            quick(model, stages, **settings)
    else:
        result = quick(model, stages, **settings)
        assert result.stopped == result.verdict == "loss not finite"
        assert [r.step for r in result.history] == [10, 20]
        assert result.train.value > -10
        assert result.distribution.log_prob(DATA).isfinite().all()
    assert len(seen) == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_early_stopping_goes_on_with_the_next_stage():
    """A stage that only gets worse ends, and the next begins from its best."""
    model = neural()
    bad = torch.optim.SGD(model.parameters(), lr=0.02, maximize=True)
    stages = [Stage(DSM, 200, optim=bad), Stage(ML, 20)]
    result = quick(
        model, stages, optim=adam(model), validation_data=DATA[:50], patience=2
    )
    assert result.stages[0][1] < 200
    assert result.stages[1] == ("MaximumLikelihood", 20)
    assert result.stopped == "finished"
    last_bad = [r for r in result.history if r.stage == 0][-1]
    assert result.validation.value > last_bad.validation.value


def test_callbacks():
    first, second = [], []
    stop = [first.append, lambda r: r.step >= 20, lambda r: second.append(r) or 1]
    result = quick(neural(), [Stage(ML, 50), Stage(DSM, 50)], callbacks=stop)
    assert (result.stopped, result.num_steps) == ("callback", 20)
    assert first == second == result.history  # all are called, and 1 is not True
    assert result.stages == (("MaximumLikelihood", 20),)
    assert result.distribution.is_normalized


# What moves the parameters -----------------------------------------------------------


def test_schedulers_of_torch_move_the_objective_too():
    """With a rate that is halved each step, all stands still after the first few."""
    model = neural()
    optim = adam(model, 0.1)
    scheduler = ExponentialLR(optim, gamma=0.5)
    result = quick(model, NoiseContrastive(), num_steps=12, optim=scheduler)
    assert optim.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**12)
    assert result.state.log_partition.abs() > 0
    assert len(optim.param_groups) == 1


@pytest.mark.parametrize("kind", ["torch", "pyro"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_plateau(kind, mode):
    """A log-likelihood that rises is no plateau, in either mode."""
    model = neural()
    if kind == "torch":
        optim = adam(model)
        scheduler = ReduceLROnPlateau(optim, mode=mode, patience=1, factor=0.1)
    else:
        scheduler = pyro.optim.ReduceLROnPlateau(
            {
                "optimizer": torch.optim.Adam,
                "optim_args": {"lr": 0.02},
                "mode": mode,
                "patience": 1,
            }
        )
    quick(model, DSM, num_steps=60, optim=scheduler)
    optims = [scheduler] if kind == "torch" else scheduler.optim_objs.values()
    for each in optims:
        assert each.last_epoch == 6  # once a record
        assert each.optimizer.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("kind", ["torch", "pyro"])
def test_gradients_are_clipped(kind):
    """SGD of rate 1 moves by at most the norm in a step."""
    model = neural()
    before = torch.nn.utils.parameters_to_vector(model.parameters())
    moved = []

    def note(record):
        now = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        moved.append((now - before).norm().item())

    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optim = sgd if kind == "torch" else pyro.optim.SGD({"lr": 1.0})
    settings = {"num_steps": 1, "record_interval": 1, "callbacks": [note]}
    quick(model, optim=optim, max_grad_norm=1e-3, **settings)
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)


def test_signal_to_noise():
    """Gradients of known mean and spread: the norm of the mean is 2, the noise has
    variance 9, whether few or many; without the correction by w the first is 0.2 off.
    """
    parameter = torch.nn.Parameter(torch.zeros(9))
    for mean, wanted in ((2 / 3, 2 / 3), (0.0, 0.0)):
        found = []
        for count in (30, 300):
            for _ in range(20):
                noise = GradientNoise([parameter])
                for _ in range(count):
                    parameter.grad = mean + torch.randn(9)
                    noise.observe()
                found.append(noise.signal_to_noise())
        assert abs(sum(found) / len(found) - wanted) < (0.05 if mean else 0.2)
    assert GradientNoise([parameter]).signal_to_noise() is None


def test_timings_and_progress_bar(capfd):
    result = fit(neural(), DATA, ML, num_steps=20, record_interval=10)
    assert "energy gap" in capfd.readouterr().err
    timings = result.timings
    assert 0 < timings.seconds_per_step * 20 < timings.seconds
    assert timings.cpu_seconds > 0
