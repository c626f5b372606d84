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
from pyro_ebm.energies.discrete.finite import finite_points

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
