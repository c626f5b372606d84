"""Fits over finite supports, told nothing but the model and the data."""

import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call

from pyro_ebm import EnergyModel, fit
from pyro_ebm.core import Status
from pyro_ebm.energies import (
    BoltzmannEnergy,
    FunctionEnergy,
    IsingEnergy,
    RBMEnergy,
)
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.infer import ContrastiveDivergence, MaximumLikelihood, ObjectiveLoss
from pyro_ebm.infer.fit.diagnosis import diagnose, judge
from pyro_ebm.infer.fit.optimiser import (
    Centring,
    FitOptim,
    GradientNoise,
    contrast,
    decay_by_gap,
    weights_of,
)
from pyro_ebm.mcmc import Gibbs
from pyro_ebm.partition import LogPartitionEstimate, estimate
from pyro_ebm.partition.exact.enumeration import enumeration

settling = sys.modules["pyro_ebm.infer.fit.settling"]
estimating = sys.modules["pyro_ebm.partition.estimate"]
KNOWN = LogPartitionEstimate(1.0, 0.01, 0.9, 1.1, 100.0, Status.OK, "walkers", 10)
BITS = dist.constraints.independent(dist.constraints.boolean, 1)


def machine(num_hidden=5):
    return RBMEnergy(0.01 * torch.randn(40, num_hidden))


def stripes(number):
    """Forty bits that agree in groups of ten, but for a tenth of them."""
    groups = torch.randint(2, (number, 4)).repeat_interleave(10, -1)
    return groups ^ (torch.rand(number, 40) < 0.1).long()


def test_a_machine_is_learned_by_chains(monkeypatch):
    """log Z of the chains' fit is that of the sum over the hidden units, and the
    likelihood on its way from 27.7, that of coins, to the entropy of 15.8."""
    monkeypatch.setattr(RBMEnergy, "closed_form", lambda self: None)
    pyro.set_rng_seed(0)
    model = EnergyModel(machine())
    result = fit(model, stripes(1500).bool(), num_steps=400, progress_bar=False)
    assert isinstance(model.base, IndependentSites)
    assert result.stages[0][0] == "MaximumLikelihood"
    exact = enumeration(result.distribution.energy, progress_bar=False)
    tracked = result.history[-1].log_partition
    assert abs(result.log_partition.value - exact.value) < 1e-3
    assert abs(tracked.value - exact.value) < 0.5
    assert result.validation.value > -25
    assert model().sample((3,)).shape == (3, 40)
    again = EnergyModel(machine())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.base.log_probs, model.base.log_probs)


def test_an_exact_energy_is_learned_exactly():
    pyro.set_rng_seed(0)
    data = IsingEnergy((3, 3), 0.4).closed_form().distribution.sample((2000,))
    model = EnergyModel(IsingEnergy((3, 3), 0.0))
    result = fit(model, data, num_steps=300, progress_bar=False)
    assert result.stages[0][0] == "ExactMaximumLikelihood"
    assert result.log_partition.status == "exact"
    assert abs(model.energy.coupling.item() - 0.4) < 0.05


@pytest.mark.parametrize(
    "objective",
    [MaximumLikelihood(num_steps=3), ContrastiveDivergence(num_steps=3)],
    ids=lambda o: type(o).__name__,
)
def test_gradients_are_those_of_the_likelihood(objective):
    """At the truth the data have the law of the model: both gradients vanish within
    their error; away from it that of the likelihood is that by enumeration. Seen to
    fail with chains of another energy."""
    pyro.set_rng_seed(0)
    energy = RBMEnergy(torch.randn(8, 3), torch.randn(8), torch.randn(3))
    data = energy.closed_form().distribution.sample((4000,))
    loss = ObjectiveLoss(energy, objective)
    total = [torch.zeros_like(p) for p in energy.parameters()]
    for _ in range(40):
        loss.zero_grad()
        loss(data).backward()
        total = [
            t + p.grad / 40 for t, p in zip(total, energy.parameters(), strict=True)
        ]
    assert max(t.abs().max() for t in total) < 0.04


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(17))

    def forward(self, x):
        return -(x @ self.weight)


@pytest.mark.slow
def test_bits_of_which_no_blocks_are_known(monkeypatch):
    monkeypatch.setattr(settling, "_MAX_SECONDS", 0.5)
    monkeypatch.setattr(estimating, "_MAX_STATES", 0)
    pyro.set_rng_seed(0)
    energy = FunctionEnergy(Linear(), (17,), BITS)
    data = (torch.rand(500, 17) < 0.8).float()
    optim = pyro.optim.Adam({"lr": 0.05})
    model = EnergyModel(energy)
    result = fit(model, data, num_steps=120, optim=optim, progress_bar=False)
    assert result.validation.value > -9.5  # the entropy is 8.5, that of coins 11.8
    assert result.log_partition.is_reliable
    weight = result.distribution.energy.fn.weight
    exact = torch.nn.functional.softplus(weight).sum().item()
    assert abs(result.log_partition.value - exact) < 0.1


def test_a_table_of_few_states_is_learned():
    """Fault: states are held out whole, and the start is kept since it likes them more
    than what has been learned without them."""
    pyro.set_rng_seed(0)
    truth = BoltzmannEnergy(torch.randn(4, 4).triu(1), torch.randn(4))
    truth = truth.closed_form().distribution
    model = EnergyModel(BoltzmannEnergy(0.01 * torch.randn(4, 4).triu(1)))
    result = fit(model, truth.sample((500,)), num_steps=300, progress_bar=False)
    x = truth.enumerate_support()
    log_p = truth.log_prob(x)
    assert (log_p.exp() * (log_p - result.distribution.log_prob(x))).sum() < 0.1


def test_states_that_there_are_not():
    with pytest.raises(ValueError, match="must lie in the support"):
        fit(EnergyModel(machine()), 2 * torch.ones(100, 40), progress_bar=False)


def test_tracked_and_annealed_agree():
    pyro.set_rng_seed(0)
    energy = IsingEnergy((4, 4), 0.3)
    model = EnergyModel(FunctionEnergy(energy, (4, 4), energy.support))
    model.log_partition.refresh(model.energy, progress_bar=False)
    exact = enumeration(energy, progress_bar=False).value
    assert abs(model.log_partition.value.item() - exact) < 0.1
    assert model.log_partition.status == "ok"
    found = estimate(model, method="gibbs", budget=100_000, progress_bar=False)
    assert abs(found.value - exact) < 4 * found.std_error


@pytest.mark.parametrize("spin", [False, True])
def test_machines_without_a_bias_start_as_the_base(spin):
    """So that a fit is no worse than its base. Seen to fail without, by 2 nats: the
    units of a new machine are fair coins; and with the logit for the field of spins."""
    pyro.set_rng_seed(0)
    data = (torch.rand(400, 8) < 0.95).to(torch.get_default_dtype())
    data = 2 * data - 1 if spin else data
    energy = BoltzmannEnergy(torch.zeros(8, 8), spins=spin)
    for started in (energy,) if spin else (energy, RBMEnergy(torch.zeros(8, 4))):
        model = EnergyModel(started)
        base = IndependentSites.fitted(started.support, data)
        model.use_base(base, data)
        torch.testing.assert_close(model().log_prob(data), base.log_prob(data))


def two_modes(strength):
    """Thirty bits that are nearly all on, in two of three draws, or nearly all off."""
    weight = torch.full((30, 1), 2.0 * strength)
    bias = torch.full((1,), 0.7 - 30 * strength)
    return RBMEnergy(weight, torch.full((30,), -strength), bias)


@pytest.mark.parametrize(("strength", "is_apart"), [(2.0, True), (0.2, False)])
def test_chains_that_stay_on_their_side(strength, is_apart):
    """Each mode keeps the chains that it began with, whose energies are as they should
    be: neither drift nor R-hat tells. Seen to fail with passages of a single site."""
    pyro.set_rng_seed(0)
    energy = two_modes(strength)
    data = energy.closed_form().distribution.sample((1000,)).to(energy.weight)
    objective = MaximumLikelihood(num_steps=1, restart_fraction=0.0)
    state = ObjectiveLoss(energy, objective).state
    state.start(energy, data[:256], Gibbs())
    state.advance(energy, Gibbs(), 1)
    model = EnergyModel(energy)
    found = diagnose(model, objective, state, data, 1000, 256)
    assert (found.crossings < 1) == is_apart
    assert found.r_hat < 1.05
    reasons = judge(found, KNOWN, "finished")
    texts = [str(r) for r in reasons if "weights of the sides" in str(r)]
    assert len(texts) == is_apart


@pytest.mark.slow
def test_two_modes_learned_with_too_few_moves():
    """Of a strongly bimodal machine one sweep a step learns the modes, and leaves their
    weights to chance: the fit says so."""
    pyro.set_rng_seed(0)
    is_on = (torch.rand(1500, 1) < 0.9).long().expand(1500, 30)
    data = is_on ^ (torch.rand(1500, 30) < 0.03).long()
    model = EnergyModel(RBMEnergy(0.01 * torch.randn(30, 4)))
    result = fit(model, data, num_steps=3000, progress_bar=False)
    assert result.verdict == "not at equilibrium"


def test_a_machine_that_has_learned_nothing():
    """Seen to be called ok before there was a rule for it."""
    pyro.set_rng_seed(0)
    model = EnergyModel(machine(4))
    result = fit(model, stripes(500), num_steps=60, progress_bar=False)
    assert result.verdict == "still learning"
    assert "in 60 steps the model has gained" in str(result.reasons[-1])


def gap_of(energy, train, held_out, *weights):
    """The decay by the rows, those held out matched to the others."""
    rows = torch.cat([train, held_out])
    return decay_by_gap(energy, rows, contrast(train, held_out, *weights))


class TestDecay:
    """Of weights, by the rows that are held out."""

    def test_closes_the_gap(self):
        """With it the held-out likelihood is stationary along the weights where that of
        training rows is, by enumeration. Planted fault, seen to fail: the gap without
        the square of the weights."""
        pyro.set_rng_seed(0)
        energy = RBMEnergy(torch.randn(6, 3), torch.randn(6))
        train, held_out = torch.randint(2, (2, 50, 6)).float()
        rows, equal = torch.cat([train, held_out]), torch.full((50,), 0.02)
        decay = decay_by_gap(energy, rows, torch.cat([-equal, equal]))
        weight = energy.weight
        log_partition = energy.closed_form().log_partition

        def along(x):
            loss = energy(x).mean() + log_partition
            (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
            return (weight * grad).sum()

        wanted = (along(held_out) - along(train)) / weight.square().sum()
        assert decay == pytest.approx(max(wanted.item(), 0.0), rel=1e-4)
        again = decay_by_gap(energy, rows, torch.cat([equal, -equal]))
        assert min(decay, again) == 0 < max(decay, again)

    def test_rows_count_by_their_weight(self):
        pyro.set_rng_seed(0)
        energy = RBMEnergy(torch.randn(6, 3))
        train, held_out = torch.randint(2, (2, 40, 6)).float()
        twice = torch.cat([held_out, held_out[:4]])
        weights = torch.tensor([2.0] * 4 + [1.0] * 36)
        found = gap_of(energy, train, held_out, weights)
        assert found == pytest.approx(gap_of(energy, train, twice), rel=1e-4)

    def test_biases_and_scales_stay(self):
        energy = IsingEnergy((3, 3), 0.4, 0.1)
        x = torch.ones(4, 3, 3)
        assert weights_of(energy) == []
        assert gap_of(energy, x, -x) == 0
        assert weights_of(two := machine()) == [two.weight]


class TestCentring:
    """Of the units of a machine, while it learns."""

    @pytest.mark.parametrize("visible", ["binary", "spin", "categorical"])
    def test_a_step_is_one_in_the_weights_between_units_less_their_means(self, visible):
        """Against gradients of the energy written in those weights and biases. Planted
        faults, seen to fail: either bias without the means of the other layer."""
        pyro.set_rng_seed(0)
        shape = (5, 3) if visible == "categorical" else (5,)
        machine = RBMEnergy(
            torch.randn(*shape, 2), torch.randn(shape), torch.randn(2), visible=visible
        )
        x, y = machine.closed_form().distribution.sample((2, 40))
        centring = Centring.of(machine, x)
        centring.look()
        visible_mean, hidden_mean = centring.means
        weight, bias, hidden = (p.detach().clone() for p in machine.parameters())
        parts = [
            weight.requires_grad_(),
            (bias + weight @ hidden_mean).detach().requires_grad_(),
            (hidden + visible_mean.flatten() @ weight.flatten(0, -2))
            .detach()
            .requires_grad_(),
        ]

        def as_before():
            w, b, c = parts
            return w, b - w @ hidden_mean, c - visible_mean.flatten() @ w.flatten(0, -2)

        names = [name for name, _ in machine.named_parameters()]
        energy = functional_call(machine, dict(zip(names, as_before(), strict=True)), x)
        other = functional_call(machine, dict(zip(names, as_before(), strict=True)), y)
        (energy.mean() - other.mean()).backward()
        with torch.no_grad():
            for part in parts:
                part -= 0.1 * part.grad
        optim = FitOptim(
            torch.optim.SGD(machine.parameters(), lr=0.1),
            EnergyModel(machine),
            None,
            GradientNoise(machine.parameters()),
        )
        optim.centring = centring
        (machine(x).mean() - machine(y).mean()).backward()
        optim([*machine.parameters()])
        for moved, wanted in zip(machine.parameters(), as_before(), strict=True):
            assert torch.allclose(moved, wanted)

    def test_is_for_machines_of_which_all_is_learned(self):
        two = machine()
        assert Centring.of(two, torch.zeros(1, 16)) is not None
        two.hidden_bias.requires_grad_(False)
        assert Centring.of(two, torch.zeros(1, 16)) is None
        assert Centring.of(IsingEnergy((3, 3), 0.4), torch.ones(1, 3, 3)) is None


def test_rows_held_out_are_matched_to_the_others():
    """The sums that they differ by have no share in the gap, and the shares stay near
    to equal ones. Planted fault, seen to fail: shares as they were."""
    pyro.set_rng_seed(0)
    train, held_out = torch.rand(300, 4), torch.rand(50, 4)
    shares = contrast(train, held_out)
    assert torch.allclose(shares[:300].sum(), -torch.ones(()))
    assert (shares @ torch.cat([train, held_out])).abs().max() < 1e-5
    assert (shares[300:] - 0.02).abs().max() < 0.02
    few = contrast(train[:5], held_out[:5])
    assert few.tolist() == pytest.approx([-0.2] * 5 + [0.2] * 5)


def test_a_machine_of_real_units_is_learned_by_its_exact_likelihood():
    """Up to the noise of the rows. Seen to fail by 0.4 nats, by weighted draws of a
    base, which ended worse than that base."""
    pyro.set_rng_seed(0)
    scale = {"visible": "gaussian", "scale": 0.7}
    truth = RBMEnergy(torch.randn(4, 3), torch.randn(4), torch.randn(3), **scale)
    law = truth.closed_form().distribution
    data, fresh = law.sample((2, 2000))
    model = EnergyModel(RBMEnergy(0.1 * torch.randn(4, 3), **scale))
    result = fit(model, data, num_steps=600, progress_bar=False)
    assert result.log_partition.status is Status.EXACT
    learned = result.distribution.log_prob(fresh).mean()
    assert abs(learned - law.log_prob(fresh).mean()) < 0.04
