"""Latent classes: normalised, their conditionals, and how near they come to a law."""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_ebm import bases
from pyro_ebm.bases.mixed import LatentClasses, _Table
from pyro_ebm.bases.saving import from_state, to_state
from pyro_ebm.core.spaces import MixedSupport

C = dist.constraints
SUPPORT = MixedSupport([C.real, C.integer_interval(0, 2), C.positive, C.boolean])
SHARES = torch.tensor([0.5, 0.3, 0.2])
MEANS = torch.tensor([[0.0, 0.0], [3.0, -1.0], [-2.0, 1.0]])


def table(number):
    """Rows of a label, a coin by it, and two columns by both; the law is known."""
    label = torch.multinomial(SHARES, number, replacement=True)
    coin = torch.bernoulli((label + 1) / 4)
    u = MEANS[label] + torch.randn(number, 2) * 0.7 + coin[:, None]
    return torch.stack([u[:, 0], label.to(u), u[:, 1].exp(), coin], 1)


def truth(x):
    label, coin, y = x[:, 1].long(), x[:, 3], x[:, 2].log()
    u = torch.stack([x[:, 0], y], 1)
    normal = dist.Normal(MEANS[label] + coin[:, None], 0.7).to_event(1)
    coins = dist.Bernoulli((label + 1) / 4).log_prob(coin)
    return normal.log_prob(u) - y + SHARES[label].log() + coins


def some_classes():
    tables = torch.randn(3, 2, 3)
    tables[:, 1, 2] = -torch.inf
    factor = torch.eye(2) + 0.3 * torch.ones(2, 2).tril(-1)
    shares = torch.tensor([0.2, 0.5, 0.3])
    return LatentClasses(
        SUPPORT, shares, torch.randn(3, 2), factor.repeat(3, 1, 1), tables
    )


def test_the_density_integrates_to_one():
    base = some_classes()
    x, y = torch.meshgrid(
        torch.linspace(-9, 9, 181), torch.linspace(-9, 9, 181), indexing="ij"
    )
    total = 0.0
    for label in range(3):
        for coin in range(2):
            rest = [torch.full_like(x, v) for v in (label, coin)]
            rows = torch.stack([x, rest[0], y.exp(), rest[1]], -1)
            total += (base.log_prob(rows) + y).exp().sum() * 0.1**2
    assert abs(total - 1) < 1e-6
    outside = torch.tensor(
        [[0.0, 0.5, 1.0, 1.0], [0.0, 3.0, 1.0, 1.0], [0.0, 1.0, -1.0, 1.0]]
    )
    assert (base.log_prob(outside) == -torch.inf).all()


def test_draws_are_those_of_the_density():
    """Tables that are not used, or used of another class, fail the chi-square."""
    base = some_classes()
    x = base.sample((20_000,))
    assert SUPPORT.check(x).all()
    probs = torch.einsum("k,ka,kb->ab", base.probs, *base.log_tables.exp().unbind(1))
    counts = torch.zeros(3, 2)
    counts.index_put_(
        (x[:, 1].long(), x[:, 3].long()), torch.ones(len(x)), accumulate=True
    )
    expected = probs[:, :2] * len(x)
    assert stats.chisquare(counts.flatten(), expected.flatten()).pvalue > 1e-3
    wrong = torch.outer(counts.sum(1), counts.sum(0)) / len(x)  # as if independent
    assert stats.chisquare(counts.flatten(), wrong.flatten()).pvalue < 1e-3
    mixture = [dist.Normal(m, 1.0) for m in base.loc[:, 0]]
    u = sum(p * n.cdf(x[:, 0]) for p, n in zip(base.probs, mixture, strict=True))
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("fixed", [[1], [0], [0, 1], [2, 3], [1, 3], [3, 1]])
def test_a_conditional_is_the_ratio_of_joint_and_marginal(fixed):
    base = some_classes()
    row = torch.tensor([0.4, 2.0, 1.7, 1.0])
    free = [n for n in range(4) if n not in fixed]
    given = base.given(torch.tensor(fixed), row[fixed])
    z = given.sample((50,))
    x = row.repeat(50, 1)
    x[:, free] = z
    ratio = base.log_prob(x) - given.log_prob(z)
    assert torch.allclose(ratio, ratio[0].expand(50))
    other = base.given(torch.tensor(fixed), base.sample()[fixed])
    assert not torch.allclose(other.log_prob(z), given.log_prob(z))
    assert base.given(torch.tensor([0, 2]), row[[0, 2]]) is None


def test_missing_entries_are_drawn_from_the_conditional():
    """Against :meth:`given`, row by row; draws of the marginal are refused."""
    base = some_classes()
    rows = base.sample((3,))
    missing = torch.zeros(3, 4, dtype=torch.bool)
    missing[0, [1, 2]] = missing[1, 3] = missing[2, 0] = True
    x = rows.masked_fill(missing, torch.nan)
    draws = base.filled(x, missing, 4000)
    assert torch.equal(draws[:, ~missing], rows[~missing].expand(4000, -1))
    other = base.given(torch.tensor([0, 3]), rows[0, [0, 3]]).sample((4000,))
    assert stats.ks_2samp(draws[:, 0, 2], other[:, 1]).pvalue > 1e-3
    counts = torch.stack(
        [
            draws[:, 0, 1].long().bincount(minlength=3),
            other[:, 0].long().bincount(minlength=3),
        ]
    )
    assert stats.chi2_contingency(counts + 1).pvalue > 1e-3
    coins = rows[1].repeat(2, 1)
    coins[:, 3] = torch.arange(2.0)
    odds = base.log_prob(coins).softmax(0)[1]
    assert abs(draws[:, 1, 3].mean() - odds) < 4 * (odds * (1 - odds) / 4000).sqrt()
    alone = base.sample((4000,))[:, 2]
    assert stats.ks_2samp(draws[:, 0, 2], alone).pvalue < 1e-6


def test_a_table_with_gaps_is_fitted_as_well():
    """Near the law; gaps filled from other rows are far from it."""
    data, fresh = table(1500), table(20_000)
    missing = torch.rand(data.shape) < 0.25
    missing[:, 0] &= data[:, 3] == 1  # at random, given what is seen
    missing[:, 3] = False
    holes = data.masked_fill(missing, torch.nan)
    truth_of = truth(fresh).mean()
    found = bases.latent_classes(holes, 6, support=SUPPORT)
    gap = truth_of - found.log_prob(fresh).mean()
    assert gap < 0.1
    shuffled = data[torch.randperm(len(data))]
    filled = holes.where(~missing, shuffled)
    other = bases.latent_classes(filled, 6, support=SUPPORT)
    assert truth_of - other.log_prob(fresh).mean() > gap + 0.15
    holes[:, 1] = torch.nan
    with pytest.raises(ValueError, match="no entry at all"):
        bases.latent_classes(holes, support=SUPPORT)


def test_a_fit_comes_near_the_law():
    data, fresh = table(4000), table(20_000)
    base = bases.latent_classes(data, 6, support=SUPPORT)
    gap = (truth(fresh) - base.log_prob(fresh)).mean()
    assert gap < 0.02
    broken = data.clone()
    broken[:, 1] = broken[torch.randperm(len(data)), 1]  # the label of another row
    other = bases.latent_classes(broken, 6, support=SUPPORT)
    assert (truth(fresh) - other.log_prob(fresh)).mean() > 0.2


def test_the_number_of_classes_is_found():
    found = bases.fit(table(600), support=SUPPORT)
    assert found.kind == "latent_classes"
    fresh = table(5000)
    assert (truth(fresh) - found.distribution.log_prob(fresh)).mean() < 0.12
    assert abs(found.log_likelihood - truth(fresh).mean()) < 5 * found.std_error + 0.1
    one = bases.latent_classes(table(600), 1, support=SUPPORT)
    assert (found.distribution.log_prob(fresh) - one.log_prob(fresh)).mean() > 0.3


def test_no_step_makes_the_fit_worse():
    steps = _Table(table(500), SUPPORT, None)
    r, values = steps._first(4, 0, 1.0), []
    for _ in range(15):
        at_classes = steps._at_classes(*steps._step(r))
        total = at_classes.logsumexp(1, keepdim=True)
        values.append(total.mean().item())
        r = (at_classes - total).exp()
    # But for the pseudo-rows, which cost less than this.
    assert (torch.tensor(values).diff() > -1e-3).all()
    assert values[-1] > values[0] + 0.01


def test_a_weight_of_two_is_a_row_twice():
    data = table(200)
    weights = torch.ones(200)
    weights[:50] = 2
    one = bases.latent_classes(data, 1, support=SUPPORT, weights=weights)
    two = bases.latent_classes(torch.cat([data, data[:50]]), 1, support=SUPPORT)
    assert torch.allclose(one.loc, two.loc)
    assert torch.allclose(one.log_tables, two.log_tables)


def test_it_is_saved_and_loaded():
    base, x = some_classes(), table(20)
    again = from_state(to_state(base), SUPPORT)
    assert torch.equal(again.log_prob(x), base.log_prob(x))
    with pytest.raises(ValueError, match="mixed one"):
        from_state(to_state(base), None)


def test_the_standard_base_is_normal_and_uniform():
    base = LatentClasses.standard(SUPPORT, torch.empty(0))
    x = torch.tensor([0.0, 2.0, 1.0, 0.0])
    assert math.isclose(base.log_prob(x), -math.log(6) - math.log(2 * math.pi))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x + 0.5, "must lie in the support"),
        (lambda x: x.where(x != 2, 7.0), "must lie in the support"),
        (lambda x: x[:1], "N >= 2"),
        (lambda x: torch.where(x == x[0, 0], torch.inf, x), "finite"),
    ],
)
def test_bad_rows_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        bases.latent_classes(change(table(50)), support=SUPPORT)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="real and categorical"):
        bases.latent_classes(table(50), support=C.real_vector)
    for number in (51, 2.5):
        with pytest.raises(ValueError, match="num_classes"):
            bases.latent_classes(table(50), number, support=SUPPORT)
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        bases.latent_classes(table(50), 2, support=SUPPORT, weights=-torch.ones(50))
    with pytest.raises(ValueError, match="kind"):
        bases.fit(table(50), "flow", support=SUPPORT)
    with pytest.raises(TypeError, match="floating-point"):
        bases.latent_classes(table(50).long(), support=SUPPORT)
