"""Storage of the draws of a run in unconstrained space."""

__all__ = ["KeptDraws"]

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.diagnostics.convergence import ratio, split_chains
from pyro_ebm.mcmc.base import ChainState, StepInfo

#: A progress bar looks at no more draws, chains and coordinates than this of each.
_GLANCE = 64


class KeptDraws:
    """Draws and statistics of all chains, in tensors that are filled in place.

    Args:
        state: Of the chains, for shapes.
    """

    def __init__(self, state: ChainState) -> None:
        like = {
            "u": state.x,
            "energy": state.energy,
            "accept_prob": state.energy,
            "divergent": state.energy > 0,
        }
        self._rows = {name: v.new_empty((0, *v.shape)) for name, v in like.items()}
        self.num_draws = 0

    def reserve(self, num_draws: int) -> None:
        """Make room for so many more draws."""
        for name, rows in self._rows.items():
            room = rows.new_empty((num_draws, *rows.shape[1:]))
            self._rows[name] = torch.cat([self[name], room]) if len(rows) else room

    def add(self, state: ChainState, info: StepInfo) -> None:
        """Keep the points of all chains, and what became of their last proposals."""
        values = (state.x, state.energy, info.accept_prob, info.is_divergent)
        for rows, value in zip(self._rows.values(), values, strict=True):
            rows[self.num_draws].copy_(value)
        self.num_draws += 1

    def __getitem__(self, name: str) -> Tensor:
        """What there is of it so far, shape ``(num_draws, C, ...)``."""
        return self._rows[name][: self.num_draws]

    def r_hat(self) -> float:
        """A glance at the largest R-hat, for a progress bar: plain, of some draws."""
        u = self["u"]
        if len(u) < 4:
            return float("nan")
        some = u[:: -(-len(u) // _GLANCE), :: -(-u.shape[1] // _GLANCE)]
        rows = some.flatten(2) if some.dim() > 2 else some[..., None]
        rows = rows[..., :_GLANCE].double().permute(2, 1, 0)
        return ratio(split_chains(rows)).nan_to_num(0.0).amax().item()

    def state_dict(self) -> dict[str, Any]:
        """Copies of what there is so far."""
        return {name: self[name].clone() for name in self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after these draws."""
        for name, rows in self._rows.items():
            self._rows[name] = state[name].to(rows)
        self.num_draws = len(state["u"])
