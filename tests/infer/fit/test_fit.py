"""fit: what it returns, when it stops, and what it leaves as it was."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_ebm import EnergyModel, fit
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import (
    EnergyDifference,
    FitDiagnostics,
    LogLikelihood,
    MaximumLikelihood,
    log_likelihood,
)
from pyro_ebm.infer.fit import settling
from pyro_ebm.partition import LogPartition, LogPartitionEstimate, quadrature
from tests.infer.problems import base

QUICK = MaximumLikelihood(num_chains=32, num_steps=2)
DATA = torch.randn(200, 2, dtype=torch.float64, generator=torch.manual_seed(0)) + 0.5


def neural(**settings):
    energy = NeuralEnergy((2,), (8,), base=base())
    tracker = LogPartition(energy, base(), num_walkers=64, **settings)
    return EnergyModel(energy, base(), log_partition=tracker)


def quick(energy_model, data=DATA, **settings):
    settings = {"num_steps": 20, "record_interval": 10, **settings}
    return fit(energy_model, data, QUICK, progress_bar=False, **settings)


def states_equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name].nan_to_num(), second[name].nan_to_num())
        for name in first
    )


def test_result_and_history():
    energy_model = neural()
    result = quick(energy_model, num_steps=35, validation_data=DATA[:50])
    assert (result.num_steps, result.stopped) == (35, "finished")
    assert [record.step for record in result.history] == [10, 20, 30]
    for record in result.history:
        assert math.isfinite(record.loss)
        assert isinstance(record.train, LogLikelihood)
        assert isinstance(record.validation, LogLikelihood)
        assert record.log_partition.status == "ok"
        assert record.train.std_error > 0
    assert quick(neural()).history[0].validation is None


def test_long_lines_are_wrapped_and_no_number_loses_its_name():
    """Seen to fail where a line may be broken at any space."""
    gap = EnergyDifference(0.12, 0.04, 0.2)
    result = quick(neural())._replace(
        diagnostics=FitDiagnostics(gap, gap, 1.0, 50.0, 10, 0.5, 2.0, 3.0, 0.1, 9.0),
        stages=(("MaximumLikelihood with penalty 0.1", 20),) * 3,
        reasons=(Finding(Reason.STILL_LEARNING, "a sentence that goes on, " * 5),),
    )
    text = str(result)
    assert max(map(len, text.splitlines())) <= 88
    assert "drift of the chains 0.120 +- 0.040, R-hat 1.000,\n    acc" in text
    assert "gradient signal to noise 0.1, effective noise points a step 9" in text
    assert all(line.startswith("  ") for line in text.splitlines()[1:])


def test_what_it_returns_is_the_average_with_its_log_partition():
    energy_model = neural()
    result = quick(energy_model)
    q, x = result.distribution, torch.randn(5, 2)
    assert q.is_normalized
    assert result.log_partition.lower <= quadrature(q.energy).value
    assert quadrature(q.energy).value <= result.log_partition.upper
    torch.testing.assert_close(q.log_partition.item(), result.log_partition.value)
    # Model and average are one.
    torch.testing.assert_close(energy_model.energy(x), q.energy(x))
    torch.testing.assert_close(energy_model().log_prob(x), q.log_prob(x))
    torch.testing.assert_close(q.log_prob(x), -q.energy(x) - q.log_partition)


def test_the_final_log_partition_is_an_estimate_of_its_own():
    """Not that of the walkers, which take it over; that of the records stays theirs."""
    energy_model = neural()
    result = quick(energy_model)
    tracker = energy_model.log_partition
    assert result.log_partition.method == "quadrature"
    assert result.history[-1].log_partition.method == "walkers"
    assert result.log_partition.value == pytest.approx(tracker.averaged().value)
    assert tracker.averaged().std_error == pytest.approx(0.0, abs=1e-6)
    again = quick(energy_model)  # and follow from there
    found = again.history[0].log_partition
    assert found.status == "ok"
    assert found.std_error < 0.02


def final_log_partition(monkeypatch, found):
    """Of a fit in which ``partition.estimate`` finds this."""
    monkeypatch.setattr(settling, "estimate", lambda *_, **__: found)
    energy_model = neural()
    return energy_model, quick(energy_model)


def test_without_a_reliable_estimate_it_is_that_of_the_walkers(monkeypatch):
    why = (Finding(Reason.FEW_EFFECTIVE, "too few"),)
    bad = LogPartitionEstimate(
        9.0, 1.0, 8.0, 10.0, 3.0, Status.UNRELIABLE, "SMC", 10, why
    )
    energy_model, result = final_log_partition(monkeypatch, bad)
    assert result.log_partition.method == "walkers"
    assert result.log_partition.status == "ok"
    assert result.distribution.is_normalized


def test_walkers_that_have_found_more_than_the_estimate_speak_against_it(monkeypatch):
    """An estimate that lacks a mode says ok, and is too low."""
    low = LogPartitionEstimate(-2.0, 0.01, -2.02, -1.98, 1e4, Status.OK, "IS", 10)
    energy_model, result = final_log_partition(monkeypatch, low)
    assert [f.reason for f in result.log_partition.reasons] == [Reason.ROUTES_DISAGREE]
    assert result.log_partition.status == "unreliable"
    assert not result.distribution.is_normalized
    assert energy_model.log_partition.status == "ok"  # it was not told


def test_it_learns():
    energy_model = neural()
    before = log_likelihood(energy_model.forward(), DATA).value
    settings = {"optim": pyro.optim.Adam({"lr": 0.02}), "record_interval": 100}
    result = quick(energy_model, num_steps=300, **settings)
    gaussian = dist.MultivariateNormal(DATA.mean(0), torch.cov(DATA.mT))
    best = gaussian.log_prob(DATA).mean().item()
    before -= quadrature(neural().energy).value
    values = [record.train.value for record in result.history]
    assert before < best - 0.2
    assert abs(values[-1] - best) < 0.1
    assert values[-1] > values[0]


def test_a_closed_form_is_fitted_too():
    """Nothing is sampled for log Z: averaged() raised here once."""
    energy_model = EnergyModel(QuadraticEnergy(torch.zeros(2)), base())
    result = quick(energy_model)
    assert result.log_partition.status == "exact"
    assert result.distribution.is_normalized
    assert len(result.history) == 2
    assert (energy_model.energy.loc > 0).all()


@pytest.mark.parametrize(
    "optim",
    [
        lambda m: None,
        lambda m: pyro.optim.Adam({"lr": 0.01}),
        lambda m: pyro.optim.ClippedAdam({"lr": 0.01}),
        lambda m: pyro.optim.SGD({"lr": 0.01}),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
        lambda m: torch.optim.RMSprop(m.energy.parameters(), lr=0.01),
    ],
)
def test_any_optimiser(optim):
    """Pyro's ClippedAdam writes to ``.data``: a log Z that followed the version counter
    of the parameters stayed where it was, and so did the average that is returned."""
    energy_model = neural()
    before = energy_model.energy.network[0].weight.detach().clone()
    assert quick(energy_model, optim=optim(energy_model)).stopped == "finished"
    assert not torch.equal(before, energy_model.energy.network[0].weight)


def test_two_fits_in_one_process():
    first, second = neural(), neural()
    one = quick(first)
    kept = one.distribution.log_prob(DATA[:5])
    state = copy.deepcopy(first.state_dict())
    quick(second)
    assert states_equal(state, first.state_dict())
    quick(first)  # goes on from where it was
    assert not states_equal(state, first.state_dict())
    # The first result does not change with it; it did once.
    assert torch.equal(one.distribution.log_prob(DATA[:5]), kept)
    assert one.history is not None


def test_the_same_seed_gives_the_same_fit():
    results = []
    for _seed in range(2):
        pyro.set_rng_seed(3)
        results.append(quick(neural()))
    assert results[0].history == results[1].history


def test_going_on_from_a_state_dict():
    first = neural()
    quick(first)
    second = neural()
    second.load_state_dict(first.state_dict())
    results = []
    for energy_model in (first, second):
        pyro.set_rng_seed(4)
        results.append(quick(energy_model, num_steps=12))
    assert results[0].history == results[1].history
    assert states_equal(first.state_dict(), second.state_dict())


def test_the_parameter_store_is_left_as_it_was():
    mine = pyro.param("mine", torch.tensor(3.0), constraint=constraints.positive)
    quick(neural())
    assert [*pyro.get_param_store().keys()] == ["mine"]
    assert torch.equal(pyro.param("mine"), mine)


def test_no_progress_bar_prints_nothing(capfd):
    quick(neural())
    assert capfd.readouterr() == ("", "")


def test_progress_bar_shows_what_matters(capfd):
    fit(neural(), DATA, QUICK, num_steps=20, record_interval=10)
    printed = capfd.readouterr().err
    for wanted in ("20/20", "log-likelihood", "log Z", "acceptance"):
        assert wanted in printed


def test_the_distribution_pickles():
    q = quick(neural()).distribution
    again = pickle.loads(pickle.dumps(q))
    assert torch.equal(again.log_prob(DATA[:5]), q.log_prob(DATA[:5]))


# Stopping ----------------------------------------------------------------------------


def test_early_stopping_goes_back_to_the_best():
    """A learning rate at which the fit gets worse: the best record is returned."""
    pyro.set_rng_seed(2)
    energy_model = neural()
    data = DATA[:20]
    result = quick(
        energy_model,
        data,
        validation_data=DATA[100:],
        num_steps=2000,
        record_interval=20,
        patience=3,
        optim=pyro.optim.Adam({"lr": 0.03}),
    )
    assert result.stopped == "early stopping"
    values = [record.validation.value for record in result.history]
    best = values.index(max(values))
    assert len(values) == best + 4
    assert result.num_steps == 20 * len(values)
    final = log_likelihood(result.distribution, DATA[100:])
    assert abs(final.value - max(values)) < 0.05
    assert final.value > values[-1]


class Bomb(nn.Module):
    """Fine until its weight has moved by a little, then nan, or an exception."""

    def __init__(self, what):
        super().__init__()
        self.weight, self.what = nn.Parameter(torch.tensor(0.0)), what
        self.armed = False

    def forward(self, x):
        value = (x - self.weight).square().sum(-1)
        if self.armed and x.requires_grad is False and len(x) == 200:
            if self.what == "interrupt":
                raise KeyboardInterrupt
            value = value * math.nan
        return value


def explode(what, at_step, **settings):
    bomb = Bomb(what)
    energy_model = EnergyModel(FunctionEnergy(bomb, (2,)), base())
    states = {}

    class Watched(torch.optim.SGD):
        num = 0

        def step(self, closure=None):
            super().step(closure)
            self.num += 1
            states[self.num] = bomb.weight.item()
            bomb.armed = self.num == at_step

    optim = Watched(energy_model.parameters(), lr=0.01)
    settings = {"batch_size": 200, "record_interval": 5, **settings}
    return energy_model, lambda: quick(energy_model, optim=optim, **settings)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize(("at_step", "last_record"), [(12, 10), (3, 0)])
def test_a_loss_that_is_not_finite_ends_with_the_last_good_state(at_step, last_record):
    energy_model, run = explode("nan", at_step)
    result = run()
    assert result.stopped == "loss not finite"
    assert len(result.history) == last_record / 5
    assert result.distribution.log_prob(DATA).isfinite().all()
    assert all(p.isfinite().all() for p in energy_model.parameters())
    assert math.isfinite(result.log_partition.value)
    if not last_record:
        assert energy_model.energy.fn.weight == 0


def test_interrupting_ends_the_fit_in_good_order():
    energy_model, run = explode("interrupt", 7)
    result = run()
    assert (result.stopped, result.num_steps) == ("interrupted", 7)
    assert result.distribution.is_normalized


def test_divergence_is_an_error_and_the_model_goes_back():
    energy_model = neural()
    before = copy.deepcopy(energy_model.state_dict())
    optim = torch.optim.SGD(energy_model.parameters(), lr=math.inf)
    with pytest.raises(DivergenceError, match="finite"):
        quick(energy_model, optim=optim)
    assert states_equal(before, energy_model.state_dict())


# Bad input ---------------------------------------------------------------------------


def with_hole():
    data = DATA.clone()
    data[3, 1] = math.nan
    return data


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DATA[:, :1], ValueError, r"data must have shape \(N, \*event\).*\(200, 1\)"),
        (DATA[0], ValueError, r"data must have shape .*got \(2,\)"),
        (DATA[None], ValueError, r"data must have shape .*got \(1, 200, 2\)"),
        (DATA[:1], ValueError, "at least two points.*got 1"),
        (with_hole(), ValueError, "200 points with 1 nan or infinite.*Drop"),
        ("no rows", TypeError, "data must be a tensor, an array .* got str"),
        ([["a", 1.0]], TypeError, "data must be a tensor, an array .* got list"),
    ],
)
def test_wrong_data(data, error, message):
    with pytest.raises(error, match=message):
        quick(neural(), data)
    with pytest.raises(error, match="validation_data"):
        quick(neural(), validation_data=data)


def test_data_outside_the_support():
    support = constraints.independent(constraints.positive, 1)
    energy_model = EnergyModel(FunctionEnergy(lambda x: x.sum(-1), (2,), support))
    with pytest.raises(
        ValueError, match=r"data must lie in the support.*of 200 points"
    ):
        quick(energy_model)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"patience": 3}, ValueError, "patience is 3 but validation_data is None"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"record_interval": 0}, ValueError, "record_interval must be at least 1"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"optim": "adam"}, TypeError, "optim must be a pyro.optim or torch.optim"),
        (
            {"optim": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)},
            ValueError,
            r"optim must hold parameters of energy_model.*holds none.*Build it",
        ),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        quick(neural(), **settings)


def test_wrong_types():
    with pytest.raises(
        TypeError, match=r"must be an EnergyModel, got NeuralEnergy.*Wrap"
    ):
        quick(neural().energy)
    with pytest.raises(TypeError, match="objective must be an Objective .*got 'ml'"):
        fit(neural(), DATA, "ml")


def test_an_energy_without_parameters():
    energy_model = EnergyModel(FunctionEnergy(lambda x: x.square().sum(-1), (2,)))
    with pytest.raises(ValueError, match="energy_model has no parameters to fit"):
        quick(energy_model)


# The held-out likelihood -------------------------------------------------------------


def test_log_likelihood_has_both_errors():
    energy = QuadraticEnergy(torch.zeros(2))
    q = EnergyModel(energy)()
    q.log_partition_std_error = 0.3
    value = log_likelihood(q, DATA)
    log_prob = q.log_prob(DATA)
    assert value.value == pytest.approx(log_prob.mean().item())
    assert value.std_error_data == pytest.approx(log_prob.std().item() / 200**0.5)
    assert value.std_error_log_partition == 0.3
    assert value.std_error == pytest.approx(math.hypot(value.std_error_data, 0.3))
    assert "unknown" not in str(value)
    with pytest.raises(ValueError, match=r"at least two points.*got shape \(1, 2\)"):
        log_likelihood(q, DATA[:1])
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        log_likelihood(q, DATA[0])


def test_log_likelihood_says_where_log_partition_is_unknown():
    q = neural()()
    assert "[log Z unknown or unreliable]" in str(log_likelihood(q, DATA))
