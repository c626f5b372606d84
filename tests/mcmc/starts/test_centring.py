"""Which sites are standardised, by chains that have just started.

Faults that a test is meant to catch are named with it, and were seen to be caught.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.mcmc import HMC, ChEES
from pyro_ebm.mcmc.run.target import resolve_target
from pyro_ebm.mcmc.starts.start import _score, choose_non_centred, start_chains

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
