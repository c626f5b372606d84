"""The state of a run of many chains: warm-up, draws, and resumption."""

__all__ = ["ChainRun", "Tally", "step_size_of"]

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo
from pyro_ebm.mcmc.run.batch_moments import BatchMoments
from pyro_ebm.mcmc.run.draws import KeptDraws
from pyro_ebm.mcmc.run.target import ChainKernel, ChainTarget, standardised
from pyro_ebm.mcmc.warmup.warmup import Warmup

#: Transitions after which a chain that has hardly moved is not just unlucky.
_PATIENCE = 20
#: Moves in so many transitions, below which a chain counts as stuck.
_STUCK = 0.05
#: Points that are mapped to the support at a time.
_CHUNK = 2**17
#: Seconds between two looks at the chains.
_INTERVAL = 0.3


class Tally:
    """Acceptance and divergences of each chain, summed over transitions.

    Args:
        num_chains: ``C``.
        device: Where the chains are.
    """

    def __init__(self, num_chains: int, device: torch.device) -> None:
        zeros = torch.zeros(num_chains, dtype=torch.float64, device=device)
        self.accept_prob, self.accepted = zeros, zeros.clone()
        self.divergent = zeros.clone()
        self.num_transitions = 0

    def add(self, info: StepInfo) -> None:
        """Count one transition of all chains."""
        self.accept_prob += info.accept_prob
        self.accepted += info.accepted
        self.divergent += info.is_divergent
        self.num_transitions += 1

    def state_dict(self) -> dict[str, Any]:
        """Copies of the sums so far."""
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such sums."""
        for name, value in state.items():
            own = getattr(self, name)
            is_tensor = isinstance(own, Tensor)
            setattr(self, name, value.to(own, copy=True) if is_tensor else value)


class ChainRun:
    """The chains of one target, from their start to their last draw.

    Args:
        target: What they run on.
        kernel: What moves them.
        state: Where they are.
        num_superchains: Groups of chains side by side that started at the same point.
        warmup_steps: Transitions in which the kernel adapts.
        keep_draws: Whether draws are kept, or only their moments.
        num_moved: Chains that start where others do, as their own start led nowhere.
    """

    def __init__(
        self,
        target: ChainTarget,
        kernel: ChainKernel,
        state: ChainState,
        *,
        num_superchains: int,
        warmup_steps: int,
        keep_draws: bool,
        num_moved: int = 0,
    ) -> None:
        self.target, self.state = target, state
        self._num_moved = num_moved
        self.num_superchains, self.warmup_steps = num_superchains, warmup_steps
        self._start = state.x  # of the warmup or the draws, to see who moved at all
        self.warmup = Warmup(
            cast(Kernel, kernel),
            target.energy,
            state,
            warmup_steps,
            num_groups=num_superchains,
        )
        self.warmup_tally = self._new_tally()
        self.warmup_step_sizes: list[Tensor] = []
        self.warmup_accept_probs: list[Tensor] = []
        self.tally = self._new_tally()
        self.draws: KeptDraws | BatchMoments
        if keep_draws:
            self.draws = KeptDraws(state)
        else:
            self.draws = BatchMoments(state, self._flattened)

    def _new_tally(self) -> Tally:
        return Tally(len(self.state.energy), self.state.energy.device)

    @torch.no_grad()
    def _flattened(self, u: Tensor) -> Tensor:
        """Values of all sites side by side, ``(N, C, D)``."""
        sites = self.target.constrain(u).values()
        return torch.cat([value.reshape(*u.shape[:2], -1) for value in sites], -1)

    def warm_up(self, *, progress_bar: bool) -> None:
        """Let the kernel adapt, for as many transitions as are left of the warmup.

        Raises:
            DivergenceError: If no chain moves.
        """
        tally = self.warmup_tally
        left = self.warmup_steps - tally.num_transitions
        with _Progress(left, "warmup", is_shown=progress_bar and left > 0) as progress:
            for _ in range(left):
                kernel = self.warmup.kernel
                state, info = kernel.step(self.target.energy, self.state)
                self.state = self.warmup.update(state, info)
                tally.add(info)
                self.warmup_step_sizes.append(step_size_of(kernel))
                self.warmup_accept_probs.append(info.accept_prob)
                progress.update(lambda: self._describe(tally, kernel))  # noqa: B023
        if left:
            self._require_moves(tally, "warmup")
            self._start = self.state.x

    def sample(self, num_samples: int, thinning: int, *, progress_bar: bool) -> None:
        """Draw so many more points of each chain.

        Raises:
            DivergenceError: If no chain moves.
        """
        kernel, tally, energy = self.warmup.kernel, self.tally, self.target.energy
        self.draws.reserve(num_samples)
        total = num_samples * thinning
        with _Progress(total, "draws", is_shown=progress_bar) as progress:
            for _ in range(num_samples):
                for _ in range(thinning):
                    self.state, info = kernel.step(energy, self.state)
                    tally.add(info)
                    progress.update(lambda: self._describe(tally, kernel))
                self.draws.add(self.state, info)
        self._require_moves(tally, "draws")

    @torch.no_grad()
    def samples(self) -> dict[str, Tensor]:
        """Values of each site, shape ``(num_chains, num_draws, *site)``.

        Raises:
            RuntimeError: If the draws were not kept.
        """
        if not isinstance(self.draws, KeptDraws):
            raise RuntimeError(
                "there are no samples, since keep_draws is False. moments() and "
                "summary() tell what was kept of them."
            )
        u = self.draws["u"]
        sites = self.target.constrain(self.state.x)
        found = {
            k: v.new_empty((len(v), len(u), *v.shape[1:])) for k, v in sites.items()
        }
        size = max(_CHUNK // u.shape[1], 1)
        for first in range(0, len(u), size):
            part = self.target.constrain(u[first : first + size])
            for name, value in part.items():
                found[name][:, first : first + size] = value.transpose(0, 1)
        return found

    def by_site(self, columns: Tensor) -> dict[str, Tensor]:
        """Numbers of all sites side by side, ``(D,)``, in the shapes of the sites."""
        sites = self.target.constrain(self.state.x[:1])
        shapes = {name: value.shape[1:] for name, value in sites.items()}
        parts = columns.split([shape.numel() for shape in shapes.values()])
        named = zip(shapes.items(), parts, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}

    def _describe(self, tally: Tally, kernel: ChainKernel) -> str:
        """Text of the progress bar."""
        count = max(tally.num_transitions, 1)
        text = (
            f"step size {float(step_size_of(kernel)):.3g}, acceptance "
            f"{tally.accept_prob.mean().item() / count:.2f}, divergences "
            f"{int(tally.divergent.sum()):,}"
        )
        if tally is self.tally:
            text += f", R-hat {self.draws.r_hat():.3f}"
        return text

    @property
    def num_moved(self) -> int:
        """Chains that had not arrived where the mass is, and were put where others are.

        By the search for starting points, or in the warm-up.
        """
        return self._num_moved + int(self.warmup.num_moved)

    def is_stuck(self) -> Tensor:
        """Chains that hardly moved while they were drawn from, shape ``(C,)``.

        None before there were transitions enough to tell.
        """
        count = self.tally.num_transitions
        stuck = (self.tally.accepted < _STUCK * count) | self._is_at_start()
        return stuck if count >= _PATIENCE else torch.zeros_like(stuck)

    def _is_at_start(self) -> Tensor:
        # A step too short to change a number is always accepted.
        same = (self.state.x == self._start).reshape(len(self._start), -1).all(-1)
        # Discrete chains come back, which others do with probability 0.
        return same & (not self.target.energy.support.is_discrete)

    def _require_moves(self, tally: Tally, stage: str) -> None:
        has_moved = tally.accepted.any() and not self._is_at_start().all()
        if tally.num_transitions < _PATIENCE or has_moved:
            return
        low, high = self.state.energy.aminmax()
        step_size = float(step_size_of(self.warmup.kernel))
        raise DivergenceError(
            f"none of the {len(self.state.energy)} chains moved in "
            f"{tally.num_transitions} transitions of the {stage}, with step size "
            f"{step_size:.3g}; {int(tally.divergent.sum()):,} proposals had an energy "
            "that is not finite or far too high, and the chains' energies lie in "
            f"[{low.item():.4g}, {high.item():.4g}]. Check that energy and gradient "
            "are finite around the starting points."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly, with torch's random numbers."""
        return {
            "chains": {k: v.clone() for k, v in self.state._asdict().items()},
            "start": self._start.clone(),
            "num_superchains": self.num_superchains,
            "num_moved": self._num_moved,
            "non_centred": list(self.target.non_centred),
            "warmup_steps": self.warmup_steps,
            "warmup": self.warmup.state_dict(),
            "warmup_tally": self.warmup_tally.state_dict(),
            "warmup_step_sizes": list(self.warmup_step_sizes),
            "warmup_accept_probs": list(self.warmup_accept_probs),
            "tally": self.tally.state_dict(),
            "draws": self.draws.state_dict(),
            "random": _random_state(self.state.x.device),
        }

    @classmethod
    def restored(
        cls,
        target: ChainTarget,
        kernel: ChainKernel,
        saved: dict[str, Any],
        *,
        keep_draws: bool,
    ) -> "ChainRun":
        """The chains of a state dict, with the random numbers that were next.

        Raises:
            ValueError: If the target has other energies than the saved one.
        """
        target = standardised(target, saved["non_centred"])
        options = target.energy.tensor_options(saved["chains"]["x"])
        chains = {k: v.to(options["device"]) for k, v in saved["chains"].items()}
        state = ChainState(**chains)
        now = kernel.init(target.energy, state.x).energy
        if not torch.allclose(now, state.energy, rtol=1e-3, atol=1e-3):
            error = (now - state.energy).abs().max().item()
            raise ValueError(
                "target must be that of the saved run, and differs from it: energies "
                f"of the chains' points are off by {error:.3g} nats. Give the same "
                "model, data and parameters."
            )
        run = cls(
            target,
            kernel,
            state,
            num_superchains=saved["num_superchains"],
            warmup_steps=saved["warmup_steps"],
            keep_draws=keep_draws,
            num_moved=saved["num_moved"],
        )
        run._start = saved["start"].to(options["device"])
        run.warmup.load_state_dict(saved["warmup"])
        run.warmup_step_sizes = list(saved["warmup_step_sizes"])
        run.warmup_accept_probs = list(saved["warmup_accept_probs"])
        run.warmup_tally.load_state_dict(saved["warmup_tally"])
        run.tally.load_state_dict(saved["tally"])
        run.draws.load_state_dict(saved["draws"])
        _set_random_state(saved["random"], run.state.x.device)
        return run


def step_size_of(kernel: ChainKernel) -> Tensor:
    """Step size of a kernel, the median of many; ``nan`` for a kernel without one."""
    return torch.as_tensor(getattr(kernel, "step_size", torch.nan)).median()


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class _Progress:
    """A bar over transitions, with a line of text that is made only when shown.

    Args:
        total: Transitions.
        name: What stands before the bar.
        is_shown: Whether there is a bar at all.
    """

    def __init__(self, total: int, name: str, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._bar = tqdm(total=total, desc=name, disable=not is_shown)
        self._next = 0.0

    def update(self, describe: Callable[[], str]) -> None:
        """Count a transition; ``describe`` is called if the text is due."""
        if not self._is_shown:
            return
        self._bar.update()
        if time.monotonic() >= self._next or self._bar.n == self._bar.total:
            self._bar.set_postfix_str(describe(), refresh=False)
            self._next = time.monotonic() + _INTERVAL

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
