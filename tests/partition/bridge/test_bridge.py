"""Bridge sampling: right, with an interval that covers, and aware of its limits."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.energies import DistributionEnergy, FunctionEnergy, QuadraticEnergy
from pyro_ebm.partition.bridge.bridge import bridge_sampling, fitted
from pyro_ebm.testing import CountingEnergy, assert_moments, targets


def runs_on(target, num_runs, count, **settings):
    found = [
        bridge_sampling(target.energy, target.sample((count,)), **settings)
        for _ in range(num_runs)
    ]
    ok = [r for r in found if r.is_reliable]
    truth = target.log_partition
    return found, ok, sum(r.lower <= truth <= r.upper for r in ok)


@pytest.mark.parametrize("proposal", ["gaussian", "student"])
@pytest.mark.parametrize(
    "target", [targets.gamma, targets.product_of_gaussians, targets.trap]
)
def test_interval_covers(target, proposal):
    """Near-Gaussian targets, 60 runs of 500 draws; all are ok.

    Planted faults: both halves for the fit and the bridge; no Jacobian for gamma.
    """
    found, ok, covered = runs_on(target(), 60, 500, proposal=proposal)
    assert len(ok) == len(found)
    assert covered >= 54
    assert sum(r.std_error for r in ok) / 60 < 0.05


@pytest.mark.parametrize(
    "target",
    [
        lambda: targets.student_t_product(10),
        lambda: targets.neals_funnel(3),
        lambda: targets.gaussian(5, 1e4),
        targets.gaussian_mixture,
    ],
    ids=["student", "funnel", "gaussian", "mixture"],
)
def test_interval_covers_hard_targets(target):
    """The draws are exact, so bridges reach what annealing misses."""
    found, ok, covered = runs_on(target(), 40, 2000, proposal="student")
    assert len(ok) > 30
    assert covered >= 0.88 * len(ok)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["gaussian", "student"])
@pytest.mark.parametrize(
    "target",
    [
        targets.gamma,
        targets.product_of_gaussians,
        targets.gaussian,
        targets.trap,
        targets.student_t_product,
        targets.neals_funnel,
        targets.gaussian_mixture,
    ],
)
def test_interval_covers_over_many_seeds(target, proposal):
    found, ok, covered = runs_on(target(), 300, 2000, proposal=proposal)
    assert len(ok) > 250
    assert covered > 0.93 * len(ok)


def test_constant_moves_log_z_by_it():
    energy, draws = QuadraticEnergy(torch.zeros(2)), torch.randn(500, 2)
    torch.manual_seed(1)
    first = bridge_sampling(energy, draws)
    torch.manual_seed(1)
    second = bridge_sampling(energy + 5.0, draws)
    assert second.value == pytest.approx(first.value - 5.0, abs=1e-9)


def test_poor_proposal_is_flagged():
    target = targets.hybrid_rosenbrock()
    estimate = bridge_sampling(target.energy, target.sample((500,)))
    assert estimate.status == "unreliable"
    assert "poor overlap" in estimate.reason


def test_draws_that_lack_a_mode_are_flagged_where_the_proposal_reaches_it():
    """Planted fault: no test of the slope."""

    def energy(x):
        modes = torch.stack([2 - 2 * (x + 4) ** 2, -((x - 4) ** 2) / 2])
        return -torch.logsumexp(modes, 0)

    energy = FunctionEnergy(energy, ())
    first, second = 4 + torch.randn(2000), -4 + torch.randn(2000) / 2
    wide = dist.Normal(0.0, 5.0)
    estimate = bridge_sampling(energy, first, proposal=wide)
    assert estimate.status == "unreliable"
    assert "not those of the two densities" in estimate.reason
    share = 1 / (1 + math.exp(2) / 2)
    both = torch.where(torch.rand(2000) < share, first, second)
    estimate = bridge_sampling(energy, both, proposal=wide)
    assert estimate.status == "ok"
    truth = math.log(2 * math.pi) / 2 - math.log(share)
    assert estimate.lower <= truth <= estimate.upper


def test_halves_that_differ_are_flagged():
    draws = torch.randn(1000, 2)
    draws[500:] *= 0.5
    proposal = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    energy = QuadraticEnergy(torch.zeros(2))
    estimate = bridge_sampling(energy, draws, proposal=proposal)
    assert estimate.status == "unreliable"
    assert "two halves of the draws differ" in estimate.reason


def autoregressive(rho, num_chains=8, count=400, dim=3):
    x = [torch.randn(num_chains, dim)]
    for _ in range(count - 1):
        noise = torch.randn(num_chains, dim)
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * noise)
    return torch.stack(x, 1)


def test_correlated_chains_widen_the_error():
    """Planted fault: chains flattened, as if the draws were independent."""
    energy, truth = QuadraticEnergy(torch.zeros(3)), 1.5 * math.log(2 * math.pi)
    covered = blind = 0
    for _ in range(30):
        draws = autoregressive(0.95)
        estimate = bridge_sampling(energy, draws, proposal="student")
        covered += estimate.lower <= truth <= estimate.upper
        flat = bridge_sampling(energy, draws.flatten(0, 1), proposal="student")
        blind += flat.lower <= truth <= flat.upper
    assert covered >= 26
    assert blind < 22


def test_a_single_chain_widens_the_error_by_its_order_in_time_alone():
    """No second chain shows by its distance that the draws are dependent.

    Planted fault: the draws of each chain out of their order in time.
    """
    energy, truth = QuadraticEnergy(torch.zeros(3)), 1.5 * math.log(2 * math.pi)
    covered = blind = 0
    for _ in range(40):
        draws = autoregressive(0.95, num_chains=1, count=2000)
        estimate = bridge_sampling(energy, draws, proposal="student")
        covered += estimate.lower <= truth <= estimate.upper
        shuffled = draws[:, torch.randperm(2000)]
        found = bridge_sampling(energy, shuffled, proposal="student")
        blind += found.lower <= truth <= found.upper
    assert covered >= 34
    assert blind < 28


def test_chains_that_never_meet_widen_the_error():
    """Each chain stays in one of two modes: two independent draws, not 8,000.

    Planted fault: the draws taken for independent.
    """
    modes = torch.tensor([-2.0, 2.0])
    energy = FunctionEnergy(
        lambda x: -torch.logsumexp(-2 * (x[..., None] - modes) ** 2, -1), ()
    )
    proposal = dist.Normal(2.0, 1.0)  # it tells the modes apart
    draws = modes[:, None] + torch.randn(2, 4000) / 2
    apart = bridge_sampling(energy, draws, proposal=proposal)
    mixed = draws.mT.flatten()[torch.randperm(8000)].reshape(2, 4000)
    together = bridge_sampling(energy, mixed, proposal=proposal)
    assert apart.std_error > 5 * together.std_error


def test_proposals_of_ones_own():
    target = targets.gamma()
    draws = target.sample((1000,))
    for proposal in (dist.LogNormal(1.0, 0.7), dist.Normal(3.0, 2.0)):
        estimate = bridge_sampling(target.energy, draws, proposal=proposal)
        assert estimate.status == "ok"
        assert estimate.lower <= target.log_partition <= estimate.upper
        assert type(proposal).__name__ in estimate.method


def test_flow_as_proposal():
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.NSF(2, hidden_features=(8,))()
    energy = QuadraticEnergy(torch.zeros(2))
    estimate = bridge_sampling(energy, torch.randn(1000, 2), proposal=flow)
    assert estimate.status == "ok"
    assert abs(estimate.value - math.log(2 * math.pi)) < 4 * estimate.std_error


def test_evaluations_are_counted():
    energy = CountingEnergy(QuadraticEnergy(torch.zeros(2)))
    estimate = bridge_sampling(energy, torch.randn(500, 2), num_proposal_draws=100)
    assert estimate.num_evaluations == energy.num_values == 600
    energy.reset()
    estimate = bridge_sampling(energy, torch.randn(4, 101, 2))
    assert estimate.num_evaluations == energy.num_values == 808


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_events_of_any_shape(shape):
    event_dim = len(shape)
    law = dist.Gumbel(torch.zeros(shape), 1.0).to_event(event_dim)
    energy = DistributionEnergy(law) + 1.0
    for batch in ((1000,), (4, 250)):
        draws = law.sample(torch.Size(batch))
        estimate = bridge_sampling(energy, draws, proposal="student")
        assert abs(estimate.value + 1.0) < 4 * estimate.std_error
        assert estimate.status == "ok"


def test_simplex():
    law = dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    estimate = bridge_sampling(DistributionEnergy(law), law.sample((2000,)))
    assert estimate.status == "ok"
    assert abs(estimate.value) < 4 * estimate.std_error


@pytest.mark.parametrize("family", ["gaussian", "student"])
def test_fitted_proposals_have_the_moments_of_the_draws(family):
    scale = torch.tensor([[1.0, 0.0], [0.5, 0.2]])
    draws = 3 + torch.randn(20_000, 2) @ scale.mT
    sample = fitted(draws, family, torch.Size((2,))).sample((100_000,))
    variance = (scale @ scale.mT).diagonal()
    # The fit has an error of its own, of 20,000 draws.
    assert_moments(sample[:10_000], 3.0, variance)
    assert torch.corrcoef(sample.mT)[0, 1] == pytest.approx(0.928, abs=0.02)


def test_few_draws_in_many_dimensions_do_not_fail():
    estimate = bridge_sampling(QuadraticEnergy(torch.zeros(50)), torch.randn(20, 50))
    assert estimate.status == "unreliable"


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (torch.zeros(100), r"got \(100,\)"),
        (torch.zeros(100, 3), r"got \(100, 3\)"),
        (torch.zeros(2, 3, 4, 2), r"got \(2, 3, 4, 2\)"),
        (torch.zeros(5, 2), "at least 8 a chain, got 5"),
    ],
)
def test_bad_draws_are_refused(draws, message):
    with pytest.raises(ValueError, match=message):
        bridge_sampling(QuadraticEnergy(torch.zeros(2)), draws)


def test_other_bad_input_is_refused():
    energy, draws = QuadraticEnergy(torch.zeros(2)), torch.randn(100, 2)
    with pytest.raises(ValueError, match="got 'laplace'"):
        bridge_sampling(energy, draws, proposal="laplace")
    with pytest.raises(ValueError, match=r"event_shape \(\)"):
        bridge_sampling(energy, draws, proposal=dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="num_proposal_draws must be at least 4"):
        bridge_sampling(energy, draws, num_proposal_draws=2)
    positive = FunctionEnergy(
        lambda x: torch.where((x > 0).all(-1), x.sum(-1), torch.inf), (2,)
    )
    with pytest.raises(ValueError, match="draws must have finite energy"):
        bridge_sampling(positive, draws)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_float32():
    estimate = bridge_sampling(QuadraticEnergy(torch.zeros(2)), torch.randn(1000, 2))
    assert estimate.status == "ok"
    assert abs(estimate.value - math.log(2 * math.pi)) < 0.02
