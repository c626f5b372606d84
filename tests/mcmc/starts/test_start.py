"""Where chains begin: standardised sites, and draws of normals fitted on descents.

Faults that a test is meant to catch are named with it, and were seen to be caught.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import FunctionEnergy
from pyro_ebm.mcmc import HMC, ChEES, Gibbs
from pyro_ebm.mcmc.run.target import resolve_target
from pyro_ebm.mcmc.starts.modes import Descent, Memory, _Normals, find_approximations
from pyro_ebm.mcmc.starts.start import _score, choose_non_centred, start_chains
from tests.mcmc.starts.test_modes import quadratic, with_grad

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def groups(error):
    """Eight groups, each seen with an error."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=EFFECTS)


def chosen(model, *args, kernel=None, num_chains=64):
    kernel = ChEES() if kernel is None else kernel
    target = resolve_target(model, kernel, args, {}, compile=False)
    start = start_chains(target, kernel, num_chains)
    before = start.state.x.clone()
    found = choose_non_centred(target, start)
    assert torch.equal(start.state.x, before)
    return found


@pytest.mark.parametrize("kernel", [ChEES(), HMC()])
@pytest.mark.parametrize("seed", [0, 1])
def test_by_what_the_data_tell_of_each_group(kernel, seed):
    """Little of it: standardised. Almost all: as it is. Fault: the score negated."""
    pyro.set_rng_seed(seed)
    assert chosen(groups, 15.0, kernel=kernel) == ("theta",)
    assert chosen(groups, 0.5, kernel=kernel) == ()


def test_each_site_for_itself():
    """Fault: all sites or none."""

    def model():
        for name, error in (("told", 0.1), ("free", 30.0)):
            tau = pyro.sample(f"tau_{name}", dist.HalfCauchy(5.0))
            x = pyro.sample(name, dist.Normal(0.0, tau).expand([8]).to_event(1))
            pyro.sample(f"y_{name}", dist.Normal(x, error).to_event(1), obs=EFFECTS)

    assert chosen(model) == ("free",)


def test_many_sites_of_a_loop_are_one():
    """Fault: a model with more than eight left as it is."""

    def walk(error):
        x, tau = torch.tensor(0.0), pyro.sample("tau", dist.HalfNormal(1.0))
        for t in range(10):
            x = pyro.sample(f"x_{t}", dist.Normal(x, tau))
            pyro.sample(f"y_{t}", dist.Normal(x, error), obs=EFFECTS[t % 8] / 10)

    assert chosen(walk, 5.0) == tuple(f"x_{t}" for t in range(10))
    assert chosen(walk, 0.05) == ()


def test_a_model_without_such_a_site_costs_no_random_number():
    def model():
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0))

    kernel = HMC()
    target = resolve_target(model, kernel, (), {}, compile=False)
    start = start_chains(target, kernel, 8)
    random = torch.get_rng_state()
    assert choose_non_centred(target, start) == ()
    assert torch.equal(torch.get_rng_state(), random)


def test_the_score_is_that_of_the_best_diagonal_metric():
    """0 of independent normals, ``-log(1 - r^2)`` of two that correlate."""
    scale = torch.tensor([1e-3, 50.0])
    x = torch.randn(400_000, 2) * scale
    assert abs(_score(x, x / scale**2)) < 0.02
    correlation = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    x = torch.randn(400_000, 2) @ torch.linalg.cholesky(correlation).mT
    grad = x @ correlation.inverse()
    want = -torch.log(torch.tensor(1 - 0.64)).item()
    assert _score(x, grad) == pytest.approx(want, abs=0.02)
    assert _score(x * torch.nan, grad) == torch.inf


def test_the_factor_is_that_of_the_bfgs_formula():
    """Faults: the rank-one factors in the other order; a wrong sign in ``v``."""
    z = torch.zeros(3, 4)
    memory, diagonal = Memory(z), torch.rand(3, 4) + 0.5
    want = diagonal.diag_embed()
    hessian = torch.randn(3, 4, 4)
    hessian = hessian @ hessian.mT + torch.eye(4)
    for _ in range(5):
        s = torch.randn(3, 4)
        y = (hessian @ s[..., None])[..., 0]
        memory.add(s, y)
        rho = 1 / (s * y).sum(-1)[:, None, None]
        left = torch.eye(4) - rho * s[:, :, None] * y[:, None]
        want = left @ want @ left.mT + rho * s[:, :, None] * s[:, None]
    grad = torch.randn(3, 4)
    normal = _Normals(z, grad, memory, diagonal)
    factor = torch.stack([normal._spread(row) for row in torch.eye(4)[:, None]], -1)
    torch.testing.assert_close(factor @ factor.mT, want)
    torch.testing.assert_close(normal.log_det, want.logdet() / 2)
    torch.testing.assert_close(normal.loc, -(want @ grad[..., None])[..., 0])


def test_approximations_of_a_gaussian_are_near_it():
    """The bound is log Z, less little. Fault: the scale of the starts left out."""
    loc = torch.tensor([300.0, -1.0, 0.05])
    factor = torch.tensor([[20.0, 0.0, 0.0], [-0.5, 0.3, 0.0], [0.002, 0.001, 0.007]])
    covariance = factor @ factor.mT
    found = find_approximations(quadratic(loc, covariance), torch.randn(16, 3), 64)
    log_z = (2 * math.pi * covariance).logdet().item() / 2
    assert (found.bound < log_z + 0.3).all()
    assert found.bound.median() > log_z - 1.0
    white = torch.linalg.solve_triangular(factor, (found.loc - loc).mT, upper=False)
    assert white.abs().median() < 0.5
    assert found.x.shape == found.grad.shape == (16, 32, 3)


def test_the_best_bound_is_not_where_the_density_is_unbounded():
    """A hierarchy over the log scale, whose density grows without bound there.

    Fault: the end of the descent for the best bound.
    """

    @with_grad
    def energy(u):
        scale, x = u[:, 0].exp(), u[:, 1:]
        prior = (x / scale[:, None]).square().sum(-1) / 2 + 8 * u[:, 0]
        return prior + (x - 0.3).square().sum(-1) / 2 + scale

    starts = torch.rand(16, 10) - 0.5
    found = find_approximations(energy, starts, 64)
    assert (found.loc[:, 0] > -8).all()
    descent = Descent(energy, starts)
    for _ in range(100):
        descent.step()
    assert (descent.z[:, 0] < -12).all()


def started(model, num_chains=64, kernel=None):
    kernel = ChEES() if kernel is None else kernel
    target = resolve_target(model, kernel, (), {}, compile=False)
    return target, start_chains(target, kernel, num_chains)


def line():
    x = torch.linspace(55.0, 78.0, 200)
    y = 3 + 0.02 * x + 0.4 * torch.sin(97 * x)
    a, b = (pyro.sample(name, dist.Normal(0.0, 10.0)) for name in "ab")
    noise = pyro.sample("noise", dist.HalfCauchy(2.5))
    with pyro.plate("data", 200):
        pyro.sample("y", dist.Normal(a + b * x, noise), obs=y)


def test_chains_of_a_model_start_around_its_mass_in_its_metric():
    """Overdispersed, a point for each group. Fault: starts where descents ended."""
    _, start = started(line)
    points = start.state.x[::4]
    assert (start.num_groups, start.num_moved) == (16, 0)
    assert torch.equal(points.repeat_interleave(4, 0), start.state.x)
    assert start.state.x.dtype == torch.float64
    white = []
    for each in (start, *(started(line)[1] for _ in range(2))):
        factor, points = each.kernel.scale_tril, each.state.x[::4]
        white += [torch.linalg.solve_triangular(factor, points.mT, upper=False).mT]
    deviation = torch.cat(white).std(0)
    assert ((deviation > 0.7) & (deviation < 3)).all()
    assert (factor[1, 0] / factor[1].norm()).abs() > 0.9  # slope and intercept
    _, start = started(line, kernel=HMC(scale=torch.ones(3)))
    assert torch.equal(start.kernel.scale, torch.ones(3))  # one that is given stays


def test_two_modes_keep_their_chains():
    """Of one mass, one twenty times narrower. Fault: the energy for the bound."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 20.0).to_event(1))
        wide = dist.Normal(2.0, 1.0).log_prob(x).sum()
        narrow = dist.Normal(-2.0, 0.05).log_prob(x).sum()
        pyro.factor("modes", torch.logaddexp(wide, narrow))

    kernel = ChEES()
    target = resolve_target(model, kernel, (), {}, compile=False)
    x = torch.cat([2 + torch.randn(56, 3), -2 + 0.05 * torch.randn(8, 3)])
    start = start_chains(target._replace(start=lambda _: x), kernel, 64)
    assert (start.state.x < 0).all(-1).sum() == 8
    assert start.num_moved == 0


def test_paths_without_mass_start_where_others_do():
    """A minimum with e^-100 of the mass. Fault: every path keeps its own start."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 20.0).to_event(1))
        deep = dist.Normal(1.5, 0.1).log_prob(x).sum()
        high = dist.Normal(-1.5, 0.1).log_prob(x).sum() - 100
        pyro.factor("modes", torch.logaddexp(deep, high))

    _, start = started(model)
    assert start.num_moved > 0
    assert (start.state.x > 0).all()


@pytest.mark.parametrize("num_chains", [1, 6, 130])
def test_any_number_of_chains(num_chains):
    _, start = started(line, num_chains)
    assert start.state.x.shape == (num_chains, 3)
    assert start.state.energy.max() < start.state.energy.min() + 200


def test_a_model_that_is_nowhere_like_a_normal_starts_all_the_same():
    def model():
        x = pyro.sample("x", dist.Uniform(-1.0, 1.0))
        pyro.factor("hole", torch.where(x.abs() > 0.5, 0.0, -torch.inf))

    _, start = started(model, 16)
    assert start.state.energy.isfinite().all()


def test_starts_where_most_states_are_forbidden():
    """One bit of eight is on, as in 2 of these 64 draws. Fault: one draw a group, of
    which none is allowed."""
    bits = dist.constraints.independent(dist.constraints.boolean, 1)
    energy = FunctionEnergy(
        lambda x: torch.zeros(x.shape[:-1]).where(x.sum(-1) == 1, math.inf), (8,), bits
    )
    torch.manual_seed(0)
    start = start_chains(
        resolve_target(energy, Gibbs(), (), {}, compile=False), Gibbs(), 64
    )
    assert start.state.x.sum(-1).eq(1).all()
