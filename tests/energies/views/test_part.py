"""Energies on parts of an event and on linear maps of it."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_ebm.energies import (
    DistributionEnergy,
    FactorGraphEnergy,
    FunctionEnergy,
    IsingEnergy,
    LinearMapEnergy,
    MixtureEnergy,
    PartEnergy,
    QuadraticEnergy,
    spins,
)
from pyro_ebm.partition import enumeration, estimate, quadrature
from pyro_ebm.testing import CountingEnergy, assert_moments

PAIR = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)


@pytest.fixture
def pair():
    return QuadraticEnergy(torch.tensor([0.5, -1.0]), PAIR)


def windows(size):
    return [slice(i, i + 2) for i in range(size - 1)]


def dense_log_partition(precision, loc):
    """Of minus half the square, with a precision put together by hand."""
    return len(loc) / 2 * math.log(2 * math.pi) - torch.logdet(precision) / 2


def assert_autograds(energy, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy(x).sum(), x)
    value, own = energy.value_and_grad(x.detach())
    torch.testing.assert_close(own, grad)
    torch.testing.assert_close(value, energy(x).detach())


# Parts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "select"),
    [
        ([0], lambda x: [x[..., 0, :]]),
        ([(0, slice(0, 2)), -1], lambda x: [x[..., 0, :], x[..., 2, :]]),
        ([([2, 0], 1)], lambda x: [x[..., [2, 0], 1]]),
        ([(slice(0, 3, 2), 0)], lambda x: [x[..., ::2, 0]]),
        ([torch.eye(3, 2).bool()], lambda x: [x[..., [0, 1], [0, 1]]]),
        ([([0, 0], [1, 1])], lambda x: [x[..., [0, 0], [1, 1]]]),  # one number twice
        ([0, 1, 1], lambda x: [x[..., 0, :], x[..., 1, :], x[..., 1, :]]),
    ],
)
def test_parts_are_those_of_the_index(pair, indices, select):
    energy = PartEnergy(pair, (3, 2), *indices)
    x = torch.randn(5, 4, 3, 2)
    torch.testing.assert_close(energy(x), sum(pair(part) for part in select(x)))
    assert_autograds(energy, x)


def test_all_parts_cost_one_call(pair):
    counting = CountingEnergy(pair)
    energy = PartEnergy(counting, (6,), *windows(6))
    energy.value_and_grad(torch.randn(7, 6))
    assert (counting.num_values, counting.num_gradients) == (0, 7 * 5)


def test_a_gaussian_chain_has_a_closed_form(pair):
    """A Markov random field of overlapping pairs, against its dense precision."""
    field = PartEnergy(pair, (5,), *windows(5))
    precision, information = torch.zeros(5, 5), torch.zeros(5)
    for i in range(4):
        precision[i : i + 2, i : i + 2] += PAIR
        information[i : i + 2] += PAIR @ pair.loc.detach()
    loc = torch.linalg.solve(precision, information)
    known = field.closed_form()
    torch.testing.assert_close(known.distribution.loc, loc)
    torch.testing.assert_close(known.distribution.precision_matrix, precision)
    expected = dense_log_partition(precision, loc) - field(loc)
    torch.testing.assert_close(known.log_partition, expected)
    draws = known.distribution.sample((4000,))
    assert_moments(draws, loc, precision.inverse().diagonal())


def test_parts_that_leave_a_direction_free_need_others(pair):
    part = PartEnergy(pair, (3,), slice(0, 2))
    assert part.closed_form() is None
    rest = PartEnergy(dist.Normal(torch.tensor(2.0), 0.5), (3,), 2)
    known = (part + rest).closed_form()
    torch.testing.assert_close(known.log_partition, pair.closed_form().log_partition)
    torch.testing.assert_close(known.distribution.loc, torch.tensor([0.5, -1.0, 2.0]))
    sides = PartEnergy(pair, (3,), slice(0, 2)) + PartEnergy(pair, (3,), slice(1, 3))
    both = PartEnergy(pair, (3,), slice(0, 2), slice(1, 3))
    torch.testing.assert_close(
        sides.closed_form().log_partition, both.closed_form().log_partition
    )


def test_a_field_of_mixtures_has_every_combination():
    scalar = QuadraticEnergy(torch.tensor([-1.0, 0.0]), PAIR)
    mixture = MixtureEnergy(
        [scalar, QuadraticEnergy(torch.tensor([2.0, 1.0]))], torch.tensor([0.3, -0.2])
    )
    field = PartEnergy(mixture, (3,), slice(0, 2), slice(1, 3))
    known = field.closed_form()
    assert len(known.distribution.mixture_distribution.probs) == 4
    hidden = FunctionEnergy(field, (3,))
    assert abs(known.log_partition - quadrature(hidden).value) < 1e-5


def test_ising_by_parts_is_ising():
    """Bonds as parts, over spins: log Z of truth is enumerated."""
    bond = FunctionEnergy(
        lambda s: -0.3 * s.prod(-1), (2,), constraints.independent(spins, 1)
    )
    right = [([i, i], [j, j + 1]) for i in range(3) for j in range(2)]
    down = [([i, i + 1], [j, j]) for i in range(2) for j in range(3)]
    bonds = PartEnergy(bond, (3, 3), *right, *down)
    s = torch.where(torch.rand(20, 3, 3) < 0.5, -1.0, 1.0)
    torch.testing.assert_close(
        bonds(s), IsingEnergy((3, 3), 0.3, periodic=False)(s).detach()
    )
    assert abs(estimate(bonds).value - 6.80154) < 1e-4


def test_parts_of_finite_sites_are_summed_by_elimination():
    """Planted fault: the tables of an expert in the order of parts before factors."""
    left, right = torch.randn(2, 2), torch.randn(2, 2)
    graph = FactorGraphEnergy([2] * 3, [((0, 1), left), ((1, 2), right)])
    ends = FactorGraphEnergy([2] * 3, [(0, torch.randn(2)), (1, torch.randn(2))])
    expert = graph + 0.5 * ends
    parts = PartEnergy(expert, (41,), *(slice(i, i + 3) for i in range(0, 39, 2)))
    small = PartEnergy(expert, (7,), *(slice(i, i + 3) for i in range(0, 5, 2)))
    truth = enumeration(small).value
    assert small.closed_form().log_partition.item() == pytest.approx(truth, abs=1e-10)
    exact = parts.closed_form().distribution
    x = exact.sample((50,))
    torch.testing.assert_close(exact.log_prob(x), -parts(x) - exact.log_partition)
    whole = parts + PartEnergy(expert, (41,), slice(0, 3))
    assert whole.closed_form().log_partition.isfinite()


def test_positive_parts():
    gamma = dist.Gamma(torch.tensor(3.0), 2.0)
    energy = PartEnergy(gamma, (2,), 0, 1)
    assert energy.support.check(torch.tensor([[1.0, 2.0], [1.0, -2.0]])).tolist() == [
        True,
        False,
    ]
    assert abs(quadrature(energy).value) < 1e-5


def test_supports_that_differ_along_the_event():
    ends = [
        constraints.independent(c, 1) for c in (constraints.positive, constraints.real)
    ]
    support = constraints.cat(ends, dim=-1, lengths=[1, 1])
    gamma = PartEnergy(dist.Gamma(torch.tensor(3.0), 2.0), (2,), 0, support=support)
    normal = PartEnergy(dist.Normal(torch.tensor(3.0), 2.0), (2,), 1, support=support)
    assert (
        abs(quadrature(2.0 * normal + gamma).value + math.log(4 * math.pi**0.5)) < 1e-5
    )


def test_wrong_parts_are_errors(pair):
    for index, message in [
        (5, r"index 5 is not in an event of shape \(3,\)"),
        (slice(0, 3), r"part of the expert's event shape \(2,\).*got shape \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            PartEnergy(pair, (3,), index)
    with pytest.raises(ValueError, match="at least one part of the event, got none"):
        PartEnergy(pair, (3,))
    with pytest.raises(TypeError, match="must be an Energy or a Pyro distribution"):
        PartEnergy(torch.sin, (3,), 0)
    with pytest.raises(ValueError, match=r"empty batch_shape"):
        PartEnergy(dist.Normal(torch.zeros(2), 1.0), (3,), 0)
    with pytest.raises(ValueError, match="support of the whole event must be given"):
        PartEnergy(dist.Dirichlet(torch.ones(2)), (3,), slice(0, 2))
    with pytest.raises(ValueError, match=r"support must lie within that of the expert"):
        PartEnergy(
            dist.Gamma(torch.tensor(3.0), 2.0),
            (2,),
            0,
            support=constraints.independent(constraints.real, 1),
        )


# Linear maps -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expert", "shape"),
    [
        (lambda: FunctionEnergy(lambda y: y.cos(), ()), (3,)),
        (lambda: QuadraticEnergy(torch.randn(2), PAIR), (2, 3)),
        (lambda: QuadraticEnergy(torch.randn(2), PAIR), (2, 3, 4)),
        (lambda: FunctionEnergy(lambda y: y.sin().sum((-2, -1)), (2, 2)), (2, 2, 3)),
    ],
)
def test_a_linear_map_of_the_event(expert, shape):
    expert, matrix = expert(), torch.randn(shape)
    offset = torch.randn(expert.event_shape)
    energy = LinearMapEnergy(expert, matrix, offset)
    x = torch.randn(5, *energy.event_shape)
    y = torch.tensordot(x, matrix, _axes(x, matrix))
    torch.testing.assert_close(energy(x), expert(y + offset))
    assert_autograds(energy, x)


def _axes(x, matrix):
    rank = x.dim() - 1
    return list(range(1, rank + 1)), list(range(matrix.dim() - rank, matrix.dim()))


def test_an_invertible_map_moves_log_z_by_the_determinant(pair):
    matrix = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    mapped = LinearMapEnergy(pair, matrix, torch.tensor([1.0, -2.0]))
    known, inner = mapped.closed_form(), pair.closed_form()
    log_partition = inner.log_partition - matrix.det().abs().log()
    torch.testing.assert_close(known.log_partition, log_partition)
    mean = torch.linalg.solve(matrix, pair.loc - torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(known.distribution.loc, mean)
    x = torch.randn(4, 2)
    torch.testing.assert_close(
        known.distribution.log_prob(x), -mapped(x) - known.log_partition
    )


def test_a_projection_needs_others():
    """A Gaussian likelihood of one combination, with a prior: linear regression."""
    row, noise = torch.tensor([1.0, -2.0, 0.5]), torch.tensor(0.3)
    seen = LinearMapEnergy(dist.Normal(torch.tensor(1.5), noise), row)
    assert seen.closed_form() is None
    prior = DistributionEnergy(dist.Normal(torch.zeros(3), 2.0).to_event(1))
    known = (prior + seen).closed_form()
    evidence = dist.Normal(0.0, (4 * row @ row + noise**2).sqrt())
    torch.testing.assert_close(
        known.log_partition, evidence.log_prob(torch.tensor(1.5))
    )


def test_more_experts_than_dimensions():
    """Products of Student-t experts on the rows of a matrix, against quadrature."""
    matrix = torch.randn(5, 2)
    experts = dist.StudentT(torch.full((5,), 3.0)).to_event(1)
    energy = LinearMapEnergy(experts, matrix)
    rows = [LinearMapEnergy(dist.StudentT(torch.tensor(3.0)), row) for row in matrix]
    x = torch.randn(6, 2)
    torch.testing.assert_close(energy(x), sum(rows[1:], rows[0])(x))
    assert energy.closed_form() is None
    one, other = quadrature(energy), quadrature(sum(rows[1:], rows[0]))
    assert abs(one.value - other.value) < 1e-5


def test_matrix_and_offset_are_learned(pair):
    matrix, offset = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2))
    energy = LinearMapEnergy(pair, matrix, offset)
    assert {id(p) for p in energy.parameters()} >= {id(matrix), id(offset)}
    log_partition = energy.closed_form().log_partition
    grad_matrix, grad_offset = torch.autograd.grad(log_partition, [matrix, offset])
    torch.testing.assert_close(grad_matrix, -matrix.detach().inverse().mT)
    torch.testing.assert_close(grad_offset, torch.zeros(2), atol=1e-9, rtol=0)
    fixed = LinearMapEnergy(pair, matrix.detach())
    assert "matrix" in fixed.state_dict()
    assert fixed.offset is None


def test_wrong_maps_are_errors(pair):
    for matrix in (torch.zeros(3, 2), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match=r"matrix must be finite and have shape"):
            LinearMapEnergy(pair, matrix)
    with pytest.raises(ValueError, match=r"offset must have .* \(2,\), got \(3,\)"):
        LinearMapEnergy(pair, torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="energy must be defined for all real numbers"):
        LinearMapEnergy(dist.Gamma(torch.tensor(3.0), 2.0), torch.ones(2))


def test_a_part_of_a_mixed_event():
    parts = [constraints.real, constraints.integer_interval(0, 2)]
    support = constraints.cat(parts, dim=-1, lengths=[2, 1])
    pair = QuadraticEnergy(torch.zeros(2))
    energy = PartEnergy(pair, (3,), [0, 2], support=support)
    assert energy(torch.tensor([1.0, 5.0, 2.0])) == 2.5
    bits = FunctionEnergy(lambda x: x, (), constraints.boolean)
    with pytest.raises(ValueError, match="lie within"):
        PartEnergy(bits, (3,), 2, support=support)  # of three states
    with pytest.raises(ValueError, match="lie within"):
        PartEnergy(bits, (3,), 0, support=support)
