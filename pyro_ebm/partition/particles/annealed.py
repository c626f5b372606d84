r"""Annealed importance sampling with a frozen schedule: :math:`\log Z` from one side.

Independent chains follow the geometric path from exact draws of the base, one
transition at each inverse temperature :math:`0 = \beta_0 < \dots < \beta_T = 1`:

.. math::
    \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) (f_0(x_{t-1}) - f(x_{t-1})),
    \qquad E[w] = Z                                                        \tag{1}

With schedule and kernels frozen beforehand the weights are independent, non-negative
and of mean ``Z``. For any fixed :math:`\lambda \in [0, 1]`, both

.. math::
    \frac1N \sum_n \frac{w_n}{Z} \quad \text{and} \quad
    \prod_n \left(1 - \lambda + \lambda \frac{w_n}{Z}\right)               \tag{2}

have mean 1, and so has any average of them; Markov's inequality makes the ``Z`` at
which it is :math:`1/\delta` a lower bound with probability :math:`1 - \delta`, whatever
the weights are. The first of (2) alone is the usual
:math:`\log Z > \log \overline w - \log(1/\delta)`; the products, over a grid of
:math:`\lambda`, come close to the bound of the central limit theorem where that holds.

In reverse, from exact draws of the target down to the base, the weights have mean
:math:`1/Z`, and the same gives an upper bound.

What is not given of the schedule comes from a pilot run that is thrown away: it moves a
few particles along the path by sequential Monte Carlo, places each rung of a ladder
where the effective fraction of the weights falls to one half, and adapts step size and
metric on each. Rungs are then equally far from each other in what annealing finds hard,
so each is divided into equally many temperatures.

References:
    Neal (2001), Statistics and Computing 11, 125-139. Grosse, Ghahramani & Adams
    (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo.
    Waudby-Smith & Ramdas (2024), JRSS B 86, 1-27 (the products). Crooks (2000),
    Physical Review E 61, 2361-2366 (the ratio of forward and reverse). Del Moral,
    Doucet & Jasra (2006), JRSS B 68, 411-436 (the pilot).
"""

__all__ = [
    "Schedule",
    "annealed_importance_sampling",
    "bidirectional",
    "guaranteed_lower",
    "plan_schedule",
]

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, Status, status_of
from pyro_ebm.diagnostics import log_mean_exp
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc import Kernel
from pyro_ebm.mcmc.base import bias_of
from pyro_ebm.mcmc.tempering.path import GeometricPath, require_rising
from pyro_ebm.mcmc.tempering.site_path import SitePath, path_between, reversal
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.bridge.bennett import bennett
from pyro_ebm.partition.importance.importance import estimate_from_weights
from pyro_ebm.partition.particles.engine import travel
from pyro_ebm.partition.particles.movers import GivenKernels, adaptive
from pyro_ebm.partition.progress import watched

#: Particles of the pilot run, and transitions on each rung.
_NUM_PARTICLES = 128
_NUM_MOVES = 6
_MAX_RUNGS = 300


@torch.no_grad()
def annealed_importance_sampling(
    energy: Energy,
    base: dist.TorchDistribution,
    *,
    num_chains: int = 256,
    num_temperatures: int = 200,
    inverse_temperatures: Sequence[float] | None = None,
    kernel: Kernel | None = None,
    direction: Literal["forward", "reverse"] = "forward",
    draws: Tensor | None = None,
    delta: float = 0.05,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` by (1), with a bound that holds for certain.

    Args:
        energy: On a finite support, or any that ``biject_to`` knows.
        base: A normalised distribution on the same event and support.
        num_chains: Independent chains, at least 25.
        num_temperatures: At least so many transitions a chain, placed where a pilot run
            finds that they are needed.
        inverse_temperatures: A schedule of your own instead, from 0 to 1.
        kernel: Used as it is at every temperature; default: Hamiltonian Monte Carlo
            with the step sizes and metrics of the pilot run, whose particles are thrown
            away, and over a finite support ``Gibbs()`` or ``DiscreteLangevin()``. One
            that is not exact voids the bound.
        direction: ``"forward"`` bounds :math:`\log Z` from below; ``"reverse"`` from
            above, and starts at ``draws``.
        draws: Independent draws of the target, exact or trusted, at least
            ``num_chains``, shape ``(N, *event)``. The upper bound is as exact as they
            are: draws that lack a mode put it too low.
        delta: Probability that the guaranteed bound fails.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate. Its ``lower`` (forward) or ``upper`` (reverse) is guaranteed by
        (2); the other end is infinite and the status ``"unreliable"``, since one
        direction alone knows one side only: on Neal's funnel the weights look well in
        60 % of forward runs, and a two-sided interval from them covered in 11 % of
        those. :func:`bidirectional` knows both sides.

    Raises:
        DivergenceError: If the pilot run does not arrive.
        ValueError: If an argument is out of range or does not fit the energy.

    Exactness: *unbiased for Z* forward, *unbiased for 1/Z* in reverse; ``lower`` is a
    *lower bound* and ``upper`` an *upper bound* with probability ``1 - delta``.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.ones(2))
        >>> base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> estimate = annealed_importance_sampling(energy, base, num_temperatures=20)
        >>> estimate.lower < 1.8379, abs(estimate.value - 1.8379) < 0.1
        (True, True)
    """
    _require_direction(direction, draws)
    with watched(energy, is_shown=progress_bar) as target:
        run = _Annealing(target, base, num_chains, delta)
        if draws is not None:
            draws = run.checked(draws)
        run.plan(num_temperatures, inverse_temperatures, kernel)
        log_weights = run.forward() if draws is None else run.reverse(draws)
    name = f"{direction} AIS, {len(run.schedule.inverse_temperatures) - 1} temperatures"
    bound = guaranteed_lower(log_weights, delta)
    estimate = estimate_from_weights(log_weights, name, run.path.num_evaluations)
    side = "above" if draws is None else "below"
    one_sided = f"one-sided only: nothing in the run bounds log Z from {side}"
    reasons = (
        Finding(Reason.ONE_SIDED, one_sided),
        *bias_of(kernel),
        *estimate.reasons,
    )
    if draws is None:
        estimate = estimate._replace(lower=bound, upper=math.inf)
    else:
        value = -estimate.value
        estimate = estimate._replace(value=value, lower=-math.inf, upper=-bound)
    return estimate._replace(status=Status.UNRELIABLE, reasons=reasons)


def _require_direction(direction: str, draws: Tensor | None) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(
            f'direction must be "forward" or "reverse", got {direction!r}.'
        )
    if (draws is None) == (direction == "reverse"):
        raise ValueError(
            'draws must be given with direction="reverse", which starts there, and '
            f'only then; got direction="{direction}" and draws '
            f"{'None' if draws is None else tuple(draws.shape)}."
        )


@torch.no_grad()
def bidirectional(
    energy: Energy,
    base: dist.TorchDistribution,
    draws: Tensor,
    *,
    num_chains: int = 256,
    num_temperatures: int = 200,
    inverse_temperatures: Sequence[float] | None = None,
    kernel: Kernel | None = None,
    delta: float = 0.05,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Enclose :math:`\log Z` between a forward and a reverse run.

    The value is Bennett's ratio of the forward and the reverse weights. In 15 settings
    of 9 targets with 30 to 60 seeds each, among them Neal's funnel, every interval
    covered.

    Args:
        energy: As for :func:`annealed_importance_sampling`, like all that follow.
        base: Start of the forward run.
        draws: Exact, independent draws of the target: the start of the reverse run.
        num_chains: Chains of either run.
        num_temperatures: At least so many transitions a chain.
        inverse_temperatures: A schedule of your own instead.
        kernel: Used as it is at every temperature; one that is not exact voids the
            bounds.
        delta: Probability that one of the two bounds fails.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; with exact draws :math:`\log Z` is between ``lower`` and
        ``upper`` with probability ``1 - delta``, whatever the status. ``"unreliable"``
        means that the value between them cannot be trusted, or that the bounds
        contradict each other.

    Raises:
        DivergenceError: If the pilot run does not arrive.
        ValueError: If an argument is out of range or does not fit the energy.

    Exactness: *lower bound* and *upper bound* with probability ``1 - delta``; the value
    is *consistent*.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> draws = torch.randn(256, 2)
        >>> estimate = bidirectional(energy, base, draws, num_temperatures=20)
        >>> estimate.status, estimate.lower < 1.8379 < estimate.upper
        ('ok', True)
    """
    with watched(energy, is_shown=progress_bar) as target:
        run = _Annealing(target, base, num_chains, delta)
        draws = run.checked(draws)
        run.plan(num_temperatures, inverse_temperatures, kernel)
        forward, reverse = run.forward(), run.reverse(draws)
    lower = guaranteed_lower(forward, delta / 2)
    upper = -guaranteed_lower(reverse, delta / 2)
    ratio = bennett(forward, -reverse)
    reasons = ratio.reasons
    if lower > upper:
        wrong = "the bounds contradict each other: the draws are not of this energy"
        reasons = (Finding(Reason.WRONG_DRAWS, wrong),)
    reasons = (*bias_of(kernel), *reasons)
    return LogPartitionEstimate(
        ratio.log_ratio,
        ratio.std_error,
        lower,
        upper,
        ratio.num_shared,
        status_of(reasons),
        f"bidirectional AIS, {len(run.schedule.inverse_temperatures) - 1} temperatures",
        run.path.num_evaluations,
        reasons,
    )


def guaranteed_lower(log_weights: Tensor, delta: float = 0.05) -> float:
    r"""A lower bound of the log of the mean of weights, without any assumption.

    Args:
        log_weights: Logarithms of independent, non-negative, equally distributed
            weights, shape ``(N,)``.
        delta: Probability that the bound is above the truth.

    Returns:
        The log of the ``Z`` at which the average of the two statistics (2), the second
        averaged over :math:`\lambda = 1, 1/2, \dots, 1/N`, is ``1 / delta``. At most
        ``log(2 / delta)`` below the log of the mean weight.

    Exactness: *lower bound* with probability ``1 - delta``.

    Example:
        >>> bound = guaranteed_lower(torch.zeros(1000))
        >>> -0.02 < bound < 0
        True
    """
    log_weights = log_weights.double()
    log_mean = log_mean_exp(log_weights).item()
    if not math.isfinite(log_mean):
        return -math.inf
    halvings = torch.arange(math.ceil(math.log2(len(log_weights))) + 1)
    rates = (2.0 ** -halvings.to(log_weights)).unsqueeze(-1)

    def log_statistic(log_z: float) -> float:
        bets = torch.logaddexp(rates.neg().log1p(), rates.log() + log_weights - log_z)
        products = log_mean_exp(bets.sum(-1)).item()
        return (
            math.log(0.5)
            + max(products, log_mean - log_z)
            + math.log1p(math.exp(-abs(products - (log_mean - log_z))))
        )  # (2)

    low, high = log_mean - math.log(2 / delta), log_weights.max().item()
    for _ in range(60):
        middle = (low + high) / 2
        if log_statistic(middle) > -math.log(delta):
            low = middle
        else:
            high = middle
    return low


class Schedule(NamedTuple):
    """Temperatures and kernels of a run of annealing.

    Attributes:
        inverse_temperatures: From 0 to 1.
        kernels: One for each, frozen; the first is not used.
    """

    inverse_temperatures: list[float]
    kernels: list[Kernel]


class _Annealing:
    """A path, a frozen schedule and the two runs along it."""

    schedule: Schedule

    def __init__(
        self,
        energy: Energy,
        base: dist.TorchDistribution,
        num_chains: int,
        delta: float,
    ) -> None:
        if num_chains < 25:
            raise ValueError(
                f"num_chains must be at least 25 for an error bar, got {num_chains}."
            )
        if not 0 < delta < 1:
            raise ValueError(f"delta must be between 0 and 1, got {delta}.")
        self.path: Any = path_between(energy, base)
        self.energy, self.num_chains = energy, num_chains

    def plan(self, *settings: Any) -> None:
        """Freeze schedule and kernels."""
        self.schedule = plan_schedule(self.path, *settings)

    def checked(self, draws: Tensor) -> Tensor:
        """As many draws as chains, taken at random."""
        event = tuple(self.energy.event_shape)
        if draws.shape[1:] != event or len(draws) < self.num_chains:
            raise ValueError(
                f"draws must have shape (N, *event) with event {event} and N at least "
                f"num_chains = {self.num_chains}, got {tuple(draws.shape)}."
            )
        chosen = torch.randperm(len(draws))[: self.num_chains]
        x = draws.detach()[chosen.to(draws.device)]
        return x.to(**self.energy.tensor_options(x))

    def forward(self) -> Tensor:
        """Log-weights of mean ``Z`` from the base, shape ``(num_chains,)``."""
        state = self.path.sample_base(1, self.num_chains)
        log_weights = self._travel(state, self.schedule.inverse_temperatures)
        return log_weights + self.path.log_start

    def reverse(self, draws: Tensor) -> Tensor:
        """Log-weights of mean ``1 / Z`` from the draws, shape ``(num_chains,)``."""
        state = self.path.evaluate(self.path.transform.inv(draws)[None])
        if not state.target.isfinite().all():
            raise ValueError(
                "draws must have finite energy, and "
                f"{int((~state.target.isfinite()).sum())} of {len(draws)} have not. "
                "They are no draws of this energy."
            )
        log_weights = self._travel(
            state, self.schedule.inverse_temperatures[::-1], is_reversed=True
        )
        return log_weights - self.path.log_start

    def _travel(
        self, state: Any, betas: list[float], *, is_reversed: bool = False
    ) -> Tensor:
        kernels = dict(zip(*self.schedule, strict=True))
        if is_reversed:
            kernels = {beta: reversal(kernel) for beta, kernel in kernels.items()}
        move = GivenKernels(self.path, kernels.__getitem__)
        journey = travel(
            state, move, inverse_temperatures=betas, moves_last=False, has_sums=False
        )
        return journey.log_weights[0]


@torch.no_grad()
def plan_schedule(
    path: GeometricPath | SitePath,
    num_temperatures: int = 200,
    inverse_temperatures: Sequence[float] | None = None,
    kernel: Kernel | None = None,
) -> Schedule:
    """Choose temperatures and kernels by a pilot run, as far as they are not given.

    Args:
        path: From the base to the target; it counts the evaluations.
        num_temperatures: At least so many, where they are not given.
        inverse_temperatures: From 0 to 1, rising.
        kernel: For all temperatures.

    Raises:
        DivergenceError: If the pilot run does not arrive at the target.
        ValueError: If an argument is out of range.
    """
    if inverse_temperatures is not None:
        betas = [float(beta) for beta in inverse_temperatures]
        require_rising(betas)
        if kernel is not None:
            return Schedule(betas, [kernel] * len(betas))
    elif num_temperatures < 1:
        raise ValueError(
            f"num_temperatures must be at least 1, got {num_temperatures}."
        )
    rungs, found = _pilot(path, kernel)
    if inverse_temperatures is None:
        each = math.ceil(num_temperatures / (len(rungs) - 1))
        betas = [0.0]
        for low, high in zip(rungs[:-1], rungs[1:], strict=True):
            betas += [low + (high - low) * k / each for k in range(1, each)] + [high]
    if kernel is not None:
        return Schedule(betas, [kernel] * len(betas))
    # The kernel of the next rung above: its step suits the narrower distribution.
    above = [next(k for k, rung in enumerate(rungs) if rung >= beta) for beta in betas]
    return Schedule(betas, [found[max(k, 1) - 1] for k in above])


def _pilot(
    path: GeometricPath | SitePath, kernel: Kernel | None
) -> tuple[list[float], list[Kernel]]:
    """A ladder of temperatures, and an adapted kernel for each but the first."""
    given = kernel if isinstance(path, SitePath) else None
    move = adaptive(path, _NUM_MOVES, given, keeps_all=False)
    journey = travel(
        path.start(1, _NUM_PARTICLES),
        move,
        num_ancestors=_NUM_PARTICLES,
        max_temperatures=_MAX_RUNGS,
    )
    return journey.inverse_temperatures, list(move.kernels)
