"""Moments of chains whose draws are not kept, against the draws themselves."""

import math

import pytest
import torch

from pyro_ebm.diagnostics.convergence import nested_ratio, ratio, split_chains
from pyro_ebm.mcmc.base import ChainState
from pyro_ebm.mcmc.run import batch_moments
from pyro_ebm.mcmc.run.batch_moments import BatchMoments


def filled(draws):
    """Moments of ``(N, C, D)`` draws, whose energy is the square."""
    moments = None
    for x in draws:
        state = ChainState(x, (x**2).sum(-1), x)
        moments = BatchMoments(state, lambda u: u) if moments is None else moments
        moments.add(state, None)
    return moments


def ar1(rho, num_draws, num_chains, dim):
    draws = torch.randn(num_draws, num_chains, dim)
    for n in range(1, num_draws):
        draws[n] = rho * draws[n - 1] + (1 - rho**2) ** 0.5 * draws[n]
    return draws


@pytest.mark.parametrize("num_draws", [1, 5, 8, 100, 1031])
@pytest.mark.parametrize("num_chains", [1, 3, 600])
def test_moments_are_those_of_the_draws(num_chains, num_draws):
    """Planted fault: the spread between the halves of a merged batch left out."""
    draws = 1e3 + torch.randn(num_draws, num_chains, 2)
    moments = filled(draws)
    mean, variance = moments.mean_and_variance()
    torch.testing.assert_close(mean, draws.mean((0, 1)))
    energies = (draws**2).sum(-1)
    if num_draws * num_chains > 1:
        torch.testing.assert_close(variance, draws.var((0, 1)))
    if num_draws > 1:
        torch.testing.assert_close(moments.energy_variance(), energies.var(0))
    assert moments.num_draws == num_draws


@pytest.mark.parametrize("num_chains", [2, 600])
@pytest.mark.parametrize("num_draws", [64, 512])
def test_r_hat_is_that_of_the_draws(num_chains, num_draws):
    """Where batches fill the run; not of ranks. Planted fault: as above."""
    draws = torch.randn(num_draws, num_chains, 3) + torch.randn(num_chains, 3)
    found = filled(draws).convergence(2)
    halves = split_chains(draws.permute(2, 1, 0))
    torch.testing.assert_close(found.r_hat, ratio(halves))
    torch.testing.assert_close(found.nested_r_hat, nested_ratio(halves, 4))


@pytest.mark.parametrize(("num_chains", "num_draws"), [(4, 8192), (500, 256)])
@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_errors_of_ar1_chains(rho, num_chains, num_draws):
    """The mean over coordinates has |z| < 4 beside a bias of ``tau / b``, here 9 %."""
    found = filled(ar1(rho, num_draws, num_chains, 50)).convergence(num_chains)
    total, square = num_chains * num_draws, rho**2
    for estimate, truth in [
        (found.bulk_ess, total * (1 - rho) / (1 + rho)),
        (found.mean_std_error**-2, total * (1 - rho) / (1 + rho)),
        (found.sd_std_error**-2 / 2, total * (1 - square) / (1 + square)),
    ]:
        error = estimate.std().item() / math.sqrt(50)
        assert abs(estimate.mean().item() / truth - 1) < 4 * error / truth + 0.09
    assert found.tail_ess.isnan().all()


def test_planted_fault_is_caught(monkeypatch):
    def faulty(self, other):
        length = self.length + other.length
        mean = (self.length * self.mean + other.length * other.mean) / max(length, 1)
        return type(self)(length, mean, self.squares + other.squares)

    monkeypatch.setattr(batch_moments._Part, "merged", faulty)
    with pytest.raises(AssertionError):
        test_moments_are_those_of_the_draws(3, 1031)
    with pytest.raises(AssertionError):
        test_r_hat_is_that_of_the_draws(600, 512)


def test_memory_does_not_grow():
    moments = filled(torch.randn(4096, 4, 2))
    sizes = [v.numel() for v in moments.state_dict().values() if hasattr(v, "numel")]
    # 64 batches of each chain, mean and squares, of three columns.
    assert sum(sizes) < 2 * 64 * 4 * 3 + 8 * 4 * 3 + 1


def test_too_few_draws():
    found = filled(torch.randn(15, 4, 2)).convergence(4)
    assert all(value.isnan().all() for value in found)
    assert filled(torch.randn(15, 4, 2)).r_hat() == 0.0


def test_state_dict():
    draws = torch.randn(300, 5, 2)
    whole, first = filled(draws), filled(draws[:101])
    saved = first.state_dict()
    first.add(ChainState(draws[0], draws[0, :, 0], draws[0]), None)  # not in the copy
    second = filled(draws[:1])
    second.load_state_dict(saved)
    for x in draws[101:]:
        second.add(ChainState(x, (x**2).sum(-1), x), None)
    for a, b in zip(whole.convergence(5), second.convergence(5), strict=True):
        assert torch.equal(a.nan_to_num(0), b.nan_to_num(0))
    assert torch.equal(whole.energy_variance(), second.energy_variance())
