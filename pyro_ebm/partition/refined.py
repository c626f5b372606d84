r"""Log Z in two stages: find the target, then measure it.

1. A pilot run of waste-free SMC goes from the base to the target with few particles.
   Its particles are tested for signs that there is no partition function.
2. A proposal is fitted to the particles and refined by adaptive importance sampling
   (:mod:`pyro_ebm.partition.adaptive`). If it comes close to the target, what is left
   of the budget goes into independent draws of it: their weights give an unbiased
   estimate of Z and an interval that needs no Markov chain to have mixed.
3. Otherwise the second stage is a second SMC run along the temperatures: from a
   base refitted to the particles (:mod:`pyro_ebm.partition.refit`) if few temperatures
   lead from there to the target, or a larger one from the base itself; the value is
   Bennett's ratio along the temperatures.

What the islands of SMC cannot see by their spread, since all may miss the same tail,
shows elsewhere: the weights of a fitted proposal have a heavy tail where its draws find
mass that the particles have not; the run read forwards errs downwards and read
backwards upwards; and the stages disagree. Each of these makes the estimate unreliable.
"""

__all__ = ["refined_smc"]

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch

from pyro_ebm.diagnostics import pareto_k
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.adaptive import Adaptation, adapt_proposal, log_target
from pyro_ebm.partition.base import LogPartitionEstimate, combine_replicates
from pyro_ebm.partition.importance import chunks, estimate_from_weights
from pyro_ebm.partition.normalizability import Normalizability, check_normalizability
from pyro_ebm.partition.refit import RefittedBase
from pyro_ebm.partition.smc import Islands, run_smc

#: Smallest budget that lets the pilot run arrive on easy targets.
MIN_BUDGET = 5_000
_PILOT_PARTICLES = 64
_PILOT_CHAIN_LENGTH = 4
#: Budget for each doubling of the pilot run's particles.
_PILOT_BUDGET = 75_000
#: Beyond, families with a parameter or more a coordinate cost too many draws.
_MAX_ADAPTIVE_DIM = 64
_MAX_ROUNDS = 12
_MIN_DRAWS = 1000
#: Numbers drawn at once.
_CHUNK = 2**22
#: Effective fraction of the last round with which a proposal is worth measuring with.
_MIN_FRACTION = 0.02
_REFIT_PARTICLES = 128
#: Temperatures from a refitted base that count as close.
_CLOSE = 3
_MAX_PARTICLES = 4096
#: Where the tail of the weights from a refitted base is too heavy. On Gaussians they
#: have 0.0 to 0.3; on targets whose tails the particles miss (a funnel, a Rosenbrock,
#: products of Student t), mostly 0.4 to 1.
_MAX_PARETO_K = 0.35


class _Run(NamedTuple):
    islands: Islands
    particles: int
    is_refitted: bool

    @property
    def cost(self) -> int:
        return self.islands.num_evaluations

    @property
    def num_temperatures(self) -> int:
        return len(self.islands.inverse_temperatures) - 1


@torch.no_grad()
def refined_smc(
    energy: Energy,
    base: dist.TorchDistribution,
    *,
    budget: int = 50_000,
    num_replicates: int = 4,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` by SMC from the base, then from a better base.

    Args:
        energy: On any support that ``biject_to`` knows.
        base: A normalised distribution on the same event and support.
        budget: Energy evaluations aimed at; the pilot run alone may take more on hard
            targets, and less is spent where the number of particles would exceed 4,096
            an island.
        num_replicates: Independent islands of particles, at least 4.

    Returns:
        The estimate with its verdict; ``"not_normalizable"`` with the evidence where
        the tails say so.

    Raises:
        DivergenceError: If no draw of the base has a finite energy.
        ValueError: If the budget is too small to do anything, or the base does not fit.

    Exactness: *consistent*.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.ones(4))
        >>> base = dist.Normal(torch.zeros(4), 2.0).to_event(1)
        >>> estimate = refined_smc(energy, base, budget=10_000)
        >>> estimate.status, abs(estimate.value - 3.6758) < 0.1
        ('ok', True)
    """
    if budget < MIN_BUDGET:
        raise ValueError(
            f"budget must be at least {MIN_BUDGET} energy evaluations for SMC, got "
            f"{budget}. Importance sampling from a good proposal needs fewer."
        )
    if num_replicates < 4:
        raise ValueError(
            f"num_replicates must be at least 4 for an error bar, got {num_replicates}."
        )
    path = GeometricPath(energy, base)
    # First at draws of the base: a pilot run that has no end would not return.
    rays = check_normalizability(path.target, path.start(_PILOT_PARTICLES).u)
    if not rays.is_normalizable:
        return _not_normalizable(rays)
    particles = _PILOT_PARTICLES * 2 ** min(4, budget // _PILOT_BUDGET)
    pilot = _run(energy, base, num_replicates, particles, _PILOT_CHAIN_LENGTH)
    u = pilot.islands.state.u.flatten(0, 1)
    rays = check_normalizability(path.target, u)
    if not rays.is_normalizable:
        return _not_normalizable(rays)
    spent = 2 * rays.num_evaluations + pilot.cost
    if u[0].numel() <= _MAX_ADAPTIVE_DIM:
        ancestors = num_replicates * particles / _PILOT_CHAIN_LENGTH
        num_draws = max(_MIN_DRAWS, budget // (2 * _MAX_ROUNDS))
        rounds = max(1, min(_MAX_ROUNDS, (budget - spent) // (2 * num_draws)))
        adapted = adapt_proposal(
            path, u, ancestors, num_draws=num_draws, num_rounds=rounds
        )
        spent += adapted.num_evaluations
        if adapted.fractions[-1] > _MIN_FRACTION:
            return _measure(path, pilot, adapted, max(num_draws, budget - spent), spent)
    refitted = RefittedBase(u, path)
    short = _run(path.target, refitted, num_replicates, _REFIT_PARTICLES, 8)
    spent += short.cost
    close = short.num_temperatures <= _CLOSE
    final = short if close else pilot
    factor = (budget - spent) // final.cost
    if factor >= 1:
        particles = min(final.particles * factor, _MAX_PARTICLES)
        source = (path.target, refitted) if close else (energy, base)
        final = _run(*source, num_replicates, particles, 8 if close else 16)
        spent += final.cost
    return _judge(pilot, final, spent)


def _measure(
    path: GeometricPath, pilot: _Run, adapted: Adaptation, num_draws: int, spent: int
) -> LogPartitionEstimate:
    """Importance sampling from a proposal that was fitted to other draws."""
    log_weights = []
    for count in chunks(num_draws, _CHUNK // path.event_shape.numel()):
        u = adapted.proposal.sample(count)
        log_weights.append(log_target(path, u) - adapted.proposal.log_prob(u))
    rounds = len(adapted.fractions)
    result = estimate_from_weights(
        torch.cat(log_weights),
        f"importance sampling from a proposal fitted to SMC in {rounds} rounds",
        spent + num_draws,
    )
    first, first_error, _ = combine_replicates(pilot.islands.bennett)
    more = first - result.value
    # One-sided: with few particles SMC errs downwards, and that proves nothing.
    if more > 3 * math.hypot(first_error, result.std_error) + 0.1:
        reason = f"SMC found {more:.2g} nats more than the proposal fitted to it"
        reasons = "; ".join(filter(None, (result.reason, reason)))
        return result._replace(status="unreliable", reason=reasons)
    return result


def _run(
    energy: Energy,
    base: dist.TorchDistribution,
    num_islands: int,
    particles: int,
    chain_length: int,
) -> _Run:
    is_refitted = isinstance(base, RefittedBase)
    islands = run_smc(
        energy,
        base,
        num_islands=num_islands,
        num_particles=particles,
        chain_length=chain_length,
    )
    return _Run(islands, particles, is_refitted)


def _not_normalizable(rays: Normalizability) -> LogPartitionEstimate:
    nan = math.nan
    return LogPartitionEstimate(
        math.inf, nan, nan, nan, nan, "not_normalizable", "ray test",
        rays.num_evaluations, rays.evidence,
    )  # fmt: skip


def _judge(pilot: _Run, final: _Run, spent: int) -> LogPartitionEstimate:
    islands = final.islands
    value, std_error, half = combine_replicates(islands.bennett)
    forward, _, _ = combine_replicates(islands.log_partition)
    reverse = -combine_replicates(-islands.reverse)[0]
    reasons = []
    if not math.isfinite(value):
        reasons.append("the estimate is not finite")
    if half > 0.3:
        reasons.append(f"the islands disagree: 95 % half-width {half:.2g}")
    # Far from any refit the tails are unknown, and the run itself must tell.
    limit = 0.2 if final.is_refitted else 0.1
    if not abs(reverse - forward) < limit:
        reasons.append(f"forwards and backwards differ by {abs(reverse - forward):.2g}")
    k_hat = pareto_k(islands.initial_log_weights.flatten())
    if final.is_refitted and k_hat > _MAX_PARETO_K:
        reasons.append(
            f"heavy-tailed weights from the refitted base: k-hat {k_hat:.2f}"
        )
    first, first_error, _ = combine_replicates(pilot.islands.bennett)
    apart = abs(first - value)
    if final is not pilot and apart > 3 * math.hypot(first_error, std_error) + 0.1:
        reasons.append(f"the two stages differ by {apart:.2g}")
    return LogPartitionEstimate(
        value,
        std_error,
        value - half,
        value + half,
        islands.ess * islands.state.target.numel(),
        "unreliable" if reasons else "ok",
        f"SMC from the {'refitted ' if final.is_refitted else ''}base, "
        f"{final.num_temperatures} temperatures, {final.particles} particles",
        spent,
        "; ".join(reasons),
    )
