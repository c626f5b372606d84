"""What every energy owes to the library, whatever its formula."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import biject_to

from pyro_ebm import energies
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.independent import IndependentSites


class Ring(nn.Module):
    """A user's own network, with one parameter."""

    def __init__(self):
        super().__init__()
        self.radius = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return 3 * (x.norm(dim=-1) - self.radius) ** 2


def random_spins(*shape):
    return 2 * torch.bernoulli(torch.full(shape, 0.5)) - 1


def quadratic(dim=2):
    root = torch.randn(dim, dim) / 2
    return energies.QuadraticEnergy(torch.randn(dim), torch.eye(dim) + root @ root.mT)


def normal(*event):
    return dist.Normal(torch.randn(event), 1.5).to_event()


def gamma():
    return energies.DistributionEnergy(dist.Gamma(torch.tensor(3.0), 2.0))


def eight_schools(y):
    scale = pyro.sample("scale", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(scale * effect, 10.0), obs=y)


class Regression(PyroModule):
    """A Pyro model with a parameter."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(0.3))

    def forward(self):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = slope @ torch.tensor([1.0, 2.0]).to(slope)
        pyro.sample("y", dist.Normal(y, self.noise.exp()), obs=torch.tensor(1.0))


CASES = {
    "pyro-model": lambda: energies.PyroModelEnergy(eight_schools, torch.arange(3.0)),
    "pyro-module": lambda: energies.PyroModelEnergy(Regression()),
    "function": lambda: energies.FunctionEnergy(Ring(), (2,)),
    "function-scalar": lambda: energies.FunctionEnergy(lambda x: x**2 / 2, ()),
    "function-positive": lambda: energies.FunctionEnergy(
        lambda x: x - 2 * x.log(), (), constraints.positive
    ),
    "function-matrix": lambda: energies.FunctionEnergy(
        lambda x: x.square().sum((-2, -1)), (2, 3)
    ),
    "distribution-normal": lambda: energies.DistributionEnergy(normal(2)),
    "distribution-scalar": lambda: energies.DistributionEnergy(normal()),
    "distribution-gamma": gamma,
    "distribution-exponential": lambda: energies.DistributionEnergy(
        dist.Exponential(torch.ones(3)).to_event(1)
    ),
    "distribution-simplex": lambda: energies.DistributionEnergy(
        dist.Dirichlet(2 * torch.ones(3))
    ),
    "distribution-mixture": lambda: energies.DistributionEnergy(
        dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(3)), dist.Normal(torch.arange(3.0), 1.0)
        )
    ),
    "quadratic": quadratic,
    "neural": lambda: energies.NeuralEnergy((2,), (16, 16)),
    "neural-base": lambda: energies.NeuralEnergy((3,), (8,), base=normal(3)),
    "neural-tanh": lambda: energies.NeuralEnergy(
        (2,), (8,), activation=nn.Tanh, base=normal(2)
    ),
    "neural-relu": lambda: energies.NeuralEnergy((2,), activation=nn.ReLU),
    "neural-scalar": lambda: energies.NeuralEnergy((), (8,)),
    "clamped": lambda: energies.ClampedEnergy(quadratic(3), {1: 0.5}),
    "clamped-gamma": lambda: energies.ClampedEnergy(
        energies.DistributionEnergy(dist.Gamma(2.0, torch.ones(2, 2)).to_event(2)),
        {(0, 1): 0.5},
    ),
    "compiled": lambda: energies.CompiledEnergy(quadratic()),
    "convolutional": lambda: energies.ConvolutionalEnergy((1, 5, 4), (3, 4)),
    "convolutional-base": lambda: energies.ConvolutionalEnergy(
        (2, 4, 4), (3, 4, 4), base=normal(2, 4, 4)
    ),
    "mixture": lambda: energies.MixtureEnergy([quadratic(), quadratic()]),
    "mixture-learned": lambda: energies.MixtureEnergy(
        [quadratic(), energies.NeuralEnergy((2,), (8,))], nn.Parameter(torch.randn(2))
    ),
    "part": lambda: energies.PartEnergy(quadratic(), (2, 2), (0,), (slice(None), 1)),
    "part-positive": lambda: energies.PartEnergy(
        energies.DistributionEnergy(dist.Gamma(torch.tensor(3.0), 2.0)), (2,), 0, 1
    ),
    "linear-map": lambda: energies.LinearMapEnergy(
        quadratic(3), nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))
    ),
    "linear-map-scalar": lambda: energies.LinearMapEnergy(
        energies.FunctionEnergy(lambda y: y**2, ()), torch.randn(2, 3)
    ),
    "sum": lambda: quadratic() + energies.FunctionEnergy(Ring(), (2,)) - 1.0,
    "sum-learned": lambda: nn.Parameter(torch.tensor(2.0)) * quadratic(),
    "sum-scalar": lambda: 2.0 * energies.DistributionEnergy(normal()),
    "exp": lambda: quadratic().exp(),
    "ising": lambda: energies.IsingEnergy((2, 3), 0.4),
    "ising-field-free": lambda: energies.IsingEnergy(
        (2, 3, 2), 0.4, torch.randn(2, 3, 2), periodic=False
    ),
    "potts": lambda: energies.PottsEnergy((3, 2), 3, 0.4),
    "boltzmann": lambda: energies.BoltzmannEnergy(torch.randn(4, 4).triu(1)),
    "factor-graph": lambda: energies.FactorGraphEnergy(
        [2, 3, 2], [((0, 1), torch.randn(2, 3)), ((1, 2), torch.randn(3, 2))]
    ),
    "factor-graph-spins": lambda: energies.FactorGraphEnergy.ising(
        energies.torus_edges((3,)), 0.4, torch.randn(3)
    ),
    "chain": lambda: energies.ChainEnergy(torch.randn(4, 3), torch.randn(3, 3)),
    "rbm": lambda: energies.RBMEnergy(torch.randn(4, 3), torch.randn(4)),
    "rbm-categories": lambda: energies.RBMEnergy(
        torch.randn(4, 3, 2), visible="categorical"
    ),
    "rbm-real": lambda: energies.RBMEnergy(
        torch.randn(4, 2), visible="gaussian", scale=torch.rand(4) + 0.5
    ),
    "free-energy": lambda: energies.FreeEnergy(
        energies.BoltzmannEnergy(torch.randn(4, 4).triu(1)), [1, 2]
    ),
    "hopfield": lambda: energies.HopfieldEnergy(random_spins(3, 5), 3),
    "spin-memory": lambda: energies.SpinMemoryEnergy(random_spins(3, 5)),
    "spin-memory-learned": lambda: energies.SpinMemoryEnergy(
        nn.Parameter(torch.randn(3, 5)), 0.5
    ),
    "vector-memory": lambda: energies.VectorMemoryEnergy(torch.randn(4, 2), 3.0),
    "vector-memory-learned": lambda: energies.VectorMemoryEnergy(
        nn.Parameter(torch.randn(4, 3)), 0.5, nn.Parameter(torch.randn(4))
    ),
    "unconstrained": lambda: energies.UnconstrainedEnergy(gamma()),
    "unconstrained-simplex": lambda: energies.UnconstrainedEnergy(
        energies.DistributionEnergy(dist.Dirichlet(2 * torch.ones(3)))
    ),
}


@pytest.fixture(params=CASES)
def energy(request):
    return CASES[request.param]()


def draw(energy, *batch, dtype=None):
    """Points inside the support, shape ``(*batch, *event)``."""
    if energy.support.is_discrete:
        uniform = IndependentSites.uniform(energy.support, energy.event_shape)
        return uniform.sample(batch).to(dtype or torch.get_default_dtype())
    to_support = biject_to(energy.support)
    return to_support(
        torch.randn(batch + to_support.inverse_shape(energy.event_shape), dtype=dtype)
    )


def test_every_public_energy_is_covered():
    public = {getattr(energies, name) for name in energies.__all__}
    wanted = {c for c in public if isinstance(c, type) and issubclass(c, Energy)} - {
        Energy
    }
    assert {type(build()) for build in CASES.values()} >= wanted


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_shapes(energy, batch):
    x = draw(energy, *batch)
    value, grad = energy.value_and_grad(x)
    assert energy(x).shape == value.shape == batch
    assert grad.shape == x.shape


def test_support_has_the_events_dimensions(energy):
    assert energy.support.event_dim == energy.event_dim == len(energy.event_shape)
    assert energy.support.check(draw(energy, 7)).shape == (7,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_to(energy, dtype):
    energy.to(dtype)
    x = draw(energy, 4, dtype=dtype)
    value, grad = energy.value_and_grad(x)
    assert energy(x).dtype == value.dtype == grad.dtype == dtype


@pytest.mark.gpu
def test_device_follows_to(energy):
    x = draw(energy, 4)
    on_cpu = energy.value_and_grad(x)
    energy.to("cuda")
    for here, there in zip(on_cpu, energy.value_and_grad(x.cuda()), strict=True):
        torch.testing.assert_close(here, there.cpu())


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_value_and_grad_is_autograds(energy, grad_enabled):
    x = draw(energy, 2, 5).requires_grad_()
    expected = energy(x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    with torch.set_grad_enabled(grad_enabled):
        value, grad = energy.value_and_grad(x)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, expected_grad)
    assert not value.requires_grad
    assert not grad.requires_grad


def test_value_and_grad_leaves_x_and_parameters_alone(energy):
    x = draw(energy, 4)
    before = x.clone()
    energy.value_and_grad(x)
    assert not x.requires_grad
    assert x.equal(before)
    assert all(p.grad is None for p in energy.parameters())


def test_batch_is_independent(energy):
    x = draw(energy, 2, 3)
    one_by_one = torch.stack([energy(point) for row in x for point in row])
    torch.testing.assert_close(energy(x).flatten(), one_by_one)


def test_gradients_reach_every_parameter(energy):
    if not list(energy.parameters()):
        pytest.skip("no parameters")
    energy(draw(energy, 6)).sum().backward()
    for name, parameter in energy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_state_dict_round_trip(energy, request):
    other = CASES[request.node.callspec.params["energy"]]()
    for tensor in energy.state_dict().values():
        tensor.normal_()
    other.load_state_dict(energy.state_dict())
    assert list(other.state_dict()) == list(energy.state_dict())
    for name, tensor in other.state_dict().items():
        assert tensor.equal(energy.state_dict()[name])


def test_deepcopy_is_equal_and_apart(energy):
    x = draw(energy, 5)
    before = energy(x).detach()
    twin = copy.deepcopy(energy)
    assert torch.equal(twin(x), before)
    for parameter in twin.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(energy(x), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_input_is_never_a_plausible_energy(energy, bad):
    x = draw(energy, 3)
    clean = energy.value_and_grad(x)[0]
    x[1] = bad
    for value in (energy(x), energy.value_and_grad(x)[0]):
        assert not value[1].isfinite()
        torch.testing.assert_close(value[[0, 2]].detach(), clean[[0, 2]])


def test_wrong_event_shape_is_an_error(energy):
    wrong = torch.zeros(energy.event_shape + (7,)) if energy.event_dim else None
    if wrong is None:
        pytest.skip("any shape is a batch of scalars")
    for call in (energy, energy.value_and_grad):
        with pytest.raises(ValueError, match=r"x must have shape .* event_shape"):
            call(wrong)
        with pytest.raises(ValueError, match=r"x must have shape .* event_shape"):
            call(torch.zeros(()))


def test_repr_is_quiet(energy):
    assert type(energy).__name__ in repr(energy)


@pytest.mark.parametrize(
    ("fn", "seen"),
    [
        (lambda x: x.sum(-1, keepdim=True), r"shape \(4, 1\)"),
        (lambda x: x.sum(), r"shape \(\)"),
        (lambda x: x.sum(-1).long(), "torch.int64"),
    ],
)
def test_wrong_output_is_an_error(fn, seen):
    energy = energies.FunctionEnergy(fn, (2,))
    with pytest.raises(ValueError, match=r"FunctionEnergy must return") as error:
        energy(torch.zeros(4, 2))
    assert "(4,)" in str(error.value)
    error.match(seen)
    with pytest.raises(ValueError, match=r"FunctionEnergy must return"):
        energy.value_and_grad(torch.zeros(4, 2))


def test_output_that_is_no_tensor_is_an_error():
    energy = energies.FunctionEnergy(lambda x: 0.0, (2,))
    with pytest.raises(TypeError, match="must return a tensor .* got float"):
        energy(torch.zeros(4, 2))


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match=r"event_shape must be a sequence .*\(2,\)"):
        energies.FunctionEnergy(torch.sum, 2)
    with pytest.raises(TypeError, match="fn must be callable, got Tensor"):
        energies.FunctionEnergy(torch.zeros(2), (2,))
    with pytest.raises(ValueError, match="support must have event_dim 1"):
        energies.FunctionEnergy(torch.sum, (2,), constraints.positive)
    with pytest.raises(TypeError, match=r"must be a constraint, got 'positive'"):
        energies.FunctionEnergy(torch.sum, (), "positive")
    with pytest.raises(TypeError, match="distribution must be a Pyro distribution"):
        energies.DistributionEnergy(torch.zeros(2))
    batch = energies.DistributionEnergy(dist.Normal(torch.zeros(2), 1.0))
    assert batch.batch_shape == (2,)
