"""Many flips at once leave ``e^-f`` invariant: a chi-square on all states.

Chains start from exact draws and must stay there. Each kind of proposal is also run
with a planted fault.
"""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import (
    FunctionEnergy,
    IsingEnergy,
    PottsEnergy,
    QuadraticEnergy,
    RBMEnergy,
)
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.mcmc import MCMC, DiscreteLangevin
from pyro_ebm.mcmc.kernels import discrete_langevin as module

NUM_CHAINS = 20_000
BITS = dist.constraints.independent(dist.constraints.boolean, 1)


def parity(x):
    """Even points are preferred, and nothing else matters."""
    signs = (torch.pi * x.sum(-1)).cos()
    return -0.4 * signs


ENERGIES = {
    "ising": lambda: IsingEnergy((3, 3), 0.3, torch.linspace(-0.3, 0.3, 9).view(3, 3)),
    "potts": lambda: PottsEnergy((2, 3), 3, 0.6),
    "rbm": lambda: RBMEnergy(torch.randn(7, 3), torch.randn(7), torch.randn(3)),
    "parity": lambda: FunctionEnergy(parity, (6,), BITS),
    "integers": lambda: FunctionEnergy(
        lambda x: (x.cumsum(-1) - 2).square().sum(-1) / 3,
        (4,),
        dist.constraints.independent(dist.constraints.integer_interval(-1, 2), 1),
    ),
    "ragged": lambda: FunctionEnergy(
        lambda x: (x.cumsum(-1) - 1.5).square().sum(-1) / 4,
        (3,),
        dist.constraints.independent(
            dist.constraints.integer_interval(0, torch.tensor([1, 2, 3])), 1
        ),
    ),
}


def states(energy):
    number = torch.arange(num_points(energy.support, energy.event_shape))
    return finite_points(energy.support, energy.event_shape, number, torch.empty(0))


def excess(energy, kernel, num_steps=3):
    """Standardised chi-square of all states after some steps from exact draws."""
    points = states(energy)
    p = (-energy(points)).detach().softmax(0)
    start = torch.multinomial(p, NUM_CHAINS, replacement=True)
    state = kernel.init(energy, points[start])
    for _ in range(num_steps):
        state, info = kernel.step(energy, state)
    flat = points.reshape(len(points), -1)
    weights = torch.randn(flat.shape[1])  # a number of its own for each state
    order = (flat @ weights).sort()
    place = torch.searchsorted(
        order.values - 1e-9, state.x.reshape(NUM_CHAINS, -1) @ weights, right=True
    )
    count = torch.bincount(order.indices[place - 1], minlength=len(p))
    common = p * NUM_CHAINS > 5
    expected = p[common] * NUM_CHAINS
    chi_square = ((count[common] - expected) ** 2 / expected).sum()
    degrees = int(common.sum()) - 1
    moved = (state.x != points[start]).double().mean()
    return ((chi_square - degrees) / math.sqrt(2 * degrees)).item(), moved.item()


@pytest.mark.parametrize("step_size", [0.3, 50.0])
@pytest.mark.parametrize("name", ENERGIES)
def test_exact_draws_stay(name, step_size):
    z, moved = excess(ENERGIES[name](), DiscreteLangevin(step_size))
    assert z < 5
    assert moved > 0.05


def one_way(monkeypatch):
    """The ratio of the proposals is left out."""
    right = module._Moves.log_prob
    monkeypatch.setattr(
        module._Moves, "log_prob", lambda self, index: 0 * right(self, index)
    )
    monkeypatch.setattr(module, "_outcome", lambda flip, _: torch.ones_like(flip))


def wrong_slope(monkeypatch):
    """The way back is proposed as if from the same gradient."""
    redraws, flips = module._Moves.of.__func__, module._flip_probs
    kept = []

    def first(state):
        kept.append(state.grad)
        return state._replace(grad=kept[0])

    monkeypatch.setattr(
        module._Moves,
        "of",
        classmethod(lambda cls, e, state, time: redraws(cls, e, first(state), time)),
    )
    monkeypatch.setattr(
        module, "_flip_probs", lambda e, state, *others: flips(e, first(state), *others)
    )


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("ising", one_way),
        ("potts", one_way),
        ("rbm", one_way),
        ("integers", one_way),
        ("rbm", wrong_slope),
        ("integers", wrong_slope),
    ],
)
def test_planted_faults_are_caught(name, plant, monkeypatch):
    plant(monkeypatch)
    assert excess(ENERGIES[name](), DiscreteLangevin(1.0))[0] > 5


def test_both_parities_are_visited():
    """Where a fixed, even number of flips would keep the one it began with."""
    energy = FunctionEnergy(lambda x: 0 * x.sum(-1), (6,), BITS)
    kernel = DiscreteLangevin(0.2)
    state = kernel.init(energy, torch.zeros(2000, 6))
    for _ in range(20):
        state, _ = kernel.step(energy, state)
    assert abs((state.x.sum(-1) % 2).mean() - 0.5) < 0.05


def test_adapted_in_a_run():
    """The step is found, chains converge, and nearly independent sites end at the
    bound."""
    net = FunctionEnergy(
        lambda x: ((x @ torch.ones(12)) - 4).square() / 6 + x[..., 0], (12,), BITS
    )
    mcmc = MCMC(DiscreteLangevin(), 400, 200, num_chains=64, progress_bar=False)
    mcmc.run(net)
    found = mcmc.diagnostics()
    assert found.status == "ok"
    assert 0.4 < found.accept_prob < 0.8
    points = states(net)
    mean = (-net(points)).softmax(0) @ points
    assert (mcmc.get_samples().mean(0) - mean).abs().max() < 0.03
    coins = FunctionEnergy(lambda x: 0.1 * x.sum(-1), (12,), BITS)
    mcmc.run(coins)
    assert mcmc.diagnostics().accept_prob > 0.95
    assert mcmc.diagnostics().status == "ok"


def test_wrong_arguments():
    with pytest.raises(ValueError, match="max_step must be positive and finite, got 0"):
        DiscreteLangevin(max_step=0)
    with pytest.raises(ValueError, match=r"support for DiscreteLang.*mcmc\.HMC"):
        DiscreteLangevin().init(QuadraticEnergy(torch.zeros(2)), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="1 of 2 points do not"):
        DiscreteLangevin().init(
            ENERGIES["parity"](), torch.tensor([[0.0] * 6, [2.0] * 6])
        )
    rounded = FunctionEnergy(lambda x: (x > 0.5).to(x).sum(-1), (6,), BITS)
    with pytest.raises(ValueError, match="must have a gradient in x"):
        DiscreteLangevin().init(rounded, torch.zeros(2, 6))
