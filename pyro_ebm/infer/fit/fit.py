"""Fitting an energy to data in one call."""

__all__ = ["fit"]

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.core.verdict import Reason, Status, status_of
from pyro_ebm.distributions import EnergyDistribution, EnergyModel
from pyro_ebm.energies import DistributionEnergy
from pyro_ebm.energies.views.pointwise import check_pointwise
from pyro_ebm.infer.fit.automatic import (
    FEW_DIMENSIONS,
    Plan,
    WeightedSteps,
    chains_instead,
)
from pyro_ebm.infer.fit.diagnosis import (
    MIN_STEPS,
    EnergyDifference,
    FitDiagnostics,
    FitRecord,
    diagnose,
    energy_gap,
    judge,
    learned_gap,
    worse_than_base,
)
from pyro_ebm.infer.fit.fit_result import FitResult, FitTimings, require_counts
from pyro_ebm.infer.fit.optimiser import (
    Centring,
    FitOptim,
    GradientNoise,
    contrast,
    decay_by_gap,
    require_parameters,
)
from pyro_ebm.infer.fit.points import Points, as_points
from pyro_ebm.infer.fit.settling import settled_log_partition, with_other_base
from pyro_ebm.infer.fit.stages import ObjectiveSteps, Stage, as_stages, begin_chains
from pyro_ebm.infer.handler import state_for
from pyro_ebm.infer.likelihood import (
    LogLikelihood,
    likelihood_of,
    log_likelihood,
    log_likelihood_difference,
    mean_and_error,
)
from pyro_ebm.infer.objectives.objective import Objective
from pyro_ebm.mcmc import ImportanceResampling
from pyro_ebm.partition import estimate
from pyro_ebm.partition.tracking.weighted_draws import WeightedDraws

_LOG = logging.getLogger(__name__)
#: Wall-clock time of a fit that is told none.
_SECONDS = 60.0
#: Steps over a finite support between two moves of the walkers, and two checks.
_FINITE_INTERVALS = 60, 3000
#: Points at which the energy is checked.
_NUM_CHECKED = 8
#: Rows, and draws of the model, that the curve of the energy gap is read off.
_FOR_CURVE = 1000
#: Records without a better one, and the model still counts as getting better.
_STILL_BEST = 3


def fit(
    energy_model: EnergyModel,
    data: Any,
    objective: Objective | Sequence[Stage] | Literal["auto"] = "auto",
    *,
    weights: Any = None,
    num_steps: int | None = None,
    max_seconds: float | None = None,
    batch_size: int = 256,
    optim: Any = None,
    max_grad_norm: float | None = None,
    validation_data: Any = None,
    record_interval: int | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callable[[FitRecord], Any]] = (),
    progress_bar: bool = True,
) -> FitResult:
    r"""Fit an energy model to data.

    Told nothing else, it holds out a seventh of the data, fits a density to the others
    where the model has no base (:func:`pyro_ebm.bases.fit`), and learns the energy by
    maximum likelihood: a network without a base as a correction of that density, which
    starts as none. Log Z comes from draws of the base while enough of them count, then
    from chains (:mod:`~pyro_ebm.infer.fit.automatic`). The best record by the held-out
    likelihood is kept, or the start, where the gain is less than two standard errors:
    the model is never much worse than its base. Of fewer than 20 rows none is held out,
    and a network stays its base. Of fewer than 10,000, without ``num_steps``, the base
    is fitted once more at the end, to the rows held out too, if there is time, and
    mixed with the first: what the result says of these is of the model before that.

    The model is trained in place; at the end its parameters are the averaged ones, to
    which the returned :math:`\log Z` belongs: it is followed whatever the objective is,
    through all stages. Pyro's parameter store is left as it was, and the model in
    ``eval()``.

    ``print(result)`` says what came out, and whether to believe it: at the end the
    energy gap, chains, gradients and noise are examined (see
    :class:`~pyro_ebm.infer.FitDiagnostics`), for about 2 % of the moves of the fit.

    Args:
        energy_model: What is fitted. An energy that does not correct its base has to
            learn all of the density; where it ends below a base that was fitted here,
            the verdict says so and the result's distribution is the base.
        data: Points of shape ``(N, *event)``: a tensor, an array, a table of pandas, a
            ``Dataset``, or a ``DataLoader``, of which a batch at a time is in memory.
            Entries of vectors that are ``nan`` are missing (at random, given the
            others): they are drawn from the model's conditional while it learns.
        objective: The estimator; default: the likelihood, as said above. Or a list of
            :class:`~pyro_ebm.infer.Stage`, each an objective with its steps.
        weights: Of the rows of the data, shape ``(N,)`` and nonnegative: in learning,
            in the fit of the base, and in the likelihoods that are reported. A weight
            of 2 counts as the row twice. Default: all equal.
        num_steps: Parameter steps, at most; default 4,000, and 2,000 with an estimator
            given; stages have their own.
        max_seconds: Seconds, by the clock or by the processor where others share it, in
            which base, steps and the final log Z by draws of the base end; default:
            60, and no limit with an estimator given.
        batch_size: Points a step, drawn without replacement within an epoch.
        optim: A Pyro optimiser or scheduler, or a torch optimiser of the model's
            parameters, or a ``torch.optim.lr_scheduler`` of one, which also moves what
            the objective learns. Schedulers advance at each step, those that wait for a
            plateau at each record. Default: Adam with a learning rate that falls from
            2e-3 to little; of 1e-3 with an estimator given.
        max_grad_norm: Longer gradients are shortened to this norm; default: 5, and as
            they are with an estimator given.
        validation_data: Held-out points; their log-likelihood is recorded. Default: a
            part of the data, and none with an estimator given.
        record_interval: Steps between two records of the history; default: 100, or a
            hundredth of the steps where the support is finite.
        patience: Records without a better validation log-likelihood after which a
            stage stops and goes back to its best one; default: 15, and never with an
            estimator given.
        callbacks: Functions called with each record; if one returns ``True`` the fit
            stops there.
        progress_bar: Show a bar with log-likelihood, energy gap, log Z and acceptance.

    Returns:
        The averaged model with what was measured of it; log Z and likelihoods in nats.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the data are not finite, have another event shape, vary by less
            than the model's dtype tells apart, or are outside the support, if the
            weights do not fit them, if the base that the model was given does not cover
            them, if ``patience`` is given without validation data, ``num_steps`` with
            stages, or if a count is not positive.
        DivergenceError: If no chain can move any more; the model is then left as it
            was at the last record.

    Exactness: the final log Z is that of :func:`pyro_ebm.partition.estimate` for the
    averaged parameters, *exact* if its status says so, else *consistent*; that of the
    history is tracked, *consistent* in the number of walkers. ``log_partition.status``
    says whether to believe it.

    Example:
        >>> data = torch.randn(500, 2)
        >>> base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> energy = pyro_ebm.energies.NeuralEnergy((2,), (16,), base=base)
        >>> model = pyro_ebm.EnergyModel(energy, base)
        >>> result = pyro_ebm.fit(model, data, num_steps=20, progress_bar=False)
        >>> result.num_steps, result.stopped, result.verdict  # too few steps
        (20, 'finished', 'not at equilibrium')
    """
    _check_settings(energy_model, callbacks, max_grad_norm)
    is_automatic = isinstance(objective, str) and objective == "auto"
    stages = [] if is_automatic else as_stages(objective, num_steps)
    require_counts(batch_size=batch_size, record_interval=record_interval)
    require_counts(patience=patience, num_steps=num_steps)
    points = as_points("data", data, energy_model, weights, may_miss=is_automatic)
    needs_rows = None if is_automatic else patience
    held_out = _held_out(validation_data, energy_model, needs_rows)
    began = time.perf_counter(), time.process_time()
    limits = num_steps, max_seconds
    plan = _plan(energy_model, points, held_out, stages, *limits, bar=progress_bar)
    run = _Fit(energy_model, plan, patience, is_automatic=is_automatic)
    run.began = began
    run.batch_size = batch_size
    run.record_interval = record_interval or plan.record_interval
    _space_out(energy_model, plan, run.record_interval)
    run.callbacks = callbacks
    if max_grad_norm is not None or not is_automatic:
        run.max_grad_norm = max_grad_norm
    return run.run(optim, progress_bar=progress_bar)


def _check_settings(
    energy_model: Any, callbacks: Any, max_grad_norm: float | None
) -> None:
    """Check what is fitted, what is called at records, and the bound of the gradient.

    Raises:
        TypeError: If it is no :class:`~pyro_ebm.EnergyModel`, or ``callbacks`` no
            sequence of callables.
        ValueError: If ``max_grad_norm`` is not positive.
    """
    if not isinstance(energy_model, EnergyModel):
        raise TypeError(
            f"energy_model must be an EnergyModel, got {type(energy_model).__name__}. "
            "Wrap an energy: EnergyModel(energy, base)."
        )
    if not isinstance(callbacks, Sequence):
        raise TypeError(
            "callbacks must be a list of functions of a FitRecord, got "
            f"{callbacks!r}. A single one stands in a list, too."
        )
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(
                "callbacks must hold functions of a FitRecord, got "
                f"{type(callback).__name__} {callback!r}."
            )
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        raise ValueError(
            f"max_grad_norm must be positive and finite, got {max_grad_norm}. Leave it "
            "out for gradients as they are."
        )


def _held_out(data: Any, model: EnergyModel, patience: int | None) -> Tensor | None:
    if data is not None:
        return as_points("validation_data", data, model).rows
    if patience is not None:
        raise ValueError(
            f"patience is {patience} but validation_data is None: early stopping needs "
            "held-out points. Give validation_data or leave patience out."
        )
    return None


def _space_out(model: EnergyModel, plan: Plan, record_interval: int) -> None:
    """Track log Z over a finite support in proportion to what a step costs there."""
    tracker = model.log_partition
    is_dear = tracker.is_closed_form or not plan.stages[0].objective.needs
    if plan.decays and is_dear:  # a sum or many sweeps, beside cheap steps
        tracker.interval = record_interval
    elif plan.decays:  # walkers cost as much as a few steps, and as many runs of theirs
        tracker.interval, tracker.check_interval = _FINITE_INTERVALS


def _plan(
    model: EnergyModel,
    points: Points,
    held_out: Tensor | None,
    stages: list[Stage],
    num_steps: int | None,
    max_seconds: float | None,
    *,
    bar: bool,
) -> Plan:
    """How the fit is to go; without stages that is chosen."""
    if stages:
        return Plan.given(model, points, held_out, stages, max_seconds)
    seconds = _SECONDS if max_seconds is None else max_seconds
    return Plan.automatic(model, points, held_out, num_steps, seconds, progress_bar=bar)


class _Saved(NamedTuple):
    """A point to go back to."""

    model: Any
    state: Any
    draws: WeightedDraws | None = None  # that log Z came from


class _Fit:
    """The state of one call of :func:`fit`."""

    batch_size: int
    record_interval: int
    callbacks: Sequence[Callable[[FitRecord], Any]]
    max_grad_norm: float | None = 5.0

    def __init__(
        self,
        model: EnergyModel,
        plan: Plan,
        patience: int | None,
        *,
        is_automatic: bool,
    ) -> None:
        self.model, self.plan = model, plan
        self.validation_data, self.weights = plan.held_out, plan.held_out_weights
        self.is_automatic = is_automatic
        # The training curve is read off at most 2,000 points, always the same.
        self.train_data = plan.train.some(2000)
        default = plan.patience if is_automatic else math.inf
        self.patience = default if patience is None else patience
        self.stages, self.proposal = list(plan.stages), plan.proposal
        self.state = nn.Module()
        self.best_value, self.best = -math.inf, _Saved({}, {})
        rows = 2 if self.validation_data is None else len(self.validation_data)
        # Until log Z is known: a start that has none is worse than what has one.
        self.start, self.start_values = self.best, torch.full((rows,), -math.inf)
        self.best_values = self.start_values
        self.noise = GradientNoise([])
        self.history: list[FitRecord] = []
        self.steps_of_stages: list[int] = []
        self.began = time.perf_counter(), time.process_time()
        self.step_seconds, self.next_look, self.seconds_each = 0.0, 0.0, 0.0
        self.decays, self.decay, self.shares = False, 0.0, torch.empty(0)
        self.known: dict[int, Tensor] = {}  # of the energy at rows

    @property
    def num_steps(self) -> int:
        """Parameter steps so far."""
        return sum(self.steps_of_stages)

    def run(self, optim: Any, *, progress_bar: bool) -> FitResult:
        """Take all steps, and examine the fit."""
        self.model.train()
        check_pointwise(self.model.energy, self.plan.train.rows[:_NUM_CHECKED])
        total = sum(stage.num_steps for stage in self.plan.stages)
        with tqdm(total=total, disable=not progress_bar, desc="fit") as bar:
            stopped = self.all_stages(self.plan.train, optim, bar)
        self.model.eval()  # from here on log Z is a number
        return self.result(stopped)

    def all_stages(self, data: Points, optim: Any, bar: Any) -> str:
        """Take the steps of all stages; return why they ended."""
        if optim is None:
            require_parameters(self.model)
            if self.is_automatic:
                optim, self.decays = self.plan.optim(self.model), self.plan.decays
            else:
                optim = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        given = [stage.optim or optim for stage in self.stages]
        optims = [FitOptim.of(o, self.model, self.max_grad_norm) for o in given]
        if self.decays:
            optims[0].centring = Centring.of(self.model.energy, self.train_data)
        batch_size = min(self.batch_size, len(data.rows))
        batches, last = data.batches(batch_size, self.model), nn.Module()
        stopped = "finished"
        for index in itertools.count():
            stage, stage_optim = self.stages[index], optims[min(index, len(optims) - 1)]
            self.noise = stage_optim.noise
            self.steps_of_stages.append(0)
            with pyro.get_param_store().scope():
                self.state = state_for(stage.objective, self.model)
                stage_optim.add(self.state)
                if self.num_steps and self.state is not last:
                    begin_chains(self.model, stage.objective, self.state)
                steps = self._steps(stage.objective, stage_optim)
                try:
                    stopped = self._stage(steps, stage, batches, bar)
                finally:
                    stage_optim.remove_added()
            last = self.state
            if stopped == "importance failed":
                self.model.log_partition.follow_by(self.model.energy, None)
                left = stage.num_steps - self.steps_of_stages[-1]
                self.stages.append(chains_instead(left))
                self.proposal = None
            elif stopped not in ("finished", "early stopping"):
                break
            if index + 1 == len(self.stages):
                break
        return stopped

    def _steps(
        self, objective: Objective, optim: FitOptim
    ) -> WeightedSteps | ObjectiveSteps:
        if self.proposal is None:
            return ObjectiveSteps(self.model, optim, objective, self.state)
        return WeightedSteps(self.model, optim, self.proposal, self.train_data)

    def result(self, stopped: str) -> FitResult:
        """The fit, examined; from its start where it has made the model worse."""
        found = self._examined(stopped)
        gain = found.gain
        if not self.is_automatic or gain is None or found.validation is None:
            return found
        start, _ = mean_and_error(self.start_values, self.weights)
        if start > found.validation.value + gain.std_error:
            self._go_back(self.start)
            found = self._examined(stopped)
            gain = found.gain
        is_worse = gain is not None and gain.value < -gain.std_error
        if is_worse and self.plan.base:
            return self._base_instead(found)
        return self._with_base_of_all(found)

    def _with_base_of_all(self, found: FitResult) -> FitResult:
        """The fit with its base fitted once more, to the rows held out too.

        What is said of these stays that of the fit that has not seen them.
        """
        again, plan, before = None, self.plan, found.held_out_log_prob
        if self.proposal is not None and found.status is Status.OK:
            again = plan.base_of_all(self.model)
        if again is None or before is None or plan.held_out is None or not plan.base:
            return found
        at = plan.held_out, before, self._limits()
        better = with_other_base(self.model, again, self.proposal, *at)
        if better is None:
            return found
        distribution, log_partition = better
        return found._replace(
            distribution=distribution,
            log_partition=log_partition,
            train=log_likelihood(distribution, self.train_data),
            base=plan.base._replace(distribution=again),
        )

    def _base_instead(self, found: FitResult) -> FitResult:
        """The fit with its base in place of an energy that corrects none and is worse.

        The model keeps what it has learned, and the verdict says so.
        """
        held_out, gain = cast(Tensor, self.validation_data), found.gain
        others = tuple(f for f in found.reasons if f.reason != Reason.WORSE_THAN_BASE)
        energy = DistributionEnergy(self.model.base)
        base = EnergyDistribution(energy)
        return found._replace(
            distribution=base,
            log_partition=estimate(energy, progress_bar=False),
            train=log_likelihood(base, self.train_data),
            validation=self._likelihood(base, held_out),
            diagnostics=found.diagnostics._replace(gain=self._gain(base, held_out)),
            held_out_log_prob=_log_prob(base, held_out),
            status=Status.UNRELIABLE,
            reasons=(*others, worse_than_base(cast(LogLikelihood, gain))),
        )

    def _limits(self) -> tuple[float, float]:
        """Seconds for log Z, a tenth more than there are, and those of a draw."""
        left = max(self.plan.left(0.0), 0.0) + self.plan.max_seconds / 10
        return left, self.seconds_each

    def _examined(self, stopped: str) -> FitResult:
        """Examine the fit, and make the average the model."""
        model, taken = self.model, self.steps_of_stages
        last = self.stages[len(taken) - 1].objective
        found = self._diagnosed(last)
        model.adopt_average()
        found = found._replace(learned_gap=self._learned_gap())
        at_best = self.train_data if not self.is_automatic else self.validation_data
        gap = energy_gap(model, self.train_data if at_best is None else at_best)
        log_partition = settled_log_partition(model, self.proposal, *self._limits())
        # Another fit must not change it.
        distribution = copy.deepcopy(model.averaged(log_partition))
        if self.proposal is not None and model.sampler is None:
            distribution.sampler = ImportanceResampling(self.proposal)
        held_out = self.validation_data
        gain = None if held_out is None else self._gain(distribution, held_out)
        snr = self.noise.signal_to_noise()
        found = found._replace(energy_gap=gap, gradient_snr=snr, gain=gain)
        # What keeps an estimator from the truth in general is no fault of a fit.
        bias = [f for f in last.bias() if f.reason is Reason.BIASED_KERNEL]
        is_short = self.plan.decays and self.num_steps < MIN_STEPS
        history = self.history if is_short or not self.is_automatic else []
        steps = self.num_steps if self.plan.decays else None
        reasons = judge(found, log_partition, stopped, history, bias, steps)
        return FitResult(
            distribution,
            log_partition,
            self.history,
            self.num_steps,
            stopped,
            copy.deepcopy(self.state),
            log_likelihood(distribution, self.train_data),
            None if held_out is None else self._likelihood(distribution, held_out),
            tuple((s.name, n) for s, n in zip(self.stages, taken, strict=False)),
            self._timings(),
            found,
            status_of(reasons),
            reasons,
            self.plan.base,
            None if held_out is None else _log_prob(distribution, held_out),
        )

    def _timings(self) -> FitTimings:
        wall, cpu = self.began
        each = self.step_seconds / max(self.num_steps, 1)
        return FitTimings(time.perf_counter() - wall, time.process_time() - cpu, each)

    def _gain(self, learned: EnergyDistribution, held_out: Tensor) -> LogLikelihood:
        base = EnergyDistribution(DistributionEnergy(self.model.base))
        return log_likelihood_difference(learned, base, held_out, self.weights)

    def _likelihood(self, learned: EnergyDistribution, x: Tensor) -> LogLikelihood:
        return log_likelihood(learned, x, self.weights)

    def _diagnosed(self, objective: Objective) -> FitDiagnostics:
        steps = self.steps_of_stages[-1]
        return diagnose(
            self.model, objective, self.state, self.train_data, steps, self.batch_size
        )

    def _learned_gap(self) -> EnergyDifference | None:
        """That of what corrects a base that was fitted here."""
        held_out = self.validation_data
        if self.plan.keeps_base:
            return EnergyDifference(0.0, 0.0, 0.0)
        if self.plan.base is None or held_out is None:
            return None
        return learned_gap(self.model, held_out, self.train_data)

    def _stage(
        self, steps: Any, stage: Stage, batches: Iterator[Tensor], bar: Any
    ) -> str:
        """Take the steps of a stage; return why they ended."""
        last_good = self._begin_stage(steps.optim, bar)
        stopped: str | None = None
        try:
            for left in reversed(range(stage.num_steps)):
                loss = self._step(steps, next(batches), bar)
                if not math.isfinite(loss):
                    self._go_back(last_good)
                    return "loss not finite"
                is_late = self._is_late(steps)
                is_last = is_late or (self.is_automatic and not left)
                if self.num_steps % self.record_interval and not is_last:
                    continue
                if not self._is_finite():
                    self._go_back(last_good)
                    return "loss not finite"
                if isinstance(steps, WeightedSteps):
                    steps.look_afresh()
                record = self._record(loss, steps.optim, bar)
                last_good = self._saved()
                if self.num_worse == 0:
                    self.best = last_good
                stopped = self._why_stop(steps, record, is_late=is_late)
                if stopped is not None:
                    break
        except KeyboardInterrupt:
            return "interrupted"
        except DivergenceError:
            self._go_back(last_good)
            raise
        stopped = stopped or "finished"
        chooses = self.is_automatic and self.validation_data is not None
        if self.plan.keeps_base:
            self._go_back(self.start)
            stopped = "too few rows"
        elif stopped == "early stopping" or (chooses and stopped != "callback"):
            self._go_back(self.start if chooses and self._is_chance() else self.best)
        return stopped

    def _begin_stage(self, optim: FitOptim, bar: Any) -> _Saved:
        """Forget the best of the stage before; return where this one begins."""
        last_good = self._saved()
        self.num_worse = 0
        if not self.is_automatic:
            self.best_value, self.best = -math.inf, last_good
        elif not self.history:
            self._record(math.nan, optim, bar)  # where it may end
            self.start = self.best = last_good = self._saved()
            self.start_values = self.best_values
        return last_good

    def _is_chance(self) -> bool:
        """Whether held-out points like the best record no more than by chance.

        Two standard errors, as the same points have chosen the record; of few points
        more, by Student's law.
        """
        gains = self.best_values - self.start_values
        gain, error = mean_and_error(gains, self.weights)
        number = len(gains)
        if self.weights is not None:
            number = int((self.weights > 0).sum())
        freedom = max(number - 1, 1)
        return gain < (2 + 2.5 / freedom + 3 / freedom**2) * error

    def _why_stop(self, steps: Any, record: FitRecord, *, is_late: bool) -> str | None:
        """Why a stage ends after a record, or ``None``."""
        if True in [callback(record) is True for callback in self.callbacks]:
            return "callback"
        if self.num_worse >= self.patience:
            return "early stopping"
        if is_late:
            return "out of time"
        if not isinstance(steps, WeightedSteps):
            return None
        if steps.keeps_up():
            self.proposal = steps.proposal
            return None
        # Chains are for a model that still got better, in many dimensions; in few
        # it has gone astray, where a density that is fitted to it is no help.
        is_rising = self.num_worse < _STILL_BEST
        is_large = self.model.energy.event_shape.numel() > FEW_DIMENSIONS
        return "importance failed" if is_rising and is_large else "early stopping"

    def _step(self, steps: Any, batch: Tensor, bar: Any) -> float:
        began = time.perf_counter()
        loss: float = steps.step(batch)
        if math.isfinite(loss):
            steps.optim.advance_schedule()
            self.steps_of_stages[-1] += 1
        else:
            at = self.num_steps + 1
            _LOG.warning("loss is %s at step %d; the fit stops", loss, at)
        bar.update()
        self.step_seconds += time.perf_counter() - began
        return loss

    def _is_late(self, steps: Any) -> bool:
        """Whether the time is over; looked up every 100 ms, as that takes some."""
        now = time.monotonic()
        if now < self.next_look:
            return False
        self.next_look = now + 0.1
        self.seconds_each = getattr(steps, "seconds_each", 0.0)
        return self.plan.left(self.seconds_each) < 0

    def _is_finite(self) -> bool:
        """Whether the last step left all parameters finite."""
        moved = [*self.model.parameters(), *self.state.parameters()]
        return all(bool(p.isfinite().all()) for p in moved)

    def _saved(self) -> _Saved:
        states = copy.deepcopy((self.model.state_dict(), self.state.state_dict()))
        return _Saved(*states, self.model.log_partition.draws)

    def _go_back(self, saved: _Saved) -> None:
        self.model.load_state_dict(saved.model)
        if saved.draws is not None:
            self.proposal = saved.draws.proposal
            self.model.log_partition.follow_by(self.model.energy, saved.draws)
        if self.state is not self.model.chains:
            self.state.load_state_dict(saved.state)

    def _record(self, loss: float, optim: FitOptim, bar: Any) -> FitRecord:
        estimate = self.model.log_partition.averaged()
        averaged = self.model.averaged(estimate)
        train = likelihood_of(self._at(averaged, self.train_data), averaged)
        shown, validation = train, None
        if self.validation_data is not None:
            at_rows = self._at(averaged, self.validation_data)
            shown = validation = likelihood_of(at_rows, averaged, self.weights)
            self.num_worse += 1
            counts = validation.is_normalized or not self.is_automatic
            value = validation.value
            if self.is_automatic:  # else a log Z that is too low by chance is chosen
                value -= validation.std_error_log_partition
            if counts and value > self.best_value:
                self.best_value, self.num_worse = value, 0
                self.best_values = at_rows
        optim.note_record(shown.value)
        if self.decays and self.validation_data is not None and self.num_steps:
            self._set_decay(optim, self.validation_data)
        few = self.train_data[:_FOR_CURVE]
        gap = energy_gap(self.model, few, num_draws=_FOR_CURVE)
        stage = len(self.steps_of_stages) - 1
        record = FitRecord(
            self.num_steps, loss, train, validation, estimate, stage, gap
        )
        self.history.append(record)
        chains = self.model.chains
        accepted = chains.accept_prob.item() if chains.is_started else math.nan
        bar.set_postfix_str(
            f"log-likelihood {shown}, energy gap {gap or 'unknown'}, log Z "
            f"{estimate.value:.3f} +- {estimate.std_error:.3f} [{estimate.status}]"
            + ("" if math.isnan(accepted) else f", acceptance {accepted:.2f}"),
            refresh=False,
        )
        return record

    @torch.no_grad()
    def _at(self, averaged: EnergyDistribution, x: Tensor) -> Tensor:
        """Log density of rows that stay; what is not learned of it is found once."""
        learned = averaged.energy.correction(x)
        if id(x) in self.known:
            return -learned - self.known[id(x)] - averaged.log_partition
        value = averaged.energy(x)
        if learned.isfinite().all():
            self.known[id(x)] = value - learned
        return -value - averaged.log_partition

    def _set_decay(self, optim: FitOptim, held_out: Tensor) -> None:
        """Let weights decay as held-out rows want, by an average over the records."""
        if not len(self.shares):
            self.shares = contrast(self.train_data, held_out, self.weights)
        rows = torch.cat([self.train_data, held_out])
        found = decay_by_gap(self.model.energy, rows, self.shares)
        self.decay += 0.3 * (found - self.decay)
        optim.set_decay(self.decay)


@torch.no_grad()
def _log_prob(distribution: EnergyDistribution, x: Tensor) -> Tensor:
    return distribution.log_prob(x)
