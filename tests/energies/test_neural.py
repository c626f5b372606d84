"""Networks for vectors and images, with and without a base or a bounded norm."""

import copy
import functools
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm import EnergyModel, fit
from pyro_ebm.bases import gaussian_mixture
from pyro_ebm.energies import (
    ConvolutionalEnergy,
    DistributionEnergy,
    NeuralEnergy,
    UnconstrainedEnergy,
)
from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.neural import BoundedLinear, spectral_norm_bound
from pyro_ebm.energies.views.unconstrained import is_unconstrained
from pyro_ebm.infer import MaximumLikelihood


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


def corrected(event_shape, hidden_sizes=(16, 8), scale=1.0, **settings):
    """A network with a base that was fitted to data, that has learned something."""
    energy = NeuralEnergy(event_shape, hidden_sizes, **settings)
    energy.correct(standard_normal(*event_shape), scale * torch.randn(50, *event_shape))
    for parameter in energy.parameters():
        nn.init.normal_(parameter, std=0.7)
    return energy


@pytest.mark.parametrize("event_shape", [(), (1,), (3,)])
def test_few_coordinates_are_joined_by_their_projections(event_shape):
    energy = corrected(event_shape, scale=5.0)
    assert energy.frequency.shape[1] > 0
    assert energy.frequency.square().mean().sqrt() == pytest.approx(3.0, rel=0.4)
    x = torch.randn(4, 5, *event_shape)
    got, wanted = energy.value_and_grad(x), Energy.value_and_grad(energy, x)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-9, atol=1e-9)


def test_projections_are_for_what_can_bend_and_few_coordinates():
    assert not corrected((4,)).frequency.numel()
    assert not corrected((2,), ()).frequency.numel()
    assert not corrected((2,), spectral_norm=2.0).frequency.numel()
    free = NeuralEnergy((2,), (8,), base=standard_normal(2))
    free.correct(standard_normal(2), torch.randn(50, 2))  # it has a base
    assert not free.frequency.numel()


def test_projections_are_saved():
    x, models = torch.randn(50, 2), []
    for _ in range(2):
        model = EnergyModel(NeuralEnergy((2,), (8,)))
        models.append(model)
    models[0].use_base(gaussian_mixture(x, 1), x)
    nn.init.normal_(models[0].energy.network[-1].weight)
    models[1].load_state_dict(models[0].state_dict())
    torch.testing.assert_close(models[1].energy(x), models[0].energy(x))


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


def steep(activation=nn.SiLU, spectral_norm=1.5):
    """Weights that the bound holds down."""
    f = NeuralEnergy((3,), (16, 8), activation=activation, spectral_norm=spectral_norm)
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.normal_(std=2.0)
    return f


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 30), (40, 7), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_bound_and_a_tight_one(shape, dtype):
    for weight in (
        torch.randn(shape, dtype=dtype),
        torch.eye(*shape, dtype=dtype),  # the flattest spectrum there is
        1e-4 * torch.randn(shape, dtype=dtype),
        1e4 * torch.ones(shape, dtype=dtype),
    ):
        exact = torch.linalg.matrix_norm(weight, 2)
        bound = spectral_norm_bound(weight)
        assert bound > exact * (1 - 1e-5)
        assert bound < exact * min(shape) ** (1 / 64) * (1 + 1e-5)


def test_gradient_of_the_bound():
    weight = torch.randn(4, 3, requires_grad=True)
    assert torch.autograd.gradcheck(spectral_norm_bound, weight)
    layer = BoundedLinear(3, 4, 0.5)
    assert torch.autograd.gradcheck(
        lambda x: layer(x), torch.randn(2, 3).requires_grad_()
    )
    with torch.no_grad():
        layer.weight.zero_()
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_small_weights_stay_as_they_are():
    free, bounded = NeuralEnergy((2,), (8,)), NeuralEnergy((2,), (8,), spectral_norm=99)
    bounded.load_state_dict(free.state_dict())  # the same names
    x = torch.randn(5, 2)
    torch.testing.assert_close(free(x), bounded(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "activation", [nn.SiLU, nn.Tanh, nn.GELU, nn.Softplus, nn.ReLU]
)
def test_value_and_grad(activation):
    f, x = steep(activation), torch.randn(6, 3).requires_grad_()
    value, grad = f.value_and_grad(x)
    (wanted,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(value, f(x).detach())
    torch.testing.assert_close(grad, wanted)
    # The same point twice is the same energy: nothing is remembered.
    assert torch.equal(f.value_and_grad(x)[0], value)


def test_the_slope_is_bounded():
    """Without the bound it is some hundred times as steep."""
    x = 3 * torch.randn(500, 3)
    for activation, slope in ((nn.SiLU, 1.1), (nn.Tanh, 1.0)):
        limit = 1.5**3 * slope**2
        assert steep(activation).value_and_grad(x)[1].norm(dim=-1).max() <= limit
        free = steep(activation, 1e6).value_and_grad(x)[1]
        assert free.norm(dim=-1).max() > 10 * limit


def test_copies():
    f, x = steep(), torch.randn(4, 3)
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f)), steep()):
        other.load_state_dict(f.state_dict())
        assert torch.equal(other(x), f(x))
    calls = []
    f.network[0].register_forward_hook(lambda *_: calls.append(1))
    f.value_and_grad(x)
    assert calls == [1]


def test_a_fit_with_it():
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    energy = NeuralEnergy((2,), (8,), base=base, spectral_norm=2.0)
    model = EnergyModel(energy, base)
    objective = MaximumLikelihood(num_chains=32, num_steps=2)
    data = torch.randn(100, 2)
    result = fit(model, data, objective, num_steps=20, progress_bar=False)
    # Walkers, average and chains see the energy that is returned.
    torch.testing.assert_close(model.energy(data), result.distribution.energy(data))
    assert result.log_partition.is_reliable


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan")])
def test_wrong_bound(bound):
    with pytest.raises(ValueError, match="spectral norm must be positive and finite"):
        NeuralEnergy((2,), (8,), spectral_norm=bound)


def test_codes_enter_a_network_state_by_state():
    constraints = dist.constraints
    parts = [constraints.real, constraints.integer_interval(0, 2), constraints.boolean]
    support = constraints.cat(parts, dim=-1, lengths=[3, 1, 1])
    energy = NeuralEnergy((5,), (8,), support=support)
    assert energy.loc.shape == (3 + 1 + 3,)  # real, coin, one for each label
    label = torch.tensor([0.0, 2.0, 1.0, 2.0])
    x = torch.cat([torch.randn(4, 3), torch.stack([label, label > 1], 1)], 1)
    inputs = energy._inputs(x)
    assert torch.equal(inputs[:, :4], x[:, [0, 1, 2, 4]])
    assert torch.equal(inputs[:, 4:].argmax(1), x[:, 3].long())
    value, grad = energy.value_and_grad(x)
    assert torch.allclose(value, energy(x))
    assert (grad[:, 3] == 0).all()
    bits = constraints.independent(constraints.boolean, 1)
    assert NeuralEnergy((4,), (8,), support=bits).loc.shape == (4,)
    dice = constraints.independent(
        constraints.integer_interval(1, torch.tensor([6, 4])), 1
    )
    assert NeuralEnergy((2,), (8,), support=dice).loc.shape == (10,)
    with pytest.raises(ValueError, match="finite or mixed"):
        NeuralEnergy(
            (2,),
            (8,),
            support=constraints.independent(constraints.nonnegative_integer, 1),
        )
