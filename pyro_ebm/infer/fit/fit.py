"""Fit an energy to data in one call: sugar for SVI with one or more objectives."""

__all__ = ["fit"]

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ebm.core.errors import DivergenceError, UnreliableWarning
from pyro_ebm.core.verdict import Finding, Reason, Status, status_of
from pyro_ebm.distributions import EnergyModel
from pyro_ebm.energies import Energy
from pyro_ebm.infer.fit.diagnosis import FitDiagnostics, diagnose, energy_gap
from pyro_ebm.infer.fit.fit_checks import (
    require_callbacks,
    require_counts,
    require_points,
)
from pyro_ebm.infer.fit.fit_record import FitRecord
from pyro_ebm.infer.fit.fit_result import FitResult, FitTimings
from pyro_ebm.infer.fit.optimiser import (
    FitOptim,
    GradientNoise,
    as_fit_optim,
    default_optim,
)
from pyro_ebm.infer.fit.stages import Stage, as_stages, begin_chains, unwrapped
from pyro_ebm.infer.fit.verdict import judge
from pyro_ebm.infer.handler import ObjectiveModel
from pyro_ebm.infer.likelihood import log_likelihood
from pyro_ebm.infer.objectives.objective import Objective
from pyro_ebm.mcmc.base import bias_of
from pyro_ebm.partition import LogPartitionEstimate, estimate

_LOG = logging.getLogger(__name__)
#: Time that the final log Z may take.
_MAX_SECONDS = 20.0


def fit(
    energy_model: EnergyModel,
    data: Tensor,
    objective: Objective | Sequence[Stage] | None = None,
    *,
    num_steps: int | None = None,
    batch_size: int = 256,
    optim: Any = None,
    max_grad_norm: float | None = None,
    validation_data: Tensor | None = None,
    record_interval: int = 100,
    patience: int | None = None,
    callbacks: Sequence[Callable[[FitRecord], Any]] = (),
    progress_bar: bool = True,
) -> FitResult:
    r"""Fit an energy model to data.

    The model is trained in place; at the end its parameters are the averaged ones, to
    which the returned :math:`\log Z` belongs: walkers follow the parameters whatever
    the objective is, through all stages. Pyro's parameter store is left as it was.

    ``print(result)`` says what came out, and whether to believe it: at the end the
    energy gap, chains, gradients and noise are examined (see
    :class:`~pyro_ebm.infer.FitDiagnostics`), for about 2 % of the moves of the fit.

    Args:
        energy_model: What is fitted.
        data: Points of shape ``(N, *event)``.
        objective: The estimator; default: ``MaximumLikelihood()``. Or a list of
            :class:`~pyro_ebm.infer.Stage`, each an objective with its steps.
        num_steps: Parameter steps, default 2,000; stages have their own.
        batch_size: Points a step, drawn without replacement within an epoch.
        optim: A Pyro optimiser or scheduler, or a torch optimiser of the model's
            parameters, or a ``torch.optim.lr_scheduler`` of one, which also moves what
            the objective learns. Schedulers advance at each step, those that wait for a
            plateau at each record. Default: Adam with learning rate 1e-3.
        max_grad_norm: Longer gradients are shortened to this norm.
        validation_data: Held-out points; their log-likelihood is recorded.
        record_interval: Steps between two records of the history.
        patience: Records without a better validation log-likelihood after which a
            stage stops and goes back to its best one; default: never.
        callbacks: Functions called with each record; if one returns ``True`` the fit
            stops there.
        progress_bar: Show a bar with log-likelihood, energy gap, log Z and acceptance.

    Returns:
        The averaged model with what was measured of it; log Z and likelihoods in nats.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the data are not finite, have another event shape or dtype, are
            outside the support, if ``patience`` is given without validation data,
            ``num_steps`` with stages, or if a count is not positive.
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
    if not isinstance(energy_model, EnergyModel):
        raise TypeError(
            f"energy_model must be an EnergyModel, got {type(energy_model).__name__}. "
            "Wrap an energy: EnergyModel(energy, base)."
        )
    stages = as_stages(objective, num_steps)
    require_counts(
        batch_size=batch_size,
        record_interval=record_interval,
        patience=1 if patience is None else patience,
    )
    require_callbacks(callbacks, max_grad_norm)
    run = _Fit(energy_model, data, validation_data, patience)
    run.batch_size, run.record_interval = min(batch_size, len(data)), record_interval
    run.callbacks, run.max_grad_norm = callbacks, max_grad_norm
    total = sum(stage.num_steps for stage in stages)
    with tqdm(total=total, disable=not progress_bar, desc="fit") as bar:
        stopped = run.all_stages(stages, data, optim, bar)
    return run.result(stages, stopped)


class _Saved(NamedTuple):
    """A point to go back to."""

    model: Any
    state: Any


class _Fit:
    """The state of one call of :func:`fit`."""

    batch_size: int
    record_interval: int
    callbacks: Sequence[Callable[[FitRecord], Any]]
    max_grad_norm: float | None

    def __init__(
        self,
        model: EnergyModel,
        data: Tensor,
        validation_data: Tensor | None,
        patience: int | None,
    ) -> None:
        if patience is not None and validation_data is None:
            raise ValueError(
                f"patience is {patience} but validation_data is None: early stopping "
                "needs held-out points. Give validation_data or leave patience out."
            )
        require_points("data", data, model)
        if validation_data is not None:
            require_points("validation_data", validation_data, model)
        self.model, self.validation_data = model, validation_data
        # The training curve is read off at most 2,000 points, always the same.
        self.train_data = data[torch.randperm(len(data))[:2000]]
        self.patience = math.inf if patience is None else patience
        self.state = nn.Module()
        self.noise = GradientNoise([])
        self.history: list[FitRecord] = []
        self.steps_of_stages: list[int] = []
        self.began = time.perf_counter(), time.process_time()
        self.step_seconds = 0.0

    @property
    def num_steps(self) -> int:
        """Parameter steps so far."""
        return sum(self.steps_of_stages)

    def all_stages(
        self, stages: list[Stage], data: Tensor, optim: Any, bar: Any
    ) -> str:
        """Take the steps of all stages; return why they ended."""
        optim = default_optim(self.model) if optim is None else optim
        optims = [self._optim(stage.optim or optim) for stage in stages]
        batches, last = _batches(data, self.batch_size), nn.Module()
        stopped = "finished"
        for stage, stage_optim in zip(stages, optims, strict=True):
            self.noise = stage_optim.noise
            self.steps_of_stages.append(0)
            with pyro.get_param_store().scope():
                learn = ObjectiveModel(_as_pyro_model(self.model), stage.objective)
                self.state = learn.state_of("x", self.model())
                stage_optim.add(self.state)
                if self.num_steps and self.state is not last:
                    begin_chains(self.model, stage.objective, self.state)
                svi = SVI(learn, lambda batch: None, stage_optim, Trace_ELBO())
                try:
                    stopped = self._stage(svi, stage.num_steps, batches, bar)
                finally:
                    stage_optim.remove_added()
            last = self.state
            if stopped not in ("finished", "early stopping"):
                break
        return stopped

    def result(self, stages: list[Stage], stopped: str) -> FitResult:
        """Examine the fit, and make the average the model."""
        model, taken = self.model, self.steps_of_stages
        last = stages[len(taken) - 1].objective
        found = self._diagnosed(last)
        model.adopt_average()
        log_partition = _settled_log_partition(model)
        # Another fit must not change it.
        distribution = copy.deepcopy(model.averaged(log_partition))
        gap = energy_gap(model, self.train_data)
        found = found._replace(
            energy_gap=gap, gradient_snr=self.noise.signal_to_noise()
        )
        held_out = self.validation_data
        bias = bias_of(getattr(unwrapped(last), "kernel", None))
        reasons = judge(found, log_partition, stopped, self.history, bias)
        wall, cpu = self.began
        return FitResult(
            distribution,
            log_partition,
            self.history,
            self.num_steps,
            stopped,
            copy.deepcopy(self.state),
            log_likelihood(distribution, self.train_data),
            None if held_out is None else log_likelihood(distribution, held_out),
            tuple((s.name, n) for s, n in zip(stages, taken, strict=False)),
            FitTimings(
                time.perf_counter() - wall,
                time.process_time() - cpu,
                self.step_seconds / max(self.num_steps, 1),
            ),
            found,
            status_of(reasons),
            reasons,
        )

    def _diagnosed(self, objective: Objective) -> FitDiagnostics:
        steps = self.steps_of_stages[-1]
        return diagnose(
            self.model, objective, self.state, self.train_data, steps, self.batch_size
        )

    def _optim(self, optim: Any) -> FitOptim:
        noise = GradientNoise(self.model.energy.parameters())
        return as_fit_optim(optim, self.model, self.max_grad_norm, noise)

    def _stage(
        self, svi: SVI, num_steps: int, batches: Iterator[Tensor], bar: Any
    ) -> str:
        """Take the steps of a stage; return why they ended."""
        last_good = best = self._saved()
        self.best_value, self.num_worse = -math.inf, 0
        try:
            for _ in range(num_steps):
                loss = self._step(svi, next(batches), bar)
                if not math.isfinite(loss):
                    self._go_back(last_good)
                    return "loss not finite"
                if self.num_steps % self.record_interval:
                    continue
                if not self._is_finite():
                    self._go_back(last_good)
                    return "loss not finite"
                record = self._record(loss, svi.optim, bar)
                last_good = self._saved()
                if self.num_worse == 0:
                    best = last_good
                if True in [callback(record) is True for callback in self.callbacks]:
                    return "callback"
                if self.num_worse >= self.patience:
                    self._go_back(best)
                    return "early stopping"
        except KeyboardInterrupt:
            return "interrupted"
        except DivergenceError:
            self._go_back(last_good)
            raise
        return "finished"

    def _step(self, svi: SVI, batch: Tensor, bar: Any) -> float:
        began = time.perf_counter()
        loss: float = svi.step(batch)
        if math.isfinite(loss):
            svi.optim.advance_schedule()
            self.steps_of_stages[-1] += 1
        else:
            at = self.num_steps + 1
            _LOG.warning("loss is %s at step %d; the fit stops", loss, at)
        bar.update()
        self.step_seconds += time.perf_counter() - began
        return loss

    def _is_finite(self) -> bool:
        """Whether the last step left all parameters finite."""
        moved = [*self.model.parameters(), *self.state.parameters()]
        return all(bool(p.isfinite().all()) for p in moved)

    def _saved(self) -> _Saved:
        return _Saved(
            *copy.deepcopy((self.model.state_dict(), self.state.state_dict()))
        )

    def _go_back(self, saved: _Saved) -> None:
        self.model.load_state_dict(saved.model)
        if self.state is not self.model.chains:
            self.state.load_state_dict(saved.state)

    def _record(self, loss: float, optim: FitOptim, bar: Any) -> FitRecord:
        averaged = self.model.averaged()
        train = log_likelihood(averaged, self.train_data)
        shown, validation = train, None
        if self.validation_data is not None:
            shown = validation = log_likelihood(averaged, self.validation_data)
            self.num_worse += 1
            if validation.value > self.best_value:
                self.best_value, self.num_worse = validation.value, 0
        optim.note_record(shown.value)
        estimate = self.model.log_partition.averaged()
        gap = energy_gap(self.model, self.train_data)
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


def _settled_log_partition(model: EnergyModel) -> LogPartitionEstimate:
    r"""The final :math:`\log Z`: an estimate of its own, which the walkers take over.

    The walkers have followed the parameters for a curve; now that these hold still, a
    run of ``partition.estimate`` is the better use of the same time. Without a reliable
    one it is that of the walkers, with their verdict.
    """
    tracker = model.log_partition
    tracked = tracker.averaged()
    if tracker.is_closed_form:
        return tracked
    found = _estimated(tracker.averaged_energy, model.base)
    if found is None or not found.is_reliable:
        return tracked if tracked.is_reliable else _with_advice(tracked, found)
    missed = tracked.value - found.value
    error = math.hypot(tracked.std_error, found.std_error)
    if tracked.is_reliable and found.status is Status.OK and missed > 4 * error + 0.05:
        # Either errs downwards, by the modes that it lacks.
        more = f"the walkers have found {missed:.2g} nats more than partition.estimate"
        reasons = (Finding(Reason.ROUTES_DISAGREE, more),)
        return found._replace(status=Status.UNRELIABLE, reasons=reasons)
    try:
        tracker.calibrate(model.energy, found, progress_bar=False)
    except DivergenceError:  # no walkers arrive, but the value is as good
        pass
    return found


def _estimated(
    energy: Energy, base: dist.TorchDistribution
) -> LogPartitionEstimate | None:
    """What ``partition.estimate`` says without a warning; ``None`` if it cannot run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            return estimate(
                energy,
                base,
                tolerance=0.01,
                max_seconds=_MAX_SECONDS,
                progress_bar=False,
            )
    except (DivergenceError, NotImplementedError, RuntimeError, ValueError):
        return None  # whatever it refuses, the fit is not to be lost


def _with_advice(
    tracked: LogPartitionEstimate, found: LogPartitionEstimate | None
) -> LogPartitionEstimate:
    """Say how to find a log Z that neither the walkers nor an estimate have found."""
    advice = "run pyro_ebm.partition.estimate(model) for longer, or from a nearer base"
    if found is not None:
        advice = f"{found.method} has not found log Z either ({found.reason}); {advice}"
    unknown = Finding(Reason.UNKNOWN_LOG_PARTITION, advice)
    return tracked._replace(reasons=(*tracked.reasons, unknown))


def _as_pyro_model(energy_model: EnergyModel) -> Any:
    """The model of eq. (1.7), a point: scaled so that the loss is a mean."""

    def model(batch: Tensor) -> None:
        pyro.module("energy_model", energy_model)
        with pyro.poutine.scale(scale=1 / len(batch)), pyro.plate("data", len(batch)):
            pyro.sample("x", energy_model(), obs=batch)

    return model


def _batches(data: Tensor, batch_size: int) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(len(data), device=data.device)
        for index in order[: len(data) // batch_size * batch_size].split(batch_size):
            yield data[index]
