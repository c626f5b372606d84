"""Energies without a partition function are found, and none that has one is accused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

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


def test_minus_infinity_far_out_is_evidence():
    energy, _ = vector(
        lambda x: torch.where(x.norm(dim=-1) > 50, -torch.inf, x.square().sum(-1))
    )
    result = check_normalizability(energy, torch.randn(50, 2))
    assert "-inf" in result.evidence


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [variance_of_data, weights_of_data])
def test_sites_on_a_constrained_support_end_where_their_transforms_do(model, dtype):
    """Far out in unconstrained space, exp overflows and weights are 0 by rounding.

    Both once were found to have no partition function.
    """
    energy = PyroModelEnergy(model)
    for _ in range(4):
        found = check_normalizability(energy, energy.prior.sample((256,)))
        assert found.is_normalizable, found.evidence
