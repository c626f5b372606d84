"""Distributions of torch that are not what they say.

Seen to fail without the corrections: 47 to 110 standard errors for LKJ.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy, PyroModelEnergy
from pyro_ebm.energies.corrections import corrected, support_of

LKJ = dist.LKJCholesky(5, torch.tensor(1.5, dtype=torch.float64))


def check_correlations(factor, concentration):
    """Marginally each is Beta(a, a) on (-1, 1), a = eta - 1 + d / 2."""
    dim = factor.shape[-1]
    row, column = torch.tril_indices(dim, dim, -1)
    r = (factor @ factor.mT)[..., row, column].flatten(0, -2)
    a = concentration - 1 + dim / 2
    for power, wanted in ((2, 1 / (2 * a + 1)), (4, 3 / (2 * a + 1) / (2 * a + 3))):
        x = r.pow(power)
        z = (x.mean(0) - wanted) / x.std(0) * len(x) ** 0.5
        assert (z.abs() < 4).all(), (power, z)
    z = r.mean(0) / r.std(0) * len(r) ** 0.5
    assert (z.abs() < 4).all()


@pytest.mark.parametrize("dim", [2, 3, 6])
@pytest.mark.parametrize("concentration", [0.7, 2.0])
def test_lkj(dim, concentration):
    right = corrected(dist.LKJCholesky(dim, torch.tensor(concentration)))
    check_correlations(right.sample((20_000,)), concentration)


@pytest.mark.parametrize(
    "wrapped",
    [
        LKJ.expand([2]),
        LKJ.expand([2]).to_event(1),
        LKJ.mask(torch.tensor([True, True])),
        corrected(LKJ).expand([2]),
        DistributionEnergy(LKJ.expand([2]).to_event(1)).distribution,
    ],
)
def test_lkj_in_other_distributions(wrapped):
    check_correlations(corrected(wrapped).sample((10_000,)), 1.5)
    before = LKJ.sample((10_000,))
    with pytest.raises(AssertionError):  # torch's own stays as it was
        check_correlations(before, 1.5)


def alone():
    pyro.sample("L", LKJ)


def in_a_plate():
    eta = pyro.sample("eta", dist.Uniform(1.5, 1.5 + 1e-9))
    with pyro.plate("groups", 2):
        pyro.sample("L", dist.LKJCholesky(5, eta))


def one_by_one():
    if pyro.sample("eta", dist.Normal(0.0, 1.0)).dim():
        raise ValueError("not written for batches")
    pyro.sample("L", LKJ.expand([2]).to_event(1))


@pytest.mark.parametrize(
    ("model", "number"), [(alone, 20_000), (in_a_plate, 10_000), (one_by_one, 2000)]
)
def test_priors_draw_lkj_rightly(model, number):
    energy = PyroModelEnergy(model)
    u = energy.prior.sample((number,))
    check_correlations(energy.constrain(u)["L"].reshape(-1, 5, 5), 1.5)


VON_MISES = dist.VonMises(torch.tensor(0.5), 2.0)


@pytest.mark.parametrize(
    "distribution",
    [
        VON_MISES,
        VON_MISES.expand([2]).to_event(1),
        dist.SineBivariateVonMises(0.0, 1.0, 2.0, 1.0, 0.5),
        dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(2)), VON_MISES.expand([2])
        ),
    ],
)
def test_angles_live_on_the_circle(distribution):
    energy = DistributionEnergy(distribution)
    assert energy(torch.full(energy.event_shape, 3.2)) == math.inf
    assert energy(torch.full(energy.event_shape, 3.1)) < math.inf
    event = energy.event_shape.numel()
    side = torch.linspace(-math.pi, math.pi, 201)[1:] - math.pi / 200
    grid = torch.cartesian_prod(*[side] * event).reshape(-1, *energy.event_shape)
    total = (-energy(grid)).logsumexp(0) + event * math.log(2 * math.pi / 200)
    torch.testing.assert_close(total, torch.zeros(()), atol=1e-6, rtol=0)
    closed = energy.closed_form()
    assert not closed.log_partition
    assert energy(closed.distribution.sample((100,))).isfinite().all()


def test_posteriors_of_angles_are_proper():
    def model():
        phi = pyro.sample("phi", dist.VonMises(0.5, 2.0))
        pyro.sample("y", dist.Normal(phi.cos(), 0.5), obs=torch.tensor(0.3))

    energy = PyroModelEnergy(model)
    u = torch.linspace(-40, 40, 20_001).unsqueeze(-1)
    log_evidence = (-energy(u)).logsumexp(0) + math.log(80 / 20_000)
    x = energy.constrain(u)["phi"]
    assert (x.abs() <= math.pi).all()
    grid = torch.linspace(-math.pi, math.pi, 2001)[1:]
    wanted = dist.VonMises(0.5, 2.0).log_prob(grid)
    wanted = wanted + dist.Normal(grid.cos(), 0.5).log_prob(torch.tensor(0.3))
    wanted = wanted.logsumexp(0) + math.log(2 * math.pi / 2000)
    torch.testing.assert_close(log_evidence, wanted, atol=1e-5, rtol=0)
    phi = energy.constrain(energy.prior.sample((20_000,)))["phi"]
    centre = 0.6977746579640079  # I_1(2) / I_0(2)
    assert abs((phi - 0.5).cos().mean() - centre) < 0.01


def test_others_are_given_back_as_they_are():
    for same in (dist.Normal(0.0, 1.0), dist.Dirichlet(torch.ones(3)).to_event(0)):
        assert corrected(same) is same
    assert support_of(dist.Beta(1.0, 1.0)) is dist.Beta(1.0, 1.0).support
