"""Sequential Monte Carlo from the base."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import FunctionEnergy, QuadraticEnergy
from pyro_ebm.partition import smc
from pyro_ebm.partition.particles.smc import run_smc
from pyro_ebm.testing import CountingEnergy, assert_moments, targets


def base(dim=2, scale=2.0):
    return dist.Normal(torch.zeros(dim), scale).to_event(1)


@pytest.mark.parametrize(
    "target",
    [targets.gaussian(3, 30.0), targets.trap(4), targets.gamma()],
    ids=lambda t: t.name,
)
def test_inside_its_interval_for_most_seeds(target):
    """Of 12 intervals of 95 % at least 9 hold. Seen to fail, as asserted, for a log Z
    that is 0.3 off."""
    inside = planted = 0
    for seed in range(12):
        pyro.set_rng_seed(seed)
        estimate = smc(target.energy, target.base, num_particles=256)
        assert estimate.status == "ok"
        assert abs(estimate.value - target.log_partition) < 0.5
        inside += estimate.lower <= target.log_partition <= estimate.upper
        planted += estimate.lower <= target.log_partition + 0.3 <= estimate.upper
    assert inside >= 9
    assert planted < 9


def test_read_forwards_it_errs_downwards_and_backwards_upwards():
    """Of few particles, in the mean over 400 islands; Bennett's ratio of the two
    directions is between them, and all three agree where the temperatures are close.

    Planted faults, in ``reverse``: the weights of the particles before the step, the
    sign of the logarithm, the forward estimate itself.
    """
    target = targets.trap(3)
    few = run_smc(target.energy, target.base, num_islands=400, num_particles=32)
    forward, bennett, reverse = (
        (part - target.log_partition, part.std() / 20)
        for part in (few.log_partition, few.bennett, few.reverse)
    )
    assert forward[0].mean() < -4 * forward[1]
    assert reverse[0].mean() > 4 * reverse[1]
    assert forward[0].mean() < bennett[0].mean() < reverse[0].mean()
    many = run_smc(
        target.energy,
        target.base,
        num_islands=16,
        num_particles=1024,
        ess_threshold=0.9,
    )
    for part in (many.log_partition, many.bennett, many.reverse):
        error = part.std() / 4
        assert abs(part.mean() - target.log_partition) < 4 * error + 0.005
        assert error < 0.03


def test_particles_at_the_end_are_draws_of_the_target():
    target = targets.trap(2, 1.0, 0.5)
    islands = run_smc(target.energy, base(), num_particles=512, chain_length=8)
    x = islands.state.chains().x
    assert x.shape == (4, 512, 2)
    # Those of one ancestor are dependent: the last of each of the 256 chains.
    assert_moments(x[:, -64:].flatten(0, 1), target.mean, target.variance)
    value, grad = target.energy.value_and_grad(x)
    torch.testing.assert_close(islands.state.target, value)
    torch.testing.assert_close(islands.state.target_grad, grad)


def test_a_shift_of_the_energy_moves_log_partition_alone():
    energy = targets.trap(2).energy
    pyro.set_rng_seed(1)
    one = run_smc(energy, base(), num_particles=64)
    pyro.set_rng_seed(1)
    two = run_smc(energy + 3.0, base(), num_particles=64)
    torch.testing.assert_close(two.log_partition, one.log_partition - 3.0)
    torch.testing.assert_close(one.state.u, two.state.u, rtol=1e-5, atol=1e-5)


def test_base_equal_to_the_target_takes_one_temperature():
    energy = QuadraticEnergy(torch.zeros(2))
    islands = run_smc(energy, base(scale=1.0))
    assert islands.inverse_temperatures == [0.0, 1.0]
    expected = energy.closed_form().log_partition.expand(4)
    torch.testing.assert_close(islands.log_partition, expected)
    assert islands.ess == pytest.approx(1.0)


def test_temperatures_keep_the_effective_fraction():
    target = targets.trap(3)
    islands = run_smc(target.energy, target.base, ess_threshold=0.6)
    assert len(islands.inverse_temperatures) > 3
    assert islands.inverse_temperatures == sorted(islands.inverse_temperatures)
    assert 0.55 < islands.ess <= 1


def test_evaluations_are_counted():
    energy = CountingEnergy(targets.trap(2).energy)
    estimate = smc(energy, base())
    assert estimate.num_evaluations == energy.num_gradients
    assert energy.num_values == 0


def test_wrong_base():
    energy = targets.gamma().energy
    for wrong, error, message in [
        (dist.Normal(torch.tensor(0.0), 1.0), ValueError, r"support of the energy"),
        (base(1), ValueError, r"base must have event_shape \(\).*got \(1,\)"),
        (dist.Gamma(torch.ones(2), 1.0), ValueError, r"base must have an empty batch"),
        (None, TypeError, "base must be a Pyro distribution"),
    ]:
        with pytest.raises(error, match=message):
            smc(energy, wrong)


@pytest.mark.parametrize(
    "settings",
    [{"num_islands": 1}, {"num_particles": 100}, {"chain_length": 1}],
)
def test_wrong_counts(settings):
    with pytest.raises(ValueError, match="num_islands must be at least 2 and chain_l"):
        smc(targets.trap(2).energy, base(), **settings)


def test_an_energy_that_is_nowhere_finite():
    energy = FunctionEnergy(lambda x: x.sum(-1) * torch.nan, (2,))
    with pytest.raises(
        DivergenceError, match=r"finite at none of 1024 draws of the base"
    ):
        smc(energy, base())


def test_an_energy_unbounded_below_is_no_number():
    target = targets.unnormalizable()
    with pytest.raises(
        DivergenceError, match="falls without bound, or the base is far"
    ):
        run_smc(target.energy, target.base, num_particles=64, max_temperatures=60)


def test_points_of_infinite_energy_have_no_weight():
    """Half of the plane is forbidden: log Z falls by log 2."""
    energy = FunctionEnergy(
        lambda x: torch.where(x[..., 0] > 0, x.square().sum(-1) / 2, torch.inf), (2,)
    )
    estimate = smc(energy, base(scale=1.5), num_particles=512)
    expected = QuadraticEnergy(torch.zeros(2)).closed_form().log_partition.item()
    assert abs(estimate.value - (expected - 0.693147)) < 4 * estimate.std_error
    assert estimate.std_error < 0.1


def test_islands_that_disagree_are_unreliable():
    """Two narrow modes of different depth, each island has its luck."""
    locs = torch.stack([torch.full((6,), 3.0), torch.full((6,), -3.0)])
    energy = FunctionEnergy(
        lambda x: (
            -torch.logsumexp(
                torch.tensor([0.0, 6.0])
                - 8 * (x[..., None, :] - locs).square().sum(-1),
                -1,
            )
        ),
        (6,),
    )
    statuses = set()
    for seed in range(4):
        pyro.set_rng_seed(seed)
        estimate = smc(energy, base(6, 3.0), num_particles=32, chain_length=8)
        statuses.add(estimate.status)
    assert "unreliable" in statuses
