"""Proposals, and draws of several of them weighed as one mixture."""

import math
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition.importance.pool import (
    MIN_SHARE,
    Pool,
    Proposal,
    difference,
    log_density,
    of_draws,
    tempered,
)
from pyro_ebm.partition.importance.student_mixture import StudentMixture
from pyro_ebm.partition.importance.triangular_map import fit_map

ENERGY = QuadraticEnergy(torch.ones(2).double())
TRUTH = math.log(2 * math.pi)


class Normal:
    """A proposal."""

    def __init__(self, loc, scale):
        self.base = dist.Normal(torch.full((2,), loc), scale).to_event(1)

    def sample(self, num):
        return self.base.sample((num,))

    def log_prob(self, u):
        return self.base.log_prob(u)


def test_the_mean_weight_is_the_partition_function():
    """Over 500 pools of two rounds, the first far too wide and the second too narrow
    alone. Fault: the number of proposals left out; each draw weighed by its own
    proposal, whose mean of so few draws is off by the tail of the second."""
    values = []
    for _ in range(500):
        pool = Pool(ENERGY)
        first = Normal(0.0, 3.0)
        own = pool.add(first, 50)
        torch.testing.assert_close(own, pool.log_weights())
        pool.add(Normal(1.0, 0.4), 50)
        values.append(log_mean_exp(pool.log_weights()) - TRUTH)
    ratio = torch.stack(values).exp()
    error = ratio.std() / math.sqrt(500)
    assert error < 0.01
    assert abs(ratio.mean() - 1) < 4 * error


def test_weights_are_under_the_mixture_of_all_rounds():
    """Fault: a proposal is not evaluated at the draws before it."""
    proposals = [Normal(0.0, 2.0), Normal(1.0, 1.0), Normal(3.0, 0.5)]
    pool = Pool(ENERGY)
    for number, proposal in zip((10, 20, 30), proposals, strict=True):
        own = pool.add(proposal, number)
        assert own.shape == (number,)
    assert pool.num_rounds == 3
    u = pool.draws()
    assert u.shape == (60, 2)
    mixture = torch.stack([q.log_prob(u) for q in proposals]).logsumexp(0) - math.log(3)
    torch.testing.assert_close(pool.log_weights(), -ENERGY(u) - mixture)
    torch.testing.assert_close(own, -ENERGY(u[30:]) - proposals[2].log_prob(u[30:]))


def test_where_the_target_is_nothing_there_is_no_weight():
    """Whatever the proposal says. Fault: nan for the difference of infinities."""
    energy = FunctionEnergy(
        lambda x: torch.stack([-x[:, 0].log(), x[:, 1]]).sum(0), (2,)
    )
    u = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [0.0, 0.0], [1.0, -math.inf]])
    found = log_density(energy, u)
    torch.testing.assert_close(found, torch.tensor([-2.0, *[-math.inf] * 3]))
    weights = difference(found, torch.tensor([1.0, -math.inf, math.inf, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([-3.0, *[-math.inf] * 3]))


def test_events_of_any_shape():
    energy = FunctionEnergy(lambda x: x.sum((-1, -2)), (2, 3))
    u = torch.randn(5, 6)
    torch.testing.assert_close(log_density(energy, u), -u.sum(-1))


@pytest.mark.parametrize("wanted", [10, 100, 900])
def test_tempered_weights_leave_as_many_effective(wanted):
    """Fault: the power that leaves fewer."""
    log_weights = 20 * torch.randn(1000)
    log_weights[:50] = -math.inf
    found = tempered(log_weights, wanted)
    assert not found.isnan().any()
    left = effective_sample_fraction(found).item() * 1000
    assert wanted <= left < 1.01 * wanted + 1
    ratio = (found / log_weights)[50:]
    torch.testing.assert_close(ratio, ratio[:1].expand(950))
    assert 0 < ratio[0] < 1


def test_good_weights_stay_as_they_are():
    log_weights = 0.1 * torch.randn(1000)
    assert tempered(log_weights, 500) is log_weights


def path(dim=2):
    base = dist.Normal(torch.zeros(dim), 3.0).to_event(1)
    return GeometricPath(QuadraticEnergy(torch.zeros(dim)), base, is_double=True)


def student(loc, scale=1.0):
    loc = torch.as_tensor(loc)
    eye = scale * torch.eye(loc.shape[-1])
    return StudentMixture(torch.ones(1), loc[None], eye[None])


def test_density_and_draws_are_of_one_distribution():
    """Its integral over draws of another is one, and its mean the mixture's. Fault:
    the share of the base left out of the density, or of the draws."""
    proposal = Proposal(path(), student([4.0, -2.0], 0.5), 0.3)
    wide = dist.StudentT(4.0, torch.tensor([2.0, -1.0]), 4.0).to_event(1)
    x = wide.sample((100_000,))
    ratio = (proposal.log_prob(x) - wide.log_prob(x)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(x))
    draws = proposal.sample(100_000)
    assert draws.shape == (100_000, 2)
    assert draws.dtype == torch.float64
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - 0.7 * torch.tensor([4.0, -2.0])).abs() < 4 * error).all()
    # Draws of the base are last.
    tail = draws[-20_000:]
    assert (tail.mean(0).abs() < 4 * 3 / math.sqrt(len(tail))).all()


def test_without_a_mixture_it_is_the_base():
    alone, x = Proposal(path()), torch.randn(20, 2)
    assert alone.base_share == 1
    assert alone.size == 0
    expected = dist.Normal(torch.zeros(2), 3.0).to_event(1).log_prob(x)
    torch.testing.assert_close(alone.log_prob(x), expected)
    assert alone.sample(5).shape == (5, 2)
    weights = torch.full((20,), 0.05)
    assert alone.refitted(x, weights) is alone
    assert alone.thickened(x, torch.zeros(20)) is alone


@pytest.mark.parametrize("is_base", [True, False])
def test_the_share_of_the_base_is_learned(is_base):
    """All of the mass is of the base, or none, but either keeps a share. Fault: the
    responsibility of the mixture for that of the base; no least share."""
    proposal = Proposal(path(), student([9.0, 9.0], 0.3), 0.5)
    u = proposal.sample(5000)
    is_near = (u - 9).square().sum(-1) < 9
    weights = (is_near ^ is_base).double()
    weights = weights / weights.sum()
    share = proposal.refitted(u, weights, num_steps=0).base_share
    assert share == pytest.approx(1 - MIN_SHARE if is_base else MIN_SHARE, abs=1e-3)


def test_refitting_moves_the_mixture_to_the_weights():
    """Fault: the mixture stays as it is."""
    target = dist.Normal(torch.tensor([1.0, -1.0]), 0.5).to_event(1)
    proposal = Proposal(path(), student([0.0, 0.0], 2.0))
    before = after = None
    for _ in range(4):
        u = proposal.sample(4000)
        log_weights = target.log_prob(u) - proposal.log_prob(u)
        after = log_weights.exp().var()
        before = after if before is None else before
        proposal = proposal.refitted(u, log_weights.softmax(0))
    assert after < before / 10
    torch.testing.assert_close(
        proposal.mixture.loc[0], torch.tensor([1.0, -1.0]), atol=0.05, rtol=0
    )


def test_components_are_added_where_draws_weigh_too_much():
    """A second mode that only the base reaches. Fault: components at draws that do
    not weigh too much; the whole of the weight is taken as heavy."""
    proposal = Proposal(path(), student([-5.0, 0.0], 0.5), 0.1)
    u = proposal.sample(4000)
    modes = [torch.tensor([-5.0, 0.0]), torch.tensor([5.0, 0.0])]
    target = torch.stack(
        [dist.Normal(loc, 0.5).to_event(1).log_prob(u) for loc in modes]
    ).logsumexp(0)
    log_weights = target - proposal.log_prob(u)
    found = proposal.thickened(u, log_weights)
    assert found.size > proposal.size
    new = found.mixture.loc[proposal.size :]
    assert ((new - modes[1]).norm(dim=-1) < 2).all()
    assert proposal.thickened(u, torch.zeros(4000)) is proposal


def test_joined_with_another_mixture():
    one, other = student([0.0, 0.0]), student([3.0, 3.0], 0.5)
    both, x = Proposal(path(), one, 0.2).joined(other, 0.5), torch.randn(30, 2)
    base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    expected = (
        0.4 * one.log_prob(x).exp()
        + 0.4 * other.log_prob(x).exp()
        + 0.2 * base.log_prob(x).exp()
    )
    torch.testing.assert_close(both.log_prob(x), expected.log())
    assert both.size == 2
    assert Proposal(path()).joined(one, 0.5).base_share == pytest.approx(0.2)


def test_proposals_over_events_of_any_shape():
    """In unconstrained space, flat. Fault: the base without its Jacobian."""
    positive = dist.constraints.independent(dist.constraints.positive, 2)
    energy = FunctionEnergy(lambda x: x.sum((-1, -2)), (2, 2), positive)
    base = dist.Exponential(torch.ones(2, 2)).to_event(2)
    bent = GeometricPath(energy, base, is_double=True)
    proposal = Proposal(bent, student(torch.zeros(4)), 0.5)
    u = proposal.sample(50_000)
    assert u.shape == (50_000, 4)
    weights = (log_density(bent.target, u) - proposal.log_prob(u)).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(u))
    assert weights.max() < 2.1  # the base is the target, and half of the proposal


def mapped(share):
    """Half of a target in a map, and a component at each half."""
    u = torch.randn(4000, 2) - 4
    modes = student([-4.0, -4.0]).joined(student([4.0, 4.0]), 0.5)
    triangular = fit_map(u, torch.full((4000,), 1 / 4000), 4000)
    return Proposal(path(), modes, 0.1).with_map(triangular, share)


def test_a_map_has_its_share_of_density_and_draws():
    """Fault: the share of the map left out of the density, or of the draws."""
    proposal = mapped(0.6)
    wide = dist.StudentT(4.0, torch.zeros(2), 5.0).to_event(1)
    x = wide.sample((100_000,))
    ratio = (proposal.log_prob(x) - wide.log_prob(x)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(x))
    draws = proposal.sample(50_000)
    is_near = (draws.sum(-1) < 0).double().mean()
    expected = 0.6 + 0.04 / 2 + 0.36 / 2
    assert is_near == pytest.approx(expected, abs=0.015)


def test_components_whose_mass_the_map_holds_are_pruned():
    """And the one that the map lacks stays. Fault: all of them are kept; weights
    that do not know the map."""
    proposal = mapped(0.96 - 1e-9)
    u = torch.randn(4000, 2) + torch.where(torch.rand(4000, 1) < 0.5, 4.0, -4.0)
    weights = torch.full((4000,), 1 / 4000)
    for _ in range(4):
        proposal = proposal.shared_out(u, weights).pruned(u, weights)
    kept = proposal.mixture.loc[proposal.mixture.weights > 0.2]
    torch.testing.assert_close(kept, torch.full((1, 2), 4.0))
    assert proposal.map_share == pytest.approx(0.5, abs=0.1)


def test_what_is_too_far_out_for_squares_has_no_weight():
    """Of a map the density may then be infinity minus infinity. Fault: left as nan, it
    ended an estimate of the Rosenbrock density by an error of ``multinomial``."""
    lost = SimpleNamespace(log_prob=lambda u: torch.full_like(u[:, 0], torch.nan))
    proposal = Proposal(path(), student([0.0, 0.0])).with_map(lost, 0.5)
    assert proposal.log_prob(torch.zeros(1, 2, dtype=torch.float64)).isfinite()
    log_weights = of_draws(torch.zeros(2), torch.tensor([-torch.inf, 1.0]))
    assert log_weights.tolist() == [-torch.inf, -1.0]
