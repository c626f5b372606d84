"""The restricted Boltzmann machine against sums over its hidden units."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import RBMEnergy
from pyro_ebm.mcmc import Gibbs
from pyro_ebm.partition import enumeration, estimate, gibbs_annealing
from tests.energies.discrete.test_chain import chi_square


def machine(num_visible=5, num_hidden=3, scale=1.0):
    weight = scale * torch.randn(num_visible, num_hidden)
    return RBMEnergy(weight, torch.randn(num_visible), torch.randn(num_hidden))


def corners(dim, values=(0.0, 1.0)):
    return torch.tensor(list(itertools.product(values, repeat=dim)))


def joint(energy, v, h):
    """Minus the joint energy, shape ``(N_v, N_h)``."""
    return (
        (v @ energy.visible_bias)[:, None] + h @ energy.hidden_bias
        + v @ energy.weight @ h.mT
    )  # fmt: skip


def test_free_energy_and_conditionals_are_those_of_the_joint():
    energy = machine()
    v, h = corners(5), corners(3)
    log_joint = joint(energy, v, h)
    torch.testing.assert_close(energy(v), -torch.logsumexp(log_joint, 1))
    mean_h = log_joint.softmax(1) @ h
    torch.testing.assert_close(energy.hidden_field(v).sigmoid(), mean_h)
    mean_v = log_joint.softmax(0).mT @ v
    torch.testing.assert_close(energy.visible_field(h).sigmoid(), mean_v)


def test_annealing_path():
    energy = machine(scale=0.5)
    path = energy.annealing_path()
    v = corners(5)
    torch.testing.assert_close(path.at(1.0)(v), energy(v))
    start = path.at(0.0)
    log_prob = path.start.distribution.log_prob(v)
    torch.testing.assert_close(-start(v) - path.start.log_partition, log_prob)
    assert enumeration(start).value == pytest.approx(path.start.log_partition.item())
    # The mean field is nearer to the truth than the biases alone.
    truth = (-energy(v)).softmax(0) @ v
    off = (path.start.distribution.mean - truth).abs().max()
    assert off < (energy.visible_bias.sigmoid() - truth).abs().max() / 2


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"weight must have shape \(V, H\).*got \(3,"):
        RBMEnergy(torch.zeros(3))
    with pytest.raises(ValueError, match=r"visible_bias must have shape \(3,\).*\(2,"):
        RBMEnergy(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"hidden_bias must have shape \(2,\).*\(3,"):
        RBMEnergy(torch.zeros(3, 2), None, torch.zeros(3))


def test_what_carries_a_graph_stays_live():
    """Seen to fail where the constructor detaches."""
    latent = torch.randn(5, 3, requires_grad=True)
    bias = torch.nn.Parameter(torch.randn(3))
    energy = RBMEnergy(2 * latent, None, bias)
    assert energy.hidden_bias is bias
    assert [name for name, _ in energy.named_parameters()] == [
        "visible_bias", "hidden_bias"
    ]  # fmt: skip
    (grad,) = torch.autograd.grad(energy(torch.ones(5)), latent)
    expected = -2 * energy.hidden_field(torch.ones(5)).sigmoid().expand(5, 3)
    torch.testing.assert_close(grad, expected)


@pytest.fixture(params=[(6, 3), (3, 6)], ids=["hidden", "visible"])
def small(request):
    """A machine, all of its visible states, and their log densities."""
    energy = machine(*request.param)
    v = corners(request.param[0])
    return energy, v, -energy(v)


def test_closed_form(small):
    """Planted fault: the biases of the layer that is summed left out."""
    energy, v, log_terms = small
    known = energy.closed_form()
    torch.testing.assert_close(known.log_partition, log_terms.logsumexp(0))
    own = list(energy.parameters())
    for a, b in zip(
        torch.autograd.grad(known.log_partition, own, retain_graph=True),
        torch.autograd.grad(log_terms.logsumexp(0), own, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    mean = log_terms.softmax(0) @ v
    torch.testing.assert_close(known.distribution.mean, mean)
    torch.testing.assert_close(known.distribution.log_prob(v), log_terms.log_softmax(0))
    assert estimate(energy).status == "exact"


def test_draws_and_conditionals(small):
    energy, v, log_terms = small
    exact = energy.closed_form().distribution
    place = 2.0 ** torch.arange(v.shape[1]).flip(0)
    draws = exact.sample((20_000,))
    assert chi_square((draws @ place).long(), log_terms.detach()) < 4
    given = exact.condition({1: 1.0}).condition({0: 0.0})
    inside = (v[:, 0] == 0) & (v[:, 1] == 1)
    log_part, rest = log_terms[inside], v[inside][:, 2:]
    torch.testing.assert_close(given.log_partition, log_part.logsumexp(0))
    torch.testing.assert_close(given.log_prob(rest), log_part.log_softmax(0))
    torch.testing.assert_close(given.mean, log_part.softmax(0) @ rest)
    draws = given.sample((20_000,))
    place = place[: rest.shape[1]] / place[rest.shape[1] - 1]
    assert chi_square((draws @ place).long(), log_part.detach()) < 4


def test_mode_where_the_visible_layer_is_summed():
    energy, v = machine(3, 6), corners(3)
    exact = energy.closed_form().distribution
    torch.testing.assert_close(exact.mode, v[energy(v).argmin()])
    with pytest.raises(NotImplementedError, match="most probable visible state"):
        _ = machine(6, 3).closed_form().distribution.mode


def test_large_weights_lose_no_state():
    """Only states of some weight are kept for the gradient: those that count."""
    energy = machine(scale=300.0)
    known = energy.closed_form().log_partition
    log_terms = -energy(corners(5))
    torch.testing.assert_close(known, log_terms.logsumexp(0))
    (found,) = torch.autograd.grad(known, energy.weight)
    (expected,) = torch.autograd.grad(log_terms.logsumexp(0), energy.weight)
    torch.testing.assert_close(found, expected)


def test_large_layers_have_no_closed_form():
    assert machine(64, 16).closed_form() is not None
    assert machine(100, 20).closed_form() is None


KINDS = {  # the values of visible and hidden units, and their statistics
    "spin": ([-1.0, 1.0], [-1.0, 1.0], lambda v: v),
    "categorical": (
        [0.0, 1.0, 2.0],
        [0.0, 1.0],
        lambda v: torch.nn.functional.one_hot(v.long(), 3).to(v).flatten(-2),
    ),
}


def of_kind(kind, num_visible=4, num_hidden=3):
    shape = (num_visible, 3) if kind == "categorical" else (num_visible,)
    weight, hidden_bias = torch.randn(*shape, num_hidden), torch.randn(num_hidden)
    settings = {"scale": torch.rand(num_visible) + 0.5} if kind == "gaussian" else {}
    return RBMEnergy(weight, torch.randn(shape), hidden_bias, visible=kind, **settings)


@pytest.mark.parametrize("sizes", [(3, 2), (2, 5)], ids=["hidden", "visible"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_finite_units(kind, sizes):
    """Planted faults: binary hidden units of a spin machine; a field of spins not
    doubled in its draws."""
    energy = of_kind(kind, *sizes)
    values, hidden_values, statistic = KINDS[kind]
    v, h = corners(sizes[0], values), corners(sizes[1], hidden_values)
    t = statistic(v)
    log_joint = (
        (t @ energy.visible_bias.flatten())[:, None] + h @ energy.hidden_bias
        + t @ energy.weight.flatten(0, -2) @ h.mT
    )  # fmt: skip
    log_terms = log_joint.logsumexp(1)
    torch.testing.assert_close(energy(v), -log_terms, rtol=1e-12, atol=1e-12)
    over_hidden = energy.over_hidden()
    torch.testing.assert_close(over_hidden(h), -log_joint.logsumexp(0))
    known = energy.closed_form()
    own = list(energy.parameters())
    value, truth = known.log_partition, log_terms.logsumexp(0)
    torch.testing.assert_close(value, truth, rtol=0, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(value, own),
        torch.autograd.grad(truth, own, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert enumeration(energy).value == pytest.approx(truth.item(), abs=1e-10)
    probs = log_terms.softmax(0).detach()
    marginals = known.distribution.marginals()
    for state, value in enumerate(values):
        torch.testing.assert_close(marginals[:, state], probs @ (v == value).to(v))
    place = float(len(values)) ** torch.arange(sizes[0]).flip(0)
    draws = known.distribution.sample((20_000,))
    index = torch.searchsorted(torch.tensor(values), draws)
    assert chi_square((index.to(v) @ place).long(), log_terms.detach()) < 4
    given = known.distribution.condition({1: values[0]})
    inside = v[:, 1] == values[0]
    torch.testing.assert_close(given.log_partition, log_terms[inside].logsumexp(0))


def test_what_is_no_category_has_no_energy():
    energy = of_kind("categorical", 2, 2)
    x = torch.tensor([[0.0, 3.0], [0.5, 1.0], [torch.nan, 0.0], [2.0, 1.0]])
    assert energy(x).isfinite().tolist() == [False, False, False, True]


def test_real_units_against_a_mixture_of_normals_and_quadrature():
    """Planted faults: the squared biases left out of the sum; fields over the scale."""
    energy = of_kind("gaussian", 1, 3)
    grid = torch.linspace(-30, 30, 6001)
    log_z = torch.trapezoid((-energy(grid[:, None])).exp(), grid).log()
    known = energy.closed_form()
    own = list(energy.parameters())
    torch.testing.assert_close(known.log_partition, log_z, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(known.log_partition, own),
        torch.autograd.grad(log_z, own),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

    energy = of_kind("gaussian", 3, 2)
    h = corners(2)
    means = energy.visible_bias + h @ energy.weight.mT
    log_weights = -energy.over_hidden()(h)
    normals = dist.Normal(means, energy.scale).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=log_weights), normals)
    exact = energy.closed_form().distribution
    x = exact.sample((20_000,))
    torch.testing.assert_close(exact.log_prob(x), mixture.log_prob(x))
    torch.testing.assert_close(exact.mean, mixture.mean)
    torch.testing.assert_close(exact.variance, mixture.variance)
    z = (x.mean(0) - exact.mean) / (exact.variance / len(x)).sqrt()
    assert z.abs().max() < 4
    error = ((x - exact.mean).square().var(0) / len(x)).sqrt()
    assert ((x.var(0) - exact.variance) / error).abs().max() < 4
    found = enumeration(energy)
    assert found.value == pytest.approx(exact.log_partition.item(), abs=1e-10)
    assert estimate(energy).status == "exact"
    assert exact.expand((4,)).sample((2,)).shape == (2, 4, 3)


@pytest.mark.parametrize("kind", ["binary", "gaussian"])
def test_a_machine_of_nan_says_so(kind):
    """Faults: terms that are nan left out of log Z; no message of ours at a draw."""
    energy = RBMEnergy(torch.full((3, 2), torch.nan), visible=kind)
    known = energy.closed_form()
    assert known.log_partition.isnan()
    with pytest.raises(ValueError, match=r"must be finite.*got log Z = nan"):
        known.distribution.sample()


def test_real_units_given_others_by_quadrature():
    """Planted faults: the observed value not over the squared scale, or its own term
    left out of log Z."""
    energy = of_kind("gaussian", 3, 2)
    grid = torch.linspace(-30, 30, 3001)
    x = torch.stack([torch.full_like(grid, 0.7), grid, torch.full_like(grid, -1.2)], -1)
    log_z = torch.trapezoid((-energy(x)).exp(), grid).log()
    given = EnergyDistribution(energy).condition({0: 0.7, 2: -1.2})
    found = given.closed_form()
    torch.testing.assert_close(found.log_partition, log_z, rtol=0, atol=1e-10)
    density = -energy(x) - log_z
    torch.testing.assert_close(given.log_prob(grid[:, None]), density)
    torch.testing.assert_close(found.distribution.log_prob(grid[:, None]), density)
    own = list(energy.parameters())
    for a, b in zip(
        torch.autograd.grad(found.log_partition, own),
        torch.autograd.grad(log_z, own),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    twice = energy.closed_form().distribution.condition({2: -1.2}).condition({0: 0.7})
    torch.testing.assert_close(twice.log_prob(grid[:, None]), density)
    for wrong in ({3: 0.0}, {0: torch.nan}, {0: 0.0, 1: 0.0, 2: 0.0}):
        with pytest.raises(ValueError, match="observed must hold a finite number"):
            energy.closed_form().distribution.condition(wrong)


@pytest.mark.parametrize("kind", ["spin", "categorical", "gaussian"])
def test_chains_through_the_hidden_units_stay(kind):
    """Planted fault: real units drawn about their mean with a scale of one."""
    energy = of_kind(kind)
    exact, kernel = energy.closed_form().distribution, Gibbs(5)
    state = kernel.init(energy, exact.sample((20_000,)))
    x = kernel.step(energy, state)[0].x
    mean, variance = exact.mean.detach(), exact.variance.detach()
    assert ((x.mean(0) - mean) / (variance / len(x)).sqrt()).abs().max() < 4
    off = (x - mean).square()
    assert ((off.mean(0) - variance) / (off.var(0) / len(x)).sqrt()).abs().max() < 4


@pytest.mark.parametrize("kind", ["spin", "categorical", "gaussian"])
def test_paths_of_all_kinds(kind):
    """Planted fault: the weights not scaled."""
    energy = of_kind(kind)
    path = energy.annealing_path()
    x = path.start.distribution.sample((100,))
    torch.testing.assert_close(path.at(1.0)(x), energy(x))
    log_prob = path.start.distribution.log_prob(x)
    torch.testing.assert_close(-path.at(0.0)(x) - path.start.log_partition, log_prob)
    if kind != "gaussian":
        found, exact = gibbs_annealing(energy), energy.closed_form().log_partition
        assert abs(found.value - exact.item()) < 4 * found.std_error


def test_wrong_kinds():
    with pytest.raises(ValueError, match=r"visible must be one of.*got 'real'"):
        RBMEnergy(torch.zeros(3, 2), visible="real")
    with pytest.raises(ValueError, match=r"shape \(V, q, H\).*'categorical'"):
        RBMEnergy(torch.zeros(3, 2), visible="categorical")
    with pytest.raises(ValueError, match="scale must be left at 1.*'spin'"):
        RBMEnergy(torch.zeros(3, 2), visible="spin", scale=2.0)
    for scale in (0.0, torch.ones(2)):
        with pytest.raises(ValueError, match="scale must be a positive number or 3"):
            RBMEnergy(torch.zeros(3, 2), visible="gaussian", scale=scale)


def test_gradient_of_the_likelihood_against_enumeration():
    """Planted fault: softplus taken for linear from 20 on, as torch does."""
    one = RBMEnergy(torch.tensor([[25.0]]))
    truth = -25 - math.log1p(math.exp(-25))
    torch.testing.assert_close(one(torch.ones(1)).item(), truth, rtol=0, atol=4e-15)
    energy = machine(8, 5, scale=4.0)
    data, v = corners(8)[torch.randint(256, (50,))], corners(8)
    own = list(energy.parameters())
    exact = energy.closed_form().distribution
    for a, b in zip(
        torch.autograd.grad(exact.log_prob(data).mean(), own),
        torch.autograd.grad(-energy(data).mean() - (-energy(v)).logsumexp(0), own),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
