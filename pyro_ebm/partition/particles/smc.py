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

__all__ = ["Islands", "run_smc", "smc"]

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, status_of
from pyro_ebm.energies import Energy
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.mcmc import HMC, Kernel
from pyro_ebm.mcmc.tempering.site_path import path_between
from pyro_ebm.partition.base import LogPartitionEstimate, combine_replicates
from pyro_ebm.partition.base_check import reach_finding
from pyro_ebm.partition.particles.engine import travel
from pyro_ebm.partition.particles.movers import adaptive
from pyro_ebm.partition.progress import watched

#: Share of a population out of reach of the one before that is too much.
_MAX_BEYOND = 0.02


class Islands(NamedTuple):
    r"""The result of a run of sequential Monte Carlo.

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
        kernel: The kernel as adapted to the target.
        inverse_temperatures: The path that was taken, from 0 to 1.
        ess: Smallest effective fraction of the weights on the way.
        num_evaluations: Energy evaluations spent, a point each.
        log_start: Log Z where the path begins.
        beyond: See :class:`~pyro_ebm.partition.particles.engine.Journey`.
    """

    state: Any
    log_partition: Tensor
    bennett: Tensor
    reverse: Tensor
    curve: Tensor
    curve_variance: Tensor
    kernel: Any
    inverse_temperatures: list[float]
    ess: float
    num_evaluations: int
    log_start: float = 0.0
    beyond: float = 0.0


def smc(
    energy: Energy,
    base: dist.TorchDistribution,
    *,
    num_islands: int = 4,
    num_particles: int = 256,
    chain_length: int = 16,
    kernel: Kernel | None = None,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` by waste-free sequential Monte Carlo.

    Args:
        energy: On a finite support, or any that ``biject_to`` knows.
        base: A normalised distribution on the same event and support, wider than the
            target. A restricted Boltzmann machine and uniform sites begin at its mean
            field.
        num_islands: Independent populations, at least 2, for the error bar.
        num_particles: Particles an island.
        chain_length: States kept of each ancestor's chain; divides ``num_particles``.
        kernel: What moves the particles over a finite support; default: ``Gibbs()`` or
            ``DiscreteLangevin()``, as suits it. Elsewhere HMC is adapted.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second, and on a continuous support.

    Returns:
        The estimate with Student's 95 % interval over the islands; ``"unreliable"`` if
        these disagree by more than half a nat, or if the base has no draws of states of
        a finite support that count.

    Raises:
        DivergenceError: If the energy is finite at no draw of the base.
        TypeError: If a kernel is given on a continuous support.
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
            kernel=kernel,
        )
    value, std_error, half = combine_replicates(islands.log_partition)
    reasons: tuple[Finding, ...] = ()
    if not math.isfinite(value):
        reasons = (Finding(Reason.NOT_FINITE, "the estimate is not finite"),)
    elif not std_error * math.sqrt(num_islands) < 0.5:
        apart = "the islands disagree by more than 0.5 nats"
        reasons = (Finding(Reason.ISLANDS_DISAGREE, apart),)
    if is_finite_support(energy.support):
        reasons = (*reasons, *reach_finding(islands.beyond, _MAX_BEYOND))
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
    kernel: Kernel | None = None,
) -> Islands:
    """Run sequential Monte Carlo from the base to the energy; see :func:`smc`.

    Args:
        energy: The target.
        base: Where the particles come from.
        num_islands: Populations in one tensor.
        num_particles: Particles an island.
        chain_length: States kept of each ancestor's chain.
        ess_threshold: Effective fraction at which the next temperature is placed.
        max_temperatures: Where to give up.
        stop_after: Temperatures after which the run ends where it is, short of 1.
        kernel: Over a finite support.
    """
    _require_counts(num_islands, num_particles, chain_length)
    path = path_between(energy, base)
    curve = _Curve()
    move = adaptive(path, chain_length - 1, kernel)
    journey = travel(
        path.start(num_islands, num_particles),
        move,
        ess_threshold=ess_threshold,
        num_ancestors=num_particles // chain_length,
        max_temperatures=max_temperatures,
        is_over=lambda: stop_after is not None and len(move.kernels) >= stop_after,
        look=lambda state: curve.add(state.slope(path.inverse_temperature)),
    )
    return Islands(
        journey.state,
        journey.forward + path.log_start,
        journey.bennett + path.log_start,
        journey.reverse + path.log_start,
        torch.stack(curve.means),
        torch.stack(curve.variances),
        move.kernels[-1] if move.kernels else HMC(step_size=1.0),
        journey.inverse_temperatures,
        journey.ess,
        path.num_evaluations,
        path.log_start,
        journey.beyond,
    )


def _require_counts(num_islands: int, num_particles: int, chain_length: int) -> None:
    if num_islands < 2 or chain_length < 2 or num_particles % chain_length:
        raise ValueError(
            "num_islands must be at least 2 and chain_length, at least 2, must divide "
            f"num_particles; got {num_islands}, {chain_length} and {num_particles}."
        )


class _Curve:
    """Mean and variance of the slope of the energy, population by population."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []

    def add(self, slope: Tensor) -> None:
        self.means.append(slope.mean(-1))
        self.variances.append(slope.var(-1))
