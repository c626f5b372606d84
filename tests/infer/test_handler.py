"""The handler's gradient is that of the exact likelihood, in every corner of Pyro.

The exact gradient comes from autograd through log Z on a fine grid. The chains start
from exact draws, so that what is left is Monte-Carlo error, whose size is known from
the gradients of the chains one by one.
"""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_ebm import EnergyDistribution, EnergyModel
from pyro_ebm.core.errors import UnregisteredParameterWarning
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.infer import Learn, MaximumLikelihood
from pyro_ebm.infer.handler import _SurrogateDistribution
from pyro_ebm.infer.objectives.objective import Objective, Terms
from pyro_ebm.partition import LogPartition
from pyro_ebm.testing import CountingEnergy

ELBOS = {
    "Trace": pyro.infer.Trace_ELBO(),
    "TraceGraph": pyro.infer.TraceGraph_ELBO(),
    "TraceMeanField": pyro.infer.TraceMeanField_ELBO(),
    "TraceEnum": pyro.infer.TraceEnum_ELBO(
        max_plate_nesting=2, strict_enumeration_warning=False
    ),
    "Renyi": pyro.infer.RenyiELBO(alpha=0.5, num_particles=2),
    "Trace-2": pyro.infer.Trace_ELBO(num_particles=2),
    "Trace-vectorised": pyro.infer.Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
    "TraceGraph-vectorised": pyro.infer.TraceGraph_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
    "TraceMeanField-vectorised": pyro.infer.TraceMeanField_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
}
LINE = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)
GRID = torch.cartesian_prod(LINE, LINE)
STEP = 0.05
NUM_CHAINS = 4000
OBJECTIVE = MaximumLikelihood(num_chains=NUM_CHAINS, num_steps=2, restart_fraction=0.0)


class Ring(nn.Module):
    """A tilted ring with four parameters."""

    def __init__(self, radius=1.5):
        super().__init__()
        self.log_stiffness = nn.Parameter(torch.tensor(0.7))
        self.radius = nn.Parameter(torch.tensor(radius))
        self.tilt = nn.Parameter(torch.tensor([0.5, -0.2]))

    def forward(self, x):
        distance = x.norm(dim=-1) - self.radius
        return self.log_stiffness.exp() * distance**2 + (x * self.tilt).sum(-1)


class PyroRing(PyroModule):
    """The same with a constrained PyroParam."""

    def __init__(self):
        super().__init__()
        self.stiffness = PyroParam(torch.tensor(2.0), constraints.positive)
        self.radius = PyroParam(torch.tensor(1.5))
        self.tilt = nn.Parameter(torch.tensor([0.5, -0.2]))

    def forward(self, x):
        distance = x.norm(dim=-1) - self.radius
        return self.stiffness * distance**2 + (x * self.tilt).sum(-1)


class ExactDraws:
    """A sampler for chains that are where they should be: draws from the grid."""

    def start(self, energy, num_draws):
        with torch.no_grad():
            index = (-energy(GRID)).softmax(0).multinomial(num_draws, replacement=True)
            return GRID[index] + STEP * (torch.rand(num_draws, 2) - 0.5)

    __call__ = start


def ring_model(radius=1.5, module=None):
    """Few walkers, as they give no gradient."""
    energy = FunctionEnergy(Ring(radius) if module is None else module, (2,))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    few = LogPartition(energy, base, num_islands=2, num_walkers=8)
    return EnergyModel(energy, base, sampler=ExactDraws(), log_partition=few)


def exact_log_partition(energy):
    return torch.logsumexp(-energy(GRID), 0) + 2 * math.log(STEP)


def assert_gradients(energy_models, exact_loss, run):
    """Compare the gradients that ``run`` leaves with those of the exact loss.

    ``exact_loss`` maps functions ``log_q``, one a model, to the loss.
    """
    for energy_model in energy_models:
        for parameter in energy_model.parameters():
            parameter.grad = None
    run()
    got = [[p.grad.clone() for p in m.energy.parameters()] for m in energy_models]
    log_partitions = [exact_log_partition(m.energy) for m in energy_models]
    loss = exact_loss(
        *[
            lambda x, m=m, z=z: -m.energy(x) - z
            for m, z in zip(energy_models, log_partitions, strict=True)
        ]
    )
    # The weight of the second term of (1.16): how many points the loss counts.
    counts = torch.autograd.grad(loss, log_partitions, retain_graph=True)
    worst = 0.0
    for energy_model, grads, count in zip(energy_models, got, counts, strict=True):
        parameters = list(energy_model.energy.parameters())
        wanted = torch.autograd.grad(loss, parameters, retain_graph=True)
        per_chain = jacobian(energy_model, parameters)
        for grad, exact, each in zip(grads, wanted, per_chain, strict=True):
            error = count * each.std(0) / math.sqrt(NUM_CHAINS)
            assert (error > 0).all()
            worst = max(worst, ((grad - exact) / error).abs().max().item())
    assert worst < 4, f"|z| = {worst}"


def jacobian(energy_model, parameters):
    """Gradients of the energy at each chain, one tensor a parameter."""
    eye = torch.eye(100)
    parts = [
        torch.autograd.grad(
            energy_model.energy(u), parameters, eye, is_grads_batched=True
        )
        for u in energy_model.chains.u.split(len(eye))
    ]
    return [torch.cat(grads) for grads in zip(*parts, strict=True)]


def plate(data, **settings):
    return pyro.plate("data", len(data), dim=-1, **settings)


DATA = torch.randn(40, 3, 2, dtype=torch.float64, generator=torch.manual_seed(1))
MASK = torch.rand(40, 3, generator=torch.manual_seed(2)) < 0.4
ROWS = torch.tensor([3, 7, 8, 20, 31])


def plain(q):
    with plate(DATA):
        pyro.sample("x", q, obs=DATA[:, 0])


def scale_and_mask(q):
    with poutine.scale(scale=0.3), poutine.mask(mask=MASK[:, 0]), plate(DATA):
        pyro.sample("x", q, obs=DATA[:, 0])


def mask_inside(q):
    with plate(DATA):
        pyro.sample("x", q.mask(MASK[:, 0]), obs=DATA[:, 0])


def subsampled(q):
    with plate(DATA, subsample=ROWS) as rows:
        pyro.sample("x", q, obs=DATA[rows, 0])


def to_event(q):
    with plate(DATA):
        pyro.sample("x", q.expand([40, 3]).to_event(1), obs=DATA)


def to_event_mask(q):
    with plate(DATA), poutine.scale(scale=2.5):
        fn = q.expand([3]).mask(MASK[0]).to_event(1).mask(MASK[:, 1])
        pyro.sample("x", fn, obs=DATA)


def two_plates(q):
    with pyro.plate("rows", 40, dim=-2), pyro.plate("columns", 3, dim=-1):
        with poutine.mask(mask=MASK), poutine.scale(scale=0.5):
            pyro.sample("x", q, obs=DATA)


def two_subsampled_plates(q):
    columns = torch.tensor([2, 0])
    with pyro.plate("rows", 40, dim=-2, subsample=ROWS):
        with pyro.plate("columns", 3, dim=-1, subsample=columns):
            pyro.sample("x", q, obs=DATA[ROWS][:, columns])


def two_sites(q):
    with plate(DATA):
        pyro.sample("x", q, obs=DATA[:, 0])
        with poutine.scale(scale=3.0):
            pyro.sample("y", q.mask(MASK[:, 1]), obs=DATA[:, 1])


def conditioned(q):
    def inner():
        with plate(DATA):
            pyro.sample("x", q)

    with poutine.scale(scale=0.2):
        poutine.condition(inner, data={"x": DATA[:, 0]})()


# What the loss is, and the number of points that a fault would count in its place.
SITES = {
    plain: (lambda log_q: log_q(DATA[:, 0]).sum(), 80),
    scale_and_mask: (lambda log_q: 0.3 * log_q(DATA[:, 0])[MASK[:, 0]].sum(), 40),
    mask_inside: (lambda log_q: log_q(DATA[:, 0])[MASK[:, 0]].sum(), 40),
    subsampled: (lambda log_q: 8 * log_q(DATA[ROWS, 0]).sum(), 5),
    to_event: (lambda log_q: log_q(DATA).sum(), 40),
    to_event_mask: (
        lambda log_q: 2.5 * (log_q(DATA) * MASK[0] * MASK[:, 1:2]).sum(),
        120,
    ),
    two_plates: (lambda log_q: 0.5 * (log_q(DATA) * MASK).sum(), 120),
    two_subsampled_plates: (
        lambda log_q: 12 * log_q(DATA[ROWS][:, [2, 0]]).sum(),
        10,
    ),
    two_sites: (
        lambda log_q: log_q(DATA[:, 0]).sum() + 3 * log_q(DATA[:, 1])[MASK[:, 1]].sum(),
        80,
    ),
    conditioned: (lambda log_q: 0.2 * log_q(DATA[:, 0]).sum(), 40),
}
CASES = [(site, "Trace") for site in SITES] + [
    (site, elbo)
    for site in (scale_and_mask, two_subsampled_plates)
    for elbo in ELBOS
    if elbo != "Trace"
]


class Miscounted(Objective):
    """A fault: the second term enters as if it stood outside of scale and mask."""

    def __init__(self, factor):
        self.factor = factor

    make_state = OBJECTIVE.make_state

    def surrogate(self, distribution, state):
        right = OBJECTIVE.surrogate(distribution, state)
        second = (self.factor - 1) * distribution.energy(state.u).mean()

        def surrogate(x):
            objective, energy = right(x)
            return Terms(objective + second - second.detach(), energy)

        return surrogate


@pytest.mark.parametrize(("site", "elbo"), CASES)
def test_gradient(site, elbo):
    """The second term counted once a point of the batch, whatever scale and mask: seen
    to fail, as asserted at the end."""
    energy_model = ring_model()

    def model():
        pyro.module("ring", energy_model)
        site(energy_model())

    def run(objective=OBJECTIVE):
        ELBOS[elbo].loss_and_grads(Learn(model, objective), lambda: None)

    log_likelihood, wrong_count = SITES[site]
    assert_gradients([energy_model], lambda log_q: -log_likelihood(log_q), run)
    if elbo != "Trace":
        return
    count = log_likelihood(lambda x: torch.ones(x.shape[:-1]))
    planted = Miscounted(wrong_count / count)
    with pytest.raises(AssertionError, match=r"\|z\| ="):
        assert_gradients(
            [energy_model], lambda log_q: -log_likelihood(log_q), lambda: run(planted)
        )


ONE_RUN = [case for case in CASES if case[1] not in ("Trace-2", "Renyi")]


@pytest.mark.parametrize(("site", "elbo"), ONE_RUN)
def test_without_a_handler_the_gradient_is_the_same(site, elbo):
    """To rounding. Fault: log Z without its gradient."""
    found = []
    for wrap in (lambda m: Learn(m, MaximumLikelihood()), lambda m: m):
        torch.manual_seed(0)
        energy_model = ring_model()

        def model(energy_model=energy_model):
            pyro.module("ring", energy_model)
            site(energy_model())

        ELBOS[elbo].loss_and_grads(wrap(model), lambda: None)
        found.append(torch.cat([p.grad.flatten() for p in energy_model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert found[0].abs().min() > 0


def test_particles_share_the_chains_of_a_step():
    """Two backward passes at the same parameters move the chains once."""
    energy_model = ring_model()

    def model():
        pyro.module("ring", energy_model)
        plain(energy_model())

    ELBOS["Trace-2"].loss_and_grads(model, lambda: None)
    u = energy_model.chains.u.clone()
    grads = [p.grad.clone() for p in energy_model.parameters()]
    ELBOS["Trace"].loss_and_grads(model, lambda: None)
    assert torch.equal(energy_model.chains.u, u)
    for parameter, grad in zip(energy_model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)
    with torch.no_grad():
        next(energy_model.parameters()).add_(0.1)
    ELBOS["Trace"].loss_and_grads(model, lambda: None)
    assert not torch.equal(energy_model.chains.u, u)


def test_plain_svi_learns_and_tracks_log_partition():
    """Fault: energies that are pushed down for ever."""
    base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    energy_model = EnergyModel(QuadraticEnergy(torch.zeros(2), torch.eye(2)), base)
    energy_model.energy.closed_form = lambda: None  # as if it were not known
    data = torch.tensor([1.0, -1.0]) + 0.7 * torch.randn(500, 2)

    def model():
        pyro.module("quadratic", energy_model)
        with pyro.plate("data", len(data), subsample_size=100) as rows:
            pyro.sample("x", energy_model(), obs=data[rows])

    optim = pyro.optim.Adam({"lr": 0.02})
    svi = pyro.infer.SVI(model, lambda: None, optim, pyro.infer.Trace_ELBO())
    for _ in range(400):
        svi.step()
    assert (energy_model.energy.loc - data.mean(0)).abs().max() < 0.15
    assert energy_model.log_partition.status.is_reliable


def test_in_eval_and_where_nothing_is_asked_for_nothing_moves():
    energy_model = ring_model()
    x = torch.zeros(3, 2)
    with torch.no_grad():
        energy_model().log_prob(x)
    assert energy_model.log_partition.status == "unreliable"
    energy_model().log_prob(x)  # evaluated, not differentiated: the first log Z
    spent = energy_model.log_partition.num_evaluations
    (grad,) = torch.autograd.grad(
        energy_model().log_prob(y := x.clone().requires_grad_()).sum(), y
    )
    assert grad.shape == (3, 2)
    energy_model.eval()
    energy_model().log_prob(x).sum().backward()
    assert not energy_model.chains.is_started
    assert energy_model.log_partition.num_evaluations == spent


@pytest.mark.parametrize("source", ["chains", "importance"])
@pytest.mark.parametrize("learns", ["by its gradient", "by an objective"])
def test_the_first_loss_has_a_log_partition(source, learns):
    """It is not a number of another size. Fault: log Z of 0 before the first step."""
    pyro.set_rng_seed(0)
    base = dist.Normal(torch.zeros(2), 2.5).to_event(1)
    energy_model = EnergyModel(FunctionEnergy(Ring(), (2,)), base, source=source)
    data = torch.randn(50, 2)

    def model():
        pyro.module("energy_model", energy_model)
        with pyro.plate("data", 50):
            pyro.sample("x", energy_model(), obs=data)

    program = model if learns == "by its gradient" else Learn(model, OBJECTIVE)
    optim = pyro.optim.Adam({"lr": 1e-4})
    svi = SVI(program, lambda: None, optim, loss=Trace_ELBO())
    first, second = svi.step(), svi.step()
    assert abs(energy_model.log_partition.value) > 0.5
    assert abs(first - second) / 50 < 0.05


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_log_partition_that_is_no_number_is_none(value):
    """Fault: minus infinity was taken for the largest negative number."""
    energy_model, x = ring_model().eval(), torch.zeros(3, 2)
    energy_model.log_partition.value.fill_(value)
    distribution = energy_model()
    put = _SurrogateDistribution.of(distribution, lambda x: (x.sum(-1), x.sum(-1)))
    assert put.log_prob(x).equal(x.sum(-1))


def test_weighted_draws_give_the_gradient_too():
    """Where the base is near, as the chains do. Fault: the sign of (1)."""
    base = dist.Normal(torch.zeros(2), 2.5).to_event(1)
    energy_model = EnergyModel(FunctionEnergy(Ring(), (2,)), base, source="importance")

    def model():
        pyro.module("ring", energy_model)
        plain(energy_model())

    grads = []
    for _ in range(40):
        for parameter in energy_model.parameters():
            parameter.grad = None
        energy_model._known = []  # as if the parameters had moved
        ELBOS["Trace"].loss_and_grads(model, lambda: None)
        grads.append(torch.cat([p.grad.flatten() for p in energy_model.parameters()]))
    assert not energy_model.chains.is_started
    mean, error = torch.stack(grads).mean(0), torch.stack(grads).std(0) / 40**0.5
    parameters = list(energy_model.parameters())
    exact = energy_model.energy(DATA[:, 0]).sum() + 40 * exact_log_partition(
        energy_model.energy
    )
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(exact, parameters)])
    assert ((mean - wanted).abs() < 5 * error + 0.3).all()


@pytest.mark.parametrize("elbo", ["Trace", "TraceMeanField-vectorised"])
def test_gradient_of_two_energies(elbo):
    first, second = ring_model(), ring_model(radius=1.0)

    def model():
        pyro.module("first", first)
        pyro.module("second", second)
        scale_and_mask(first())
        with pyro.plate("more", 40):
            pyro.sample("y", second(), obs=DATA[:, 1])

    assert_gradients(
        [first, second],
        lambda a, b: -0.3 * a(DATA[:, 0])[MASK[:, 0]].sum() - b(DATA[:, 1]).sum(),
        lambda: ELBOS[elbo].loss_and_grads(Learn(model, OBJECTIVE), lambda: None),
    )


@pytest.mark.parametrize(
    "elbo", ["Trace", "TraceGraph", "TraceMeanField", "Trace-vectorised"]
)
def test_gradient_of_a_prior_over_a_latent_site(elbo):
    """Given what the guide drew; and the guide's own gradient, that has no second
    term."""
    prior, seen = ring_model(), []
    elbo = ELBOS[elbo]
    num_particles = elbo.num_particles

    def model():
        pyro.module("prior", prior)
        with pyro.plate("data", 40, dim=-1):
            z = pyro.sample("z", prior())
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=DATA[:, 0])

    def guide():
        loc = pyro.param("loc", 0.5 * DATA[:, 1])
        with pyro.plate("data", 40, dim=-1):
            seen.append(pyro.sample("z", dist.Normal(loc, 0.3).to_event(1)))

    def run():
        seen.clear()
        pyro.clear_param_store()
        elbo.loss_and_grads(Learn(model, OBJECTIVE), guide)

    def exact(log_q):
        z = seen[-1].detach().reshape(num_particles, 40, 2)
        return -log_q(z).sum() / num_particles

    assert_gradients([prior], exact, run)
    loc = pyro.param("loc")
    z = seen[-1].detach().reshape(num_particles, 40, 2).requires_grad_()
    likelihood = dist.Normal(z, 0.5).to_event(1).log_prob(DATA[:, 0]).sum()
    (score,) = torch.autograd.grad(prior.energy(z).sum() - likelihood, z)
    torch.testing.assert_close(loc.grad, score.mean(0))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("elbo", ["Trace", "TraceGraph", "TraceMeanField"])
def test_gradient_of_a_pyro_module_with_pyro_params(local, elbo):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.ring = ring_model(module=PyroRing())

        def forward(self):
            scale_and_mask(self.ring())

    with pyro.settings.context(module_local_params=local):
        model = Model()
        assert_gradients(
            [model.ring],
            lambda log_q: -SITES[scale_and_mask][0](log_q),
            lambda: ELBOS[elbo].loss_and_grads(Learn(model, OBJECTIVE), lambda: None),
        )
        names = [*pyro.get_param_store().keys()]
        assert bool(names) != local


def test_elbo_module_trains_local_parameters():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.ring = ring_model(module=PyroRing())

        def forward(self):
            plain(self.ring())

    with pyro.settings.context(module_local_params=True):
        model = Model()
        loss = Trace_ELBO()(Learn(model, OBJECTIVE), lambda: None)
        loss()
        assert {id(p) for p in model.parameters()} <= {id(p) for p in loss.parameters()}
        assert_gradients(
            [model.ring],
            lambda log_q: -SITES[plain][0](log_q),
            lambda: loss().backward(),
        )


# What it does besides ----------------------------------------------------------------


def counted_model():
    energy = CountingEnergy(FunctionEnergy(Ring(), (2,)))
    energy_model = EnergyModel(energy, dist.Normal(torch.zeros(2), 2.0).to_event(1))

    def model():
        pyro.module("ring", energy_model)
        two_sites(energy_model())

    return energy_model, model


def test_values_are_those_of_log_prob():
    energy_model, model = counted_model()
    learned = Learn(model, MaximumLikelihood(num_chains=8, num_steps=1))
    learned()
    for _ in range(2):
        traces = [poutine.trace(m).get_trace() for m in (learned, model)]
        sums = [trace.log_prob_sum().item() for trace in traces]
    # log Z of the first trace is read before the walkers have moved in the second.
    torch.testing.assert_close(*sums)


def test_an_energy_at_two_sites_is_worked_on_once():
    energy_model, model = counted_model()
    learned = Learn(
        model, MaximumLikelihood(num_chains=8, num_steps=5, restart_fraction=0.0)
    )
    learned()
    energy_model.energy.reset()
    poutine.trace(learned).get_trace().compute_log_prob()
    # 5 moves and the start of the chains; the second term; the data at both sites.
    assert energy_model.energy.num_gradients == 8 * 6
    assert energy_model.energy.num_values == 8 + 80


def test_under_no_grad_nothing_moves():
    energy_model, model = counted_model()
    learned = Learn(model, MaximumLikelihood(num_chains=8, num_steps=1))
    svi = SVI(learned, lambda: None, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step()
    before = {k: v.clone() for k, v in energy_model.state_dict().items()}
    state = torch.get_rng_state()
    loss = svi.evaluate_loss()
    bare = SVI(model, lambda: None, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss()
    assert loss == bare
    after = energy_model.state_dict()
    assert before.keys() == after.keys()
    # Without gradients log Z is read anew at the current parameters; nothing else is.
    read = ("value", "std_error", "walkers.num_evaluations")
    for name in before:
        if name not in [f"log_partition.{part}" for part in read]:
            assert torch.equal(before[name], after[name]), name
    assert torch.equal(state, torch.get_rng_state())


def test_training_moves_chains_parameters_and_log_partition():
    energy_model, model = counted_model()
    learned = Learn(model, MaximumLikelihood(num_chains=8, num_steps=1))
    svi = SVI(learned, lambda: None, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step()
    before = {k: v.clone() for k, v in energy_model.state_dict().items()}
    for _ in range(10):
        svi.step()
    after = energy_model.state_dict()
    for name in ("chains.u", "log_partition.walkers.u", "log_partition.value"):
        assert not torch.equal(before[name], after[name]), name
    assert not torch.equal(before["energy.fn.radius"], after["energy.fn.radius"])


def test_predictive_on_the_handler_draws():
    """Predictive runs under no_grad: the handler steps aside."""
    energy_model = ring_model()

    def model():
        pyro.module("ring", energy_model)
        with pyro.plate("data", 5):
            pyro.sample("x", energy_model())

    learned = Learn(model, MaximumLikelihood(num_chains=8))
    draws = Predictive(learned, num_samples=3, parallel=True)()["x"]
    assert draws.shape[-2:] == (5, 2)
    assert not energy_model.chains.is_started


def test_chains_of_a_bare_distribution_are_kept_by_site():
    ring = Ring()

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = ring

        def forward(self):
            energy = FunctionEnergy(self.net, (2,))  # a new one at each call
            plain(EnergyDistribution(energy, sampler=ExactDraws()))

    learned = Learn(Model(), MaximumLikelihood(num_chains=64, num_steps=3))
    Trace_ELBO().loss_and_grads(learned, lambda: None)
    first = learned.chains["x"].u.clone()
    Trace_ELBO().loss_and_grads(learned, lambda: None)
    assert first.shape == (64, 2)
    assert not torch.equal(first, learned.chains["x"].u)
    fresh = Learn(Model(), MaximumLikelihood(num_chains=64))
    fresh.load_state_dict(learned.state_dict())
    assert torch.equal(fresh.chains["x"].u, learned.chains["x"].u)


def test_a_site_name_with_dots():
    energy_model = EnergyDistribution(QuadraticEnergy(torch.zeros(2)))

    def model():
        pyro.sample("a.b", energy_model, obs=torch.zeros(2))

    learned = Learn(model, MaximumLikelihood(num_chains=8))
    with pytest.warns(UnregisteredParameterWarning):
        Trace_ELBO().loss_and_grads(learned, lambda: None)
    fresh = Learn(model, MaximumLikelihood(num_chains=8))
    fresh.load_state_dict(learned.state_dict())
    assert [*fresh.chains] == ["a/b"]


# Warnings and refusals ---------------------------------------------------------------


def run_once(model):
    Trace_ELBO().loss_and_grads(
        Learn(model, MaximumLikelihood(num_chains=8)), lambda: None
    )


def test_an_unregistered_module_warns_once_and_by_name():
    energy_model = ring_model()
    learned = Learn(lambda: plain(energy_model()), MaximumLikelihood(num_chains=8))
    message = r"site 'x'.*fn\.tilt, fn\.radius.*pyro\.module\(name"
    with pytest.warns(UnregisteredParameterWarning, match=message):
        Trace_ELBO().loss_and_grads(learned, lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trace_ELBO().loss_and_grads(learned, lambda: None)


def test_a_module_in_a_closure_warns():
    hidden = Ring()

    def model():
        plain(EnergyDistribution(FunctionEnergy(lambda x: hidden(x), (2,))))

    with pytest.warns(
        UnregisteredParameterWarning, match=r"a tensor of shape \(2,\) in a closure"
    ):
        run_once(model)


def test_a_module_in_a_closure_that_is_registered_does_not_warn():
    hidden = Ring()

    def model():
        pyro.module("hidden", hidden)
        plain(EnergyDistribution(FunctionEnergy(lambda x: hidden(x), (2,))))

    run_once(model)
    assert hidden.radius.grad != 0


def test_an_energy_without_parameters_does_not_warn():
    run_once(
        lambda: plain(
            EnergyDistribution(FunctionEnergy(lambda x: x.square().sum(-1), (2,)))
        )
    )


@pytest.mark.parametrize("latent_guide", ["normal", "delta"])
def test_an_energy_that_depends_on_a_latent_is_refused(latent_guide):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        energy = FunctionEnergy(lambda x: (x - z).square().sum(-1), (2,))
        plain(EnergyDistribution(energy))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        fn = dist.Delta(loc) if latent_guide == "delta" else dist.Normal(loc, 1.0)
        pyro.sample("z", fn)

    learned = Learn(model, MaximumLikelihood(num_chains=8))
    with pytest.raises(
        NotImplementedError, match=r"site 'x' depends on a latent.*pair"
    ):
        Trace_ELBO().loss_and_grads(learned, guide)


def test_a_free_log_partition_is_refused():
    free = nn.Parameter(torch.tensor(0.0))
    ring = ring_model()

    def model():
        pyro.module("ring", ring)
        pyro.param("free", free)
        plain(EnergyDistribution(ring.energy, free, sampler=ExactDraws()))

    with pytest.raises(ValueError, match="log_partition is a free parameter"):
        run_once(model)


def test_a_transformed_energy_is_refused():
    ring = ring_model()

    def model():
        pyro.module("ring", ring)
        double = dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
        fn = dist.TransformedDistribution(ring(), [double])
        pyro.sample("x", fn, obs=torch.zeros(2))

    with pytest.raises(NotImplementedError, match="inside TransformedDistribution"):
        run_once(model)


def test_an_energy_in_a_mixture_of_pyro_is_refused():
    """Its log Z had no gradient there, and the loss fell without end."""
    ring = ring_model()
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model():
        pyro.module("ring", ring)
        fn = dist.MaskedMixture(torch.tensor(False), ring(), normal)
        pyro.sample("x", fn, obs=torch.zeros(2))

    with pytest.raises(NotImplementedError, match=r"inside MaskedMixture.*Experts"):
        run_once(model)


@pytest.mark.parametrize("wrap", [lambda m: Learn(m, MaximumLikelihood()), lambda m: m])
def test_the_jit_is_refused(wrap):
    """It froze the chains and the average at the first step."""
    ring = ring_model()

    def model(data):
        pyro.module("ring", ring)
        with pyro.plate("data", len(data)):
            pyro.sample("x", ring(), obs=data)

    loss = pyro.infer.JitTrace_ELBO(ignore_jit_warnings=True)
    optim = pyro.optim.Adam({"lr": 1e-2})
    svi = SVI(wrap(model), lambda data: None, optim, loss)
    with pytest.raises(NotImplementedError, match="ELBO without Jit in its name"):
        svi.step(torch.randn(5, 2))


def test_other_wrapped_distributions_are_left_alone():
    ring = ring_model()

    def model():
        pyro.module("ring", ring)
        plain(ring())
        with pyro.plate("more", 3):
            fn = dist.LogNormal(torch.zeros(2), 1.0).to_event(1).mask(MASK[0])
            pyro.sample("y", fn, obs=torch.ones(3, 2))

    run_once(model)


def test_data_are_checked_there_too():
    ring = ring_model()

    def model(data):
        pyro.module("ring", ring)
        with plate(data):
            pyro.sample("x", ring(), obs=data)

    learned = Learn(model, MaximumLikelihood(num_chains=8))
    for wrong, message in [
        (torch.zeros(4, 1), r"x must have shape \(\*batch, 2\)"),
        (torch.full((4, 2), math.nan), "x must not contain nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            Trace_ELBO().loss_and_grads(learned, lambda data: None, wrong)


def test_model_must_be_callable():
    with pytest.raises(TypeError, match="program must be callable, got int"):
        Learn(3, MaximumLikelihood())


def test_maximum_likelihood_settings():
    for settings, error, message in [
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1, got 0"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        (
            {"restart_fraction": 1.0},
            ValueError,
            r"restart_fraction must be in \[0, 1\)",
        ),
        (
            {"kernel": "mala"},
            TypeError,
            r"kernel must be a pyro_ebm.mcmc.Kernel, got str",
        ),
        ({"chains": 3}, TypeError, "chains"),
    ]:
        with pytest.raises(error, match=message):
            Learn(lambda: None, MaximumLikelihood(**settings))
