r"""Results of replica exchange: draws, swap rates, and an estimate of log Z.

The ladder gives :math:`\log Z` by stepping stones, from either side:

.. math::
    \log Z = \sum_k \log \mathbb{E}_k\, e^{-(\beta_{k+1} - \beta_k) V}
           = -\sum_k \log \mathbb{E}_{k+1}\, e^{(\beta_{k+1} - \beta_k) V} \tag{1}

with :math:`V = f - f_0`. The first errs downwards, the second upwards. Where :math:`f`
may be infinite, the part of the base where it is finite adds its log probability to the
second; where :math:`f_0` may be, the part of the target takes its own from the first.

References:
    Xie, Lewis, Fan, Kuo & Chen (2011), Systematic Biology 60, 150-160.
"""

__all__ = ["LadderSums", "TemperedDraws"]

import math
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.core.html import rows_table
from pyro_ebm.core.verdict import Finding, Reason, Status, in_words, sentence, status_of
from pyro_ebm.diagnostics import log_mean_exp
from pyro_ebm.mcmc.tempering.ladder import Exchange, between_neighbours


class TemperedDraws(NamedTuple):
    r"""Results of a run of replica exchange.

    Attributes:
        draws: Points of the support, shape ``(C, N, *event)``.
        inverse_temperatures: As adapted, shape ``(K,)``.
        swap_rates: Mean swap probability of neighbours, shape ``(K - 1,)``.
        round_trips: Points from the base that arrived at the energy in each chain,
            shape ``(C,)``. Their sum is about the number of draws that are independent
            as to the mode that they are in.
        barrier: The communication barrier :math:`\Lambda`: the sum of the rates at
            which neighbours do not swap. About :math:`2\Lambda + 1` temperatures serve
            best.
        accept_prob: Mean acceptance of the kernel at each temperature but the base's,
            shape ``(K - 1,)``.
        step_sizes: Of the kernel at each of them, shape ``(K - 1,)``; ``nan`` for one
            that has none.
        log_partition: :math:`\log Z`, the mean of the two estimates (1).
        log_partition_std_error: From the spread over groups of chains, the gap of
            the two estimates, within which any value is as likely, and the change from
            the first half of the run to all of it, four times, where it is more than
            chance over sites; ``nan`` for a single chain. Of 60 runs on Ising lattices
            below the critical temperature, with 5 temperatures, 57 were within two of
            it, and all within three.
        num_evaluations: Energy evaluations spent, warm-up included, a point each.
        status: ``"ok"`` or ``"unreliable"``.
        reasons: The findings that led to it; empty if it is ``"ok"``.
    """

    draws: Tensor
    inverse_temperatures: Tensor
    swap_rates: Tensor
    round_trips: Tensor
    barrier: float
    accept_prob: Tensor
    step_sizes: Tensor
    log_partition: float
    log_partition_std_error: float
    num_evaluations: int
    status: Status
    reasons: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"ok"``."""
        return self.status.is_reliable

    def __str__(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self._rows().items())

    def _repr_html_(self) -> str:
        return rows_table("Replica exchange", self._rows())

    def _rows(self) -> dict[str, str]:
        log_partition = (
            f"{self.log_partition:.4f} +- {self.log_partition_std_error:.4f}"
        )
        none = int((self.round_trips == 0).sum())
        return {
            "draws": f"{len(self.draws):,} chains of {self.draws.shape[1]:,}",
            "verdict": in_words(self.status, self.reasons),
            "round trips": f"{int(self.round_trips.sum()):,}, none in {none:,} chains",
            "swap rates": f"{self.swap_rates.min().item():.2f} to "
            f"{self.swap_rates.max().item():.2f}, barrier {self.barrier:.2f}, "
            f"{len(self.inverse_temperatures)} temperatures",
            "log Z": f"{log_partition} nats",
            "energy evaluations": f"{self.num_evaluations:,}",
        }


class LadderSums:
    """Running sums over the steps after the warm-up.

    Args:
        inverse_temperatures: From 0 to 1, shape ``(K,)``.
        num_steps: Steps that are to be added, for a look at the first half of them; 0
            for none.
    """

    #: Groups of chains whose spread is the error of the log partition function.
    NUM_GROUPS = 16
    #: Difference of the two estimates (1) that is too large, in nats.
    MAX_GAP = 0.5
    #: Share of draws where the base has no probability that is too large.
    MAX_MISSED = 0.001
    #: What the start may have moved log Z that is too much, in nats.
    MAX_DRIFT = 0.2
    #: Share of chains without an arrival that is too large.
    MAX_SHARE = 0.01
    #: Standard errors beyond which a change along the run is no chance.
    CHANCE = 2.5

    def __init__(self, inverse_temperatures: Tensor, num_steps: int) -> None:
        self.inverse_temperatures, self.num_steps = inverse_temperatures, num_steps
        self.count = 0
        self._half: LadderSums | None = None

    def add(self, done: Exchange) -> None:
        """Count a step of all replicas."""
        if self.count and self.count == self.num_steps // 2:
            self._half = copy(self)  # sums are replaced, not changed
        up, down = between_neighbours(done.state, self.inverse_temperatures)
        new = (
            up,
            down,
            torch.stack([up, down]).isfinite().long(),
            done.info.accept_prob.mean(0),
            done.swap_prob.mean(0),
            done.arrived.long(),
        )
        self.count += 1
        if self.count == 1:
            self.up, self.down, self.num_finite, *others = new
            self.accept, self.swaps, self.arrivals = others
            return
        self.up = torch.logaddexp(self.up, new[0])
        self.down = torch.logaddexp(self.down, new[1])
        self.num_finite = self.num_finite + new[2]
        self.accept = self.accept + new[3]
        self.swaps = self.swaps + new[4]
        self.arrivals = self.arrivals + new[5]

    def result(
        self, draws: Tensor, step_sizes: Tensor, num_evaluations: int
    ) -> TemperedDraws:
        """All that is known, with a verdict.

        Args:
            draws: Shape ``(C, N, *event)``.
            step_sizes: Shape ``(K - 1,)``.
            num_evaluations: Spent in all.
        """
        chains = torch.arange(len(self.arrivals), device=self.arrivals.device)
        lower, upper = self._log_partitions(chains)
        groups = chains.tensor_split(min(len(chains), self.NUM_GROUPS))
        values = torch.tensor([sum(self._log_partitions(g)) / 2 for g in groups])
        drift, std_error = self._drift(groups, values), math.nan
        missed = 1 - self.num_finite[1].double().mean(0).min().item() / self.count
        if len(groups) > 1:
            spread = values.std().item() / math.sqrt(len(groups))
            std_error = math.hypot(spread, (upper - lower) / math.sqrt(12), drift)
        swap_rates = self.swaps / self.count
        reasons = self._findings(upper - lower, drift, missed)
        return TemperedDraws(
            draws,
            self.inverse_temperatures,
            swap_rates,
            self.arrivals,
            (1 - swap_rates).sum().item(),
            self.accept / self.count,
            step_sizes,
            (lower + upper) / 2,
            std_error,
            num_evaluations,
            status_of(reasons),
            reasons,
        )

    def _drift(self, groups: Sequence[Tensor], values: Tensor) -> float:
        """How far what the chains began with may have moved the estimate."""
        if self._half is None:
            return 0.0
        before = [sum(self._half._log_partitions(group)) / 2 for group in groups]
        change = values - torch.tensor(before)
        chance = self.CHANCE * change.std() / math.sqrt(len(groups))
        # Of a slow approach more is left than the second half has changed.
        drift = 4 * change.mean().abs()
        return drift.item() if change.mean().abs() > chance else 0.0

    def _log_partitions(self, chains: Tensor) -> tuple[float, float]:
        """The two estimates (1) of some chains."""
        log_count = math.log(self.count)
        lower = (log_mean_exp(self.up[chains], 0) - log_count).sum()  # (1)
        upper = -(log_mean_exp(self.down[chains], 0) - log_count).sum()
        finite = self.num_finite[:, chains].to(upper).mean(1) / self.count
        shares = finite.log().sum(-1)
        return (lower - shares[1]).item(), (upper + shares[0]).item()

    def _findings(self, gap: float, drift: float, missed: float) -> tuple[Finding, ...]:
        none = int((self.arrivals == 0).sum())
        findings = []
        if none > self.MAX_SHARE * len(self.arrivals):
            few = (
                f"no point of the base has arrived in {none} of {len(self.arrivals)} "
                "chains; run them longer, or take more temperatures or a nearer base"
            )
            findings.append(Finding(Reason.NOT_MIXED, few))
        if drift > self.MAX_DRIFT:
            moves = (
                "log Z has moved along the run, and may by another "
                f"{drift:.2g} nats; give more steps"
            )
            findings.append(Finding(Reason.NOT_MIXED, moves))
        if missed > self.MAX_MISSED:
            apart = (
                f"{missed:.2g} of the draws are where the base has no probability, "
                "which no replica leads to. Give each value of each site some in the "
                "base"
            )
            findings.append(Finding(Reason.BASE_MISSES, apart))
        if not gap < self.MAX_GAP:
            apart = f"log Z from above and from below differ by {gap:.2g} nats"
            findings.append(Finding(Reason.DIRECTIONS_DISAGREE, apart))
        return tuple(findings)
