"""Energies without a partition function are found, and none that has one is accused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.core.verdict import Reason, Status
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    MixtureEnergy,
    NeuralEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
)
from pyro_ebm.partition.normalizability import check_normalizability
from pyro_ebm.testing import CountingEnergy, targets


def normal(dim):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def vector(fn, dim=2):
    return FunctionEnergy(fn, (dim,)), normal(dim)


def scalar(fn, support=constraints.real):
    base = {
        constraints.real: dist.Normal(0.0, 1.0),
        constraints.positive: dist.LogNormal(0.0, 1.0),
        constraints.unit_interval: dist.Uniform(0.0, 1.0),
    }[support]
    return FunctionEnergy(fn, (), support), base


def with_law(distribution, base=None):
    return DistributionEnergy(distribution), base or distribution


def oblique(dim, eigenvalues):
    """A quadratic energy with given eigenvalues along the axes of a random rotation."""
    axes = torch.linalg.qr(torch.randn(dim, dim))[0]
    matrix = (axes * eigenvalues) @ axes.mT
    return vector(lambda x: ((x @ matrix) * x).sum(-1) / 2, dim)


def one_negative():
    eigenvalues = torch.linspace(0.5, 20.0, 20)
    eigenvalues[0] = -0.01
    return oblique(20, eigenvalues)


def flat_direction():
    return oblique(10, torch.cat([torch.zeros(1), torch.linspace(1, 5, 9)]))


def network(activation=torch.nn.SiLU, base=None):
    energy = NeuralEnergy((2,), (32, 32), activation=activation, base=base)
    for parameter in energy.parameters():
        parameter.data.normal_(0.0, 0.5)
    return energy, base or normal(2)


def odd_network():
    """Without a base, and as far below zero on one side as above it on the other."""
    energy, base = network()
    return FunctionEnergy(lambda x: energy(x) - energy(-x), (2,)), base


BAD = {
    "concave": lambda: vector(lambda x: -x.square().sum(-1) / 2),
    "concave-10d": lambda: vector(lambda x: -x.square().sum(-1) / 2, 10),
    "flat-axis": lambda: vector(lambda x: x[..., 0] ** 2),
    "flat-oblique": flat_direction,
    "log-tail": lambda: scalar(lambda x: x.abs().log1p()),
    "log-tail-2d": lambda: vector(lambda x: 0.9 * x.square().sum(-1).log1p()),
    "linear": lambda: vector(lambda x: x[..., 0] + x[..., 1] ** 2),
    "saddle": lambda: vector(lambda x: x[..., 0] ** 2 - 0.1 * x[..., 1] ** 2),
    "oblique-saddle-20d": one_negative,
    "growing-oscillation": lambda: scalar(lambda x: x**2 * x.cos()),
    "bounded-oscillation": lambda: scalar(lambda x: 3 * x.sin()),
    "bounded": lambda: vector(lambda x: 10 * x.square().sum(-1).tanh()),
    "network": odd_network,
    "network-tanh": lambda: network(torch.nn.Tanh),
    "too-wide-quotient": lambda: vector(
        lambda x: x.square().sum(-1) / 2 - 2 * (1 + x.square().sum(-1))
    ),
    "cubic": lambda: scalar(lambda x: x**3 / 10),
    "positive-at-zero": lambda: scalar(
        lambda x: x + 1.2 * x.log(), constraints.positive
    ),
    "positive-at-infinity": lambda: scalar(
        lambda x: 0.8 * x.log1p(), constraints.positive
    ),
    "interval-at-one": lambda: scalar(
        lambda x: 1.3 * (-x).log1p(), constraints.unit_interval
    ),
}  # fmt: skip

# Known limits: what is not far out, or not along a straight line, is not seen.
MISSED = {
    "singularity": lambda: scalar(lambda x: 1.5 * x.abs().log() + x**2),
}

TARGETS = (
    targets.gamma, targets.gaussian, targets.gaussian_mixture,
    targets.hybrid_rosenbrock, targets.many_well, targets.neals_funnel,
    targets.product_of_gaussians, targets.student_t_product, targets.trap,
)  # fmt: skip


def of_target(function):
    target = function()
    return target.energy, target.base


def horseshoe():
    """Scales with half-Cauchy tails: f falls without bound along one line."""

    def energy(x):
        u, z = x[..., 0], x[..., 1:]
        prior = torch.nn.functional.softplus(2 * u) - u
        return prior + z.shape[-1] * u + (z.square().sum(-1) * (-2 * u).exp()) / 2

    return vector(energy, 5)


def simplex():
    base = dist.Dirichlet(torch.ones(4))
    return DistributionEnergy(dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0, 5.0]))), base


def mixture():
    parts = [QuadraticEnergy(torch.full((3,), m), s * torch.eye(3)) for m, s in
             ((-5.0, 1.0), (3.0, 0.1), (0.0, 20.0))]  # fmt: skip
    return MixtureEnergy(parts, torch.zeros(3)), normal(3)


GOOD = {
    **{f.__name__: (lambda f=f: of_target(f)) for f in TARGETS},
    "cauchy": lambda: with_law(dist.Cauchy(0.0, 1.0)),
    "cauchy-product": lambda: with_law(dist.Cauchy(torch.zeros(20), 1.0).to_event(1)),
    "student-0.5": lambda: with_law(dist.StudentT(0.5)),
    "multivariate-t": lambda: with_law(
        dist.MultivariateStudentT(torch.tensor(1.0), torch.zeros(10), torch.eye(10))
    ),
    "laplace": lambda: vector(lambda x: 0.01 * x.abs().sum(-1), 5),
    "slow-power": lambda: vector(lambda x: x.abs().pow(0.1).sum(-1), 3),
    "slow-radius": lambda: vector(lambda x: x.square().sum(-1).pow(0.1), 4),
    "log-tail-steep": lambda: scalar(lambda x: 1.05 * x.abs().log1p()),
    "oscillation-in-log-tail": lambda: scalar(
        lambda x: 2 * x.abs().log1p() + 3 * x.sin()
    ),
    "quartic": lambda: vector(lambda x: x.pow(4).sum(-1) - 5 * x.square().sum(-1), 3),
    "ring": lambda: vector(lambda x: 20 * (x.norm(dim=-1) - 4) ** 2),
    "network": lambda: network(base=normal(2)),
    "network-tanh": lambda: network(torch.nn.Tanh, base=normal(2)),
    "mixture": mixture,
    "oblique-20d": lambda: oblique(20, torch.logspace(-3, 3, 20)),
    "gaussian-200d": lambda: with_law(normal(200)),
    "horseshoe": horseshoe,
    "box": lambda: vector(
        lambda x: torch.where(x.abs().amax(-1) < 2, 0 * x.sum(-1), torch.inf)
    ),
    "exponential": lambda: with_law(dist.Exponential(torch.tensor(0.01))),
    "small-gamma": lambda: with_law(dist.Gamma(0.05, 1.0), dist.LogNormal(0.0, 1.0)),
    "half-cauchy": lambda: with_law(dist.HalfCauchy(1.0), dist.LogNormal(0.0, 1.0)),
    "beta": lambda: with_law(dist.Beta(0.5, 0.5), dist.Uniform(0.0, 1.0)),
    "beta-product": lambda: with_law(
        dist.Beta(torch.full((10,), 2.0), 5.0).to_event(1)
    ),
    "inverse-gamma": lambda: with_law(dist.InverseGamma(0.1, 1.0),
                                      dist.LogNormal(0.0, 1.0)),
    "simplex": simplex,
    "gumbel": lambda: with_law(dist.Gumbel(0.0, 1.0)),
    "image": lambda: with_law(dist.Normal(torch.zeros(1, 8, 8), 1.0).to_event(3)),
}  # fmt: skip


def check(case):
    energy, base = case()
    return check_normalizability(energy, base.sample((64,)))


@pytest.mark.parametrize("name", BAD)
def test_bad_energy_is_found(name):
    """Planted fault: lines left out; misses every saddle and flat direction."""
    result = check(BAD[name])
    assert not result.is_normalizable
    assert result.evidence


@pytest.mark.parametrize("name", GOOD)
def test_good_energy_is_not_accused(name):
    """Planted fault: ``D log s`` for the lines too; accuses the products of tails."""
    result = check(GOOD[name])
    assert result.is_normalizable, result.evidence
    assert result.evidence == ""


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("name", BAD)
def test_bad_energy_is_found_in_float32(name):
    assert not check(BAD[name]).is_normalizable


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("name", GOOD)
def test_good_energy_is_not_accused_in_float32(name):
    """Planted fault: rays of 300 octaves; squares overflow and hide the slope."""
    result = check(GOOD[name])
    assert result.is_normalizable, result.evidence


@pytest.mark.parametrize("name", MISSED)
def test_known_limits(name):
    assert check(MISSED[name]).is_normalizable


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_over_seeds(dtype):
    """At least 11 of 12 bad energies are found, and no good one is accused."""
    found = accused = 0
    for seed in range(20):
        torch.manual_seed(seed)
        found += sum(not check(case).is_normalizable for case in BAD.values())
        accused += sum(not check(case).is_normalizable for case in GOOD.values())
    assert found >= 11 / 12 * 20 * len(BAD)
    assert accused == 0


def test_exact_draws_as_particles():
    for target in TARGETS:
        target = target()
        result = check_normalizability(target.energy, target.sample((100,)))
        assert result.is_normalizable, (target.name, result.evidence)


def test_evaluations_are_counted():
    for name in ("saddle", "positive-at-zero"):
        energy, base = BAD[name]()
        counting = CountingEnergy(energy)
        result = check_normalizability(counting, base.sample((64,)))
        spent = counting.num_values + counting.num_gradients
        assert result.num_evaluations == spent


def test_cost_is_small_in_many_dimensions():
    energy = DistributionEnergy(normal(1000))
    result = check_normalizability(energy, torch.randn(256, 1000))
    assert result.is_normalizable
    assert result.num_evaluations < 3000


def test_minus_infinity_far_out_is_numerical_nonsense():
    energy, _ = vector(
        lambda x: torch.where(x.norm(dim=-1) > 50, -torch.inf, x.square().sum(-1))
    )
    result = check_normalizability(energy, torch.randn(50, 2))
    assert "-inf" in result.evidence
    assert result.status == Status.UNRELIABLE
    assert result.finding.reason is Reason.NUMERICAL


def test_nan_far_out_is_no_evidence():
    energy, _ = vector(
        lambda x: torch.where(x.norm(dim=-1) > 1e4, torch.nan, x.square().sum(-1))
    )
    assert check_normalizability(energy, torch.randn(50, 2)).is_normalizable


@pytest.mark.parametrize(
    "particles", [torch.zeros(5), torch.zeros(5, 3), torch.zeros(1, 2)]
)
def test_particles_of_another_shape_are_refused(particles):
    energy, _ = vector(lambda x: x.square().sum(-1))
    with pytest.raises(ValueError, match="particles must have shape"):
        check_normalizability(energy, particles.double())


def test_particles_outside_the_support_are_refused():
    energy, _ = vector(lambda x: x.sum(-1) * torch.inf)
    with pytest.raises(ValueError, match="at least 2 points of finite energy, got 0"):
        check_normalizability(energy, torch.randn(5, 2))


def of_model(model):
    energy = PyroModelEnergy(model)
    return energy, energy.prior


def variance_of_data():
    variance = pyro.sample("variance", dist.InverseGamma(2.0, 3.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    data = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4])
    likelihood = dist.Normal(mean[..., None], variance[..., None].sqrt())
    pyro.sample("y", likelihood.expand(mean.shape + (5,)).to_event(1), obs=data)


def weights_of_data():
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(4)))
    counts = torch.tensor([5.0, 6.0, 4.0, 8.0])
    pyro.sample("counts", dist.Multinomial(23, weights), obs=counts)


def line():
    x = torch.linspace(20, 70, 50)
    y = 3 + x + (17 * x).sin()
    a, b = (pyro.sample(name, dist.Normal(0.0, 10.0)) for name in "ab")
    with pyro.plate("data", 50):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


def earnings():
    """A regression in raw units, with a scale."""
    x = torch.linspace(58, 77, 40)
    y = 2e4 + 1.5e3 * (x - 66) + 1e4 * (17 * x).sin()
    coefficients = pyro.sample("b", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(10.0)))
    mean = coefficients[..., 0, None] + coefficients[..., 1, None] * x
    pyro.sample("y", dist.Normal(mean, scale[..., None]).to_event(1), obs=y)


def rare(count):
    def model():
        with pyro.plate("groups", 3):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            law = dist.Binomial(torch.tensor(1e4), p)
            pyro.sample("k", law, obs=torch.full((3,), count))

    return model


def sparse_counts(*counts):
    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(len(counts))))
        law = dist.Multinomial(int(sum(counts)), p)
        pyro.sample("n", law, obs=torch.tensor(counts))

    return model


def eggbox():
    law = dist.Uniform(0.0, 10 * math.pi).expand([2]).to_event(1)
    x = pyro.sample("x", law)
    pyro.factor("likelihood", (2 + (x / 2).cos().prod(-1)) ** 5)


def shrinkage():
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(1.0)))
    scales = pyro.sample("scales", dist.HalfCauchy(torch.ones(5)).to_event(1))
    slopes = dist.Normal(torch.zeros(5), tau[..., None] * scales).to_event(1)
    slopes = pyro.sample("slopes", slopes)
    y = torch.tensor([5.0, 0.0, 0.0, 0.1, -0.2])
    pyro.sample("y", dist.Normal(slopes, 1.0).to_event(1), obs=y)


def truncated():
    """By hand: log1p(-cdf) is -inf where the mean is far on the wrong side."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    law = dist.Normal(mean, 1.0)
    with pyro.plate("data", 5):
        pyro.sample("y", law, obs=torch.tensor([0.5, 1.2, 0.3, 2.0, 0.1]))
    pyro.factor("cut", -5 * torch.log1p(-law.cdf(torch.tensor(0.0))))


MODELS = {
    "variance": variance_of_data,
    "weights": weights_of_data,
    "line": line,
    "earnings": earnings,
    "rare": rare(5.0),
    "frequent": rare(9998.0),
    "sparse-counts": sparse_counts(996.0, 3.0, 1.0, 0.0),
    "very-sparse-counts": sparse_counts(4990.0, 0.0, 0.0, 7.0, 3.0, 0.0),
    "eggbox": eggbox,
    "shrinkage": shrinkage,
}


def correlated(rho):
    matrix = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64).inverse()
    matrix = matrix.to(torch.get_default_dtype())
    return vector(lambda x: ((x @ matrix) * x).sum(-1) / 2)


def rosenbrock(x):
    steps = 100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2
    return (steps + (1 - x[..., :-1]) ** 2).sum(-1)


def torus(x):
    radius = x[..., :2].norm(dim=-1) - 3
    return 50 * (radius**2 + x[..., 2] ** 2 - 1) ** 2


def funnel(x):
    v, rest = x[..., 0], x[..., 1:].square().sum(-1)
    return v**2 / 50 + rest * (-v).exp() / 2 + (x.shape[-1] - 1) * v / 2


def vector_law(law, base):
    return with_law(law.to_event(1), base.to_event(1))


PROPER = {
    "correlation-1e-4": lambda: correlated(0.9999),
    "correlation-1e-6": lambda: correlated(0.999999),
    "rosenbrock": lambda: vector(rosenbrock),
    "rosenbrock-5d": lambda: vector(rosenbrock, 5),
    "torus": lambda: vector(torus, 3),
    "funnel": lambda: vector(funnel, 10),
    "student-.05": lambda: with_law(dist.StudentT(torch.tensor(0.05)),
                                    dist.Normal(0.0, 1.0)),
    "student-.05-product": lambda: vector_law(dist.StudentT(torch.full((5,), 0.05)),
                                              dist.Normal(torch.zeros(5), 1.0)),
    "gamma-.05": lambda: vector_law(dist.Gamma(torch.full((6,), 0.05), 1.0),
                                    dist.LogNormal(torch.zeros(6), 1.0)),
    "beta-.1": lambda: vector_law(dist.Beta(torch.full((3,), 0.1), 0.1),
                                  dist.Uniform(torch.zeros(3), 1.0)),
    "dirichlet-.1": lambda: with_law(dist.Dirichlet(torch.full((6,), 0.1)),
                                     dist.Dirichlet(torch.ones(6))),
    "inverse-gamma-.01": lambda: with_law(dist.InverseGamma(0.01, 0.01),
                                          dist.LogNormal(0.0, 1.0)),
    "far": lambda: vector(lambda x: (x - 1e6).square().sum(-1) / 2, 3),
    "wide": lambda: vector(lambda x: (x / 1e5).square().sum(-1) / 2, 3),
}  # fmt: skip


def assert_not_accused(case, seeds):
    """With the base that proves it, and with its draws alone."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        energy, base = case()
        particles = base.sample((64,))
        for proof in (None, base):
            result = check_normalizability(energy, particles, base=proof)
            assert result.status == Status.OK, (seed, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROPER)
def test_hard_but_proper(name, dtype):
    """Each, or its kind, was once found to have no partition function."""
    assert_not_accused(PROPER[name], 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_proper_priors(name, dtype):
    """Far out in unconstrained space exp overflows, and weights are 0 by rounding.

    Planted fault: rays end at a distance of 6, in the midst of the bulk.
    """
    model = of_model(MODELS[name])
    assert_not_accused(lambda: model, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_proper_priors_over_seeds(name, dtype):
    model = of_model(MODELS[name])
    assert_not_accused(lambda: model, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_density_that_overflows_is_numerical_nonsense(dtype):
    energy, prior = of_model(truncated)
    for base in (None, prior):
        result = check_normalizability(energy, prior.sample((64,)), base=base)
        assert result.status == Status.UNRELIABLE
        assert result.finding.reason is Reason.NUMERICAL
        assert result.is_normalizable


def test_rounding_is_no_trend():
    """Large terms that cancel but for a small one: their sum is noise far out.

    Planted fault: rounding not looked at; the noise is taken for a fall.
    """

    def energy(x):
        square = x.square()
        return ((square + 1) ** 2 - x**4 - 2 * square + x.abs()).sum(-1)

    for seed in range(20):
        torch.manual_seed(seed)
        result = check_normalizability(FunctionEnergy(energy, (2,)), torch.randn(64, 2))
        assert result.status == Status.OK, result


@pytest.mark.parametrize("name", BAD)
def test_a_base_is_no_proof_where_the_ratio_grows_without_bound(name):
    """Planted fault: rounding at the far end held against the fall at the near end."""
    energy, base = BAD[name]()
    result = check_normalizability(energy, base.sample((64,)), base=base)
    assert result.status == Status.NOT_NORMALIZABLE
    assert result.finding.reason is Reason.DIVERGENT


def test_a_base_with_heavier_tails_is_a_proof():
    """Bounded in the ratio, although the rays see no fall of the density itself."""
    energy = DistributionEnergy(dist.StudentT(torch.tensor(0.001)))
    particles = torch.randn(64)
    alone = check_normalizability(energy, particles)
    assert alone.status == Status.NOT_NORMALIZABLE
    proof = dist.StudentT(torch.tensor(0.001))
    assert check_normalizability(energy, particles, base=proof).status == Status.OK


def test_a_floor_far_below_the_bulk_has_no_mass():
    """Not integrable by the letter; e^-60 of the bulk, and then nothing for ever."""
    energy = FunctionEnergy(lambda x: (x.square() / 2).clamp(max=60.0), ())
    assert check_normalizability(energy, torch.randn(64)).status == Status.OK
    near = FunctionEnergy(lambda x: (x.square() / 2).clamp(max=5.0), ())
    assert not check_normalizability(near, torch.randn(64)).is_normalizable
