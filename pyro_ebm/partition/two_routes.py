r"""Log Z by two routes that fail differently, and a verdict on whether they agree.

**A, particles.** Islands of particles travel from the base to the target by sequential
Monte Carlo. They find mass wherever it can be followed from the base, and lose a mode
that is narrow for the temperature at which it separates.

**B, modes.** Many draws of the base descend to the modes of the target, whose
curvatures make a mixture of Student distributions; a few rounds of adaptive importance
sampling widen it to the mass around them. It finds narrow modes, and misses mass that
no descent leads to.

What both have found is the proposal of the estimate: independent draws, which need no
Markov chain to have mixed. Either route errs downwards, where it misses a mode, so the
estimate may exceed A, and it may not fall short of it; and particles of A at which the
proposal is too thin show a mode that it lacks. Where no proposal comes close, particles
travel once more, from the proposal to the target.

References:
    Del Moral, Doucet & Jasra (2006), JRSS B 68, 411-436.
    Raftery & Bao (2010), Biometrics 66, 1162-1173.
"""

__all__ = ["Limits", "two_routes"]

import math
import time
from collections.abc import Sequence
from typing import NamedTuple, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.diagnostics.pareto import pareto_k, pareto_std_error
from pyro_ebm.energies import Energy
from pyro_ebm.errors import DivergenceError
from pyro_ebm.mcmc.modes import Modes, find_modes
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.base import (
    LogPartitionEstimate,
    combine_replicates,
    student_t_quantile,
)
from pyro_ebm.partition.importance.pool import (
    Pool,
    Proposes,
    difference,
    log_density,
    tempered,
)
from pyro_ebm.partition.importance.proposal import Proposal
from pyro_ebm.partition.importance.student_mixture import StudentMixture, fit_clusters
from pyro_ebm.partition.particles.engine import Journey, travel
from pyro_ebm.partition.particles.movers import AdaptiveHMC
from pyro_ebm.partition.progress import CountedEnergy

#: Islands of particles, and states kept of each ancestor.
_NUM_ISLANDS = 8
_CHAIN_LENGTH = 16
#: Evaluations a particle that a run takes, roughly, by which it is sized.
_COST = 80
_NUM_STARTS = 256
_MIN_STARTS = 32
_NUM_DRAWS = 4000
#: Effective fraction below which a proposal is none.
_MIN_FRACTION = 0.003
_MAX_K = 0.7
_MIN_ESS = 200.0
#: Share of the particles that may lie where the proposal is too thin.
_MAX_UNCOVERED = 0.003
#: What a difference of two routes may be, in nats, beyond three standard errors.
_SLACK = 0.05
_MAX_HALF_WIDTH = 0.5
#: Components for the particles, and times that one is added where they are bare.
_NUM_CLUSTERS = 12
_MAX_REPAIRS = 4


class Limits:
    """How long an estimate may take.

    Args:
        tolerance: Standard error wanted, in nats.
        max_seconds: Seconds after which it ends with what there is.
        budget: Energy evaluations aimed at; ``None`` for no limit.
    """

    def __init__(
        self, tolerance: float, max_seconds: float, budget: int | None
    ) -> None:
        self.tolerance, self.max_seconds, self.budget = tolerance, max_seconds, budget
        self.start = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> float:
        """Seconds of computing since the start.

        By the clock, or by the processor where others share it.
        """
        wall, cpu = self.start
        return min(time.monotonic() - wall, time.process_time() - cpu)

    def affordable(self, energy: CountedEnergy, share: float) -> float:
        """Evaluations that a share of what is left pays for."""
        seconds = (self.max_seconds - self.seconds) * share
        number = seconds / max(energy.seconds_each, 1e-9)
        if self.budget is not None:
            number = min(number, (self.budget - energy.num_evaluations) * share)
        return max(number, 0.0)

    def is_over(self, energy: CountedEnergy) -> bool:
        """Whether time or evaluations are spent."""
        is_spent = self.budget is not None and energy.num_evaluations >= self.budget
        return is_spent or self.seconds > self.max_seconds


class _Value(NamedTuple):
    """An estimate of one route with its error."""

    value: float
    std_error: float


@torch.no_grad()
def two_routes(
    energy: Energy, base: dist.TorchDistribution, limits: Limits, *, is_shown: bool
) -> LogPartitionEstimate:
    """Estimate log Z by both routes; see the module.

    Args:
        energy: On any continuous support that ``biject_to`` knows.
        base: A normalised distribution on its event and support.
        limits: Of time and evaluations.
        is_shown: Whether to show a progress bar.

    Exactness: *consistent*.
    """
    path = GeometricPath(energy, base, is_double=True)
    target = CountedEnergy(path.target, limits.budget, is_shown=is_shown)
    path.target = target
    path.base = CountedEnergy(path.base)
    try:
        return _TwoRoutes(path, target, limits).run()
    finally:
        target.bar.close()


class _TwoRoutes:
    """The state of an estimate: what the routes have found so far."""

    def __init__(
        self, path: GeometricPath, target: CountedEnergy, limits: Limits
    ) -> None:
        self.path, self.target, self.limits = path, target, limits
        self.pool = Pool(target)
        self.dim = path.event_shape.numel()
        self.findings: list[Finding] = []

    def run(self) -> LogPartitionEstimate:
        modes = self.descend()
        proposal = self.adapt(self.around(modes), 3)
        journey = self.particles(self.path, self.size(0.25, 1024))
        if journey is None:
            return self.from_weights(proposal, None, None)
        first = _value_of(journey)
        particles = journey.state.u.flatten(0, 1).reshape(-1, self.dim)
        proposal = self.union(proposal, journey, particles)
        if self.fraction(proposal) > _MIN_FRACTION:
            found = self.from_weights(proposal, first, particles)
            if found.is_reliable:
                return found
            self.findings = list(found.reasons)
        return self.from_particles(proposal, first)

    # Route B.

    def num_draws(self) -> int:
        return int(min(_NUM_DRAWS, max(500, self.limits.affordable(self.target, 0.02))))

    def descend(self) -> Modes | None:
        """The modes that draws of the base descend to."""
        start = self.path.draw_base(_NUM_STARTS).reshape(_NUM_STARTS, -1).double()
        start = start[start.isfinite().all(-1)]
        if len(start) < 2:
            return None
        for _ in range(3):  # to learn what an evaluation costs, once it is traced
            self.value_and_grad(start[:64])
        number = int(self.limits.affordable(self.target, 0.2) / 100)
        if number < _MIN_STARTS:
            text = f"time or budget for {number} descents, fewer than {_MIN_STARTS}"
            self.findings.append(Finding(Reason.OUT_OF_BUDGET, text))
            return None if number < 4 else find_modes(self.value_and_grad, start[:number])
        return find_modes(self.value_and_grad, start[:number])

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The target over flat vectors."""
        shaped = u.reshape(len(u), *self.path.event_shape)
        value, grad = self.target.value_and_grad(shaped)
        return value.double(), grad.reshape(u.shape).double()

    def around(self, modes: Modes | None) -> Proposal:
        """A Student mixture on the modes."""
        if modes is None:
            return Proposal(self.path)
        weights = modes.log_mass.softmax(0).clamp(min=1e-3)
        mixture = StudentMixture(weights / weights.sum(), modes.loc, modes.scale_tril)
        return Proposal(self.path, mixture)

    def adapt(self, proposal: Proposal, num_rounds: int) -> Proposal:
        """Refit a proposal to the weighted draws of a few rounds."""
        for _ in range(num_rounds):
            if self.limits.is_over(self.target):
                break
            self.pool.add(proposal, self.num_draws())
            log_weights = self.pool.log_weights()
            if not (log_weights > -torch.inf).any():
                break
            tamed = tempered(log_weights, max(500.0, 5.0 * self.dim))
            proposal = proposal.refitted(self.pool.draws(), tamed.softmax(0))
        return proposal

    def fraction(self, proposal: Proposal) -> float:
        """Effective fraction of the weights of some draws."""
        return effective_sample_fraction(self.pool.add(proposal, 1000)).item()

    # Route A.

    def size(self, share: float, most: int) -> int:
        """Particles an island that a share of what is left pays for."""
        number = self.limits.affordable(self.target, share) / _NUM_ISLANDS / _COST
        power = int(math.log2(max(number, 4 * _CHAIN_LENGTH)))
        return min(most, 2**power)

    def particles(self, path: GeometricPath, num_particles: int) -> Journey | None:
        """Islands that have travelled a path, or ``None`` if they did not arrive."""
        try:
            state = path.start(_NUM_ISLANDS, num_particles)
            journey = travel(
                state,
                AdaptiveHMC(path, _CHAIN_LENGTH - 1),
                num_ancestors=num_particles // _CHAIN_LENGTH,
                is_over=lambda: self.limits.is_over(self.target),
            )
        except DivergenceError as error:
            self.findings.append(Finding(Reason.NOT_ARRIVED, str(error)))
            return None
        if not journey.has_arrived:
            beta = journey.inverse_temperatures[-1]
            text = f"time or budget ended at the inverse temperature {beta:.2g}"
            self.findings.append(Finding(Reason.OUT_OF_BUDGET, text))
            return None
        return journey

    def union(self, proposal: Proposal, journey: Journey, u: Tensor) -> Proposal:
        """The proposal with what the particles have found besides."""
        shares = journey.bennett.softmax(0)[:, None] / journey.state.target.shape[1]
        weights = shares.expand_as(journey.state.target).flatten()
        clusters = fit_clusters(u, weights, _NUM_CLUSTERS)
        proposal = self.adapt(proposal.joined(clusters, 0.5), 2)
        for _ in range(_MAX_REPAIRS):
            is_bare = self.uncovered(proposal, u, self.pool.log_weights())
            number = int(is_bare.sum())
            if number <= _MAX_UNCOVERED / 3 * len(u) or self.limits.is_over(self.target):
                break
            bare = weights[is_bare] / weights[is_bare].sum()
            extra = fit_clusters(u[is_bare], bare, 1 if number < 200 else 4)
            proposal = self.adapt(proposal.joined(extra, 0.3), 2)
        return proposal

    # The estimate.

    def from_weights(
        self, proposal: Proposal, first: _Value | None, particles: Tensor | None
    ) -> LogPartitionEstimate:
        """Importance sampling, by as many draws as the tolerance takes."""
        parts = [self.weigh(proposal, 20_000)]
        while True:
            log_weights = torch.cat(parts)
            fraction = max(effective_sample_fraction(log_weights).item(), 1e-6)
            wanted = 1.5 / fraction / self.limits.tolerance**2
            left = self.limits.affordable(self.target, 0.5)
            number = int(min(wanted - len(log_weights), left, 200_000))
            if number < 2000 or len(log_weights) > 2_000_000:
                break
            parts.append(self.weigh(proposal, number))
        value = log_mean_exp(log_weights).item()
        std_error = pareto_std_error(log_weights)
        findings = self.judge_weights(log_weights)
        if first is None:
            findings.append(Finding(Reason.ONE_ROUTE, "no particles to compare with"))
        else:
            findings += _shortfall(value, std_error, first)
        if particles is not None:
            findings += self.coverage(proposal, particles, log_weights)
        return self.estimate(
            value,
            std_error,
            student_t_quantile(3),
            fraction * len(log_weights),
            findings,
            "importance sampling from a proposal fitted to modes and particles",
        )

    def weigh(self, proposal: Proposal, number: int) -> Tensor:
        """Log-weights of fresh draws, shape ``(number,)``."""
        u = proposal.sample(number)
        return difference(log_density(self.target, u), proposal.log_prob(u))

    def judge_weights(self, log_weights: Tensor) -> list[Finding]:
        """What the weights say against themselves."""
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

    def uncovered(
        self, proposal: Proposal, u: Tensor, log_weights: Tensor
    ) -> Tensor:
        """Particles at which a single draw would weigh more than any did, ``(N,)``."""
        own = difference(log_density(self.target, u), proposal.log_prob(u))
        heavy = log_mean_exp(log_weights) + math.log(0.02 * len(log_weights))
        return own > torch.maximum(heavy, log_weights.max())

    def coverage(
        self, proposal: Proposal, u: Tensor, log_weights: Tensor
    ) -> list[Finding]:
        """Whether the proposal is too thin where particles are."""
        share = self.uncovered(proposal, u, log_weights).double().mean().item()
        if share <= _MAX_UNCOVERED:
            return []
        text = f"{share:.1%} of the particles lie where the proposal is too thin"
        return [Finding(Reason.NOT_COVERED, text)]

    def from_particles(
        self, proposal: Proposal, first: _Value
    ) -> LogPartitionEstimate:
        """Particles from the proposal to the target, more and more of them."""
        path = GeometricPath(
            self.target, _FlatBase(proposal, self.path.event_shape), is_double=False
        )
        runs: list[_Value] = []
        number = 512
        while True:
            journey = self.particles(path, number)
            if journey is None:
                break
            runs.append(_value_of(journey))
            gap = _gap_of(journey)
            if runs[-1].std_error < self.limits.tolerance or number >= 16384:
                break
            afford = self.limits.affordable(self.target, 0.6)
            number *= 4
            if afford < number * _NUM_ISLANDS * _COST / 2:
                break
        if not runs:
            nan = math.nan
            return self.estimate(nan, nan, nan, nan, [], "particles")
        value, std_error = runs[-1]
        findings = _shortfall(value, std_error, first)
        half = student_t_quantile(_NUM_ISLANDS - 1)
        if not half * std_error < _MAX_HALF_WIDTH:
            text = f"the islands disagree: standard error {std_error:.2g}"
            findings.append(Finding(Reason.ISLANDS_DISAGREE, text))
        if not gap < 0.5 + 4 * std_error:
            text = f"forwards and backwards differ by {gap:.2g}"
            findings.append(Finding(Reason.DIRECTIONS_DISAGREE, text))
        others = [first, *runs[:-1]]
        near = [r for r in others if abs(r.value - value) < 3 * math.hypot(r.std_error, std_error) + _SLACK]
        if not near:
            text = f"no other run agrees: {', '.join(f'{r.value:.3f} +- {r.std_error:.2g}' for r in others)}"
            findings.append(Finding(Reason.ROUTES_DISAGREE, text))
        ess = math.nan
        return self.estimate(
            value, std_error, half, ess, findings,
            f"SMC from a proposal fitted to modes and particles, {len(journey.inverse_temperatures) - 1 if journey else 0} temperatures",
        )

    def estimate(
        self,
        value: float,
        std_error: float,
        num_errors: float,
        ess: float,
        findings: Sequence[Finding],
        method: str,
    ) -> LogPartitionEstimate:
        """The estimate with its verdict."""
        findings = list(findings)
        if not math.isfinite(value):
            findings.append(Finding(Reason.NOT_FINITE, "the estimate is not finite"))
            findings = self.findings + findings
        half = num_errors * std_error
        return LogPartitionEstimate(
            value,
            std_error,
            value - half,
            value + half,
            ess,
            Status.UNRELIABLE if findings else Status.OK,
            method,
            self.target.num_evaluations,
            tuple(findings),
            self.limits.seconds,
        )


def _value_of(journey: Journey) -> _Value:
    value, std_error, _ = combine_replicates(journey.bennett)
    return _Value(value, std_error)


def _gap_of(journey: Journey) -> float:
    forward = combine_replicates(journey.forward)[0]
    reverse = -combine_replicates(-journey.reverse)[0]
    return abs(reverse - forward)


def _shortfall(value: float, std_error: float, first: _Value) -> list[Finding]:
    """Whether particles from the base have found more."""
    more = first.value - value
    if not more > 3 * math.hypot(first.std_error, std_error) + _SLACK:
        return []
    text = (
        f"particles from the base found {more:.2g} nats more: {first.value:.3f} +- "
        f"{first.std_error:.2g} against {value:.3f} +- {std_error:.2g}"
    )
    return [Finding(Reason.ROUTES_DISAGREE, text)]


@final
class _FlatBase(dist.TorchDistribution):
    """A proposal over flat vectors as a base over an event."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, proposal: Proposes, event_shape: torch.Size) -> None:
        super().__init__(torch.Size(), event_shape, validate_args=False)
        self.proposal = proposal

    @property
    def support(self) -> constraints.Constraint:
        """All of unconstrained space."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density at ``u`` of shape ``(*batch, *event)``."""
        batch = u.shape[: u.dim() - len(self.event_shape)]
        return self.proposal.log_prob(u.reshape(batch.numel(), -1)).reshape(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws in random order, shape ``(*sample, *event)``."""
        number = torch.Size(sample_shape).numel()
        draws = self.proposal.sample(number)[torch.randperm(number)]
        return draws.reshape(*sample_shape, *self.event_shape)
