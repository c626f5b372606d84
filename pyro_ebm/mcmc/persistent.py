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

from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.errors import DivergenceError
from pyro_ebm.mcmc.adaptation import StepSizeAdaptation, find_step_size
from pyro_ebm.mcmc.base import ChainState, Kernel


class StatefulModule(nn.Module):
    """A module whose buffers take the shape of what is loaded into them.

    Chains are created at their first use, when their number and shape are known; a
    fresh module must still be able to load a saved one.
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(saved.shape).to(saved.dtype))
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

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.empty(0))
        self.register_buffer("accept_prob", torch.tensor(0.0))
        self.register_buffer("num_rejected_nonfinite", torch.tensor(0))
        self.register_buffer("num_stuck", torch.tensor(0))
        self.adaptation = StepSizeAdaptation(1.0)

    @property
    def is_started(self) -> bool:
        """Whether there are chains."""
        return self.u.numel() > 0

    def start(self, energy: Energy, x: Tensor, kernel: Kernel) -> None:
        """Place the chains and find a step size.

        Args:
            energy: On any support that ``biject_to`` knows.
            x: Points of the support, shape ``(C, *event)``.
            kernel: Its step size is where the search begins.

        Raises:
            DivergenceError: If the energy is finite at none of the points.
        """
        flat, to_support = unconstrained(energy)
        self.u = to_support.inv(x).detach().clone()
        state = kernel.init(flat, self.u)
        if not state.energy.isfinite().any():
            raise DivergenceError(
                f"the energy is not finite at any of the {len(x)} starting points of "
                f"the chains; the first is {x[0]} with energy {state.energy[0]}. Start "
                "from a base that overlaps the support, or check the energy there."
            )
        self.adaptation.reset(find_step_size(kernel, flat, state))

    @torch.no_grad()
    def advance(self, energy: Energy, kernel: Kernel, num_steps: int) -> Tensor:
        """Move all chains ``num_steps`` times under the energy as it is now.

        Args:
            energy: With its current parameters.
            kernel: Used with the adapted step size.
            num_steps: Transitions; they cost ``num_steps * kernel.num_gradients + 1``
                gradients a chain.

        Returns:
            Points of the support, shape ``(C, *event)``, without gradient.

        Raises:
            DivergenceError: If no chain has moved in many transitions.
        """
        flat, to_support = unconstrained(energy)
        state = kernel.init(flat, self.u)
        moved = torch.zeros((), dtype=torch.bool, device=self.u.device)
        for _ in range(num_steps):
            adapted = dataclasses.replace(kernel, step_size=self.adaptation.step_size)
            state, info = adapted.step(flat, state)
            self.adaptation.update(kernel, info)
            moved = moved | info.accepted.any()
            self.num_rejected_nonfinite += (~info.is_finite).sum()
        self.u, self.accept_prob = state.x, info.accept_prob.mean()
        self._raise_if_stuck(moved, num_steps, state)
        return to_support(state.x)

    def _raise_if_stuck(self, moved: Tensor, num_steps: int, state: ChainState) -> None:
        self.num_stuck = torch.where(moved, 0, self.num_stuck + num_steps)
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
