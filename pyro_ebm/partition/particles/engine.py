r"""One engine for weighted particles that travel a path of energies.

A path leads through energies :math:`f_\beta` from one of known partition function to
one of unknown. At each step from :math:`\beta` to :math:`\beta'` the particles gain the
weights

.. math::
    \log w_n = f_\beta(x_n) - f_{\beta'}(x_n), \qquad
    \log \frac{Z_{\beta'}}{Z_\beta} \approx \log \frac1N \sum_n w_n        \tag{1}

may be resampled by them, and are moved by a kernel that leaves
:math:`e^{-f_{\beta'}}` invariant. Sequential Monte Carlo places the temperatures by the
weights and resamples at each; annealed importance sampling has them fixed and never
resamples; a reverse run takes them from the end. In the waste-free form every state on
the way of a resampled ancestor is a particle.

The particles are in islands, shape ``(M, N)``, that share temperatures and kernels and
nothing else. Their state holds both ends of the path, and travels through acceptance
with the points.

References:
    Dau & Chopin (2022), JRSS B 84, 114-148 (waste-free). Neal (2001), Statistics and
    Computing 11, 125-139. Bennett (1976), J. Comput. Phys. 22, 245-268.
"""

__all__ = ["Journey", "Mover", "Travels", "travel"]

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.partition.base import combine_replicates
from pyro_ebm.partition.bridge.bennett import solve
from pyro_ebm.partition.particles.resampling import systematic_resample


class Travels(Protocol):
    """The state of particles on a path, chain shape ``(M, N)``."""

    def log_weight(self, low: float, high: float) -> Tensor:
        """Log-weights (1) of a step along the path, shape ``(M, N)``."""

    def select(self, chains: tuple[Tensor | slice, ...]) -> "Travels":
        """The particles that an index tuple names."""


class Mover(Protocol):
    """How particles move at a temperature."""

    def __call__(
        self, population: Any, log_weights: Tensor, ancestors: Any, beta: float, /
    ) -> Any:
        """The next population.

        Args:
            population: Before resampling; what a metric can be learned from.
            log_weights: Of the population at ``beta``, shape ``(M, N)``.
            ancestors: What is moved, chain shape ``(M, A)``.
            beta: The temperature of the kernel.

        Returns:
            Particles of chain shape ``(M, N)``.
        """


class Journey(NamedTuple):
    r"""The result of moving particles along a path.

    Attributes:
        state: The particles at its end.
        inverse_temperatures: The steps that were taken.
        log_weights: Weights (1) since the last resampling, shape ``(M, N)``.
        forward: Sum of (1) over the steps, shape ``(M,)``; errs downwards. This, and
            the two that follow, are zero without ``has_sums``.
        bennett: The same by Bennett's ratio between neighbouring populations.
        reverse: The same by (1) taken backwards; errs upwards.
        ess: Smallest effective fraction of the weights of a step.
        has_arrived: Whether the run came to the end of the path.
        beyond: Largest share of a population that the one before did not reach: any
            one of these particles would have had more weight than all of those.
    """

    state: Any
    inverse_temperatures: list[float]
    log_weights: Tensor
    forward: Tensor
    bennett: Tensor
    reverse: Tensor
    ess: float
    has_arrived: bool
    beyond: float = 0.0

    @property
    def gap(self) -> float:
        """Difference of the forward and the reverse estimate, in nats."""
        forward = combine_replicates(self.forward)[0]
        return abs(combine_replicates(-self.reverse)[0] + forward)


def travel(
    state: Any,
    move: Mover,
    *,
    inverse_temperatures: Sequence[float] | None = None,
    ess_threshold: float = 0.5,
    num_ancestors: int | None = None,
    moves_last: bool = True,
    has_sums: bool = True,
    max_temperatures: int = 500,
    is_over: Callable[[], bool] = lambda: False,
    look: Callable[[Any], None] = lambda _: None,
) -> Journey:
    """Move islands of particles along a path of temperatures.

    Args:
        state: Particles at its start, chain shape ``(M, N)``.
        move: How they move.
        inverse_temperatures: The steps, in either direction; default: up from 0, each
            as long as the worst island keeps the effective fraction of the weights.
        ess_threshold: That fraction.
        num_ancestors: Particles an island that are resampled at each step; default:
            none is resampled, and the weights add up.
        moves_last: Whether the particles are moved at the last temperature too.
        has_sums: Whether the ratios of neighbouring populations are added up, which
            takes longer than a short step.
        max_temperatures: Where to give up.
        is_over: Asked at each step; the run ends where it is once it is true.
        look: Called with each population.

    Raises:
        DivergenceError: If more than ``max_temperatures`` steps were taken.
    """
    fixed = None if inverse_temperatures is None else list(inverse_temperatures)
    betas = [0.0 if fixed is None else fixed[0]]
    weights = torch.zeros_like(state.log_weight(betas[0], betas[0]))
    sums = _Sums(weights)
    look(state)
    end = 1.0 if fixed is None else fixed[-1]
    while betas[-1] != end and not is_over():
        _require_end(betas, max_temperatures)
        low = betas[-1]
        high = fixed[len(betas)] if fixed else _next(state, low, ess_threshold)
        increment = state.log_weight(low, high)
        weights = weights + increment
        betas.append(high)
        ancestors = state
        if num_ancestors is not None:
            ancestors = state.select(systematic_resample(weights, num_ancestors))
        if moves_last or high != end:
            new = move(state, weights, ancestors, high)
            if has_sums:
                sums.add(increment, new.log_weight(low, high))
            state = new
            look(state)
        if num_ancestors is not None:
            weights = torch.zeros_like(state.log_weight(high, high))
    ratios = (sums.forward, sums.bennett, sums.reverse, sums.ess)
    return Journey(state, betas, weights, *ratios, betas[-1] == end, sums.beyond)


def _require_end(betas: list[float], max_temperatures: int) -> None:
    if len(betas) > max_temperatures:
        raise DivergenceError(
            f"the path from the base has not ended after {max_temperatures} "
            f"temperatures; the inverse temperature is {betas[-1]:.3g}. The energy "
            "falls without bound, or the base is far from it: choose a base nearer."
        )


class _Sums:
    """What adds up from step to step, by island."""

    def __init__(self, like: Tensor) -> None:
        zeros = like.new_zeros(len(like), dtype=torch.float64)
        self.forward, self.bennett, self.reverse = zeros, zeros, zeros
        self.ess, self.beyond = 1.0, 0.0

    def add(self, there: Tensor, back: Tensor) -> None:
        """A step.

        Args:
            there: Its log-weights at the particles before, shape ``(M, N)``.
            back: Its log-weights at the particles after.
        """
        there, back = there.double(), back.double()
        self.forward = self.forward + log_mean_exp(there)  # (1)
        self.reverse = self.reverse - log_mean_exp(-back)
        self.bennett = self.bennett + solve(there, back)
        self.ess = min(self.ess, effective_sample_fraction(there).min().item())
        is_beyond = back > there.logsumexp(-1, keepdim=True)
        self.beyond = max(self.beyond, is_beyond.double().mean().item())


def _next(state: Travels, beta: float, threshold: float) -> float:
    """The largest step whose worst island keeps the effective fraction."""

    def fraction(high: float) -> float:
        return effective_sample_fraction(state.log_weight(beta, high)).min().item()

    if fraction(1.0) >= threshold:
        return 1.0
    # By factors first: from a vague base the first step may be 1e-100.
    high = 1.0 - beta
    low = high
    while low > 1e-300 and fraction(beta + low) < threshold:
        low, high = low * 1e-3, low
    for _ in range(60):
        middle = (low + high) / 2 if high < 2 * low else math.sqrt(low * high)
        is_enough = fraction(beta + middle) >= threshold
        low, high = (middle, high) if is_enough else (low, middle)
        if high - low < 1e-3 * high:
            break
    # Rounding may leave no step at all where the weights are extreme.
    return max(beta + high, math.nextafter(beta, 2.0))
