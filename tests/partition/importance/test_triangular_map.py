"""A proposal coordinate by coordinate.

Faults that a test is meant to catch are named with it.
"""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import biject_to

from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.partition.importance.student_mixture import fit_clusters
from pyro_ebm.partition.importance.triangular_map import (
    _fit_polygons,
    _Polygons,
    fit_map,
)
from pyro_ebm.testing import targets, validation_targets


def equal(num):
    return torch.full((num,), 1 / num)


def bent(num):
    """The first coordinate is told last: it bends the second and widens the third."""
    x = torch.randn(num, 1)
    y = x.square() + 0.3 * torch.randn(num, 1)
    z = (x / 2).exp() * torch.randn(num, 1) - 2 * y
    return torch.cat([z, y, x], 1) * torch.tensor([1.0, 10.0, 0.1]) + 5


def test_the_density_integrates_to_one():
    """On a grid, of a funnel. Fault: the log-scale left out of the density."""
    v = torch.randn(5000, 1)
    u = torch.cat([v, v.exp() * torch.randn(5000, 1)], 1)
    found = fit_map(u, equal(5000), 5000)
    assert found.log_scale[1, 1] != 0
    first, t = torch.linspace(-12, 12, 400), torch.linspace(-14, 14, 2000)
    grid = torch.cartesian_prod(first, t.sinh())
    density = found.log_prob(grid).exp().reshape(400, 2000) * t.cosh()
    total = torch.trapezoid(torch.trapezoid(density, t), first)
    assert abs(total - 1) < 0.01


def test_draws_follow_the_density():
    """Weighed by a density whose draws are known. Fault: the order of the coordinates
    not undone."""
    found = fit_map(bent(5000), equal(5000), 5000)
    assert found.order.tolist() != [0, 1, 2]
    x = found.sample(100_000)
    truth = fit_clusters(x[:50_000], equal(50_000), 3)
    weights = (truth.log_prob(x) - found.log_prob(x)).exp()
    assert abs(weights.mean() - 1) < 0.05
    centre = x.median(0).values
    for i in range(3):
        is_low = x[:, i] < centre[i]
        wide = truth._replace(scale_tril=1.5 * truth.scale_tril)
        u = wide.sample(200_000)
        ratio = (found.log_prob(u) - wide.log_prob(u)).exp() * (u[:, i] < centre[i])
        error = ratio.std() / math.sqrt(len(u))
        assert abs(ratio.mean() - is_low.double().mean()) < 4 * error + 0.01


def efficiency(target, num=6000):
    """Of a map, and of a Student mixture, fitted to exact draws; and the error."""
    to = biject_to(target.energy.support)
    u = to.inv(target.sample((num,)))
    found = fit_map(u, equal(num), num), fit_clusters(u, equal(num), 8)
    shares, errors = [], []
    for proposal in found:
        draws = proposal.sample(10_000)
        x = to(draws)
        jacobian = to.log_abs_det_jacobian(draws, x)
        jacobian = jacobian.reshape(len(draws), -1).sum(-1)
        log_weights = jacobian - target.energy(x) - proposal.log_prob(draws)
        shares.append(effective_sample_fraction(log_weights).item())
        errors.append(log_mean_exp(log_weights).item() - target.log_partition)
    return shares, errors


@pytest.mark.parametrize(
    ("build", "least"),
    [
        (targets.many_well, 0.5),  # 2^16 modes
        (targets.student_t_product, 0.6),
        (targets.hybrid_rosenbrock, 0.8),
        (validation_targets.banana, 0.7),
        (validation_targets.beta_product, 0.8),
        (validation_targets.dirichlet, 0.8),
        (validation_targets.laplace_product, 0.7),
        (validation_targets.shell, 0.5),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_is_better_than_ellipsoids_on_its_kind(build, least):
    """Products of marginals, and ridges. Fault: no squares."""
    (own, other), (error, _) = efficiency(build())
    assert own > least
    assert own > other
    assert abs(error) < 4 * math.sqrt((1 / own - 1) / 10_000)


def test_a_funnel_has_its_scales():
    """Fault: location alone."""
    shares = [efficiency(targets.neals_funnel(), 10_000)[0] for _ in range(3)]
    own, other = torch.tensor(shares).median(0).values
    assert own > 0.3 > other


def test_terms_that_are_chance_are_left_out():
    """Fault: a term is kept where it is one standard error from zero."""
    found = fit_map(dist.StudentT(3.0).sample((1000, 12)), equal(1000), 1000)
    assert (found.location[:, 1:] != 0).sum() <= 1
    assert (found.log_scale[:, 1:] != 0).sum() <= 1


def test_few_independent_draws_tell_less():
    """Fault: the number is not looked at."""
    x = torch.randn(1000, 1)
    u = torch.cat([x, 0.3 * x + torch.randn(1000, 1)], 1)
    assert (fit_map(u, equal(1000), 1000).location[:, 1:] != 0).any()
    assert not (fit_map(u, equal(1000), 20).location[:, 1:] != 0).any()


def test_weights_stand_for_draws():
    """Fault: the marginals without them."""
    u = 3 * torch.randn(40_000, 2)
    wide = dist.Normal(torch.zeros(2), 3.0).to_event(1)

    def log_density(u):
        first = dist.Normal(0.0, 1.0).log_prob(u[:, 0])
        return first + dist.Normal(u[:, 0].square() - 1, 0.5).log_prob(u[:, 1])

    weights = (log_density(u) - wide.log_prob(u)).softmax(0)
    found = fit_map(u, weights, 1 / weights.square().sum().item())
    draws = found.sample(10_000)
    log_weights = log_density(draws) - found.log_prob(draws)
    assert effective_sample_fraction(log_weights) > 0.8


def test_scale_and_place_of_the_coordinates_do_not_matter():
    """The density moves with them. Fault: the scale is not divided by."""
    u = bent(3000)
    loc, scale = torch.tensor([1e3, -5.0, 0.0]), torch.tensor([1e4, 1e-3, 2.0])
    one = fit_map(u, equal(3000), 3000)
    other = fit_map(loc + scale * u, equal(3000), 3000)
    expected = one.log_prob(u) - scale.log().sum()
    apart = (other.log_prob(loc + scale * u) - expected).abs()
    # Which of two draws is the median of a tail, rounding decides.
    assert (apart < 1e-4).double().mean() > 0.95
    assert apart.max() < 1


def columns(num):
    """Two wells, heavy tails, and an edge."""
    wells = torch.where(torch.rand(num) < 0.3, -3.0, 1.0) + 0.4 * torch.randn(num)
    heavy = dist.StudentT(2.0).sample((num,))
    return torch.stack([wells, heavy, dist.Exponential(1.0).sample((num,))], 1)


def fitted(num=5000):
    return _fit_polygons(columns(num), torch.full((num,), 1 / num))


def test_each_density_integrates_to_one():
    """Fault: the area of a hat at the end."""
    found = fitted()
    middle = torch.linspace(-20, 20, 100_001)
    # Beyond, by the logarithm of the distance.
    log_far = torch.linspace(math.log(20), math.log(1e9), 20_001)
    inside = torch.trapezoid(
        found.log_prob(middle[:, None].expand(-1, 3)).exp(), middle, dim=0
    )
    for sign in (-1, 1):
        x = (sign * log_far.exp())[:, None].expand(-1, 3)
        density = (found.log_prob(x) + log_far[:, None]).exp()
        inside = inside + torch.trapezoid(density, log_far, dim=0)
    torch.testing.assert_close(inside, torch.ones(3), atol=2e-3, rtol=0)


def test_draws_of_polygons_follow_the_density():
    """By the ratio to a wide density, cell by cell. Fault: a tail on the
    wrong side."""
    found, num = fitted(), 200_000
    draws = found.sample(num)
    assert draws.shape == (num, 3)
    wide = dist.StudentT(1.0, torch.zeros(3), 2.0)
    x = wide.sample((num,))
    weights = (found.log_prob(x) - wide.log_prob(x)).exp()
    for low, high in [(-1e9, -4.0), (-4.0, -2.9), (-2.9, 0.1), (0.1, 0.9), (2.0, 1e9)]:
        share = ((draws > low) & (draws < high)).double().mean(0)
        weighted = weights * ((x > low) & (x < high))
        error = (weighted.var(0) + share * (1 - share)) / num
        z = (share - weighted.mean(0)) / error.sqrt().clamp(min=1e-9)
        assert (z.abs() < 4.5).all(), (low, high, z)


def test_draws_of_a_few_hats():
    """In narrow cells. Fault: the triangle the wrong way round."""
    tails = torch.tensor([[[0.05], [0.1]], [[1.0], [0.5]], [[0.2], [0.3]]])
    found = _Polygons(
        torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.2, 0.5, 0.15]]), tails
    )
    draws, step = found.sample(100_000), 0.25
    for low in torch.arange(-1.0, 4.0, step).tolist():
        cell = torch.linspace(low + 1e-9, low + step - 1e-9, 101)
        share = torch.trapezoid(found.log_prob(cell[:, None]).exp()[:, 0], cell)
        seen = ((draws > low) & (draws < low + step)).double().mean()
        assert abs(seen - share) < 4.5 * math.sqrt(share / len(draws)), low


def test_it_is_near_the_density_of_the_draws():
    """Each within a tenth of a nat, and a tail no lighter than the truth. Fault: the
    shares are not divided by the areas of the hats."""
    x = columns(20_000)
    truth = [
        (
            dist.Normal(-3.0, 0.4).log_prob(x[:, 0]) + math.log(0.3),
            dist.Normal(1.0, 0.4).log_prob(x[:, 0]) + math.log(0.7),
        ),
        (dist.StudentT(2.0).log_prob(x[:, 1]),),
        (dist.Exponential(1.0).log_prob(x[:, 2]),),
    ]
    truth = torch.stack([torch.stack(parts).logsumexp(0) for parts in truth], 1)
    ratio = truth - fitted().log_prob(x)
    assert (ratio.mean(0) < 0.05).all(), ratio.mean(0)
    chi_squared = ratio.exp().mean(0) - 1  # of the weights of draws of the density
    assert (chi_squared < 0.1).all(), chi_squared
    assert ratio.max() < 5


def test_weights_of_polygons_stand_for_draws():
    """Draws of a wide density, weighed. Fault: weights in the order of the draws."""
    wide, target = dist.Normal(0.0, 3.0), dist.Normal(1.0, 0.7)
    x = wide.sample((20_000, 1))
    weights = (target.log_prob(x) - wide.log_prob(x))[:, 0].softmax(0)
    found = _fit_polygons(x, weights)
    fresh = target.sample((20_000, 1))
    loss = (target.log_prob(fresh) - found.log_prob(fresh)).mean()
    assert loss < 0.05


def test_draws_on_top_of_each_other_make_no_spike():
    """Half of them at zero. Fault: knots at the same place."""
    x = torch.cat([torch.zeros(2000, 1), torch.randn(2000, 1)])
    found = _fit_polygons(x, torch.full((4000,), 1 / 4000))
    assert found.knots.diff().min() > 0
    assert found.log_prob(x).isfinite().all()
    assert found.sample(1000).isfinite().all()


def test_draws_where_a_map_has_overflown_are_none():
    """Fault: their squares, which no weight of zero keeps out of a sum."""
    far = torch.tensor([[math.inf] * 3, [math.nan] * 3, [1e200] * 3])
    draws = bent(2000)
    weights = torch.cat([torch.zeros(3), equal(2000)])
    found = fit_map(torch.cat([far, draws]), weights, 2000)
    alone = fit_map(draws, equal(2000), 2000)
    torch.testing.assert_close(found.log_prob(draws), alone.log_prob(draws))
    assert found.sample(100).isfinite().all()
