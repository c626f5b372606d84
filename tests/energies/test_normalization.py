"""What log Z is measured against must be normalised: refused wherever it is not.

Each call here once gave a number, off by log Z of the base, with a verdict of ok or
exact.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm import EnergyDistribution, EnergyModel, fit, infer, mcmc, partition
from pyro_ebm.distributions import MixtureOfExperts
from pyro_ebm.energies import DistributionEnergy, FunctionEnergy, PyroModelEnergy
from pyro_ebm.energies.normalization import unnormalized_part

WELL = FunctionEnergy(lambda x: x.square().sum(-1) / 4, (3,))
UNKNOWN = EnergyDistribution(WELL)
KNOWN = EnergyDistribution(WELL, 3 * torch.tensor(4 * torch.pi).log() / 2)
NORMAL = dist.Normal(torch.zeros(3), 2.0).to_event(1)
TARGET = FunctionEnergy(lambda x: x.square().sum(-1) ** 2 / 4, (3,))
TWO = dist.Categorical(torch.ones(2))
TRANSFORMED = dist.TransformedDistribution(UNKNOWN, [])


@pytest.mark.parametrize("base", [UNKNOWN, TRANSFORMED, NORMAL.mask(False)])
@pytest.mark.parametrize(
    "use",
    [
        lambda base: partition.estimate(TARGET, base),
        lambda base: partition.estimate(TARGET, base, method="importance"),
        lambda base: partition.importance_sampling(TARGET, base),
        lambda base: partition.smc(TARGET, base),
        lambda base: partition.bridge_sampling(
            TARGET, torch.randn(4, 50, 3), proposal=base
        ),
        lambda base: EnergyModel(TARGET, base),
        lambda base: mcmc.ReplicaExchange(base).run(TARGET, 10),
        lambda base: infer.ObjectiveLoss(TARGET, infer.NoiseContrastive(base))(
            torch.randn(5, 3)
        ),
        DistributionEnergy,
    ],
)
def test_an_unnormalised_base_is_refused(use, base):
    with pytest.raises(ValueError, match="must be normalised"):
        use(base)


def test_a_base_that_knows_its_log_partition_serves():
    estimate = partition.importance_sampling(TARGET, KNOWN)
    exact = partition.quadrature(TARGET)
    assert estimate.lower < exact.value < estimate.upper


@pytest.mark.parametrize(
    ("distribution", "is_normalized"),
    [
        (NORMAL, True),
        (KNOWN, True),
        (KNOWN.to_event(0), True),
        (UNKNOWN.expand((2,)).to_event(1), False),
        (MixtureOfExperts([KNOWN, NORMAL]), True),
        (dist.MaskedMixture(torch.tensor(True), KNOWN, UNKNOWN), False),
        (dist.ImproperUniform(constraints.real, (), ()), False),
        (
            dist.MixtureSameFamily(TWO, KNOWN.expand((2,))),
            True,
        ),
    ],
)
def test_what_is_normalised(distribution, is_normalized):
    assert (unnormalized_part(distribution) is None) == is_normalized


def latent(q):
    x = pyro.sample("x", q)
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(1.0))


def observed(q):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", q, obs=x.detach() + torch.ones(3))


@pytest.mark.parametrize("model", [latent, observed])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: partition.estimate(model),
        lambda model: partition.estimate(PyroModelEnergy(model)),
        lambda model: partition.evidence(model),
    ],
)
def test_an_evidence_needs_the_log_partition_of_its_energies(use, model):
    with pytest.raises(
        ValueError, match="must be normalised, and log Z of this Energy"
    ):
        use(lambda: model(UNKNOWN))


def test_a_guide_needs_it_too():
    def guide():
        pyro.sample("x", UNKNOWN)

    with pytest.raises(ValueError, match="site 'x' must be normalised"):
        partition.evidence(lambda: latent(NORMAL), guide)


def test_an_energy_that_has_values_only_says_what_it_lacks():
    class ValuesOnly(torch.nn.Linear):
        def forward(self, x):
            x = x.detach()
            return super().forward(x).squeeze(-1) + x.square().sum(-1)

    model = EnergyModel(FunctionEnergy(ValuesOnly(3, 1), (3,)))
    with pytest.raises(ValueError, match=r"gradient in x.*detaches.*ObjectiveLoss"):
        fit(model, torch.randn(50, 3), infer.NoiseContrastive(), num_steps=2)
