r"""A second run of sequential Monte Carlo, where no proposal comes close.

From a base refitted to the particles of a first run (:mod:`pyro_ebm.partition.importance.refit`),
if few temperatures lead from there to the target, or a larger one from the base itself.
The value is Bennett's ratio along the temperatures. The run read forwards errs
downwards and read backwards upwards, the weights from the refitted base have a heavy
tail where its draws find mass that the particles have not, and the two runs may
disagree: each of these makes the estimate unreliable.
"""

__all__ = ["Run", "run_islands", "second_run"]

import math
from typing import NamedTuple

import pyro.distributions as dist

from pyro_ebm.core.verdict import Finding, Reason, status_of
from pyro_ebm.diagnostics import pareto_k
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.base import LogPartitionEstimate, combine_replicates
from pyro_ebm.partition.importance.refit import RefittedBase
from pyro_ebm.partition.particles.smc import Islands, run_smc

_REFIT_PARTICLES = 128
#: Temperatures from a refitted base that count as close.
_CLOSE = 3
_MAX_PARTICLES = 4096
#: Where the tail of the weights from a refitted base is too heavy. On Gaussians they
#: have 0.0 to 0.3; on targets whose tails the particles miss (a funnel, a Rosenbrock,
#: products of Student t), mostly 0.4 to 1.
_MAX_PARETO_K = 0.35


class Run(NamedTuple):
    """A run with its settings.

    Attributes:
        islands: What it has left.
        particles: Particles an island.
        is_refitted: Whether it came from a refitted base.
    """

    islands: Islands
    particles: int
    is_refitted: bool

    @property
    def cost(self) -> int:
        """Energy evaluations spent."""
        return self.islands.num_evaluations

    @property
    def num_temperatures(self) -> int:
        """Steps from the base to the target."""
        return len(self.islands.inverse_temperatures) - 1

    @property
    def has_arrived(self) -> bool:
        """Whether the particles are those of the target."""
        return self.islands.inverse_temperatures[-1] == 1


def second_run(
    path: GeometricPath,
    source: tuple[Energy, dist.TorchDistribution],
    pilot: Run,
    budget: int,
    spent: int,
) -> LogPartitionEstimate:
    """Spend what is left of the budget on the better of the two bases.

    Args:
        path: From the base to the target.
        source: The energy and its base.
        pilot: The first run.
        budget: Energy evaluations aimed at in all.
        spent: Of those, so far.
    """
    num_islands = len(pilot.islands.log_partition)
    refitted = RefittedBase(pilot.islands.state.u.flatten(0, 1), path)
    short = run_islands(
        path.target, refitted, num_islands, _REFIT_PARTICLES, 8, stop_after=_CLOSE
    )
    spent += short.cost
    close = short.has_arrived
    final = short if close else pilot
    factor = (budget - spent) // final.cost
    if factor >= 1:
        particles = min(final.particles * factor, _MAX_PARTICLES)
        if close:
            source = path.target, refitted
        final = run_islands(*source, num_islands, particles, 8 if close else 16)
        spent += final.cost
    return _judge(pilot, final, spent)


def run_islands(
    energy: Energy,
    base: dist.TorchDistribution,
    num_islands: int,
    particles: int,
    chain_length: int,
    *,
    stop_after: int | None = None,
) -> Run:
    """Run SMC and keep its settings; see :func:`pyro_ebm.partition.particles.smc.run_smc`."""
    is_refitted = isinstance(base, RefittedBase)
    islands = run_smc(
        energy,
        base,
        num_islands=num_islands,
        num_particles=particles,
        chain_length=chain_length,
        stop_after=stop_after,
    )
    return Run(islands, particles, is_refitted)


def _judge(pilot: Run, final: Run, spent: int) -> LogPartitionEstimate:
    islands = final.islands
    value, std_error, half = combine_replicates(islands.bennett)
    forward, _, _ = combine_replicates(islands.log_partition)
    reverse = -combine_replicates(-islands.reverse)[0]
    reasons: list[Finding] = []
    if not math.isfinite(value):
        reasons.append(Finding(Reason.NOT_FINITE, "the estimate is not finite"))
    if half > 0.3:
        text = f"the islands disagree: 95 % half-width {half:.2g}"
        reasons.append(Finding(Reason.ISLANDS_DISAGREE, text))
    # Far from any refit the tails are unknown, and the run itself must tell.
    limit = 0.2 if final.is_refitted else 0.1
    if not abs(reverse - forward) < limit:
        text = f"forwards and backwards differ by {abs(reverse - forward):.2g}"
        reasons.append(Finding(Reason.DIRECTIONS_DISAGREE, text))
    k_hat = pareto_k(islands.initial_log_weights.flatten())
    if final.is_refitted and k_hat > _MAX_PARETO_K:
        text = f"heavy-tailed weights from the refitted base: k-hat {k_hat:.2f}"
        reasons.append(Finding(Reason.HEAVY_WEIGHTS, text))
    first, first_error, _ = combine_replicates(pilot.islands.bennett)
    apart = abs(first - value)
    if final is not pilot and apart > 3 * math.hypot(first_error, std_error) + 0.1:
        text = f"the two stages differ by {apart:.2g}"
        reasons.append(Finding(Reason.ROUTES_DISAGREE, text))
    return LogPartitionEstimate(
        value,
        std_error,
        value - half,
        value + half,
        islands.ess * islands.state.target.numel(),
        status_of(reasons),
        f"SMC from the {'refitted ' if final.is_refitted else ''}base, "
        f"{final.num_temperatures} temperatures, {final.particles} particles",
        spent,
        tuple(reasons),
    )
