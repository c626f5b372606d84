"""Closed forms of products: exponential families, Gaussians and mixtures of them."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    MixtureEnergy,
    QuadraticEnergy,
    SumEnergy,
    register_product,
)
from pyro_ebm.energies.closed_form import products as conjugate
from pyro_ebm.energies.closed_form.gaussian import ImproperProductError, gaussian_form
from pyro_ebm.partition import quadrature

T = torch.tensor
# Two parameters, each a pair of tensors, build the two experts of a product.
FAMILIES = {
    "normal": (dist.Normal, [(1.0, 2.0), (-1.0, 0.5)]),
    "log-normal": (dist.LogNormal, [(1.0, 0.7), (-0.5, 0.9)]),
    "half-normal": (dist.HalfNormal, [(1.0,), (0.5,)]),
    "gamma": (dist.Gamma, [(2.0, 3.0), (1.6, 0.5)]),
    "chi-square": (dist.Chi2, [(3.0,), (4.0,)]),
    "exponential": (dist.Exponential, [(3.0,), (0.5,)]),
    "inverse-gamma": (dist.InverseGamma, [(2.0, 3.0), (1.5, 1.0)]),
    "beta": (dist.Beta, [(2.0, 3.0), (1.5, 2.5)]),
    "von-mises": (dist.VonMises, [(2.0, 3.0), (-0.5, 1.5)]),
    "dirichlet": (dist.Dirichlet, [([2.0, 3.0, 1.6],), ([1.5, 1.5, 2.0],)]),
    "bernoulli": (dist.Bernoulli, [(0.2,), (0.6,)]),
    "categorical": (dist.Categorical, [([0.2, 0.3, 0.5],), ([0.1, 0.1, 0.8],)]),
    "one-hot": (dist.OneHotCategorical, [([0.2, 0.3, 0.5],), ([0.1, 0.1, 0.8],)]),
    "geometric": (dist.Geometric, [(0.2,), (0.6,)]),
    "poisson": (dist.Poisson, [(2.0,), (0.5,)]),
}


def experts(name):
    family, parameters = FAMILIES[name]
    return [
        DistributionEnergy(family(*(T(p, dtype=torch.float64) for p in values)))
        for values in parameters
    ]


def log_total(log_density, name):
    """Log of the sum or integral of a density, by brute force."""
    states = {
        "bernoulli": torch.arange(2.0),
        "categorical": torch.arange(3),
        "one-hot": torch.eye(3),
        "geometric": torch.arange(200.0),
        "poisson": torch.arange(100.0),
    }
    if name in states:
        return torch.logsumexp(log_density(states[name]), 0)
    if name == "dirichlet":
        side = torch.linspace(0, 1, 801)[1:-1]
        x, y = torch.meshgrid(side, side, indexing="ij")
        points = torch.stack([x, y, 1 - x - y], -1)[x + y < 1 - 1e-9]
        return torch.logsumexp(log_density(points), 0) - 2 * math.log(800)
    ends = {
        "normal": (-30.0, 30.0),
        "von-mises": (-math.pi, math.pi),
        "beta": (0.0, 1.0),
    }
    low, high = ends.get(name, (0.0, 60.0))
    step = (high - low) / 200_000
    points = torch.arange(200_000) * step + low + step / 2
    return torch.logsumexp(log_density(points), 0) + math.log(step)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (2.0, 0.5), (1.5, -0.5)])
def test_the_product_of_powers_is_in_the_family(name, weights):
    """At every point, and its integral. Planted: the Jacobian's -1 of the log-normal
    left out, the sine of von Mises negated, the rate of the inverse gamma halved."""
    first, second = experts(name)
    energy = weights[0] * first + weights[1] * second
    known = energy.closed_form()
    if name == "poisson" and sum(weights) != 1:
        assert known is None  # the factorial is raised to a power
        return
    if known is None:
        with pytest.raises(ImproperProductError, match="no partition function"):
            energy.proper_closed_form()
        return
    x = first.distribution.sample((20,))
    torch.testing.assert_close(
        known.distribution.log_prob(x), -energy(x) - known.log_partition
    )
    total = log_total(lambda x: -energy(x), name)
    torch.testing.assert_close(known.log_partition, total, atol=2e-3, rtol=0)


def test_every_registered_family_is_covered():
    built = {type(e.distribution) for name in FAMILIES for e in experts(name)}
    for types, _ in conjugate._RULES:
        for family in types:
            assert any(issubclass(b, family) for b in built), family


def test_gamma_and_exponential_are_one_family():
    energy = sum(
        [DistributionEnergy(dist.Exponential(T(r))) for r in (0.5, 1.0)],
        DistributionEnergy(dist.Gamma(T(3.0), 2.0)),
    )
    product = energy.closed_form().distribution
    assert (product.concentration, product.rate) == (3.0, 3.5)


@pytest.mark.parametrize("name", ["normal", "gamma", "beta", "von-mises", "dirichlet"])
def test_gradients_of_log_z(name):
    """In all parameters and in a weight; one fixed point in (2) is enough."""
    family, parameters = FAMILIES[name]
    flat = [
        T(p, dtype=torch.float64).requires_grad_()
        for values in parameters
        for p in values
    ]
    half = len(flat) // 2
    weight = T(0.7, dtype=torch.float64, requires_grad=True)

    def log_partition(weight, *flat):
        first, second = family(*flat[:half]), family(*flat[half:])
        parts = [DistributionEnergy(first), DistributionEnergy(second)]
        return conjugate.product_closed_form(
            list(zip(parts, [weight, 1.2], strict=True))
        ).log_partition

    assert torch.autograd.gradcheck(log_partition, (weight, *flat))


def test_independent_experts_are_multiplied_one_by_one():
    a = dist.Beta(T([[2.0, 3.0], [1.5, 4.0]]), 3.0)
    b = dist.Beta(T([[1.0, 2.0], [2.5, 2.0]]), T([2.0, 1.0]))
    whole = DistributionEnergy(a.to_event(2)) + DistributionEnergy(b.to_event(2))
    known = whole.closed_form()
    assert known.distribution.event_shape == (2, 2)
    one_by_one = sum(
        (
            DistributionEnergy(
                dist.Beta(a.concentration1[i, j], a.concentration0[i, j])
            )
            + DistributionEnergy(
                dist.Beta(b.concentration1[i, j], b.concentration0[i, j])
            )
        )
        .closed_form()
        .log_partition
        for i in range(2)
        for j in range(2)
    )
    torch.testing.assert_close(known.log_partition, one_by_one)


def test_no_partition_function_is_found_whatever_the_rounding():
    """0.1 + 0.2 - 0.3 is not zero in floating point."""
    gamma = lambda: DistributionEnergy(dist.Gamma(T(2.0), 1.3))  # noqa: E731
    normal = lambda: DistributionEnergy(dist.Normal(T(1.0), 0.7))  # noqa: E731
    for build in (gamma, normal):
        energy = SumEnergy([build(), build(), build()], [0.1, 0.2, -0.3])
        assert energy.closed_form() is None
    vector = [dist.MultivariateNormal(torch.ones(2), 0.7 * torch.eye(2))] * 3
    energy = SumEnergy([DistributionEnergy(v) for v in vector], [0.1, 0.2, -0.3])
    with pytest.raises(ImproperProductError, match="precision has the eigenvalue"):
        energy.proper_closed_form()


def test_what_cancels_keeps_its_gradient():
    """The sum of opposite means is zero, and its derivative is not."""
    loc = T(1.0, requires_grad=True)
    product = conjugate.product_closed_form(
        [(DistributionEnergy(dist.Normal(m, 1.0)), 1.0) for m in (loc, T(-1.0))]
    )
    (grad,) = torch.autograd.grad(product.distribution.loc, loc)
    assert grad == 0.5


def test_opposite_directions_are_uniform_on_the_circle():
    experts = [DistributionEnergy(dist.VonMises(T(a), T(2.0))) for a in (0.0, math.pi)]
    product = (experts[0] + experts[1]).closed_form().distribution
    x = torch.linspace(-3, 3, 5)
    expected = torch.full((5,), -math.log(2 * math.pi))
    torch.testing.assert_close(product.log_prob(x), expected)


# Gaussians ---------------------------------------------------------------------------


def gaussians():
    root = torch.randn(3, 3)
    covariance = torch.eye(3) + root @ root.mT
    diagonal = dist.Normal(torch.randn(3), torch.rand(3) + 0.5).to_event(1)
    low_rank = dist.LowRankMultivariateNormal(
        torch.randn(3), torch.randn(3, 1), torch.ones(3)
    )
    return [
        QuadraticEnergy(torch.randn(3), covariance),
        DistributionEnergy(dist.MultivariateNormal(torch.randn(3), covariance)),
        DistributionEnergy(diagonal),
        DistributionEnergy(low_rank),
    ]


def test_gaussians_of_all_kinds():
    parts, weights = gaussians(), [1.0, 0.5, 2.0, -0.1]
    energy = SumEnergy(parts, weights, offset=1.5)
    known = energy.closed_form()
    x = torch.randn(6, 3)
    torch.testing.assert_close(
        known.distribution.log_prob(x), -energy(x) - known.log_partition
    )
    hidden = FunctionEnergy(energy, (3,))
    assert abs(quadrature(hidden).value - known.log_partition) < 1e-5
    nested = (energy - 2.0).exp().energy + energy
    twice = (2.0 * energy - 2.0).closed_form()
    torch.testing.assert_close(nested.closed_form().log_partition, twice.log_partition)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_gaussians_over_other_events(shape):
    dim = len(shape)
    energies = [
        DistributionEnergy(dist.Normal(torch.randn(shape), 1.3).to_event(dim)),
        # A learned weight keeps the sum from being flat: no rule, but a form.
        nn.Parameter(T(0.5))
        * DistributionEnergy(dist.Normal(torch.randn(shape), 0.7).to_event(dim)),
    ]
    known = SumEnergy(energies).closed_form()
    assert known.distribution.event_shape == shape
    x = torch.randn((4, *shape))
    torch.testing.assert_close(
        known.distribution.log_prob(x), -SumEnergy(energies)(x) - known.log_partition
    )


def mixture(locs, scale=0.7):
    parts = [QuadraticEnergy(loc, torch.eye(2) / scale**2) for loc in locs]
    return MixtureEnergy(parts, torch.randn(len(parts)))


def test_mixtures_multiply_to_all_pairs():
    """Planted: pairs that are weighted by their parts, without their overlap."""
    first, second = mixture(2 * torch.randn(3, 2)), mixture(2 * torch.randn(2, 2), 1.1)
    flat = DistributionEnergy(dist.Normal(torch.zeros(2), 3.0).to_event(1))
    energy = first + second + 0.5 * flat
    known = energy.closed_form()
    assert known.distribution.component_distribution.batch_shape == (6,)
    assert abs(quadrature(FunctionEnergy(energy, (2,))).value - known.log_partition) < (
        1e-5
    )
    x = torch.randn(6, 2)
    torch.testing.assert_close(
        known.distribution.log_prob(x), -energy(x) - known.log_partition
    )


def test_powers_of_mixtures():
    energy = mixture(torch.randn(3, 2))
    squared = (2.0 * energy).closed_form()
    value = quadrature(FunctionEnergy(2.0 * energy, (2,))).value
    assert abs(squared.log_partition - value) < 1e-5
    for weight in (0.5, -1.0, 1.5):
        assert (weight * energy).closed_form() is None


def test_mixtures_of_pyro():
    """One number and a mixture of diagonal normals."""
    kind = dist.Categorical(T([0.3, 0.7]))
    scalar = dist.MixtureSameFamily(kind, dist.Normal(T([-1.0, 2.0]), T([0.5, 1.0])))
    parts = dist.Normal(torch.randn(2, 3), 0.5).to_event(1)
    vector = dist.MixtureSameFamily(kind, parts)
    for expert, other in (
        (scalar, dist.Normal(T(0.3), 1.0)),
        (vector, dist.Normal(torch.zeros(3), 1.0).to_event(1)),
    ):
        energy = DistributionEnergy(expert) + DistributionEnergy(other)
        known = energy.closed_form()
        x = other.sample((5,))
        torch.testing.assert_close(
            known.distribution.log_prob(x), -energy(x) - known.log_partition
        )


def test_too_many_components_are_left_to_sampling(monkeypatch):
    energy = mixture(torch.randn(3, 2))
    monkeypatch.setattr("pyro_ebm.energies.closed_form.gaussian._MAX_NUMBERS", 20)
    assert gaussian_form(energy) is not None
    assert (energy + energy).closed_form() is None


def test_single_precision_is_not_lost_far_from_the_origin():
    """Constants of 5e5 cancel; in single precision the value was wrong by 0.06."""
    far = torch.full((2,), 1000.0, dtype=torch.float32)
    parts = [QuadraticEnergy(far), QuadraticEnergy(far + 1)]
    known = (parts[0] + parts[1]).closed_form()
    assert known.log_partition.dtype == torch.float32
    # Of each number -1/4 + log(pi) / 2.
    expected = math.log(math.pi) - 0.5
    assert abs(known.log_partition.item() - expected) < 1e-5


def test_gradients_of_gaussian_log_z():
    parts = gaussians()[:1] + [QuadraticEnergy(torch.randn(3))]
    weight = nn.Parameter(T(0.7))
    energy = SumEnergy(parts, [weight, 1.0])
    parameters = list(energy.parameters())
    grads = torch.autograd.grad(energy.closed_form().log_partition, parameters)
    draws = energy.closed_form().distribution.sample((40_000,))
    terms = torch.autograd.grad(-energy(draws).mean(), parameters)  # -E[df]
    for grad, estimate in zip(grads, terms, strict=True):
        assert (grad - estimate).abs().max() < 0.05


# Rules of others ---------------------------------------------------------------------


def test_a_rule_is_used_for_its_types_only():
    calls = []

    @register_product(dist.Cauchy, dist.StudentT)
    def rule(experts, weights):
        calls.append(len(experts))
        if len(experts) > 2:
            raise ValueError("too many")
        return experts[0] if weights[0] == 1 and weights[1] == 0 else None

    cauchy = DistributionEnergy(dist.Cauchy(T(0.0), 1.0))
    student = DistributionEnergy(dist.StudentT(T(3.0), T(0.0), 1.0))
    normal = DistributionEnergy(dist.Normal(T(0.0), 1.0))
    assert (cauchy + student).closed_form() is None
    assert SumEnergy([cauchy, student], [1.0, 0.0]).closed_form().log_partition == 0
    assert (cauchy + normal).closed_form() is None
    with pytest.raises(
        ImproperProductError, match=r"\(Cauchy, StudentT, Cauchy\).*too"
    ):
        SumEnergy([cauchy, student, cauchy]).proper_closed_form()
    assert calls == [2, 2, 3]


def test_later_rules_come_first():
    register_product(dist.Normal)(lambda experts, weights: None)
    normal = DistributionEnergy(dist.Normal(T(0.0), 1.0))
    # No rule, but still a Gaussian.
    assert isinstance((normal + normal).closed_form().distribution, dist.Normal)


@pytest.mark.parametrize(
    "build",
    [
        lambda: dist.Bernoulli(0.5),
        lambda: dist.Bernoulli(logits=torch.zeros(3)).to_event(1),
        lambda: dist.Bernoulli(torch.tensor([0.5, 0.2])).to_event(1),
        lambda: dist.Categorical(logits=torch.zeros(3)),
    ],
)
def test_a_fair_coin_has_a_product(build):
    """Its mode is nan in torch."""
    distribution = build()
    energy = DistributionEnergy(distribution)
    closed = (energy + energy).closed_form()
    states = distribution.enumerate_support() if not distribution.event_shape else None
    if states is None:
        sites = distribution.base_dist.batch_shape[0]
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * sites)
    log_q = 2 * distribution.log_prob(states)
    wanted = log_q.logsumexp(0)
    torch.testing.assert_close(closed.log_partition, wanted)
    torch.testing.assert_close(closed.distribution.log_prob(states), log_q - wanted)
