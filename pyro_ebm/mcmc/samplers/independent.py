"""Independent approximate draws: one chain a draw, all chains at once."""

__all__ = ["IndependentChains"]

import math
from dataclasses import dataclass, field, replace
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

from pyro_ebm.bases.mixed import LatentClasses
from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.verdict import Finding, Reason, status_of
from pyro_ebm.diagnostics.convergence import ratio, split_chains
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.views.pointwise import check_pointwise
from pyro_ebm.mcmc.base import ChainState, Kernel, replace_nonfinite
from pyro_ebm.mcmc.kernels.discrete_langevin import kernel_for
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.samplers.sampler import Draws, SamplingDiagnostics, warn_of
from pyro_ebm.mcmc.warmup.adaptation import StepSizeAdaptation, find_step_size

#: Every so many transitions steps are that much smaller.
_SMALL_EVERY, _SMALL = 4, 0.1
#: A chain that takes a smaller part of its proposals hardly moves.
_STUCK = 0.05
#: In fewer transitions that may be chance.
_PATIENCE = 50
#: So many chains are compared; the others are their equals.
_NUM_COMPARED = 64
#: Above it chains remember where they started. Not 1.01, as only where they end counts:
#: halves of 50 steps with this R-hat have a correlation time of 35, and after 200 steps
#: .3 % of the start is left. Plain, as that of ranks is bounded and cannot tell.
_MAX_R_HAT = 1.7
#: Correlation of ends with starts that is too large over sites of finitely many states,
#: whose modes may differ less than the points within each.
_MAX_MEMORY = 0.05
#: Seconds before there is a bar; draws within a fit or a guide mostly take less.
_DELAY = 3


@final
@dataclass(frozen=True)
class IndependentChains:
    """Draw from ``e^-f`` with one chain for each draw.

    All chains start in the base, share one step size, adapted during warmup and frozen
    after it, and give their last point. The draws are independent given the step size;
    how close they are to ``e^-f`` depends on the number of steps.

    Every fourth transition takes steps of a tenth of that size, for chains that are
    where the energy is much steeper than elsewhere, such as in a narrow mode or far out
    in a tail. The common step size is always rejected there.

    Args:
        base: Where the chains start; default: a standard normal in unconstrained space,
            uniform on a finite support.
        kernel: Any kernel of :mod:`pyro_ebm.mcmc`; default: :class:`HMC`, on a finite
            support :class:`Gibbs` or :class:`DiscreteLangevin`, and on a mixed one
            :class:`Alternating` of both.
        warmup_steps: Transitions in which the step size adapts.
        num_steps: Transitions after that.
        min_chains: At least so many chains are run, so that the step size of a single
            draw is as good as that of many; the rest is thrown away.
        progress_bar: Whether to show the transitions of a call that takes more than
            three seconds; the bar goes when the draws are there.

    Raises:
        ValueError: If a number of steps or chains is out of range.

    Exactness: *consistent* in the number of steps.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.tensor([3.0, -3.0]))
        >>> sampler = IndependentChains(dist.Normal(torch.zeros(2), 4.0).to_event(1))
        >>> draws = sampler(energy, 500)
        >>> draws.shape, bool((draws.mean(0) - energy.loc).abs().max() < 0.3)
        (torch.Size([500, 2]), True)
    """

    base: dist.TorchDistribution | None = None
    kernel: Kernel | None = None
    warmup_steps: int = 100
    num_steps: int = 100
    min_chains: int = 32
    progress_bar: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, low in (("warmup_steps", 0), ("num_steps", 1), ("min_chains", 1)):
            if getattr(self, name) < low:
                raise ValueError(
                    f"{name} must be at least {low}, got {getattr(self, name)}."
                )

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Run the chains.

        Args:
            energy: On a finite support, or any that ``biject_to`` knows.
            num_draws: How many points are wanted.

        Returns:
            Points of shape ``(num_draws, *event)``, without gradient.

        Raises:
            ValueError: If the base has another event shape than the energy.
            DivergenceError: If the energy is finite at no start, or no chain moves.

        Warns:
            UnreliableWarning: If chains hardly moved or remember their starts.
        """
        draws = self.draw_diagnosed(energy, num_draws)
        warn_of(draws.diagnostics)
        return draws.x

    @torch.no_grad()
    def draw_diagnosed(self, energy: Energy, num_draws: int) -> Draws:
        """Run the chains, with a verdict instead of a warning.

        Args:
            energy: On a finite support, or any that ``biject_to`` knows.
            num_draws: How many points are wanted.

        Returns:
            The points, and R-hat and verdict of the chains.

        Raises:
            ValueError: If the base has another event shape than the energy.
            DivergenceError: If the energy is finite at no start, or no chain moves.
        """
        flat, to_support = unconstrained(energy)
        start = self.start(energy, max(num_draws, self.min_chains))
        check_pointwise(energy, start)
        kernel = self.kernel or kernel_for(energy, HMC())
        first = replace_nonfinite(kernel.init(flat, to_support.inv(start)))
        with self._bar() as bar:
            kernel, warm = self._warm_up(kernel, flat, first, bar)
            state, num_accepted, path = self._move(flat, warm, kernel, bar)
        # Not by what was accepted: a step of no length always is.
        if kernel.has_step_size and torch.equal(state.x, warm.x):
            raise DivergenceError(
                f"none of the {len(state.x)} chains moved in {self.num_steps} "
                f"transitions after the warmup, with step size "
                f"{float(kernel.step_size):.3g}; their energies lie in "
                f"[{state.energy.min().item():.4g}, {state.energy.max().item():.4g}]. "
                "Check that the energy is finite around the points of the base."
            )
        is_stuck = (num_accepted < _STUCK * self.num_steps)[:num_draws]
        has_sites = energy.support.is_discrete or isinstance(
            energy.support, MixedSupport
        )
        memory = _memory(first.x, state.x) if has_sites else 0.0
        return Draws(
            to_support(state.x)[:num_draws],
            self._judged(len(state.x), is_stuck, path, memory),
        )

    def _judged(
        self, num_chains: int, is_stuck: Tensor, path: Tensor, memory: float
    ) -> SamplingDiagnostics:
        found, r_hat, num_stuck = [], math.nan, int(is_stuck.sum())
        if self.num_steps < _PATIENCE:
            few = f"{self.num_steps} transitions are too few to judge the draws"
            found.append(Finding(Reason.FEW_EFFECTIVE, few))
        else:
            rows = path[..., None].flatten(2).permute(2, 0, 1).double()
            # nan is a coordinate that never changes, such as a zero of a matrix
            r_hats = ratio(split_chains(rows)).nan_to_num(1.0, posinf=math.inf)
            r_hat = r_hats.max().item() if r_hats.numel() else 1.0
            if r_hat > _MAX_R_HAT or memory > _MAX_MEMORY:
                shown = f"ends and starts of the chains correlate by {memory:.2f}"
                if r_hat > _MAX_R_HAT:
                    shown = f"R-hat of the chains of the draws is {r_hat:.2f} > 1.7"
                apart = (
                    f"{shown}: they are still near their starts, or in modes that they "
                    "do not leave. Give more steps, "
                    "IndependentChains(warmup_steps=..., num_steps=...), or "
                    "mcmc.ReplicaExchange for separate modes"
                )
                found.append(Finding(Reason.NOT_MIXED, apart))
            if num_stuck:
                stuck = (
                    f"{num_stuck} of {len(is_stuck)} draws are from chains that hardly "
                    f"moved in {self.num_steps} transitions, and may be far from the "
                    "rest. Give a base that reaches about as far as the energy lets "
                    "them, as in IndependentChains(base=...), or more warmup_steps"
                )
                found.append(Finding(Reason.STUCK, stuck))
        return SamplingDiagnostics(
            type(self).__name__,
            status_of(found),
            tuple(found),
            num_chains,
            self.num_steps,
            r_hat,
            num_stuck,
        )

    def _bar(self) -> tqdm:
        # disable=False would win over TQDM_DISABLE, which a batch job may set.
        options = {} if self.progress_bar else {"disable": True}
        total = self.warmup_steps + self.num_steps
        # Text in notebooks too: each call in a loop would leave widgets behind.
        return tqdm(total=total, desc="draws", delay=_DELAY, leave=False, **options)

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Points of the base, shape ``(num_draws, *event)``.

        Raises:
            ValueError: If the base has another event shape than the energy.
        """
        if self.base is None and isinstance(energy.support, MixedSupport):
            like = torch.empty(0, **energy.tensor_options())
            standard = LatentClasses.standard(energy.support, like)
            return standard.sample((num_draws,))
        if self.base is None and energy.support.is_discrete:
            like = torch.empty(0, **energy.tensor_options())
            uniform = IndependentSites.uniform(energy.support, energy.event_shape, like)
            return uniform.sample((num_draws,))
        if self.base is None:
            flat, to_support = unconstrained(energy)
            shape = (num_draws, *flat.event_shape)
            return to_support(torch.randn(shape, **energy.tensor_options()))
        if self.base.batch_shape or self.base.event_shape != energy.event_shape:
            raise ValueError(
                f"base must be one distribution over events of shape "
                f"{tuple(energy.event_shape)}, as the energy is; got batch_shape "
                f"{tuple(self.base.batch_shape)} and event_shape "
                f"{tuple(self.base.event_shape)}. .to_event(n) makes a batch an event."
            )
        draws = self.base.sample((num_draws,)).detach()
        return draws.to(**energy.tensor_options(draws))

    def _warm_up(
        self, kernel: Kernel, energy: Energy, state: ChainState, bar: tqdm
    ) -> tuple[Kernel, ChainState]:
        """Move the chains while the step size adapts; freeze it in the kernel."""
        adaptation = StepSizeAdaptation(find_step_size(kernel, energy, state))
        for index in range(self.warmup_steps):
            kernel = kernel.with_step_size(adaptation.step_size)
            if _is_small(index):
                state, _ = _small(kernel).step(energy, state)
            else:
                state, info = kernel.step(energy, state)
                if kernel.has_step_size:
                    adaptation.update(kernel, info)
            bar.update()
        return kernel.with_step_size(adaptation.averaged_step_size), state

    def _move(
        self, energy: Energy, state: ChainState, kernel: Kernel, bar: tqdm
    ) -> tuple[ChainState, Tensor, Tensor]:
        """Where the chains end, how many proposals each took, and where some were."""
        small = _small(kernel)
        num_accepted = torch.zeros_like(state.energy)
        path = []
        for index in range(self.num_steps):
            state, info = (small if _is_small(index) else kernel).step(energy, state)
            num_accepted += info.accepted
            path.append(state.x[:_NUM_COMPARED])
            bar.update()
        return state, num_accepted, torch.stack(path, 1)


def _small(kernel: Any) -> Kernel:
    """The kernel with small steps, as many as before."""
    if not kernel.has_step_size:
        return kernel
    small = kernel.with_step_size(_SMALL * kernel.step_size)
    if hasattr(kernel, "trajectory_length"):
        length = _SMALL * kernel.trajectory_length
        small = replace(small, trajectory_length=length)
    return small


def _memory(first: Tensor, last: Tensor) -> float:
    """Correlation of the chains' ends with their starts, three errors below it.

    Args:
        first: Shape ``(C, *event)``.
        last: Shape ``(C, *event)``.
    """
    ends = [x.flatten(1).double() for x in (first, last)]
    scaled = [((x - x.mean(0)) / x.std(0)).nan_to_num(0.0, 0.0, 0.0) for x in ends]
    overlap = (scaled[0] * scaled[1]).mean(1)
    return (overlap.mean() - 3 * overlap.std() / math.sqrt(len(overlap))).item()


def _is_small(index: int) -> bool:
    return index % _SMALL_EVERY == _SMALL_EVERY - 1
