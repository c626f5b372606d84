r"""Replica exchange: chains that travel between a base and the energy.

A chain that starts in one of several separated modes stays there. Here each chain has
:math:`K` replicas on a ladder of temperatures. The lowest is drawn anew from the base
at each step, the others move by a kernel, and neighbours swap places (see
:mod:`pyro_ebm.mcmc.ladder`). What arrives at the energy is a draw of the base that was
carried up the ladder, as likely in one mode as the mode is heavy.

References:
    Geyer (1991), Computing Science and Statistics 23, 156-163.
    Syed, Bouchard-Cote, Deligiannidis & Doucet (2022), JRSS B 84, 321-350.
"""

__all__ = ["ReplicaExchange"]

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.energies import Energy
from pyro_ebm.errors import UnreliableWarning
from pyro_ebm.mcmc.base import ChainState, StepInfo, replace_nonfinite
from pyro_ebm.mcmc.hmc import HMC
from pyro_ebm.mcmc.ladder import Replicas, swap
from pyro_ebm.mcmc.ladder_adaptation import LadderAdaptation
from pyro_ebm.mcmc.path import GeometricPath, PathState
from pyro_ebm.mcmc.tempered_draws import LadderSums, TemperedDraws


@final
@dataclass(frozen=True)
class ReplicaExchange:
    r"""Run chains with replicas between a base and an energy, which swap places.

    It is a :class:`~pyro_ebm.mcmc.Sampler` too: ``EnergyDistribution(energy,
    sampler=ReplicaExchange(base))`` draws by it, one chain a draw.

    Args:
        base: A normalised Pyro distribution over the same event and support that covers
            all modes; of a ``PyroModelEnergy`` its ``prior``. What it does not reach is
            not found.
        kernel: What moves the replicas above the base. With ``scale`` or ``scale_tril``
            it keeps that at all temperatures; without, each gets a scale of its own.
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
            takes a step size for each temperature.
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

    base: dist.TorchDistribution
    kernel: HMC = field(default_factory=HMC)
    num_temperatures: int = 8
    inverse_temperatures: Sequence[float] | None = None
    warmup_steps: int = 200
    num_steps: int = 100
    min_chains: int = 32

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.kernel, HMC):
            raise TypeError(
                "kernel must be HMC, which takes a step size for each temperature; got "
                f"{type(self.kernel).__name__}. HMC(num_leapfrog=1) is MALA without a "
                "bound on the drift."
            )
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
        betas = self.inverse_temperatures
        if betas is not None:
            rising = all(a < b for a, b in zip(betas[:-1], betas[1:], strict=True))
            if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not rising:
                raise ValueError(
                    f"inverse_temperatures must rise from 0 to 1, got {betas}."
                )

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
            energy: On any support that ``biject_to`` knows.
            num_samples: Draws of each chain.
            num_chains: Chains, each with ``K`` replicas.
            thinning: Steps a draw.
            initial: Where all replicas of each chain start, points of the support of
                shape ``(C, *event)``; default: draws of the base.
            progress_bar: Whether to show the steps, if they take more than a second.

        Raises:
            ValueError: If a number or the shape of ``initial`` is out of range, or the
                base does not fit the energy.
            DivergenceError: If energy and gradient are finite at no start.

        Warns:
            UnreliableWarning: If the status is not ``"ok"``.
        """
        counts = {"num_samples": num_samples, "num_chains": num_chains}
        for name, count in {**counts, "thinning": thinning}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")
        run = _Run(self, GeometricPath(energy, self.base), num_chains, initial)
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
        draws = self.base.sample(torch.Size((num_draws,))).detach()
        return draws.to(**energy.tensor_options(draws))


class _Run:
    """Replicas under way."""

    def __init__(
        self,
        settings: ReplicaExchange,
        path: GeometricPath,
        num_chains: int,
        initial: Tensor | None,
    ) -> None:
        self.path, self.num_chains = path, num_chains
        given = settings.inverse_temperatures
        num_temperatures = settings.num_temperatures if given is None else len(given)
        betas = torch.linspace(0, 1, num_temperatures) ** 3
        betas = betas if given is None else torch.tensor(given)
        state = self._start(num_temperatures, initial)
        self.adaptation = LadderAdaptation(
            path,
            settings.kernel,
            betas.to(state.base),
            _above(state),
            settings.warmup_steps,
        )
        nowhere = torch.zeros_like(state.base, dtype=torch.bool)
        self.replicas = Replicas(state, nowhere, 0)

    def _start(self, num_temperatures: int, initial: Tensor | None) -> PathState:
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
        flat = ChainState(*(part.flatten(0, 1) for part in state.chains()))
        moved = replace_nonfinite(flat)
        if moved is flat:
            return state
        return self.path.evaluate(moved.x.reshape(state.u.shape))

    def step(self) -> tuple[Tensor, StepInfo, Tensor, Tensor]:
        """Draw from the base, move what is above it, and swap.

        Returns:
            The difference ``V`` at all replicas before the swap, what the kernel
            returned, the swap probabilities and the chains with an arrival.
        """
        fresh = self.path.sample_base(self.num_chains, 1)
        ladder = self.adaptation.ladder
        moved, info = ladder.step(self.adaptation.kernel, _above(self.replicas.state))
        state = PathState(
            *(torch.cat(parts, 1) for parts in zip(fresh, moved, strict=True))
        )
        is_fresh = self.replicas.is_fresh.clone()
        is_fresh[:, 0] = True
        self.replicas, swap_prob, arrived = swap(
            Replicas(state, is_fresh, self.replicas.parity), ladder.inverse_temperatures
        )
        self.adaptation.update(moved, info, swap_prob)
        return state.target - state.base, info, swap_prob, arrived

    def sample(self, num_samples: int, thinning: int, bar: Any) -> TemperedDraws:
        """Draw, with the ladder as it is now; the bar counts the steps."""
        sums = LadderSums(self.adaptation.ladder.inverse_temperatures)
        draws = []
        for _ in range(num_samples):
            for _ in range(thinning):
                sums.add(*self.step())
                bar.update()
            draws.append(self.replicas.state.u[:, -1])
        u = torch.stack(draws, 1)
        return sums.result(
            self.path.transform(u),
            torch.as_tensor(self.adaptation.kernel.step_size),
            self.path.num_evaluations,
        )


def _above(state: PathState) -> PathState:
    """The replicas above the base."""
    return state.select((slice(None), slice(1, None)))
