"""The restricted Boltzmann machine against sums over its hidden units."""

import itertools

import pytest
import torch

from pyro_ebm.energies import RBMEnergy
from pyro_ebm.partition import enumeration, estimate
from tests.energies.discrete.test_chain import chi_square


def machine(num_visible=5, num_hidden=3, scale=1.0):
    weight = scale * torch.randn(num_visible, num_hidden)
    return RBMEnergy(weight, torch.randn(num_visible), torch.randn(num_hidden))


def corners(dim):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=dim)))


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
    torch.testing.assert_close(energy.hidden_logits(v).sigmoid(), mean_h)
    mean_v = log_joint.softmax(0).mT @ v
    torch.testing.assert_close(energy.visible_logits(h).sigmoid(), mean_v)


def test_the_transposed_has_the_same_partition_function():
    energy = machine()
    other = energy.transposed()
    assert other.event_shape == (3,)
    log_z = torch.logsumexp(-energy(corners(5)), 0)
    torch.testing.assert_close(torch.logsumexp(-other(corners(3)), 0), log_z)


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
    expected = -2 * energy.hidden_logits(torch.ones(5)).sigmoid().expand(5, 3)
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
