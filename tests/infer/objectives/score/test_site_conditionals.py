"""Pseudolikelihood and ratio matching against conditionals by enumeration."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import FunctionEnergy, IsingEnergy, PottsEnergy, RBMEnergy
from pyro_ebm.infer import (
    ExactMaximumLikelihood,
    ObjectiveLoss,
    Pseudolikelihood,
    RatioMatching,
)

RAGGED = dist.constraints.independent(
    dist.constraints.integer_interval(0, torch.tensor([1, 2, 3])), 1
)
ENERGIES = {
    "ising": lambda: IsingEnergy((2, 3), 0.4, 0.2),
    "potts": lambda: PottsEnergy((2, 3), 3, 0.5),
    "rbm": lambda: RBMEnergy(torch.randn(5, 3), torch.randn(5)),
    "ragged": lambda: FunctionEnergy(
        lambda x: (x.cumsum(-1) - 1.5).square().sum(-1) / 4, (3,), RAGGED
    ),
}
STATES = {"ising": [-1, 1], "potts": [0, 1, 2], "rbm": [0, 1]}


def by_loop(energy, x, states):
    """Both objectives of one point, site by site."""
    log_score, ratio = 0.0, 0.0
    flat = x.flatten()
    for site, values in enumerate(states):
        options = flat.repeat(len(values), 1)
        options[:, site] = torch.tensor(values, dtype=x.dtype)
        p = (-energy(options.reshape(-1, *x.shape))).softmax(0)
        is_own = options[:, site] == flat[site]
        log_score = log_score + p[is_own].log().sum()
        ratio = ratio - (p - is_own.to(p)).square().sum() / 2
    return log_score, ratio


@pytest.mark.parametrize("name", ENERGIES)
def test_objectives_are_those_of_the_definition(name):
    """Planted faults: a score of the neighbour's value, and the states that a site
    lacks; both were seen to fail."""
    energy = ENERGIES[name]()
    size = energy.event_shape.numel()
    states = [STATES.get(name, [])] * size
    if name == "ragged":
        states = [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    x = torch.stack(
        [torch.tensor([s[k % len(s)] for s in states], dtype=torch.get_default_dtype())
         for k in range(4)]
    ).reshape(4, *energy.event_shape)  # fmt: skip
    expected = torch.stack([torch.stack(by_loop(energy, row, states)) for row in x])
    for column, objective in enumerate((Pseudolikelihood(), RatioMatching())):
        terms = objective.surrogate(energy_distribution(energy), None)(x)
        torch.testing.assert_close(terms.objective, expected[:, column])
        torch.testing.assert_close(terms.energy, energy(x))


def energy_distribution(energy):
    return EnergyDistribution(energy, 0.0)


def test_some_of_the_sites_are_unbiased_for_all():
    energy = ENERGIES["rbm"]()
    x = torch.ones(4000, 5)
    q = energy_distribution(energy)
    some = Pseudolikelihood(2).surrogate(q, None)(x).objective
    whole = Pseudolikelihood().surrogate(q, None)(x[:1]).objective
    assert abs(some.mean() - whole) < 4 * some.std() / 4000**0.5


@pytest.mark.parametrize("objective", [Pseudolikelihood(), RatioMatching()])
def test_a_coupling_is_found(objective):
    """Of a 4 x 4 torus from 2,000 exact draws, within four of its standard errors."""
    pyro.set_rng_seed(0)
    data = IsingEnergy((4, 4), 0.3).closed_form().distribution.sample((2000,))
    energy = IsingEnergy((4, 4), 0.1)
    loss = ObjectiveLoss(energy, objective)
    settings = {"max_iter": 30, "line_search_fn": "strong_wolfe"}
    optim = torch.optim.LBFGS(loss.parameters(), **settings)

    def closure():
        optim.zero_grad()
        value = loss(data)
        value.backward()
        return value

    optim.step(closure)
    assert abs(energy.coupling.item() - 0.3) < 0.02


def test_planted_fault_is_seen(monkeypatch):
    """The mean field of a site in place of its conditional."""
    right = Pseudolikelihood._score
    wrong = staticmethod(lambda p, own: right(0.9 * p, own))
    monkeypatch.setattr(Pseudolikelihood, "_score", wrong)
    with pytest.raises(AssertionError):
        test_objectives_are_those_of_the_definition("rbm")


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_sites must be at least 1, got 0"):
        Pseudolikelihood(0)
    real = FunctionEnergy(lambda x: x.square().sum(-1), (2,))
    with pytest.raises(ValueError, match="finite support for RatioMatching"):
        ObjectiveLoss(real, RatioMatching())(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="finite support for Pseudolikelihood"):
        Pseudolikelihood().loss(real, torch.zeros(3, 2))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize(
    "objective", [Pseudolikelihood(), RatioMatching(), ExactMaximumLikelihood()]
)
def test_data_off_the_support_are_refused(objective, value):
    """Planted fault: the nearest state in their place."""
    energy = IsingEnergy((3,), 0.3)
    x = torch.tensor([[1.0, -1.0, 1.0], [1.0, value, 1.0]])
    with pytest.raises(ValueError, match=f"1 of 2 points .* first is .*{value}"):
        ObjectiveLoss(energy, objective)(x)
    with pytest.raises(ValueError, match="must lie in the support"):
        objective.loss(energy, x)
