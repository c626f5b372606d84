"""Models with missing data, or plates that subsample, have the energy of all data.

Missing data: seen to fail with the mask left on, and with nan left in the data
(gradients of nan). Plates, planted and seen to fail: the scale N / B left in, the last
part not masked, its latent classes masked too (each such row then counts log 2), a site
outside of a plate counted in each part, or only in the first of a plate that it is not
in.
"""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_ebm import mcmc, partition
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.pyro_model.full_data import whole_plates

ROWS = torch.tensor([0.5, 3.0, -1.0, torch.nan, 0.25, torch.nan], dtype=torch.float64)
SEEN = torch.tensor([True, False, True, False, True, False])


def missing(y=ROWS, mask=SEEN):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.5))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(loc, scale), obs=y, obs_mask=mask)
        pyro.sample("z", dist.Normal(x, 0.5), obs=torch.arange(6.0) / 4)


def log_evidence_on_grid():
    """The missing rows by hand: z is normal around loc."""
    loc, log_scale = torch.meshgrid(
        torch.linspace(-8, 8, 401), torch.linspace(-4, 4, 401), indexing="ij"
    )
    scale, z = log_scale.exp(), torch.arange(6.0) / 4
    total = dist.Normal(0.0, 1.5).log_prob(loc)
    total = total + dist.Normal(0.0, 0.5).log_prob(log_scale)
    for row in range(6):
        if SEEN[row]:
            total = total + dist.Normal(loc, scale).log_prob(ROWS[row])
            total = total + dist.Normal(ROWS[row], 0.5).log_prob(z[row])
        else:
            wide = (scale.square() + 0.25).sqrt()
            total = total + dist.Normal(loc, wide).log_prob(z[row])
    return total.flatten().logsumexp(0) + math.log(16 / 400 * 8 / 400)


def test_the_evidence_is_that_of_the_observed_rows():
    energy = PyroModelEnergy(missing)
    energy.check_evidence()
    prior = energy.prior
    torch.manual_seed(0)
    u = prior.sample((400_000,))
    value, grad = energy.value_and_grad(u[:1000])
    assert value.isfinite().all()
    assert grad.isfinite().all()
    weight = (-prior.log_prob(u) - energy(u)).exp()
    error = weight.std() / weight.mean() / len(u) ** 0.5
    assert error < 0.05
    assert abs(weight.mean().log() - log_evidence_on_grid()) < 4 * error


def test_unused_coordinates_follow_the_density_of_the_missing_ones():
    energy = PyroModelEnergy(missing)
    u = torch.randn(4, 8)
    values = energy.constrain(u)
    loc, scale = values["loc"].unsqueeze(-1), values["scale"].unsqueeze(-1)
    free = u.clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy(free).sum(), free)
    wanted = (values["x_unobserved"] - loc) / scale.square()
    torch.testing.assert_close(grad[:, 2:][:, SEEN], wanted[:, SEEN])


def test_a_mask_round_both_stays():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with (
            pyro.plate("data", 3),
            poutine.mask(mask=torch.tensor([True, True, False])),
        ):
            seen = torch.tensor([True, False, True])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(3), obs_mask=seen)

    energy = PyroModelEnergy(model)
    u = torch.tensor([0.5, 1.0, 2.0, 3.0])
    x = dist.Normal(0.5, 1.0).log_prob(torch.tensor([1.0, 2.0]))
    wanted = dist.Normal(0.0, 1.0).log_prob(u[0]) + x.sum()
    torch.testing.assert_close(
        energy(u), -wanted - dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0))
    )
    with pytest.raises(NotImplementedError, match="is masked"):
        assert energy.prior


def test_missing_classes_sum_to_one():
    data = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def model(mask):
        p = pyro.sample("p", dist.Beta(torch.ones(()), 1.0))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(p), obs=data, obs_mask=mask)
            pyro.sample("y", dist.Normal(k, 1.0), obs=torch.zeros(4))

    energy = PyroModelEnergy(model, torch.tensor([True] * 3 + [False]))
    energy.check_evidence()
    p = torch.tensor(0.3)
    u = energy.unconstrain({"p": p})
    seen = dist.Bernoulli(p).log_prob(data[:3])
    seen = seen.sum() + dist.Normal(data[:3], 1.0).log_prob(torch.tensor(0.0)).sum()
    rows = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(0.0))
    last = (rows + torch.stack([(1 - p).log(), p.log()])).logsumexp(0)
    jacobian = (p * (1 - p)).log()
    torch.testing.assert_close(energy(u), -(seen + last + jacobian))


def test_vectors_with_missing_rows():
    y = torch.tensor([[0.0, 1.0], [torch.nan, 2.0], [1.0, 1.0]], dtype=torch.float64)

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            normal = dist.MultivariateNormal(loc, torch.eye(2))
            pyro.sample("y", normal, obs=y, obs_mask=torch.tensor([True, False, True]))

    energy = PyroModelEnergy(model)
    assert energy.event_shape == (8,)
    value, grad = energy.value_and_grad(torch.zeros(3, 8))
    assert grad.isfinite().all()
    one = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    wanted = one.log_prob(torch.zeros(2)) * 4 + one.log_prob(y[0]) + one.log_prob(y[2])
    torch.testing.assert_close(value, -wanted.expand(3))


def test_observed_nan_is_still_refused():
    def model(mask):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=ROWS, obs_mask=mask)

    assert PyroModelEnergy(model, SEEN)(torch.zeros(7)).isfinite()
    with pytest.raises(ValueError, match="'y_observed' must not contain nan, got 1"):
        PyroModelEnergy(model, torch.tensor([True] * 4 + [False] * 2))


Y = torch.arange(10, dtype=torch.float64).cos()
X = torch.arange(30, dtype=torch.float64).reshape(10, 3).sin()
TABLE = torch.arange(24, dtype=torch.float64).reshape(6, 4).cos()


def regression(size):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.factor("penalty", -scale.square())
    with (
        pyro.plate("data", 10, subsample_size=size) as rows,
        poutine.scale(scale=0.5),
        poutine.mask(mask=X[rows, 0] > -0.9),
    ):
        mean = pyro.deterministic("mean", X[rows] @ w)
        pyro.sample("y", dist.Normal(mean, scale), obs=Y[rows])


def rows_one_by_one(size):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    for row in pyro.plate("data", 10, subsample_size=size):
        pyro.sample(f"y_{row}", dist.Normal(x, 1.0), obs=Y[row])


def rows_of_pyro(size):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=size):
        y = pyro.subsample(Y, event_dim=0)
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def classes(size):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    shared = pyro.sample("shared", dist.Bernoulli(0.3))
    with pyro.plate("data", 10, subsample_size=size) as rows:
        own = pyro.sample("own", dist.Bernoulli(0.4 + 0.2 * shared)).long()
        pyro.sample("y", dist.Normal(mean[own], 1.0), obs=Y[rows])


class Network(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event())
        self.linear.bias = nn.Parameter(torch.tensor([0.3]))

    def forward(self, size):
        mean = self.linear(X).squeeze(-1)
        with pyro.plate("data", 10, subsample_size=size) as rows:
            pyro.sample("y", dist.Normal(mean[rows], 1.0), obs=Y[rows])


def hidden_chain(size):
    """Its classes go by their names in pyro.markov's bookkeeping."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 10, subsample_size=size) as rows:
        z = torch.tensor(0)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3 + 0.4 * z)).long()
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=X[rows, t])


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize(
    "model", [regression, rows_one_by_one, rows_of_pyro, classes, hidden_chain, Network]
)
def test_the_energy_is_that_of_the_model_without_subsampling(model, size):
    model = model() if model is Network else model
    whole, energy = PyroModelEnergy(model, None), PyroModelEnergy(model, size)
    assert energy.is_traced
    assert energy.site_shapes == whole.site_shapes
    u = whole.initial_points(5)
    torch.testing.assert_close(energy(u), whole(u))
    torch.testing.assert_close(energy.value_and_grad(u), whole.value_and_grad(u))


@pytest.mark.parametrize("sizes", [(2, 2), (4, 3), (6, 3), (5, 4), (None, 3)])
def test_plates_that_cross(sizes):
    def model(num_rows, num_columns):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        rows = pyro.plate("rows", 6, subsample_size=num_rows, dim=-2)
        columns = pyro.plate("columns", 4, subsample_size=num_columns, dim=-1)
        with rows as i:
            pyro.sample("first", dist.Normal(x, 1.0), obs=TABLE[i, :1])
        with columns as j:
            pyro.sample("second", dist.Normal(x, 2.0), obs=TABLE[0, j])
        with rows as i, columns as j:
            pyro.sample("both", dist.Normal(x, 3.0), obs=TABLE[i][:, j])

    u = torch.linspace(-2, 2, 5).unsqueeze(-1)
    expected = PyroModelEnergy(model, None, None)(u)
    torch.testing.assert_close(PyroModelEnergy(model, *sizes)(u), expected)


def test_plates_side_by_side_take_a_run_for_each_part_only():
    runs = []

    def model(size):
        runs.append(size)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        for name in "abcd":
            with pyro.plate(name, 10, subsample_size=size) as rows:
                pyro.sample(f"y_{name}", dist.Normal(x, 1.0), obs=Y[rows])

    u = torch.linspace(-2, 2, 5).unsqueeze(-1)
    expected = PyroModelEnergy(model, None)(u)
    torch.testing.assert_close(PyroModelEnergy(model, 1)(u), expected)
    runs.clear()
    whole_plates(model)(1)
    assert len(runs) == 1 + 4 * 9  # not 10,000


def test_parameters_get_the_gradient_of_all_rows():
    network, grads = Network(), []
    for size in (None, 3):
        network.zero_grad()
        PyroModelEnergy(network, size)(torch.full((1, 3), 0.4)).sum().backward()
        grads.append(network.linear.bias.grad.clone())
    torch.testing.assert_close(*grads)


def conjugate(size):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[rows])


def test_posterior_and_evidence_are_those_of_all_rows():
    variance = torch.tensor(1 / 11)
    mean = variance * Y.sum()
    evidence = dist.MultivariateNormal(torch.zeros(10), torch.eye(10) + 1).log_prob(Y)
    found = partition.estimate(PyroModelEnergy(conjugate, 4), progress_bar=False)
    assert found.value == pytest.approx(evidence.item(), abs=1e-6)
    chains = mcmc.MCMC(mcmc.ChEES(), num_samples=50, num_chains=256, progress_bar=False)
    chains.run(conjugate, 4)
    moments = chains.moments()["x"]
    assert (moments.mean - mean).abs() < 4 * moments.mean_std_error
    error = (moments.variance.sqrt() - variance.sqrt()).abs()
    assert error < 4 * moments.sd_std_error


def latent_rows(size):
    with pyro.plate("data", 10, subsample_size=size) as rows:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[rows])


def batch_of_the_caller(size):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=size):
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[:size])


def test_a_converted_batch_of_the_caller_is_warned_of():
    def model(batch):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=len(batch)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=batch * 1.0)

    with pytest.warns(UnreliableWarning, match="the same in all parts of the plate"):
        PyroModelEnergy(model, Y[:5])


def rows_of_the_caller(size):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample=torch.arange(size)) as rows:
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[rows])


def too_many_parts(_):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10**6, subsample_size=10) as rows:
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y[rows % 10])


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (latent_rows, NotImplementedError, "'x' is latent in the plate 'data', which"),
        (batch_of_the_caller, ValueError, "'y' must observe the rows that its plate"),
        (rows_of_the_caller, NotImplementedError, "'data' holds 2 of 10 rows, which"),
        (too_many_parts, NotImplementedError, "would run 100,000 times to see all"),
    ],
)
def test_what_cannot_be_undone_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        PyroModelEnergy(model, 2)


def test_equal_data_in_all_parts_are_no_mistake():
    def model():
        x = pyro.sample("x", dist.Beta(1.0, 1.0))
        with pyro.plate("data", 10, subsample_size=5) as rows:
            pyro.sample("y", dist.Bernoulli(x), obs=torch.ones(10)[rows])

    u = torch.zeros(1, 1)
    grad = PyroModelEnergy(model).value_and_grad(u)[1]
    torch.testing.assert_close(grad, torch.tensor([[-5.0]]))  # 10 log x and a Jacobian
