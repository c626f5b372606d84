"""Associative memories: retrieval, and log Z where it is known."""

import itertools

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    HopfieldEnergy,
    QuadraticEnergy,
    SpinMemoryEnergy,
    VectorMemoryEnergy,
)
from pyro_ebm.energies.memory import Spin
from pyro_ebm.partition import enumeration, quadrature
from pyro_ebm.testing import assert_moments


def random_spins(*shape):
    return 2 * torch.bernoulli(torch.full(shape, 0.5)) - 1


def all_flips(states):
    """Every state with one spin turned, ``(*batch, N)`` to ``(*batch, N, N)``."""
    return states.unsqueeze(-2) * (1 - 2 * torch.eye(states.shape[-1]))


def memories(patterns):
    return [
        HopfieldEnergy(patterns),
        HopfieldEnergy(patterns, 3),
        HopfieldEnergy(patterns, 6),
        SpinMemoryEnergy(patterns),
        SpinMemoryEnergy(patterns, 0.2),
    ]


# Energies


def test_hopfield_is_the_network_with_its_weights():
    patterns, x = random_spins(5, 12), random_spins(7, 12)
    weights = patterns.T @ patterns / 12
    expected = -torch.einsum("bi,ij,bj->b", x, weights, x) / 2
    torch.testing.assert_close(HopfieldEnergy(patterns)(x), expected)


@pytest.mark.parametrize("degree", [2, 3, 4, 7])
def test_the_depth_of_a_lone_pattern_is_its_size_over_the_degree(degree):
    pattern = random_spins(1, 12)
    energy = HopfieldEnergy(pattern, degree)(pattern)
    torch.testing.assert_close(energy, torch.tensor([-12.0 / degree]))


def test_exponential_memory_is_the_log_of_a_sum():
    patterns, x = random_spins(5, 12), random_spins(7, 12)
    expected = -(0.3 * x @ patterns.T).exp().sum(-1).log()
    torch.testing.assert_close(SpinMemoryEnergy(patterns, 0.3)(x), expected)


def test_patterns_are_learned_only_as_a_parameter():
    patterns = random_spins(3, 4)
    for build in (HopfieldEnergy, SpinMemoryEnergy, VectorMemoryEnergy):
        learned = nn.Parameter(patterns)
        assert any(p is learned for p in build(learned).parameters())
        assert not list(build(patterns).parameters())
        assert "patterns" in build(patterns).state_dict()


# Retrieval of spins


@pytest.mark.parametrize("real", [False, True])
def test_the_descent_ends_where_no_flip_lowers_the_energy(real):
    """Seen to fail where ``_sweep`` does not bring the overlaps up to date."""
    patterns = torch.randn(30, 16) if real else random_spins(30, 16)
    cues = random_spins(3, 20, 16)
    for memory in memories(patterns):
        state, converged, _ = memory.retrieve(cues)
        assert converged.all()
        assert converged.shape == (3, 20)
        assert (memory(state) <= memory(cues)).all()
        assert (memory(all_flips(state)) >= memory(state).unsqueeze(-1) - 1e-9).all()


def test_a_sweep_is_the_descent_written_out():
    patterns, cues = random_spins(9, 10), random_spins(6, 10)
    for memory in memories(patterns):
        for cue, found in zip(
            cues, memory.retrieve(cues, max_sweeps=1).state, strict=True
        ):
            state = cue.clone()
            for site in range(10):
                turned = state.clone()
                turned[site] *= -1
                state = turned if memory(turned) < memory(state) - 1e-9 else state
            assert found.equal(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_thousand_patterns_are_retrieved_without_overflow(dtype):
    """With the sums of exponentials themselves, ``exp(2 * 64)`` is infinite in
    float32: planted in ``from_overlaps``, and seen to fail there."""
    patterns = random_spins(1024, 64)
    cue = patterns[:20].clone()
    cue[:, :6] *= -1
    memory = SpinMemoryEnergy(patterns, 2.0)
    assert memory(patterns).isfinite().all()
    state, converged, num_steps = memory.retrieve(cue)
    assert state.equal(patterns[:20])
    assert state.dtype == dtype
    assert converged.all()
    assert num_steps == 2  # one that mends, and one that finds nothing to mend
    assert not HopfieldEnergy(patterns).retrieve(cue).state.equal(patterns[:20])


def test_an_outer_exp_moves_no_minimum():
    """The three are one memory at temperature zero: the outer map is monotone."""
    memory = SpinMemoryEnergy(random_spins(6, 10), 0.5)
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 10)
    flips = all_flips(states)

    def minima(energy):
        return (energy(flips) > energy(states).unsqueeze(-1)).all(-1)

    assert minima(memory).any()
    assert minima(memory.exp()).equal(minima(memory))
    assert minima(-(-memory).exp()).equal(minima(memory))


def test_the_outer_exp_of_the_negative_is_the_sum_of_exponentials():
    patterns, x = random_spins(5, 12), random_spins(7, 12)
    memory = -(-SpinMemoryEnergy(patterns)).exp()
    torch.testing.assert_close(memory(x), -(x @ patterns.T).exp().sum(-1))


def test_what_has_not_converged_is_said():
    memory = HopfieldEnergy(random_spins(1, 8))
    pattern = memory.patterns[0]
    cues = torch.stack([pattern, pattern * (1 - 2 * torch.eye(8)[0])])
    state, converged, num_steps = memory.retrieve(cues, max_sweeps=1)
    assert state.equal(pattern.expand(2, 8))
    assert converged.tolist() == [True, False]
    assert num_steps == 1


# Closed forms


def test_log_z_of_spins_is_that_of_enumeration():
    """Seen to fail with ``_log_two_cosh`` of the overlap instead of each site."""
    for patterns in (random_spins(4, 8), torch.randn(4, 8)):
        memory = SpinMemoryEnergy(patterns, 0.7)
        closed = memory.closed_form()
        assert closed.log_partition.item() == pytest.approx(enumeration(memory).value)
        x = random_spins(6, 8)
        expected = -memory(x) - closed.log_partition
        torch.testing.assert_close(closed.distribution.log_prob(x), expected)


def test_draws_of_spins_have_the_moments_of_the_memory():
    """Seen to fail with the field of ``Spin.sample`` not doubled."""
    memory = SpinMemoryEnergy(torch.randn(3, 6), 0.8)
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
    mass = (-memory(states)).softmax(0)
    draws = EnergyDistribution(memory).sample((5000,))
    pairs = [(i, j) for i, j in itertools.combinations(range(6), 2)]

    def statistics(x):
        products = torch.stack([x[:, i] * x[:, j] for i, j in pairs], -1)
        return torch.cat([x, products], -1)

    mean = mass @ statistics(states)
    assert_moments(statistics(draws), mean, 1 - mean.square())  # of -1 and +1


def test_spin_is_a_distribution():
    field = torch.tensor([-0.5, 0.0, 40.0])
    spin = Spin(field)
    ends = torch.tensor([[-1.0], [1.0]]).expand(2, 3)
    torch.testing.assert_close(spin.log_prob(ends).exp().sum(0), torch.ones(3))
    mean = (spin.log_prob(ends).exp() * ends).sum(0)
    torch.testing.assert_close(spin.mean, mean)
    torch.testing.assert_close(spin.variance, 1 - mean.square())
    assert spin.expand((2, 3)).sample((4,)).shape == (4, 2, 3)
    assert spin.expand((2, 3)).log_prob(ends).shape == (2, 3)
    with pytest.raises(ValueError, match="within the support"):
        Spin(field, validate_args=True).log_prob(torch.zeros(3))


@pytest.mark.parametrize("with_logits", [False, True])
def test_log_z_of_vectors_is_that_of_quadrature(with_logits):
    """Seen to fail without the weights that the lengths of the patterns give."""
    logits = torch.randn(4) if with_logits else None
    memory = VectorMemoryEnergy(torch.randn(4, 2), 3.0, logits)
    closed = memory.closed_form()
    found = quadrature(memory)
    assert found.status == "exact"
    assert closed.log_partition.item() == pytest.approx(found.value, abs=1e-6)
    x = torch.randn(6, 2)
    expected = -memory(x) - closed.log_partition
    torch.testing.assert_close(closed.distribution.log_prob(x), expected)


def test_a_memory_of_the_data_is_their_kernel_density_estimate():
    data, x = torch.randn(20, 2), torch.randn(5, 2)
    memory = VectorMemoryEnergy(data, 4.0, -2.0 * data.square().sum(-1))
    normals = dist.Normal(data, 0.5).to_event(1)
    expected = normals.log_prob(x.unsqueeze(-2)).exp().mean(-1).log()
    torch.testing.assert_close(
        EnergyDistribution(memory, memory.closed_form()[0]).log_prob(x), expected
    )


# Retrieval of vectors


def test_the_update_lowers_the_energy_to_a_stationary_point():
    memory = VectorMemoryEnergy(torch.randn(8, 3), 6.0, torch.randn(8))
    x = 2 * torch.randn(30, 3)
    for _ in range(20):
        below = memory.attend(x)
        assert (memory(below) <= memory(x) + 1e-12).all()
        x = below
    state, converged, _ = memory.retrieve(x, tolerance=1e-10)
    assert converged.all()
    assert memory.value_and_grad(state)[1].abs().max() < 1e-8


def test_sharp_vectors_are_retrieved_and_blunt_ones_averaged():
    patterns = nn.functional.normalize(torch.randn(20, 64), dim=-1)
    cue = patterns + 0.02 * torch.randn(20, 64)
    sharp = VectorMemoryEnergy(patterns, 50.0).retrieve(cue).state
    torch.testing.assert_close(sharp, patterns, atol=1e-3, rtol=0)
    blunt = VectorMemoryEnergy(patterns, 1e-3).retrieve(cue).state
    torch.testing.assert_close(
        blunt, patterns.mean(0).expand(20, 64), atol=1e-3, rtol=0
    )
    found = VectorMemoryEnergy(patterns, 1.0).retrieve(cue, max_steps=1, tolerance=1e-9)
    assert not found.converged.any()


# The outer exponential: what has a partition function


def test_minus_exp_of_minus_needs_a_box_or_a_base():
    g = QuadraticEnergy(torch.zeros(1))
    twin = -(-g).exp()
    assert quadrature(twin).status == "not_normalizable"
    box = constraints.independent(constraints.interval(-1.0, 1.0), 1)
    boxed = FunctionEnergy(twin, (1,), box)
    line = torch.linspace(-1, 1, 20_001).unsqueeze(-1)
    expected = torch.trapezoid((-twin(line)).exp(), line.squeeze(-1)).log().item()
    assert quadrature(boxed).value == pytest.approx(expected, abs=1e-5)
    base = DistributionEnergy(dist.Normal(torch.zeros(1), 1.0).to_event(1))
    assert quadrature(twin + base).status == "exact"
    assert quadrature(g.exp()).status == "exact"


# Errors


def test_wrong_arguments_are_errors():
    good = random_spins(3, 4)
    bad = [torch.zeros(3), torch.zeros(0, 4), torch.tensor([[1.0, torch.nan]])]
    for build in (HopfieldEnergy, SpinMemoryEnergy, VectorMemoryEnergy):
        for patterns in bad:
            with pytest.raises(
                ValueError, match=r"patterns must be a matrix of finite"
            ):
                build(patterns)
    for degree in (1, 2.5):
        with pytest.raises(ValueError, match="degree must be a whole number from 2"):
            HopfieldEnergy(good, degree)
    for build in (SpinMemoryEnergy, VectorMemoryEnergy):
        for sharpness in (0.0, -1.0, torch.inf, torch.nan):
            with pytest.raises(ValueError, match="sharpness must be positive and fin"):
                build(good, sharpness)
    for logits in (torch.zeros(2), torch.tensor([0.0, 0.0, torch.inf])):
        with pytest.raises(ValueError, match="logits must be 3 finite numbers"):
            VectorMemoryEnergy(good, logits=logits)


def test_wrong_cues_are_errors():
    spin, vector = (
        SpinMemoryEnergy(torch.ones(2, 4)),
        VectorMemoryEnergy(torch.ones(2, 4)),
    )
    with pytest.raises(ValueError, match="cue must hold spins"):
        spin.retrieve(torch.zeros(4))
    with pytest.raises(ValueError, match="cue must be finite"):
        vector.retrieve(torch.full((4,), torch.nan))
    for memory in (spin, vector):
        with pytest.raises(ValueError, match=r"x must have shape .* event_shape"):
            memory.retrieve(torch.ones(3))
    with pytest.raises(ValueError, match="max_sweeps must be at least 1, got 0"):
        spin.retrieve(torch.ones(4), max_sweeps=0)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        vector.retrieve(torch.ones(4), max_steps=0)
