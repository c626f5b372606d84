r"""Adaptive tempered sequential Monte Carlo, in its waste-free form.

Particles travel the geometric path :math:`f_\beta = (1-\beta) f_0 + \beta f` from exact
draws of the base. At each temperature

.. math::
    \log \hat Z \mathrel{+}= \log \frac1N \sum_n
        \exp\{(\beta' - \beta)(f_0(x_n) - f(x_n))\}                        \tag{1}

then a few ancestors are drawn by their weights, each is moved many times, and *every*
state on the way is kept as a particle of the next population. The next
:math:`\beta'` is where the effective sample size of the weights in (1) falls to a given
fraction. Several islands run side by side in one tensor; they share the temperatures,
the step size and the metric, and their spread is the error bar.

References:
    Dau & Chopin (2022), JRSS B 84, 114-148.
    Del Moral, Doucet & Jasra (2006), JRSS B 68, 411-436.
"""

__all__ = [
    "Islands",
    "bennett_of_islands",
    "next_temperature",
    "run_smc",
    "smc",
    "with_metric",
    "with_step_size",
]

import dataclasses
import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, status_of
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc import HMC, StepSizeAdaptation, find_step_size
from pyro_ebm.mcmc.base import flat_event
from pyro_ebm.mcmc.path import GeometricPath, PathState
from pyro_ebm.partition.base import LogPartitionEstimate, combine_replicates
from pyro_ebm.partition.particles.resampling import systematic_resample
from pyro_ebm.partition.progress import watched


class Islands(NamedTuple):
    r"""What a run of sequential Monte Carlo leaves.

    Attributes:
        state: Particles at the target, chain shape ``(M, N)``: islands, particles.
        log_partition: Estimate (1) of each island, shape ``(M,)``; errs downwards.
        bennett: Estimate of each island by Bennett's ratio between the populations of
            neighbouring temperatures, shape ``(M,)``.
        reverse: Estimate of each island by (1) taken backwards, shape ``(M,)``; errs
            upwards.
        curve: :math:`\mathbb{E}_\beta[f - f_0]` at each temperature, by island, shape
            ``(K, M)``; see :mod:`pyro_ebm.partition.particles.thermodynamic`.
        curve_variance: :math:`\mathrm{Var}_\beta[f - f_0]`, shape ``(K, M)``.
        initial_log_weights: Log of :math:`e^{-f} / p_0` at the draws of the base, shape
            ``(M, N)``.
        kernel: The kernel as adapted to the target.
        inverse_temperatures: The path that was taken, from 0 to 1.
        ess: Smallest effective fraction of the weights on the way.
        num_evaluations: Energy evaluations spent, a point each.
    """

    state: PathState
    log_partition: Tensor
    bennett: Tensor
    reverse: Tensor
    curve: Tensor
    curve_variance: Tensor
    initial_log_weights: Tensor
    kernel: HMC
    inverse_temperatures: list[float]
    ess: float
    num_evaluations: int


def smc(
    energy: Energy,
    base: dist.TorchDistribution,
    *,
    num_islands: int = 4,
    num_particles: int = 256,
    chain_length: int = 16,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` by waste-free sequential Monte Carlo.

    Args:
        energy: On any support that ``biject_to`` knows.
        base: A normalised distribution on the same event and support, wider than the
            target.
        num_islands: Independent populations, at least 2, for the error bar.
        num_particles: Particles an island.
        chain_length: States kept of each ancestor's chain; divides ``num_particles``.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate with Student's 95 % interval over the islands.

    Raises:
        DivergenceError: If the energy is finite at no draw of the base.
        ValueError: If a count is out of range or the base does not fit the energy.

    Exactness: *consistent*; the islands' spread cannot see a mode that all missed.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.ones(2))
        >>> base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> abs(smc(energy, base).value - 1.838) < 0.3
        True
    """
    with watched(energy, is_shown=progress_bar) as target:
        islands = run_smc(
            target,
            base,
            num_islands=num_islands,
            num_particles=num_particles,
            chain_length=chain_length,
        )
    value, std_error, half = combine_replicates(islands.log_partition)
    reasons: tuple[Finding, ...] = ()
    if not math.isfinite(value):
        reasons = (Finding(Reason.NOT_FINITE, "the estimate is not finite"),)
    elif not std_error * math.sqrt(num_islands) < 0.5:
        apart = "the islands disagree by more than 0.5 nats"
        reasons = (Finding(Reason.ISLANDS_DISAGREE, apart),)
    return LogPartitionEstimate(
        value,
        std_error,
        value - half,
        value + half,
        islands.ess * num_islands * num_particles,
        status_of(reasons),
        f"SMC, {len(islands.inverse_temperatures) - 1} temperatures",
        islands.num_evaluations,
        reasons,
    )


@torch.no_grad()
def run_smc(
    energy: Energy,
    base: dist.TorchDistribution,
    *,
    num_islands: int = 4,
    num_particles: int = 256,
    chain_length: int = 16,
    ess_threshold: float = 0.5,
    max_temperatures: int = 500,
    stop_after: int | None = None,
) -> Islands:
    """Carry islands of particles from the base to the energy; see :func:`smc`.

    Args:
        energy: The target.
        base: Where the particles come from.
        num_islands: Populations in one tensor.
        num_particles: Particles an island.
        chain_length: States kept of each ancestor's chain.
        ess_threshold: Effective fraction at which the next temperature is placed.
        max_temperatures: Where to give up.
        stop_after: Temperatures after which the run ends where it is, short of 1.
    """
    if num_islands < 2 or chain_length < 2 or num_particles % chain_length:
        raise ValueError(
            "num_islands must be at least 2 and chain_length, at least 2, must divide "
            f"num_particles; got {num_islands}, {chain_length} and {num_particles}."
        )
    path = GeometricPath(energy, base)
    state = path.start(num_islands, num_particles)
    sums = _Sums(state)
    kernel, betas = HMC(step_size=1.0), [0.0]
    end = math.inf if stop_after is None else stop_after
    while betas[-1] < 1 and len(betas) <= end:
        path.require_progress(len(betas), max_temperatures)
        beta = next_temperature(state, betas[-1], ess_threshold)
        log_weights = state.log_weight(beta - betas[-1])
        kernel = with_metric(kernel, state.u, log_weights)
        num_ancestors = num_particles // chain_length
        ancestors = state.select(systematic_resample(log_weights, num_ancestors))
        path.inverse_temperature = beta
        state, kernel = _move(path, ancestors, kernel, chain_length)
        sums.add(log_weights, state, beta - betas[-1])
        betas.append(beta)
    return sums.result(state, kernel, betas, path.num_evaluations)


class _Sums:
    """What adds up from temperature to temperature."""

    def __init__(self, state: PathState) -> None:
        zeros = state.target.new_zeros(len(state.target))
        self.forward, self.bennett, self.reverse = zeros, zeros, zeros
        self.initial = state.log_weight(1.0)
        self.curve: list[tuple[Tensor, Tensor]] = []
        self._look(state)
        self.ess = 1.0

    def add(self, log_weights: Tensor, new: PathState, step: float) -> None:
        back = new.log_weight(step)
        self.forward = self.forward + log_mean_exp(log_weights)  # (1)
        self.reverse = self.reverse - log_mean_exp(-back)
        self.bennett = self.bennett + bennett_of_islands(log_weights, back)
        self.ess = min(self.ess, effective_sample_fraction(log_weights).min().item())
        self._look(new)

    def _look(self, state: PathState) -> None:
        difference = state.target - state.base
        self.curve.append((difference.mean(-1), difference.var(-1)))

    def result(
        self, state: PathState, kernel: HMC, betas: list[float], num_evaluations: int
    ) -> Islands:
        curve, variance = zip(*self.curve, strict=True)
        return Islands(
            state,
            self.forward,
            self.bennett,
            self.reverse,
            torch.stack(curve),
            torch.stack(variance),
            self.initial,
            kernel,
            betas,
            self.ess,
            num_evaluations,
        )


def bennett_of_islands(first: Tensor, second: Tensor) -> Tensor:
    r"""Bennett's acceptance ratio between two populations of equal size, by island.

    Solves :math:`\overline{\sigma(\ell_1 - c)} = \overline{\sigma(c - \ell_2)}` for
    ``c`` by bisection; see :mod:`pyro_ebm.partition.bridge.bridge`.

    Args:
        first: Log weights from the first to the second density, at draws of the first,
            shape ``(M, N)``.
        second: The same at draws of the second.

    Returns:
        Shape ``(M,)``.
    """
    both = torch.cat([first, second], -1).clamp(min=-1e6)
    low, high = both.amin(-1) - 1, both.amax(-1) + 1
    for _ in range(60):
        c = (low + high) / 2
        too_low = (first - c[:, None]).sigmoid().sum(-1) > (
            c[:, None] - second
        ).sigmoid().sum(-1)
        low, high = torch.where(too_low, c, low), torch.where(too_low, high, c)
    return (low + high) / 2


def next_temperature(state: PathState, beta: float, threshold: float) -> float:
    """The largest step whose worst island keeps the effective fraction, by bisection.

    Args:
        state: Particles at ``beta``, the last chain dimension within an island.
        beta: The current inverse temperature.
        threshold: Effective fraction of the weights that is to be kept.
    """

    def fraction(step: float) -> float:
        return effective_sample_fraction(state.log_weight(step)).min().item()

    low, high = 0.0, 1.0 - beta
    if fraction(high) >= threshold:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fraction(middle) >= threshold else (low, middle)
        if high - low < 1e-3 * high:
            break
    return beta + high


def with_metric(kernel: HMC, u: Tensor, log_weights: Tensor) -> HMC:
    """The kernel with the scales of a weighted population as its metric.

    Dense for vectors if there are enough points to tell correlations, else diagonal:
    any shrinkage of the one towards the other would undo a strong correlation.

    Args:
        kernel: Its step size and number of leapfrog steps are kept.
        u: Points, shape ``(M, N, *event)``.
        log_weights: Shape ``(M, N)``.
    """
    points, event_shape = flat_event(u, 2).flatten(0, 1), u.shape[2:]
    weights = log_weights.flatten().softmax(0)
    ess = 1 / weights.square().sum()
    centred = points - weights @ points
    variance = (weights @ centred.square()).clamp(min=1e-12)
    if len(event_shape) == 1 and ess > 5 * len(variance):
        covariance = (centred * weights[:, None]).mT @ centred
        factor, info = torch.linalg.cholesky_ex(covariance)
        if info == 0:
            return dataclasses.replace(kernel, scale=None, scale_tril=factor)
    scale = variance.sqrt().reshape(event_shape)
    return dataclasses.replace(kernel, scale=scale, scale_tril=None)


def _move(
    path: GeometricPath, state: PathState, kernel: HMC, chain_length: int
) -> tuple[PathState, HMC]:
    """Extend each ancestor to a chain; all its states become particles."""
    chains = path.at_temperature(state)
    one_step = dataclasses.replace(kernel, num_leapfrog=1)
    adaptation = StepSizeAdaptation(find_step_size(one_step, path, chains))
    kept = [state]
    for _ in range(chain_length - 1):
        kernel = with_step_size(kernel, adaptation.step_size)
        state, info = path.step(kernel, state)
        adaptation.update(kernel, info)
        kept.append(state)
    joined = (torch.cat(parts, 1) for parts in zip(*kept, strict=True))
    return PathState(*joined), kernel


def with_step_size(kernel: HMC, step_size: Tensor) -> HMC:
    """A trajectory of about a quarter period in the whitened coordinates."""
    num_leapfrog = min(16, max(1, math.ceil(1.6 / step_size.item())))
    return dataclasses.replace(kernel, step_size=step_size, num_leapfrog=num_leapfrog)
