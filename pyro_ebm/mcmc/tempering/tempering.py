r"""Replica exchange: chains that travel between a base and the energy.

A chain that starts in one of several separated modes stays there. Here each chain has
:math:`K` replicas on a ladder of temperatures. The lowest is drawn anew from the base
at each step, the others move by a kernel, and neighbours swap places (see
:mod:`pyro_ebm.mcmc.tempering.ladder`). What arrives at the energy is a draw of the base
that was carried up the ladder, as likely in one mode as the mode is heavy.

The warm-up that adapts a ladder is in rounds, each about as long as all before it.
During a round each temperature follows its mean acceptance :math:`a_k` with its step
size,

.. math::
    \log \epsilon_k \leftarrow \log \epsilon_k
        + \frac{1}{\sqrt t}\, (a_k - a^\star)                              \tag{1}

and at its end the temperatures are placed anew where all pairs would swap equally
often, and the scale of each coordinate becomes

.. math::
    s_{ki} = \mathbb{E}_k\big[(\partial_i f_{\beta_k})^2\big]^{-1/2}       \tag{2}

which on a Gaussian is the standard deviation where coordinates are independent. The
standard deviation itself would measure how far modes are apart, not how wide they are.
The last round, half of the warm-up, is for the step sizes alone.

References:
    Geyer (1991), Computing Science and Statistics 23, 156-163.
    Syed, Bouchard-Cote, Deligiannidis & Doucet (2022), JRSS B 84, 321-350.
"""

__all__ = ["ReplicaExchange"]

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import Kernel, StepInfo
from pyro_ebm.mcmc.kernels.discrete_langevin import DiscreteLangevin, kernel_for
from pyro_ebm.mcmc.kernels.gibbs import SweepKernel
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.tempering.ladder import (
    Exchange,
    Ladder,
    Replicas,
    SiteLadder,
    above_base,
    equalised,
    first_temperatures,
    interpolate,
    require_hmc,
)
from pyro_ebm.mcmc.tempering.path import GeometricPath, require_rising
from pyro_ebm.mcmc.tempering.site_path import SitePath, path_between
from pyro_ebm.mcmc.tempering.tempered_draws import LadderSums, TemperedDraws
from pyro_ebm.mcmc.warmup.adaptation import find_step_size, follow_acceptance


@final
@dataclass(frozen=True)
class ReplicaExchange:
    r"""Run chains with replicas between a base and an energy, which swap places.

    It is a :class:`~pyro_ebm.mcmc.Sampler` too: ``EnergyDistribution(energy,
    sampler=ReplicaExchange(base))`` draws by it, one chain a draw.

    Args:
        base: A normalised Pyro distribution over the same event and support that covers
            all modes; of a ``PyroModelEnergy`` its ``prior``. What it does not reach is
            not found. Default: uniform sites of a finite support, and independent units
            at the mean field of a restricted Boltzmann machine.
        kernel: What moves the replicas above the base. Default: ``HMC()``; over a
            finite support ``Gibbs()`` or ``DiscreteLangevin()``, as suits it, and
            ``SwendsenWang()`` may be given. With a metric of its own it keeps that at
            all temperatures; without, each gets a scale of its own.
        num_temperatures: :math:`K`, base and energy included, at least 2.
        inverse_temperatures: Where the ladder begins, rising from 0 to 1, such as those
            of a run of sequential Monte Carlo; then ``num_temperatures`` is not used.
            Default: ``(k / (K - 1)) ** 3``. The warm-up moves them.
        warmup_steps: Steps in which temperatures, scales and step sizes adapt; with 0
            all stay as given.
        num_steps: Steps after the warm-up when used as a sampler.
        min_chains: At least so many chains are run by it.

    Raises:
        TypeError: If ``kernel`` is not :class:`~pyro_ebm.mcmc.HMC`, the only one that
            takes a step size for each temperature, nor one for finite supports.
        ValueError: If a setting is out of range.

    Exactness: draws are *consistent* in the number of steps, and so is
    ``log_partition``.

    Example:
        >>> modes = torch.tensor([-4.0, 4.0])
        >>> energy = pyro_ebm.energies.FunctionEnergy(
        ...     lambda x: -torch.logsumexp(-2 * (x[..., None] - modes) ** 2, -1), ()
        ... )
        >>> base = dist.Normal(torch.tensor(0.0), 5.0)
        >>> found = ReplicaExchange(base, num_temperatures=4).run(energy, 200)
        >>> found.draws.shape, found.status
        (torch.Size([64, 200]), 'ok')
        >>> abs((found.draws > 0).float().mean().item() - 0.5) < 0.05
        True
    """

    base: dist.TorchDistribution | None = None
    kernel: Kernel | None = None
    num_temperatures: int = 8
    inverse_temperatures: Sequence[float] | None = None
    warmup_steps: int = 200
    num_steps: int = 100
    min_chains: int = 32

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.kernel is not None and not _is_site_kernel(self.kernel):
            require_hmc(self.kernel)
        for name, low in (
            ("num_temperatures", 2),
            ("warmup_steps", 0),
            ("num_steps", 1),
            ("min_chains", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(
                    f"{name} must be at least {low}, got {getattr(self, name)}."
                )
        if self.inverse_temperatures is not None:
            require_rising(self.inverse_temperatures)

    @torch.no_grad()
    def run(
        self,
        energy: Energy,
        num_samples: int = 1000,
        num_chains: int = 64,
        *,
        thinning: int = 1,
        initial: Tensor | None = None,
        progress_bar: bool = True,
    ) -> TemperedDraws:
        """Warm up and draw, all chains and temperatures at once.

        A step costs ``(K - 1) * kernel.num_gradients + 1`` evaluations a chain.

        Args:
            energy: On a finite support, or any that ``biject_to`` knows.
            num_samples: Draws of each chain.
            num_chains: Chains, each with ``K`` replicas.
            thinning: Steps a draw.
            initial: Where all replicas of each chain start, points of the support of
                shape ``(C, *event)``; default: draws of the base.
            progress_bar: Whether to show the steps, if they take more than a second.

        Raises:
            ValueError: If a number or the shape of ``initial`` is out of range, or the
                base does not fit the energy or is missing.
            DivergenceError: If energy and gradient are finite at no start.
            NotImplementedError: If the support is discrete and infinite.
            TypeError: If the kernel is not one for the support.

        Warns:
            UnreliableWarning: If the status is not ``"ok"``.
        """
        counts = {"num_samples": num_samples, "num_chains": num_chains}
        for name, count in {**counts, "thinning": thinning}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")
        run = _Run(self, path_between(energy, self.base), num_chains, initial)
        total = self.warmup_steps + num_samples * thinning
        with tqdm(
            total=total, desc="tempering", disable=not progress_bar, delay=1
        ) as bar:
            for _ in range(self.warmup_steps):
                run.step()
                bar.update()
            found = run.sample(num_samples, thinning, bar)
        if not found.is_reliable:
            warnings.warn(
                f"replica exchange is unreliable: {found.reason}",
                UnreliableWarning,
                stacklevel=2,
            )
        return found

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Independent draws, the last point of a chain each, ``(num_draws, *event)``.

        Args:
            energy: As for :meth:`run`, with its errors and its warning.
            num_draws: How many points are wanted.
        """
        num_chains = max(num_draws, self.min_chains)
        found = self.run(
            energy, 1, num_chains, thinning=self.num_steps, progress_bar=False
        )
        return found.draws[:num_draws, 0]

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Points of the base, shape ``(num_draws, *event)``."""
        base = self.base
        if base is None:
            base = path_between(energy, None).distribution
        draws = base.sample(torch.Size((num_draws,))).detach()
        return draws.to(**energy.tensor_options(draws))


class _LadderAdaptation:
    """The ladder and the kernel as learned so far.

    Args:
        path: From the base to the energy.
        kernel: Its step size is where the search begins, if it has one. With a scale of
            its own, that is kept at all temperatures.
        inverse_temperatures: To begin with, shape ``(K,)``.
        state: Replicas above the base, chain shape ``(C, K - 1)``.
        num_steps: Updates after which nothing changes any more; may be 0.
    """

    #: Where the rounds end, in parts of the warm-up.
    ROUND_ENDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)

    def __init__(
        self,
        path: GeometricPath | SitePath,
        kernel: Kernel,
        inverse_temperatures: Tensor,
        state: Any,
        num_steps: int,
    ) -> None:
        self._given: Any = kernel
        self.num_steps = num_steps
        ends = {round(part * num_steps) for part in self.ROUND_ENDS}
        self._round_ends = sorted(ends - {0})
        self._num_updates = 0
        num_above = len(inverse_temperatures) - 1
        step_size = torch.as_tensor(getattr(kernel, "step_size", 1.0)).to(state.u)
        self.ladder: Ladder | SiteLadder
        if isinstance(path, SitePath):
            step_size = step_size.to(inverse_temperatures)
            self.ladder = SiteLadder(path, inverse_temperatures)
        else:
            ones = state.u.new_ones((num_above, *path.event_shape))
            self.ladder = Ladder(path, inverse_temperatures, ones)
        if num_steps and isinstance(self.ladder, Ladder):
            step_size = find_step_size(kernel, self.ladder, self.ladder.chains(state))
        self._log_step = step_size.log().expand(num_above)
        self._start_round()

    @property
    def kernel(self) -> Any:
        """With a step size for each temperature above the base's, if it has one."""
        return self._given.with_step_size(self._log_step.exp())

    def update(self, state: Any, info: StepInfo, swap_prob: Tensor) -> None:
        """Learn from a step of all replicas; nothing more after the warm-up.

        Args:
            state: Where the step of the kernel led those above the base.
            info: What it returned with the state.
            swap_prob: Of all pairs, shape ``(C, K - 1)``.
        """
        if self._num_updates >= self.num_steps:
            return
        self._num_updates += 1
        self._log_steps.append(self._log_step)
        gain = len(self._log_steps) ** -0.5
        log_step, given = self._log_step, self._given
        if given.has_step_size:
            log_step = follow_acceptance(log_step, given, info, gain)  # (1)
            most = getattr(given, "max_step", torch.inf)
            self._log_step = log_step.clamp(max=math.log(most))
        self._rejections.append(1 - swap_prob.mean(0))
        if isinstance(self.ladder, Ladder):
            grad = self.ladder.chains(state).grad / self.ladder.scale
            self._squares.append(grad.square().mean(0))
        if self._num_updates in self._round_ends:
            self._end_round()

    def _start_round(self) -> None:
        self._log_steps: list[Tensor] = []
        self._rejections: list[Tensor] = []
        self._squares: list[Tensor] = []

    def _end_round(self) -> None:
        # The first half of a round is on its way from another ladder.
        half = len(self._log_steps) // 2
        self._log_step = torch.stack(self._log_steps[half:]).mean(0)
        if self._num_updates < self.num_steps:
            ladder = self.ladder
            if isinstance(ladder, Ladder) and not self._has_metric():
                self._set_scale(ladder, torch.stack(self._squares[half:]).mean(0))
            self._move_temperatures(torch.stack(self._rejections[half:]).mean(0))
        self._start_round()

    def _has_metric(self) -> bool:
        given = self._given
        parts = (given.scale, given.scale_tril, given.low_rank)
        return any(part is not None for part in parts)

    def _set_scale(self, ladder: Ladder, squares: Tensor) -> None:
        old = ladder.scale
        new = squares.rsqrt()  # (2)
        new = torch.where(new.isfinite() & (new > 0), new, old)
        # The mean step in the coordinates of the path stays what it was.
        change = (old / new).log().reshape(len(old), -1).mean(1)
        self._log_step = self._log_step + change
        self.ladder = Ladder(ladder.path, ladder.inverse_temperatures, new)

    def _move_temperatures(self, rejection: Tensor) -> None:
        ladder = self.ladder
        old = ladder.inverse_temperatures
        if len(old) == 2:
            return
        new = equalised(old, rejection)
        self._log_step = interpolate(new[1:], old[1:], self._log_step)
        if isinstance(ladder, SiteLadder):
            self.ladder = SiteLadder(ladder.path, new)
            return
        scale = interpolate(new[1:], old[1:], ladder.scale.log()).exp()
        self.ladder = Ladder(ladder.path, new, scale)


class _Run:
    """Replicas under way."""

    def __init__(
        self,
        settings: ReplicaExchange,
        path: GeometricPath | SitePath,
        num_chains: int,
        initial: Tensor | None,
    ) -> None:
        self.path: Any = path
        self.num_chains = num_chains
        kernel = _suited(settings.kernel, path)
        betas = first_temperatures(settings.num_temperatures)
        if settings.inverse_temperatures is not None:
            betas = torch.tensor(settings.inverse_temperatures)
        state = self._start(len(betas), initial)
        like = state.log_weight(0.0, 1.0)
        self.adaptation = _LadderAdaptation(
            path, kernel, betas.to(like), above_base(state), settings.warmup_steps
        )
        nowhere = torch.zeros_like(like, dtype=torch.bool)
        self.replicas = Replicas(state, nowhere, 0)

    def _start(self, num_temperatures: int, initial: Tensor | None) -> Any:
        """All replicas, shape ``(C, K)``, where energy and gradient are finite."""
        shape = (self.num_chains, num_temperatures)
        if initial is None:
            state = self.path.sample_base(*shape)
        else:
            expected = (self.num_chains, *self.path.distribution.event_shape)
            if initial.shape != expected:
                raise ValueError(
                    f"initial must have shape {expected}, (num_chains, *event), got "
                    f"{tuple(initial.shape)}."
                )
            u = self.path.transform.inv(initial.detach())
            repeated = u.unsqueeze(1).expand(-1, num_temperatures, *u.shape[1:])
            state = self.path.evaluate(repeated)
        return self.path.with_finite_chains(state)

    def step(self) -> Exchange:
        """Draw from the base, move what is above it, swap, and learn from that."""
        ladder, kernel = self.adaptation.ladder, self.adaptation.kernel
        done = ladder.exchange(kernel, self.replicas)
        self.replicas = done.replicas
        self.adaptation.update(above_base(done.state), done.info, done.swap_prob)
        return done

    def sample(self, num_samples: int, thinning: int, bar: Any) -> TemperedDraws:
        """Draw, with the ladder as it is now; the bar counts the steps."""
        ladder = self.adaptation.ladder
        # What is forbidden lets replicas through rarely, and few of them far.
        looked_at = num_samples * thinning if isinstance(ladder, SiteLadder) else 0
        sums = LadderSums(ladder.inverse_temperatures, looked_at)
        draws = []
        for _ in range(num_samples):
            for _ in range(thinning):
                sums.add(self.step())
                bar.update()
            draws.append(self.replicas.state.u[:, -1])
        u = torch.stack(draws, 1)
        step_size = getattr(self.adaptation.kernel, "step_size", torch.nan)
        found = sums.result(
            self.path.transform(u),
            torch.as_tensor(step_size).expand(sums.accept.shape),
            self.path.num_evaluations,
        )
        log_partition = found.log_partition + self.path.log_start
        return found._replace(log_partition=log_partition)


def _suited(kernel: Kernel | None, path: GeometricPath | SitePath) -> Kernel:
    """The kernel that is given, or what suits the target."""
    if isinstance(path, SitePath):
        if kernel is not None and not _is_site_kernel(kernel):
            raise TypeError(
                "kernel must be Gibbs, DiscreteLangevin or SwendsenWang over a finite "
                f"support, got {type(kernel).__name__}, which follows a gradient. "
                "Give none for what suits the energy."
            )
        return kernel or kernel_for(path.at(1.0), HMC())
    if kernel is not None:
        require_hmc(kernel)
    return kernel or HMC()


def _is_site_kernel(kernel: Any) -> bool:
    """Whether a kernel moves over finite supports."""
    return isinstance(kernel, SweepKernel | DiscreteLangevin)
