"""Mixtures of energies: weights, responsibilities, closed form."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    MixtureEnergy,
    NeuralEnergy,
    QuadraticEnergy,
)
from pyro_ebm.testing import assert_moments


@pytest.fixture
def parts():
    near = QuadraticEnergy(torch.zeros(2), torch.eye(2))
    far = QuadraticEnergy(torch.tensor([3.0, 0.0]), torch.diag(torch.tensor([4.0, 1])))
    return [near, far]


def test_value_is_the_log_of_the_sum(parts):
    logits = torch.tensor([0.5, -1.0])
    x = torch.randn(4, 2)
    densities = [(ell - f(x)).exp() for ell, f in zip(logits, parts, strict=True)]
    torch.testing.assert_close(MixtureEnergy(parts, logits)(x), -sum(densities).log())


def test_one_component_is_itself(parts):
    x = torch.randn(4, 2)
    torch.testing.assert_close(MixtureEnergy(parts[:1])(x), parts[0](x))


def test_closed_form_is_the_normalised_density(parts):
    energy = MixtureEnergy(parts, torch.tensor([0.5, -1.0]))
    log_partition, mixture = energy.closed_form()
    x = torch.randn(6, 2)
    torch.testing.assert_close(mixture.log_prob(x), -energy(x) - log_partition)


def test_weights_of_components_carry_their_partition_functions(parts):
    """Weights exp(logits_k) without Z_k: planted in ``closed_form``, and seen to fail
    by 1/6 in the weights."""
    mixture = MixtureEnergy(parts).closed_form().distribution
    w = 1 / 3  # Z of the far component is half that of the near one
    torch.testing.assert_close(
        mixture.mixture_distribution.probs, torch.tensor([1 - w, w])
    )
    variance = torch.tensor([(1 - w) + w / 4 + 9 * w * (1 - w), 1.0])
    assert_moments(mixture.sample((4000,)), torch.tensor([3 * w, 0.0]), variance)


def test_closed_form_where_the_parts_are_gaussian_by_another_name(parts):
    gaussian = dist.MultivariateNormal(torch.ones(2), torch.eye(2))
    energy = MixtureEnergy([parts[0] + 1.0, DistributionEnergy(gaussian)])
    log_partition, mixture = energy.closed_form()
    x = torch.randn(6, 2)
    torch.testing.assert_close(mixture.log_prob(x), -energy(x) - log_partition)


def test_no_closed_form_where_a_part_has_none(parts):
    assert MixtureEnergy([*parts, NeuralEnergy((2,))]).closed_form() is None
    student = DistributionEnergy(dist.StudentT(torch.ones(2)).to_event(1))
    assert MixtureEnergy([*parts, student]).closed_form() is None


def test_a_component_of_infinite_energy_drops_out(parts):
    """Its gradient is not a number: planted by leaving out the ``where`` of
    ``value_and_grad``, and seen to fail."""
    box = FunctionEnergy(lambda x: (1 - x[..., 0]).log(), (2,))
    walled = FunctionEnergy(
        lambda x: torch.where(x[..., 0] < 0, torch.inf, x[..., 0].sqrt()), (2,)
    )
    x = torch.tensor([[-1.0, 0.5], [0.25, 0.5]])
    value, grad = MixtureEnergy([parts[0], walled]).value_and_grad(x)
    torch.testing.assert_close(value[0], parts[0](x)[0].detach())
    torch.testing.assert_close(grad[0], parts[0].value_and_grad(x)[1][0])
    assert not MixtureEnergy([box])(torch.tensor([2.0, 0.0])).isfinite()


def test_logits_are_learned_only_as_a_parameter(parts):
    learned = nn.Parameter(torch.zeros(2))
    assert any(p is learned for p in MixtureEnergy(parts, learned).parameters())
    fixed = MixtureEnergy(parts, torch.zeros(2))
    assert "logits" in fixed.state_dict()
    assert "logits" not in dict(fixed.named_parameters())


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(()), torch.tensor([0.0, -torch.inf])]
)
def test_wrong_logits_are_errors(parts, logits):
    with pytest.raises(ValueError, match="logits must be 2 finite numbers"):
        MixtureEnergy(parts, logits)


def test_wrong_parts_are_errors(parts):
    with pytest.raises(ValueError, match="at least one Energy, got none"):
        MixtureEnergy([])
    with pytest.raises(ValueError, match=r"one event_shape, got \(2,\) and \(1,\)"):
        MixtureEnergy([*parts, QuadraticEnergy(torch.zeros(1))])
    with pytest.raises(TypeError, match="must hold Energy objects, got Normal"):
        MixtureEnergy([*parts, dist.Normal(0.0, 1.0)])
