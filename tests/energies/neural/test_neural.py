"""Networks with and without a base, for vectors and images."""

import functools

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.energies import (
    ConvolutionalEnergy,
    DistributionEnergy,
    NeuralEnergy,
    UnconstrainedEnergy,
)
from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.views.unconstrained import is_unconstrained


def standard_normal(*event):
    return dist.Normal(torch.zeros(event), 1.0).to_event()


class OwnTanh(nn.Tanh):
    """An activation that the closed form does not know."""


@pytest.mark.parametrize(
    "activation",
    [
        nn.SiLU,
        nn.Tanh,
        nn.GELU,
        functools.partial(nn.GELU, approximate="tanh"),
        nn.Softplus,
        functools.partial(nn.Softplus, beta=3.0, threshold=2.0),
        functools.partial(nn.SiLU, inplace=True),
        nn.ReLU,
        OwnTanh,
    ],
)
@pytest.mark.parametrize("hidden_sizes", [(), (7,), (16, 8, 5)])
def test_closed_form_gradient_is_autograds(activation, hidden_sizes):
    energy = NeuralEnergy((3,), hidden_sizes, activation=activation)
    for parameter in energy.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = 2 * torch.randn(4, 5, 3)
    for got, wanted in zip(
        energy.value_and_grad(x), Energy.value_and_grad(energy, x), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_gradient_is_without_autograd(monkeypatch):
    energy = NeuralEnergy((2,), base=standard_normal(2))
    monkeypatch.delattr(torch.autograd, "grad")
    energy.value_and_grad(torch.randn(3, 2))
    with pytest.raises(AttributeError):
        NeuralEnergy((2,), activation=nn.ReLU).value_and_grad(torch.randn(3, 2))


@pytest.mark.parametrize(
    ("build", "event"),
    [(NeuralEnergy, (2,)), (NeuralEnergy, (2, 3)), (ConvolutionalEnergy, (1, 8, 8))],
)
def test_base_adds_its_energy(build, event):
    energy = build(event, base=standard_normal(*event))
    bare = build(event)
    bare.load_state_dict(energy.state_dict())
    assert bare.base is None
    x = torch.randn(4, *event)
    torch.testing.assert_close(energy(x), bare(x) - energy.base.log_prob(x))


@pytest.mark.parametrize(
    ("build", "event"), [(NeuralEnergy, (2,)), (ConvolutionalEnergy, (1, 8, 8))]
)
def test_starts_near_the_base(build, event):
    energy = build(event, base=standard_normal(*event))
    x = torch.randn(100, *event)
    assert (energy(x) + energy.base.log_prob(x)).abs().max() < 0.05
    energy(x).sum().backward()
    assert all(parameter.grad.any() for parameter in energy.parameters())


def test_base_moves_with_the_module():
    given = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    energy = NeuralEnergy((2,), base=given).to(torch.float32)
    assert energy.base.loc.dtype == energy.base.scale_tril.dtype == torch.float32
    assert energy(torch.zeros(3, 2, dtype=torch.float32)).dtype == torch.float32
    assert given.loc.dtype == torch.float64


@pytest.mark.parametrize(
    "distribution",
    [
        dist.LogNormal(torch.zeros(2).double(), 1.0).to_event(1),
        dist.TransformedDistribution(
            dist.Gamma(torch.ones(2).double(), 1.0).to_event(1),
            [dist.transforms.AffineTransform(torch.ones(2).double(), 2.0).inv],
        ),
        dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(3).double()),
            dist.Normal(torch.zeros(3, 2).double(), 1.0).to_event(1),
        ),
    ],
    ids=["log-normal", "inverse-transform", "mixture"],
)
def test_any_distribution_moves(distribution):
    energy = DistributionEnergy(distribution)
    x = distribution.sample((5,))
    expected = -distribution.log_prob(x)
    energy.to(torch.float32)
    assert energy(x.float()).dtype == torch.float32
    torch.testing.assert_close(energy(x.float()), expected.float())
    assert energy.distribution.sample().dtype == torch.float32
    torch.testing.assert_close(-distribution.log_prob(x), expected)


def test_outside_the_support_the_energy_is_infinite():
    """An exponential below zero raises with validation and is finite without: both were
    seen when the two ``where`` of ``DistributionEnergy.forward`` were left out."""
    for validate_args in (True, False):
        exponential = dist.Exponential(torch.tensor(1.0), validate_args=validate_args)
        energy = DistributionEnergy(exponential)
        x = torch.tensor([-1.0, 1.0])
        assert energy(x).tolist() == [torch.inf, 1.0]
        assert energy.value_and_grad(x)[0].tolist() == [torch.inf, 1.0]


def test_components_of_different_support_have_no_common_one():
    boxes = dist.Uniform(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]))
    mixture = dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(2)), boxes, validate_args=False
    )
    assert DistributionEnergy(mixture).support.event_dim == 0
    assert not is_unconstrained(DistributionEnergy(mixture).support)
    with pytest.raises(NotImplementedError, match="Mixture"):
        UnconstrainedEnergy(DistributionEnergy(mixture))


@pytest.mark.parametrize("build", [NeuralEnergy, ConvolutionalEnergy])
@pytest.mark.parametrize(
    ("make_base", "error", "message"),
    [
        (
            lambda event: dist.Normal(torch.zeros(event), 1.0),
            ValueError,
            r"base must have an empty batch_shape.*got batch_shape \(1, 4, 4\)",
        ),
        (
            lambda event: standard_normal(3),
            ValueError,
            r"base must have event_shape \(1, 4, 4\), .* got \(3,\)",
        ),
        (
            lambda event: dist.Exponential(torch.ones(event)).to_event(),
            ValueError,
            "base must have support .*Real.* got .*Greater",
        ),
        (lambda event: torch.zeros(event), TypeError, "base must be a Pyro distrib"),
    ],
    ids=["batch", "event", "support", "type"],
)
def test_wrong_base_is_an_error(build, make_base, error, message):
    with pytest.raises(error, match=message):
        build((1, 4, 4), base=make_base((1, 4, 4)))


@pytest.mark.parametrize("build", [NeuralEnergy, ConvolutionalEnergy])
@pytest.mark.parametrize("activation", [nn.SiLU(), lambda: torch.tanh])
def test_wrong_activation_is_an_error(build, activation):
    with pytest.raises(TypeError, match="activation must build a module"):
        build((1, 4, 4), activation=activation)


@pytest.mark.parametrize(
    ("event_shape", "channels"), [((28, 28), (4,)), ((1, 3, 8), (4, 4, 4))]
)
def test_wrong_image_is_an_error(event_shape, channels):
    with pytest.raises(ValueError, match=r"event_shape must be \(channels, height"):
        ConvolutionalEnergy(event_shape, channels)


def test_image_energy_depends_on_every_pixel():
    energy = ConvolutionalEnergy((2, 9, 8), (4, 4, 4))
    _, grad = energy.value_and_grad(torch.randn(3, 2, 9, 8))
    assert grad.all()


def test_building_moves_no_random_stream():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    DistributionEnergy(standard_normal(2))
    assert torch.rand(()) == expected
