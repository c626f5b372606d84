"""Independent approximate draws: one chain a draw, all chains at once."""

__all__ = ["IndependentChains"]

import dataclasses
from dataclasses import dataclass, field
from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.errors import DivergenceError
from pyro_ebm.mcmc.adaptation import StepSizeAdaptation, find_step_size
from pyro_ebm.mcmc.base import Kernel
from pyro_ebm.mcmc.hmc import HMC


@final
@dataclass(frozen=True)
class IndependentChains:
    """Draw from ``e^-f`` with one chain for each draw.

    All chains start in the base, share one step size, adapted during warmup and frozen
    after it, and give their last point. The draws are independent given the step size;
    how close they are to ``e^-f`` depends on the number of steps.

    Args:
        base: Where the chains start; default: a standard normal in unconstrained space.
        kernel: Any kernel of :mod:`pyro_ebm.mcmc`.
        warmup_steps: Transitions in which the step size adapts.
        num_steps: Transitions after that.
        min_chains: At least so many chains are run, so that the step size of a single
            draw is as good as that of many; the rest is thrown away.

    Exactness: *consistent* in the number of steps.
    """

    base: dist.TorchDistribution | None = None
    kernel: Kernel = field(default_factory=HMC)
    warmup_steps: int = 100
    num_steps: int = 100
    min_chains: int = 32

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Run the chains.

        Args:
            energy: On any support that ``biject_to`` knows.
            num_draws: How many points are wanted.

        Returns:
            Points of shape ``(num_draws, *event)``, without gradient.

        Raises:
            DivergenceError: If no chain moves.
        """
        with torch.no_grad():
            flat, to_support = unconstrained(energy)
            start = self.start(energy, max(num_draws, self.min_chains))
            state = self.kernel.init(flat, to_support.inv(start))
            step_size = find_step_size(self.kernel, flat, state)
            adaptation = StepSizeAdaptation(step_size)
            moved = torch.zeros_like(state.energy, dtype=torch.bool)
            kernel = dataclasses.replace(self.kernel, step_size=step_size)
            for step in range(self.warmup_steps + self.num_steps):
                state, info = kernel.step(flat, state)
                moved |= info.accepted
                if step < self.warmup_steps:
                    adaptation.update(kernel, info)
                    last = step + 1 == self.warmup_steps
                    step_size = (
                        adaptation.averaged_step_size if last else adaptation.step_size
                    )
                    kernel = dataclasses.replace(kernel, step_size=step_size)
            if not moved.any():
                raise DivergenceError(
                    f"none of the {len(moved)} chains moved in "
                    f"{self.warmup_steps + self.num_steps} transitions; the energies lie"
                    f" in [{state.energy.min().item():.4g}, "
                    f"{state.energy.max().item():.4g}]. Check that the energy is finite "
                    "where the base puts the chains."
                )
            return to_support(state.x)[:num_draws]

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Points of the base, shape ``(num_draws, *event)``."""
        if self.base is not None:
            return self.base.sample((num_draws,)).detach()
        flat, to_support = unconstrained(energy)
        tensors = [*energy.parameters(), *energy.buffers()]
        options = {"dtype": tensors[0].dtype, "device": tensors[0].device} if tensors else {}
        return to_support(torch.randn(num_draws, *flat.event_shape, **options)).detach()
