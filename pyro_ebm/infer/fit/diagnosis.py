r"""The end of a fit: what is measured of it, and what that says against it.

*Energy gap.* Where the likelihood is largest no change of the scale of the energy
raises it, so that

.. math::
    \Delta = \mathbb{E}_{\text{data}}[f] - \mathbb{E}_{q_\theta}[f]         \tag{1}

is near 0. The second mean is one over the draws that :math:`\log Z` is tracked by,
walkers or weighted ones, whatever the gradient came from. A base that was fitted to the
same rows, and stays as it is, may have learned them by heart: then :math:`\Delta` is
far below 0 at these rows and above at others, whatever has been learned since. So there
it is also measured of the correction alone, at either kind of rows: what has been
learned is at fault where both say so.

*Drift.* The points that gave the gradient, chains or draws of a generator, are moved on
by a kernel that leaves :math:`e^{-f}` as it is, at fixed parameters. Points in
equilibrium keep their mean energy; those that lag behind the parameters do not.

*Crossings.* Chains that stay on one side of the data, while others stay on the other,
give each side the weight that it had when they parted. So for chains over a finite
support the passages are counted, from one side of the mean of the data to the other
along their direction of largest variance.

*Overlap.* Weights :math:`e^{-f(y)} / p_n(y)` of draws of the noise :math:`p_n`, and the
probability that the ratio is larger at a datum than at a draw of the noise.

*Verdict.* A difference :math:`\Delta` of mean energies, with standard error :math:`s`,
counts if

.. math::
    |\Delta| > 4 s \quad\text{and}\quad
    \frac{\Delta^2}{2\, \mathrm{Var} f} > 0.05                            \tag{2}

The second is, to leading order, the log-likelihood a point that a better scale of the
energy would gain, in nats: less than that is not worth an alarm. Where the energy
corrects a base that has been fitted to the same rows, it has to hold for the correction
too: the scale of the base is not what is learned, and rows that a base knows by heart
are no fault of it.
"""

__all__ = [
    "EnergyDifference",
    "FitDiagnostics",
    "FitRecord",
    "MIN_STEPS",
    "diagnose",
    "energy_gap",
    "judge",
    "learned_gap",
    "worse_than_base",
]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.diagnostics import (
    bulk_ess,
    effective_sample_fraction,
    nested_r_hat,
    pareto_k,
)
from pyro_ebm.distributions import EnergyModel
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.infer.likelihood import LogLikelihood
from pyro_ebm.infer.objectives.objective import Objective
from pyro_ebm.mcmc import Kernel
from pyro_ebm.mcmc.base import replace_nonfinite
from pyro_ebm.mcmc.warmup.adaptation import find_step_size
from pyro_ebm.partition import LogPartitionEstimate

#: Draws of the noise, and data, that the overlap is measured with.
_NUM_NOISE = 2048
#: Draws of the model among weighted ones, of which some may come more than once.
_NUM_RESAMPLED = 4000
#: Standard errors beyond which a difference is none by chance ...
NUM_ERRORS = 4.0
#: ... and the log-likelihood a point, in nats, below which it does not matter.
SMALL = 0.05
#: Nested R-hat of the energies of chains that hold still.
MAX_R_HAT = 1.05
#: Fewer effective noise points a step than this give no gradient worth having.
MIN_NOISE_ESS = 5.0
#: Steps over a finite support after which a model that has gained nothing has nothing
#: to gain.
MIN_STEPS = 1000
#: Data told from noise this often: hardly any pair teaches something.
MAX_SEPARATION = 0.995


class EnergyDifference(NamedTuple):
    """A difference of mean energies.

    Attributes:
        value: In nats.
        std_error: Its standard error.
        relative: The value in standard deviations of the energy.

    Example:
        >>> print(EnergyDifference(-0.12, 0.04, -0.2))
        -0.120 +- 0.040
    """

    value: float
    std_error: float
    relative: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.std_error:.3f}"


class FitDiagnostics(NamedTuple):
    r"""Diagnostics measured at the end of a fit; ``None`` where one does not apply.

    Attributes:
        energy_gap: (1), of the averaged parameters.
        drift: Change of the mean energy of the gradient's points while they move on at
            fixed parameters, in the iterate.
        r_hat: Nested :math:`\hat R` of their energies between the halves of that run.
        ess: Effective number of these energies, all points and moves together.
        num_moves: Moves in that run.
        acceptance: Mean acceptance in it.
        chain_age: Moves that a chain has made since it was begun or restarted, a mean
            that the settings imply.
        chain_lag: Parameter steps in which the chains forget: the moves that an
            effective draw takes by the moves a step. Of the order of ``num_moves`` it
            is only a lower bound.
        gradient_snr: Norm of the mean gradient by the size of its noise, over about the
            last 50 steps: large while the fit gets on, small once noise is all there
            is.
        noise_ess: Effective number of the noise points of a step, as a proposal for
            the model.
        noise_k: Pareto shape of their weights; above 0.7 importance sampling fails.
        gain: How much better the model is than its base on held-out points.
        noise_separation: Probability that a datum is told from a noise point; 0.5 says
            that they are alike, 1 that the comparison teaches nothing.
        learned_gap: (1) of the correction of a base that this fit has fitted: the
            nearer to 0 of that at held-out and at training rows, and 0 between them.
        crossings: Passages of a chain from one side of the data to the other in the
            last tenth of the steps, over a finite support: a mean that that run
            implies. Fewer than 1 leave the weights of the sides to chance.

    Example:
        >>> data = torch.randn(500, 2)
        >>> model = pyro_ebm.EnergyModel(pyro_ebm.energies.NeuralEnergy((2,), (8,)))
        >>> objective = pyro_ebm.infer.MaximumLikelihood()
        >>> found = pyro_ebm.fit(
        ...     model, data, objective, num_steps=10, progress_bar=False
        ... ).diagnostics
        >>> found.num_moves, 0 < found.acceptance < 1, found.noise_ess
        (10, True, None)
    """

    energy_gap: EnergyDifference | None = None
    drift: EnergyDifference | None = None
    r_hat: float | None = None
    ess: float | None = None
    num_moves: int = 0
    acceptance: float | None = None
    chain_age: float | None = None
    chain_lag: float | None = None
    gradient_snr: float | None = None
    noise_ess: float | None = None
    noise_k: float | None = None
    noise_separation: float | None = None
    gain: LogLikelihood | None = None
    crossings: float | None = None
    learned_gap: EnergyDifference | None = None


class FitRecord(NamedTuple):
    r"""One record of the history; all but the loss belong to the averaged parameters.

    Attributes:
        step: Parameter steps so far.
        loss: Negative log-likelihood a point of the last batch at the iterate, in nats.
        train: Mean log-likelihood of training points, with error.
        validation: That of the validation points, or ``None``.
        log_partition: :math:`\log Z` with its verdict.
        stage: Which stage the step belongs to, from 0.
        energy_gap: Mean energy of training points less that of the model, or ``None``
            while log Z is unknown.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> model, data = pyro_ebm.EnergyModel(energy), torch.randn(50, 2)
        >>> settings = {"num_steps": 4, "record_interval": 2, "progress_bar": False}
        >>> result = pyro_ebm.fit(model, data, **settings)
        >>> [record.step for record in result.history]
        [0, 2, 4]
    """

    step: int
    loss: float
    train: LogLikelihood
    validation: LogLikelihood | None
    log_partition: LogPartitionEstimate
    stage: int = 0
    energy_gap: EnergyDifference | None = None


@torch.no_grad()
def energy_gap(
    energy_model: EnergyModel,
    data: Tensor,
    *,
    of_correction: bool = False,
    num_draws: int = _NUM_RESAMPLED,
) -> EnergyDifference | None:
    """Gap (1) of the averaged parameters, ``None`` while log Z is unknown.

    Args:
        energy_model: With walkers, or a closed form.
        data: Shape ``(N, *event)``.
        of_correction: Whether to leave out the energy of the base.
        num_draws: Of the model, where they come from weighted ones.
    """
    tracker = energy_model.log_partition
    energy = tracker.averaged_energy
    flat, to_support = unconstrained(energy)

    def at(x: Tensor) -> Tensor:
        return energy.correction(x) if of_correction else flat(to_support.inv(x))

    if tracker.is_closed_form:
        known = energy.closed_form()
        draws = known.distribution.sample((1000,)) if known is not None else data
        values = at(draws)
        mean, error = values.mean(), values.std() / math.sqrt(len(values))
    elif tracker.draws is not None:
        found = tracker.draws
        values = at(found.resampled(energy, num_draws))
        count = min(num_draws, found.effective_fraction(energy) * len(found.x))
        mean, error = values.mean(), values.std() / math.sqrt(count)
    elif tracker.walkers.is_started and tracker.averaged().is_reliable:
        u = tracker.walkers.u
        corrections = at(to_support(u)) if of_correction else None
        mean, error = _walker_mean(energy_model, corrections)
    else:
        return None
    at_data = at(data)
    data_error = at_data.std() / math.sqrt(len(at_data))
    value, spread = at_data.mean() - mean, at_data.std()
    return _difference(value, torch.hypot(error, data_error), spread)


def learned_gap(
    energy_model: EnergyModel, held_out: Tensor, train: Tensor
) -> EnergyDifference | None:
    """Gap (1) of what corrects the base, ``None`` while log Z is unknown.

    What has begun to learn rows by heart lies below 0 at these and above at others, at
    its best too: so this is the nearer to 0 of the two, or 0 if that is between them.

    Args:
        energy_model: With a base that stays as it is.
        held_out: Rows that nothing was learned from, shape ``(N, *event)``.
        train: Rows that it was learned from, shape ``(M, *event)``.
    """
    with torch.random.fork_rng(devices=[]):  # what follows draws as without
        one = energy_gap(energy_model, held_out, of_correction=True)
        other = energy_gap(energy_model, train, of_correction=True)
    if one is None or other is None:
        return None
    if one.value * other.value <= 0:
        return EnergyDifference(0.0, max(one.std_error, other.std_error), 0.0)
    return min(one, other, key=lambda gap: abs(gap.value))


def _walker_mean(
    energy_model: EnergyModel, energies: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean energy of the walkers, or of their ``energies``, ``(islands, walkers)``.

    With the larger of two standard errors.
    """
    walkers = energy_model.log_partition.walkers
    energies = walkers.energy if energies is None else energies
    energies = energies.masked_fill(~energies.isfinite(), 0.0)
    own = (walkers.log_weights.softmax(1) * energies).sum(1)
    weights = walkers.pooled_log_weights.flatten().softmax(0)
    mean = weights @ energies.flatten()
    variance = weights @ (energies.flatten() - mean).square()
    between = own.std() / math.sqrt(len(own))
    return mean, torch.maximum(between, (variance / walkers.ess()).sqrt())


def diagnose(
    energy_model: EnergyModel,
    objective: Objective,
    state: nn.Module,
    data: Tensor,
    num_steps: int,
    batch_size: int,
) -> FitDiagnostics:
    """Measure drift, mixing and overlap at the final, unaveraged parameters.

    Args:
        energy_model: Before its average is adopted.
        objective: Of the last stage.
        state: Its.
        data: Shape ``(N, *event)``.
        num_steps: Parameter steps taken with the objective.
        batch_size: Points a step.
    """
    found = _overlap(energy_model, objective, state, data, batch_size)
    setting = objective.mover(energy_model.energy, state)
    if setting is None:
        return found
    kernel, per_step = setting
    points = objective.negatives(energy_model(), state)
    if points is None:
        return found
    # 2 % of all moves of the stage, and at least enough to see something.
    num_moves = min(max(num_steps * per_step // 50, 10), 100)
    energy = energy_model.energy
    sides = _Sides(data) if is_finite_support(energy.support) else None
    energies, acceptance = _run_at_rest(energy, points, kernel, num_moves, sides)
    age = objective.chain_age(num_steps)
    ess = bulk_ess(energies[:, 1:]).item()
    return found._replace(
        drift=_drift(energies),
        r_hat=nested_r_hat(energies[:, 1:], 1).item(),
        ess=ess,
        num_moves=num_moves,
        acceptance=acceptance,
        chain_age=age,
        chain_lag=energies[:, 1:].numel() / ess / per_step,
        crossings=None if sides is None or age is None else sides.rate() * age / 10,
    )


class _Sides:
    """On which side of the data chains are, and how often they have changed it."""

    def __init__(self, data: Tensor) -> None:
        self.centre, centred = data.mean(0).flatten(), data.flatten(1)
        centred = centred - self.centre
        self.direction = centred[centred.square().sum(1).argmax()]
        for _ in range(30):  # towards that of largest variance
            moved = (centred @ self.direction) @ centred
            self.direction = moved / moved.norm().clamp(min=1e-12)
        self.seen: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        """Note where chains are; ``x`` has shape ``(C, *event)``."""
        x = x.to(self.centre).flatten(1)
        self.seen.append((x - self.centre) @ self.direction > 0)

    def rate(self) -> float:
        """Passages of a chain in a move."""
        return torch.stack(self.seen).diff(dim=0).double().mean().item()


@torch.no_grad()
def _run_at_rest(
    energy: Energy,
    points: Tensor,
    kernel: Kernel,
    num_moves: int,
    sides: _Sides | None = None,
) -> tuple[Tensor, float]:
    """Energies ``(C, num_moves + 1)`` from the start on, and the mean acceptance."""
    flat, to_support = unconstrained(energy)
    state = replace_nonfinite(kernel.init(flat, to_support.inv(points)))
    if kernel.has_step_size and not isinstance(kernel.step_size, Tensor):
        kernel = kernel.with_step_size(find_step_size(kernel, flat, state))
    energies, accepted = [state.energy], []
    for _ in range(num_moves):
        state, info = kernel.step(flat, state)
        if sides is not None:
            sides.see(state.x)
        energies.append(state.energy)
        accepted.append(info.accept_prob.mean())
    return torch.stack(energies, -1), torch.stack(accepted).mean().item()


def _drift(energies: Tensor) -> EnergyDifference:
    """Mean of the last quarter less the start, paired by chain."""
    late = energies[:, -max(energies.shape[1] // 4, 1) :]
    change = late.mean(1) - energies[:, 0]
    error = change.std() / math.sqrt(len(change))
    return _difference(change.mean(), error, late.std())


def _difference(value: Tensor, error: Tensor, spread: Tensor) -> EnergyDifference:
    relative = (value / spread).nan_to_num(0.0) if spread == 0 else value / spread
    return EnergyDifference(value.item(), error.item(), relative.item())


@torch.no_grad()
def _overlap(
    energy_model: EnergyModel,
    objective: Objective,
    state: nn.Module,
    data: Tensor,
    batch_size: int,
) -> FitDiagnostics:
    noise = objective.current_proposal(energy_model(), state)
    if noise is None:
        return FitDiagnostics()
    energy = energy_model.energy
    y = noise.sample(torch.Size((_NUM_NOISE,)))
    y, x = y.to(**energy.tensor_options(y)), data[:_NUM_NOISE]
    at_noise = -energy(y) - noise.log_prob(y).to(y)
    at_data = -energy(x) - noise.log_prob(x).to(x)
    finite = at_noise.nan_to_num(nan=-torch.inf, posinf=torch.inf)
    fraction = effective_sample_fraction(finite).item()
    order = torch.searchsorted(at_noise.sort().values, at_data)
    return FitDiagnostics(
        noise_ess=fraction * objective.num_proposed(batch_size),
        noise_k=pareto_k(finite),
        noise_separation=order.double().mean().item() / _NUM_NOISE,
    )


def judge(
    found: FitDiagnostics,
    log_partition: LogPartitionEstimate,
    stopped: str,
    history: Sequence[FitRecord] = (),
    known: Sequence[Finding] = (),
    num_steps: int | None = None,
) -> tuple[Finding, ...]:
    """Apply all rules; return the findings, the gravest first.

    Args:
        found: From the end of the fit.
        log_partition: Of the averaged model.
        stopped: Why the fit ended.
        history: Of the fit.
        known: What is known against the estimator without looking at the fit.
        num_steps: Of a fit that began with independent sites, and may have been ended
            before it has learned more.
    """
    broken: list[Finding] = []
    if stopped == "loss not finite":
        nan = "the loss became nan or infinite; the model is that of the last record"
        broken.append(Finding(Reason.LOSS_NOT_FINITE, nan))
    broken += known
    broken += [Finding(Reason.NOISE_TOO_FAR, text) for text in _noise_faults(found)]
    broken += [
        Finding(Reason.NOT_AT_EQUILIBRIUM, text) for text in _equilibrium_faults(found)
    ]
    if not log_partition.is_reliable:
        broken.append(Finding(Reason.UNKNOWN_LOG_PARTITION, log_partition.reason))
    gain = found.gain
    if gain is not None and gain.value < -NUM_ERRORS / 2 * gain.std_error - SMALL:
        broken.append(worse_than_base(gain))
    broken += [Finding(Reason.STILL_LEARNING, text) for text in _progress(history)]
    is_short = num_steps is not None and num_steps < MIN_STEPS
    if is_short and gain is not None and gain.value < NUM_ERRORS / 2 * gain.std_error:
        nothing = (
            f"in {num_steps} steps the model has gained {gain.value:.3f} +- "
            f"{gain.std_error:.3f} nats a point on independent sites, which may be "
            f"chance: take at least {MIN_STEPS:,}"
        )
        broken.append(Finding(Reason.STILL_LEARNING, nothing))
    return tuple(broken)


def worse_than_base(gain: LogLikelihood) -> Finding:
    """What is said of a model that has gained less than nothing."""
    return Finding(
        Reason.WORSE_THAN_BASE,
        f"on held-out points the model is worse than its base by {-gain.value:.3f} "
        f"+- {gain.std_error:.3f} nats a point: take the base, or an energy that "
        "corrects it, such as NeuralEnergy. Where the base was fitted here, it is the "
        "distribution of the result",
    )


def _noise_faults(found: FitDiagnostics) -> list[str]:
    faults = []
    if found.noise_ess is not None and found.noise_ess < MIN_NOISE_ESS:
        faults.append(
            f"of the noise points of a step only {found.noise_ess:.1f} count: draw "
            "more, or fit the noise to the data"
        )
    separation = found.noise_separation
    if separation is not None and separation > MAX_SEPARATION:
        faults.append(
            f"data are told from noise in {separation:.1%} of pairs, so the comparison "
            "teaches next to nothing: fit the noise to the data"
        )
    return faults


def _equilibrium_faults(found: FitDiagnostics) -> list[str]:
    faults = []
    if _is_off(found.drift):
        faults.append(
            f"the mean energy of the chains moves by {found.drift} once the parameters "
            "hold still: lower the learning rate, or give the chains more moves a step"
        )
    elif found.r_hat is not None and found.r_hat > MAX_R_HAT:
        faults.append(
            f"nested R-hat of the chains' energies is {found.r_hat:.3f}, above "
            f"{MAX_R_HAT}: lower the learning rate, or give them more moves a step"
        )
    if found.crossings is not None and found.crossings < 1:
        faults.append(
            "in the last tenth of the steps a chain has gone from one side of the data "
            f"to the other {found.crossings:.2g} times, so that the weights of the "
            "sides are left to chance: take more steps, or more moves a step"
        )
    is_base = found.learned_gap is not None and not _is_off(found.learned_gap)
    if _is_off(found.energy_gap) and not is_base:
        faults.append(
            f"the energy of the data differs from that of the model by "
            f"{found.energy_gap}: go on with more steps, or end with "
            "MaximumLikelihood at a lower learning rate"
        )
    return faults


def _progress(history: Sequence[FitRecord]) -> list[str]:
    """What the likelihood has gained in the last quarter of the last stage."""
    if not history:
        return []
    records = [r for r in history if r.stage == history[-1].stage]
    if len(records) < 2:
        return []
    late, early = records[-1], records[-1 - max(len(records) // 4, 1)]
    held_out = late.validation is not None
    pair = [r.validation if held_out else r.train for r in (late, early)]
    new, old = (value for value in pair if value is not None)
    error = math.hypot(new.std_error_log_partition, old.std_error_log_partition)
    gain = new.value - old.value
    if not new.is_normalized or not old.is_normalized:
        return []
    if gain < max(NUM_ERRORS * error, SMALL):
        return []
    return [
        f"the {'held-out' if held_out else 'training'} log-likelihood still rose by "
        f"{gain:.3f} in the last {late.step - early.step:,} steps: go on with more"
    ]


def _is_off(difference: EnergyDifference | None) -> bool:
    return (
        difference is not None
        and abs(difference.value) > NUM_ERRORS * difference.std_error
        and abs(difference.relative) > math.sqrt(2 * SMALL)  # (2)
    )
