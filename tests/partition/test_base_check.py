"""Whether draws are those of a density."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.core.verdict import Reason
from pyro_ebm.energies import FunctionEnergy, PyroModelEnergy, spins
from pyro_ebm.partition.base_check import check_draws
from pyro_ebm.partition.default_base import default_base


class Wider(dist.Normal):
    """A normal that draws a tenth too wide."""

    def sample(self, sample_shape=()):
        return self.loc + 1.1 * (super().sample(sample_shape) - self.loc)


def sound():
    scale = pyro.sample("scale", dist.HalfCauchy(5.0))
    pyro.sample("share", dist.Beta(0.5, 0.5))
    pyro.sample("p", dist.Dirichlet(torch.full((4,), 0.7)))
    with pyro.plate("groups", 8):
        pyro.sample("loc", dist.Normal(0.0, scale))


@pytest.mark.parametrize("size", [3, 5])
def test_lkj_draws_from_another_law(size):
    """As torch does for three and more dimensions."""

    def model():
        pyro.sample("corr", dist.LKJCholesky(size, torch.tensor(2.0)))
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    finding = check_draws(PyroModelEnergy(model).prior)
    assert finding.reason == Reason.BASE_INCONSISTENT
    assert "the draws of the base do not have its density" in finding.detail


def test_a_scale_that_is_off_by_a_tenth():
    base = Wider(torch.zeros(3), 1.0).to_event(1)
    assert check_draws(base).reason == Reason.BASE_INCONSISTENT


@pytest.mark.parametrize(
    "base",
    [
        dist.Normal(torch.zeros(50), 1.0).to_event(1),
        dist.Cauchy(0.0, 1.0).expand([3]).to_event(1),
        dist.Uniform(-1.0, 2.0),
        dist.Laplace(0.0, 1.0),
        dist.LKJCholesky(2, torch.tensor(1.5)),
        dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.2, 0.8])),
            dist.Normal(torch.tensor([0.0, 20.0]), 1.0),
        ),
    ],
)
def test_sound_bases_pass(base):
    for _ in range(5):
        assert check_draws(base) is None


def test_sound_priors_and_default_bases_pass():
    assert check_draws(PyroModelEnergy(sound).prior) is None
    corr = FunctionEnergy(lambda x: x.sum((-1, -2)), (4, 4), constraints.corr_cholesky)
    assert check_draws(default_base(corr)) is None
    lattice = FunctionEnergy(
        lambda x: x.sum(-1), (3,), constraints.independent(spins, 1)
    )
    assert check_draws(default_base(lattice)) is None


def test_draws_that_are_rounded_to_the_boundary():
    """In single precision, where half of them are exactly 0 or 1."""
    base = dist.Beta(torch.tensor(0.01).float(), torch.tensor(0.01).float())
    assert check_draws(base).reason == Reason.BASE_INCONSISTENT
