"""Models with missing data have the posterior and the evidence of the observed rows.

Seen to fail with the mask left on, and with nan left in the data (gradients of nan).
"""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_ebm.energies import PyroModelEnergy

Y = torch.tensor([0.5, 3.0, -1.0, torch.nan, 0.25, torch.nan], dtype=torch.float64)
SEEN = torch.tensor([True, False, True, False, True, False])


def missing(y=Y, mask=SEEN):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(loc, scale), obs=y, obs_mask=mask)
        pyro.sample("z", dist.Normal(x, 0.5), obs=torch.arange(6.0) / 4)


def log_evidence_on_grid():
    """The missing rows by hand: z is normal around loc."""
    loc, log_scale = torch.meshgrid(
        torch.linspace(-8, 8, 401), torch.linspace(-4, 4, 401), indexing="ij"
    )
    scale, z = log_scale.exp(), torch.arange(6.0) / 4
    total = dist.Normal(0.0, 1.5).log_prob(loc)
    total = total + dist.Normal(0.0, 0.5).log_prob(log_scale)
    for row in range(6):
        if SEEN[row]:
            total = total + dist.Normal(loc, scale).log_prob(Y[row])
            total = total + dist.Normal(Y[row], 0.5).log_prob(z[row])
        else:
            wide = (scale.square() + 0.25).sqrt()
            total = total + dist.Normal(loc, wide).log_prob(z[row])
    return total.flatten().logsumexp(0) + math.log(16 / 400 * 8 / 400)


def test_the_evidence_is_that_of_the_observed_rows():
    energy = PyroModelEnergy(missing)
    energy.check_evidence()
    prior = energy.prior
    torch.manual_seed(0)
    u = prior.sample((400_000,))
    value, grad = energy.value_and_grad(u[:1000])
    assert value.isfinite().all()
    assert grad.isfinite().all()
    weight = (-prior.log_prob(u) - energy(u)).exp()
    error = weight.std() / weight.mean() / len(u) ** 0.5
    assert error < 0.05
    assert abs(weight.mean().log() - log_evidence_on_grid()) < 4 * error


def test_unused_coordinates_follow_the_density_of_the_missing_ones():
    energy = PyroModelEnergy(missing)
    u = torch.randn(4, 8)
    values = energy.constrain(u)
    loc, scale = values["loc"].unsqueeze(-1), values["scale"].unsqueeze(-1)
    free = u.clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy(free).sum(), free)
    wanted = (values["x_unobserved"] - loc) / scale.square()
    torch.testing.assert_close(grad[:, 2:][:, SEEN], wanted[:, SEEN])


def test_a_mask_round_both_stays():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with (
            pyro.plate("data", 3),
            poutine.mask(mask=torch.tensor([True, True, False])),
        ):
            seen = torch.tensor([True, False, True])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(3), obs_mask=seen)

    energy = PyroModelEnergy(model)
    u = torch.tensor([0.5, 1.0, 2.0, 3.0])
    x = dist.Normal(0.5, 1.0).log_prob(torch.tensor([1.0, 2.0]))
    wanted = dist.Normal(0.0, 1.0).log_prob(u[0]) + x.sum()
    torch.testing.assert_close(
        energy(u), -wanted - dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0))
    )
    with pytest.raises(NotImplementedError, match="is masked"):
        assert energy.prior


def test_missing_classes_sum_to_one():
    data = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def model(mask):
        p = pyro.sample("p", dist.Beta(torch.ones(()), 1.0))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(p), obs=data, obs_mask=mask)
            pyro.sample("y", dist.Normal(k, 1.0), obs=torch.zeros(4))

    energy = PyroModelEnergy(model, torch.tensor([True] * 3 + [False]))
    energy.check_evidence()
    p = torch.tensor(0.3)
    u = energy.unconstrain({"p": p})
    seen = dist.Bernoulli(p).log_prob(data[:3])
    seen = seen.sum() + dist.Normal(data[:3], 1.0).log_prob(torch.tensor(0.0)).sum()
    rows = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(0.0))
    last = (rows + torch.stack([(1 - p).log(), p.log()])).logsumexp(0)
    jacobian = (p * (1 - p)).log()
    torch.testing.assert_close(energy(u), -(seen + last + jacobian))


def test_vectors_with_missing_rows():
    y = torch.tensor([[0.0, 1.0], [torch.nan, 2.0], [1.0, 1.0]], dtype=torch.float64)

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            normal = dist.MultivariateNormal(loc, torch.eye(2))
            pyro.sample("y", normal, obs=y, obs_mask=torch.tensor([True, False, True]))

    energy = PyroModelEnergy(model)
    assert energy.event_shape == (8,)
    value, grad = energy.value_and_grad(torch.zeros(3, 8))
    assert grad.isfinite().all()
    one = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    wanted = one.log_prob(torch.zeros(2)) * 4 + one.log_prob(y[0]) + one.log_prob(y[2])
    torch.testing.assert_close(value, -wanted.expand(3))


def test_observed_nan_is_still_refused():
    def model(mask):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y, obs_mask=mask)

    assert PyroModelEnergy(model, SEEN)(torch.zeros(7)).isfinite()
    with pytest.raises(ValueError, match="'y_observed' must not contain nan, got 1"):
        PyroModelEnergy(model, torch.tensor([True] * 4 + [False] * 2))
