"""Rows that are held out."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.bases import kernel_density
from pyro_ebm.bases.rows import shuffled, split, split_indices


def test_equal_rows_are_on_the_same_side():
    """Fault: rows held out that were seen."""
    data = torch.randn(20, 3).repeat(5, 1)
    train, apart = split(data, seed=0)
    assert len(train) + len(apart) == 100
    assert 10 <= len(apart) <= 25
    assert torch.cdist(train, apart).min() > 1e-3


@pytest.mark.parametrize("noise", [1e-5, 5e-4])
def test_nearly_equal_rows_are_on_the_same_side(noise):
    """Fault: only equal ones. Kernels of no width then look best, 70 nats wrongly."""
    data = torch.randn(100, 3).repeat(6, 1)
    train, apart = split_indices(data + noise * torch.randn_like(data), seed=0)
    assert 80 <= len(apart) <= 110
    mixed = (train[:, None] % 100 == apart % 100).any(0)
    assert mixed.double().mean() < 0.05


@pytest.mark.parametrize("law", [dist.Normal(0.0, 1.0), dist.Cauchy(0.0, 1.0)])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_rows_that_are_near_by_chance_count_as_different(law, dim):
    """On a line neighbours are near. Fault: as in many dimensions."""
    data = law.sample((2000, dim))
    assert torch.equal(shuffled(data, 0), shuffled(torch.arange(2000.0), 0))


def test_over_a_finite_support_each_row_is_held_out_by_chance():
    """Fault: of few states those that are held out were never seen."""
    data = torch.arange(20.0)[:, None].repeat(50, 1)
    train, apart = split_indices(data, 0, is_finite=True)
    assert sorted([*train.tolist(), *apart.tolist()]) == list(range(1000))
    assert len(apart) == 150
    assert len(data[apart].unique()) == len(data[train].unique()) == 20


def test_rows_that_differ_are_in_the_order_of_the_seed():
    data, generator = torch.randn(50, 2), torch.Generator().manual_seed(3)
    expected = torch.randperm(50, generator=generator)
    assert torch.equal(shuffled(data, 3), expected)
    train, apart = split_indices(data, 3)
    assert torch.equal(torch.cat([apart, train]), expected)


def test_rows_that_are_all_equal_are_cut_too():
    train, apart = split(torch.ones(50, 2), seed=0)
    assert len(train) > len(apart) > 0


def test_kernels_are_as_wide_as_without_repetitions():
    """Fault: spikes at rows that come twice."""
    data = torch.randn(150, 2)
    once, twice = kernel_density(data), kernel_density(data.repeat(2, 1))
    points = torch.randn(500, 2)
    assert (once.log_prob(points) - twice.log_prob(points)).abs().max() < 0.1
