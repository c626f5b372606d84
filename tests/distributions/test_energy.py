"""EnergyDistribution: a pure log_prob, vectorised draws, and what it refuses."""

import copy
import io
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    Importance,
    SMCFilter,
    Trace_ELBO,
    TraceEnum_ELBO,
    WeighedPredictive,
)
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_ebm import EnergyDistribution
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.distributions import energy as energy_module
from pyro_ebm.energies import (
    DistributionEnergy,
    Energy,
    FunctionEnergy,
    MixtureEnergy,
    PyroModelEnergy,
    QuadraticEnergy,
)
from pyro_ebm.mcmc import HMC, IndependentChains
from pyro_ebm.partition import quadrature
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.testing import CountingEnergy, assert_moments, targets

SHORT = IndependentChains(kernel=HMC(0.5), warmup_steps=5, num_steps=5)


def ring(x):
    """A named function, so that it pickles."""
    return 3 * (x.norm(dim=-1) - 1) ** 2


def ring_distribution(**settings):
    return EnergyDistribution(FunctionEnergy(ring, (2,)), sampler=SHORT, **settings)


def test_log_prob_is_minus_energy_minus_log_partition():
    energy, x = FunctionEnergy(ring, (2,)), torch.randn(7, 2)
    q = EnergyDistribution(energy, log_partition=1.5)
    torch.testing.assert_close(q.log_prob(x), -energy(x) - 1.5)
    torch.testing.assert_close(q.unnormalized_log_prob(x), -energy(x))
    assert q.is_normalized
    assert "log Z: 1.5" in repr(q)


def test_log_prob_integrates_to_one():
    energy = FunctionEnergy(ring, (2,))
    q = EnergyDistribution(energy, log_partition=quadrature(energy))
    line = torch.linspace(-6, 6, 401)
    log_prob = q.log_prob(torch.cartesian_prod(line, line))
    total = log_prob.logsumexp(0) + 2 * math.log(12 / 400)
    assert abs(total) < 1e-5
    assert q.is_normalized


def test_unknown_log_partition_counts_as_zero_and_says_so():
    q, x = ring_distribution(), torch.randn(7, 2)
    assert not q.is_normalized
    assert q.log_partition == 0
    assert "unknown" in repr(q)
    torch.testing.assert_close(q.log_prob(x), -ring(x))


def test_a_closed_form_is_the_log_partition_with_its_gradient():
    energy = QuadraticEnergy(torch.zeros(2))
    q, x = EnergyDistribution(energy), torch.randn(5, 2)
    assert q.is_normalized
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    torch.testing.assert_close(q.log_prob(x), normal.log_prob(x))
    log_scale = torch.zeros(2, requires_grad=True)
    normal = dist.Normal(torch.zeros(2), log_scale.exp()).to_event(1)
    wanted = torch.autograd.grad(normal.log_prob(x).sum(), log_scale)
    q.log_prob(x).sum().backward()
    # Its diagonal is that of the precision's Cholesky factor.
    torch.testing.assert_close(-energy.log_diagonal.grad, *wanted)


def test_log_prob_is_pure():
    """No draw, no state: the same value each time, and the stream is not moved."""
    energy = CountingEnergy(FunctionEnergy(ring, (2,)))
    q, x = EnergyDistribution(energy), torch.randn(7, 2)
    before, state = torch.get_rng_state(), copy.deepcopy(vars(q))
    first = q.log_prob(x)
    assert torch.equal(first, q.log_prob(x))
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(q).keys() == state.keys()
    assert energy.num_values == 14
    assert energy.num_gradients == 0


def test_gradient_of_log_prob_is_the_score():
    q, x = ring_distribution(), torch.randn(7, 2, requires_grad=True)
    (score,) = torch.autograd.grad(q.log_prob(x).sum(), x)
    torch.testing.assert_close(score, -q.energy.value_and_grad(x)[1])


@pytest.mark.parametrize("sample_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("batch_shape", [(), (4,), (5, 4)])
@pytest.mark.parametrize("closed", [True, False])
def test_shapes(sample_shape, batch_shape, closed):
    energy = QuadraticEnergy(torch.zeros(2)) if closed else FunctionEnergy(ring, (2,))
    q = EnergyDistribution(energy, sampler=None if closed else SHORT)
    q = q.expand(batch_shape)
    assert q.batch_shape == batch_shape
    assert q.event_shape == (2,)
    x = q.sample(sample_shape)
    assert x.shape == (*sample_shape, *batch_shape, 2)
    assert len(x.reshape(-1, 2).unique(dim=0)) == x.numel() / 2
    assert q.log_prob(x).shape == (*sample_shape, *batch_shape)
    assert q.log_prob(torch.zeros(2)).shape == batch_shape
    event = q.to_event()
    assert event.event_shape == (*batch_shape, 2)
    assert event.log_prob(x).shape == sample_shape
    wide = event.expand([6])
    assert wide.log_prob(wide.sample(sample_shape)).shape == (*sample_shape, 6)
    assert q.mask(torch.tensor(False)).log_prob(x).eq(0).all()
    assert q.expand([3, *batch_shape]).expand([2, 3, *batch_shape]).batch_shape == (
        2,
        3,
        *batch_shape,
    )


def test_scalar_and_matrix_events():
    for shape, fn in [
        ((), lambda x: x.square()),
        ((2, 3), lambda x: x.square().sum((-2, -1))),
    ]:
        q = EnergyDistribution(FunctionEnergy(fn, shape), sampler=SHORT)
        assert q.sample((5,)).shape == (5, *shape)
        assert q.log_prob(q.sample((5,))).shape == (5,)


def test_plates_expand_it():
    def model():
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            return pyro.sample("x", ring_distribution())

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (3, 4, 2)
    assert trace.nodes["x"]["log_prob"].shape == (3, 4)


def test_mask_true_is_the_distribution_and_a_mask_silences():
    q, x = ring_distribution(), torch.randn(3, 2)
    assert q.mask(True) is q
    mask = torch.tensor([True, False, True])
    assert q.mask(mask).log_prob(x).eq(0).tolist() == [False, True, False]


def test_support_has_the_events_dimensions():
    assert ring_distribution().support.event_dim == 1
    scalar = EnergyDistribution(targets.gamma().energy)
    assert scalar.support.event_dim == 0
    assert EnergyDistribution(FunctionEnergy(ring, (2,))).support.event_dim == 1


# Drawing -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [targets.trap(2, 1.0, 0.5), targets.gamma()])
def test_draws_have_both_moments(target):
    """Seen to fail with ``sample`` returning the starts of the chains (their base)."""
    q = EnergyDistribution(target.energy, sampler=IndependentChains(base=target.base))
    assert_moments(q.sample((2000,)), target.mean, target.variance)
    starts = q._sampler.start(target.energy, 2000)
    with pytest.raises(AssertionError):  # planted
        assert_moments(starts, target.mean, target.variance)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_draws_under_no_grad_and_inference_mode(mode):
    torch.manual_seed(3)
    expected = ring_distribution().sample((5,))
    torch.manual_seed(3)
    with mode():
        x = ring_distribution().sample((5,))
    assert torch.equal(x, expected)
    assert not x.requires_grad


def test_closed_form_is_sampled_exactly_and_without_evaluations():
    energy = CountingEnergy(
        MixtureEnergy(
            [QuadraticEnergy(torch.tensor([m]), torch.eye(1) * 4) for m in (-3.0, 3.0)],
            torch.tensor([0.0, math.log(3)]),
        )
    )
    x = EnergyDistribution(energy).sample((4000,))
    # Weights 1/4 and 3/4, each of variance 1/4.
    assert_moments(x, 1.5, 0.25 + 9 * 0.75)
    assert energy.num_gradients + energy.num_values == 0


def test_draws_are_independent_and_reproducible():
    pyro.set_rng_seed(5)
    first = ring_distribution().sample((2, 50))
    pyro.set_rng_seed(5)
    assert torch.equal(ring_distribution().sample((2, 50)), first)
    assert not torch.equal(first[0], first[1])


def test_within_initialisation_a_draw_costs_no_evaluation():
    energy = CountingEnergy(FunctionEnergy(ring, (2,)))

    def model():
        return pyro.sample("x", EnergyDistribution(energy))

    InitMessenger(init_to_sample)(model)()
    assert energy.num_gradients + energy.num_values == 0
    model()
    assert energy.num_gradients > 32 * 200  # a whole run of chains outside of it


# Refusals and bad input --------------------------------------------------------------


def test_energy_must_be_an_energy():
    with pytest.raises(
        TypeError, match=r"energy must be an Energy, got function.*Func"
    ):
        EnergyDistribution(ring)


@pytest.mark.parametrize("shape", [(), (5, 1), (5, 3), (2, 1)])
def test_wrong_event_shape(shape):
    """A size of 1 was broadcast along the event without a word."""
    with pytest.raises(
        ValueError, match=r"x must have shape \(\*batch, 2\).*got .*Reshape"
    ):
        ring_distribution().log_prob(torch.zeros(shape))


def test_wrong_batch_shape():
    message = r"batch_shape \(4,\) and event_shape \(2,\), got \(5, 2\).*plates"
    with pytest.raises(ValueError, match=message):
        ring_distribution().expand([4]).log_prob(torch.zeros(5, 2))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.square().sum(-1, keepdim=True),
        lambda x: x.square().sum(),
        lambda x: x.square().sum(-1).long(),
    ],
)
def test_energy_of_wrong_shape_or_dtype(fn):
    q = EnergyDistribution(FunctionEnergy(fn, (2,)))
    with pytest.raises(
        ValueError, match=r"one floating-point energy a point, shape \(5"
    ):
        q.log_prob(torch.zeros(5, 2))


def test_nan_data():
    x = torch.zeros(5, 2)
    x[3, 1] = math.nan
    with pytest.raises(
        ValueError, match=r"x must not contain nan, got 1 nan in 10.*Drop"
    ):
        ring_distribution().log_prob(x)
    assert ring_distribution(validate_args=False).log_prob(x).isnan().sum() == 1


def test_data_outside_the_support():
    q = EnergyDistribution(targets.gamma().energy)
    message = r"x must lie in the support .*1 of 3 points do not, the first is.*-2"
    with pytest.raises(ValueError, match=message):
        q.log_prob(torch.tensor([1.0, -2.0, 3.0]))


def test_log_partition_must_be_one_number():
    for wrong, error, message in [
        (
            torch.zeros(2),
            ValueError,
            r"log_partition must be one number, got shape \(2",
        ),
        (math.nan, ValueError, "log_partition must be a number, got nan"),
        ("auto", TypeError, "str"),
    ]:
        with pytest.raises(error, match=message):
            EnergyDistribution(FunctionEnergy(ring, (2,)), wrong)
    one = EnergyDistribution(FunctionEnergy(ring, (2,)), torch.tensor([2.0]))
    assert one.log_prob(torch.zeros(3, 2)).shape == (3,)


def test_estimates_bring_their_verdict():
    nan = math.nan
    energy = FunctionEnergy(ring, (2,))
    why = (Finding(Reason.NOT_MIXED, "why"),)
    bad = LogPartitionEstimate(1.0, 0.5, 0.0, 2.0, nan, Status.UNRELIABLE, "x", 1, why)
    with pytest.warns(UnreliableWarning, match="why"):
        q = EnergyDistribution(energy, bad)
    assert not q.is_normalized
    assert q.log_partition_std_error == 0.5
    none = bad._replace(status="not_normalizable", value=math.inf)
    with pytest.raises(ValueError, match="no partition function: why"):
        EnergyDistribution(energy, none)


def test_free_log_partition_is_refused():
    free = nn.Parameter(torch.tensor(0.0))
    q, x = ring_distribution(log_partition=free), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"log_partition is a free parameter.*detach"):
        q.log_prob(x)
    with torch.no_grad():
        assert q.log_prob(x).shape == (3,)
    # A function of parameters, such as a closed form, is not free.
    assert ring_distribution(log_partition=2 * free).log_prob(x).requires_grad


class Hidden(Energy):
    """An energy with a parameter of its own, and a variable that it closes over."""

    def __init__(self, z):
        super().__init__((2,))
        self.scale, self.z = nn.Parameter(torch.tensor(1.0)), z

    def forward(self, x):
        return self.scale * (x - self.z).square().sum(-1)


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("own_parameters", [True, False])
def test_nuts_over_what_the_energy_depends_on_is_refused(observed, own_parameters):
    """Seen to pass unrefused, with a wrong posterior, where the energy had parameters
    or its own site was latent too."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        energy = FunctionEnergy(lambda x: (x - z).square().sum(-1), (2,))
        energy = Hidden(z) if own_parameters else energy
        obs = torch.zeros(2) if observed else None
        pyro.sample("x", EnergyDistribution(energy), obs=obs)

    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), 2, 2, disable_progbar=True)
    with pytest.raises(NotImplementedError, match=r"doubly intractable.*amortised"):
        mcmc.run()


def test_a_log_partition_that_is_a_function_of_the_latent_is_welcome():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        log_scale = z / 2
        energy = FunctionEnergy(lambda x: (x / log_scale.exp()) ** 2 / 2, ())
        log_partition = math.log(2 * math.pi) / 2 + log_scale
        pyro.sample(
            "x", EnergyDistribution(energy, log_partition), obs=torch.tensor(1.0)
        )

    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), 2, 2, disable_progbar=True)
    mcmc.run()


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x).squeeze(-1).square() + x.square().sum(-1)


@pytest.mark.parametrize(
    "energy",
    [
        lambda: QuadraticEnergy(torch.zeros(2)),
        lambda: FunctionEnergy(Bowl(), (2,)),
        lambda: FunctionEnergy(ring, (2,)) + nn.Parameter(torch.tensor(1.0)),
    ],
)
def test_nuts_with_parameters_of_its_own_that_stay_fixed(energy):
    energy = energy()

    def model():
        pyro.sample("x", EnergyDistribution(energy))

    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), 2, 2, disable_progbar=True)
    mcmc.run()


def test_a_module_hidden_in_a_closure_is_named():
    hidden = Bowl()
    q = EnergyDistribution(FunctionEnergy(lambda x: hidden(x), (2,)))
    with pytest.raises(NotImplementedError, match="hand the module to FunctionEnergy"):
        q.log_prob(torch.zeros(2))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda q: q,
        lambda q: q.mask(True),
        lambda q: q.mask(torch.tensor(True)),
        lambda q: q.to_event(0),
        lambda q: q.expand([1]).to_event(1),
    ],
)
@pytest.mark.parametrize(
    "loss",
    [
        pyro.infer.Trace_ELBO,
        pyro.infer.TraceGraph_ELBO,
        pyro.infer.TraceMeanField_ELBO,
        pyro.infer.TraceEnum_ELBO,
        pyro.infer.RenyiELBO,
    ],
)
def test_a_guide_with_unknown_log_partition_is_refused(wrap, loss):
    """``.mask(True)`` and ``.to_event`` once went round it, to a wrong ELBO."""
    shape = wrap(ring_distribution()).event_shape

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))

    def guide():
        pyro.sample("x", wrap(ring_distribution()))

    with pytest.raises(
        NotImplementedError, match=r"stands in a guide.*normalised guide"
    ):
        loss().loss_and_grads(model, guide)


def test_a_guide_with_a_closed_form_is_exact():
    energy = QuadraticEnergy(torch.tensor([0.0]))
    known = energy.closed_form().log_partition

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def loss(log_partition):
        def guide():
            pyro.sample("x", EnergyDistribution(energy, log_partition))

        return pyro.infer.Trace_ELBO().differentiable_loss(model, guide)

    for right in (known, None):
        assert abs(loss(right)) < 1e-12
    for wrong in (0.5, known.detach()):
        with pytest.raises(NotImplementedError, match=r"the closed form is 0\.918939"):
            loss(wrong)


def test_pyro_samples_are_refused():
    class Prior(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x):
            return self.w * x.square().sum(-1)

    with pytest.raises(
        NotImplementedError, match=r"\['w'\] of .*PyroSample.*PyroParam"
    ):
        EnergyDistribution(FunctionEnergy(Prior(), (2,)))


def test_latent_sites_of_a_module_are_coordinates_and_no_parameters():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self):
            pyro.sample("y", dist.Normal(self.w, 1.0), obs=torch.tensor(1.0))

    energy = PyroModelEnergy(Regression())

    def model():
        return pyro.sample("w", EnergyDistribution(energy))

    trace = poutine.trace(model).get_trace()
    assert trace.stochastic_nodes == ["w"]
    torch.testing.assert_close(trace.log_prob_sum(), -energy(trace.nodes["w"]["value"]))


def test_parameters_are_in_the_trace_of_the_model(monkeypatch):
    """Pyro calls log_prob after the model has returned: a PyroParam first read there
    is in no trace, and Trace_ELBO never trains it. Seen with no binding."""

    class Scaled(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroParam(torch.tensor(1.0), constraints.positive)

        def forward(self, x):
            return self.w * x.square().sum(-1)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scaled = Scaled()

        def forward(self):
            energy = FunctionEnergy(self.scaled, (2,))
            pyro.sample("x", EnergyDistribution(energy), obs=torch.zeros(2))

    trace = poutine.trace(Model()).get_trace()
    assert trace.param_nodes == ["scaled.w"]
    monkeypatch.setattr(energy_module, "_bind_parameters", lambda energy: None)
    assert poutine.trace(Model()).get_trace().param_nodes == []  # planted


# Copies ------------------------------------------------------------------------------


def test_pickle_deepcopy_and_torch_save():
    q = ring_distribution(log_partition=1.5).expand([3])
    x = torch.randn(3, 2)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(q)),
        copy.deepcopy(q),
        torch.load(file, weights_only=False),
    ):
        assert other.batch_shape == (3,)
        assert torch.equal(other.log_prob(x), q.log_prob(x))
        assert other.sample((2,)).shape == (2, 3, 2)


def test_expand_keeps_all_that_it_is():
    q = ring_distribution(log_partition=1.5)
    q.owner = object()
    big = q.expand([2, 3])
    assert type(big) is EnergyDistribution
    for name in ("energy", "sampler", "owner", "is_normalized", "log_partition"):
        assert getattr(big, name) is getattr(q, name)
    assert q.batch_shape == ()


def test_a_pyro_distribution_is_an_energy_is_a_distribution():
    gamma = dist.Gamma(torch.tensor(3.0), 2.0)
    q = EnergyDistribution(DistributionEnergy(gamma))
    x = gamma.sample((5,))
    torch.testing.assert_close(q.log_prob(x), gamma.log_prob(x))
    assert_moments(q.sample((4000,)), 1.5, 0.75)


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), copy.copy]
)
def test_copies_keep_a_closed_form_and_its_gradient(make_copy):
    """A deep copy raised, and a pickle took log Z for a free parameter."""
    q = EnergyDistribution(QuadraticEnergy(torch.zeros(2), 4 * torch.eye(2)))
    twin = make_copy(q)
    torch.testing.assert_close(twin.log_prob(torch.ones(2)), q.log_prob(torch.ones(2)))
    (grad,) = torch.autograd.grad(twin.log_partition, twin.energy.log_diagonal)
    assert grad.tolist() == [-1.0, -1.0]


def test_a_copy_of_live_tensors_has_their_numbers():
    loc = torch.ones(2, requires_grad=True)
    q = EnergyDistribution(QuadraticEnergy(2 * loc))
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert twin.energy.loc.tolist() == [2.0, 2.0]
        assert twin.log_prob(torch.zeros(2)).item() == pytest.approx(
            q.log_prob(torch.zeros(2)).item()
        )


# As Pyro's own ------------------------------------------------------------------------


def test_expand_refuses_what_does_not_expand():
    q = ring_distribution().expand([5, 1])
    assert q.expand([2, 5, 3]).batch_shape == (2, 5, 3)
    for wrong in ([3, 1], [5], [4, 3]):
        with pytest.raises(ValueError, match=r"batch_shape must be one that \(5, 1\)"):
            q.expand(wrong)


def test_to_event_of_nothing_is_the_distribution():
    q = ring_distribution()
    assert q.to_event(0) is q
    assert q.to_event() is q
    assert q.expand([3]).to_event().event_shape == (3, 2)


def test_shapes_are_not_inferred():
    with pytest.raises(NotImplementedError, match="event_shape and batch_shape of its"):
        EnergyDistribution.infer_shapes(energy=())


def test_moments_and_entropy_of_a_closed_form():
    normal = dist.MultivariateNormal(torch.ones(2), 0.25 * torch.eye(2))
    q = EnergyDistribution(QuadraticEnergy(torch.ones(2), 4 * torch.eye(2))).expand([3])
    for name in ("mean", "variance", "stddev", "mode"):
        expected = getattr(normal, name).expand(3, 2)
        torch.testing.assert_close(getattr(q, name).detach(), expected)
    expected = normal.entropy().expand(3)
    torch.testing.assert_close(q.entropy().detach(), expected)
    with pytest.raises(NotImplementedError, match=r"no mean in closed form. Draw"):
        ring_distribution().mean  # noqa: B018
    with pytest.raises(NotImplementedError, match="no entropy in closed form"):
        ring_distribution().entropy()


def test_divergences_of_a_closed_form():
    """Of N(1, 1/4) in two dimensions from N(0, 4): by hand."""
    q = EnergyDistribution(QuadraticEnergy(torch.ones(2), 4 * torch.eye(2)))
    wide = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    expected = 2 * (math.log(4) + (0.25 + 1) / 8 - 0.5)
    for other in (wide, EnergyDistribution(DistributionEnergy(wide))):
        assert torch.distributions.kl_divergence(q, other).item() == pytest.approx(
            expected
        )
    back = torch.distributions.kl_divergence(wide, q.expand([3]))
    expected = 2 * (-math.log(4) + (4 + 1) * 2 - 0.5)
    torch.testing.assert_close(back.detach(), torch.full((3,), expected))
    with pytest.raises(NotImplementedError, match="no Kullback-Leibler divergence"):
        torch.distributions.kl_divergence(ring_distribution(), wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of two divergences that fit alike
        point = torch.distributions.kl_divergence(dist.Delta(torch.zeros(2)), q)
    torch.testing.assert_close(point, -q.log_prob(torch.zeros(2)))


def test_log_prob_under_vmap():
    """Its check of the support, too. Fault: a branch on a batched value."""
    q, x = ring_distribution(), torch.randn(5, 2)
    torch.testing.assert_close(torch.func.vmap(q.log_prob)(x), q.log_prob(x))
    with pytest.raises(ValueError, match="must not contain nan"):
        q.log_prob(torch.full((2,), torch.nan))


# Log Z that is missing, without gradients ---------------------------------------------


def latent_scale(log_partition=None):
    """``x ~ N(0, exp(-z))`` with ``z ~ N(0, 1)`` and ``x = 0``."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    energy = FunctionEnergy(lambda x: z.exp() * x.square() / 2, ())
    if log_partition is not None:
        log_partition = log_partition(z)
    pyro.sample("x", EnergyDistribution(energy, log_partition), obs=torch.tensor(0.0))


class Filtered:
    def init(self, state):
        state["z"] = pyro.sample("z0", dist.Normal(0.0, 1.0))

    def step(self, state):
        latent_scale()


class Guided(Filtered):
    def init(self, state):
        pyro.sample("z0", dist.Normal(0.0, 1.0))

    def step(self, state):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def importance():
    Importance(latent_scale, num_samples=3).run()


def filtering():
    particles = SMCFilter(Filtered(), Guided(), 5, 0)
    particles.init()
    particles.step()


def weighed():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    WeighedPredictive(latent_scale, guide=guide, num_samples=3)(
        model_guide=latent_scale
    )


def enumerating():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        energy = FunctionEnergy(lambda x: (1 + z) * x**2 / 2, ())
        pyro.sample("x", EnergyDistribution(energy), obs=torch.tensor(1.0))

    TraceEnum_ELBO(max_plate_nesting=0).compute_marginals(model, lambda: None)


def scores():
    """A guide without pathwise gradients."""

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, 1.0).has_rsample_(False))

    Trace_ELBO().loss_and_grads(latent_scale, guide)


@pytest.mark.parametrize(
    "run",
    [importance, filtering, weighed, enumerating, scores],
    ids=lambda f: f.__name__,
)
def test_an_energy_of_a_latent_needs_its_log_partition(run):
    """Each of them was silent, and off by log Z at every value of the latent."""
    with pytest.raises(
        NotImplementedError, match=r"sampled z, and log Z, which is mis"
    ):
        run()


def test_the_log_partition_of_a_latent_makes_importance_right():
    """``z`` is ``N(1/2, 1)`` a posteriori: ``x = 0`` has the density ``exp(z / 2)``."""

    def log_partition(z):
        return (math.log(2 * math.pi) - z) / 2

    posterior = Importance(latent_scale, num_samples=2000).run(log_partition)
    z = torch.stack([t.nodes["z"]["value"] for t in posterior.exec_traces])
    weights = posterior.get_normalized_weights()
    error = (weights.square() * (z - 0.5) ** 2).sum().sqrt()
    assert abs(weights @ z - 0.5) < 4 * error


def test_an_energy_built_outside_of_the_model_depends_on_no_latent():
    energy = FunctionEnergy(ring, (2,))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        q = EnergyDistribution(2.0 * energy + 1.0)
        pyro.sample("x", q, obs=torch.zeros(2))

    assert Importance(model, num_samples=3).run().get_log_normalizer().isfinite()


def test_an_unnormalised_guide_of_importance_is_refused():
    """The evidence was off by log Z of the guide."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.0))

    def guide(log_partition=None):
        pyro.sample("x", ring_distribution(log_partition=log_partition))

    with pytest.raises(NotImplementedError, match=r"stands in a guide.*log Z, which"):
        Importance(model, guide, num_samples=3).run()
    energy = QuadraticEnergy(torch.zeros(2))

    def exact():
        pyro.sample("x", EnergyDistribution(energy))

    found = Importance(model, exact, num_samples=500).run().get_log_normalizer()
    expected = dist.Normal(0.0, math.sqrt(3.0)).log_prob(torch.tensor(0.0))
    assert abs(found - expected) < 0.1


# Learning without the gradient of log Z -----------------------------------------------


@pytest.mark.parametrize("learned", ["bare", "held", "known"])
def test_svi_is_told_of_parameters_whose_log_z_has_no_gradient(learned):
    """Fault: a regression by an energy of covariates fell without bound, and the loss
    looked excellent. Parameters that are held, or that log Z knows, are no fault."""
    scale = nn.Parameter(torch.tensor(0.0), requires_grad=learned != "held")
    shift = torch.randn(20)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = scale

        def forward(self, x, c):
            return ((x - c) / self.scale.exp()).square() / 2

    energy = FunctionEnergy(Scaled(), (), context_shape=()).eval()

    def model(x):
        pyro.module("energy", energy)
        known = (scale + math.log(2 * math.pi) / 2).expand(20)
        log_z = known if learned == "known" else None
        q = EnergyDistribution(energy.given(shift), log_z)
        with pyro.plate("rows", 20):
            pyro.sample("x", q, obs=x)

    pyro.clear_param_store()
    optim, loss = pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()
    svi = SVI(model, lambda x: None, optim, loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreliableWarning)
        svi.step(torch.randn(20))
        svi.evaluate_loss(torch.randn(20))  # learns nothing
    told = [str(w.message) for w in caught if w.category is UnreliableWarning]
    assert len(told) == (learned == "bare")
    assert all("SVI moves parameters of GivenEnergy" in text for text in told)
