"""SMC in two stages, and the refit of the base between them."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy, unconstrained
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.refined import refined_smc
from pyro_ebm.partition.refit import RefittedBase, fit_student_t
from pyro_ebm.testing import targets


def test_the_fit_recovers_a_student_t():
    """Location and scale; seen to fail with weights of one, which fit a Gaussian."""
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    truth = dist.MultivariateStudentT(torch.tensor(5.0), torch.ones(2), factor)
    fitted = fit_student_t(truth.sample((20_000,)), degrees=5.0)
    torch.testing.assert_close(fitted.loc, truth.loc, rtol=0, atol=0.05)
    scale = fitted.scale_tril @ fitted.scale_tril.mT
    torch.testing.assert_close(scale, factor @ factor.mT, rtol=0.05, atol=0.05)


def test_the_fit_keeps_strong_correlations():
    """Seen to fail with the covariance shrunk towards its diagonal by D / N."""
    rotation = torch.linalg.qr(torch.randn(10, 10)).Q
    scales = torch.logspace(-2, 0, 10)
    draws = torch.randn(640, 10) * scales @ rotation.mT
    fitted = fit_student_t(draws)
    smallest = torch.linalg.svdvals(fitted.scale_tril).min()
    assert smallest < 1.5 * scales.min()


def test_the_refitted_base_is_normalised():
    """Its draws and its density belong together: the mean of p / q is one."""
    base = dist.Normal(torch.zeros(2), 3.0).to_event(1)
    path = GeometricPath(DistributionEnergy(base), base)
    refitted = RefittedBase(torch.randn(500, 2) + 1, path, base_weight=0.2)
    wide = dist.Normal(torch.zeros(2), 4.0).to_event(1)
    x = wide.sample((50_000,))
    ratio = (refitted.log_prob(x) - wide.log_prob(x)).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / len(x) ** 0.5
    draws = refitted.sample((50_000,))
    back = (wide.log_prob(draws) - refitted.log_prob(draws)).exp()
    assert (back.mean() - 1).abs() < 4 * back.std() / len(draws) ** 0.5


@pytest.mark.parametrize(
    ("name", "budget", "tolerance"),
    [("gaussian", 15_000, 0.15), ("trap", 12_000, 0.12), ("gamma", 10_000, 0.1)],
)
def test_near_gaussian_targets_by_the_refitted_base(name, budget, tolerance):
    target = getattr(targets, name)()
    errors = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        found = refined_smc(target.energy, target.base, budget=budget)
        assert found.num_evaluations < 1.3 * budget
        inside = found.lower <= target.log_partition <= found.upper
        assert inside or not found.is_reliable
        errors.append(abs(found.value - target.log_partition))
    assert max(errors) < tolerance


def test_simplex_and_box_are_right():
    dirichlet = dist.Dirichlet(torch.tensor([0.7, 2.0, 3.0]))
    box = dist.Beta(torch.tensor([0.5, 4.0]), torch.tensor([2.0, 1.5])).to_event(1)
    for truth in (dirichlet, box):
        energy = DistributionEnergy(truth) - 1.5
        flat_base = (
            dist.Dirichlet(torch.ones(3))
            if truth is dirichlet
            else dist.Uniform(torch.zeros(2), 1.0).to_event(1)
        )
        found = refined_smc(energy, flat_base, budget=10_000)
        inside = found.lower <= 1.5 <= found.upper
        assert inside or not found.is_reliable
        assert abs(found.value - 1.5) < 0.2


@pytest.mark.slow
def test_a_thousand_dimensions_run():
    precision = torch.logspace(-1, 1, 1000)
    energy = DistributionEnergy(
        dist.Normal(torch.zeros(1000), precision.rsqrt()).to_event(1)
    )
    base = dist.Normal(torch.zeros(1000), 3.5).to_event(1)
    assert unconstrained(energy)[0].event_shape == (1000,)
    found = refined_smc(energy, base, budget=5_000)
    assert abs(found.value) < 3 * found.std_error + 5 or not found.is_reliable
