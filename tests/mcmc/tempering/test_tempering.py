"""Replica exchange: invariance, separated modes, an equal ladder, and log Z."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from tqdm import tqdm

import pyro_ebm
from pyro_ebm.core.errors import DivergenceError, UnreliableWarning
from pyro_ebm.energies import (
    DistributionEnergy,
    FunctionEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
)
from pyro_ebm.mcmc import HMC, MALA, IndependentChains, ReplicaExchange
from pyro_ebm.mcmc.tempering import ladder, tempering
from pyro_ebm.mcmc.tempering.ladder import Ladder, equalised, swap
from pyro_ebm.mcmc.tempering.path import GeometricPath, PathState
from pyro_ebm.testing import assert_moments, targets

BETAS = [0.0, 0.1, 0.4, 1.0]
WIDTH = 0.5


def two_modes(dim):
    """Gaussians at -4 and 4 of the first coordinate, with weights 0.7 and 0.3."""
    centres = torch.zeros(2, dim)
    centres[:, 0] = torch.tensor([-4.0, 4.0])
    log_weights = torch.tensor([0.7, 0.3]).log()

    def energy(x):
        square = (x[..., None, :] - centres).square().sum(-1)
        return -torch.logsumexp(log_weights - square / (2 * WIDTH**2), -1)

    base = dist.Normal(torch.zeros(dim), 6.0).to_event(1)
    return FunctionEnergy(energy, (dim,)), base


def weight_on_the_right(draws):
    return (draws[..., 0] > 0).double().mean().item()


@pytest.mark.parametrize("dim", [1, 2])
def test_weights_of_separated_modes_are_found_from_one_of_them(dim):
    """All chains start on the left; HMC of the same cost never sees the right."""
    energy, base = two_modes(dim)
    start = torch.zeros(64, dim)
    start[:, 0] = -4.0
    exchange = ReplicaExchange(base, HMC(num_leapfrog=3), num_temperatures=6)
    found = exchange.run(energy, 150, initial=start)
    assert abs(weight_on_the_right(found.draws) - 0.3) < 0.05
    assert found.is_reliable
    truth = dim / 2 * math.log(2 * math.pi * WIDTH**2)
    assert abs(found.log_partition - truth) < 4 * found.log_partition_std_error < 0.3

    kernel = HMC(0.5, num_leapfrog=5)
    state = kernel.init(energy, start.repeat(10, 1))
    num_steps = found.num_evaluations // (len(state.x) * kernel.num_gradients)
    for _ in range(num_steps):
        state, _ = kernel.step(energy, state)
    assert abs(weight_on_the_right(state.x) - 0.3) > 0.05


@pytest.mark.filterwarnings("ignore:R-hat of the chains of the draws")
def test_independent_chains_of_hmc_take_the_weights_of_their_start():
    """From the base, which covers both modes, but knows nothing of their weights."""
    energy, base = two_modes(2)
    draws = IndependentChains(base)(energy, 1000)
    assert abs(weight_on_the_right(draws) - 0.3) > 0.05


def stationary(num_chains=20_000, scale=(1.0, 1.0)):
    """A run in which the replicas start from exact draws of their temperatures."""
    energy = QuadraticEnergy(torch.zeros(2), precision(1.0))
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    settings = ReplicaExchange(
        base,
        HMC(0.9, num_leapfrog=2),
        inverse_temperatures=BETAS,
        warmup_steps=0,
    )
    run = tempering._Run(settings, GeometricPath(energy, base), num_chains, None)
    ladder = run.adaptation.ladder
    scales = torch.tensor(scale).expand_as(ladder.scale)
    run.adaptation.ladder = Ladder(run.path, ladder.inverse_temperatures, scales)
    exact = [
        dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision(beta))
        for beta in BETAS
    ]
    draws = torch.stack([normal.sample((num_chains,)) for normal in exact], 1)
    run.replicas = run.replicas._replace(state=run.path.evaluate(draws))
    return run


def precision(beta):
    end = torch.tensor([[1.0, 0.8], [0.8, 2.0]]).inverse()
    return (1 - beta) * torch.eye(2) / 4 + beta * end


def assert_stays(run, num_steps=12):
    """Mean and variance at every temperature."""
    num_arrived = 0
    with torch.no_grad():
        for _ in range(num_steps):
            *_, swap_prob, arrived = run.step()
            num_arrived += arrived.sum()
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for k, beta in enumerate(BETAS):
        variance = (rows @ precision(beta).inverse() @ rows.mT).diagonal()
        draws = run.replicas.state.u[:, k] @ rows.mT
        fourth = 3 * variance**2
        assert_moments(draws, 0.0, variance, fourth_central_moment=fourth)
    # Where all swap, or none does, a wrong rule would go unseen.
    assert 0.2 < swap_prob.mean() < 0.9
    assert num_arrived > 1000


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 1.3)])
def test_exact_draws_stay_at_every_temperature(scale):
    """Of 20,000 chains after 12 steps; see the planted faults below."""
    assert_stays(stationary(scale=scale))


def always_swap(monkeypatch):
    monkeypatch.setattr(ladder, "swap", lambda r, betas: swap(r, 0 * betas))


def swap_by_the_reverse_ratio(monkeypatch):
    monkeypatch.setattr(ladder, "swap", lambda r, betas: swap(r, -betas))


def swap_by_half_the_ratio(monkeypatch):
    monkeypatch.setattr(ladder, "swap", lambda r, betas: swap(r, betas / 2))


def leave_energies_behind(monkeypatch):
    def faulty(replicas, betas):
        moved, *others = swap(replicas, betas)
        state = moved.state._replace(target=replicas.state.target)
        return moved._replace(state=state), *others

    monkeypatch.setattr(ladder, "swap", faulty)


def move_at_other_temperatures(monkeypatch):
    right = PathState.at
    monkeypatch.setattr(PathState, "at", lambda self, beta: right(self, beta.square()))


@pytest.mark.parametrize(
    "plant",
    [
        always_swap,
        swap_by_the_reverse_ratio,
        swap_by_half_the_ratio,
        leave_energies_behind,
        move_at_other_temperatures,
    ],
)
def test_planted_faults_are_caught(plant, monkeypatch):
    run = stationary()
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"\|z\|"):
        assert_stays(run)


def test_where_all_swap_every_point_travels_straight_up():
    """From base to energy in K - 1 steps; in turns, one arrives every other step."""
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
    energy = DistributionEnergy(base) + 3.0
    found = ReplicaExchange(base, num_temperatures=5, warmup_steps=0).run(energy, 44, 4)
    torch.testing.assert_close(found.swap_rates, torch.ones(4))
    assert found.barrier == pytest.approx(0.0, abs=1e-9)
    assert ((found.round_trips - 20).abs() <= 1).all()
    assert found.log_partition == pytest.approx(-3.0)
    assert found.log_partition_std_error == pytest.approx(0.0, abs=1e-9)


def test_pairs_that_are_not_in_turn_do_not_swap():
    run = stationary(num_chains=50)
    for parity in (0, 1):
        before = run.replicas._replace(parity=parity)
        after, swap_prob, _ = swap(before, run.adaptation.ladder.inverse_temperatures)
        assert after.parity == 1 - parity
        moved = (after.state.u != before.state.u).any(-1)
        assert moved.any()
        pairs = [(0, 1), (2, 3)] if parity == 0 else [(1, 2)]
        assert moved.any(0).nonzero().flatten().tolist() == sorted(sum(pairs, ()))
        for low, high in pairs:
            assert torch.equal(moved[:, low], moved[:, high])
        assert swap_prob.shape == (50, 3)


def test_infinite_energies_never_swap_up():
    run = stationary(num_chains=200)
    state = run.replicas.state
    hit = torch.zeros(200, 4, dtype=torch.bool)
    hit[:100, 0] = True
    replicas = run.replicas._replace(
        state=state._replace(target=state.target.masked_fill(hit, torch.inf)),
    )
    after, swap_prob, _ = swap(replicas, run.adaptation.ladder.inverse_temperatures)
    assert (swap_prob[:100, 0] == 0).all()
    assert after.state.target[:, 1:].isfinite().all()


def test_warmup_makes_the_swap_rates_equal():
    """The ladder starts far from that; the same without warm-up is not equal."""
    energy, base = two_modes(2)
    ladder = torch.linspace(0, 1, 6).tolist()
    kernel = HMC(0.5, num_leapfrog=3)
    adapted = ReplicaExchange(base, kernel, inverse_temperatures=ladder)
    found = adapted.run(energy, 100, 64)
    assert found.swap_rates.max() - found.swap_rates.min() < 0.15
    assert (found.accept_prob - 0.8).abs().max() < 0.1
    assert found.step_sizes.shape == (5,)
    assert found.barrier == pytest.approx(2.1, abs=0.4)

    fixed = ReplicaExchange(base, kernel, inverse_temperatures=ladder, warmup_steps=0)
    found = fixed.run(energy, 100, 64)
    assert found.inverse_temperatures.tolist() == ladder
    assert (found.step_sizes == 0.5).all()
    assert found.swap_rates.max() - found.swap_rates.min() > 0.5


def test_equalised_finds_the_ladder_of_a_known_barrier():
    """If rates follow from the square root, the temperatures are squares."""
    betas = torch.linspace(0, 1, 201)
    for _ in range(2):
        betas = equalised(betas, betas.sqrt().diff())
    torch.testing.assert_close(betas, torch.linspace(0, 1, 201) ** 2, atol=0.01, rtol=0)
    unequal = torch.tensor([0.0, 0.2, 1.0])
    torch.testing.assert_close(equalised(unequal, torch.zeros(2))[1], torch.tensor(0.2))


def test_log_partition_and_moments_on_a_constrained_support():
    """Gamma: log Z = log 2, mean and variance 3, in units of its support."""
    target = targets.gamma()
    found = ReplicaExchange(target.base, num_temperatures=4).run(target.energy, 100)
    error = found.log_partition - target.log_partition
    assert abs(error) < 4 * found.log_partition_std_error < 0.2
    assert (found.draws > 0).all()
    last = found.draws[:, -1]
    assert_moments(last, 3.0, 3.0, fourth_central_moment=3 * 9 * (1 + 2 / 3))


def test_pyro_model_with_its_prior_as_base():
    y = torch.tensor([2.0, 3.0])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=y)

    energy = PyroModelEnergy(model)
    found = ReplicaExchange(energy.prior, num_temperatures=3).run(energy, 60)
    covariance = torch.eye(2) + 1
    evidence = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(y)
    error = abs(found.log_partition - evidence.item())
    assert error < 4 * found.log_partition_std_error < 0.2
    z = energy.constrain(found.draws[:, -1])["z"]
    assert_moments(z, 5 / 3, 1 / 3, fourth_central_moment=3 * (1 / 3) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event", [(), (2,), (2, 3)])
def test_shapes_and_dtype(dtype, event):
    energy = FunctionEnergy(
        lambda x: x.square().flatten(x.dim() - len(event)).sum(-1) if event else x**2,
        event,
    )
    base = dist.Normal(torch.zeros(event), 1.0).to_event()
    exchange = ReplicaExchange(base, num_temperatures=3, warmup_steps=20)
    found = exchange.run(energy, 40, 5, thinning=2)
    assert found.draws.shape == (5, 40, *event)
    assert found.draws.dtype == found.inverse_temperatures.dtype == dtype
    assert found.swap_rates.shape == found.step_sizes.shape == (2,)
    assert found.round_trips.shape == (5,)
    assert not found.draws.requires_grad


def test_cost_is_counted():
    energy, base = two_modes(1)
    kernel = HMC(0.5, num_leapfrog=2)
    exchange = ReplicaExchange(base, kernel, num_temperatures=4, warmup_steps=0)
    found = exchange.run(energy, 50, 8)
    assert found.num_evaluations == 8 * 4 + 50 * 8 * (3 * 2 + 1)


def test_two_temperatures_and_a_scale_of_the_kernels_own():
    energy = QuadraticEnergy(torch.zeros(2), torch.diag(torch.tensor([1.0, 100.0])))
    base = dist.Normal(torch.zeros(2), torch.tensor([1.5, 0.2])).to_event(1)
    kernel = HMC(scale=torch.tensor([1.0, 0.1]))
    exchange = ReplicaExchange(base, kernel, num_temperatures=2)
    run = tempering._Run(exchange, GeometricPath(energy, base), 64, None)
    with torch.no_grad():
        for _ in range(100):
            run.step()
    assert (run.adaptation.ladder.scale == 1).all()
    assert exchange.run(energy, 50).is_reliable


def test_scales_are_found_at_each_temperature():
    energy = QuadraticEnergy(torch.zeros(2), torch.diag(torch.tensor([1.0, 400.0])))
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    exchange = ReplicaExchange(base, num_temperatures=6)
    run = tempering._Run(exchange, GeometricPath(energy, base), 64, None)
    with torch.no_grad():
        for _ in range(200):
            run.step()
    ladder = run.adaptation.ladder
    beta = ladder.inverse_temperatures[1:, None]
    truth = ((1 - beta) / 4 + beta * torch.tensor([1.0, 400.0])).rsqrt()
    torch.testing.assert_close(ladder.scale, truth, rtol=0.5, atol=0)
    assert ladder.scale[0, 1] > 3 * ladder.scale[-1, 1]


def test_as_a_sampler_of_a_distribution():
    energy, base = two_modes(2)
    exchange = ReplicaExchange(
        base, HMC(num_leapfrog=3), 6, warmup_steps=100, num_steps=60
    )
    q = pyro_ebm.EnergyDistribution(energy, sampler=exchange)
    draws = q.sample((500,))
    assert draws.shape == (500, 2)
    spread = math.sqrt(0.3 * 0.7 / 500)
    assert abs(weight_on_the_right(draws) - 0.3) < 4 * spread
    assert exchange.start(energy, 3).shape == (3, 2)


def test_same_seed_same_draws():
    energy, base = two_modes(1)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        exchange = ReplicaExchange(base, num_temperatures=4, warmup_steps=30)
        draws.append(exchange(energy, 50))
    assert torch.equal(*draws)


def test_starts_outside_of_the_support_are_moved():
    half = FunctionEnergy(
        lambda x: torch.where(x > 0, x.square() / 2, torch.inf), (), None
    )
    base = dist.Normal(torch.tensor(0.0), 1.5)
    exchange = ReplicaExchange(base, num_temperatures=4)
    found = exchange.run(half, 100, initial=torch.linspace(-1, 1, 64))
    assert (found.draws > 0).all()
    error = found.log_partition - math.log(math.pi / 2) / 2
    assert abs(error) < 4 * found.log_partition_std_error < 0.2
    nowhere = FunctionEnergy(lambda x: x * torch.nan, ())
    with pytest.raises(DivergenceError, match="finite somewhere"):
        exchange.run(nowhere)


def test_too_few_temperatures_are_unreliable_and_say_so():
    energy, _ = two_modes(2)
    base = dist.Normal(torch.full((2,), 300.0), 1.0).to_event(1)
    exchange = ReplicaExchange(base, num_temperatures=2, warmup_steps=50)
    with pytest.warns(UnreliableWarning, match="no point of the base has arrived"):
        found = exchange.run(energy, 20, initial=torch.zeros(64, 2))
    assert found.status == "unreliable"
    assert "log Z from above" in found.reason


@pytest.mark.parametrize(
    ("settings", "error", "argument"),
    [
        ({"kernel": MALA()}, TypeError, "kernel must be HMC"),
        ({"num_temperatures": 1}, ValueError, "num_temperatures"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"min_chains": 0}, ValueError, "min_chains"),
        ({"inverse_temperatures": [0.0]}, ValueError, "inverse_temperatures"),
        ({"inverse_temperatures": [0.1, 1.0]}, ValueError, "inverse_temperatures"),
        ({"inverse_temperatures": [0.0, 0.5, 0.4, 1.0]}, ValueError, "rise"),
    ],
)
def test_invalid_settings(settings, error, argument):
    with pytest.raises(error, match=argument):
        ReplicaExchange(dist.Normal(torch.tensor(0.0), 1.0), **settings)


def test_invalid_arguments_of_a_run():
    energy, base = two_modes(2)
    exchange = ReplicaExchange(base)
    for name in ("num_samples", "num_chains", "thinning"):
        with pytest.raises(ValueError, match=name):
            exchange.run(energy, **{name: 0})
    with pytest.raises(ValueError, match=r"initial must have shape \(64, 2\)"):
        exchange.run(energy, initial=torch.zeros(64))
    other = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    with pytest.raises(ValueError, match="event_shape"):
        ReplicaExchange(other).run(energy)
    positive = FunctionEnergy(
        lambda x: x.sum(-1), (2,), constraints.independent(constraints.positive, 1)
    )
    with pytest.raises(ValueError, match="support"):
        exchange.run(positive)


def test_the_bar_counts_every_step(monkeypatch):
    """Of the warm-up too. Seen to fail without those."""
    bars = []

    def recording(**settings):
        bars.append(tqdm(**{**settings, "disable": True}))
        bars[-1].update = lambda: setattr(bars[-1], "n", bars[-1].n + 1)
        bars[-1].is_shown = not settings["disable"]
        return bars[-1]

    monkeypatch.setattr(tempering, "tqdm", recording)
    exchange = ReplicaExchange(
        dist.Normal(0.0, 2.0), num_temperatures=3, warmup_steps=7
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        exchange.run(FunctionEnergy(lambda x: x**2, ()), 5, 4, thinning=2)
    assert (bars[0].n, bars[0].is_shown) == (17, True)
