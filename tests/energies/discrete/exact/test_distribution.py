"""Exact finite distributions at sites of Pyro models."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
    infer_discrete,
)
from torch import nn
from torch.distributions import constraints

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import (
    BoltzmannEnergy,
    ChainEnergy,
    FactorGraphEnergy,
    FunctionEnergy,
    IsingEnergy,
    PottsEnergy,
    RBMEnergy,
)
from pyro_ebm.energies.discrete.finite import finite_points, num_points
from pyro_ebm.energies.discrete.independent import IndependentSites
from tests.energies.discrete.test_chain import chi_square

DATA = torch.tensor([0.9, -1.2, 0.3, 1.1, 0.7, -0.4, 0.2, 1.5, -2.0]).reshape(3, 3)


def spins():
    return IsingEnergy((3, 3), 0.3, torch.linspace(-1, 1, 9).reshape(3, 3))


def noisy(x):
    return dist.Normal(x, 0.8).to_event(2)


def model(coupling=None):
    energy = spins() if coupling is None else IsingEnergy((3, 3), coupling)
    x = pyro.sample("x", EnergyDistribution(energy), infer={"enumerate": "parallel"})
    pyro.sample("y", noisy(x), obs=DATA)


def posterior():
    energy = spins()
    x = finite_points(energy.support, (3, 3), torch.arange(512), energy.values)
    log_joint = -energy(x) + noisy(x).log_prob(DATA)
    return x, log_joint, energy.closed_form().log_partition


def test_pyro_sums_over_a_latent_lattice():
    """Planted fault: half of the states listed."""
    _, log_joint, log_partition = posterior()
    loss = TraceEnum_ELBO().loss(config_enumerate(model), lambda: None)
    assert loss == pytest.approx((log_partition - log_joint.logsumexp(0)).item())


def test_the_posterior_of_a_lattice_by_the_number_of_its_state():
    """Pyro's infer_discrete takes no site with event dimensions, but their number."""
    x, log_joint, _ = posterior()
    energy = spins()

    def numbered():
        number = pyro.sample("number", dist.Categorical(logits=-energy(x)))
        pyro.sample("y", noisy(x[number]), obs=DATA)
        return number

    settings = {"first_available_dim": -1, "temperature": 0}
    found = infer_discrete(config_enumerate(numbered), **settings)()
    assert found == log_joint.argmax()


def test_the_gradient_reaches_a_coupling():
    coupling = torch.tensor(0.3, requires_grad=True)
    elbo = TraceEnum_ELBO().differentiable_loss
    (found,) = torch.autograd.grad(
        elbo(lambda: model(coupling), lambda: None), coupling
    )
    step = 1e-5
    high, low = (
        TraceEnum_ELBO().loss(lambda c=c: model(torch.tensor(c)), lambda: None)
        for c in (0.3 + step, 0.3 - step)
    )
    assert found.item() == pytest.approx((high - low) / (2 * step), rel=1e-6)


def test_a_latent_coupling_has_its_map():
    """Planted fault: the coupling detached in the constructor."""
    x = IsingEnergy((3, 3), 0.3).closed_form().distribution.sample((40,))

    def program():
        coupling = pyro.sample("J", dist.Normal(0.0, 1.0))
        energy = IsingEnergy((3, 3), coupling)
        with pyro.plate("rows", 40):
            pyro.sample("x", EnergyDistribution(energy), obs=x)

    guide = pyro.infer.autoguide.AutoDelta(program)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(150):
        svi.step()
    coupling = guide.median()["J"].detach().requires_grad_()
    energy = IsingEnergy((3, 3), coupling)
    log_joint = -(energy(x).sum() + 40 * energy.closed_form().log_partition)
    log_joint = log_joint - coupling**2 / 2
    (slope,) = torch.autograd.grad(log_joint, coupling)
    assert slope.abs() < 5  # of a curvature of hundreds
    assert coupling.item() == pytest.approx(0.3, abs=0.1)


def test_a_machine_learns_by_its_exact_likelihood():
    """The gradient is that of all states written out."""
    data = (torch.rand(50, 6) < torch.linspace(0.1, 0.9, 6)).double()
    energy = RBMEnergy(torch.randn(6, 3), torch.randn(6), torch.randn(3))
    loss = -EnergyDistribution(energy).log_prob(data).mean()
    own = list(energy.parameters())
    v = finite_points(energy.support, (6,), torch.arange(64), energy.weight)
    expected = energy(data).mean() + (-energy(v)).logsumexp(0)
    for a, b in zip(
        torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_any_finite_energy_can_be_listed():
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(-2))
    support = dist.constraints.independent(dist.constraints.boolean, 1)
    small = EnergyDistribution(FunctionEnergy(net, (4,), support))
    assert small.has_enumerate_support
    assert small.expand((3,)).enumerate_support().shape == (16, 3, 4)
    assert small.expand((3,)).enumerate_support(expand=False).shape == (16, 1, 4)
    real = EnergyDistribution(FunctionEnergy(lambda x: x.sum(-1) ** 2, (4,)))
    assert not real.has_enumerate_support
    wide = EnergyDistribution(IsingEnergy((16, 16), 0.3))
    with pytest.raises(NotImplementedError, match=r"got 2\^256\."):
        wide.enumerate_support()
    with pytest.raises(NotImplementedError, match="infinitely many"):
        real.enumerate_support()


def impossible():
    """Three colours for four sites that all differ, and steps back."""
    differ = torch.zeros(3, 3).fill_diagonal_(-torch.inf)
    pairs = torch.combinations(torch.arange(4))
    yield FactorGraphEnergy([3] * 4, [(pairs, differ)]).closed_form().distribution
    path = torch.tensor([[0, 1], [1, 2]])
    none = torch.full((2, 2), -torch.inf)
    yield FactorGraphEnergy([2] * 3, [(path, none)]).closed_form().distribution
    upward = torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]])
    chain = ChainEnergy(torch.zeros(4, 2), upward).closed_form().distribution
    yield chain.condition({0: 1, 2: 0})
    graph = FactorGraphEnergy([2] * 4, [(torch.tensor([[0, 1], [1, 2]]), upward)])
    yield graph.closed_form().distribution.condition({0: 1, 2: 0})


def test_where_nothing_is_allowed_there_is_no_distribution():
    """Planted fault: draws of forbidden states, and marginals above 1."""
    for exact in impossible():
        assert exact.log_partition == -torch.inf
        for use in (
            exact.sample,
            exact.marginals,
            lambda exact=exact: exact.mode,
            lambda exact=exact: exact.condition({0: 0.0}),
        ):
            with pytest.raises(ValueError, match=r"no state.* positive probability"):
                use()


@pytest.mark.parametrize(
    ("energy", "value"),
    [
        (IsingEnergy((3,), 0.3), 0.0),
        (BoltzmannEnergy(torch.zeros(3, 3)), 5.0),
        (PottsEnergy((3,), 3, 0.3), 3.0),
        (RBMEnergy(torch.zeros(3, 2)), -1.0),
    ],
)
def test_points_off_the_support_have_no_probability(energy, value):
    """Planted fault: the density of whatever the energy makes of them."""
    exact = energy.closed_form().distribution
    x = torch.ones(2, 3).index_fill(1, torch.tensor(1), value)
    with pytest.raises(ValueError, match=f"support .* first is .*{value}"):
        exact.log_prob(x)
    trace = pyro.poutine.trace(lambda: pyro.sample("x", exact, obs=x)).get_trace()
    with pytest.raises(ValueError, match="x must lie in"):
        trace.compute_log_prob()
    with dist.validation_enabled(is_validate=False):
        x[0] = 1.0
        log_prob = energy.closed_form().distribution.log_prob(x)
    assert log_prob[0] == exact.log_prob(x[0])
    assert log_prob[1] == -torch.inf
    assert exact.expand((2,)).log_prob(x[:1]).shape == (2,)


def all_points(energy):
    count = num_points(energy.support, energy.event_shape)
    number = torch.arange(count)
    return finite_points(energy.support, energy.event_shape, number, torch.ones(1))


def chain(**changes):
    settings = {"unary": torch.randn(4, 3), "transition": torch.randn(3, 3), **changes}
    return ChainEnergy(**settings)


STATES = constraints.independent(constraints.integer_interval(0, 2), 1)
SUMS = {
    "chains": lambda: chain() + 0.5 * chain() - 1.0,
    "masked": lambda: chain(mask=torch.arange(4) < 3) + chain(),
    "steps": lambda: chain(transition=torch.randn(3, 3, 3)) + 2.0,
    "lattices": lambda: IsingEnergy((2, 3), 0.3) - IsingEnergy((2, 3), 0.7, 0.2),
    "network": lambda: chain() + FunctionEnergy(nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(-2)
    ), (4,), STATES),
    "machines": lambda: RBMEnergy(torch.randn(5, 2)) + RBMEnergy(torch.randn(5, 3)),
    "learned": lambda: nn.Parameter(torch.tensor(1.5)) * PottsEnergy((2, 2), 3, 0.4),
    "nested": lambda: 2.0 * (nn.Parameter(torch.tensor(0.7)) * spins() + 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_exact(name):
    """Planted faults: the offset left out; the axes of a listed table reversed."""
    energy = SUMS[name]()
    x = all_points(energy)
    terms = -energy(x)
    terms = terms.where(terms > -torch.inf, -torch.inf)
    known = energy.closed_form()
    truth = terms.logsumexp(0)
    torch.testing.assert_close(known.log_partition, truth)
    own = [p for p in energy.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(known.log_partition, own),
        torch.autograd.grad(truth, own),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    exact = known.distribution
    torch.testing.assert_close(exact.log_prob(x), terms - truth)
    draws = exact.sample((10_000,))
    place = (draws.flatten(1)[:, None] == x.flatten(1)).all(-1).long().argmax(-1)
    assert chi_square(place, terms.detach()) < 4
    assert exact.enumerate_support().shape == x.shape
    log_probs = exact.log_prob(x)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum()
    torch.testing.assert_close(exact.entropy(), entropy)


def test_large_sums_are_eliminated_and_refused():
    grids = [IsingEnergy((5, 20), c, periodic=False) for c in (0.2, 0.3)]
    known = (grids[0] + grids[1]).closed_form().log_partition
    whole = IsingEnergy((5, 20), 0.5, periodic=False).closed_form().log_partition
    torch.testing.assert_close(known, whole)
    dense = BoltzmannEnergy(torch.randn(300, 300).triu(1))
    assert (dense + 2.0 * dense).closed_form() is None
    support = constraints.independent(constraints.boolean, 1)
    assert (
        2.0 * FunctionEnergy(lambda x: x.sum(-1), (13,), support)
    ).closed_form() is None


def test_divergences():
    """Planted fault: the mean of an energy with the sign of that of its potentials."""
    p_energy, q_energy = chain(), chain()
    p, q = (e.closed_form().distribution for e in (p_energy, q_energy))
    x = all_points(p_energy)
    log_p, log_q = p.log_prob(x), q.log_prob(x)
    truth = (log_p.exp() * (log_p - log_q)).sum()
    found = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(found, truth)
    own = [*p_energy.parameters(), *q_energy.parameters()]
    for a, b in zip(
        torch.autograd.grad(found, own, retain_graph=True),
        torch.autograd.grad(truth, own, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    sites = IndependentSites(STATES, torch.randn(3, 4))
    truth = (log_p.exp() * (log_p - sites.log_prob(x))).sum()
    torch.testing.assert_close(torch.distributions.kl_divergence(p, sites), truth)
    part = p.condition({1: 2.0})
    rest = all_points(FunctionEnergy(lambda x: x.sum(-1), (3,), STATES))
    log_probs = part.log_prob(rest)
    torch.testing.assert_close(part.entropy(), -(log_probs.exp() * log_probs).sum())
    with pytest.raises(NotImplementedError, match="nothing is observed"):
        torch.distributions.kl_divergence(part, part)
    never = chain(
        unary=q_energy.unary.detach().index_fill(1, torch.tensor([0]), -torch.inf)
    )
    off = never.closed_form().distribution
    assert torch.distributions.kl_divergence(p, off) == torch.inf
    assert torch.distributions.kl_divergence(off, p).isfinite()
    large = RBMEnergy(torch.randn(30, 2)).closed_form().distribution
    with pytest.raises(NotImplementedError, match="mean of log_prob over draws"):
        large.entropy()
