"""Clamped energies: which coordinates are free, closed forms, refusals."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import (
    ClampedEnergy,
    DistributionEnergy,
    FactorGraphEnergy,
    FunctionEnergy,
    IsingEnergy,
    MixtureEnergy,
    NeuralEnergy,
    PottsEnergy,
    QuadraticEnergy,
)
from pyro_ebm.energies.closed_form.marginal import marginal
from pyro_ebm.energies.discrete.finite import finite_points
from pyro_ebm.mcmc import Gibbs
from pyro_ebm.partition import enumeration, quadrature
from tests.energies.discrete.test_chain import chi_square

MASK = torch.tensor([[True, False, False], [False, False, True]])
SHAPES = torch.tensor([[1.0, 2, 3], [0.5, 1.5, 2.5]], dtype=torch.float64)


def quadratic(dim):
    root = torch.randn(dim, dim)
    return QuadraticEnergy(torch.randn(dim), torch.eye(dim) + root @ root.mT)


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def image(x):
    """Of pictures of two rows and three columns; no two coordinates are alike."""
    weights = torch.arange(6.0).reshape(2, 3)
    return ((x * weights).sin() + x.square() * weights.cos()).sum((-2, -1))


@pytest.mark.parametrize(
    "pairs",
    [
        [((0, 1), 0.5)],
        [(0, double([1.0, 2.0, 3.0]))],
        [(-1, 7)],
        [((..., 2), double([1.0, 2.0]))],
        [((slice(None), slice(0, 2)), double([[1.0, 2.0], [3.0, 4.0]]))],
        [(slice(1), 4.0)],
        [(MASK, double([1.0, 2.0]))],
        [(MASK, 1.0), ((0, 2), 2.0), ((1, 0), 3.0)],
    ],
)
def test_events_are_put_together_as_by_indexing(pairs):
    energy, whole = FunctionEnergy(image, (2, 3)), torch.randn(4, 2, 3)
    is_free = torch.ones(2, 3, dtype=torch.bool)
    for index, value in pairs:
        is_free[index] = False
        for x in whole:
            x[index] = value
    clamped, u = ClampedEnergy(energy, pairs), whole[:, is_free]
    assert clamped.event_shape == u.shape[1:]
    assert torch.equal(clamped.free_part(whole), u)
    assert torch.equal(clamped.expand_event(u), whole)
    assert torch.equal(clamped(u), energy(whole))
    value, grad = clamped.value_and_grad(u)
    assert torch.equal(value, energy(whole))
    assert torch.equal(grad, energy.value_and_grad(whole)[1][:, is_free])


# Closed forms ------------------------------------------------------------------------


def textbook(loc, covariance, free, fixed, value):
    """Bishop (2006), Pattern Recognition and Machine Learning, eq. (2.81), (2.82)."""
    gain = covariance[free][:, fixed] @ covariance[fixed][:, fixed].inverse()
    mean = loc[free] + gain @ (value - loc[fixed])
    schur = covariance[free][:, free] - gain @ covariance[fixed][:, free]
    return mean, schur


@pytest.mark.parametrize("as_distribution", [False, True])
def test_conditional_of_a_gaussian_is_the_textbooks(as_distribution):
    """The sign of the shift of the mean: planted, and seen to fail."""
    energy = quadratic(5)
    gaussian = energy.closed_form().distribution
    whole = DistributionEnergy(gaussian) if as_distribution else energy + 0.7
    free, fixed, value = [0, 2, 3], [4, 1], torch.tensor([0.3, -1.2])
    clamped = ClampedEnergy(whole, {4: 0.3, 1: -1.2})
    log_partition, conditional = clamped.closed_form()
    covariance = gaussian.covariance_matrix
    mean, schur = textbook(gaussian.loc, covariance, free, fixed, value)
    torch.testing.assert_close(conditional.mean, mean)
    torch.testing.assert_close(conditional.covariance_matrix, schur)
    observed = dist.MultivariateNormal(
        gaussian.loc[fixed], covariance[fixed][:, fixed]
    ).log_prob(value)
    torch.testing.assert_close(
        log_partition, whole.closed_form().log_partition + observed
    )
    u = torch.randn(6, 3)
    torch.testing.assert_close(-clamped(u) - log_partition, conditional.log_prob(u))


def test_conditional_of_a_mixture_of_gaussians():
    """Components keep their weights: planted, and seen to fail."""
    energy = MixtureEnergy([quadratic(3), quadratic(3)], torch.tensor([0.5, -1.0]))
    clamped = ClampedEnergy(energy, {1: 1.5})
    log_partition, conditional = clamped.closed_form()
    assert abs(log_partition - quadrature(clamped).value) < 1e-6
    u = torch.randn(6, 2)
    torch.testing.assert_close(-clamped(u) - log_partition, conditional.log_prob(u))


@pytest.mark.parametrize(
    "whole",
    [
        dist.Gamma(SHAPES, 2.0),
        dist.Normal(torch.zeros(()), SHAPES),
        dist.Cauchy(SHAPES, 1.0),  # which has no mean
        dist.Beta(SHAPES, 2.0),
        dist.LogNormal(SHAPES, 1.0),
        dist.Uniform(-SHAPES, SHAPES),
    ],
)
def test_conditional_of_independent_coordinates(whole):
    clamped = ClampedEnergy(DistributionEnergy(whole.to_event(2)), {MASK: 0.4})
    log_partition, conditional = clamped.closed_form()
    value = torch.full((2, 3), 0.4)
    torch.testing.assert_close(log_partition, whole.log_prob(value)[MASK].sum())
    x = whole.sample((5,))
    expected = whole.log_prob(x)[:, ~MASK].sum(-1)
    torch.testing.assert_close(conditional.log_prob(x[:, ~MASK]), expected)
    inside = clamped.free_part(x)
    assert clamped.support.check(inside).all()
    torch.testing.assert_close(-clamped(inside) - log_partition, expected)


def test_no_closed_form_where_it_is_not_known():
    assert ClampedEnergy(NeuralEnergy((2,)), {0: 1.0}).closed_form() is None
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        [dist.transforms.LowerCholeskyAffine(torch.zeros(3), torch.eye(3))],
    )
    assert ClampedEnergy(DistributionEnergy(flow), {0: 1.0}).closed_form() is None


def test_parameters_stay_live_in_value_and_closed_form():
    """The gradient of log Z is minus the expected gradient of the energy."""
    energy = quadratic(3)
    clamped = ClampedEnergy(energy, {0: 1.0})
    log_partition, conditional = clamped.closed_form()
    (grad,) = torch.autograd.grad(log_partition, energy.log_diagonal)
    line = torch.linspace(-12, 12, 601)
    u = torch.cartesian_prod(line, line)
    mass = conditional.log_prob(u).softmax(0).detach()
    (expected,) = torch.autograd.grad(mass @ clamped(u), energy.log_diagonal)
    torch.testing.assert_close(grad, -expected, atol=1e-6, rtol=1e-6)
    before = clamped(u[:4]).detach()
    with torch.no_grad():
        energy.log_diagonal.add_(0.1)
    assert (clamped(u[:4]) != before).all()
    assert {id(p) for p in clamped.parameters()} == {id(p) for p in energy.parameters()}


def test_the_observed_value_gets_its_gradient():
    value = nn.Parameter(torch.tensor(0.4))
    ClampedEnergy(quadratic(2), {1: value})(torch.zeros(1)).backward()
    assert value.grad != 0


# Supports and marginals --------------------------------------------------------------


def test_bounds_that_differ_stay_with_their_coordinates():
    support = constraints.independent(
        constraints.interval(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])), 1
    )
    energy = FunctionEnergy(lambda x: x.sum(-1), (3,), support)
    clamped = ClampedEnergy(energy, {1: 1.5})
    assert clamped.support.check(torch.tensor([0.5, 2.5]))
    assert not clamped.support.check(torch.tensor([1.5, 2.5]))
    # The integral of e^-x over [0, 1] and [0, 3], times e^-1.5.
    truth = -1.5 + math.log((1 - math.exp(-1)) * (1 - math.exp(-3)))
    assert abs(quadrature(clamped).value - truth) < 1e-5
    with pytest.raises(ValueError, match=r"1 of 1 do not, the first is 1\.5"):
        ClampedEnergy(energy, {0: 1.5})


def test_marginals():
    gaussian = quadratic(4).closed_form().distribution
    part = marginal(gaussian, torch.tensor([3, 1]))
    assert torch.equal(part.mean, gaussian.mean[[3, 1]])
    covariance = gaussian.covariance_matrix[[3, 1]][:, [3, 1]]
    torch.testing.assert_close(part.covariance_matrix, covariance)
    laplace = dist.Laplace(SHAPES, 2.0).to_event(2)
    assert marginal(laplace, torch.tensor([5, 0])).mean.tolist() == [2.5, 1.0]
    assert marginal(dist.Dirichlet(torch.ones(3)), torch.tensor([0])) is None


# Bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observed", "error", "message"),
    [
        ({}, ValueError, "at least one coordinate, got none"),
        ([(slice(5, 9), 1.0)], ValueError, "at least one coordinate, got none"),
        ({...: 1.0}, ValueError, "holds all 6 numbers of the event"),
        ([(0, 1.0), (1, 2.0)], ValueError, "holds all 6 numbers of the event"),
        ({2: 1.0}, ValueError, r"index 2 is not in an event of shape \(2, 3\)"),
        ({(0, 0, 0): 1.0}, ValueError, r"not in an event .* too many indices"),
        ({"x": 1.0}, TypeError, "an index must be .* got str"),
        ({True: 1.0}, TypeError, "an index must be .* got bool"),
        ({(0, None): 1.0}, TypeError, "an index must be .* got NoneType"),
        ({MASK[0]: 1.0}, ValueError, r"event's shape \(2, 3\), got .* \(3,\)"),
        ({MASK.long(): 1.0}, ValueError, "mask must be boolean .* torch.int64"),
        (
            {0: torch.zeros(2)},
            ValueError,
            r"index 0 must have shape \(3,\).*got shape \(2,\)",
        ),
        ({(0, 0): torch.zeros(1)}, ValueError, r"must have shape \(\).*got shape"),
        ({0: 1.0, (0, 2): 1.0}, ValueError, r"coordinate \(0, 2\) more than once"),
        ({0: torch.nan}, ValueError, "must be finite .* 3 of 3 do not"),
        ({0: torch.inf}, ValueError, "must be finite .* 3 of 3 do not"),
    ],
)
def test_wrong_observations_are_errors(observed, error, message):
    with pytest.raises(error, match=message):
        ClampedEnergy(FunctionEnergy(image, (2, 3)), observed)


@pytest.mark.parametrize("periodic", [False, True])
def test_spins_with_one_clamped(periodic):
    """Five spins in a row or ring: the law of the other four, exactly and by draws."""
    energy = IsingEnergy((5,), 0.7, torch.linspace(-1, 1, 5), periodic=periodic)
    clamped = ClampedEnergy(energy, {2: -1.0})
    number = torch.arange(16)
    x = finite_points(clamped.support, (4,), number, energy.values)
    log_terms = -clamped(x)
    log_partition, exact = clamped.closed_form().log_partition, clamped.closed_form()[1]
    torch.testing.assert_close(log_partition, log_terms.logsumexp(0))
    torch.testing.assert_close(exact.log_prob(x), log_terms.log_softmax(0))
    draws = exact.sample((10_000,))
    index = ((draws + 1) / 2 * 2.0 ** torch.arange(4)).sum(-1).long()
    assert chi_square(index, log_terms.detach()) < 4
    x0 = x[torch.randint(16, (10_000,))]
    moved = Gibbs(20).sweep(clamped, x0)
    index = ((moved + 1) / 2 * 2.0 ** torch.arange(4)).sum(-1).long()
    assert chi_square(index, log_terms.detach()) < 4
    given = EnergyDistribution(energy).condition({2: -1.0})
    torch.testing.assert_close(given.log_prob(x), exact.log_prob(x))
    assert given.sampling_diagnostics().status == "exact"


def test_a_corner_of_a_lattice_clamped():
    energy = PottsEnergy((3, 3), 3, 0.8)
    observed = [((0, slice(1, 3)), torch.tensor([2.0, 1.0]))]
    clamped = ClampedEnergy(energy, observed)
    found = clamped.closed_form().log_partition.item()
    assert found == pytest.approx(enumeration(clamped).value, abs=1e-9)
    sizes = FactorGraphEnergy([2, 3, 4], [((0, 1, 2), torch.randn(2, 3, 4))])
    clamped = ClampedEnergy(sizes, {1: 2.0})
    found = clamped.closed_form().log_partition.item()
    assert found == pytest.approx(enumeration(clamped).value, abs=1e-9)


def test_wrong_energies_are_errors():
    with pytest.raises(TypeError, match="energy must be an Energy, got Normal"):
        ClampedEnergy(dist.Normal(0.0, 1.0), {0: 1.0})
    with pytest.raises(ValueError, match="holds all 1 numbers"):
        ClampedEnergy(FunctionEnergy(torch.square, ()), {...: 1.0})
    gamma = DistributionEnergy(dist.Gamma(torch.ones(2), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"support .*1 of 1 do not, the first is -2"):
        ClampedEnergy(gamma, {0: -2.0})
    counts = constraints.independent(constraints.nonnegative_integer, 1)
    with pytest.raises(NotImplementedError, match="continuous or finite support"):
        ClampedEnergy(FunctionEnergy(lambda x: x.sum(-1), (2,), counts), {0: 1.0})
    with pytest.raises(NotImplementedError, match=r"same interval .*FunctionEnergy"):
        ClampedEnergy(DistributionEnergy(dist.Dirichlet(torch.ones(3))), {0: 0.5})
    mixed = constraints.cat([constraints.positive, constraints.real], 0, [1, 1])
    energy = FunctionEnergy(
        lambda x: x.sum(-1), (2,), constraints.independent(mixed, 1)
    )
    with pytest.raises(NotImplementedError, match="same interval"):
        ClampedEnergy(energy, {0: 0.5})


def test_categories_of_a_mixed_event_are_summed():
    """Given the real columns, and with a gradient in what the energy is made of."""
    parts = [constraints.real, constraints.integer_interval(0, 2), constraints.boolean]
    support = constraints.cat(parts, dim=-1)
    table = torch.randn(3, 2, requires_grad=True)

    def cost(x):
        return x[..., 0] * table[x[..., 1].long(), x[..., 2].long()]

    energy = FunctionEnergy(cost, (3,), support)
    clamped = ClampedEnergy(energy, {0: 2.0})
    known = clamped.closed_form()
    wanted = (-2 * table).flatten().logsumexp(0)
    assert torch.allclose(known.log_partition, wanted)
    (grad,) = torch.autograd.grad(known.log_partition, table)
    assert torch.allclose(grad, -2 * (-2 * table).flatten().softmax(0).reshape(3, 2))
    states = torch.cartesian_prod(torch.arange(3.0), torch.arange(2.0))
    assert torch.allclose(
        known.distribution.log_prob(states), -clamped(states) - wanted
    )
    assert ClampedEnergy(energy, {1: 2}).closed_form() is None
    for index, value in ((1, 3), (1, 0.5), (2, 2)):
        with pytest.raises(ValueError, match="lie in the support"):
            ClampedEnergy(energy, {index: value})
