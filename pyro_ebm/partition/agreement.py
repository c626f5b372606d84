"""Agreement of several estimates of the same log Z, and doubts about one by weights."""

__all__ = [
    "Value",
    "disagreement",
    "gap_of",
    "judge_weights",
    "pooled",
    "shortfall",
    "value_of",
]

import math
from typing import NamedTuple

from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.diagnostics.pareto import pareto_k
from pyro_ebm.partition.base import combine_replicates
from pyro_ebm.partition.particles.engine import Journey

#: What a difference of two looks may be, in nats, beyond three standard errors.
_SLACK = 0.05
#: Weights are no good with a heavier tail, or fewer of them effective.
_MAX_K, _MIN_ESS = 0.7, 200.0


class Value(NamedTuple):
    """An estimate of one route with its error."""

    value: float
    std_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.std_error:.2g}"


def pooled(values: list[Value]) -> Value:
    """Mean by inverse variances; its error is at least half of what they differ by."""
    values = [v for v in values if math.isfinite(v.std_error)] or values[:1]
    if len(values) == 1:
        return values[0]
    weights = [1 / max(v.std_error, 1e-9) ** 2 for v in values]
    mean = sum(w * v.value for w, v in zip(weights, values, strict=True)) / sum(weights)
    spread = (max(v.value for v in values) - min(v.value for v in values)) / 2
    return Value(mean, max(1 / math.sqrt(sum(weights)), spread))


def disagreement(
    runs: list[Value], gap: float, first: Value | None, weighed: Value
) -> list[Finding]:
    """Findings where other estimates disagree with the last run from the proposal.

    Args:
        runs: Of particles from the proposal, each larger than the last.
        gap: Between forwards and backwards of the last.
        first: Of particles from the base, if they arrived.
        weighed: Of weighted draws of the proposal.
    """
    last = runs[-1]
    findings = [] if first is None else shortfall(last, first)
    if not gap < 0.5 + 4 * last.std_error:
        text = f"forwards and backwards differ by {gap:.2g}"
        findings.append(Finding(Reason.DIRECTIONS_DISAGREE, text))
    others = [weighed, *runs[:-1], *([] if first is None else [first])]
    if not any(_agree(last, other) for other in others):
        text = f"{last} by particles from the proposal, and no other look agrees: "
        text += ", ".join(map(str, others))
        findings.append(Finding(Reason.ROUTES_DISAGREE, text))
    return findings


def _agree(one: Value, other: Value) -> bool:
    error = math.hypot(one.std_error, other.std_error)
    return abs(one.value - other.value) < 3 * error + _SLACK and error < 0.5


def value_of(journey: Journey) -> Value:
    """Combined estimate of the islands of a journey."""
    value, std_error, _ = combine_replicates(journey.bennett)
    return Value(value, std_error)


def gap_of(journey: Journey) -> float:
    """Difference of the forward and the reverse estimate of a journey, in nats."""
    forward = combine_replicates(journey.forward)[0]
    reverse = -combine_replicates(-journey.reverse)[0]
    return abs(reverse - forward)


def shortfall(value: Value, first: Value) -> list[Finding]:
    """Findings where particles from the base have found more mass."""
    more = first.value - value.value
    if not more > 3 * math.hypot(first.std_error, value.std_error) + _SLACK:
        return []
    text = f"particles from the base found more: {first} against {value}"
    return [Finding(Reason.ROUTES_DISAGREE, text)]


def judge_weights(log_weights: Tensor) -> list[Finding]:
    """What weights say against themselves."""
    k = pareto_k(log_weights)
    ess = effective_sample_fraction(log_weights).item() * len(log_weights)
    found = []
    if not k < _MAX_K:
        text = f"the tail of the weights is too heavy: k-hat {k:.2f} above {_MAX_K}"
        found.append(Finding(Reason.HEAVY_WEIGHTS, text))
    if not ess > _MIN_ESS:
        text = f"effective sample size {ess:.0f}, below {_MIN_ESS:.0f}"
        found.append(Finding(Reason.FEW_EFFECTIVE, text))
    return found
