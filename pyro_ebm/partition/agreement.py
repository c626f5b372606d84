"""Agreement of several estimates of the same log Z, and doubts about one by weights."""

__all__ = [
    "Look",
    "Value",
    "disagreement",
    "is_settled",
    "judge_weights",
    "settled",
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
#: With a lighter tail they need no second look; the efficiency of a map that follows a
#: ridge to its end; and the tail with which one may follow it roughly.
_GOOD_K, _FAITHFUL, _NO_TAIL = 0.45, 0.85, 0.25
#: Share of what particles have missed at a ridge that draws may have missed as well.
_MISSED = 0.1


class Value(NamedTuple):
    """An estimate of one route with its error."""

    value: float
    std_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.std_error:.2g}"

    @classmethod
    def of(cls, journey: Journey) -> "Value":
        """Combined estimate of the islands of a journey."""
        value, std_error, _ = combine_replicates(journey.bennett)
        return cls(value, std_error)

    @classmethod
    def pooled(cls, values: list["Value"]) -> "Value":
        """Mean by inverse variances; its error is at least half of their range."""
        values = [v for v in values if math.isfinite(v.std_error)] or values[:1]
        if len(values) == 1:
            return values[0]
        weights = [1 / max(v.std_error, 1e-9) ** 2 for v in values]
        total = sum(w * v.value for w, v in zip(weights, values, strict=True))
        spread = (max(v.value for v in values) - min(v.value for v in values)) / 2
        sum_weights = sum(weights)
        return cls(total / sum_weights, max(1 / math.sqrt(sum_weights), spread))

    def shortfall(self, first: "Value") -> list[Finding]:
        """Findings where particles from the base have found more mass."""
        more = first.value - self.value
        if not more > 3 * math.hypot(first.std_error, self.std_error) + _SLACK:
            return []
        text = f"particles from the base found more: {first} against {self}"
        return [Finding(Reason.ROUTES_DISAGREE, text)]


class Look(NamedTuple):
    """What weighted draws of a proposal say.

    Attributes:
        value: The estimate.
        ess: Effective number of draws.
        findings: What speaks against it.
        k: Shape of the tail of the weights.
        efficiency: Share of the draws that is effective.
        is_bent: Whether the proposal has a map of a ridge or a funnel.
        draws: That are kept, shape ``(N, D)``.
        log_weights: Theirs, shape ``(N,)``.
    """

    value: Value
    ess: float
    findings: list[Finding]
    k: float
    efficiency: float
    is_bent: bool
    draws: Tensor
    log_weights: Tensor


def is_settled(looks: list[Look], first: Value | None) -> bool:
    """Whether the last look by draws needs no other.

    Where particles have not come to the end of a ridge, draws may miss it as well: two
    looks have to agree, by a map that follows the ridge closely or, as there is no end
    that few draws come to, with weights that have no tail. So they have where the first
    was not good enough.

    Args:
        looks: By draws of proposals, each fitted to the draws of the one before.
        first: Of particles from the base, if they arrived.
    """
    last = looks[-1]
    value, std_error = last.value
    if last.findings or not last.k < _GOOD_K or first is None:
        return False
    if len(looks) == 1:
        more = value - first.value
        return not (last.is_bent and more > 2 * math.hypot(first.std_error, std_error))
    is_rough = last.is_bent and last.efficiency < _FAITHFUL
    if is_rough and not max(looks[-2].k, last.k) < _NO_TAIL:
        return False
    before = looks[-2].value
    return abs(value - before.value) < 2 * math.hypot(std_error, before.std_error)


def settled(looks: list[Look], first: Value) -> tuple[Value, float]:
    """The last value, and what draws may have missed of a ridge, in nats.

    The error is at least half of what the last two looks differ by. What is missed may
    be as much as looks are apart, or some of what the particles have missed.

    Args:
        looks: By draws of proposals, each fitted to the draws of the one before.
        first: Of particles from the base.
    """
    value, std_error = looks[-1].value
    clean = [look.value.value for look in looks if not look.findings]
    missed = min(_MISSED * (value - first.value), _SLACK)  # or modes, not a ridge
    gap = max(max(clean) - min(clean), missed)
    gap *= looks[-1].is_bent
    return Value(value, max(std_error, abs(clean[-2:][0] - value) / 2)), gap


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
    findings = [] if first is None else last.shortfall(first)
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
