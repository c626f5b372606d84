r"""The verdict of a result: a status, and the findings that led to it.

Every result of the library that may be wrong without looking wrong, an estimate of
:math:`\log Z`, the draws of a run of MCMC, a fit, says how far it can be trusted in
the same words. A rule that speaks against a result adds a :class:`Finding`; the status
follows from the findings.
"""

__all__ = ["Finding", "Reason", "Status", "in_words", "sentence", "status_of"]

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple


class _Word(str, Enum):
    """A word that prints as itself."""

    __str__ = str.__str__

    def __repr__(self) -> str:
        return str.__repr__(self)


class Status(_Word):
    """How far a result can be trusted; equal to the string that it prints as.

    Example:
        >>> Status.OK == "ok", f"{Status.OK}", Status("exact").is_reliable
        (True, 'ok', True)
    """

    #: Known up to rounding.
    EXACT = "exact"
    #: An estimate whose error bar can be believed.
    OK = "ok"
    #: Something speaks against the result; the findings say what.
    UNRELIABLE = "unreliable"
    #: There is evidence that the integral is infinite.
    NOT_NORMALIZABLE = "not_normalizable"

    @property
    def is_reliable(self) -> bool:
        """Whether the result can be used as it is."""
        return self in (Status.EXACT, Status.OK)


class Reason(_Word):
    """The reasons for which a result can be unreliable.

    Example:
        >>> Reason("not finite") is Reason.NOT_FINITE
        True
    """

    # The energy itself.
    NOT_FINITE = "not finite"
    NUMERICAL = "numerical nonsense"
    DIVERGENT = "the integrand does not vanish far out"
    # The base or the proposal.
    BASE_MISSES = "the base misses the target"
    BASE_INCONSISTENT = "the draws of the base are not those of its density"
    HEAVY_WEIGHTS = "heavy-tailed weights"
    FEW_EFFECTIVE = "few effective draws"
    POOR_OVERLAP = "poor overlap"
    NOT_COVERED = "the proposal does not cover the particles"
    # Two looks at the same number.
    ROUTES_DISAGREE = "independent estimates disagree"
    ISLANDS_DISAGREE = "the islands disagree"
    DIRECTIONS_DISAGREE = "forward and reverse disagree"
    ONE_ROUTE = "only one estimate, and nothing to hold it against"
    ONE_SIDED = "one-sided"
    WRONG_DRAWS = "the draws are not those of the density"
    # Budgets.
    NOT_ARRIVED = "the path did not end"
    NOT_CONVERGED = "not converged"
    OUT_OF_BUDGET = "out of budget"
    NOT_ESTIMATED = "not estimated yet"
    # Chains.
    NOT_MIXED = "the chains have not mixed"
    CHAINS_BEHIND = "some chains did not arrive"
    SEPARATE_MODES = "chains are in separate modes"
    COLLINEAR = "coordinates are collinear"
    FUNNEL = "a scale that a spread follows"
    STUCK = "chains are stuck"
    ZERO_DENSITY = "zero density inside the support"
    DIVERGENCES = "divergent transitions"
    BIASED_KERNEL = "the kernel is biased"
    # Learning.
    LOSS_NOT_FINITE = "loss not finite"
    MOVING_TOO_FAST = "the parameters move too fast"
    NOT_AT_EQUILIBRIUM = "not at equilibrium"
    STILL_LEARNING = "still learning"
    WORSE_THAN_BASE = "worse than its base"
    NOISE_TOO_FAR = "noise too far from data"
    UNKNOWN_LOG_PARTITION = "log Z unknown: run partition.estimate"
    INCONSISTENT_ESTIMATOR = "the estimator does not tend to the truth"


class Finding(NamedTuple):
    """One reason why a result is unreliable, with the value that was seen.

    Attributes:
        reason: The rule.
        detail: A sentence with the value seen, the value wanted and the way out.

    Example:
        >>> str(Finding(Reason.FEW_EFFECTIVE, "effective sample size 12, below 50"))
        'effective sample size 12, below 50'
    """

    reason: Reason
    detail: str

    def __str__(self) -> str:
        return self.detail or str(self.reason)


def sentence(findings: Iterable[Finding]) -> str:
    """All findings in one line; empty if there are none.

    Args:
        findings: In the order in which they are to be read.
    """
    return "; ".join(map(str, findings))


def status_of(findings: Sequence[Finding], otherwise: Status = Status.OK) -> Status:
    """``Status.UNRELIABLE`` if anything was found.

    Args:
        findings: What speaks against the result.
        otherwise: The status if nothing does.

    Example:
        >>> status_of([]), status_of([Finding(Reason.STUCK, "")])
        ('ok', 'unreliable')
    """
    return Status.UNRELIABLE if findings else otherwise


def in_words(status: Status, findings: Iterable[Finding]) -> str:
    """The status, and after a colon why it is not better.

    Args:
        status: Of the result.
        findings: Behind it.

    Example:
        >>> in_words(Status.UNRELIABLE, [Finding(Reason.STUCK, "2 chains are stuck")])
        'unreliable: 2 chains are stuck'
    """
    reason = sentence(findings)
    return f"{status}: {reason}" if reason else str(status)
