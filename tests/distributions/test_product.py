"""Products of experts: laws, log Z, draws, gradients, and what is refused."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch import nn

import pyro_ebm
from pyro_ebm import EnergyDistribution, EnergyModel
from pyro_ebm.core import Status
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.distributions import MixtureOfExperts, ProductOfExperts
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    IsingEnergy,
    LinearMapEnergy,
    MixtureEnergy,
    NeuralEnergy,
    PartEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
)
from pyro_ebm.infer import Learn, MaximumLikelihood
from pyro_ebm.mcmc import HMC, IndependentChains
from pyro_ebm.partition import LogPartitionEstimate, estimate, quadrature
from pyro_ebm.testing import CountingEnergy, assert_moments
from pyro_ebm.testing.grid import GridDensity

# log Z, mean and standard deviation of the unnormalised product of N(0, 1), N(2, 1).
LOG_Z, MEAN, SD = -0.42763506, 1.0, 0.70710678


def bowl(loc, event_shape=()):
    """Minus the log of an unnormalised Gaussian, whose closed form nobody knows."""
    dim = len(event_shape)

    def fn(x):
        square = (x - loc) ** 2 / 2
        return square.sum(list(range(-dim, 0))) if dim else square

    return FunctionEnergy(fn, event_shape)


def quartic(scale=1.0):
    return FunctionEnergy(lambda x: scale * x**4 - x, ())


@pytest.fixture
def p():
    return EnergyDistribution(quartic())


@pytest.fixture
def q():
    return EnergyDistribution(bowl(1.5))


X = torch.linspace(-2, 2, 9, dtype=torch.float64)


def unnormalised(product, x=X):
    return product.unnormalized_log_prob(x)


# The laws ----------------------------------------------------------------------------


def test_energies_add_up_and_distributions_bring_their_density(p, q):
    normal = dist.Normal(0.5, 2.0)
    product = p * normal * q**0.5 / q
    expected = -p.energy(X) + normal.log_prob(X) + 0.5 * q.energy(X)
    torch.testing.assert_close(unnormalised(product), expected)
    assert product.log_prob(X).equal(unnormalised(product))  # log Z is unknown
    assert not product.is_normalized


@pytest.mark.parametrize(
    "other",
    [
        lambda: EnergyDistribution(bowl(1.0)),
        lambda: EnergyModel(bowl(1.0)),
        lambda: bowl(1.0),
        lambda: dist.Normal(1.0, 2.0),
        lambda: dist.TransformedDistribution(
            dist.Normal(1.0, 2.0), [dist.transforms.AffineTransform(1.0, 2.0)]
        ),
    ],
    ids=["distribution", "model", "energy", "pyro", "transformed"],
)
def test_commutes_with_any_factor_on_either_side(p, other):
    other = other()
    left, right = other * p, p * other
    assert isinstance(left, ProductOfExperts)
    assert unnormalised(left).equal(unnormalised(right))
    torch.testing.assert_close(unnormalised(other / p), unnormalised(p / other) * -1)
    assert [t.expert for t in left.terms] == [other, p]


def test_associates(p, q):
    normal = dist.Normal(0.0, 1.0)
    one, two = (p * normal) * q, p * (normal * q)
    assert [t.key for t in one.terms] == [t.key for t in two.terms]
    assert unnormalised(one).equal(unnormalised(two))
    torch.testing.assert_close(unnormalised(q * normal * p), unnormalised(one))


def test_power_one_is_the_identity(p, q):
    assert p**1 is p
    assert p**1.0 is p
    product = (p * q).with_log_partition(1.5)
    assert product**1 is product
    assert unnormalised((p * q) ** 1).equal(unnormalised(p * q))


def test_powers_multiply_and_distribute(p, q):
    assert [t.weight for t in ((p**0.5) ** 3.0).terms] == [1.5]
    product = (p**0.5 * q) ** 2 / p
    assert [t.weight for t in product.terms] == [2.0]
    torch.testing.assert_close(unnormalised(product), 2 * unnormalised(q))


def test_power_zero_is_one(p, q):
    normal = dist.Normal(0.5, 2.0)
    for product in (p**0 * normal, normal * p**0):
        assert [t.expert for t in product.terms] == [normal]
        assert product.log_prob(X).equal(normal.log_prob(X))
        assert product.is_normalized
    assert p**0 * q is q
    for alone in (p**0, p / p):
        for use in (
            lambda d: d.log_prob(X),
            lambda d: d.sample(),
            lambda d: d.closed_form(),
        ):
            with pytest.raises(ValueError, match=r"is flat.*Multiply it by a base"):
                use(alone)
    flat = ProductOfExperts([dist.Beta(2.0, 3.0)], [0.0])
    assert flat.log_prob(torch.tensor([0.2, 0.9])).abs().max() < 1e-6


def test_what_is_divided_out_again_cancels(p, q):
    normal = dist.Normal(0.0, 1.0)
    assert p * q / q is p
    assert p * normal / normal is p
    assert q / p * p is q
    model = EnergyModel(bowl(0.0))
    assert p * model() / model() is p  # two views of one energy
    assert p**0.1 * p**0.2 / p**0.3 * q is q  # whatever the rounding
    assert len((p * dist.Normal(0.0, 1.0) / normal).terms) == 3  # equal, not the same


def test_equal_factors_are_collected(p):
    counting = CountingEnergy(p.energy)
    p = EnergyDistribution(counting)
    product = p * dist.Normal(0.0, 1.0) * p
    assert [t.weight for t in product.terms] == [2.0, 1.0]
    product.log_prob(X)
    assert counting.num_values == len(X)


def test_a_constant_moves_only_log_z(p, q):
    shifted = EnergyDistribution(p.energy + 3.0) * q
    one, other = estimate(shifted), estimate(p * q)
    assert abs(one.value - other.value + 3.0) < 1e-5
    torch.testing.assert_close(
        shifted.with_log_partition(one).log_prob(X),
        (p * q).with_log_partition(other).log_prob(X),
    )
    quadratic = QuadraticEnergy(torch.zeros(1))
    draws, log_partitions = [], []
    for energy in (quadratic, quadratic - 4.0):
        pyro.set_rng_seed(3)
        product = ProductOfExperts([energy, quadratic])
        draws.append(product.sample((5,)))
        log_partitions.append(product.log_partition)
    assert draws[0].equal(draws[1])
    torch.testing.assert_close(log_partitions[1], log_partitions[0] + 4.0)


def test_gaussian_laws_hold_for_log_z():
    a, b, c = (
        dist.Normal(torch.tensor(m), s) for m, s in ((0.0, 1.0), (2.0, 0.7), (1.0, 2.0))
    )
    one = ProductOfExperts([a, b, c])
    for other in (
        ProductOfExperts([c, a, b]),
        ProductOfExperts([ProductOfExperts([a, b]), c]),
        ProductOfExperts([ProductOfExperts([a, b]) ** 0.5, c, a, b], [1, 1, 0.5, 0.5]),
    ):
        torch.testing.assert_close(other.log_partition, one.log_partition)
    pair = ProductOfExperts([a, b])
    torch.testing.assert_close((pair / b).log_partition, torch.tensor(0.0))


def test_the_formula_is_shown(p):
    model = EnergyModel(NeuralEnergy((), (4,)))
    product = dist.Normal(0.0, 1.0) * p**0.5 / model
    assert repr(product).startswith(
        "ProductOfExperts(Normal(loc: 0.0, scale: 1.0) * "
        "EnergyDistribution(FunctionEnergy) ** 0.5 / EnergyModel(NeuralEnergy), "
    )
    vector = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    assert "Normal(...) ** 0.5 * FunctionEnergy(...)" in repr(
        ProductOfExperts([vector, bowl(0.0, (3,))], [0.5, 1.0])
    )


# Closed forms ------------------------------------------------------------------------


def test_two_normals_by_the_closed_form():
    quadratic = [QuadraticEnergy(torch.tensor([m])) for m in (0.0, 2.0)]
    product = EnergyDistribution(quadratic[0]) * quadratic[1]
    assert abs(product.log_partition.item() - LOG_Z) < 1e-8
    assert product.is_normalized
    known = product.closed_form().distribution
    torch.testing.assert_close(known.loc, torch.tensor([MEAN]))
    torch.testing.assert_close(known.variance, torch.tensor([SD**2]))
    assert_moments(
        product.sample((4000,)), MEAN, SD**2, fourth_central_moment=3 * SD**4
    )
    assert estimate(product).status == "exact"
    # As normalised distributions the constant is another, the distribution the same.
    normals = ProductOfExperts([dist.Normal(m, torch.tensor(1.0)) for m in (0.0, 2.0)])
    torch.testing.assert_close(
        normals.log_partition, torch.tensor(LOG_Z - math.log(2 * math.pi))
    )
    torch.testing.assert_close(normals.log_prob(X), product.log_prob(X[:, None]))


@pytest.mark.parametrize("method", ["auto", "smc", "importance"])
def test_two_normals_by_the_general_route(method):
    product = EnergyDistribution(bowl(0.0)) * EnergyDistribution(bowl(2.0))
    assert product.closed_form() is None
    result = product.estimate_log_partition(100_000, method=method, progress_bar=False)
    assert result.is_reliable
    assert result.lower - 1e-6 < LOG_Z < result.upper + 1e-6
    assert result.std_error < 0.05


def test_draws_of_two_normals_by_chains():
    """Planted: the draws of one expert alone, and those of the sum of the densities."""
    product = EnergyDistribution(bowl(0.0)) * EnergyDistribution(bowl(2.0))
    assert_moments(
        product.sample((2000,)), MEAN, SD**2, fourth_central_moment=3 * SD**4
    )
    alone = EnergyDistribution(bowl(0.0)).sample((2000,))
    either = EnergyDistribution(MixtureEnergy([bowl(0.0), bowl(2.0)])).sample((2000,))
    for wrong in (alone, either):  # planted
        with pytest.raises(AssertionError):
            assert_moments(wrong, MEAN, SD**2)


def test_conjugate_experts():
    product = ProductOfExperts([dist.Beta(2.0, 3.0), dist.Beta(4.0, 1.5)], [1.0, 0.5])
    closed = product.closed_form().distribution
    torch.testing.assert_close(closed.concentration1, torch.tensor(3.5))
    x = torch.rand(5)
    torch.testing.assert_close(product.log_prob(x), closed.log_prob(x))
    assert estimate(product).method == "closed form"
    states = dist.Categorical(torch.tensor([0.2, 0.8]))
    squared = ProductOfExperts([states, states])
    torch.testing.assert_close(squared.log_partition.exp(), torch.tensor(0.68))
    assert squared.sample((3,)).shape == (3,)


def test_no_partition_function_by_a_closed_form():
    narrow, wide = (
        dist.Normal(0.0, torch.tensor(0.5)),
        dist.Normal(0.0, torch.tensor(1.0)),
    )
    quotient = ProductOfExperts([wide, narrow], [1.0, -1.0])
    for use in (lambda: quotient.log_prob(X), quotient.sample, quotient.closed_form):
        with pytest.raises(
            ValueError, match=r"no partition function: its precision.*-3"
        ):
            use()
    with pytest.warns(UnreliableWarning, match="not_normalizable"):
        result = quotient.estimate_log_partition()
    assert (result.status, result.value) == ("not_normalizable", math.inf)
    # A product with a third expert is fine again.
    third = dist.Normal(0.0, torch.tensor(0.4))
    torch.testing.assert_close(
        (quotient * third).closed_form().distribution.variance,
        torch.tensor(1 / (1 - 4 + 1 / 0.16)),
    )


def test_a_quotient_without_closed_form_is_checked_when_estimated():
    event = (3,)
    quotient = EnergyDistribution(bowl(0.0, event)) / (
        EnergyDistribution(bowl(0.0, event)) ** 2
    )
    with pytest.warns(UnreliableWarning, match="not_normalizable"):
        result = quotient.estimate_log_partition(100_000, progress_bar=False)
    assert result.status == "not_normalizable"
    fine = (
        EnergyDistribution(bowl(0.0, event))
        / EnergyDistribution(bowl(0.5, event)) ** 0.5
    )
    result = fine.estimate_log_partition(100_000, progress_bar=False)
    precision, information, constant = 0.5, -0.25, 0.0625
    truth = (
        3 * (information**2 / precision + math.log(2 * math.pi / precision)) / 2
        + 3 * constant
    )
    assert result.lower < truth < result.upper


# Estimates of log Z ------------------------------------------------------------------


def mixture_energy(locs, scale, logits):
    precision = torch.eye(locs.shape[-1]) / scale**2
    return MixtureEnergy([QuadraticEnergy(loc, precision) for loc in locs], logits)


@pytest.fixture
def mixtures():
    """Two mixtures in three dimensions, and their product in closed form."""
    pyro.set_rng_seed(1)
    first = mixture_energy(2.5 * torch.randn(3, 3), 1.0, torch.randn(3))
    second = mixture_energy(2.5 * torch.randn(2, 3), 1.5, torch.randn(2))
    return first, second, (first + second).closed_form()


WIDE = dist.Normal(torch.zeros(3, dtype=torch.float64), 4.0).to_event(1)


@pytest.mark.filterwarnings("ignore::pyro_ebm.core.errors.UnreliableWarning")
@pytest.mark.parametrize(
    ("seeds", "least"), [(2, 2), pytest.param(10, 9, marks=pytest.mark.slow)]
)
def test_log_z_of_two_mixtures_is_in_its_interval(mixtures, seeds, least):
    """In at least 9 of 10 seeds; and it is not the sum of the experts' own.

    Planted: the logits of the second mixture left out of what is estimated."""
    first, second, truth = mixtures
    hidden = [FunctionEnergy(f, (3,)) for f in (first, second)]
    product = ProductOfExperts(hidden, base=WIDE)
    covered = 0
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        result = product.estimate_log_partition(100_000, progress_bar=False)
        covered += result.lower < truth.log_partition < result.upper
        assert result.std_error < 0.05
    assert covered >= least
    own = first.closed_form().log_partition + second.closed_form().log_partition
    assert abs(own - truth.log_partition) > 5


def cells(truth, x):
    """The component to which a draw most likely belongs."""
    mixture = truth.distribution
    log_joint = mixture.component_distribution.log_prob(x[..., None, :])
    return (log_joint + mixture.mixture_distribution.logits).argmax(-1)


def chi_square(truth, draws):
    """Statistic and degrees of freedom of the cells, against exact draws."""
    num = len(truth.distribution.mixture_distribution.probs)
    exact = cells(truth, truth.distribution.sample((100_000,))).bincount(minlength=num)
    seen = cells(truth, draws).bincount(minlength=num)
    kept = exact > 1000
    expected = exact[kept] / exact[kept].sum() * seen[kept].sum()
    return ((seen[kept] - expected) ** 2 / expected).sum(), int(kept.sum()) - 1


def passes(truth, draws):
    statistic, degrees = chi_square(truth, draws)
    return statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_masses_of_the_modes_of_a_product(mixtures):
    """Of draws by the closed form. Planted: equal weights, and those of the pairs
    without their overlap."""
    first, second, truth = mixtures
    exact = ProductOfExperts([first, second])
    assert passes(truth, exact.sample((2000,)))
    weights = [f.closed_form().distribution.mixture_distribution for f in mixtures[:2]]
    pairs = (weights[0].logits[:, None] + weights[1].logits).flatten()
    for logits in (torch.zeros(6), pairs):  # planted
        wrong = copy.copy(truth.distribution)
        wrong._mixture_distribution = dist.Categorical(logits=logits)
        assert not passes(truth, wrong.sample((500,)))


def test_masses_of_the_modes_by_chains(mixtures):
    """Of a product without closed form. Planted: the draws of one expert alone."""
    first, second, truth = mixtures
    hidden = [FunctionEnergy(f, (3,)) for f in (first, second)]
    chains = IndependentChains(WIDE, HMC(num_leapfrog=4), num_steps=60)
    assert passes(truth, ProductOfExperts(hidden, sampler=chains).sample((500,)))
    assert not passes(truth, ProductOfExperts([first]).sample((500,)))  # planted


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_disagree_are_right_or_flagged(seed):
    """Means six standard deviations apart, the base at one of them."""
    pyro.set_rng_seed(seed)
    normal = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    far = bowl(torch.full((4,), 3.0), (4,))  # 6 sd in Euclidean distance
    product = normal * EnergyDistribution(far)
    result = product.estimate_log_partition(100_000, progress_bar=False)
    truth = -4 * 9 / 4 - 2 * math.log(2)
    assert not result.is_reliable or result.lower < truth < result.upper


def test_experts_that_agree_measure_log_z_themselves():
    """Draws of a mixture of both: unbiased, and no gradient is needed."""
    energy = CountingEnergy(FunctionEnergy(lambda x: 0.1 * x.cos().sum(-1), (3,)))
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    student = dist.StudentT(torch.full((3,), 5.0)).to_event(1)
    product = ProductOfExperts([normal, student, energy], [0.2, 1.0, 1.0])
    result = product.estimate_log_partition(20_000)
    assert result.method == "importance sampling from the experts"
    assert (energy.num_values, energy.num_gradients) == (20_000, 0)
    assert result.num_evaluations == 20_000

    def log_density(x):
        one = dist.Normal(torch.zeros(()), 1.0)
        other = dist.StudentT(torch.tensor(5.0))
        return 0.2 * one.log_prob(x) + other.log_prob(x) - 0.1 * x.cos()

    truth = 3 * GridDensity(log_density, -40, 40).log_integral
    assert abs(result.value - truth) < 4 * result.std_error
    assert 0 < result.std_error < 0.02


def test_infinitely_many_states():
    """Of Poisson experts, whose factorials multiply: a Bessel function."""
    product = ProductOfExperts(
        [dist.Poisson(torch.tensor(2.0)), dist.Poisson(torch.tensor(3.0))]
    )
    assert product.closed_form() is None
    result = product.estimate_log_partition(20_000)
    truth = math.log(torch.special.i0(torch.tensor(2 * 6**0.5))) - 5
    assert abs(result.value - truth) < 4 * result.std_error


def test_estimates_are_taken_over(p, q):
    product = p * q
    known = product.with_log_partition(product.estimate_log_partition())
    assert known.is_normalized
    line = torch.linspace(-6, 6, 2001)
    total = known.log_prob(line).logsumexp(0) + math.log(12 / 2000)
    assert abs(total) < 1e-5
    assert "log Z: -" in repr(known) or "log Z: 0" in repr(known)
    assert known.expand([3]).with_log_partition(1.0).batch_shape == (3,)


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.9])
def test_hoelders_bound(weight):
    experts = [dist.Normal(torch.tensor(m), s) for m, s in ((0.0, 1.0), (1.0, 2.0))]
    product = ProductOfExperts(experts, [weight, 1 - weight])
    assert product.log_partition < product.upper_bound().value == 0
    quadratic = [QuadraticEnergy(torch.tensor([m])) for m in (0.0, 2.0)]
    same = [quadratic[0], QuadraticEnergy(torch.tensor([0.0]))]
    for pair, tight in ((quadratic, False), (same, True)):
        product = ProductOfExperts(pair, [weight, 1 - weight])
        gap = product.upper_bound().value - product.log_partition.item()
        assert abs(gap - weight * (1 - weight) * 2 * (not tight)) < 1e-12


def test_hoelders_bound_takes_estimates():
    known = LogPartitionEstimate(1.0, 0.2, 0.6, 1.4, 100.0, Status.OK, "x", 1)
    product = dist.Normal(0.0, 1.0) * EnergyDistribution(quartic(), known) ** 0.5
    with pytest.raises(ValueError, match="add up to 1 for Hoelder"):
        product.upper_bound()
    halves = ProductOfExperts([t.expert for t in product.terms], [0.5, 0.5])
    assert halves.upper_bound() == (0.5, 0.1)
    unknown = ProductOfExperts([dist.Normal(0.0, 1.0), quartic()], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"FunctionEnergy.* is not\. Estimate it"):
        unknown.upper_bound()


# The base ----------------------------------------------------------------------------


def test_the_base_is_the_widest_normalised_expert(p):
    narrow, wide = dist.Normal(0.0, 1.0), dist.Normal(0.0, 3.0)
    assert (narrow * p * wide).base is wide
    assert (narrow * p / wide).base is narrow
    tempered = ProductOfExperts([narrow, p, wide], [0.01, 1, 1]).base
    torch.testing.assert_close(tempered.scale, torch.tensor(10.0))
    gaussian = QuadraticEnergy(torch.tensor([1.0]))
    product = EnergyDistribution(gaussian) * FunctionEnergy(
        lambda x: x[..., 0].abs(), (1,)
    )
    assert isinstance(product.base, dist.MultivariateNormal)
    base = dist.Normal(5.0, 1.0)
    assert ProductOfExperts([narrow, p], base=base).base is base
    assert product.sampler.base is product.base


def test_the_base_is_a_mixture_where_the_widest_is_unknown(p):
    flow = dist.TransformedDistribution(
        dist.Normal(torch.tensor(0.0), 1.0), [dist.transforms.AffineTransform(0.0, 2.0)]
    )
    product = p * flow * dist.Normal(torch.tensor(0.0), 1.0)
    assert isinstance(product.base, MixtureOfExperts)
    assert product.base.log_prob(X).shape == X.shape
    assert product.sample((3,)).shape == (3,)


def test_models_bring_their_base(p):
    base = dist.Normal(0.0, 4.0)
    model = EnergyModel(quartic(), base)
    assert (p * model).base is base
    assert (p * model()).base is base
    assert (p * NeuralEnergy((), (4,), base=base)).base is base
    sampled = EnergyDistribution(quartic(), sampler=IndependentChains(base))
    assert (sampled * bowl(0.0)).base is base
    standard = (p * bowl(0.0)).base
    assert (standard.loc, standard.scale) == (0, 1)
    assert (p * bowl(0.0)).terms.normalised() == []


def test_positive_and_discrete_supports():
    gamma = dist.Gamma(torch.tensor(3.0), 2.0)
    energy = FunctionEnergy(lambda x: x**2, (), dist.constraints.positive)
    product = gamma * EnergyDistribution(energy)
    assert product.base is gamma
    assert (product.sample((20,)) > 0).all()
    lattices = [IsingEnergy((2, 2), c, periodic=False) for c in (0.2, 0.3)]
    product = ProductOfExperts(lattices)
    assert product.base.energy is lattices[0]  # each is exact, and both as wide
    whole = IsingEnergy((2, 2), 0.5, periodic=False)
    assert abs(product.estimate_log_partition().value - estimate(whole).value) < 1e-6


# Experts on parts --------------------------------------------------------------------


def test_experts_on_parts_make_a_random_field():
    """Gaussian pairs along a chain, a projection, and a prior over everything."""
    pair = QuadraticEnergy(torch.zeros(2), torch.tensor([[1.0, -0.9], [-0.9, 1.0]]))
    prior = dist.Normal(torch.zeros(5), 3.0).to_event(1)
    total = LinearMapEnergy(dist.Normal(torch.tensor(2.0), 0.1), torch.ones(5))
    pairs = [PartEnergy(pair, (5,), slice(i, i + 2)) for i in range(4)]
    field = ProductOfExperts([prior, total, *pairs], [1, 1, 0.5, 0.5, 0.5, 0.5])
    known = field.closed_form()
    precision = torch.eye(5) / 9 + 100 * torch.ones(5, 5)
    for i in range(4):
        precision[i : i + 2, i : i + 2] += 0.5 * pair.precision.detach()
    torch.testing.assert_close(known.distribution.precision_matrix, precision)
    x = torch.randn(6, 5)
    torch.testing.assert_close(field.log_prob(x), known.distribution.log_prob(x))
    draws = field.sample((3000,))
    assert_moments(draws, known.distribution.loc, known.distribution.variance)
    hidden = [FunctionEnergy(f, (5,)) for f in (total, *pairs)]
    general = ProductOfExperts([prior, *hidden], [1, 1, 0.5, 0.5, 0.5, 0.5])
    result = general.estimate_log_partition(100_000, progress_bar=False)
    assert result.lower < known.log_partition < result.upper


# Cost --------------------------------------------------------------------------------


def test_each_expert_is_evaluated_once():
    counting = [CountingEnergy(bowl(m)) for m in (0.0, 2.0)]
    product = EnergyDistribution(counting[0]) * counting[1]
    product.log_prob(torch.randn(7))
    assert [(c.num_values, c.num_gradients) for c in counting] == [(7, 0)] * 2
    product.energy.value_and_grad(torch.randn(5))
    assert [(c.num_values, c.num_gradients) for c in counting] == [(7, 5)] * 2
    kernel = HMC(0.5, num_leapfrog=4)
    state = kernel.init(product.energy, torch.randn(3))
    for counted in counting:
        counted.reset()
    kernel.step(product.energy, state)
    assert [c.num_gradients for c in counting] == [3 * kernel.num_gradients] * 2
    product.sample((2,))
    assert counting[0].num_gradients == counting[1].num_gradients


# In models ---------------------------------------------------------------------------


class Well(nn.Module):
    def __init__(self, a, power):
        super().__init__()
        self.a, self.power = nn.Parameter(torch.tensor(a)), power

    def forward(self, x):
        return self.a * (x - 0.3) ** self.power


def expert_models():
    return [
        EnergyModel(FunctionEnergy(Well(a, power), ()), dist.Normal(0.0, 2.0))
        for a, power in ((0.4, 2), (0.2, 4))
    ]


def slopes(x, weight):
    """Derivatives of the energy below in both amplitudes and the weight."""
    x = x - 0.3
    return [x**2, weight * x**4, 0.2 * x**4]


def test_maximum_likelihood_reaches_the_parameters_of_all_experts():
    """Two models, a fixed base and a learned weight, against a grid.

    Planted: the second expert left out of the second term of (1.16)."""
    models, weight = expert_models(), nn.Parameter(torch.tensor(0.7))
    data = torch.randn(40)
    base = dist.Normal(0.0, 2.0)

    def model(data):
        for k, part in enumerate(models):
            pyro.module(f"expert_{k}", part)
        learned = pyro.param("weight", weight)
        product = base * models[0]() * models[1]() ** learned
        assert product.owner is None
        with pyro.plate("data", len(data)):
            pyro.sample("x", product, obs=data)

    objective = MaximumLikelihood(num_chains=4000, num_steps=30, restart_fraction=0.0)
    learner = pyro_ebm.infer.Learn(model, objective)
    for _ in range(2):  # chains arrive
        loss = Trace_ELBO().differentiable_loss(learner, lambda data: None, data)
    parameters = [models[0].energy.fn.a, models[1].energy.fn.a, weight]
    seen = torch.autograd.grad(loss, parameters)

    energy = ProductOfExperts([base, *models], [1, 1, weight]).energy
    grid = torch.linspace(-9, 9, 6001)
    log_partition = torch.logsumexp(-energy(grid), 0)
    exact = torch.autograd.grad(energy(data).sum() + 40 * log_partition, parameters)
    mass = (-energy(grid).detach()).softmax(0)
    for slope, got, truth in zip(slopes(grid, 0.7), seen, exact, strict=True):
        variance = mass @ slope**2 - (mass @ slope) ** 2
        std_error = 40 * (variance / 4000).sqrt()
        assert abs(got - truth) < 4 * std_error
        assert std_error < 0.2 * (40 * mass @ slope)  # planted: that would be missing


def test_svi_fits_both_experts():
    """To data from known amplitudes; PCD with the product's base."""
    truth = GridDensity(lambda x: -0.8 * x**2 - 0.1 * x**4, -6, 6)
    data = truth.sample((2000,)) + 0.3
    models = expert_models()

    def model(data):
        for k, part in enumerate(models):
            pyro.module(f"expert_{k}", part)
        with pyro.plate("data", len(data)):
            pyro.sample("x", models[0] * models[1], obs=data)

    svi = SVI(
        Learn(model, MaximumLikelihood(num_chains=256, num_steps=3)),
        lambda data: None,
        pyro.optim.Adam({"lr": 0.02}),
        loss=Trace_ELBO(),
    )
    for _ in range(150):
        svi.step(data)
    product = models[0] * models[1]
    with torch.no_grad():
        value = estimate(product).value
        known = product.with_log_partition(value)
        fitted = known.log_prob(data).mean()
    best = (-0.8 * (data - 0.3) ** 2 - 0.1 * (data - 0.3) ** 4).mean()
    assert abs(fitted - (best - truth.log_integral)) < 0.01


def test_a_product_is_learned_with_its_log_z_by_a_model():
    models = expert_models()
    product = models[0] * models[1]
    tracked = EnergyModel(product.energy, product.base)
    pyro_ebm.fit(tracked, torch.randn(500), num_steps=30, progress_bar=False)
    seen = tracked().log_partition.item()
    assert abs(seen - quadrature(tracked.energy).value) < 0.2
    assert models[0].energy.fn.a.grad is not None


def test_gaussian_products_have_the_whole_gradient_without_a_handler():
    quadratic, loc = (
        QuadraticEnergy(torch.zeros(1)),
        torch.tensor(1.0, requires_grad=True),
    )
    x = torch.randn(5, 1)
    normal = dist.Normal(loc.reshape(1), 2.0).to_event(1)
    product = EnergyDistribution(quadratic) * normal
    parameters = [loc, *quadratic.parameters()]
    grads = torch.autograd.grad(
        product.log_prob(x).sum(), parameters, allow_unused=True
    )
    exact = product.closed_form().distribution.log_prob(x).sum()
    expected = torch.autograd.grad(exact, parameters, allow_unused=True)
    for got, wanted in zip(grads[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_latent_expert_is_doubly_intractable(p):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", p * dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    with pytest.raises(NotImplementedError, match="doubly intractable"):
        MCMC(NUTS(model), 2, 2, disable_progbar=True).run()


def test_nuts_over_a_product():
    product = dist.Normal(0.0, 1.0) * EnergyDistribution(bowl(2.0))

    def model():
        with pyro.plate("n", 50):  # as many independent draws a step
            pyro.sample("x", product)

    mcmc = MCMC(NUTS(model, step_size=0.5), 40, 30, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"][::8].flatten()
    assert_moments(draws, MEAN, SD**2, fourth_central_moment=3 * SD**4)


@pytest.mark.parametrize("closed", [True, False])
def test_plates_events_and_masks(closed):
    expert = DistributionEnergy(dist.Normal(0.0, 1.0)) if closed else bowl(0.0)
    sampler = None if closed else IndependentChains(warmup_steps=2, num_steps=2)
    product = ProductOfExperts([expert, dist.Normal(1.0, 2.0)], sampler=sampler)

    def model():
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            return pyro.sample("x", product)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (3, 4)
    event = product.expand([3]).to_event(1)
    assert event.log_prob(torch.zeros(5, 3)).shape == (5,)
    assert product.mask(torch.tensor(False)).log_prob(torch.ones(4)).eq(0).all()
    assert type(product.expand([3])) is ProductOfExperts
    assert (product.expand([3]) * bowl(0.0)).batch_shape == (3,)
    wide = EnergyDistribution(bowl(0.0)).expand([2, 1]) * product.expand([3])
    assert wide.batch_shape == (2, 3)
    assert wide.log_prob(torch.zeros(2, 3)).shape == (2, 3)


def test_products_go_on_in_mixtures_and_conditions():
    quadratic = QuadraticEnergy(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    product = EnergyDistribution(quadratic) * dist.Normal(torch.ones(2), 1.0).to_event(
        1
    )
    known = product.closed_form().distribution
    given = product.condition({0: 1.0})
    x = torch.randn(5, 1)
    pair = torch.cat([torch.ones(5, 1), x], -1)
    difference = given.log_prob(x) - known.log_prob(pair)
    torch.testing.assert_close(difference, difference[:1].expand(5))
    mixture = MixtureOfExperts([product, dist.Normal(torch.zeros(2), 1.0).to_event(1)])
    again = mixture * EnergyDistribution(quadratic)
    assert again.closed_form() is not None
    value = quadrature(FunctionEnergy(again.energy, (2,))).value
    assert abs(again.log_partition - value) < 1e-5


def test_in_a_guide_it_must_be_known(p):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    def loss(product):
        return Trace_ELBO().differentiable_loss(
            model, lambda: pyro.sample("x", product)
        )

    half = dist.Normal(0.0, torch.tensor(2.0) ** 0.5)
    assert abs(loss(ProductOfExperts([half, half]))) < 1e-6
    with pytest.raises(NotImplementedError, match="stands in a guide"):
        loss(p * half)


# Bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: ProductOfExperts([]), ValueError, "experts must hold at least one"),
        (
            lambda p: ProductOfExperts([p], [1, 2]),
            ValueError,
            "each of the 1 experts, got 2",
        ),
        (lambda p: p * bowl(0.0, (2,)), ValueError, r"\(\) and \(2,\).*PartEnergy"),
        (
            lambda p: p * dist.Gamma(2.0, 1.0),
            ValueError,
            "share one support, got .*Real",
        ),
        (
            lambda p: p * dist.Bernoulli(0.5),
            ValueError,
            "all discrete or all continuous",
        ),
        (
            lambda p: p.expand([2]) * p.expand([3]),
            ValueError,
            r"broadcast, got .*\(2,\).*Expand",
        ),
        (
            lambda p: p * dist.Normal(torch.zeros(2), 1.0),
            ValueError,
            r"experts\[1\] must have an empty",
        ),
        (lambda p: p**math.nan, ValueError, r"weights\[0\], a power.*finite.*got nan"),
        (lambda p: p ** torch.ones(2), ValueError, r"a tensor of shape \(\)"),
        (lambda p: p ** "2", TypeError, "a power, must be a number, got str"),
        (lambda p: 2.0 * p, TypeError, r"experts\[0\] must be a .*got float.*p \*\* 2"),
        (lambda p: torch.ones(()) * p, TypeError, r"got Tensor.*power"),
        (lambda p: p * "q", TypeError, "got str"),
        (
            lambda p: p * p.expand([2]).to_event(1),
            TypeError,
            "EnergyDistribution itself.*on the product",
        ),
        (
            lambda p: p * p.mask(torch.tensor(True)),
            TypeError,
            "inside of MaskedDistribution",
        ),
        (
            lambda p: ProductOfExperts([p], base=dist.Gamma(2.0, 1.0)),
            ValueError,
            "base must have support",
        ),
        (lambda p: p.energy * bowl(0.0), TypeError, "add their energies"),
    ],
)
def test_bad_input(p, build, error, message):
    with pytest.raises(error, match=message):
        build(p)


def test_a_learned_weight_stays_one(p, q):
    weight = nn.Parameter(torch.tensor(0.5))
    for product in (
        p**weight * q,
        (p**weight) ** 2.0,
        (p**weight * q) * p**0.5,
        p * p**weight,
    ):
        assert any(w is weight for w in product.energy.parameters())
        (grad,) = torch.autograd.grad(unnormalised(product).sum(), weight)
        assert grad != 0
    torch.testing.assert_close(unnormalised((p**weight) ** 2.0), unnormalised(p))


# Copies ------------------------------------------------------------------------------


def test_pickle_and_deepcopy():
    product = ProductOfExperts(
        [
            QuadraticEnergy(torch.zeros(2)),
            dist.StudentT(torch.full((2,), 3.0)).to_event(1),
        ],
        [1.0, 0.5],
        sampler=IndependentChains(warmup_steps=2, num_steps=2),
    )
    x = torch.randn(4, 2)
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert other.log_prob(x).equal(product.log_prob(x))
        assert (other / other.terms[0].expert).terms[0].weight == 0.5
        assert other.sample((2,)).shape == (2, 2)


def test_single_precision_is_kept():
    expert = QuadraticEnergy(torch.zeros(2, dtype=torch.float32))
    normal = dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1)
    product = EnergyDistribution(expert) * normal
    x = product.sample((3,))
    assert x.dtype == product.log_prob(x).dtype == product.log_partition.dtype
    assert x.dtype == torch.float32


def sub_posterior(y):
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=y)

    return PyroModelEnergy(model)


def test_posteriors_with_positive_sites_count_one_jacobian():
    """The product of three counted the Jacobian three times, without a word."""
    y = torch.randn(3, 3)
    models = [sub_posterior(row) for row in y]
    p, q, r = map(EnergyDistribution, models)
    for wrong in (lambda: p * q * r, lambda: p**0.5, lambda: p / q):
        with pytest.raises(NotImplementedError, match=r"constrained sites .*Jacobian"):
            wrong()
    assert (p * dist.Normal(torch.zeros(1), 1.0).to_event(1)).base is not None
    # The way out that the message names:
    f = models[0] + models[1] + models[2]
    jacobian = FunctionEnergy(models[0].log_abs_det, models[0].event_shape)
    log_partition = estimate(f + (3 - 1) * jacobian)
    scale = torch.linspace(0.01, 30, 30_001)
    prior = dist.LogNormal(0.0, 1.0).log_prob(scale)
    likelihood = dist.Normal(0.0, scale[:, None]).log_prob(y.flatten()).sum(-1)
    # The densities of the three posteriors in the site itself, multiplied.
    expected = torch.trapezoid((3 * prior + likelihood).exp(), scale).log()
    assert log_partition.value == pytest.approx(expected.item(), abs=1e-3)
