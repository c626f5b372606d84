"""Mixtures of Student distributions: density, draws and fit.

Faults that a test is meant to catch are named with it.
"""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.partition.importance import student_mixture
from pyro_ebm.partition.importance.student_mixture import (
    StudentMixture,
    cholesky,
    fit_clusters,
)


class Light(StudentMixture):
    """With tails so light that second moments have an error bar."""

    degrees = 12.0


def example(kind=StudentMixture):
    return kind(
        torch.tensor([0.3, 0.7]),
        torch.tensor([[0.0, 1.0, 2.0], [-3.0, 0.0, 1.0]]),
        torch.tensor(
            [
                [[1.0, 0.0, 0.0], [0.5, 0.4, 0.0], [0.0, -0.3, 2.0]],
                [[0.2, 0.0, 0.0], [0.0, 1.5, 0.0], [0.1, 0.2, 0.6]],
            ]
        ),
    )


def reference(mixture):
    """The same, of Pyro's own distributions."""
    parts = dist.MultivariateStudentT(
        torch.tensor(mixture.degrees), mixture.loc, mixture.scale_tril
    )
    return dist.MixtureSameFamily(dist.Categorical(mixture.weights), parts)


def test_density(monkeypatch):
    """Fault: the normalisation in the dimension, or in the scales."""
    mixture, u = example(), 5 * torch.randn(500, 3)
    expected = reference(mixture).log_prob(u)
    torch.testing.assert_close(mixture.log_prob(u), expected)
    monkeypatch.setattr(student_mixture, "_CHUNK", 70)  # many pieces
    torch.testing.assert_close(mixture.log_prob(u), expected)
    square = mixture.distances(u)
    assert square.shape == (2, 500)
    z = torch.linalg.solve(mixture.scale_tril[1], (u - mixture.loc[1]).mT)
    torch.testing.assert_close(square[1], z.square().sum(0))


def test_draws_have_the_moments_of_the_density():
    """First and second, by component too. Fault: the square root of the stretch is
    left out; one stretch for all; the transposed factor."""
    mixture, num = example(Light), 200_000
    x = mixture.sample(num)
    assert x.shape == (num, 3)
    w, loc = mixture.weights[:, None], mixture.loc
    cov = mixture.scale_tril @ mixture.scale_tril.mT * 12 / 10
    for value, mean in [
        (x, (w * loc).sum(0)),
        (
            (x[:, :, None] * x[:, None]).flatten(1),
            (w[:, None] * (cov + loc[:, :, None] * loc[:, None])).sum(0).flatten(),
        ),
    ]:
        z = (value.mean(0) - mean) / (value.std(0) / math.sqrt(num))
        assert (z.abs() < 4).all(), z
    share = (mixture.distances(x)[1] < mixture.distances(x)[0]).double().mean()
    again = reference(mixture).sample((num,))
    other = (mixture.distances(again)[1] < mixture.distances(again)[0]).double().mean()
    assert abs(share - other) < 4 * math.sqrt(0.5 / num)


def test_a_component_of_one_number():
    mixture = StudentMixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    grid = torch.linspace(-200, 200, 40_001)[:, None]
    assert mixture.log_prob(grid).exp().sum() * 0.01 == pytest.approx(1, abs=1e-6)


def likelihood(mixture, u, weights):
    return (weights @ mixture.log_prob(u)).item()


def test_each_step_raises_the_weighted_likelihood():
    """Until it is near that of the truth. Fault: the weights are left out; the
    responsibilities; ``nu + y`` upside down."""
    truth = example()
    proposal = dist.Normal(torch.zeros(3), 4.0).to_event(1)
    u = proposal.sample((20_000,))
    weights = (truth.log_prob(u) - proposal.log_prob(u)).softmax(0)
    mixture = StudentMixture(
        torch.tensor([0.5, 0.5]),
        torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]),
        2 * torch.eye(3).expand(2, 3, 3),
    )
    values = [likelihood(mixture, u, weights)]
    for _ in range(25):
        mixture = mixture.updated(u, weights, 0.0)
        values.append(likelihood(mixture, u, weights))
    assert all(new > old - 1e-9 for old, new in zip(values, values[1:], strict=False))
    assert values[-1] > values[0] + 0.5
    assert abs(values[-1] - likelihood(truth, u, weights)) < 0.05
    torch.testing.assert_close(mixture.weights.sum(), torch.tensor(1.0))


def test_components_of_few_draws_keep_their_place():
    """And a least weight. Fault: all components are moved; that weight is none."""
    far = StudentMixture(
        torch.tensor([0.5, 0.5]),
        torch.tensor([[0.0, 0.0], [1e9, 1e9]]),
        torch.eye(2).expand(2, 2, 2),
    )
    u = torch.cat([torch.randn(2000, 2), 1e9 + torch.randn(8, 2)])
    weights = torch.cat([torch.full((2000,), 1 / 2000), torch.full((8,), 1e-6)])
    found = far.updated(u, weights / weights.sum(), 0.1)
    torch.testing.assert_close(found.loc[1], far.loc[1])
    torch.testing.assert_close(found.scale_tril[1], far.scale_tril[1])
    assert found.weights[1].item() == pytest.approx(0.05 / 1.05, abs=1e-4)
    assert (found.loc[0] != far.loc[0]).all()


def test_the_shape_of_few_draws_is_shrunk_to_the_one_before():
    """Thirty draws in two dimensions have 15 parts of 16. Fault: all of it."""
    u, weights = torch.randn(30, 2), torch.full((30,), 1 / 30)
    before = StudentMixture(torch.ones(1), torch.zeros(1, 2), 10 * torch.eye(2)[None])
    found = before.updated(u, weights, 0.1)
    g = weights * 7 / (5 + u.square().sum(-1) / 100)
    loc = g @ u / g.sum()
    own = ((u - loc) * g[:, None]).mT @ (u - loc)
    torch.testing.assert_close(found.loc[0], loc)
    torch.testing.assert_close(
        found.scale_tril[0] @ found.scale_tril[0].mT,
        15 / 16 * own + 100 / 16 * torch.eye(2),
    )


def test_two_mixtures_joined_and_a_mixture_at_points():
    one, other = example(), example()._replace(loc=example().loc + 10)
    both, u = one.joined(other, 0.25), 8 * torch.randn(50, 3)
    expected = torch.logaddexp(
        one.log_prob(u) + math.log(0.75), other.log_prob(u) + math.log(0.25)
    )
    torch.testing.assert_close(both.log_prob(u), expected)
    at = one.at(one.loc.flip(0) + 0.01)
    torch.testing.assert_close(at.loc, one.loc.flip(0) + 0.01)
    torch.testing.assert_close(at.scale_tril, one.scale_tril.flip(0))
    torch.testing.assert_close(at.weights, torch.full((2,), 0.5))


def test_two_clusters_are_found():
    """By their places, shapes and weighted shares. Fault: centres drawn near those
    before; the weights left out."""
    near = torch.tensor([-4.0, 0.0]) + torch.randn(3000, 2) * torch.tensor([0.3, 1.0])
    far = torch.tensor([5.0, 2.0]) + torch.randn(3000, 2)
    u = torch.cat([near, far])
    weights = torch.cat([torch.full((3000,), 0.2), torch.full((3000,), 0.8)]) / 3000
    found = fit_clusters(u, weights, 2)
    found = StudentMixture(*(part[found.loc[:, 0].argsort()] for part in found))
    torch.testing.assert_close(
        found.weights, torch.tensor([0.2, 0.8]), atol=0.01, rtol=0
    )
    torch.testing.assert_close(
        found.loc, torch.tensor([[-4.0, 0.0], [5.0, 2.0]]), atol=0.1, rtol=0
    )
    widths = found.scale_tril.diagonal(dim1=-2, dim2=-1)
    assert widths[0, 0] < 0.35 < 0.7 < widths[0, 1]


def test_one_cluster_and_more_clusters_than_there_are():
    u = torch.randn(2000, 3)
    weights = torch.full((2000,), 1 / 2000)
    exact = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    for number in (1, 8):
        found = fit_clusters(u, weights, number)
        loss = (exact.log_prob(u) - found.log_prob(u)).mean()
        assert abs(loss) < 0.1


def test_a_covariance_that_is_not_one():
    broken = torch.tensor([[4.0, 3.0], [3.0, 1.0]])
    torch.testing.assert_close(cholesky(broken), torch.tensor([2.0, 1.0]).diag())


def test_many_dimensions_have_as_many_degrees():
    """Else no draw is at the distance of a Gaussian's. Fault: five everywhere."""
    mixture = StudentMixture(torch.ones(1), torch.zeros(1, 100), torch.eye(100)[None])
    assert mixture.degrees == 100
    distance = mixture.sample(2000).norm(dim=-1)
    assert ((distance > 9) & (distance < 11)).double().mean() > 0.3
    assert example().degrees == 5
