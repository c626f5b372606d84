r"""Log Z by particles and by modes, with a verdict on whether the two agree.

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

__all__ = ["two_routes"]

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.diagnostics.pareto import pareto_k, pareto_std_error
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.starts.modes import Modes, find_modes, valleys
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition.agreement import (
    Look,
    Value,
    disagreement,
    is_settled,
    judge_weights,
    settled,
)
from pyro_ebm.partition.base import LogPartitionEstimate, student_t_quantile
from pyro_ebm.partition.importance.pool import (
    FlatBase,
    Pool,
    Proposal,
    difference,
    log_density,
    of_draws,
    tempered,
)
from pyro_ebm.partition.importance.student_mixture import StudentMixture, fit_clusters
from pyro_ebm.partition.importance.triangular_map import fit_map
from pyro_ebm.partition.normalizability import lost_to_rounding
from pyro_ebm.partition.particles.engine import Journey, travel
from pyro_ebm.partition.particles.movers import AdaptiveHMC
from pyro_ebm.partition.progress import MAX_BYTES, CountedEnergy, Limits

#: Islands of particles, and states kept of each ancestor.
_NUM_ISLANDS = 8
#: Draws of the base for each particle; how many of an island should have a finite
#: energy, and numbers that the draws of all islands hold at most.
_FIRST, _FEWEST_FINITE, _MOST_NUMBERS = 4, 32, 2**23
_CHAIN_LENGTH = 16
#: Evaluations a particle that a run takes, roughly, by which it is sized.
_COST = 80
#: Draws of the base among which starts of descents are looked for; descents, roughly
#: how many gradients each takes, and the least of them.
_NUM_LOOKS, _NUM_STARTS = 32_768, 4096
_GRADIENTS, _MIN_STARTS = 50, 32
#: Modes that are measured, in few dimensions, and whose mirror images are looked at.
_MAX_MODES, _MAX_MIRRORED = 256, 32
#: Descents that a mode is met by, or others of its kind may have been missed; the mass
#: of modes met by fewer from which on it matters; how many of them are too many; and
#: how many times as many draws are looked at for them.
_ENOUGH, _RARE, _MANY_RARE, _MOST_LOOKS = 3, 0.02, 16, 16
#: Looks far and wide, descents from the most surprising and as many others, rounds.
_NUM_FAR, _NUM_SURPRISING, _MAX_FAR = 65_536, 512, 4
#: Unconstrained values are rarely larger.
_USUAL = 2.0
#: Draws of the base that are timed.
_NUM_TIMED = 16
_NUM_DRAWS, _FEWEST_WEIGHED, _NUM_FITTED = 4000, 1000, 6000
#: With a heavier tail of the weights, the proposal is worked on.
_LIGHT_K = 0.35
#: Where the last look is by particles, errors are wider than they say.
_CAUTION = 3.0
#: Relative rounding of an energy in double precision, with a margin.
_ROUNDING = 1e-10
#: Draws of the proposal in a region of the target that are too few to know its mass,
#: and the share of the particles that may lie in such a region.
_FEW_DRAWS, _MAX_UNCOVERED = 3.0, 0.005
_MAX_HALF_WIDTH = 0.5
#: Components for the particles, and times that one is added where they are bare.
_NUM_CLUSTERS, _MAX_REPAIRS = 12, 4
#: Dimensions up to which a component can be told from some hundred draws.
_MAX_REPAIRED = 48
_MAX_DENSE = 200
#: Fits of a map, the dimensions up to which they are cheap, and what it is worth: times
#: as efficient as a proposal without it may be.
_MAP_ROUNDS, _MAX_MAPPED, _WORTH = 8, 100, 1.25
#: Components from which on no map is tried, and the share of the time that its draws
#: may take.
_MAX_PLACES, _SHARE_MAPPED = 100, 0.05
#: Times as efficient as the best before is a gain, rounds without one after which it is
#: given up, and the efficiency that is good enough.
_BETTER, _PATIENCE, _EXCELLENT = 1.1, 2, 0.7
#: Efficiency that few ellipsoids have where there is a ridge or a heavy tail.
_FINE = 0.8
#: Looks by draws of refitted proposals, and effective draws they are fitted to.
_MAX_LOOKS, _FEW_FITTED = 6, 500.0

_BY_DRAWS = "independent draws of a proposal fitted to modes and particles"
_BY_PARTICLES = "SMC from a proposal fitted to modes and particles"
#: What may keep one route from arriving, and says nothing against the other.
_EXCUSES = (Reason.OUT_OF_BUDGET, Reason.NOT_ARRIVED)


class _Tried(NamedTuple):
    """A proposal, weighted draws of it, and which share of them is effective."""

    proposal: Proposal
    draws: Tensor
    log_weights: Tensor
    efficiency: float
    value: Value


@torch.no_grad()
def two_routes(
    energy: Energy,
    base: dist.TorchDistribution,
    limits: Limits,
    *,
    is_shown: bool,
    reach: float = 1.0,
) -> tuple[LogPartitionEstimate, Proposal]:
    """Log Z by both routes, and a proposal fitted to what they found; see the module.

    Args:
        energy: On any continuous support that ``biject_to`` knows.
        base: A normalised distribution on its event and support.
        limits: Of time and evaluations.
        is_shown: Whether to show a progress bar.
        reach: How many times as wide as a standard normal in unconstrained space modes
            are looked for, beside where the base is; 1: nowhere else.

    Exactness: *consistent*.
    """
    path = GeometricPath(energy, base, is_double=True)
    target = CountedEnergy(
        path.target, limits.budget, is_shown=is_shown, max_bytes=MAX_BYTES
    )
    path.target = target
    path.base = CountedEnergy(path.base, max_bytes=MAX_BYTES)
    try:
        routes = _TwoRoutes(path, target, limits, reach)
        return routes.run(), routes.proposal
    finally:
        target.bar.close()


class _TwoRoutes:
    """The state of an estimate: what the routes have found so far."""

    def __init__(
        self,
        path: GeometricPath,
        target: CountedEnergy,
        limits: Limits,
        reach: float = 1.0,
    ) -> None:
        self.path, self.target, self.limits = path, target, limits
        self.reach = reach
        self.pool, self.proposal = Pool(target), Proposal(path)
        self.dim = path.event_shape.numel()
        self.findings: list[Finding] = []
        self.lost: list[Finding] = []
        self.middle = torch.zeros(self.dim)  # of the draws of the base
        self.share_finite = 1.0  # of the draws of the base
        # Some models can be run for one draw of their prior at a time only.
        path.draw_base(_NUM_TIMED)
        start = time.process_time()
        path.draw_base(_NUM_TIMED)
        self.draw_seconds = (time.process_time() - start) / _NUM_TIMED

    def num_affordable_draws(self, share: float) -> int:
        """Draws of the base that a share of the seconds that are left pays for."""
        return int(share * self.limits.left / max(self.draw_seconds, 1e-9))

    def run(self) -> LogPartitionEstimate:
        """Both routes, and independent draws of what they have found."""
        proposal = self.adapt(self.around(self.descend()), 3)
        # Where no metric can be dense, fewer will do.
        most = 1024 if self.dim <= _MAX_DENSE else 256
        journey = self.particles(self.path, self.size(0.25, most), share=0.6)
        first, particles = None, None
        if journey is not None:
            first = Value.of(journey)
            particles = journey.state.u.flatten(0, 1).reshape(-1, self.dim)
            self.lost = lost_to_rounding(self.path.target, particles)
            before, pool = proposal, self.pool
            proposal = self.union(before, journey, particles)
        proposal, looks = self.looked(proposal, first, particles)
        given_up: list[Look] = []
        is_lost = proposal.triangular is not None and all(x.findings for x in looks)
        if journey is not None and particles is not None and is_lost:
            # A map that has not sufficed is no base for particles either.
            self.pool, given_up = pool, looks
            proposal = self.union(before, journey, particles, is_mapped=False)
            proposal, looks = self.looked(proposal, first, particles)
        self.proposal = proposal
        if first is not None and is_settled(looks, first):
            value, gap = settled(looks, first)
            return self.estimate([value], [], looks[-1].ess, _BY_DRAWS, gap)
        return self.from_particles(proposal, first, given_up + looks)

    # Route B.

    def num_draws(self) -> int:
        return int(min(_NUM_DRAWS, max(500, self.limits.affordable(self.target, 0.02))))

    def descend(self) -> Modes | None:
        """The modes that draws of the base, and mirror images of modes, descend to."""
        modes = self.descended()
        if modes is not None and self.reach > 1:
            modes = self.with_far(modes)
        if modes is None or len(modes.loc) > _MAX_MIRRORED:
            return modes
        # Many energies have a symmetry, or nearly one: of signs, say.
        starts = torch.cat([modes.loc, 2 * self.middle - modes.loc])
        most = 2 * len(modes.loc)
        return find_modes(self.value_and_grad, starts, max_modes=most) or modes

    def with_far(self, modes: Modes) -> Modes:
        """The modes, and those that looks far around them and the base lead to.

        What is behind another mode, or narrow beside it, has more density somewhere
        than the Laplace approximations together.
        """
        for _ in range(_MAX_FAR):
            number = int(min(_NUM_FAR, self.limits.affordable(self.target, 0.02)))
            few = int(self.limits.affordable(self.target, 0.02) / _GRADIENTS)
            few = min(few, _NUM_SURPRISING, number)
            mixture = self.around(modes).mixture
            if few < _MIN_STARTS or mixture is None or len(modes.loc) > _MAX_MODES:
                break
            middle = torch.cat([torch.zeros_like(modes.loc[:1]), modes.loc])
            u = torch.randn(number, self.dim).to(middle)
            u *= self.reach ** torch.rand(number, 1).to(middle)
            u += middle[torch.randint(len(middle), (number,))]
            density, square = log_density(self.target, u), mixture.distances(u)
            normal = (-modes.energy[:, None] - square / 2).logsumexp(0)
            parts = [modes.loc, u[:few]]
            for expected in (normal, mixture.log_prob(u)):
                excess = (density - expected).nan_to_num(-torch.inf, -torch.inf)
                parts.append(u[excess.argsort(descending=True)[:few]])
            most = len(modes.loc) + few
            found = find_modes(self.value_and_grad, torch.cat(parts), max_modes=most)
            if found is None or len(found.loc) <= len(modes.loc):
                break
            modes = found
        return modes

    def descended(self) -> Modes | None:
        """The modes that draws of the base descend to."""
        factor, modes = 1, None
        while True:
            start = self.limits.seconds
            starts = self.starts(_NUM_LOOKS * factor, _NUM_STARTS * factor)
            if starts is None:
                return modes
            # A mode takes 2 D gradients and the decomposition of a matrix, a few times.
            most = min(_MAX_MODES // max(1, self.dim // 4), 40_000 // self.dim**2 + 1)
            modes = find_modes(self.value_and_grad, starts, max_modes=most)
            if modes is None or factor == _MOST_LOOKS or self.dim > _MAX_REPAIRED:
                return modes
            rare = modes.log_mass.softmax(0)[modes.hits < _ENOUGH]
            is_over = 5 * (self.limits.seconds - start) > 0.1 * self.limits.left
            # Where there are more modes than can be counted, more looks are no help.
            if rare.sum() < _RARE or len(rare) > _MANY_RARE or is_over:
                return modes
            factor *= 4

    def starts(self, num_looks: int, num_starts: int) -> Tensor | None:
        """Points to descend from: low draws of the base, others, and usual values.

        References:
            Stan Reference Manual, section on initialisation (the usual ones).
        """
        few = self.path.draw_base(2 * _MIN_STARTS).reshape(2 * _MIN_STARTS, -1).double()
        for _ in range(3):  # to learn what an evaluation costs, once it is traced
            self.value_and_grad(few)
        most = max(self.limits.affordable(self.target, 0.02), 2048)
        most = min(num_looks, most, self.num_affordable_draws(0.1))
        u = self.path.draw_base(max(_MIN_STARTS, int(most)))
        u = u.reshape(len(u), -1).double()
        u = u[u.isfinite().all(-1)]
        if len(u) < 2:
            return None
        number = int(self.limits.affordable(self.target, 0.1) / _GRADIENTS)
        if number < _MIN_STARTS:
            text = f"time or budget for {number} descents, fewer than {_MIN_STARTS}"
            self.findings.append(Finding(Reason.OUT_OF_BUDGET, text))
            if number < 4:
                return None
        if self.dim > _MAX_REPAIRED:
            number = min(number, _MIN_STARTS)
        number = min(number, num_starts, len(u))
        energy = -log_density(self.target, u)
        finite = int(energy.isfinite().sum())
        self.share_finite = max(finite, 1) / len(u)
        low = u[energy.argsort()[: number // 4]]
        if self.dim <= _MAX_REPAIRED:
            low = torch.cat([low, valleys(u, energy)[: number // 2]])
        others = u[: number - len(low)].clone()
        # In many dimensions all draws are far from the middle, where modes may be.
        self.middle, share = u.median(0).values, torch.rand(len(others) // 2, 1).to(u)
        near = others[: len(share)] - self.middle
        others[: len(share)] = self.middle + share * near
        # Draws of a vague prior are all in absurd places; parameters seldom are.
        usual = others[len(share) :][::2]
        usual.copy_(_USUAL * (2 * torch.rand(usual.shape).to(u) - 1))
        return torch.cat([low, others])

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
            u = self.pool.draws()
            if self.dim <= _MAX_REPAIRED:
                proposal = proposal.thickened(u, log_weights)
            weights = tempered(log_weights, max(500.0, 5.0 * self.dim)).softmax(0)
            if len(u) > _NUM_FITTED:
                u = u[weights.multinomial(_NUM_FITTED, replacement=True)]
                weights = torch.full_like(u[:, 0], 1 / _NUM_FITTED)
            proposal = proposal.refitted(u, weights)
        return proposal

    # Route A.

    def size(self, share: float, most: int) -> int:
        """Particles an island that a share of what is left pays for."""
        number = self.limits.affordable(self.target, share) / _NUM_ISLANDS / _COST
        draws = self.num_affordable_draws(share) / _NUM_ISLANDS / _FIRST
        number = min(number, draws)
        power = int(math.log2(max(number, 4 * _CHAIN_LENGTH)))
        return min(most, 2**power)

    def particles(
        self, path: GeometricPath, num_particles: int, share: float
    ) -> Journey | None:
        """Islands that have travelled a path, or ``None`` if they did not arrive.

        Args:
            path: From a base to the target.
            num_particles: An island.
            share: Of the seconds that are left; it ends where they are spent.
        """
        end = self.limits.seconds + share * self.limits.left
        try:
            journey = travel(
                path.start(_NUM_ISLANDS, self.num_first(path, num_particles)),
                AdaptiveHMC(path, _CHAIN_LENGTH - 1),
                num_ancestors=num_particles // _CHAIN_LENGTH,
                is_over=lambda: (
                    self.limits.is_over(self.target) or self.limits.seconds > end
                ),
            )
        except DivergenceError as error:
            self.findings.append(Finding(Reason.NOT_ARRIVED, str(error)))
            return None
        if not journey.has_arrived:
            beta = journey.inverse_temperatures[-1]
            text = (
                "time or budget of the particles ended at the inverse temperature "
                f"{beta:.2g}"
            )
            self.findings.append(Finding(Reason.OUT_OF_BUDGET, text))
            return None
        return journey

    def num_first(self, path: GeometricPath, num_particles: int) -> int:
        """Draws of the base an island: they cost an evaluation each, and no move.

        No island may be without a point of finite energy, or it never sets out.
        """
        least = _FIRST * num_particles
        if path is not self.path:
            return least
        evaluations = self.limits.affordable(self.target, 0.1)
        draws = min(self.num_affordable_draws(0.1), _MOST_NUMBERS // self.dim)
        most = min(evaluations, draws) / _NUM_ISLANDS
        return max(least, int(min(_FEWEST_FINITE / self.share_finite, most)))

    def union(
        self,
        proposal: Proposal,
        journey: Journey,
        u: Tensor,
        *,
        is_mapped: bool = True,
    ) -> Proposal:
        """The proposal with what the particles have found besides."""
        shares = journey.bennett.softmax(0)[:, None] / journey.state.target.shape[1]
        weights = shares.expand_as(journey.state.target).flatten()
        number = max(1, min(_NUM_CLUSTERS, 200 // self.dim))
        proposal = proposal.joined(fit_clusters(u, weights, number), 0.5)
        proposal = self.adapt(proposal, 2)
        log_weights = self.pool.log_weights()
        if is_mapped and self.can_map(proposal):
            found = self.mapped(proposal, u, weights)
            proposal, log_weights = found.proposal, found.log_weights
        before = len(u)
        for _ in range(_MAX_REPAIRS if self.dim <= _MAX_REPAIRED else 0):
            is_bare = self.uncovered(proposal, u, log_weights)
            number = int(is_bare.sum())
            is_covered = number <= _MAX_UNCOVERED / 3 * len(u)
            is_light = pareto_k(log_weights) < _LIGHT_K
            is_late = self.limits.left < 0.6 * self.limits.max_seconds
            is_hopeless = number > max(0.7 * before, 0.05 * len(u))
            if (is_covered and is_light) or is_late or is_hopeless:
                break
            before = number
            if not is_covered:
                bare = weights[is_bare] / weights[is_bare].sum()
                extra = fit_clusters(u[is_bare], bare, 1 if number < 200 else 4)
                proposal = proposal.joined(extra, 0.3)
            proposal = self.adapt(proposal, 2)
            log_weights = self.pool.log_weights()
        return proposal

    def can_map(self, proposal: Proposal) -> bool:
        """Whether a map may be worth its time."""
        is_late = self.limits.left < 0.6 * self.limits.max_seconds
        are_many = proposal.size > _MAX_PLACES  # modes, which ellipsoids describe
        cost = 3 * _MAP_ROUNDS * self.num_draws()
        is_dear = self.limits.affordable(self.target, _SHARE_MAPPED) < cost
        return not (is_late or is_dear or are_many or self.dim > _MAX_MAPPED)

    def mapped(self, proposal: Proposal, u: Tensor, weights: Tensor) -> "_Tried":
        """The proposal, with a triangular map of the particles unless that is worse.

        It leads along a ridge beyond what draws and particles have seen, which no
        efficiency can tell, so that it is kept where it costs little.
        """
        best = self.tried(proposal, u, weights)
        if best.efficiency > _FINE:
            return best
        # States of one ancestor, and ancestors that have one, are much the same.
        found = fit_map(u, weights, len(u) / _CHAIN_LENGTH / 4)
        last, patience = proposal.with_map(found, 0.5), _PATIENCE
        most, highest = best.efficiency, -math.inf
        for _ in range(_MAP_ROUNDS):
            tried = self.tried(last, u, weights)
            if not math.isfinite(tried.value.value):
                break
            # On a ridge each round gets farther, and the value rises.
            lowest = tried.value.value - 2 * tried.value.std_error
            is_rising = lowest > highest
            is_gain = is_rising or tried.efficiency > _BETTER * most
            patience = _PATIENCE if is_gain else patience - 1
            most = max(most, tried.efficiency)
            highest = max(highest, lowest)
            # What misses mass is efficient where it is.
            has_more = lowest > best.value.value
            if tried.efficiency > most / _WORTH or has_more:
                best = tried
            is_done = best.efficiency > _EXCELLENT and not found.has_terms
            if is_done or not patience:
                break
            own = tempered(tried.log_weights, _FEW_FITTED).softmax(0)
            effective = 1 / own.square().sum().item()
            if effective > 1.5 * _FEW_FITTED:
                found = fit_map(tried.draws, own, effective)
                last = last.with_map(found, 0.5)
            last = last.shared_out(tried.draws, own).pruned(tried.draws, own)
        if best.proposal.triangular is not None:
            self.pool = Pool(self.target)  # draws of worse proposals are no help
        return best

    def tried(self, proposal: Proposal, u: Tensor, weights: Tensor) -> "_Tried":
        """Weights of draws of a proposal, and how efficient these are.

        Particles come to heavy tails that draws of the proposal seldom see. The mean
        weight over the target is one over the effective share.
        """
        draws, log_weights = self.weigh(proposal, 3 * self.num_draws())
        own = difference(log_density(self.target, u), proposal.log_prob(u))
        mean = (own - log_mean_exp(log_weights)).exp() @ weights
        share = effective_sample_fraction(log_weights).item()
        share = max(min(share, 1 / max(mean.item(), 1.0)), 1e-12)
        error = math.sqrt((1 / share - 1) / len(draws))
        value = Value(log_mean_exp(log_weights).item(), error)
        return _Tried(proposal, draws, log_weights, share, value)

    # The estimate.

    def looked(
        self, proposal: Proposal, first: Value | None, particles: Tensor | None
    ) -> tuple[Proposal, list[Look]]:
        """Weighted draws of a proposal that is refitted to them while that helps.

        The end of a ridge, or of a heavy tail, comes nearer with each look.
        """
        looks = [self.weighed(proposal, first, particles)]
        for _ in range(_MAX_LOOKS):
            last = looks[-1]
            is_late = self.limits.left < 0.5 * self.limits.max_seconds
            spent, budget = self.target.num_evaluations, self.limits.budget or math.inf
            is_late |= spent > budget / 2
            is_hopeless = last.ess < _FEW_FITTED or proposal.size > _MAX_PLACES
            if is_late or is_hopeless or is_settled(looks, first):
                break
            weights = tempered(last.log_weights, _FEW_FITTED).softmax(0)
            proposal = proposal.refitted(last.draws, weights)
            looks.append(self.weighed(proposal, first, particles))
        return proposal, looks

    def weighed(
        self, proposal: Proposal, first: Value | None, particles: Tensor | None
    ) -> Look:
        """Importance sampling, by as many draws as the tolerance takes."""
        start = self.limits.seconds
        number = 20_000 if self.dim <= _MAX_REPAIRED else 4000
        number = min(number, int(self.limits.affordable(self.target, 0.5)))
        kept = self.weigh(proposal, max(number, _FEWEST_WEIGHED))
        parts = [kept[1]]
        each = (self.limits.seconds - start) / len(parts[0])
        while True:
            log_weights = torch.cat(parts)
            fraction = max(effective_sample_fraction(log_weights).item(), 1e-6)
            wanted = 1.5 / fraction / self.limits.tolerance**2
            left = min(
                self.limits.affordable(self.target, 0.2),
                0.2 * self.limits.left / max(each, 1e-9),
            )
            number = int(min(wanted - len(log_weights), left, 200_000))
            if number < 2000 or len(log_weights) > 1_000_000:
                break
            parts.append(self.weigh(proposal, number)[1])
        value = Value(log_mean_exp(log_weights).item(), pareto_std_error(log_weights))
        findings = judge_weights(log_weights)
        if first is not None and particles is not None:
            findings += value.shortfall(first)
            findings += self.coverage(proposal, particles, log_weights)
        k, ess = pareto_k(log_weights), fraction * len(log_weights)
        return Look(value, ess, findings, k, fraction, proposal.is_bent, *kept)

    def weigh(self, proposal: Proposal, number: int) -> tuple[Tensor, Tensor]:
        """Fresh draws, and their log-weights, shape ``(number,)``."""
        u = proposal.sample(number)
        return u, of_draws(log_density(self.target, u), proposal.log_prob(u))

    def uncovered(self, proposal: Proposal, u: Tensor, log_weights: Tensor) -> Tensor:
        """Particles at which the proposal is too thin, shape ``(N,)``.

        Of ``n`` draws, a region that holds a share ``m`` of the target and weighs at
        least ``w`` in it gets ``n m / w`` or fewer. Where those are too few, it is seen
        by chance. The regions are those of the heaviest particles.
        """
        own = difference(log_density(self.target, u), proposal.log_prob(u))
        own = own - log_mean_exp(log_weights)
        order = own.argsort(descending=True)
        share = torch.arange(1, len(u) + 1).to(own) / len(u)
        num_draws = len(log_weights) * share * (-own[order]).exp()
        few = (num_draws < _FEW_DRAWS).nonzero()
        is_bare = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        if len(few):
            is_bare[order[: int(few[-1]) + 1]] = True
        return is_bare

    def coverage(
        self, proposal: Proposal, u: Tensor, log_weights: Tensor
    ) -> list[Finding]:
        """Whether the proposal is too thin where particles are."""
        share = self.uncovered(proposal, u, log_weights).double().mean().item()
        if share <= max(_MAX_UNCOVERED, pareto_std_error(log_weights)):
            return []
        text = f"{share:.1%} of the particles lie where the proposal is too thin"
        return [Finding(Reason.NOT_COVERED, text)]

    def from_particles(
        self, proposal: Proposal, first: Value | None, looks: list[Look]
    ) -> LogPartitionEstimate:
        """Particles that travel once more, held against what there is.

        They start from the proposal; where it lacks what particles from the base have
        found, from the base again, and more of them.
        """
        runs: list[Value] = []
        clean = [look for look in looks if not look.findings]
        weighed = clean[-1] if clean else looks[-1]
        if first is None or not weighed.value.shortfall(first):
            base = FlatBase(proposal, self.path.event_shape)
            runs, gap = self.travelled(GeometricPath(self.target, base), 512)
        if first is not None and (not runs or runs[-1].shortfall(first)):
            again, gap = self.travelled(self.path, 4096)
            runs = again or runs
        if not runs:
            findings = [*self.findings, *weighed.findings]
            return self.estimate([weighed.value], findings, weighed.ess, _BY_DRAWS)
        findings = disagreement(runs, gap, first, weighed.value)
        if first is None and not all(f.reason in _EXCUSES for f in self.findings):
            findings += self.findings
        values = [runs[-1]]
        if not weighed.findings:
            values.append(weighed.value)
        elif len(runs) > 1:
            values.append(runs[-2])
        gap *= any(look.is_bent for look in looks)
        return self.estimate(values, findings, weighed.ess, _BY_PARTICLES, gap)

    def travelled(
        self, path: GeometricPath, num_particles: int
    ) -> tuple[list[Value], float]:
        """Runs along a path, each larger than the last, and the gap of the last."""
        runs, gap, number = [], 0.0, self.size(0.3, num_particles)
        while True:
            start = self.limits.seconds
            journey = self.particles(path, number, share=0.8)
            if journey is None:
                break
            runs.append(Value.of(journey))
            gap = journey.gap
            number *= 4
            next_seconds = 5 * (self.limits.seconds - start)
            cost = number * _NUM_ISLANDS * _COST
            is_close = runs[-1].std_error < self.limits.tolerance
            is_dear = self.limits.affordable(self.target, 0.6) < cost
            if is_close or is_dear or next_seconds > self.limits.left:
                break
        return runs, gap

    def estimate(
        self,
        values: list[Value],
        findings: Sequence[Finding],
        ess: float,
        method: str,
        gap: float = 0.0,
    ) -> LogPartitionEstimate:
        """The estimate with its verdict, from one value or from two that agree.

        Its interval is wider by the gap of a journey's directions, or of looks.
        """
        findings = [*self.lost, *findings]
        value, std_error = Value.pooled(values)
        num_errors = student_t_quantile(3)
        if method == _BY_PARTICLES:
            num_errors *= _CAUTION
        half = num_errors * std_error + gap
        if not math.isfinite(value):
            findings.append(Finding(Reason.NOT_FINITE, "the estimate is not finite"))
        elif not half < _MAX_HALF_WIDTH:
            text = f"95 % half-width {half:.2g}, above {_MAX_HALF_WIDTH}"
            findings.append(Finding(Reason.NOT_CONVERGED, text))
        # Rounding of the energy itself.
        half += _ROUNDING * (1 + abs(value))
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
