r"""The log Z that a fit ends with: an estimate of its own."""

__all__ = ["settled_log_partition", "with_other_base"]

import copy
import math
import warnings
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.bases.stack import Stack
from pyro_ebm.core.errors import DivergenceError, UnreliableWarning
from pyro_ebm.core.stopwatch import Stopwatch
from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.distributions import EnergyDistribution, EnergyModel
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc import ImportanceResampling
from pyro_ebm.partition import LogPartitionEstimate, estimate
from pyro_ebm.partition.importance.importance import estimate_from_weights
from pyro_ebm.partition.tracking.weighted_draws import WeightedDraws

#: Time that another estimate may take, and that it needs to be worth it.
_MAX_SECONDS, _AT_LEAST = 20.0, 5.0
#: Draws of the proposal that the energy was learned with, in as many attempts as
#: begin within so many seconds.
_NUM_DRAWS, _LATE = (50_000, 250_000, 1_000_000), 6.0
#: Of a slow proposal, at least.
_FEW_DRAWS = 10_000
#: Numbers in as many draws, at most, but for the first.
_MOST_NUMBERS = 100_000_000
#: Standard error from which on another estimate is tried, and half of which is enough
#: for an end; and that beyond as many dimensions.
_ENOUGH, _MANY, _ENOUGH_OF_MANY = 0.01, 30, 0.1


def settled_log_partition(
    model: EnergyModel,
    proposal: Any = None,
    max_seconds: float = math.inf,
    seconds_each: float = 0.0,
) -> LogPartitionEstimate:
    r"""The final :math:`\log Z`, which the tracker takes over.

    The tracker has followed the parameters for a curve; now that these hold still, a
    run of ``partition.estimate`` is the better use of the same time. Without a reliable
    one it is that of the tracker, with its verdict.

    Args:
        model: Whose parameters are the averaged ones.
        proposal: What its log Z was learned with, if by importance.
        max_seconds: After which a reliable log Z is not made more precise.
        seconds_each: Of a draw of the proposal and its weight.
    """
    watch, tracker = Stopwatch(), model.log_partition
    if tracker.is_closed_form:
        return tracker.averaged()
    energy = tracker.averaged_energy
    is_large = energy.event_shape.numel() > _MANY
    enough = _ENOUGH_OF_MANY if is_large else _ENOUGH
    found, left = None, math.inf
    if proposal is not None:
        found = _by_proposal(energy, proposal, enough / 2, max_seconds, seconds_each)
        left = max_seconds - watch.seconds
        if not found.is_reliable:
            left = max(left, _AT_LEAST)
    tracked = tracker.averaged()
    is_rough = found is None or not found.is_reliable or found.std_error > enough
    if is_rough and left >= _AT_LEAST:
        other = _estimated(energy, model.base, min(left, _MAX_SECONDS))
        if found is None or not found.is_reliable or _is_better(other, found):
            found = other
    if found is None or not found.is_reliable:
        return tracked if tracked.is_reliable else _with_advice(tracked, found)
    missed = tracked.value - found.value
    error = math.hypot(tracked.std_error, found.std_error)
    if tracked.is_reliable and found.status is Status.OK and missed > 4 * error + 0.05:
        # Either errs downwards, by the modes that it lacks.
        more = f"learning has found {missed:.2g} nats more than {found.method}"
        reasons = (Finding(Reason.ROUTES_DISAGREE, more),)
        return found._replace(status=Status.UNRELIABLE, reasons=reasons)
    model.set_log_partition(found)
    return found


def with_other_base(
    model: EnergyModel,
    base: dist.TorchDistribution,
    proposal: Any,
    seen: Tensor,
    before: Tensor,
    limits: tuple[float, float],
) -> tuple[EnergyDistribution, LogPartitionEstimate] | None:
    """The model with its base fitted to more rows, and log Z estimated anew.

    It stays as it was, and ``None`` is returned, where log Z is not reliable or those
    rows have not become likelier.

    Args:
        model: Whose energy corrects its base.
        base: The new one.
        proposal: Of the draws that log Z came from so far.
        seen: Rows that only the new base was fitted to, shape ``(M, *event)``.
        before: Their log density without it, shape ``(M,)``.
        limits: See :func:`settled_log_partition`.
    """
    trial, fresh = copy.deepcopy(model), base
    trial.exchange_base(base)
    if proposal is not model.base:
        fresh = Stack([proposal, base], torch.full((2,), 0.5).to(seen))
    found = settled_log_partition(trial, fresh, *limits)
    distribution = copy.deepcopy(trial.averaged(found))
    with torch.no_grad():
        likelier = distribution.log_prob(seen) - before
    if not found.is_reliable or likelier.mean() <= 0:
        return None
    model.exchange_base(base)
    model.set_log_partition(found)
    if model.sampler is None:
        distribution.sampler = ImportanceResampling(fresh)
    return distribution, found


def _by_proposal(
    energy: Energy,
    proposal: Any,
    tolerance: float,
    max_seconds: float,
    seconds_each: float = 0.0,
) -> LogPartitionEstimate:
    """By fresh draws of the proposal, more where few do not settle it."""
    watch, draws, weights = Stopwatch(), WeightedDraws(), torch.empty(0)
    for wanted in _NUM_DRAWS:
        number = wanted
        if not len(weights) and wanted * seconds_each > max_seconds:
            number = max(_FEW_DRAWS, int(max_seconds / seconds_each))
        is_large = number * energy.event_shape.numel() > _MOST_NUMBERS
        each = watch.seconds / max(len(weights), 1)
        if len(weights) and (is_large or number * each > max_seconds):
            break
        draws.start(energy, proposal, number - len(weights))
        weights = torch.cat([weights.to(draws.x), draws.log_weights(energy)])
        found = estimate_from_weights(weights, "importance sampling", number)
        is_late = watch.seconds > _LATE
        if (found.is_reliable and found.std_error <= tolerance) or is_late:
            break
    return found


def _is_better(one: LogPartitionEstimate | None, other: LogPartitionEstimate) -> bool:
    return one is not None and one.is_reliable and one.std_error < other.std_error


def _estimated(
    energy: Energy, base: dist.TorchDistribution, max_seconds: float
) -> LogPartitionEstimate | None:
    """What ``partition.estimate`` says without a warning; ``None`` if it cannot run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableWarning)
            return estimate(
                energy,
                base,
                tolerance=0.01,
                max_seconds=max_seconds,
                progress_bar=False,
            )
    except (DivergenceError, NotImplementedError, RuntimeError, ValueError):
        return None  # whatever it refuses, the fit is not to be lost


def _with_advice(
    tracked: LogPartitionEstimate, found: LogPartitionEstimate | None
) -> LogPartitionEstimate:
    """Say how to find a log Z that neither the tracker nor an estimate have found."""
    advice = "run pyro_ebm.partition.estimate(model) for longer, or from a nearer base"
    if found is not None:
        advice = f"{found.method} has not found log Z either ({found.reason}); {advice}"
    unknown = Finding(Reason.UNKNOWN_LOG_PARTITION, advice)
    return tracked._replace(reasons=(*tracked.reasons, unknown))
