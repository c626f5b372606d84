"""What each estimator is known to find: on problems with closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy, RBMEnergy
from pyro_ebm.errors import UnreliableWarning
from pyro_ebm.infer import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    ExactMaximumLikelihood,
    NoiseContrastive,
    ObjectiveLoss,
    RankingNoiseContrastive,
    ScoreMatching,
    SlicedScoreMatching,
)
from pyro_ebm.partition import enumeration, quadrature

PRECISION = torch.tensor(
    [[2.0, 0.5, 0.0], [0.5, 1.5, 0.3], [0.0, 0.3, 1.0]], dtype=torch.float64
)


def draws(count=5000, seed=0):
    pyro.set_rng_seed(seed)
    truth = dist.MultivariateNormal(torch.zeros(3), precision_matrix=PRECISION)
    return truth.sample((count,))


def fitted(energy, objective, data, num_steps=300, lr=0.05, batch_size=None):
    loss = ObjectiveLoss(energy, objective)
    optim = torch.optim.Adam(loss.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.01 ** (1 / num_steps))
    for _ in range(num_steps):
        optim.zero_grad()
        batch = data
        if batch_size is not None:
            batch = data[torch.randint(len(data), (batch_size,))]
        loss(batch).backward()
        optim.step()
        schedule.step()
    return loss.state


def gradient(value, energy):
    grads = torch.autograd.grad(value, list(energy.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


# Exact likelihood --------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_exact_likelihood_of_a_gaussian_and_its_gradient(dim):
    precision = PRECISION[:dim, :dim]
    energy = QuadraticEnergy(torch.full((dim,), 0.3), precision)
    data = torch.randn(100, dim)
    value = ExactMaximumLikelihood().loss(energy, data)
    exact = energy(data).mean() + energy.closed_form().log_partition
    torch.testing.assert_close(value, exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        gradient(value, energy), gradient(exact, energy), atol=1e-6, rtol=0
    )


def test_exact_likelihood_of_a_network_is_that_of_quadrature():
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    energy = NeuralEnergy((2,), (16,), base=base)
    nn.init.normal_(energy.network[-1].weight)
    data, state = torch.randn(50, 2), ExactMaximumLikelihood().make_state()
    value = ExactMaximumLikelihood().loss(energy, data, state)
    exact = quadrature(energy, tolerance=1e-8)
    assert state.log_partition.item() == pytest.approx(exact.value, abs=1e-6)
    assert state.error < 1e-6
    assert value.item() == pytest.approx(
        energy(data).mean().item() + exact.value, abs=1e-6
    )
    # The gradient, against differences of the quadrature.
    weight, step = energy.network[0].bias, 1e-4
    (grad,) = torch.autograd.grad(value, weight)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[3] += sign * step
            log_partition = quadrature(energy, tolerance=1e-10).value
            ends.append(energy(data).mean().item() + log_partition)
            weight[3] -= sign * step
    assert grad[3].item() == pytest.approx((ends[0] - ends[1]) / 2 / step, abs=1e-5)


def test_exact_likelihood_of_a_machine_is_that_of_enumeration():
    energy = RBMEnergy(torch.randn(6, 4), torch.randn(6), torch.randn(4))
    x = torch.randint(2, (7, 6)).double()
    value = ExactMaximumLikelihood().loss(energy, x)
    wanted = energy(x).mean().item() + enumeration(energy).value
    assert value.item() == pytest.approx(wanted)


def test_a_grid_that_is_too_coarse_is_warned_of():
    energy = FunctionEnergy(lambda x: (50 * x).square() / 2, ())
    with pytest.warns(UnreliableWarning, match=r"off by about .*num_nodes"):
        ExactMaximumLikelihood(num_nodes=65).loss(energy, torch.randn(100))
    flat = FunctionEnergy(lambda x: 0 * x, ())
    with pytest.warns(UnreliableWarning, match=r"mass beyond its edge"):
        ExactMaximumLikelihood().loss(flat, torch.randn(100))


def test_spaces_that_are_too_large_for_exact_likelihood():
    objective = ExactMaximumLikelihood()
    with pytest.raises(ValueError, match=r"at most 3 dimensions.*\(4,\)"):
        objective.loss(QuadraticEnergy(torch.zeros(4)), torch.zeros(2, 4))
    machine = RBMEnergy(torch.randn(30, 25), torch.randn(30), torch.randn(25))
    with pytest.raises(ValueError, match=r"states, more than max_states = 1,048,576"):
        objective.loss(machine, torch.zeros(2, 30))


# Noise contrast ----------------------------------------------------------------------


def test_noise_contrast_finds_precision_and_log_partition():
    """c to 0.02 nats; a noise whose log_prob is off by 0.1 was seen to fail."""
    data = draws(20_000)
    energy = QuadraticEnergy(torch.zeros(3), torch.eye(3))
    noise = dist.Normal(torch.zeros(3), 1.2).to_event(1)
    state = fitted(energy, NoiseContrastive(noise, num_noise=8), data, 400,
                   batch_size=2000)  # fmt: skip
    known = energy.closed_form().log_partition
    assert abs(state.log_partition - known) < 0.02
    assert (energy.precision - PRECISION).abs().max() < 0.1


def test_noise_contrast_of_much_noise_is_maximum_likelihood():
    """The gradient in the limit, within 4 standard errors and the 1/nu of the bias."""
    energy = QuadraticEnergy(torch.zeros(3), torch.eye(3))
    data = draws(400)
    noise = dist.Normal(torch.zeros(3), 1.2).to_event(1)
    exact = gradient(energy(data).mean() + energy.closed_form().log_partition, energy)
    for objective in (
        NoiseContrastive(noise, 2000),
        RankingNoiseContrastive(noise, 2000),
    ):
        state = objective.make_state()
        if isinstance(objective, NoiseContrastive):
            state.log_partition.data.fill_(energy.closed_form().log_partition.item())
            state.is_started.fill_(True)
        found = gradient(objective.loss(energy, data, state), energy)
        torch.testing.assert_close(found, exact, atol=0.02, rtol=0)


def test_noise_may_be_a_module_that_returns_a_distribution():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.ones(3))

        def forward(self):
            return dist.Normal(self.loc, 1.5).to_event(1)

    flow, energy = Flow(), QuadraticEnergy(torch.zeros(3))
    loss = ObjectiveLoss(energy, NoiseContrastive(flow))
    loss(draws(50)).backward()
    assert flow.loc.grad is None
    assert energy.loc.grad is not None


# Score matching ----------------------------------------------------------------------


def test_score_matching_of_a_gaussian_in_closed_form():
    """J = tr A - |A (x - m)|^2 / 2, and the sliced one in the mean over signs."""
    energy, x = QuadraticEnergy(torch.full((3,), 0.2), PRECISION), draws(20)
    a, m = energy.precision, energy.loc
    exact = -(a.trace() - ((x - m) @ a).square().sum(-1) / 2).mean()
    value = ScoreMatching().loss(energy, x)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient(value, energy), gradient(exact, energy))
    sliced = SlicedScoreMatching(num_directions=3000).loss(energy, x)
    # 60,000 directions, each with standard deviation 2 sqrt(0.5^2 + 0.3^2).
    assert abs(sliced - exact) < 4 * 2 * math.sqrt(0.34 / 60_000)


@pytest.mark.parametrize(
    ("objective", "tolerance"),
    [(ScoreMatching(), 0.1), (SlicedScoreMatching(num_directions=4), 0.15)],
)
def test_score_matching_finds_the_precision(objective, tolerance):
    """Curvature counted half was seen to fail."""
    energy = QuadraticEnergy(torch.zeros(3), torch.eye(3))
    fitted(energy, objective, draws())
    assert (energy.precision - PRECISION).abs().max() < tolerance
    assert energy.loc.abs().max() < tolerance


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_denoising_learns_the_noisy_data(sigma):
    """The covariance of the data and sigma^2; without sigma^2 it is seen to fail."""
    energy = QuadraticEnergy(torch.zeros(3), torch.eye(3))
    fitted(energy, DenoisingScoreMatching(sigma), draws(), 500)
    noisy = PRECISION.inverse() + sigma**2 * torch.eye(3)
    assert (energy.precision - noisy.inverse()).abs().max() < 0.12
    assert (energy.precision - PRECISION).abs().max() > 0.2


def test_score_matching_does_not_see_the_weight_of_modes():
    """As documented: the gradient in the weight of a mode 12 away is nil."""
    logit = nn.Parameter(torch.tensor(0.5))

    def value(x):
        logits = torch.stack([torch.zeros(()), logit])
        modes = -(x[..., None] - torch.tensor([-6.0, 6.0])).square() / 2
        return -torch.logsumexp(modes + logits, -1)

    data = torch.randn(500) - 6
    energy = FunctionEnergy(value, ())
    (blind,) = torch.autograd.grad(ScoreMatching().loss(energy, data), logit)
    (seeing,) = torch.autograd.grad(ExactMaximumLikelihood().loss(energy, data), logit)
    assert abs(blind) < 1e-6
    assert seeing > 0.5


# Contrastive divergence --------------------------------------------------------------


def test_contrastive_divergence_is_a_part_of_the_gradient():
    """Of the sign of the gradient of maximum likelihood, and of more of its size the
    more moves there are, as documented: here from data twice too wide."""
    pyro.set_rng_seed(2)
    data = 2 * torch.randn(20_000, 1)
    energy = QuadraticEnergy(torch.zeros(1))
    (exact,) = torch.autograd.grad(
        energy(data).mean() + energy.closed_form().log_partition, energy.log_diagonal
    )
    sizes = []
    for num_steps in (1, 3, 100):
        loss = ObjectiveLoss(energy, ContrastiveDivergence(num_steps))
        (grad,) = torch.autograd.grad(loss(data), energy.log_diagonal)
        sizes.append((grad / exact).item())
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert sizes[1] < 0.97
    assert abs(sizes[2] - 1) < 0.03
