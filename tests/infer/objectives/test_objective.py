"""What an estimator says of itself is by its methods, not by its type or its names."""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyModel, fit
from pyro_ebm.energies import IsingEnergy, QuadraticEnergy
from pyro_ebm.infer import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyPenalty,
    MaximumLikelihood,
    NoiseContrastive,
    Objective,
    ScoreMatching,
    SlicedScoreMatching,
    TemperedMaximumLikelihood,
)
from pyro_ebm.mcmc import ULA


@dataclass(frozen=True)
class Renamed(Objective):
    """Noise contrast whose noise has a name that the library has never heard of."""

    reference: Any
    num_references: int = 4
    needs = frozenset({"noise"})

    def _inner(self):
        return NoiseContrastive(self.reference, self.num_references)

    def make_state(self):
        return self._inner().make_state()

    def surrogate(self, distribution, state):
        return self._inner().surrogate(distribution, state)

    def current_proposal(self, distribution, state):
        return self.reference

    def num_proposed(self, batch_size):
        return batch_size * self.num_references


def fitted(objective):
    pyro.set_rng_seed(3)
    base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    model = EnergyModel(QuadraticEnergy(torch.zeros(1)), base)
    data = torch.randn(300, 1)
    settings = {"num_steps": 5, "batch_size": 32, "progress_bar": False}
    return fit(model, data, objective, **settings)


def test_another_name_of_the_noise_changes_no_verdict():
    """The noise is far off; the base, which was measured in its place, is not."""
    far = dist.Normal(torch.full((1,), 9.0), 0.1).to_event(1)
    known, renamed = fitted(NoiseContrastive(far)), fitted(Renamed(far))
    assert known.verdict == "noise too far from data"
    assert renamed.reasons == known.reasons
    assert renamed.diagnostics == known.diagnostics


def test_noise_that_is_kept_secret_is_refused():
    with pytest.raises(TypeError, match="Secret needs noise, and must say which"):

        class Secret(Objective):
            needs = frozenset({"noise"})

            def surrogate(self, distribution, state):
                return None


@pytest.mark.parametrize(
    "objective", [MaximumLikelihood(), ContrastiveDivergence()], ids=lambda o: o.name
)
def test_a_biased_kernel_is_said(objective):
    biased = type(objective)(kernel=ULA(0.1))
    new = {f.reason for f in biased.bias()} - {f.reason for f in objective.bias()}
    assert new == {"the kernel is biased"}
    assert EnergyPenalty(biased).bias() == biased.bias()


@pytest.mark.parametrize("kind", [MaximumLikelihood, TemperedMaximumLikelihood])
def test_the_second_term_is_as_good_as_the_number_of_chains(kind):
    covariance, objective = torch.eye(2), kind(num_chains=50)
    found = objective.second_term_covariance(None, None, covariance)
    assert torch.equal(found, covariance / 50)
    assert torch.equal(
        EnergyPenalty(objective).second_term_covariance(None, None, covariance), found
    )


@pytest.mark.parametrize(
    "objective", [ScoreMatching(), SlicedScoreMatching(), DenoisingScoreMatching(0.1)]
)
def test_a_loss_refuses_what_has_no_slope(objective):
    with pytest.raises(NotImplementedError, match="support .* is discrete"):
        objective.loss(IsingEnergy((3,), 0.3), torch.ones(2, 3))
