"""Batches of energies: as many energies one by one."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm import EnergyDistribution, EnergyModel
from pyro_ebm.energies import (
    ClampedEnergy,
    CompiledEnergy,
    DistributionEnergy,
    FunctionEnergy,
    LinearMapEnergy,
    MixtureEnergy,
    PartEnergy,
    QuadraticEnergy,
    select,
)

B = (4, 3)


def quadratic(*batch, dim=2):
    root = torch.randn(*batch, dim, dim) / 2
    return QuadraticEnergy(torch.randn(*batch, dim), torch.eye(dim) + root @ root.mT)


def bowl(x, c):
    """``N(c, 1)`` times ``exp(c)``, up to a constant."""
    return (x - c).square().sum(-1) / 2 - c.sum(-1)


def given():
    return FunctionEnergy(bowl, (2,), context_shape=(2,)).given(torch.randn(*B, 2))


def normal(*batch):
    return dist.Normal(torch.randn(*batch, 2), 0.5 + torch.rand(*batch, 2)).to_event(1)


CASES = {
    "quadratic": lambda: quadratic(*B),
    "quadratic-broadcast": lambda: QuadraticEnergy(
        torch.randn(4, 1, 2), torch.eye(2).expand(3, 2, 2)
    ),
    "normal": lambda: DistributionEnergy(normal(*B)),
    "multivariate": lambda: DistributionEnergy(
        dist.MultivariateNormal(torch.randn(*B, 2), torch.eye(2) + 0.5)
    ),
    "gamma": lambda: DistributionEnergy(
        dist.Gamma(1 + torch.rand(*B, 2), 1.0).to_event(1)
    ),
    "given": given,
    "sum": lambda: quadratic(4, 1) + quadratic(3) - 1.5,
    "sum-of-one": lambda: 2.0 * quadratic(*B),
    "sum-conjugate": lambda: (
        DistributionEnergy(normal(4, 1)) + DistributionEnergy(normal(3))
    ),
    "sum-given": lambda: (
        FunctionEnergy(bowl, (2,), context_shape=(2,)) + quadratic()
    ).given(torch.randn(*B, 2)),
    "exp": lambda: quadratic(*B).exp(),
    "mixture": lambda: MixtureEnergy([quadratic(4, 1), quadratic(3)], torch.randn(2)),
    "sum-mixture": lambda: MixtureEnergy([quadratic(4, 1), quadratic(3)]) + quadratic(),
    "clamped": lambda: ClampedEnergy(quadratic(*B, dim=3), {1: 0.5}),
    "linear-map": lambda: LinearMapEnergy(
        quadratic(*B), torch.randn(2, 2), torch.randn(2)
    ),
}


@pytest.fixture(params=CASES)
def energy(request):
    return CASES[request.param]()


def points(energy, *sample):
    return torch.rand(*sample, *B, *energy.event_shape) + 0.1


def test_each_energy_of_a_batch_is_one(energy):
    """Seen to fail with one matrix product for all precision matrices."""
    assert energy.batch_shape == B
    x = points(energy, 5)
    value, grad = energy.value_and_grad(x)
    assert energy(x).shape == value.shape == (5, *B)
    for i, j in [(0, 0), (3, 1), (2, -1)]:
        one = select(energy, i, j)
        assert one.batch_shape == ()
        one_value, one_grad = one.value_and_grad(x[:, i, j])
        torch.testing.assert_close(one(x[:, i, j]), energy(x)[:, i, j])
        torch.testing.assert_close(one_value, value[:, i, j])
        torch.testing.assert_close(one_grad, grad[:, i, j])


def test_gradients_are_autograds(energy):
    x = points(energy, 5).requires_grad_()
    value = energy(x)
    (expected,) = torch.autograd.grad(value.sum(), x)
    found, grad = energy.value_and_grad(x)
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(grad, expected)


def test_closed_forms_have_the_shape_of_the_batch(energy):
    known = energy.closed_form()
    if known is None:
        assert isinstance(energy, type(given()) | type(quadratic().exp())) or any(
            part.closed_form() is None for part in energy.energies
        )
        return
    x = points(energy, 5)
    assert known.log_partition.shape == known.distribution.batch_shape == B
    density = known.distribution.log_prob(x)
    torch.testing.assert_close(density, -energy(x) - known.log_partition)


def test_a_point_for_each_energy_is_wanted(energy):
    with pytest.raises(ValueError, match=r"x must have shape .* batch_shape \(4, 3\)"):
        energy(torch.ones(*energy.event_shape))
    with pytest.raises(ValueError, match="x must have shape .* batch_shape"):
        energy.value_and_grad(torch.ones(4, *energy.event_shape))


def test_distributions_have_the_batch_shape(energy):
    q = EnergyDistribution(energy)
    x = points(energy, 5)
    assert q.batch_shape == B
    assert q.log_partition.shape == B
    expected = -energy(x) - q.log_partition
    torch.testing.assert_close(q.log_prob(x), expected)
    torch.testing.assert_close(q.to_event(1).log_prob(x), expected.sum(-1))
    one = x[0, 0, 0]
    torch.testing.assert_close(q.log_prob(one), q.log_prob(one.expand(*B, -1)))
    assert q.expand([2, *B]).log_prob(x[:2]).shape == (2, *B)
    with pytest.raises(ValueError, match=r"batch_shape must be one that \(4, 3\)"):
        q.expand([3])
    if energy.closed_form() is not None:
        assert q.sample((6,)).shape == (6, *B, *energy.event_shape)
        assert q.expand([2, *B]).sample().shape == (2, *B, *energy.event_shape)
    assert "batch_shape: (4, 3)" in repr(q)


def test_a_given_log_partition_may_be_of_the_batch():
    energy = given()
    c = energy.context
    q = EnergyDistribution(energy, math.log(2 * math.pi) + c.sum(-1))
    expected = dist.Normal(c, 1.0).to_event(1)
    x = points(energy, 5)
    torch.testing.assert_close(q.log_prob(x), expected.log_prob(x))
    assert EnergyDistribution(energy, 1.5).log_partition.tolist() == [[1.5] * 3] * 4
    with pytest.raises(ValueError, match=r"or of batch_shape \(4, 3\), got shape \(4,"):
        EnergyDistribution(energy, torch.zeros(4))


def test_chains_draw_from_all_energies_of_a_batch_at_once():
    """The mean of each of six energies; seen to fail with one energy for all."""
    energy = FunctionEnergy(bowl, (2,), context_shape=(2,))
    c = torch.tensor([[-3.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    q = EnergyDistribution(energy.given(c))
    x = q.sample((1000,))
    assert x.shape == (1000, 3, 2)
    assert ((x.mean(0) - c).abs() < 4 / math.sqrt(1000)).all()
    assert ((x.var(0) - 1).abs() < 4 * math.sqrt(2 / 1000)).all()
    assert q.expand([2, 3]).sample().shape == (2, 3, 2)


def test_contexts_stay_live():
    energy = FunctionEnergy(bowl, (2,), context_shape=(2,))
    c = torch.randn(5, 2, requires_grad=True)
    energy.given(c)(torch.zeros(5, 2)).sum().backward()
    torch.testing.assert_close(c.grad, c.detach() - 1)


def test_what_has_no_context_refuses_one():
    with pytest.raises(NotImplementedError, match="QuadraticEnergy takes no context"):
        quadratic().given(torch.zeros(3))
    energy = FunctionEnergy(bowl, (2,), context_shape=(2,))
    with pytest.raises(ValueError, match=r"needs a context .*energy.given"):
        energy(torch.zeros(2))
    with pytest.raises(ValueError, match=r"context must have shape .*\(2,\), got \(3,"):
        energy.given(torch.zeros(3))
    with pytest.raises(NotImplementedError, match="takes no context"):
        (quadratic() + quadratic()).given(torch.zeros(3))


def test_a_function_may_close_over_a_batch():
    z = torch.randn(3)
    energy = FunctionEnergy(lambda x: (x - z).square(), (), batch_shape=(3,))
    assert EnergyDistribution(energy, 0.0).log_prob(torch.zeros(())).shape == (3,)


NORMAL = dist.Normal(torch.zeros(2), 1.0).to_event(1)


@pytest.mark.parametrize(
    "use",
    [
        lambda energy: pyro_ebm.partition.estimate(energy),
        lambda energy: pyro_ebm.partition.estimate(energy, NORMAL, "smc"),
        lambda energy: pyro_ebm.mcmc.MCMC(num_samples=2, num_chains=3).run(energy),
        lambda energy: pyro_ebm.mcmc.IndependentChains()(energy, 3),
        lambda energy: EnergyModel(energy),
        lambda energy: EnergyModel(energy, NORMAL),
        CompiledEnergy,
        lambda energy: PartEnergy(energy, (4,), slice(2)),
    ],
)
@pytest.mark.parametrize("batch", [lambda: quadratic(3), lambda: given()])
def test_what_is_for_one_energy_names_the_way_out(use, batch):
    with pytest.raises(ValueError, match=r"must be one energy here.*select\(energy, i"):
        use(batch())


def test_select_is_checked():
    for wrong in ((), (0,), (4, 0), (0, 0, 0)):
        with pytest.raises(IndexError, match="a number for each dimension of batch"):
            select(quadratic(*B), *wrong)


def test_the_log_partition_of_each_energy_is_estimated_one_by_one():
    energy = given()
    found = pyro_ebm.partition.estimate(select(energy, 1, 2)).value
    expected = math.log(2 * math.pi) + energy.context[1, 2].sum().item()
    assert found == pytest.approx(expected, abs=1e-3)


def test_batch_shapes_must_broadcast():
    with pytest.raises(ValueError, match="batch shapes that broadcast"):
        quadratic(3) + quadratic(4)


def test_a_free_log_partition_of_a_batch_is_refused():
    """Expanding it made it a function of a parameter, which is not refused."""
    for shape in ((4, 3), (3,), ()):
        q = EnergyDistribution(given(), torch.nn.Parameter(torch.zeros(shape)))
        with pytest.raises(ValueError, match="log_partition is a free parameter"):
            q.log_prob(torch.zeros(2))
