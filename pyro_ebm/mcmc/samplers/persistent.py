r"""Chains that go on while the energy is learned, as module state.

They give the second term of eq. (1.16), :math:`\mathbb{E}_{q_\theta}[\partial f]`, in
persistent contrastive divergence: the chains start where the last parameter step left
them, so a few moves suffice to follow a slowly changing energy.

References:
    Younes (1989), Probability Theory and Related Fields 82, 625-645.
    Tieleman (2008), ICML.
"""

__all__ = ["PersistentChains", "StatefulModule"]

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.mcmc.base import (
    ChainState,
    Kernel,
    StepInfo,
    replace_nonfinite,
)
from pyro_ebm.mcmc.kernels.gibbs import Gibbs
from pyro_ebm.mcmc.samplers.sampler import Sampler
from pyro_ebm.mcmc.warmup.adaptation import StepSizeAdaptation, find_step_size


class StatefulModule(nn.Module):
    """A module whose buffers take the shape of what is loaded into them.

    Chains are created at their first use, when their number and shape are known; a
    fresh module must still be able to load a saved one.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape != buffer.shape:
                empty = torch.empty(saved.shape, dtype=saved.dtype)
                setattr(self, name, empty.to(buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PersistentChains(StatefulModule):
    """Chains that follow a changing energy with an adapted corrected kernel.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> chains = PersistentChains()
        >>> chains.start(energy, torch.randn(64, 2), pyro_ebm.mcmc.MALA())
        >>> chains.advance(energy, pyro_ebm.mcmc.MALA(), num_steps=10).shape
        torch.Size([64, 2])
    """

    u: Tensor
    accept_prob: Tensor
    num_rejected_nonfinite: Tensor
    num_stuck: Tensor

    #: Transitions in which no chain at all has moved, after which an error is raised.
    MAX_STUCK = 200
    #: Transitions between two updates of the step size.
    ADAPT_EVERY = 5

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.empty(0))
        self.register_buffer("accept_prob", torch.tensor(0.0))
        self.register_buffer("num_rejected_nonfinite", torch.tensor(0))
        self.register_buffer("num_stuck", torch.tensor(0))
        self.adaptation = StepSizeAdaptation(1.0)
        #: What has moved the chains last.
        self.kernel: Kernel | None = None

    @property
    def is_started(self) -> bool:
        """Whether there are chains."""
        return self.u.numel() > 0

    def start(self, energy: Energy, x: Tensor, kernel: Kernel) -> None:
        """Place the chains and find a step size.

        Args:
            energy: On any support that ``biject_to`` knows.
            x: Points of the support, shape ``(C, *event)``. Chains at points of
                non-finite energy start where randomly chosen others do.
            kernel: Its step size is where the search begins.

        Raises:
            ValueError: If ``x`` has another shape.
            DivergenceError: If the energy is finite at none of the points.
        """
        if x.dim() != energy.event_dim + 1 or not len(x):
            raise ValueError(
                "x must hold the start of at least one chain, shape (C, *event) with "
                f"event_shape {tuple(energy.event_shape)}; got {tuple(x.shape)}."
            )
        flat, to_support = unconstrained(energy)
        x = x.detach().to(**energy.tensor_options(x))
        u = to_support.inv(x)
        state = replace_nonfinite(kernel.init(flat, u))
        step_size = find_step_size(kernel, flat, state)
        self.to(u.device)
        self.u, self.num_stuck = state.x.clone(), torch.zeros_like(self.num_stuck)
        self.adaptation.reset(step_size)

    @torch.no_grad()
    def resize(self, num_chains: int) -> None:
        """Change the number of chains: copy some, or leave some out."""
        index = torch.arange(num_chains, device=self.u.device) % len(self.u)
        self.u = self.u[index].clone()

    @torch.no_grad()
    def restart(self, energy: Energy, x: Tensor) -> None:
        """Let some chains, chosen at random, go on from other points.

        Args:
            energy: Of the support that the points belong to.
            x: Points of the support, shape ``(K, *event)`` with at most one a chain.
        """
        _, to_support = unconstrained(energy)
        chosen = torch.randperm(len(self.u), device=self.u.device)[: len(x)]
        self.u[chosen] = to_support.inv(x).to(self.u)

    @torch.no_grad()
    def advance(self, energy: Energy, kernel: Kernel, num_steps: int) -> Tensor:
        """Move all chains ``num_steps`` times under the energy as it is now.

        Args:
            energy: With its current parameters. Chains where it is not finite any more
                go on from where randomly chosen others are.
            kernel: Used with the adapted step size.
            num_steps: Transitions, at least 1; they cost
                ``num_steps * kernel.num_gradients + 1`` gradients a chain.

        Returns:
            Points of the support, shape ``(C, *event)``, without gradient.

        Raises:
            ValueError: If ``num_steps`` is not positive.
            RuntimeError: If the chains have not been started.
            DivergenceError: If no chain has moved in many transitions, or if the energy
                is finite at none of them.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
        if not self.is_started:
            raise RuntimeError("there are no chains yet: call start before advance.")
        self.kernel = kernel
        flat, to_support = unconstrained(energy)
        u = self.u.to(**energy.tensor_options(self.u))
        if isinstance(kernel, Gibbs) and Gibbs().num_evaluations(energy) == 1:
            # By blocks: nothing is rejected, and no energy is asked for.
            number = kernel.num_sweeps * num_steps
            self.u = dataclasses.replace(kernel, num_sweeps=number).sweep(energy, u)
            self.accept_prob = torch.ones_like(self.accept_prob)
            return to_support(self.u.clone())
        start = replace_nonfinite(kernel.init(flat, u))
        state = start
        infos: list[StepInfo] = []
        for first in range(0, num_steps, self.ADAPT_EVERY):
            adapted = kernel.with_step_size(self.adaptation.step_size)
            for _ in range(first, min(first + self.ADAPT_EVERY, num_steps)):
                state, info = adapted.step(flat, state)
                infos.append(info)
            if kernel.has_step_size:
                self.adaptation.update(kernel, _stacked(infos[first:]))
        self._record(_stacked(infos), start, state)
        if not kernel.has_step_size:  # what is drawn anew may be the same again
            self.num_stuck.zero_()
        return to_support(state.x.clone())  # a buffer is not for the caller to change

    def follow(
        self,
        energy: Energy,
        sampler: Sampler,
        kernel: Kernel,
        num_chains: int,
        num_steps: int,
        restart_fraction: float,
    ) -> Tensor:
        """Move on under parameters that have changed; what learning calls each step.

        Args:
            energy: With its current parameters.
            sampler: Where chains begin.
            kernel: As for :meth:`advance`.
            num_chains: Chains; the first call starts them.
            num_steps: Transitions.
            restart_fraction: Part of the chains that begin anew.

        Returns:
            About draws of the energy, shape ``(num_chains, *event)``.
        """
        num_restarts = round(restart_fraction * num_chains)
        if not self.is_started:
            self.start(energy, sampler.start(energy, num_chains), kernel)
        elif len(self.u) != num_chains:
            self.resize(num_chains)
        elif num_restarts:
            self.restart(energy, sampler.start(energy, num_restarts))
        return self.advance(energy, kernel, num_steps)

    def _record(self, info: StepInfo, start: ChainState, state: ChainState) -> None:
        """Keep the state, and count over transitions, the first dimension of info."""
        self.u = state.x
        nonfinite = (~info.is_finite).sum()
        self.num_rejected_nonfinite = self.num_rejected_nonfinite + nonfinite
        self.accept_prob = info.accept_prob.mean()
        # Not by what was accepted: a step too short to change a number always is.
        moved = (state.x != start.x).any()
        stuck = self.num_stuck + len(info.accepted)
        self.num_stuck = torch.where(moved, 0, stuck)
        if self.num_stuck >= self.MAX_STUCK:
            raise DivergenceError(
                f"none of the {len(state.energy)} chains has moved in "
                f"{int(self.num_stuck)} transitions; {int(self.num_rejected_nonfinite)}"
                " proposals had a non-finite energy or gradient in all, the step size "
                f"is {self.adaptation.step_size.item():.3g} and the chains' energies "
                f"lie in [{state.energy.min().item():.4g}, "
                f"{state.energy.max().item():.4g}]. Lower the learning rate, or bound "
                "the energy from below (a base inside the energy does that)."
            )


def _stacked(infos: list[StepInfo]) -> StepInfo:
    return StepInfo(*map(torch.stack, zip(*infos, strict=True)))
