r"""Tracking of :math:`\log Z` while an energy is learned.

The parameters :math:`\theta_t` are shaken by the optimiser; their average moves
smoothly, and is the better model:

.. math::
    a_t = a_{t-1} + \min\left(.01, \tfrac{9}{t + 8}\right)
        (\theta_t - a_{t-1})                                               \tag{1}

Weighted walkers follow the average. When the energy changes from :math:`f` to
:math:`f'`, the weight of each walker changes, and then the walker moves with a kernel
that leaves :math:`e^{-f'}` invariant:

.. math::
    \log w \mathrel{+}= f(u) - f'(u), \qquad
    \log Z' = \log Z + \log \overline{w}                                   \tag{2}

Walkers are resampled within their island when the effective sample size of the weights
falls. The islands are independent: their spread is the error bar. An error that they
have made stays with them, so from time to time a fresh run from the base, of value
:math:`v` and standard error :math:`s`, is weighed against their own :math:`o \pm r`:

.. math::
    p = \frac{r^2}{r^2 + s^2}, \qquad
    \log Z = o + p (v - o) \pm \frac{r s}{\sqrt{r^2 + s^2}}
        \sqrt{1 + \frac{8 p (1 - p)}{M - 1}}                              \tag{3}

where the second root is for weights that ``M`` islands each have to tell. Walkers give
no gradient to the learning: those that do stand just where the energy is pushed up, and
:math:`\log Z` read off them drifts. For the iterate :math:`\theta_t` itself,

.. math::
    \log Z(\theta_t) = \log Z(a_t) +
        \log \mathbb{E}_{a_t}\left[e^{f_{a_t}(u) - f_{\theta_t}(u)}\right]    \tag{4}

References:
    Jarzynski (1997), Physical Review Letters 78, 2690. Neal (2001), Statistics and
    Computing 11, 125-139. Carbone, Hua, Coste & Vanden-Eijnden (2023), NeurIPS.
    Polyak & Juditsky (1992), SIAM J. Control Optim. 30, 838-855 (averaging). Meier
    (1953), Biometrics 9, 59-73 (equation 3).
"""

__all__ = ["LogPartition"]

import math
from enum import IntEnum
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.verdict import Finding, Reason, Status, sentence, status_of
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.mcmc import HMC, ChainState, Gibbs, Kernel
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for
from pyro_ebm.mcmc.samplers.persistent import StatefulModule
from pyro_ebm.partition.base import LogPartitionEstimate, combine_replicates
from pyro_ebm.partition.base_check import BaseFingerprint
from pyro_ebm.partition.exact.closed_form import closed_form
from pyro_ebm.partition.normalizability import check_normalizability
from pyro_ebm.partition.particles.gibbs_annealing import anneal
from pyro_ebm.partition.particles.smc import run_smc
from pyro_ebm.partition.progress import watched
from pyro_ebm.partition.tracking.walkers import FollowedEnergy, Walkers
from pyro_ebm.partition.tracking.weighted_draws import WeightedDraws

#: Particles of a run from the base, for each walker, at most.
_MAX_FACTOR = 8
#: Draws of the base from which the rays of the test of normalisability start.
_NUM_RAYS = 128
#: Resamplings per island and update that are too many; by whether the support is
#: finite, where a few sweeps make copies of a walker differ.
_MAX_RESAMPLED = (0.01, 0.25)
#: Sweeps of walkers at an update there.
_SWEEPS = 3
#: Temperatures of an annealing run from the base, on a finite support; and where the
#: sites have to be drawn one by one, or by more blocks than so many.
_TEMPERATURES, _MANY_BLOCKS = (100, 20), 16


class _Code(IntEnum):
    """What may speak against the estimate, as the buffer ``verdict`` holds it."""

    NOTHING = 0
    NOT_ESTIMATED = 1
    ISLANDS_DISAGREE = 2
    RESAMPLED_TOO_OFTEN = 3
    RUNS_DISAGREE = 4
    FAR_FROM_AVERAGE = 5
    NOT_FINITE = 6
    NO_RUN_ARRIVES = 7
    FEW_DRAWS_COUNT = 8


_FINDINGS = {
    _Code.NOT_ESTIMATED: Finding(
        Reason.NOT_ESTIMATED, "not estimated yet: train, or call refresh()"
    ),
    _Code.ISLANDS_DISAGREE: Finding(
        Reason.ISLANDS_DISAGREE,
        "the islands of walkers disagree by more than 0.5 nats",
    ),
    _Code.RESAMPLED_TOO_OFTEN: Finding(
        Reason.MOVING_TOO_FAST,
        "the walkers are resampled too often: the parameters move too fast for them",
    ),
    _Code.RUNS_DISAGREE: Finding(
        Reason.ROUTES_DISAGREE,
        "a fresh run from the base disagrees with the walkers",
    ),
    _Code.FAR_FROM_AVERAGE: Finding(
        Reason.FEW_EFFECTIVE,
        "the parameters are too far from their average: effective sample size below "
        "10 %",
    ),
    _Code.NOT_FINITE: Finding(
        Reason.NOT_FINITE, "the energy is not finite at the walkers"
    ),
    _Code.NO_RUN_ARRIVES: Finding(
        Reason.DIVERGENT,
        "the energy seems to have no partition function, or no run from the base "
        "arrives",
    ),
    _Code.FEW_DRAWS_COUNT: Finding(
        Reason.FEW_EFFECTIVE,
        "too few of the weighted draws count: the energy is too far from the base",
    ),
}


def _findings_of(code: Tensor) -> tuple[Finding, ...]:
    known = _Code(int(code))
    return () if known is _Code.NOTHING else (_FINDINGS[known],)


class LogPartition(StatefulModule):
    r"""A running estimate of :math:`\log Z(\theta)` with error bar and verdict.

    :class:`pyro_ebm.distributions.EnergyModel` owns one; the handlers of
    :mod:`pyro_ebm.infer` call :meth:`follow` after each parameter step. Its own
    ``value``, ``std_error`` and ``status`` belong to the parameters as they were at the
    last update, up to ``interval`` steps ago, or at the last call of :meth:`read`;
    :meth:`averaged` to their running average at the last update.

    Args:
        energy: The energy that will be learned.
        base: A normalised distribution on its event and support; the walkers come from
            exact draws of it.
        num_islands: Independent groups of walkers, for the error bar.
        num_walkers: Walkers an island.
        interval: Parameter steps between two moves of the walkers; the weights
            telescope, so nothing is lost in between.
        check_interval: Parameter steps between two SMC runs from the base, which can
            see a mode that all walkers have lost, and keep the error from growing. They
            have up to 8 times as many particles as there are walkers, and cost no more
            than the walkers between them.
        num_leapfrog: Leapfrog steps in a move of the walkers.

    Exactness: *consistent* in the number of walkers, and unbiased for ``Z`` up to
    adaptation of the step size.

    Example:
        >>> energy = pyro_ebm.energies.FunctionEnergy(
        ...     lambda x: x.square().sum(-1) / 2, (2,)
        ... )
        >>> base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> tracker = LogPartition(energy, base)
        >>> tracker.refresh(energy)  # a short run from the base
        >>> abs(tracker.value.item() - 1.8379) < 0.3  # log(2 pi)
        True
    """

    value: Tensor
    std_error: Tensor
    num_steps: Tensor
    num_check_evaluations: Tensor
    check_cost: Tensor
    verdict: Tensor
    settled: Tensor

    def __init__(
        self,
        energy: Energy,
        base: dist.TorchDistribution,
        *,
        num_islands: int = 8,
        num_walkers: int = 64,
        interval: int = 10,
        check_interval: int = 500,
        num_leapfrog: int = 3,
    ) -> None:
        super().__init__()
        self._base = BaseFingerprint(base)
        self.interval, self.check_interval = interval, check_interval
        self.num_islands, self.num_walkers = num_islands, num_walkers
        self.followed = FollowedEnergy(energy)
        kernel = kernel_for(energy, HMC(num_leapfrog=num_leapfrog))
        self.walkers = Walkers(Gibbs(_SWEEPS) if isinstance(kernel, Gibbs) else kernel)
        options = energy.tensor_options()
        self.register_buffer("value", torch.tensor(math.nan, **options))
        self.register_buffer("std_error", torch.tensor(math.nan, **options))
        self.register_buffer("num_steps", torch.tensor(0))
        self.register_buffer("num_check_evaluations", torch.tensor(0))
        # Evaluations that a particle of the last run from the base has cost.
        self.register_buffer("check_cost", torch.tensor(math.inf))
        # Reasons of the average and of the iterate, and whether the last check failed.
        self.register_buffer("verdict", torch.tensor([*[_Code.NOT_ESTIMATED] * 2, 0]))
        # An estimate that was taken over: whether there is one, and its numbers.
        self.register_buffer("settled", torch.zeros(7, **options))
        # While the learning has log Z from weighted draws; theirs, so no module here.
        self._draws: list[WeightedDraws] = []

    @property
    def base(self) -> dist.TorchDistribution:
        """The normalised distribution that the walkers come from."""
        return self._base.distribution

    @property
    def is_closed_form(self) -> bool:
        r"""Whether the energy knows its :math:`\log Z`; then nothing is sampled."""
        return self.averaged_energy.closed_form() is not None

    @property
    def is_started(self) -> bool:
        """Whether there is an estimate."""
        known = self.walkers.is_started or bool(self._draws)
        return known or bool(self.verdict[1] != _Code.NOT_ESTIMATED)

    @property
    def draws(self) -> WeightedDraws | None:
        """The weighted draws that log Z comes from, if it does not from walkers."""
        return self._draws[0] if self._draws else None

    @property
    def is_settled(self) -> bool:
        """Whether an estimate was taken over that learning has not moved on from."""
        return bool(self.settled[0])

    @property
    def status(self) -> Status:
        """``"exact"``, ``"ok"`` or ``"unreliable"``, for the current parameters."""
        known = Status.EXACT if self.is_closed_form else Status.OK
        return status_of(self.reasons, known)

    @property
    def reasons(self) -> tuple[Finding, ...]:
        """The findings that led to the status; empty if it is reliable."""
        return _findings_of(self.verdict[1])

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)

    @property
    def num_evaluations(self) -> int:
        """Energy evaluations spent so far on following and checking, a point each."""
        return int(self.walkers.num_evaluations + self.num_check_evaluations)

    @property
    def averaged_energy(self) -> Energy:
        """The energy that :meth:`averaged` belongs to; its parameters are buffers."""
        return self.followed.energy

    def averaged(self) -> LogPartitionEstimate:
        r""":math:`\log Z` of the averaged parameters, with a 95 % interval."""
        known = closed_form(self.averaged_energy) if self.is_started else None
        if known is not None:
            return known
        if self.is_settled:
            value, std_error, lower, upper, ess, is_exact = self.settled[1:].tolist()
            return LogPartitionEstimate(
                value,
                std_error,
                lower,
                upper,
                ess,
                Status.EXACT if is_exact else Status.OK,
                "taken over",
                self.num_evaluations,
                (),
            )
        if self.draws is not None:
            self.followed.load(self.followed.mean)
            return self.draws.estimate(self.averaged_energy)
        reasons = _findings_of(self.verdict[0])
        if not self.walkers.is_started:
            nan, spent = math.nan, self.num_evaluations
            return LogPartitionEstimate(
                nan, nan, nan, nan, nan, Status.UNRELIABLE, "walkers", spent, reasons
            )
        value, std_error, half = combine_replicates(self.walkers.log_partition())
        return LogPartitionEstimate(
            value,
            std_error,
            value - half,
            value + half,
            self.walkers.ess(),
            status_of(reasons),
            "walkers",
            self.num_evaluations,
            reasons,
        )

    @torch.no_grad()
    def follow(self, energy: Energy) -> None:
        """Take note of the parameters after a step of learning.

        Args:
            energy: The energy being learned, of the class and shapes given at first.
        """
        if not self.is_started:
            self.refresh(energy, progress_bar=False)
            return
        if self.is_settled:
            self._resume()
        self.num_steps += 1
        step = int(self.num_steps)
        self.followed.average(energy, min(0.01, 9 / (step + 8)))  # (1)
        if self.draws is not None:
            if step % (10 * self.interval) == 0:
                self.read(energy)
        elif step % self.interval == 0:
            self._advance()
            if step % self.check_interval == 0:
                self.check()
            self.read(energy)

    @torch.no_grad()
    def refresh(self, energy: Energy, *, progress_bar: bool = True) -> None:
        r"""Estimate anew from the base, for the current parameters.

        The average begins again at these parameters.

        Args:
            energy: With its current parameters.
            progress_bar: Whether to show the energy evaluations, if it takes more than
                a second.
        """
        self._begin_at(energy)
        if not self.is_closed_form:
            size = self._num_particles()
            islands = self._fresh(size, progress_bar=progress_bar)
            if islands is not None and self._num_particles() > size:
                # The first has shown that more cost little.
                size = self._num_particles()
                islands = self._fresh(size, progress_bar=progress_bar)
            if islands is not None:
                self._adopt(islands)
        self.read(energy)

    def _begin_at(self, energy: Energy) -> None:
        """Forget what was estimated; the average begins at these parameters."""
        self.followed.reset(energy)
        self.num_steps.zero_()
        self.verdict.zero_()
        self.settled.zero_()
        self._draws = []

    @torch.no_grad()
    def follow_by(self, energy: Energy, draws: WeightedDraws | None) -> None:
        r"""Have :math:`\log Z` from weighted draws from here on, instead of walkers.

        Args:
            energy: With its current parameters, where the average begins unless there
                was one.
            draws: That have started; ``None`` to go back to walkers, which begin at the
                average.
        """
        if draws is None:
            self._draws = []
            self.verdict.zero_()
            self._resume()
        elif self.draws is not draws:
            if not self.is_started or self.is_settled:
                self._begin_at(energy)
            self._draws = [draws]
            self.read(energy)

    def _resume(self) -> None:
        """Let walkers go on from the estimate, as the parameters are about to move."""
        was_settled, value, std_error, *_ = self.settled.tolist()
        self.settled.zero_()
        if self.is_closed_form or self._draws:
            return
        islands = self._fresh(self._num_particles())
        if islands is not None:
            self._adopt(islands)
            if was_settled:
                self.walkers.anchor(value, std_error)

    @torch.no_grad()
    def set_log_partition(self, energy: Energy, estimate: LogPartitionEstimate) -> None:
        r"""Take over a better estimate of :math:`\log Z` of the current parameters.

        It stands until the parameters move. Walkers that are there already and agree
        with it go on from its value and standard error; otherwise they begin from it
        when learning goes on.

        Args:
            energy: With the parameters that the estimate belongs to.
            estimate: From :func:`pyro_ebm.partition.estimate`, say.

        Raises:
            ValueError: If the estimate is not reliable.
        """
        if not estimate.is_reliable:
            raise ValueError(
                f"estimate must be reliable to stand for log Z, got {estimate}. Raise "
                "its budget, or give it a base nearer to the energy."
            )
        if self.is_closed_form:
            self._begin_at(energy)
            self.read(energy)
            return
        if self.followed.is_at(energy) and self._agrees_with(estimate):
            self.walkers.anchor(estimate.value, estimate.std_error)
            self.read(energy)
            return
        self._begin_at(energy)
        is_exact = float(estimate.status is Status.EXACT)
        numbers = estimate.value, estimate.std_error, estimate.lower, estimate.upper
        self.settled.copy_(torch.tensor([1.0, *numbers, estimate.ess, is_exact]))
        self.read(energy)

    def _agrees_with(self, estimate: LogPartitionEstimate) -> bool:
        """Whether the walkers are trusted, and within 3 standard errors."""
        if not self.walkers.is_started or self._draws:
            return False
        own = self.averaged()
        error = math.hypot(own.std_error, estimate.std_error)
        return own.is_reliable and abs(own.value - estimate.value) <= 3 * error

    @torch.no_grad()
    def check(self) -> bool:
        """Compare the walkers with a fresh SMC run from the base.

        If they agree within 3 combined standard errors, the walkers go on from the mean
        of both (3). If that run and one of four times its size do not, the estimate is
        unreliable until a later check agrees; the walkers are replaced if the fresh run
        has found more mass.

        Returns:
            Whether they agree.
        """
        if self.is_closed_form:
            return True
        agree, size = False, self._num_particles()
        for num_particles in (size, 4 * size):
            fresh = self._fresh(num_particles)
            if fresh is None:
                return False
            if not self.walkers.is_started:
                self._adopt(fresh)  # for the larger run to judge
                continue
            value, std_error, _ = combine_replicates(fresh.log_partition)
            own, own_error, _ = combine_replicates(self.walkers.log_partition())
            agree = abs(value - own) <= 3 * math.hypot(std_error, own_error)
            if agree:
                break
        if agree:
            pooled = _pooled(own, own_error, value, std_error, self.num_islands)
            self.walkers.anchor(*pooled)
        elif not value < own and fresh is not None:
            self._adopt(fresh)
        self.verdict[2] = int(not agree)
        self.verdict[:2] = self._judge(self.walkers.log_partition())
        return agree

    @torch.no_grad()
    def adopt_average(self, energy: Energy) -> None:
        """Bring the walkers up to date, check, and write the average into ``energy``.

        From here on the current parameters and their average are one.
        """
        if not self.is_started:
            self.refresh(energy, progress_bar=False)
        if self._draws or self.is_settled:
            self.followed.load(self.followed.mean)
        else:
            self._advance()
            self.check()
        self.followed.write(energy)
        self.read(energy)

    def _advance(self) -> None:
        old, new = self.followed.begin_update()
        if self.is_closed_form or not self.walkers.is_started:
            self.followed.load(new)
            return
        position, step = 0.0, 1.0
        while position < 1:
            self.followed.load(torch.lerp(old, new, position + step))
            # A parameter step that would leave too few walkers is taken in halves.
            if self.walkers.reweight(self.followed.flat, force=step < 1 / 64):
                position += step
                self.walkers.move(self.followed.flat)
            else:
                step /= 2

    @torch.no_grad()
    def read(self, energy: Energy) -> None:
        """Set value, error and verdict for parameters near their average, by (4).

        Args:
            energy: With its current parameters; it is evaluated once at each walker.
        """
        known = energy.closed_form()
        if known is not None:
            self.value.copy_(known.log_partition)
            self.std_error.zero_()
            self.verdict.zero_()
            return
        if self.is_settled and not self.followed.is_at(energy):
            self._resume()
        if self.is_settled or self.draws is not None:
            found = (
                self.averaged() if self.draws is None else self.draws.estimate(energy)
            )
            self.value.fill_(found.value)
            self.std_error.fill_(found.std_error)
            is_poor = not found.is_reliable
            self.verdict[1] = _Code.FEW_DRAWS_COUNT if is_poor else _Code.NOTHING
            return
        if not self.walkers.is_started:
            return
        log_partitions = self.walkers.log_partition()
        self.verdict[0] = self._judge(log_partitions)
        flat, _ = unconstrained(energy)
        ratio, ess = self.walkers.log_ratio(flat)
        iterate = log_partitions + ratio
        self.value.copy_(torch.logsumexp(iterate, 0) - math.log(len(iterate)))
        # A few islands may agree by chance where few walkers carry the weight.
        spread = (iterate.std() / math.sqrt(len(iterate))).item()
        few = math.sqrt(max(1 / max(ess, 1e-6) - 1, 0) / self.walkers.energy.numel())
        self.std_error.fill_(max(spread, few))
        self.verdict[1] = self.verdict[0]
        if not self.verdict[0] and ess < 0.1:
            self.verdict[1] = _Code.FAR_FROM_AVERAGE

    def _judge(self, log_partitions: Tensor) -> _Code:
        if not log_partitions.isfinite().all():
            return _Code.NOT_FINITE
        if self.verdict[2]:
            has_failed = bool(self.verdict[2] == _Code.NO_RUN_ARRIVES)
            return _Code.NO_RUN_ARRIVES if has_failed else _Code.RUNS_DISAGREE
        if log_partitions.std() > 0.5:
            return _Code.ISLANDS_DISAGREE
        limit = _MAX_RESAMPLED[self.averaged_energy.support.is_discrete]
        is_often = self.walkers.resampling_rate() > limit
        return _Code.RESAMPLED_TOO_OFTEN if is_often else _Code.NOTHING

    def _num_particles(self) -> int:
        """Particles an island of a run from the base that costs no more than walkers.

        As far as the last run can tell; the walkers until the next check are meant.
        """
        each = self.walkers.kernel.num_gradients + 2  # of a walker at an update
        budget = each * self.num_walkers * self.check_interval / self.interval
        factor = budget / (self.check_cost.item() * self.num_walkers)
        factors = [f for f in (1, 2, 4, _MAX_FACTOR) if f <= max(factor, 1.0)]
        return factors[-1] * self.num_walkers

    def _fresh(
        self, num_particles: int, *, progress_bar: bool = False
    ) -> "_Fresh | None":
        """Fresh islands at the averaged parameters; ``None`` if they do not arrive."""
        support = self.averaged_energy.support
        run = self._annealed if support.is_discrete else self._by_smc
        run = self._by_weights if isinstance(support, MixedSupport) else run
        try:
            fresh = run(num_particles, progress_bar=progress_bar)
        except DivergenceError:
            fresh = None
        if fresh is None:
            self.verdict.fill_(_Code.NO_RUN_ARRIVES)
            return None
        self.num_check_evaluations += fresh.num_evaluations
        self.check_cost.fill_(fresh.num_evaluations / fresh.chains.energy.numel())
        return fresh

    def _annealed(self, num_particles: int, *, progress_bar: bool) -> "_Fresh":
        """By annealing there and back, on a finite support."""
        with watched(self.averaged_energy, is_shown=progress_bar):
            run = anneal(
                self.averaged_energy,
                self.base,
                num_islands=self.num_islands,
                num_chains=num_particles,
                num_temperatures=_TEMPERATURES[_is_dear(self.averaged_energy)],
            )
        state = self.walkers.kernel.init(self.averaged_energy, run.x)
        value = run.log_partition().to(state.energy)
        return _Fresh(state, value, self.walkers.kernel, run.num_evaluations)

    def _by_weights(self, num_particles: int, *, progress_bar: bool) -> "_Fresh":
        """By importance from the base, on a mixed support."""
        draws, kernel = WeightedDraws(), self.walkers.kernel
        draws.start(self.averaged_energy, self.base, self.num_islands * num_particles)
        u, value = draws.in_islands(self.averaged_energy, self.num_islands)
        state = kernel.init(unconstrained(self.averaged_energy)[0], u)
        return _Fresh(state, value, kernel, state.energy.numel())

    def _by_smc(self, num_particles: int, *, progress_bar: bool) -> "_Fresh | None":
        draws = self.base.sample((_NUM_RAYS,))
        rays = check_normalizability(self.averaged_energy, draws)
        self.num_check_evaluations += rays.num_evaluations
        if not rays.is_normalizable:
            return None
        with watched(self.averaged_energy, is_shown=progress_bar) as energy:
            islands = run_smc(
                energy,
                self.base,
                num_islands=self.num_islands,
                num_particles=num_particles,
                chain_length=8,
            )
        return _Fresh(
            islands.state.chains(),
            islands.log_partition,
            islands.kernel,
            islands.num_evaluations,
        )

    def _adopt(self, fresh: "_Fresh") -> None:
        # The last particles are the ends of chains from different ancestors.
        chains = [part[:, -self.num_walkers :] for part in fresh.chains]
        self.walkers.start(ChainState(*chains), fresh.log_partition, fresh.kernel)


def _is_dear(energy: Energy) -> bool:
    """Whether a sweep costs many evaluations: no blocks are known, or many."""
    has_many = isinstance(energy, SiteEnergy) and len(energy.blocks) > _MANY_BLOCKS
    return has_many or Gibbs().num_evaluations(energy) > 1


class _Fresh(NamedTuple):
    """Islands that have come from the base.

    Attributes:
        chains: Draws of the energy, chain shape ``(M, N)``.
        log_partition: The estimate of each island, shape ``(M,)``.
        kernel: As it suits the energy.
        num_evaluations: Energy evaluations spent, a point each.
    """

    chains: ChainState
    log_partition: Tensor
    kernel: Kernel
    num_evaluations: int


def _pooled(
    own: float, own_error: float, value: float, std_error: float, num_islands: int
) -> tuple[float, float]:
    """The mean (3) of two estimates, and its standard error."""
    both = math.hypot(own_error, std_error)
    if both == 0:
        return own, 0.0
    share = (own_error / both) ** 2
    unknown = math.sqrt(1 + 8 * share * (1 - share) / (num_islands - 1))
    return own + share * (value - own), own_error * std_error / both * unknown  # (3)
