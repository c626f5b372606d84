"""The contract of whatever draws from an energy, and what it says of its draws."""

__all__ = ["Draws", "Sampler", "SamplingDiagnostics", "warn_of"]

import math
import warnings
from typing import NamedTuple, Protocol

from torch import Tensor

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.verdict import Finding, Reason, Status, in_words, sentence
from pyro_ebm.energies import Energy


class SamplingDiagnostics(NamedTuple):
    """How draws were made, and whether they can be relied on.

    Attributes:
        method: ``"closed form"``, or the name of the sampler.
        status: ``"exact"``, ``"ok"`` or ``"unreliable"``.
        reasons: The findings that led to it; empty unless it is ``"unreliable"``.
        num_chains: Chains that were run, one a draw; 0 where there were none.
        num_transitions: Of each chain after the warm-up.
        r_hat: The largest R-hat of a coordinate, not of ranks, over 64 of the chains,
            in unconstrained space; ``nan`` without chains or where they were too short.
        num_stuck: Chains that hardly moved.
        effective_fraction: Effective part of the points of a proposal that the draws
            were taken from by their weights; ``nan`` where there were none.
    """

    method: str
    status: Status
    reasons: tuple[Finding, ...] = ()
    num_chains: int = 0
    num_transitions: int = 0
    r_hat: float = math.nan
    num_stuck: int = 0
    effective_fraction: float = math.nan

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"exact"`` or ``"ok"``."""
        return self.status.is_reliable

    def __str__(self) -> str:
        chains = ""
        if self.num_chains:
            r_hat = "" if math.isnan(self.r_hat) else f", R-hat {self.r_hat:.3f}"
            chains = (
                f", {self.num_chains:,} chains of {self.num_transitions:,} "
                f"transitions{r_hat}"
            )
        elif not math.isnan(self.effective_fraction):
            chains = f", {self.effective_fraction:.3f} of the proposal effective"
        verdict = in_words(self.status, self.reasons)
        return f"draws by {self.method} [{verdict}]{chains}"


class Draws(NamedTuple):
    """Points, and what is known of how they were drawn.

    Attributes:
        x: Shape ``(num_draws, *event)``, without gradient.
        diagnostics: Of the draws.
    """

    x: Tensor
    diagnostics: SamplingDiagnostics


class Sampler(Protocol):
    """Draws from ``e^-f``, many at once.

    One that can tell how good its draws are has a method ``draw_diagnosed`` besides,
    with the same arguments, which returns :class:`Draws` and does not warn. One that
    runs a number of chains however few draws are wanted says so by ``min_chains``;
    :class:`~pyro_ebm.EnergyDistribution` keeps the rest for later.

    Example:
        One that knows its energy, for the sake of a test.

        >>> class Exact:
        ...     def __call__(self, energy, num_draws):
        ...         return energy.closed_form().distribution.sample((num_draws,))
        ...
        ...     start = __call__
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> q = pyro_ebm.EnergyDistribution(energy, sampler=Exact())
        >>> q.sample((7,)).shape
        torch.Size([7, 2])
    """

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Independent draws, shape ``(num_draws, *event)``, without gradient."""

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Cheap points of the support, for callers that throw them away."""


def warn_of(diagnostics: SamplingDiagnostics) -> bool:
    """Warn if something speaks against the draws; that nothing is known does not.

    Args:
        diagnostics: Of the draws.

    Returns:
        Whether there was a warning.
    """
    evidence = (Reason.NOT_MIXED, Reason.STUCK)
    found = [finding for finding in diagnostics.reasons if finding.reason in evidence]
    if found:
        warnings.warn(sentence(found) + ".", UnreliableWarning, stacklevel=4)
    return bool(found)
