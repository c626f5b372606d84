"""The penalty on large energies: its value, its gradient, its bias, its refusals."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyModel, fit
from pyro_ebm.energies import NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import (
    AmortizedSampler,
    BoundedLikelihood,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    EnergyDiscrepancy,
    EnergyPenalty,
    ExactMaximumLikelihood,
    FlowContrastive,
    ImportanceSampledLikelihood,
    MaximumLikelihood,
    NoiseContrastive,
    ObjectiveLoss,
    RankingNoiseContrastive,
    ScoreMatching,
    TemperedMaximumLikelihood,
)
from tests.infer.problems import Affine, base

WITH_NEGATIVES = [
    MaximumLikelihood(num_chains=64, num_steps=2),
    TemperedMaximumLikelihood(num_chains=16, num_temperatures=3),
    ContrastiveDivergence(),
    NoiseContrastive(),
    RankingNoiseContrastive(),
    FlowContrastive(Affine()),
    ImportanceSampledLikelihood(),
    BoundedLikelihood(),
    AmortizedSampler(torch.nn.Linear(2, 2), (2,)),
]


def raised(constant=5.0):
    """The energy of the base, and a constant that no other objective minds."""
    energy = NeuralEnergy((2,), (4,), base=base())
    torch.nn.init.zeros_(energy.network[-1].weight)
    torch.nn.init.constant_(energy.network[-1].bias, constant)
    return EnergyModel(energy, base())


@pytest.mark.parametrize("objective", WITH_NEGATIVES, ids=lambda o: type(o).__name__)
def test_the_gradient_is_that_of_the_penalty(objective):
    """In the constant b of f, on which the likelihood does not depend, it is
    2 weight (E_data f + E_neg f), up to the draws. A penalty of the data alone was
    planted, and seen to fail."""
    if objective.log_partition == "consistent" and not isinstance(
        objective, ImportanceSampledLikelihood
    ):
        objective = EnergyPenalty(objective, 10.0)  # beside which c moves little
    else:
        objective = EnergyPenalty(objective, 0.1)
    model = raised()
    x = base().sample((400,))
    loss = ObjectiveLoss(model, objective)
    grads = []
    for _ in range(3):
        model.zero_grad()
        loss(x).backward()
        grads.append(model.energy.network[-1].bias.grad.item())
    y = objective.negatives(model(), loss.state, 1000)
    with torch.no_grad():
        wanted = model.energy(x).mean() + model.energy(y).mean()
    wanted = 2 * objective.weight * wanted.item()
    assert sum(grads) / 3 == pytest.approx(wanted, rel=0.1)


def trained(energy, objective, data, lr, num_steps):
    """After some steps, without the average of a fit, which would lag."""
    loss = ObjectiveLoss(energy, objective)
    optim = torch.optim.Adam(loss.parameters(), lr=lr)
    for _ in range(num_steps):
        optim.zero_grad()
        loss(data).backward()
        optim.step()
    return energy


def test_energies_come_down():
    """A constant of 50, which maximum likelihood alone leaves where it is."""
    data, heights = base().sample((300,)), []
    objective = MaximumLikelihood(num_chains=64, num_steps=2)
    for each in (objective, EnergyPenalty(objective, 0.1)):
        energy = trained(raised(50.0).energy, each, data, 2.0, 40)
        heights.append(energy(data).abs().mean().item())
    assert heights[0] > 40
    assert heights[1] < 10


def test_it_flattens_a_gaussian():
    """The documented bias, beside the same fit without the penalty: the precision is
    learned too small."""
    data = 0.5 * torch.randn(500, 2)
    precisions = []
    objective = NoiseContrastive(dist.Normal(torch.zeros(2), 0.7).to_event(1))
    for each in (objective, EnergyPenalty(objective, 0.3)):
        energy = QuadraticEnergy(torch.zeros(2), 2 * torch.eye(2))
        trained(energy, each, data, 0.05, 200)
        precisions.append(energy.precision.diagonal().mean().item())
    assert precisions[0] == pytest.approx(4, rel=0.2)
    assert precisions[1] < precisions[0] - 0.5


def test_a_fit_with_it():
    model, data = raised(1.0), base().sample((300,))
    objective = EnergyPenalty(MaximumLikelihood(num_chains=64, num_steps=2), 0.1)
    result = fit(model, data, objective, num_steps=20, progress_bar=False)
    assert result.log_partition.is_reliable
    assert "20 by MaximumLikelihood with penalty 0.1" in str(result)
    assert result.diagnostics.drift is not None  # seen through the wrapper
    # What it reports is the likelihood, and not the penalty.
    fitted = [result.distribution.log_prob(data).mean().item(), result.train.value]
    assert fitted[0] == pytest.approx(fitted[1])


def test_it_says_what_the_objective_says():
    inner = ImportanceSampledLikelihood()
    penalised = EnergyPenalty(inner)
    assert penalised.needs == inner.needs
    assert penalised.log_partition == inner.log_partition
    assert penalised.is_pointwise == inner.is_pointwise
    assert penalised == EnergyPenalty(inner, 0.01)


@pytest.mark.parametrize(
    "objective",
    [
        DenoisingScoreMatching(),
        ScoreMatching(),
        ExactMaximumLikelihood(),
        EnergyDiscrepancy(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_objectives_without_negatives(objective):
    model = raised()
    with pytest.raises(ValueError, match=f"{type(objective).__name__} has none"):
        EnergyPenalty(objective)
    assert objective.negatives(model(), objective.make_state()) is None


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_arguments(weight):
    with pytest.raises(ValueError, match="weight must be positive and finite"):
        EnergyPenalty(MaximumLikelihood(), weight)
    with pytest.raises(TypeError, match="must be an Objective"):
        EnergyPenalty("ml")
