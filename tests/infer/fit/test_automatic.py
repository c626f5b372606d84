"""A fit that is told nothing but the model and the data."""

import importlib
import io
import math

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_ebm
from pyro_ebm import EnergyModel, bases, datasets, fit
from pyro_ebm.bases.rows import split
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy
from pyro_ebm.infer import log_likelihood
from pyro_ebm.infer.fit import automatic, settling
from pyro_ebm.infer.fit.diagnosis import (
    FitDiagnostics,
    judge,
)
from pyro_ebm.infer.fit.optimiser import GradientNoise
from pyro_ebm.infer.fit.points import Points
from pyro_ebm.partition import LogPartitionEstimate, quadrature

# The function of the same name hides the module.
fit_module = importlib.import_module("pyro_ebm.infer.fit.fit")


def rows(number):
    """A ring of radius 2, and the log-density of its points."""
    angle = 2 * math.pi * torch.rand(number)
    radius = 2 + 0.25 * torch.randn(number)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def density(x):
    radius = x.norm(dim=-1)
    law = dist.Normal(2.0, 0.25)
    return law.log_prob(radius) - (2 * math.pi * radius).log()


@pytest.fixture
def quick_bases(monkeypatch):
    """Only a normal distribution, so that something is left to learn."""
    monkeypatch.setattr(
        bases, "fit", lambda data, **settings: _only_normal(data, settings)
    )


def _only_normal(data, settings):
    base = bases.normal(data, support=settings["support"])
    apart = settings["held_out"]
    value = base.log_prob(apart if apart is not None else data).mean().item()
    return bases.FittedBase(base, "normal", value, 0.1, {"normal": value})


def learned(data=None, num_steps=800, **settings):
    model = EnergyModel(NeuralEnergy((2,), (32, 32)))
    data = rows(1500) if data is None else data
    return model, fit(model, data, num_steps=num_steps, progress_bar=False, **settings)


def test_it_corrects_the_base(quick_bases):
    """Towards the truth, with log Z right and the gain said with its error."""
    model, result = learned()
    test = rows(4000)
    truth = density(test).mean().item()
    found = log_likelihood(result.distribution, test)
    base = model.base.log_prob(test).mean().item()
    assert base < truth - 0.9
    assert found.value > truth - 0.25
    assert abs(result.log_partition.value - quadrature(model.energy).value) < 0.01
    assert result.status == "ok"
    assert abs(result.gain.value - (found.value - base)) < 5 * result.gain.std_error
    assert "over its base +" in str(result)
    assert "base: normal" in str(result)


def test_anomalies_are_calibrated(quick_bases):
    """P-values uniform on new points, small far away. Fault: ranks from below."""
    _, result = learned(rows(6000), num_steps=600)
    found = result.anomaly(rows(4000))
    for level in (0.05, 0.2, 0.5, 0.8):
        share = (found.p_value <= level).double().mean()
        assert abs(share - level) < 0.05
    new = -result.anomaly(rows(4000)).score
    alike = stats.ks_2samp(new.numpy(), result.held_out_log_prob.numpy())
    assert alike.pvalue > 0.01
    middle = result.anomaly(torch.zeros(1, 2))  # of the ring
    assert middle.p_value < 0.02
    assert torch.equal(middle.score, -result.distribution.log_prob(torch.zeros(1, 2)))
    array = torch.zeros(1, 2, dtype=torch.float64).numpy()  # as the data of the fit
    assert torch.equal(result.anomaly(array).score, middle.score)


def test_without_held_out_points_there_is_nothing_to_calibrate_by(quick_bases):
    _, result = learned(rows(12), num_steps=20)
    with pytest.raises(RuntimeError, match="no points were held out"):
        result.anomaly(rows(3))


def test_a_stream_is_learned_as_the_rows_are(quick_bases):
    """A DataLoader, with and without workers; both give the same parameters."""
    data, found = rows(3000), []
    for num_workers in (0, 2):
        torch.manual_seed(5)
        dataset = torch.utils.data.TensorDataset(data)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=128, shuffle=True, num_workers=num_workers
        )
        model, result = learned(loader, num_steps=300)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*found)
    assert result.gain.value > 0.02


@pytest.mark.parametrize("is_close", [False, True])
def test_a_network_over_a_normal_is_tried_where_rows_are_many(is_close):
    torch.manual_seed(0)
    x, model = datasets.eight_gaussians(6000), EnergyModel(NeuralEnergy((2,), (32,)))
    law = datasets.eight_gaussians_density() if is_close else bases.normal(x)
    found = bases.FittedBase(law, "committee", 0.0, 0.0, {"committee": 0.0})
    train, held_out = Points(x[:5000]), x[5000:]
    chosen = automatic._simpler(model, found, train, held_out, max_seconds=3.0)
    assert model.awaits_base
    if is_close:
        assert chosen is found
    else:
        assert chosen.kind == "normal"
        assert chosen.compared[automatic._ALONE] > chosen.log_likelihood + 0.5
    few = Points(x[:4000])
    assert automatic._simpler(model, found, few, held_out, max_seconds=3.0) is found


def test_it_starts_as_no_change_and_may_end_there(quick_bases):
    """Of a normal distribution nothing is left to correct."""
    model, result = learned(3 + 2 * torch.randn(400, 2), num_steps=300)
    assert result.history[0].step == 0
    assert abs(result.history[0].log_partition.value) < 1e-3
    assert -2 * result.gain.std_error <= result.gain.value < 0.1
    assert abs(model.energy.loc - 3).max() < 0.5  # standardised


def test_the_best_record_is_kept(quick_bases):
    """Fault: the last one, where learning went wrong in the end."""
    model = EnergyModel(NeuralEnergy((2,), (32, 32)))
    optim = torch.optim.SGD(model.parameters(), lr=0.0)
    steps = []

    def ruin(record):
        steps.append(record.step)
        if record.step == 200:
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter))

    result = fit(
        model,
        rows(400),
        num_steps=500,
        optim=optim,
        callbacks=[ruin],
        progress_bar=False,
    )
    assert steps[-1] > 200
    assert abs(result.gain.value) < 0.01


def test_chains_take_over_where_importance_fails(quick_bases, monkeypatch):
    monkeypatch.setattr(automatic.WeightedSteps, "keeps_up", lambda self: False)
    monkeypatch.setattr(automatic, "_CHAIN_STEPS", 60)
    monkeypatch.setattr(fit_module, "FEW_DIMENSIONS", 1)
    _, result = learned(num_steps=300, record_interval=50)
    names = [name for name, _ in result.stages]
    assert names == ["ImportanceSampledLikelihood", "MaximumLikelihood"]
    assert result.gain.value > -0.05  # the best record of all


def test_the_best_record_of_a_pool_is_settled_by_it_after_chains(
    quick_bases, monkeypatch
):
    """Fault: the proposal of the stage that came last."""

    def ruined(model, *rest):
        with torch.no_grad():
            for parameter in model.energy.parameters():
                parameter.add_(torch.randn_like(parameter))

    is_first = iter([True, True])
    keeps_up = lambda self: next(is_first, False)  # noqa: E731
    monkeypatch.setattr(automatic.WeightedSteps, "keeps_up", keeps_up)
    monkeypatch.setattr(automatic, "_CHAIN_STEPS", 20)
    monkeypatch.setattr(fit_module, "FEW_DIMENSIONS", 1)
    monkeypatch.setattr(fit_module, "begin_chains", ruined)
    _, result = learned(num_steps=200, record_interval=50)
    assert len(result.stages) == 2
    assert result.log_partition.method == "importance sampling"
    assert result.gain.value > -0.05


def test_a_model_that_came_out_worse_goes_back_to_its_start(quick_bases, monkeypatch):
    """Records may be wrong about log Z. Fault: the best of them is believed."""
    real = fit_module._Fit._go_back

    def spoiled(run, saved):
        real(run, saved)
        if saved is run.best:
            monkeypatch.undo()
            with torch.no_grad():
                for parameter in run.model.energy.parameters():
                    parameter.add_(0.5 * torch.randn_like(parameter))
                run.model.log_partition.followed.reset(run.model.energy)

    monkeypatch.setattr(fit_module._Fit, "_go_back", spoiled)
    model, result = learned(num_steps=300)
    assert abs(result.gain.value) < 1e-3
    assert abs(result.log_partition.value) < 0.01
    assert result.status == "ok"


def test_a_nearer_proposal_where_few_draws_count():
    """Fault: draws that stay those of a base that is far off."""
    base = dist.Normal(torch.full((2,), -2.0), 3.0).to_event(1)
    energy = NeuralEnergy(
        (2,), (16,), base=dist.Normal(torch.ones(2), 0.15).to_event(1)
    )
    model = EnergyModel(energy, base)
    optim = automatic.FitOptim(
        torch.optim.Adam(model.parameters()), model, None, GradientNoise([])
    )
    steps = automatic.WeightedSteps(model, optim, base, torch.ones(4, 2))
    before = steps.draws.effective_fraction(energy)
    assert before < automatic._LOW
    assert steps.keeps_up()
    assert steps.draws.effective_fraction(energy) > 10 * before
    assert abs(steps.draws.estimate(energy).value) < 0.05


def test_few_rows_say_less():
    """Of three a gain of 2.5 errors is chance. Fault: as of many."""
    run = fit_module._Fit.__new__(fit_module._Fit)
    run.weights, gains = None, torch.tensor([0.3, 1.0, 1.7])
    for number, is_chance in ((1, True), (30, False)):
        run.best_values = gains.repeat(number)
        run.start_values = torch.zeros_like(run.best_values)
        assert bool(run._is_chance()) is is_chance
    run.weights = (
        torch.tensor([1.0, 1.0, 1.0]).repeat(30).index_fill(0, torch.arange(3, 90), 0.0)
    )
    assert run._is_chance()  # rows without weight say nothing


def test_a_given_base_stays():
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    model = EnergyModel(NeuralEnergy((2,), (16,), base=base), base)
    result = fit(model, rows(400), num_steps=400, progress_bar=False)
    assert model.base is base
    assert result.base is None
    assert result.gain.value > 0.1


def test_an_energy_that_is_no_network(quick_bases):
    """Has the base as its reference, and stays what it is."""
    scale = torch.nn.Parameter(torch.tensor(2.0))

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return (x / self.scale).square().sum(-1) / 2

    model = EnergyModel(FunctionEnergy(Scaled(), (2,)))
    data = 1.5 * torch.randn(2000, 2)
    fit(model, data, num_steps=1500, progress_bar=False)
    assert abs(scale.item()) == pytest.approx(1.5, abs=0.1)


def test_the_base_is_saved_and_loaded(quick_bases):
    """Fault: a model that is loaded with a standard normal for its base."""
    model, result = learned(num_steps=50)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    fresh = EnergyModel(NeuralEnergy((2,), (32, 32)))
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    x = rows(50)
    assert torch.equal(fresh.base.log_prob(x), model.base.log_prob(x))
    assert torch.allclose(fresh().log_prob(x), result.distribution.log_prob(x))
    assert fresh.log_partition.averaged().value == pytest.approx(
        result.log_partition.value, abs=1e-5
    )


def test_a_fit_goes_on(quick_bases):
    model, first = learned(num_steps=200)
    second = fit(model, rows(1500), num_steps=400, progress_bar=False)
    assert second.validation.value > first.validation.value - 0.1
    assert second.base is None


def test_it_ends_in_time(quick_bases):
    _, result = learned(num_steps=10**7, max_seconds=2.0)
    assert result.stopped in ("out of time", "early stopping")
    assert result.num_steps < 10**6


class Slow(dist.MultivariateNormal):
    """A normal of which a thousand draws take a second by its clock."""

    drawn = 0.0

    def sample(self, sample_shape=()):
        Slow.drawn += torch.Size(sample_shape).numel()
        return super().sample(sample_shape)

    @property
    def seconds(self):
        return Slow.drawn / 1000


def test_log_z_at_the_end_is_in_time(monkeypatch):
    """Fault: five times the draws because those before have taken a few seconds."""
    base = Slow(torch.zeros(2), torch.eye(2))
    for module in (automatic, settling):
        monkeypatch.setattr(module, "Stopwatch", lambda: base)
    energy = NeuralEnergy((2,), (8,), base=base)
    for each, wanted in ((0.0, 50_000), (0.01, 24_000), (1.0, 10_000)):
        Slow.drawn = 0.0
        found = settling._by_proposal(energy, base, 1e-9, 240.0, each)
        assert wanted <= Slow.drawn < wanted + 1000
        assert found.is_reliable
    tried, model = [], EnergyModel(energy, base)
    monkeypatch.setattr(settling, "_ENOUGH", 1e-9)
    monkeypatch.setattr(settling, "_estimated", lambda *given: tried.append(given))
    Slow.drawn = 0.0
    assert settling.settled_log_partition(model, base, 40.0).is_reliable
    assert not tried
    settling.settled_log_partition(model, base)
    assert tried[0][-1] == 20.0


def test_time_is_kept_for_log_z():
    """As much as many draws take, up to a quarter. Fault: it comes on top."""
    watch = type("Watch", (), {"seconds": 30.0})()
    plan = automatic.Plan([], None, None, None, None, None, watch, 60.0)
    assert [plan.left(each) for each in (0.0, 5e-5, 1.0)] == [30.0, 25.0, 15.0]
    base = Slow(torch.zeros(2), torch.eye(2))
    model = EnergyModel(NeuralEnergy((2,), (8,), base=base), base)
    steps = automatic.WeightedSteps(model, None, base, torch.zeros(3, 2))
    assert 0 < steps.seconds_each < 1


def test_the_same_seed_gives_the_same_parameters(quick_bases):
    data, found = rows(300), []
    for _ in range(2):
        torch.manual_seed(3)
        model, _ = learned(data, num_steps=60)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_few_rows_are_not_held_out(quick_bases):
    _, result = learned(rows(12), num_steps=20)
    assert result.validation is None
    assert result.gain is None


def test_a_model_that_is_worse_than_its_base_is_not_ok():
    gain = pyro_ebm.infer.LogLikelihood(-0.5, 0.05, 0.05, 0.0, True)
    exact = LogPartitionEstimate(0.0, 0.0, 0.0, 0.0, 1e4, "exact", "closed form", 0)
    found = judge(FitDiagnostics(gain=gain), exact, "finished")
    assert [str(f.reason) for f in found] == ["worse than its base"]
    assert "or an energy that corrects it" in str(found[0])


class Round(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x.square().sum(-1) * self.log_scale.exp()


def test_an_energy_that_ends_below_its_base_gives_the_base(quick_bases):
    """Fault: the worse density."""
    model = EnergyModel(FunctionEnergy(Round(), (2,)))
    data = torch.randn(600, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]])
    result = fit(model, data, num_steps=200, progress_bar=False)
    base = result.base.distribution
    torch.testing.assert_close(result.distribution.log_prob(data), base.log_prob(data))
    assert result.verdict == "worse than its base"
    assert (result.gain.value, result.log_partition.value) == (0.0, 0.0)
    assert result.distribution.sample((5,)).shape == (5, 2)


def test_what_is_not_learned_is_found_once_at_a_row():
    """Faults: the density of the base in each record; that of other rows."""
    counts = []

    class Counted(dist.MultivariateNormal):
        def log_prob(self, value):
            counts.append(len(value))
            return super().log_prob(value)

    energy = NeuralEnergy((2,), (8,), base=Counted(torch.ones(2), 4 * torch.eye(2)))
    model = pyro_ebm.EnergyDistribution(energy, torch.tensor(0.7))
    run, several = fit_module._Fit.__new__(fit_module._Fit), (rows(30), rows(40))
    run.known = {}
    for _ in range(3):
        energy.network[0].weight.data.add_(1.0)
        for x in several:
            found = run._at(model, x)
            counts_before = len(counts)
            torch.testing.assert_close(found, model.log_prob(x).detach())
            del counts[counts_before:]
    assert counts == [30, 40]


def test_a_base_cannot_be_given_twice():
    model = EnergyModel(
        NeuralEnergy((2,)), dist.Normal(torch.zeros(2), 1.0).to_event(1)
    )
    with pytest.raises(RuntimeError, match="the model has a base"):
        model.use_base(bases.normal(rows(50)), rows(50))
    with pytest.raises(ValueError, match="base must be a Pyro distribution, or 'auto'"):
        EnergyModel(NeuralEnergy((2,)), "standard")


def test_the_base_is_fitted_once_more_to_all_rows(monkeypatch):
    """Rows held out are judged before that. Fault: by the fit that has seen them."""
    fitted = bases.fit
    monkeypatch.setattr(
        bases, "fit", lambda data, **settings: fitted(data, "normal", **settings)
    )
    monkeypatch.setattr(automatic, "_STEPS", 200)
    data = rows(60)
    model, result = learned(data, num_steps=None)
    train, held_out = split(data, seed=0)
    wanted = torch.stack([bases.normal(part).loc for part in (train, data)])
    found = result.base.distribution, model.base, result.distribution.energy.base
    for base in found:
        assert torch.equal(torch.stack([part.loc for part in base.parts]), wanted)
    log_z = quadrature(model.energy).value
    assert abs(result.log_partition.value - log_z) < 0.01
    assert abs(model.log_partition.value - log_z) < 0.01
    assert abs(result.held_out_log_prob.mean() - result.validation.value) < 1e-5
    now = result.distribution.log_prob(held_out)
    assert now.mean() > result.validation.value + 1e-3
    torch.testing.assert_close(model().log_prob(held_out), now)
    again = EnergyModel(NeuralEnergy((2,), (32, 32)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.base.parts[1].loc, wanted[1])


def test_a_base_that_is_not_corrected_is_not_exchanged():
    model = EnergyModel(NeuralEnergy((2,), (4,)))
    with pytest.raises(RuntimeError, match="must correct a base that pyro_ebm.fit"):
        model.exchange_base(bases.normal(rows(50)))
