"""MCMC diagnostics and status."""

__all__ = ["Diagnostics", "Moments"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.core.html import rows_table
from pyro_ebm.core.verdict import Finding, Reason, Status, in_words, sentence, status_of
from pyro_ebm.diagnostics import Convergence

#: Above it the chains have not mixed, in the words of Vehtari et al. (2021).
_MAX_R_HAT = 1.01
#: Below it neither R-hat nor errors can be trusted (ibid.).
_MIN_ESS = 400
#: Share of hopeless proposals above which a region may have been missed.
_MAX_DIVERGENT = 0.01
#: Draws of a chain below which nothing can be said.
MIN_DRAWS = 4
#: Betancourt's limit for the fraction of missing information.
_MIN_BFMI = 0.3


class Moments(NamedTuple):
    """Mean and variance of the draws of one site, a number a coordinate.

    Attributes:
        mean: Mean of all draws.
        variance: Variance of all draws.
        mean_std_error: Monte Carlo standard error of the mean.
        sd_std_error: Monte Carlo standard error of the standard deviation.
    """

    mean: Tensor
    variance: Tensor
    mean_std_error: Tensor
    sd_std_error: Tensor


class Diagnostics(NamedTuple):
    r"""Diagnostics of a run of MCMC, with a verdict.

    Attributes:
        sites: Convergence of each site, tensors of the site's shape; the one site of an
            energy is called ``"x"``.
        accept_prob: Mean acceptance probability after the warmup.
        step_size: That the kernel was left with by the warmup; ``nan`` without one.
        num_divergences: Proposals after the warmup whose probability was 0 in floating
            point: their energy was not finite, or wrong by more than 745 nats in double
            precision, 103 in single.
        num_stuck: Chains that took fewer than 5 % of their proposals, or ended where
            they began; none before 20 transitions.
        energy_bfmi: Energy fraction of missing information of each chain, shape
            ``(C,)``; ``nan`` for kernels without momenta.
        num_chains: ``C``.
        num_draws: Of each chain.
        num_superchains: Groups of chains that started at the same point; where these
            are fewer than the chains, ``nested_r_hat`` decides.
        num_moved: Chains that had not arrived where the mass is, and were put where
            others are, before the first transition or in the warm-up.
        num_stray: Chains whose mean energy is over 5 standard deviations off that of
            the others. R-hat goes by ranks, and is blind to one chain in a hundred.
        dtype: In which the energy was computed, whatever the type of the draws.
        non_centred: Sites of a model that were standardised where the chains moved.
        status: ``"ok"`` or ``"unreliable"``.
        reasons: The findings that led to it; empty if it is ``"ok"``.
    """

    sites: dict[str, Convergence]
    accept_prob: float
    step_size: float
    num_divergences: int
    num_stuck: int
    energy_bfmi: Tensor
    num_chains: int
    num_draws: int
    num_superchains: int
    num_moved: int = 0
    num_stray: int = 0
    dtype: torch.dtype | None = None
    non_centred: tuple[str, ...] = ()
    status: Status = Status.UNRELIABLE
    reasons: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"ok"``."""
        return self.status.is_reliable

    @property
    def is_nested(self) -> bool:
        """Whether superchains, not single chains, are compared."""
        return self.num_superchains < self.num_chains

    def r_hat(self, site: str) -> Tensor:
        """The R-hat of a site that decides: nested where there are superchains."""
        found = self.sites[site]
        return found.nested_r_hat if self.is_nested else found.r_hat

    def judged(
        self, num_transitions: int, known: tuple[Finding, ...] = ()
    ) -> "Diagnostics":
        """These with the verdict that the rules give.

        Args:
            num_transitions: Of each chain, after the warmup.
            known: What is known against the run without looking at the draws.
        """
        reasons = (
            *known,
            *_site_findings(self),
            *_chain_findings(self, num_transitions),
        )
        return self._replace(status=status_of(reasons), reasons=reasons)

    def __str__(self) -> str:
        verdict = in_words(self.status, self.reasons)
        step = "" if math.isnan(self.step_size) else f"step size {self.step_size:.3g}, "
        return (
            f"{self.num_chains:,} chains of {self.num_draws:,} draws [{verdict}], "
            f"acceptance {self.accept_prob:.2f}, {step}"
            f"{self.num_divergences:,} divergences{self._notes}"
        )

    @property
    def _notes(self) -> str:
        moved, dtype = "", ""
        if self.num_moved:
            moved = f", {self.num_moved:,} chains re-initialised in the warm-up"
        if self.dtype is not None:
            dtype = f", computed in {str(self.dtype).removeprefix('torch.')}"
        some, more = self.non_centred[:3], len(self.non_centred) - 3
        names = ", ".join(map(repr, some)) + (f" and {more} more" if more > 0 else "")
        return moved + dtype + (f", non-centred: {names}" if names else "")

    def _repr_html_(self) -> str:
        step = "" if math.isnan(self.step_size) else f"{self.step_size:.3g}"
        rows = {
            "chains": f"{self.num_chains:,} of {self.num_draws:,} draws",
            "verdict": in_words(self.status, self.reasons),
            "acceptance": f"{self.accept_prob:.2f}",
            "step size": step,
            "divergences": f"{self.num_divergences:,}",
            "stuck chains": f"{self.num_stuck:,}",
            "re-initialised chains": f"{self.num_moved:,}",
            "non-centred": ", ".join(self.non_centred),
            "precision": str(self.dtype or "").removeprefix("torch."),
        }
        return rows_table("Diagnostics", rows)


def _site_findings(found: Diagnostics) -> list[Finding]:
    errors = {site: c.mean_std_error.isnan() for site, c in found.sites.items()}
    if found.num_draws < MIN_DRAWS and all(nan.all() for nan in errors.values()):
        few = f"{found.num_draws} draws of each chain are too few to judge"
        return [Finding(Reason.FEW_EFFECTIVE, few)]
    findings = [
        Finding(Reason.NOT_FINITE, f"draws of {site!r} are not finite")
        for site, nan in errors.items()
        if nan.any()
    ]
    # A constant, such as the zeros of a triangular matrix, has no R-hat.
    r_hats = {site: _largest(found.r_hat(site)) for site in found.sites}
    worst = max(r_hats, key=r_hats.__getitem__)
    if r_hats[worst] > _MAX_R_HAT:
        name = "nested R-hat" if found.is_nested else "R-hat"
        large = f"{name} of {worst!r} is {r_hats[worst]:.3f} > {_MAX_R_HAT}"
        findings.append(Finding(Reason.NOT_MIXED, large))
    for kind in ("bulk", "tail"):
        sizes = {
            site: -_largest(-getattr(c, f"{kind}_ess"))
            for site, c in found.sites.items()
        }
        least = min(sizes, key=sizes.__getitem__)
        if sizes[least] < _MIN_ESS:
            small = f"{kind} ESS of {least!r} is {sizes[least]:.0f} < {_MIN_ESS}"
            findings.append(Finding(Reason.FEW_EFFECTIVE, small))
    return findings


def _largest(values: Tensor) -> float:
    known = values[~values.isnan()]
    return known.max().item() if len(known) else -torch.inf


def _chain_findings(found: Diagnostics, num_transitions: int) -> list[Finding]:
    findings = []
    share = found.num_divergences / (found.num_chains * num_transitions)
    if share > _MAX_DIVERGENT:
        diverged = f"{share:.2%} of the transitions diverged"
        findings.append(Finding(Reason.DIVERGENCES, diverged))
    if found.num_stuck:
        stuck = f"{found.num_stuck:,} of {found.num_chains:,} chains are stuck"
        findings.append(Finding(Reason.STUCK, stuck))
    if found.num_stray:
        stray = (
            f"{found.num_stray:,} of {found.num_chains:,} chains stay in another place "
            "than the others, by their energies"
        )
        findings.append(Finding(Reason.NOT_MIXED, stray))
    bfmi = found.energy_bfmi.nanmedian().item()
    if bfmi < _MIN_BFMI:
        slow = (
            f"the energy fraction of missing information is {bfmi:.2f}, below "
            f"{_MIN_BFMI}: chains are slow to reach the tails"
        )
        findings.append(Finding(Reason.NOT_MIXED, slow))
    return findings
