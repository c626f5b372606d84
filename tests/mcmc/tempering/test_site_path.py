"""Replicas and particles over finite supports, against enumeration.

Exact draws of every temperature must stay draws of that temperature, and points that
come from the base find modes that sweeps never leave.
"""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.core.errors import DivergenceError, UnreliableWarning
from pyro_ebm.energies import (
    BoltzmannEnergy,
    FactorGraphEnergy,
    FunctionEnergy,
    IsingEnergy,
    PottsEnergy,
    QuadraticEnergy,
    RBMEnergy,
)
from pyro_ebm.energies.discrete.finite import (
    finite_points,
    num_points,
)
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.mcmc import (
    HMC,
    DiscreteLangevin,
    Gibbs,
    ReplicaExchange,
    SwendsenWang,
)
from pyro_ebm.mcmc.tempering import ladder, tempering
from pyro_ebm.mcmc.tempering.ladder import swap
from pyro_ebm.mcmc.tempering.site_path import SitePath, path_between
from pyro_ebm.partition import (
    annealed_importance_sampling,
    bidirectional,
    gibbs_annealing,
    smc,
    thermodynamic_integration,
)
from pyro_ebm.testing import assert_moments

BETAS = [0.0, 0.3, 0.7, 1.0]
BITS = constraints.independent(constraints.boolean, 1)


def uniform(energy):
    return IndependentSites.uniform(energy.support, energy.event_shape)


def states(energy):
    number = torch.arange(num_points(energy.support, energy.event_shape))
    return finite_points(energy.support, energy.event_shape, number, torch.empty(0))


def black_box():
    return FunctionEnergy(
        lambda x: (x.cumsum(-1) - 2).square().sum(-1) / 4 - x[..., 0], (6,), BITS
    )


def tilted(energy):
    """Independent sites that are not uniform."""
    q = len(torch.unique(states(energy)))
    return IndependentSites(energy.support, torch.randn(q, *energy.event_shape))


CASES = {
    "ising": (lambda: IsingEnergy((2, 3), 0.6, 0.2), uniform, Gibbs()),
    "clusters": (lambda: IsingEnergy((2, 3), 0.6, 0.2), uniform, SwendsenWang(0)),
    "clusters-tilted": (lambda: PottsEnergy((4,), 3, 0.9), tilted, SwendsenWang(0)),
    "potts-tilted": (lambda: PottsEnergy((4,), 3, 0.9), tilted, Gibbs()),
    "rbm": (lambda: RBMEnergy(1.5 * torch.randn(6, 3)), uniform, None),
    "dense": (lambda: BoltzmannEnergy(torch.randn(6, 6).triu(1)), uniform, None),
    "black-box": (black_box, tilted, DiscreteLangevin(1.0)),
    "site-by-site": (black_box, uniform, None),
}


def stationary(name, num_chains=10_000):
    """Replicas that are exact draws of their temperatures."""
    build, base, kernel = CASES[name]
    energy = build()
    settings = ReplicaExchange(
        base(energy), kernel, inverse_temperatures=BETAS, warmup_steps=0
    )
    with torch.no_grad():
        run = tempering._Run(
            settings, SitePath(energy, settings.base), num_chains, None
        )
        points = states(energy)
        columns = [
            points[(-run.path.at(b)(points)).softmax(0).multinomial(num_chains, True)]
            for b in BETAS
        ]
        state = run.path.evaluate(torch.stack(columns, 1))
    run.replicas = run.replicas._replace(state=state)
    return run, points


def assert_stays(run, points, num_steps=6):
    """The energy of the target and sums of sites, at every temperature."""
    num_arrived, weights = 0, torch.randn(points[0].numel(), 2)
    with torch.no_grad():
        for _ in range(num_steps):
            done = run.step()
            num_arrived += done.arrived.sum()
        for k, beta in enumerate(BETAS):
            p = (-run.path.at(beta)(points)).softmax(0)
            x = run.replicas.state.x[:, k]
            f = run.path.at(1.0)

            def features(at, f=f):
                return torch.cat([f(at)[:, None], at.flatten(1) @ weights], 1)

            rows = features(points)
            mean = p @ rows
            central = [p @ (rows - mean) ** power for power in (2, 4)]
            assert_moments(
                features(x), mean, central[0], fourth_central_moment=central[1]
            )
    assert 0.2 < done.swap_prob.mean() < 0.97
    assert num_arrived > 1000


@pytest.mark.parametrize("name", CASES)
def test_exact_draws_stay_at_every_temperature(name):
    assert_stays(*stationary(name))


def always_swap(monkeypatch):
    monkeypatch.setattr(ladder, "swap", lambda r, betas: swap(r, 0 * betas))


def swap_the_wrong_way(monkeypatch):
    monkeypatch.setattr(ladder, "swap", lambda r, betas: swap(r, 1 - betas))


def colder(monkeypatch):
    """The kernel moves at a temperature that is not that of its replica."""
    right = SitePath.step

    def faulty(self, kernel, state):
        self.inverse_temperature = self.inverse_temperature**0.5
        return right(self, kernel, state)

    monkeypatch.setattr(SitePath, "step", faulty)


@pytest.mark.parametrize("plant", [always_swap, swap_the_wrong_way, colder])
@pytest.mark.parametrize("name", ["ising", "rbm", "clusters-tilted"])
def test_planted_faults_are_caught(name, plant, monkeypatch):
    run, points = stationary(name)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"\|z\|"):
        assert_stays(run, points)


def two_patterns():
    """A machine with two modes of weights .7 and .3 and 12 nats between."""
    signs = torch.tensor([1.0, -1.0]).repeat(5)
    weight = torch.stack([signs, -signs], 1) * 6
    return RBMEnergy(weight, torch.zeros(10), torch.tensor([-18.0, -18.84]))


def test_shares_of_modes_that_sweeps_do_not_leave():
    """Of a lattice in a weak field, and of a machine with two patterns."""
    lattice, machine = IsingEnergy((4, 4), 0.8, 0.02), two_patterns()
    signs = torch.tensor([1.0, -1.0]).repeat(5)
    cases = (
        (lattice, -torch.ones(4, 4), lambda x: x.sum((-2, -1)) > 0),
        (machine, (signs < 0).double(), lambda x: (x * signs).sum(-1) > 0),
    )
    for energy, light, is_heavy in cases:
        points = states(energy)
        truth = (-energy(points)).softmax(0)[is_heavy(points)].sum().item()
        assert 0.6 < truth < 0.75
        start = light.expand(64, *light.shape)
        state = Gibbs(100).init(energy, start)
        stuck = is_heavy(Gibbs(100).step(energy, state)[0].x).double().mean()
        assert stuck < 0.1
        exchange = ReplicaExchange(num_temperatures=7, warmup_steps=100)
        found = exchange.run(energy, 200, initial=start, progress_bar=False)
        assert found.status == "ok"
        assert abs(is_heavy(found.draws).double().mean() - truth) < 0.05
        exact = energy.closed_form().log_partition.item()
        error = found.log_partition_std_error
        assert abs(found.log_partition - exact) < 4 * error
        assert error < 0.1
        assert found.step_sizes.isnan().all()


def test_the_error_covers_what_the_ladder_hardly_reaches():
    """Fault: the spread of the chains alone, 3.7 times less than the error."""
    support = constraints.integer_interval(0, 3)
    energy = FunctionEnergy(lambda x: x / 3, (), support)
    base = IndependentSites(support, torch.tensor([0.4, 1e-12, 0.3, 0.3]).log())
    exchange = ReplicaExchange(base, num_temperatures=3, warmup_steps=20)
    found = exchange.run(energy, 100, progress_bar=False)
    exact = (-torch.arange(4) / 3).logsumexp(0).item()
    error = abs(found.log_partition - exact)
    assert error < 2 * found.log_partition_std_error
    assert error > 0.05


@pytest.mark.parametrize("name", CASES)
def test_estimators_of_log_partition(name):
    """One run of each; and bounds from exact draws enclose the truth.

    Planted faults seen to fail: no ``log_start``; a slope of the wrong sign.
    """
    build, base, kernel = CASES[name]
    energy = build()
    points = states(energy)
    with torch.no_grad():
        truth = (-energy(points)).logsumexp(0).item()
        draws = points[(-energy(points)).softmax(0).multinomial(256, True)]
    start = base(energy)
    found = smc(energy, start, kernel=kernel, progress_bar=False)
    assert abs(found.value - truth) < 0.3
    found = annealed_importance_sampling(energy, start, kernel=kernel)
    assert abs(found.value - truth) < 4 * found.std_error + 1e-6
    assert found.lower < truth
    found = bidirectional(energy, start, draws, num_temperatures=40, kernel=kernel)
    assert found.lower < truth < found.upper
    assert abs(found.value - truth) < 4 * found.std_error + 1e-6
    curve = thermodynamic_integration(energy, start, progress_bar=False)
    error = 4 * curve.log_partition_std_error + 0.05
    assert abs(curve.log_partition - truth) < error
    found = gibbs_annealing(energy, start, kernel=kernel, budget=60_000)
    assert abs(found.value - truth) < 4 * found.std_error + 1e-6


def test_energies_between_are_those_of_the_ends():
    """And the tables that clusters are made of are those of the energy."""
    for name, (build, base, _) in CASES.items():
        energy = build()
        path = SitePath(energy, base(energy))
        x = states(energy)
        state = path.evaluate(x)
        with torch.no_grad():
            for beta in BETAS:
                at = path.at(beta)
                torch.testing.assert_close(state.energy(beta), at(x))
                factors = getattr(at, "factors", lambda: None)()
                if factors is not None:
                    index = (x.flatten(1) - x.min()) / (2 if x.min() < 0 else 1)
                    total = torch.zeros(len(x))
                    for sites, table in factors:
                        wide = table.expand(len(sites), *table.shape[1:])
                        for row, own in zip(sites, wide, strict=True):
                            total += own[tuple(index[:, row].long().mT)]
                    torch.testing.assert_close((at(x) + total).std(), torch.tensor(0.0))
            log_start = (-path.at(0.0)(x)).logsumexp(0)
            torch.testing.assert_close(log_start, torch.tensor(path.log_start))
        assert path.is_linear == (name != "rbm")


def test_what_a_graph_forbids_is_reached():
    """Three colours on a torus, from uniform sites."""
    equal = torch.zeros(3, 3).fill_diagonal_(-torch.inf)
    edges = torch.tensor([[i, (i + 1) % 6] for i in range(6)])
    energy = FactorGraphEnergy([3] * 6, [(edges, equal)])
    exchange = ReplicaExchange(num_temperatures=6, warmup_steps=50)
    found = exchange.run(energy, 60, progress_bar=False)
    assert energy(found.draws.flatten(0, 1)).eq(0).all()
    assert abs(found.log_partition - torch.tensor(66.0).log()) < 0.1
    found = smc(energy, uniform(energy), progress_bar=False)
    assert abs(found.value - torch.tensor(66.0).log()) < 0.5


def test_what_replicas_began_with_is_told():
    """A permutation: no site moves alone, and a tenth of the base leads anywhere.

    Fault: no look at the first half, with "ok" and an error of .03.
    """
    weight = torch.tensor(
        [[-2.3, 1.4, 0.2, -1.0], [0.6, 2.9, -0.4, 0.1]] + 2 * [[0.9, -1.2, 3.1, 0.0]]
    )
    places = constraints.independent(constraints.integer_interval(0, 3), 1)

    def value(x):
        total = -weight[torch.arange(4), x.long()].sum(-1)
        is_one = (x.sort(-1).values == torch.arange(4.0)).all(-1)
        return total.where(is_one, torch.inf)

    energy = FunctionEnergy(value, (4,), places)
    exact = (-energy(states(energy))).logsumexp(0).item()
    exchange = ReplicaExchange(num_temperatures=3, warmup_steps=20)
    with pytest.warns(UnreliableWarning, match="log Z has moved along the run"):
        found = exchange.run(energy, 60, 128, progress_bar=False)
    error = found.log_partition - exact
    assert 0.1 < abs(error) < 3 * found.log_partition_std_error


def test_draws_that_no_base_leads_to():
    """Their share belongs to log Z. Fault: without it, .4 to .8 too little."""
    energy = FunctionEnergy(lambda x: x.sum(-1) / 2, (4,), BITS)
    zero = torch.tensor([[0.0] + 3 * [-0.6931], [-torch.inf] + 3 * [-0.6931]])
    exchange = ReplicaExchange(IndependentSites(BITS, zero), None, 3, None, 20)
    with pytest.warns(UnreliableWarning, match="where the base has no probability"):
        found = exchange.run(energy, 50, 64, progress_bar=False)
    exact = 4 * torch.tensor([0.0, -0.5]).logsumexp(0).item()
    assert abs(found.log_partition - exact) < 0.1


def test_step_sizes_are_adapted_at_each_temperature():
    """They are longer where the sites are almost independent, up to the bound."""
    found = ReplicaExchange(num_temperatures=6, warmup_steps=100).run(
        FunctionEnergy(lambda x: (x.sum(-1) - 10).square() / 2, (30,), BITS),
        30,
        progress_bar=False,
    )
    assert found.step_sizes[0] > 2 * found.step_sizes[-1]
    assert found.step_sizes.max() <= DiscreteLangevin().max_step * (1 + 1e-6)
    assert abs(found.accept_prob[-1] - DiscreteLangevin().target_accept_prob) < 0.2


def test_as_a_sampler_and_reproducible():
    energy = IsingEnergy((3, 3), 0.2)
    sampler = ReplicaExchange(num_temperatures=3, num_steps=50)
    torch.manual_seed(1)
    first = sampler(energy, 40)
    torch.manual_seed(1)
    assert torch.equal(first, sampler(energy, 40))
    assert energy.support.check(first).all()


def test_wrong_arguments():
    energy = IsingEnergy((3, 3), 0.3)
    base = uniform(energy)
    with pytest.raises(TypeError, match="must be Gibbs.*got HMC, which follows"):
        ReplicaExchange(base, HMC()).run(energy)
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(TypeError, match="kernel must be HMC.*got Gibbs"):
        ReplicaExchange(normal, Gibbs()).run(QuadraticEnergy(torch.zeros(2)))
    with pytest.raises(TypeError, match="kernel must be None.*got Gibbs"):
        smc(QuadraticEnergy(torch.zeros(2)), normal, kernel=Gibbs())
    with pytest.raises(ValueError, match="base must have"):
        ReplicaExchange(normal).run(energy)
    with pytest.raises(TypeError, match="base must be a Pyro distribution.*got None"):
        ReplicaExchange().run(QuadraticEnergy(torch.zeros(2)))
    with pytest.raises(ValueError, match="must not be negative"):
        smc(
            IsingEnergy((4, 4), -0.3),
            base=uniform(IsingEnergy((4, 4), 0.1)),
            kernel=SwendsenWang(),
        )
    counts = dist.Poisson(torch.ones(2)).to_event(1)
    infinite = FunctionEnergy(
        lambda x: x.sum(-1), (2,), constraints.independent(counts.support, 0)
    )
    with pytest.raises(NotImplementedError, match="discrete"):
        path_between(infinite, counts)
    nowhere = FunctionEnergy(lambda x: torch.inf * x.sum(-1).add(1), (20,), BITS)
    for run in (smc, lambda e, b: ReplicaExchange(b).run(e)):
        with pytest.raises(DivergenceError, match="finite"):
            run(nowhere, uniform(nowhere))


def test_too_few_temperatures_say_so():
    energy = IsingEnergy((8, 8), 0.8)
    exchange = ReplicaExchange(uniform(energy), num_temperatures=2, warmup_steps=5)
    with pytest.warns(UnreliableWarning, match="no point of the base has arrived"):
        exchange.run(energy, 20, progress_bar=False)
