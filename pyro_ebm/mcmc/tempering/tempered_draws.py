r"""Results of replica exchange: draws, swap rates, and an estimate of log Z.

The ladder gives :math:`\log Z` by stepping stones, from either side:

.. math::
    \log Z = \sum_k \log \mathbb{E}_k\, e^{-(\beta_{k+1} - \beta_k) V}
           = -\sum_k \log \mathbb{E}_{k+1}\, e^{(\beta_{k+1} - \beta_k) V} \tag{1}

with :math:`V = f - f_0`. The first errs downwards, the second upwards. Where :math:`f`
may be infinite, the part of the base where it is finite adds its log probability to the
second.

References:
    Xie, Lewis, Fan, Kuo & Chen (2011), Systematic Biology 60, 150-160.
"""

__all__ = ["LadderSums", "TemperedDraws"]

import math
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
        log_partition_std_error: From the spread over groups of chains, and the gap of
            the two estimates, within which any value is as likely; ``nan`` for a single
            chain. Of 60 runs on Ising lattices below the critical temperature, with 5
            temperatures, 57 were within two of it, and all within three.
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
    """

    #: Groups of chains whose spread is the error of the log partition function.
    NUM_GROUPS = 16
    #: Difference of the two estimates (1) that is too large, in nats.
    MAX_GAP = 0.5
    #: Share of chains without an arrival that is too large.
    MAX_SHARE = 0.01

    def __init__(self, inverse_temperatures: Tensor) -> None:
        self.inverse_temperatures = inverse_temperatures
        self.count = 0

    def add(self, done: Exchange) -> None:
        """Count a step of all replicas."""
        up, down = between_neighbours(done.state, self.inverse_temperatures)
        new = (
            up,
            down,
            (up > -torch.inf).long(),
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
        std_error = math.nan
        if len(groups) > 1:
            std_error = values.std().item() / math.sqrt(len(groups))
            std_error = math.hypot(std_error, (upper - lower) / math.sqrt(12))
        swap_rates = self.swaps / self.count
        reasons = self._findings(upper - lower)
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

    def _log_partitions(self, chains: Tensor) -> tuple[float, float]:
        """The two estimates (1) of some chains."""
        log_count = math.log(self.count)
        lower = (log_mean_exp(self.up[chains], 0) - log_count).sum()  # (1)
        upper = -(log_mean_exp(self.down[chains], 0) - log_count).sum()
        log_finite = self.num_finite[chains].to(upper).mean(0).log() - log_count
        return lower.item(), (upper + log_finite.sum()).item()

    def _findings(self, gap: float) -> tuple[Finding, ...]:
        none = int((self.arrivals == 0).sum())
        findings = []
        if none > self.MAX_SHARE * len(self.arrivals):
            few = (
                f"no point of the base has arrived in {none} of {len(self.arrivals)} "
                "chains; run them longer, or take more temperatures or a nearer base"
            )
            findings.append(Finding(Reason.NOT_MIXED, few))
        if not gap < self.MAX_GAP:
            apart = f"log Z from above and from below differ by {gap:.2g} nats"
            findings.append(Finding(Reason.DIRECTIONS_DISAGREE, apart))
        return tuple(findings)
