"""Quadrature, the referee, against closed forms."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.core.verdict import Reason
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    IsingEnergy,
    MixtureEnergy,
    NeuralEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
    UnconstrainedEnergy,
)
from pyro_ebm.partition import quadrature
from pyro_ebm.testing import CountingEnergy, targets


def gaussian(dim, loc=1.0):
    root = torch.randn(dim, dim) / 2
    return QuadraticEnergy(torch.full((dim,), loc), torch.eye(dim) + root @ root.mT)


def normalised(distribution):
    """An energy of log Z 0.7."""
    return DistributionEnergy(distribution).double() - 0.7


def assert_exact(energy, expected, **settings):
    estimate = quadrature(energy, progress_bar=False, **settings)
    assert estimate.status == "exact", estimate
    assert estimate.value == pytest.approx(expected, abs=2e-5)
    assert estimate.lower <= estimate.value <= estimate.upper
    assert estimate.method == "quadrature"
    return estimate


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("loc", [0.0, 5.0])
def test_gaussian(dim, loc):
    energy = gaussian(dim, loc)
    assert_exact(energy, energy.closed_form().log_partition.item())


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Cauchy(torch.tensor(1.0), 2.0),
        dist.StudentT(torch.tensor(1.5), 0.0, 3.0),
        dist.StudentT(torch.tensor(3.0)),
        dist.Laplace(torch.tensor(0.0), 1.0),
        dist.Gumbel(torch.tensor(0.0), 2.0),
        dist.Gamma(torch.tensor(3.0), 2.0),
        dist.Gamma(torch.tensor(0.5), 2.0),  # a pole at 0
        dist.LogNormal(torch.tensor(0.0), 1.0),
        dist.Beta(torch.tensor(0.5), 0.5),  # a pole at both ends
        dist.Beta(torch.tensor(5.0), 1.0),
        dist.Uniform(torch.tensor(-2.0), 3.0),
        dist.HalfNormal(torch.tensor(2.0)),
        dist.Dirichlet(torch.tensor([0.7, 1.0, 3.0])),
        dist.Dirichlet(torch.tensor([1.0, 1.0, 1.0])),
        dist.Normal(torch.zeros(2), torch.tensor([0.1, 20.0])).to_event(1),
        dist.Gamma(torch.tensor([3.0, 0.5]), 2.0).to_event(1),
    ],
    ids=lambda d: f"{type(d).__name__}-{tuple(d.event_shape)}",
)
def test_distributions(distribution):
    """A Jacobian of the support left out: seen to fail, as asserted in the next test.
    The pole of the Gamma at 0 was called not normalisable: its logarithm underflows."""
    assert_exact(normalised(distribution), 0.7)


def test_planted_fault_no_jacobian(monkeypatch):
    gamma = normalised(dist.Gamma(torch.tensor(3.0), 1.0))
    monkeypatch.setattr(
        UnconstrainedEnergy, "forward", lambda self, u: self.energy(self.transform(u))
    )
    with pytest.raises(AssertionError):
        assert_exact(gamma, 0.7)


@pytest.mark.parametrize("separation", [1.0, 8.0, 40.0])
def test_far_modes_of_a_mixture(separation):
    parts = [
        QuadraticEnergy(torch.tensor([sign * separation, 0.0]), torch.eye(2) * 4)
        for sign in (-1, 1)
    ]
    energy = MixtureEnergy(parts, torch.tensor([0.0, 2.0]))
    expected = energy.closed_form().log_partition.item()
    assert_exact(energy, expected, scale=max(1.0, separation / 4))


@pytest.mark.parametrize("scale", [20.0, 1.0])
def test_forty_modes(scale):
    target = targets.gaussian_mixture()
    assert_exact(target.energy, target.log_partition, scale=scale)


@pytest.mark.parametrize("loc", [-300.0, 40.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_bad_guess_of_loc_and_scale_is_enough(loc, scale):
    energy = normalised(dist.Normal(torch.tensor(loc), scale))
    assert_exact(energy, 0.7)
    assert_exact(energy, 0.7, loc=loc, scale=scale)


def test_location_and_scale_are_broadcast():
    energy = gaussian(2, 100.0)
    expected = energy.closed_form().log_partition.item()
    assert_exact(energy, expected, loc=torch.tensor([90.0, 110.0]), scale=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_energies(dtype):
    """Sum and grid are in double precision; the energy keeps its own."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    energy = NeuralEnergy((2,), (8,), base=base)
    single = quadrature(energy)
    double = quadrature(energy.double())
    assert single.is_reliable
    assert single.value == pytest.approx(double.value, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poles_and_tails_at_the_end_of_the_number_range(dtype):
    """Near 0 and far out exp underflows and overflows; both once gave false alarms."""
    for distribution in (
        dist.Gamma(torch.tensor(0.5), 2.0),
        dist.Pareto(torch.tensor(1.0), 0.5),
        dist.LogNormal(torch.tensor(0.0), 3.0),
    ):
        energy = DistributionEnergy(distribution) - 0.7
        estimate = quadrature(energy)
        assert estimate.status == "exact"
        assert estimate.value == pytest.approx(0.7, abs=1e-5)


def test_shift_of_the_energy_moves_log_partition_by_minus_itself():
    energy = normalised(dist.Cauchy(torch.tensor(1.0), 2.0))
    for c in (3.0, -1000.0, 1000.0):
        assert_exact(energy + c, 0.7 - c)


@pytest.mark.parametrize(
    "energy",
    [
        targets.unnormalizable(1).energy,
        targets.unnormalizable(2).energy,
        FunctionEnergy(lambda x: 0 * x, ()),
        FunctionEnergy(lambda x: x, ()),
        FunctionEnergy(lambda x: -x, ()),
        FunctionEnergy(lambda x: (1 + x**2).log() / 2, ()),  # 1 / |x|
        FunctionEnergy(lambda x: x[..., 0] ** 2, (2,)),  # flat along one axis
        FunctionEnergy(torch.log, (), constraints.positive),
        FunctionEnergy(torch.log1p, (), constraints.positive),
        NeuralEnergy((2,), (8,)),  # falls for ever on one side
    ],
)
def test_not_normalizable(energy):
    estimate = quadrature(energy)
    assert estimate.status == "not_normalizable"
    assert estimate.value == math.inf
    assert "does not vanish" in estimate.reason


def test_what_it_cannot_integrate_is_unreliable():
    comb = FunctionEnergy(lambda x: (1e4 * x).cos().sum(-1) * 20 + x.norm(dim=-1), (2,))
    estimate = quadrature(comb, max_evaluations=2**17)
    assert estimate.status == "unreliable"
    assert estimate.reason
    infinite = FunctionEnergy(lambda x: x.sum(-1) * math.nan, (2,))
    estimate = quadrature(infinite, max_evaluations=2**13)
    assert estimate.status == "unreliable"
    assert "nan all over the grid" in estimate.reason


def test_holes_in_the_density_are_no_mass():
    """Infinite and nan energies: half of the normal has gone."""
    for hole in (math.inf, math.nan):
        energy = FunctionEnergy(
            lambda x, hole=hole: torch.where(x > -60, x**2 / 2, hole), ()
        )
        assert_exact(energy, math.log(2 * math.pi) / 2)


def test_at_most_three_dimensions():
    with pytest.raises(
        ValueError, match=r"at most 3 numbers.*got 4.*\(4,\).*Use a samp"
    ):
        quadrature(gaussian(4))
    square = FunctionEnergy(lambda x: x.square().sum((-2, -1)), (2, 2))
    with pytest.raises(ValueError, match=r"got 4 \(event_shape \(2, 2\)\)"):
        quadrature(square)
    simplex = normalised(dist.Dirichlet(2 * torch.ones(4)))  # three degrees of freedom
    assert_exact(simplex, 0.7)


def test_evaluations_are_counted():
    energy = CountingEnergy(gaussian(2))
    estimate = quadrature(energy)
    assert estimate.num_evaluations == energy.num_values + energy.num_gradients


def model_energy(model):
    energy = PyroModelEnergy(model)
    return energy, energy.prior


def line(x, y):
    def model():
        a, b = (pyro.sample(name, dist.Normal(0.0, 10.0)) for name in "ab")
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regression_with_an_intercept_in_raw_units(dtype):
    """A slanted ridge, once taken for an integral that does not end."""
    x = torch.linspace(20, 70, 50)
    y = 3 + x + torch.randn(50)
    design = torch.stack([torch.ones(50), x], -1).double()
    covariance = torch.eye(50).double() + 100 * design @ design.mT
    law = dist.MultivariateNormal(torch.zeros(50).double(), covariance)
    expected = law.log_prob(y.double()).item()
    energy, prior = model_energy(line(x, y))
    for base in (None, prior):
        estimate = assert_exact(energy, expected, base=base)
        assert estimate.num_evaluations < 100_000


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8])
def test_correlated_gaussian(gap):
    matrix = torch.tensor([[1.0, 1 - gap], [1 - gap, 1.0]]).inverse()
    energy = FunctionEnergy(lambda x: ((x @ matrix) * x).sum(-1) / 2, (2,))
    assert_exact(energy, math.log(2 * math.pi) - torch.logdet(matrix).item() / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0.0, 5.0])
def test_rare_events_in_single_precision(count, dtype):
    """Once "exact +- 0" and .007 off, as 1 - p was rounded."""

    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        law = dist.Binomial(torch.tensor(1e6), p)
        pyro.sample("k", law, obs=torch.tensor(count))

    energy, prior = model_energy(model)
    assert_exact(energy, -math.log(1e6 + 1), base=prior)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_an_energy_that_insists_on_single_precision_has_its_rounding_as_error(dtype):
    def insists(x):
        single = x.detach().clamp(-1e9, 1e9).numpy().astype("float32")
        return torch.from_numpy(single**2 / 2 + 1e4)

    estimate = quadrature(FunctionEnergy(insists, ()), tolerance=1e-3)
    expected = math.log(2 * math.pi) / 2 - 1e4
    assert estimate.std_error > 1e-4
    assert estimate.lower <= expected <= estimate.upper


def grid_of_gaussians(sd):
    centres = torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3))

    def energy(x):
        square = (x[..., None, :] - centres).square().sum(-1)
        return -(-square / (2 * sd**2)).logsumexp(-1)

    return FunctionEnergy(energy, (2,)), math.log(25 * 2 * math.pi * sd**2)


@pytest.mark.parametrize("sd", [0.05, 0.01])
def test_many_narrow_modes(sd):
    """They lie between the points of a first grid, which a descent finds.

    Planted fault: no descents; called exact, with less than half of the mass.
    """
    energy, expected = grid_of_gaussians(sd)
    assert_exact(energy, expected, base=dist.Normal(torch.zeros(2), 2.0).to_event(1))


def test_a_narrow_mode_far_out():
    near, far = dist.Normal(0.0, 1.0), dist.Normal(30.0, 0.2)
    both = FunctionEnergy(
        lambda x: -torch.logaddexp(near.log_prob(x), far.log_prob(x)), ()
    )
    assert_exact(DistributionEnergy(far) - 0.7, 0.7)
    for base in (None, dist.Normal(0.0, 10.0)):
        assert_exact(both, math.log(2), base=base)


def test_a_needle_that_no_look_meets_is_missed():
    """A known limit: half of the mass in a thousandth of the width."""
    near = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    far = dist.Normal(torch.tensor([3.0, 2.0]), 1e-4).to_event(1)
    energy = FunctionEnergy(
        lambda x: -torch.logaddexp(near.log_prob(x), far.log_prob(x)), (2,)
    )
    assert_exact(energy, 0.0)


def test_draws_of_the_base_find_what_the_grids_have_missed():
    """Flat but for a hole without a gradient, where nearly all of the mass is.

    Planted fault: no comparison with the base; exact, and wrong by three nats.
    """
    corner = torch.tensor([300.0, 500.0])

    def energy(x):
        inside = (x - corner).abs().amax(-1) < 30
        near = x.square().sum(-1) / 2
        return torch.where(inside, torch.tensor(-5.0), near)

    base = dist.Normal(torch.zeros(2), 300.0).to_event(1)
    estimate = quadrature(FunctionEnergy(energy, (2,)), base=base)
    assert estimate.status == "unreliable"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("energy", "expected"),
    [
        (lambda: DistributionEnergy(dist.StudentT(torch.tensor(0.05))), 0.0),
        (lambda: DistributionEnergy(dist.Beta(torch.tensor(0.2), 0.2)), 0.0),
        (lambda: DistributionEnergy(dist.Dirichlet(torch.tensor([0.1, 0.3]))), 0.0),
    ],
    ids=["student", "beta", "dirichlet"],
)
def test_heavy_tails_and_poles_are_right_or_flagged(energy, expected, dtype):
    estimate = quadrature(energy())
    assert abs(estimate.value - expected) < 1e-5 or not estimate.is_reliable
    assert estimate.status != "not_normalizable"


def test_angles_on_an_interval():
    circle = constraints.interval(-math.pi, math.pi)
    energy = FunctionEnergy(lambda x: -3 * (x - 0.5).cos(), (), circle)
    bessel = torch.special.i0(torch.tensor(3.0)).item()
    assert_exact(energy, math.log(2 * math.pi * bessel))


def test_a_curved_ridge():
    def rosenbrock(x):
        a, b = x.unbind(-1)
        return (1 - a) ** 2 + 100 * (b - a**2) ** 2

    assert_exact(FunctionEnergy(rosenbrock, (2,)), math.log(math.pi / 10))


def test_a_funnel_is_never_called_infinite():
    """Widths from e^-10 to e^10; right or flagged."""

    def funnel(x):
        v, z = x.unbind(-1)
        return v**2 / 50 + z**2 * (-v).exp() / 2 + v / 2

    estimate = quadrature(FunctionEnergy(funnel, (2,)), max_evaluations=2**19)
    expected = math.log(5 * 2 * math.pi)
    is_right = abs(estimate.value - expected) < 1e-4
    assert is_right or estimate.status == "unreliable"


def test_an_energy_of_minus_infinity_far_out_is_not_infinite():
    """Truncation by hand: log1p(-cdf) is -inf where the cdf is rounded to 1."""

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        law = dist.Normal(mean, 1.0)
        with pyro.plate("data", 5):
            pyro.sample("y", law, obs=torch.tensor([0.5, 1.2, 0.3, 2.0, 0.1]))
        pyro.factor("cut", -5 * torch.log1p(-law.cdf(torch.tensor(0.0))))

    energy, prior = model_energy(model)
    estimate = quadrature(energy, base=prior)
    assert estimate.value == pytest.approx(-5.93976, abs=1e-4)
    assert estimate.status == "unreliable"
    assert estimate.reasons[0].reason is Reason.NUMERICAL


@pytest.mark.parametrize(
    "limits", [{"max_evaluations": 3000}, {"max_seconds": 0.05}], ids=str
)
def test_limits_are_kept(limits):
    """Planted fault: evaluations of the descent not counted."""

    def slow(x):
        time.sleep(1e-4)
        return x.square().sum(-1) / 2

    estimate = quadrature(FunctionEnergy(slow, (2,)), **limits)
    assert estimate.status == "unreliable"
    assert estimate.reasons[-1].reason is Reason.OUT_OF_BUDGET
    assert estimate.num_evaluations <= limits.get("max_evaluations", math.inf)
    assert estimate.num_seconds < 2


def test_a_base_of_another_support_is_refused():
    with pytest.raises(ValueError, match="base must have support"):
        quadrature(gaussian(1), base=dist.Gamma(torch.ones(1), 1.0).to_event(1))


@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_hundred_needles(dim):
    """Normalised mixtures of a hundred modes of .003, and of sixty of .01 in a plane.

    Seen to fail, by -.09 and -.08 nats and "exact", with cells left out of fine grids
    where a grid of 57 nodes a side had met no mass."""
    torch.manual_seed(dim)
    number, scale = (100, 0.003) if dim == 1 else (60, 0.01)
    loc = 6 * torch.rand(number, dim, dtype=torch.float64) - 3
    weight = torch.rand(number, dtype=torch.float64)
    parts = dist.Normal(loc, scale).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(weight), parts)
    energy = FunctionEnergy(lambda x: -mixture.log_prob(x), (dim,))
    found = quadrature(energy)
    assert found.status == "exact"
    assert abs(found.value) < 1e-5


def test_a_sum_is_no_integral():
    with pytest.raises(ValueError, match=r"continuous support.*partition\.enumeration"):
        quadrature(IsingEnergy((3,), 0.3))
