"""The mixture of fitted families from which log Z is measured."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.importance.proposal import Proposal, fit_proposal
from pyro_ebm.testing import targets, validation_targets


def path_of(target):
    return GeometricPath(target.energy, target.base)


def fitted_to(target, num=2000, **options):
    """A proposal fitted to exact draws, in unconstrained space."""
    path = path_of(target)
    u = path.transform.inv(target.sample((num,))).reshape(num, -1)
    return path, fit_proposal(u, float(num), path, **options)


def log_weights(path, proposal, u):
    energy = path.target(u.reshape(len(u), *path.event_shape))
    return -energy - proposal.log_prob(u)


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        targets.gamma,
        lambda: targets.gaussian(4, 100.0),
        lambda: targets.neals_funnel(4),
        lambda: targets.student_t_product(3),
        validation_targets.two_modes,
        validation_targets.dirichlet,
        validation_targets.beta_product,
    ],
)
def test_density_and_draws_belong_together(build, explore):
    """Weights of a target of known Z average to it, on any support. Planted: the
    scales of the triangular map left out of its Jacobian, and draws of the base not
    moved to unconstrained space; seen to fail."""
    target = build()
    path, proposal = fitted_to(target, explore=explore)
    u = proposal.sample(10_000)
    ratio = (log_weights(path, proposal, u) - target.log_partition).exp()
    assert ratio.std() < 20
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(u) ** 0.5


@pytest.mark.parametrize(
    "build",
    [
        targets.student_t_product,
        targets.gaussian,
        validation_targets.multivariate_student_t,
        validation_targets.banana,
        targets.neals_funnel,
    ],
)
def test_a_good_fit_has_good_weights(build):
    """Six or seven draws in ten are effective after one update. Planted: marginals for
    the triangular family, and marginals for Student; two targets each fail."""
    target = build()
    path, first = fitted_to(target)
    x = first.sample(4000)
    weights = first.improved_weights(x, log_weights(path, first, x))
    path, second = fitted_to(target, weights=weights)
    w = log_weights(path, second, second.sample(4000)).softmax(0)
    assert 1 / w.square().sum() > 0.5 * 4000


def test_components_are_drawn_with_their_weights():
    """Three far components and a base: the counts are multinomial."""
    base = dist.Normal(torch.zeros(2), 0.1).to_event(1)
    path = GeometricPath(DistributionEnergy(base), base)
    parts = [dist.Normal(torch.full((2,), 10.0 * k), 0.1) for k in (1, 2, 3)]
    weights = torch.tensor([0.5, 0.25, 0.15, 0.1])
    proposal = Proposal([q.to_event(1) for q in parts], path, weights, torch.float64)
    x = proposal.sample(20_000)
    assert x.shape == (20_000, 2)
    nearest = (x[:, 0] / 10).round().long()
    counts = torch.bincount(nearest, minlength=4)[[1, 2, 3, 0]]
    z = (counts / 20_000 - weights) / (weights * (1 - weights) / 20_000).sqrt()
    assert z.abs().max() < 4
    at_center = -2 * math.log(0.1) - math.log(2 * math.pi) + math.log(0.5)
    seen = proposal.log_prob(torch.full((1, 2), 10.0)).item()
    assert seen == pytest.approx(at_center)


def test_the_update_finds_the_component_that_fits():
    """The target is the second of four: its weight rises to what the floors leave."""
    base = dist.Normal(torch.zeros(3), 5.0).to_event(1)
    truth = dist.Normal(torch.ones(3), 0.5).to_event(1)
    path = GeometricPath(DistributionEnergy(truth), base)
    others = [
        dist.Normal(torch.full((3,), loc), 1.0).to_event(1) for loc in (-2.0, 4.0)
    ]
    weights = torch.full((4,), 0.25)
    seen = [0.25]
    for _ in range(3):
        proposal = Proposal([others[0], truth, others[1]], path, weights, torch.float64)
        x = proposal.sample(4000)
        weights = proposal.improved_weights(x, log_weights(path, proposal, x))
        seen.append(weights[1].item())
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        assert weights.min() >= 0.04 - 1e-12
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1 - 3 * 0.04, abs=0.01)


def test_the_update_lowers_the_divergence():
    """Cross entropy of the target, on exact draws of it. Planted: responsibilities
    without the weights of the draws, which lead back to the mixture as it was; seen to
    fail."""
    target = targets.neals_funnel(5)
    path, proposal = fitted_to(target)
    x = proposal.sample(10_000)
    weights = proposal.improved_weights(x, log_weights(path, proposal, x))
    better = Proposal(proposal.components, path, weights, torch.float64)
    exact = target.sample((10_000,))
    gain = better.log_prob(exact) - proposal.log_prob(exact)
    assert gain.mean() > 4 * gain.std() / 100


def test_draws_that_no_component_can_have_do_no_harm():
    """Infinite and overflowing draws have no density, and no say in the weights."""
    path, proposal = fitted_to(targets.gaussian(2, 10.0))
    x = proposal.sample(100)
    x[0], x[1] = 1e200, torch.inf
    log_prob = proposal.log_prob(x)
    assert not log_prob.isnan().any()
    log_weight = log_weights(path, proposal, x)
    log_weight[:2] = -torch.inf
    assert proposal.improved_weights(x, log_weight).isfinite().all()


def test_few_draws_may_lack_a_component():
    """Planted: the flat shape of no draws of the base left to be inferred."""
    for target in (
        targets.gamma(),
        targets.gaussian(3, 10.0),
        validation_targets.dirichlet(),
    ):
        path, proposal = fitted_to(target, num=200)
        dim = path.event_shape.numel()
        assert all(proposal.sample(num).shape == (num, dim) for num in (1, 1, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_single_precision_draws_have_double_densities(dtype):
    path, proposal = fitted_to(targets.gaussian(3, 10.0))
    x = proposal.sample(50)
    assert x.dtype == dtype
    assert proposal.log_prob(x).dtype == torch.float64


def test_exploring_reaches_a_mode_that_the_draws_lack():
    """Draws of one coordinate alone to where only the base goes. Planted: marginals
    without the wide component, and the triangular family for them; seen to fail."""
    base = dist.Normal(torch.zeros(10), 4.0).to_event(1)
    path = GeometricPath(DistributionEnergy(base), base)
    draws = torch.randn(2000, 10)
    found = []
    for explore in (True, False):
        x = (
            fit_proposal(draws, 2000.0, path, explore=explore)
            .components[0]
            .sample((4000,))
        )
        others = x[:, 1:].abs().amax(-1) < 5
        found.append(((x[:, 0] - 8).abs().lt(1) & others).sum().item())
    # A component of weight 0.05 and of scale 4: mass of [7, 9] about 0.03.
    assert found[0] > 4
    assert found[1] == 0
