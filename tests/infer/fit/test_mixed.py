"""A table with real and categorical columns: fit, log Z, draws and conditionals.

The law of the table is known: a label, a coin by it, and three real columns by both, of
which one bends with another, as no class does.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_ebm
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy
from pyro_ebm.infer import MaximumLikelihood, NoiseContrastive

C = dist.constraints
SUPPORT = C.cat(
    [C.real, C.integer_interval(0, 2), C.boolean], dim=-1, lengths=[3, 1, 1]
)
SHARES = torch.tensor([0.5, 0.3, 0.2])
ODDS = torch.tensor([0.2, 0.5, 0.8])
MEANS = torch.tensor([0.0, 1.5, -1.5])


def table(number):
    label = torch.multinomial(SHARES, number, replacement=True)
    coin = torch.bernoulli(ODDS[label])
    x = MEANS[label] + torch.randn(number)
    y = 1.5 * x.sin() * (2 * coin - 1) + torch.randn(number)
    z = y / 2 - label + torch.randn(number)
    return torch.stack([x, y, z, label.float(), coin], 1)


def log_law(t):
    """Log density of the table's law."""
    x, y, z, label, coin = t.unbind(-1)
    which = label.long()
    return (
        dist.Normal(MEANS[which], 1.0).log_prob(x)
        + dist.Normal(1.5 * x.sin() * (2 * coin - 1), 1.0).log_prob(y)
        + dist.Normal(y / 2 - label, 1.0).log_prob(z)
        + SHARES.log()[which]
        + dist.Bernoulli(ODDS[which]).log_prob(coin)
    )


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def known():
    """The law as an energy with a constant too much, and a base that was fitted."""
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(0)
    energy = FunctionEnergy(lambda x: 1.3 - log_law(x), (5,), SUPPORT)
    base = pyro_ebm.bases.latent_classes(table(2000), 6, support=energy.support)
    return pyro_ebm.EnergyModel(energy, base)


def fitted(number, **settings):
    model = pyro_ebm.EnergyModel(NeuralEnergy((5,), (32, 32), support=SUPPORT))
    return model, pyro_ebm.fit(model, table(number), progress_bar=False, **settings)


def test_a_fit_on_auto_takes_a_mixed_table():
    model, result = fitted(500, num_steps=60)
    assert result.base.kind == "latent_classes"
    assert result.log_partition.is_reliable
    fresh, q = table(5000), model()
    with torch.no_grad():
        own = q.log_prob(fresh).mean()
    assert abs(own - log_law(fresh).mean()) < 0.25
    assert abs(own - result.validation.value) < 5 * result.validation.std_error
    draws = q.sample((400,))
    assert q.support.check(draws).all()
    again = pyro_ebm.EnergyModel(NeuralEnergy((5,), (32, 32), support=SUPPORT))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(again.eval()().log_prob(fresh), q.log_prob(fresh))


def test_gaps_of_a_table_are_filled_by_the_model():
    data = table(400)
    missing = torch.rand(data.shape) < 0.15
    missing[missing.all(1)] = False
    holes = data.masked_fill(missing, torch.nan)
    model = pyro_ebm.EnergyModel(NeuralEnergy((5,), (16,), support=SUPPORT))
    result = pyro_ebm.fit(model, holes, num_steps=30, progress_bar=False)
    fresh = table(3000)
    with torch.no_grad():
        assert log_law(fresh).mean() - model().log_prob(fresh).mean() < 0.4
    row = fresh[:1].clone()
    row[0, 4] = torch.nan
    found = result.impute(row, num_samples=500)
    both = fresh[:1].repeat(2, 1)
    both[:, 4] = torch.arange(2.0)
    odds = model().log_prob(both).softmax(0)[1].item()
    assert model().support.check(found.draws).all()
    assert abs(found.mean[0, 4] - odds) < 0.15
    assert abs(found.draws[:, 0, 4].mean() - found.mean[0, 4]) < 0.1


@pytest.mark.slow
def test_the_fit_comes_near_the_law():
    """Within .02 nats of the truth; with labels of other rows it is far off."""
    model, result = fitted(20_000, max_seconds=30)
    fresh = table(50_000)
    with torch.no_grad():
        gap = (log_law(fresh) - model().log_prob(fresh)).mean()
    assert gap < 0.02
    assert result.log_partition.is_reliable
    fresh[:, 3] = fresh[torch.randperm(len(fresh)), 3]
    with torch.no_grad():
        assert model().log_prob(fresh).mean() < log_law(table(50_000)).mean() - 0.3


def test_log_z_is_found(known):
    found = pyro_ebm.partition.estimate(known, progress_bar=False)
    assert found.status == "ok"
    assert abs(found.value + 1.3) < 4 * found.std_error + 0.01
    budget = pyro_ebm.partition.estimate(known, budget=2000, progress_bar=False)
    assert budget.num_evaluations <= 2000
    with pytest.raises(ValueError, match="sum over states"):
        pyro_ebm.partition.estimate(known, method="exact")


@pytest.mark.slow
def test_log_z_is_found_without_a_base(known):
    """Chains that begin at a standard one find the way."""
    alone = pyro_ebm.partition.estimate(known.energy, progress_bar=False)
    assert alone.status == "ok"
    assert abs(alone.value + 1.3) < 4 * alone.std_error + 0.01


def test_categories_given_real_columns_are_exact(known):
    """By chi-square against Bayes' rule; the marginal shares are refused."""
    row = table(1)[0]
    given = known().condition(list(enumerate(row[:3].tolist())))
    states = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0))
    joint = log_law(torch.cat([row[:3].expand(6, 3), states], 1))
    assert torch.allclose(given.log_prob(states), joint - joint.logsumexp(0), atol=1e-4)
    assert given.log_partition.item() == pytest.approx(
        joint.logsumexp(0).item() - 1.3, abs=1e-4
    )
    x = given.sample((4000,))
    counts = torch.stack([(x == state).all(1).sum() for state in states]).double()
    kept = joint.softmax(0) * 4000 > 5
    wanted = (joint.softmax(0) * 4000).double()[kept]
    found = counts[kept] * (wanted.sum() / counts[kept].sum())
    assert stats.chisquare(found, wanted).pvalue > 1e-3
    both = torch.stack([1 - ODDS, ODDS], 1) * SHARES[:, None]
    wrong = both.flatten().double()[kept]
    wrong = wrong * (found.sum() / wrong.sum())
    assert stats.chisquare(found, wrong).pvalue < 1e-6


def test_real_columns_given_categories_are_those_of_the_law(known):
    """By Kolmogorov-Smirnov; given the other coin they are refused."""
    given = known().condition([(3, 1), (4, 0)])
    x = given.sample((2000,))
    assert given.sampling_diagnostics().status == "ok"
    part = table(60_000)
    there = part[(part[:, 3] == 1) & (part[:, 4] == 0), :3]
    other = part[(part[:, 3] == 1) & (part[:, 4] == 1), :3]
    for column in range(3):
        assert stats.ks_2samp(x[:, column], there[:, column]).pvalue > 1e-3
    assert stats.ks_2samp(x[:, 1], other[:, 1]).pvalue < 1e-6
    found = pyro_ebm.partition.estimate(
        given, method="importance", budget=4000, progress_bar=False
    )
    wanted = (SHARES[1] * (1 - ODDS[1])).log().item() - 1.3
    assert abs(found.value - wanted) < 4 * found.std_error + 0.01


def test_the_tracker_finds_log_z_by_importance(known):
    tracker = pyro_ebm.partition.LogPartition(known.energy, known.base)
    tracker.refresh(known.energy, progress_bar=False)
    assert abs(tracker.value + 1.3) < 4 * tracker.std_error + 0.02
    assert tracker.status == "ok"


def test_it_is_learned_at_a_pyro_site():
    """By plain SVI: the mean of a column moves to that of the data."""
    data = table(300)
    shift = torch.nn.Parameter(torch.tensor(3.0))

    class Shifted(pyro_ebm.Energy):
        def __init__(self):
            super().__init__((5,), SUPPORT)
            self.shift = shift

        def forward(self, x):
            moved = torch.cat([x[..., :1] - self.shift, x[..., 1:]], -1)
            return moved[..., :3].square().sum(-1) / 2

    energy = Shifted()
    base = pyro_ebm.bases.latent_classes(data, 2, support=energy.support)
    model = pyro_ebm.EnergyModel(energy, base, source="importance")

    def program(rows):
        pyro.module("model", model)
        with pyro.plate("rows", len(rows)):
            pyro.sample("x", model(), obs=rows)

    optim = pyro.optim.Adam({"lr": 0.1})
    svi = pyro.infer.SVI(program, lambda rows: None, optim, pyro.infer.Trace_ELBO())
    for _ in range(80):
        svi.step(data)
    assert abs(shift - data[:, 0].mean()) < 0.15


def test_a_part_of_both_kinds_may_be_given(known):
    given = known().condition([(0, 0.5), (3, 2)])
    x = given.sample((2000,))
    assert x.shape == (2000, 3)
    t = given.expand_event(x)
    assert (t[:, 0] == 0.5).all()
    # The coin's odds of .8, by the law: nothing else is known of it.
    assert abs(t[:, 4].mean() - 0.8) < 4 * 0.4 / 2000**0.5


@pytest.mark.parametrize("objective", [MaximumLikelihood(32, num_steps=1), "noise"])
def test_estimators_of_other_kinds_learn_too(objective):
    data = table(300)
    base = pyro_ebm.bases.latent_classes(
        data, 1, support=FunctionEnergy(log_law, (5,), SUPPORT).support
    )
    if objective == "noise":
        objective = NoiseContrastive(base)
    energy = NeuralEnergy((5,), (8,), support=SUPPORT, base=base)
    model = pyro_ebm.EnergyModel(energy, base)
    result = pyro_ebm.fit(
        model,
        data,
        objective,
        num_steps=60,
        optim=torch.optim.Adam(model.parameters(), 0.03),
        progress_bar=False,
    )
    with torch.no_grad():
        assert model().log_prob(data).mean() > base.log_prob(data).mean() + 0.05
    assert result.log_partition.is_reliable


@pytest.mark.parametrize(("column", "value"), [(3, 0.5), (3, 3.0), (4, -1.0)])
def test_rows_outside_the_support_are_refused(column, value):
    data = table(100)
    data[7, column] = value
    model = pyro_ebm.EnergyModel(NeuralEnergy((5,), (8,), support=SUPPORT))
    with pytest.raises(ValueError, match="must lie in the support"):
        pyro_ebm.fit(model, data, progress_bar=False)
    with pytest.raises(ValueError, match="must lie in the support"):
        model().log_prob(data)
    with pytest.raises(ValueError, match="lie in the support"):
        model().condition([(column, value)])
    data[7, column] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        pyro_ebm.fit(model, data, progress_bar=False)


def test_a_start_without_log_z_is_compared_with_none():
    """Fault: the first record that has one compared with numbers that are not there."""

    class Ridge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return 50 * (x[..., 0] - x[..., 1] - self.loc).square()

    support = C.cat([C.real, C.boolean], dim=-1, lengths=[1, 1])
    pyro.set_rng_seed(0)
    bit = torch.bernoulli(torch.full((300,), 0.5))
    data = torch.stack([0.1 * torch.randn(300) + bit, bit], 1)
    ridge = Ridge()
    model = pyro_ebm.EnergyModel(FunctionEnergy(ridge, (2,), support))
    result = pyro_ebm.fit(model, data, num_steps=300, progress_bar=False)
    known = [record.validation.is_normalized for record in result.history]
    assert known[-1] > known[0]
    assert ridge.loc < 0.4
