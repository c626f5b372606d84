r"""ChEES-HMC: Hamiltonian Monte Carlo with a trajectory length that adapts.

All chains follow trajectories of one length, which is drawn for each transition:

.. math::
    L = \left\lceil (1 + j (2u - 1))\, T / \epsilon \right\rceil,
    \quad u \sim \mathcal{U}(0, 1)                                        \tag{1}

leapfrog steps, with jitter :math:`j`. The mean length :math:`T` maximises the change in
an estimator of the expected square: in whitened coordinates :math:`z = S^{-1} x`, with
the end :math:`z'` and the momentum :math:`r'` there,

.. math::
    \mathrm{C}(T) &= \mathbb{E}\left[(g(z') - g(z))^2\right], \quad
        g(z) = \log(m + |z - \mathbb{E} z|^2)                              \tag{2} \\
    \frac{\partial\, \mathrm{C}}{\partial \log T} &\propto \mathbb{E}\left[
        \epsilon L\, (g(z') - g(z))\,
        \frac{(z' - \mathbb{E} z')^\top r'}{m + |z' - \mathbb{E} z'|^2}\right] \tag{3}

where the expectations run over the chains, weighted by their acceptance probabilities,
and :math:`m` is the median of :math:`|z - \mathbb{E} z|^2`.

The chains share the step :math:`\epsilon` too. Where a few of them are in a narrower
place than the others, the step that suits most lets those few stick. So what is held to
a target is, as in blackjax, the harmonic mean of the acceptance probabilities; but
bounded, or one chain in a thousand would rule the others:

.. math::
    \bar a = \Big( \tfrac1C \textstyle\sum_c 1 / \max(a_c, \tfrac1{10})
        \Big)^{-1}                                                        \tag{4}

At the same target these are smaller steps than by the arithmetic mean, with 0.89 to
0.98 of its effective draws a gradient but, in fewer transitions, as many a second. The
posterior of a small neural network, where chains had got stuck, is sampled with as many
a gradient as by blackjax (``benchmarks/bench_ess.py``).

Where this step is unstable, as at the tip of a curved ridge, a chain is stuck, and
others cannot get there. So after the warm-up a part :math:`p` of the moves, drawn for
each chain and transition, goes by smaller steps, as many as the others:

.. math::
    \epsilon_c = \epsilon\, 4^{-v_c}, \quad
        v_c \sim (1 - p)\, \delta_0 + p\, \mathcal{U}(0, 1)               \tag{5}

The part is a tenth, which costs a twentieth of the mean length. It is larger, up to
:math:`p = 1`, where in the last window of the warm-up over half a per cent of the
proposals had a finite acceptance ratio below :math:`e^{-7}`, which hardly occurs where
one step suits all places.

Three things differ from the paper, where :math:`j = 1`, :math:`g` is the square
itself, and the length that maximises (2) is kept. The square decorrelates in half the
time of the point itself: draws with 1.4 times that length have two to three times the
effective sample size of the means, and three quarters of that of the squares.
With :math:`j = \tfrac12` ill-conditioned Gaussians give a fifth more effective draws of
the means for each gradient, and not fewer of the squares. The logarithm changes nothing
for them, but where tails are heavy it keeps a few far chains from asking for ever
longer trajectories.

References:
    Hoffman, Radul & Sountsov (2021), AISTATS, PMLR 130, 3907-3915.
"""

__all__ = ["ChEES", "TrajectoryAdaptation", "TrajectoryInfo"]

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, accept
from pyro_ebm.mcmc.kernels.leapfrog import Trajectory, trajectory
from pyro_ebm.mcmc.kernels.metric import (
    Factor,
    LowRank,
    check_scales,
    require_one_scale,
    whiten,
)
from pyro_ebm.mcmc.warmup.adaptation import KernelAdaptation


class TrajectoryInfo(StepInfo):
    """Acceptance of one transition, and the quantities that the adaptation needs.

    Attributes:
        start: Where the chains were.
        trajectory: Where their trajectories ended.
        length: How long these were, in whitened coordinates.
    """

    start: ChainState
    trajectory: Trajectory
    length: float


@final
@dataclass(frozen=True)
class ChEES(Kernel):
    r"""Hamiltonian Monte Carlo whose trajectory length is learned in the warm-up.

    It wants many chains, which share the step size, the length and the scale; with a
    single chain there is nothing to learn the length from, and it stays as given.

    Args:
        step_size: :math:`\epsilon > 0`, in units of ``x / scale``.
        trajectory_length: Mean length :math:`T` of a trajectory, in units of
            ``x / scale``; a quarter of a period where that is a standard normal.
        scale: The diagonal of a diagonal :math:`S`, in the shape of the event; best
            near the standard deviation of ``x``. Default: the identity.
        scale_tril: A dense :math:`S` for vector events, shape ``(D, D)``; best where
            :math:`S S^\top` is near the covariance of ``x``. Instead of ``scale``.
        low_rank: An :math:`S` for long vectors that stretches few directions. Instead
            of the other two.
        jitter: :math:`j` in (1), at most 1: lengths are drawn from
            ``T * [1 - jitter, 1 + jitter]``, so that no trajectory closes on itself.
        max_leapfrog: Most leapfrog steps in a trajectory.
        quantile: The :math:`u` in (1). Default: drawn at each transition. The warm-up
            sets it, to go evenly through the lengths, and then finds in the info what
            it needs of the trajectories.
        target_accept_prob: What step-size adaptation holds (4) to.
        small_steps: :math:`p` in (5), in [0, 1]; 0 where the quantile is given, as
            during the warm-up, which may raise it.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> kernel = ChEES(step_size=0.5)
        >>> state, info = kernel.step(energy, kernel.init(energy, torch.zeros(64, 2)))
        >>> state.x.shape
        torch.Size([64, 2])
    """

    #: Of one chain, in the mean (4).
    LEAST_ACCEPTANCE: ClassVar[float] = 0.1
    #: The smallest step in (5), in units of the common one.
    SMALLEST: ClassVar[float] = 0.25
    has_chain_steps: ClassVar[bool] = True

    step_size: float | Tensor = 0.1
    trajectory_length: float | Tensor = math.pi / 2
    scale: Tensor | None = None
    scale_tril: Tensor | None = None
    low_rank: LowRank | None = None
    jitter: float = 0.5
    max_leapfrog: int = 200
    quantile: float | None = None
    target_accept_prob: float = 0.8
    small_steps: float = 0.1

    def __post_init__(self) -> None:
        """Check the settings."""
        self._check()
        length = self.trajectory_length
        if not isinstance(length, Tensor) and not 0 < length < math.inf:
            raise ValueError(
                f"trajectory_length must be positive and finite, got {length}."
            )
        require_one_scale(self.scale, self.scale_tril, self.low_rank)
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be in [0, 1], got {self.jitter}.")
        if self.max_leapfrog < 1:
            raise ValueError(
                f"max_leapfrog must be at least 1, got {self.max_leapfrog}."
            )
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {self.quantile}.")
        if not 0 <= self.small_steps <= 1:
            raise ValueError(f"small_steps must be in [0, 1], got {self.small_steps}.")

    @property
    def _factor(self) -> Factor | None:
        return self.scale_tril if self.low_rank is None else self.low_rank

    @property
    def num_gradients(self) -> int:
        """One a leapfrog step; those of the mean length where that is drawn."""
        return self._num_leapfrog(0.5 if self.quantile is None else self.quantile)

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; ``state.x`` has shape ``(*chains, *event)``."""
        check_scales(energy, self.scale, self._factor)
        u = torch.rand(()).item() if self.quantile is None else self.quantile
        num_leapfrog = self._num_leapfrog(u)
        eps = torch.as_tensor(self.step_size).to(state.x)
        if eps.dim():  # of each chain
            eps = eps.reshape(*eps.shape, *[1] * energy.event_dim)
        if self.quantile is None and self.small_steps:
            part = self._part_of_step(state)
            eps = eps * part.reshape((*part.shape, *[1] * energy.event_dim))
        eps = eps if self.scale is None else eps * self.scale
        # In full: each leapfrog step multiplies by it twice, and broadcasting is slow.
        eps = eps.expand_as(state.x).contiguous()
        result = trajectory(energy, state, eps, num_leapfrog, self._factor)
        new, info = accept(result.log_ratio, state, result.end)
        if self.quantile is None:
            return new, info
        full = TrajectoryInfo(*info)
        full.start, full.trajectory = state, result
        full.length = num_leapfrog * self._middle_step
        return new, full

    def _part_of_step(self, state: ChainState) -> Tensor:
        """Of the common step, for each chain; independent of where it is."""
        exponent = 1 - torch.rand_like(state.energy) / self.small_steps
        return self.SMALLEST ** exponent.clamp_(min=0.0)  # (5)

    def mean_acceptance(self, accept_prob: Tensor) -> Tensor:
        """The bounded harmonic mean (4)."""
        bounded = accept_prob.clamp(min=self.LEAST_ACCEPTANCE)
        return 1 / (1 / bounded).mean()

    def probe(self) -> "ChEES":
        """With one leapfrog step, for a cheap search of a step size."""
        return dataclasses.replace(self, max_leapfrog=1, small_steps=0.0)

    def adaptation(self) -> "TrajectoryAdaptation":
        """What learns the length of the trajectories."""
        return TrajectoryAdaptation(self)

    @property
    def _middle_step(self) -> float:
        return float(torch.as_tensor(self.step_size).median())

    def _num_leapfrog(self, u: float) -> int:
        # The one number that must be on the host, to know how often to call the energy.
        # A frozen kernel holds plain numbers, and so waits for no device.
        length = (1 + self.jitter * (2 * u - 1)) * float(self.trajectory_length)
        step_size = self._middle_step
        if not length < self.max_leapfrog * step_size:  # also for a step size of zero
            return self.max_leapfrog
        return max(math.ceil(length / step_size), 1)  # (1)


@final
class TrajectoryAdaptation(KernelAdaptation[ChEES]):
    """Ascent of (2) along (3) by Adam without momentum, on the log of the length.

    Args:
        kernel: Whose length is where to begin.
    """

    log_length: Tensor
    averaged_log_length: Tensor
    square: Tensor
    hopeless: Tensor

    #: What the frozen length is, in the length that maximises (2).
    STRETCH = 1.4
    LEARNING_RATE = 0.05
    DECAY = 0.95
    MAX_UPDATE = 0.35
    #: Least weight of the last iterate in the average that is frozen.
    AVERAGING = 0.1
    #: A proposal with a smaller log acceptance ratio is hopeless.
    HOPELESS = -7.0
    #: Most of a transition that count: all chains at once are a step too large for all.
    MAX_HOPELESS = 0.02
    #: Small steps for each hopeless proposal beyond a few.
    SMALL_STEPS, FEW_HOPELESS = 200.0, 0.005

    def __init__(self, kernel: ChEES) -> None:
        super().__init__()
        self._start = torch.as_tensor(kernel.trajectory_length).log()
        for name in ("log_length", "averaged_log_length", "square", "hopeless"):
            self.register_buffer(name, torch.tensor(0.0))
        self._num_proposed = 0  # of the run, for the sequence of quantiles
        self.reset()

    def reset(self) -> None:
        """Begin anew in a new metric, at the kernel's own length times the spread.

        A metric of gradients is as wide as the density is curved. On a ring the draws
        are twice as wide as that, and (2) does not see how far along it they go.
        """
        spread = torch.as_tensor(self.spread).to(self.log_length)
        self.log_length = self._start.to(self.log_length) + spread.log()
        # Of its own memory, into which a saved value may be loaded.
        self.averaged_log_length = self.log_length.clone()
        self.square = torch.zeros_like(self.square)
        self.hopeless = torch.zeros_like(self.hopeless)
        self._num_updates = 0

    def get_extra_state(self) -> dict[str, int]:
        """The counters, which must be on the host."""
        return {"proposed": self._num_proposed, "updates": self._num_updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Load the counters."""
        self._num_proposed, self._num_updates = state["proposed"], state["updates"]

    def current(self, kernel: ChEES) -> ChEES:
        """The kernel of the next transition of the warm-up."""
        return dataclasses.replace(
            kernel,
            trajectory_length=self.log_length.exp(),
            quantile=van_der_corput(self._num_proposed + 1),
        )

    def frozen(self, kernel: ChEES) -> ChEES:
        """The kernel after the warm-up."""
        length = self.averaged_log_length.exp().item()
        if self.square > 0:  # nothing is learned from a single chain
            length *= self.STRETCH
        small = self.SMALL_STEPS * (self.hopeless.item() - self.FEW_HOPELESS)
        return dataclasses.replace(
            kernel,
            trajectory_length=length,
            quantile=None,
            small_steps=max(kernel.small_steps, min(small, 1.0)),
        )

    def update(self, kernel: ChEES, info: StepInfo) -> None:
        """Learn from a transition by the kernel of :meth:`current`."""
        self._num_proposed += 1
        if not isinstance(info, TrajectoryInfo):
            raise TypeError(
                "info must be what the kernel of the warm-up returned, a "
                f"TrajectoryInfo, got {type(info).__name__}."
            )
        # Not a number where every proposal was rejected: nothing is learned from that.
        grad = _criterion_grad(kernel, info).to(self.square).nan_to_num(0.0, 0.0, 0.0)
        self._num_updates += 1
        # Not those that end beyond a wall, where smaller steps are of no use.
        ratio = info.trajectory.log_ratio
        hopeless = (ratio.isfinite() & (ratio < self.HOPELESS)).to(grad).mean()
        hopeless = hopeless.clamp(max=self.MAX_HOPELESS)
        self.hopeless = torch.lerp(self.hopeless, hopeless, 1 / self._num_updates)
        self.square = self.DECAY * self.square + (1 - self.DECAY) * grad.square()
        unbiased = self.square / (1 - self.DECAY**self._num_updates)
        step = (self.LEARNING_RATE * grad / unbiased.sqrt()).nan_to_num(0.0)
        step = step.clamp(-self.MAX_UPDATE, self.MAX_UPDATE)
        # With twice this length a trajectory has about as many steps as it may have.
        limit = torch.as_tensor(kernel.step_size).median().to(step)
        limit = limit * kernel.max_leapfrog / 2
        limit = limit.clamp(min=torch.finfo(limit.dtype).tiny).log()
        self.log_length = torch.minimum(self.log_length + step, limit)
        weight = max(self.AVERAGING, 1 / self._num_updates)
        self.averaged_log_length = torch.lerp(
            self.averaged_log_length, self.log_length, weight
        )


def _criterion_grad(kernel: ChEES, info: TrajectoryInfo) -> Tensor:
    """The gradient (3), shape ``()``; not a number if every proposal is rejected."""
    count = info.accept_prob.numel()
    weights = info.accept_prob.flatten() / info.accept_prob.sum()
    is_finite = info.is_finite.reshape(count, 1)

    def rows(x: Tensor) -> Tensor:  # those of no weight may be anything
        return torch.where(is_finite, x.reshape(count, -1), 0.0)

    def centred(x: Tensor) -> Tensor:
        z = whiten(rows(x), kernel.scale, kernel._factor)
        return z - weights @ z

    end, start = centred(info.trajectory.end.x), centred(info.start.x)
    end_square, start_square = end.square().sum(-1), start.square().sum(-1)
    median = start_square.median()
    slope = (end * rows(info.trajectory.momentum)).sum(-1) / (median + end_square)
    change = ((median + end_square) / (median + start_square)).log()  # (2)
    return info.length * (weights @ (change * slope))  # (3)


def van_der_corput(n: int) -> float:
    """The ``n``-th number, from 1, of the sequence in base 2, in (0, 1).

    Example:
        >>> [van_der_corput(n) for n in (1, 2, 3, 4)]
        [0.5, 0.25, 0.75, 0.125]
    """
    value, digit = 0.0, 0.5
    while n:
        value += digit * (n & 1)
        n, digit = n >> 1, digit / 2
    return value
