"""Fit an energy to data in one call: sugar for SVI with an objective."""

__all__ = ["FitRecord", "FitResult", "fit"]

import copy
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ebm.distributions import EnergyDistribution, EnergyModel
from pyro_ebm.errors import DivergenceError
from pyro_ebm.infer.checks import require_objective
from pyro_ebm.infer.handler import ObjectiveModel
from pyro_ebm.infer.likelihood import LogLikelihood, log_likelihood
from pyro_ebm.infer.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.objective import Objective
from pyro_ebm.partition import LogPartitionEstimate

_LOG = logging.getLogger(__name__)


class FitRecord(NamedTuple):
    r"""One line of the history of a fit; all values belong to the averaged parameters.

    Attributes:
        step: Parameter steps so far.
        loss: Negative log-likelihood a point of the last batch at the iterate, in nats.
        train: Mean log-likelihood of training points, with error.
        validation: That of the validation points, or ``None``.
        log_partition: :math:`\log Z` with its verdict.
    """

    step: int
    loss: float
    train: LogLikelihood
    validation: LogLikelihood | None
    log_partition: LogPartitionEstimate


class FitResult(NamedTuple):
    r"""What a fit returns.

    Attributes:
        distribution: The averaged model with its :math:`\log Z`.
        log_partition: That :math:`\log Z`, with error and verdict.
        history: A record every ``record_interval`` steps.
        num_steps: Parameter steps taken.
        stopped: Why it ended: ``"finished"``, ``"early stopping"``, ``"interrupted"``,
            or ``"loss not finite"``.
        state: What the objective has learned beside the energy, such as the log Z of
            noise contrast, for the last parameters before averaging.
    """

    distribution: EnergyDistribution
    log_partition: LogPartitionEstimate
    history: list[FitRecord]
    num_steps: int
    stopped: str
    state: nn.Module


def fit(
    energy_model: EnergyModel,
    data: Tensor,
    objective: Objective | None = None,
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    optim: Any = None,
    validation_data: Tensor | None = None,
    record_interval: int = 100,
    patience: int | None = None,
    progress_bar: bool = True,
) -> FitResult:
    r"""Fit an energy model to data.

    The model is trained in place; at the end its parameters are the averaged ones, to
    which the returned :math:`\log Z` belongs: walkers follow the parameters whatever
    the objective is. Pyro's parameter store is left as it was.

    Args:
        energy_model: What is fitted.
        data: Points of shape ``(N, *event)``.
        objective: The estimator; default: ``MaximumLikelihood()``.
        num_steps: Parameter steps.
        batch_size: Points a step, drawn without replacement within an epoch.
        optim: A Pyro optimiser, or a torch optimiser of the model's parameters, to
            which those that the objective learns are added; a Pyro learning-rate
            scheduler advances at each step. Default: Adam with learning rate 1e-3.
        validation_data: Held-out points; their log-likelihood is recorded.
        record_interval: Steps between two records of the history.
        patience: Records without a better validation log-likelihood after which the
            fit stops and goes back to the best one; default: never.
        progress_bar: Show a bar with log-likelihood, log Z and acceptance.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the data are not finite, have another event shape or dtype, are
            outside the support, if ``patience`` is given without validation data, or
            if a count is not positive.
        DivergenceError: If no chain can move any more; the model is then left as it
            was at the last record.

    Example:
        >>> data = torch.randn(500, 2)
        >>> base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> energy = pyro_ebm.energies.NeuralEnergy((2,), (16,), base=base)
        >>> model = pyro_ebm.EnergyModel(energy, base)
        >>> result = pyro_ebm.fit(model, data, num_steps=20, progress_bar=False)
        >>> result.num_steps, result.stopped
        (20, 'finished')
    """
    objective = MaximumLikelihood() if objective is None else objective
    _require_types(energy_model, objective)
    _require_counts(
        num_steps=num_steps,
        batch_size=batch_size,
        record_interval=record_interval,
        patience=1 if patience is None else patience,
    )
    run = _Fit(energy_model, data, validation_data, patience)
    with pyro.get_param_store().scope():
        learn = ObjectiveModel(_as_pyro_model(energy_model), objective)
        state = run.state = learn.state_of("x", energy_model())
        optim = _as_pyro_optim(optim, energy_model, state)
        svi = SVI(learn, lambda batch: None, optim, Trace_ELBO())
        batches = _batches(data, batch_size)
        bar = tqdm(range(1, num_steps + 1), disable=not progress_bar, desc="fit")
        stopped = run.loop(svi, batches, bar, record_interval)
    energy_model.adopt_average()
    return FitResult(
        copy.deepcopy(energy_model.averaged()),  # another fit is not to change it
        _with_advice(energy_model.log_partition.averaged()),
        run.history,
        run.num_steps,
        stopped,
        copy.deepcopy(state),
    )


def _with_advice(estimate: LogPartitionEstimate) -> LogPartitionEstimate:
    """Say how to find a log Z that the walkers have not found."""
    if estimate.is_reliable:
        return estimate
    advice = "; log Z is unknown: run pyro_ebm.partition.estimate(model)"
    return estimate._replace(reason=estimate.reason + advice)


class _Fit:
    """The state of one call of :func:`fit`."""

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
        _require_points("data", data, model)
        if validation_data is not None:
            _require_points("validation_data", validation_data, model)
        self.model, self.validation_data = model, validation_data
        # The training curve is read off at most 2,000 points, always the same.
        self.train_data = data[torch.randperm(len(data))[:2000]]
        self.patience = math.inf if patience is None else patience
        self.state = nn.Module()
        self.history: list[FitRecord] = []
        self.num_steps = 0
        self.best, self.num_worse = -math.inf, 0
        self.best_state: tuple[Any, Any] | None = None

    def loop(
        self, svi: SVI, batches: Iterator[Tensor], bar: Any, record_interval: int
    ) -> str:
        """Take the steps; return why they ended."""
        last_good = self._saved()
        try:
            for step in bar:
                loss = svi.step(next(batches))
                if not math.isfinite(loss):
                    _LOG.warning("loss is %s at step %d; the fit stops", loss, step)
                    self._go_back(last_good)
                    return "loss not finite"
                if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
                    svi.optim.step()
                self.num_steps = step
                if step % record_interval == 0:
                    self._record(step, loss, bar)
                    last_good = self._saved()
                    if self.num_worse >= self.patience:
                        self._go_back(self.best_state or last_good)
                        return "early stopping"
        except KeyboardInterrupt:
            return "interrupted"
        except DivergenceError:
            self._go_back(last_good)
            raise
        return "finished"

    def _saved(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.model.state_dict(), self.state.state_dict()))

    def _go_back(self, saved: tuple[Any, Any]) -> None:
        self.model.load_state_dict(saved[0])
        if self.state is not self.model.chains:
            self.state.load_state_dict(saved[1])

    def _record(self, step: int, loss: float, bar: Any) -> None:
        averaged = self.model.averaged()
        validation = None
        if self.validation_data is not None:
            validation = log_likelihood(averaged, self.validation_data)
            self._note(validation.value)
        train = log_likelihood(averaged, self.train_data)
        estimate = self.model.log_partition.averaged()
        self.history.append(FitRecord(step, loss, train, validation, estimate))
        shown = train if validation is None else validation
        bar.set_postfix_str(
            f"log-likelihood {shown}, log Z {estimate.value:.3f} +- "
            f"{estimate.std_error:.3f} [{estimate.status}], acceptance "
            f"{self.model.chains.accept_prob.item():.2f}",
            refresh=False,
        )

    def _note(self, value: float) -> None:
        self.num_worse += 1
        if value > self.best:
            self.best, self.num_worse = value, 0
            if self.patience < math.inf:
                self.best_state = self._saved()


def _as_pyro_model(energy_model: EnergyModel) -> Any:
    """The model of eq. (1.7), a point: scaled so that the loss is a mean."""

    def model(batch: Tensor) -> None:
        pyro.module("energy_model", energy_model)
        with pyro.poutine.scale(scale=1 / len(batch)), pyro.plate("data", len(batch)):
            pyro.sample("x", energy_model(), obs=batch)

    return model


class _TorchOptim(pyro.optim.PyroOptim):
    """A torch optimiser where Pyro expects one of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: nn.Module) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        added = [p for p in state.parameters() if id(p) not in held]
        if added:
            optimizer.add_param_group({"params": added})

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.optimizer.step()


def _as_pyro_optim(
    optim: Any, energy_model: EnergyModel, state: nn.Module
) -> pyro.optim.PyroOptim:
    if isinstance(optim, pyro.optim.PyroOptim):
        return optim
    if optim is None:
        parameters = list(energy_model.parameters())
        if not parameters:
            raise ValueError(
                "energy_model has no parameters to fit. A FunctionEnergy learns those "
                "of an nn.Module given as its fn."
            )
        optim = torch.optim.Adam(parameters, lr=1e-3)
    if not isinstance(optim, torch.optim.Optimizer):
        raise TypeError(
            "optim must be a pyro.optim or torch.optim optimiser, got "
            f"{type(optim).__name__}."
        )
    own = {id(parameter) for parameter in energy_model.parameters()}
    if not any(id(p) in own for group in optim.param_groups for p in group["params"]):
        raise ValueError(
            "optim must hold parameters of energy_model, and holds none of them. Build "
            "it as torch.optim.Adam(energy_model.parameters())."
        )
    return _TorchOptim(optim, state)


def _batches(data: Tensor, batch_size: int) -> Iterator[Tensor]:
    batch_size = min(batch_size, len(data))
    while True:
        order = torch.randperm(len(data), device=data.device)
        for index in order[: len(data) // batch_size * batch_size].split(batch_size):
            yield data[index]


def _require_types(energy_model: EnergyModel, objective: Objective) -> None:
    if not isinstance(energy_model, EnergyModel):
        raise TypeError(
            f"energy_model must be an EnergyModel, got {type(energy_model).__name__}. "
            "Wrap an energy: EnergyModel(energy, base)."
        )
    require_objective(objective)


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")


def _require_points(name: str, points: Tensor, energy_model: EnergyModel) -> None:
    event_shape = energy_model.energy.event_shape
    dtype = energy_model.energy.tensor_options()["dtype"]
    if not isinstance(points, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(points).__name__}. Convert it: "
            f"torch.as_tensor({name}, dtype={dtype})."
        )
    if points.dtype != dtype:
        raise ValueError(
            f"{name} must have the dtype {dtype} of the energy, got {points.dtype}. "
            f"Convert it: {name}.to({dtype}); or the model, by energy_model.to(dtype)."
        )
    if points.dim() != len(event_shape) + 1 or points.shape[1:] != event_shape:
        raise ValueError(
            f"{name} must have shape (N, *event), event_shape {tuple(event_shape)}, "
            f"got {tuple(points.shape)}."
        )
    if len(points) < 2 or not points.isfinite().all():
        raise ValueError(
            f"{name} must hold at least two points of finite numbers; got "
            f"{len(points)} points with {int((~points.isfinite()).sum())} nan or "
            "infinite numbers. Drop those rows."
        )
    inside = energy_model.energy.support.check(points)
    if not inside.all():
        raise ValueError(
            f"{name} must lie in the support {energy_model.energy.support}; "
            f"{int((~inside).sum())} of {len(points)} points do not. Transform the "
            "data, or give the energy their support."
        )
