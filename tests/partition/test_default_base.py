"""The base of an energy that came without one."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import partition
from pyro_ebm.energies import DistributionEnergy, FunctionEnergy, spins
from pyro_ebm.energies.views.unconstrained import same_support
from pyro_ebm.partition.default_base import default_base, describe

BOX = "uniform on the box"
PUSHED = "standard normal in unconstrained space"
FINITE = "uniform on the finite support"
ENDS = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 4.0])
#: Support, event shape and what the base is called.
CASES = {
    "real": (constraints.real, (), "standard normal"),
    "vector": (constraints.real_vector, (3,), "standard normal"),
    "image": (constraints.independent(constraints.real, 2), (2, 3), "standard normal"),
    "unit": (constraints.unit_interval, (), BOX),
    "interval": (constraints.interval(-2.0, 0.1), (), BOX),
    "half open": (constraints.half_open_interval(0.0, 3.0), (), BOX),
    "circle": (constraints.interval(-math.pi, math.pi), (), BOX),
    "box": (constraints.independent(constraints.interval(-1.0, 3.0), 1), (2,), BOX),
    "own ends": (constraints.independent(constraints.interval(*ENDS), 1), (2,), BOX),
    "twice": (
        constraints.independent(
            constraints.independent(constraints.unit_interval, 1), 1
        ),
        (2, 3),
        BOX,
    ),
    "positive": (constraints.positive, (), PUSHED),
    "positives": (constraints.independent(constraints.positive, 1), (2,), PUSHED),
    "above": (constraints.greater_than(1.5), (), PUSHED),
    "below": (constraints.less_than(-1.0), (), PUSHED),
    "simplex": (constraints.simplex, (3,), PUSHED),
    "ordered": (constraints.ordered_vector, (2,), PUSHED),
    "corr": (constraints.corr_cholesky, (3, 3), PUSHED),
    "parts": (
        constraints.cat(
            [
                constraints.independent(constraints.unit_interval, 1),
                constraints.independent(constraints.positive, 1),
            ],
            dim=-1,
            lengths=[1, 1],
        ),
        (2,),
        PUSHED,
    ),
    "bits": (constraints.independent(constraints.boolean, 1), (4,), FINITE),
    "spins": (constraints.independent(spins, 2), (2, 2), FINITE),
    "classes": (constraints.integer_interval(2, 4), (), FINITE),
}


def energy_on(name, dtype=torch.float64):
    support, shape, _ = CASES[name]
    energy = FunctionEnergy(lambda x: x.flatten(-len(shape)).sum(-1), shape, support)
    if not shape:
        energy = FunctionEnergy(lambda x: x * 1.0, shape, support)
    energy.register_buffer("like", torch.zeros(1, dtype=dtype))
    return energy


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_event_support_and_dtype_are_those_of_the_energy(name, dtype):
    """Planted fault: no stated support; in single precision 0.1 is another number."""
    energy = energy_on(name, dtype)
    base = default_base(energy)
    x = base.sample((50,))
    assert x.shape == (50, *energy.event_shape)
    assert x.dtype == dtype
    assert energy.support.check(x).all()
    assert base.event_shape == energy.event_shape
    assert not base.batch_shape
    assert same_support(base.support, energy.support)
    assert base.log_prob(x).shape == (50,)
    assert base.log_prob(x).isfinite().all()
    assert describe(base) == CASES[name][2]
    expanded = base.expand((4,))
    assert expanded.sample().shape == (4, *energy.event_shape)
    assert same_support(expanded.support, energy.support)
    assert describe(expanded) == CASES[name][2]


@pytest.mark.parametrize(
    "name",
    [
        *("real", "unit", "interval", "half open", "circle", "box", "own ends"),
        *("positive", "positives", "above", "below", "simplex", "ordered", "parts"),
    ],
)
def test_the_density_integrates_to_one(name):
    """By quadrature in one and two numbers."""
    base = default_base(energy_on(name))
    own = DistributionEnergy(base)
    if name == "parts":  # constraints.cat checks to another shape than the batch
        own = FunctionEnergy(lambda x: -base.log_prob(x), (2,), base.support)
    found = partition.quadrature(own, progress_bar=False)
    assert abs(found.value) < 1e-5


@pytest.mark.parametrize("name", ["bits", "spins", "classes"])
def test_the_probabilities_add_up_to_one(name):
    found = partition.enumeration(DistributionEnergy(default_base(energy_on(name))))
    assert found.value == pytest.approx(0.0, abs=1e-12)


def test_the_draws_are_those_of_the_density():
    """Of correlation matrices: the mean weight towards LKJ is one."""
    base = default_base(energy_on("corr"))
    x = base.sample((20_000,))
    target = dist.LKJCholesky(3, torch.tensor(2.0, dtype=torch.float64))
    weights = (target.log_prob(x) - base.log_prob(x)).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(len(x))


@pytest.mark.parametrize("name", ["box", "positives", "simplex", "corr"])
def test_a_sampler_takes_it(name):
    energy = energy_on(name)
    base = default_base(energy)
    found = partition.smc(energy, base, num_particles=64, progress_bar=False)
    weighed = partition.importance_sampling(energy, base, progress_bar=False)
    error = math.hypot(found.std_error, weighed.std_error)
    assert abs(found.value - weighed.value) < 5 * error + 0.05


@pytest.mark.parametrize(
    ("support", "shape"),
    [(constraints.sphere, (3,)), (constraints.nonnegative_integer, ())],
)
def test_a_support_without_one_says_so(support, shape):
    energy = FunctionEnergy(lambda x: x.sum(-1), shape, support)
    with pytest.raises(NotImplementedError, match=r"no default base on.*Give base="):
        default_base(energy)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (dist.Normal(0.0, 2.0), "Normal"),
        (dist.Normal(torch.ones(2), 1.0).to_event(1), "Normal"),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), "standard normal"),
        (dist.Beta(1.0, 2.0), "Beta"),
    ],
)
def test_other_bases_are_named_by_their_type(base, words):
    assert describe(base) == words
