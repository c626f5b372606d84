r"""Block Gibbs sampling over finite supports.

A sweep visits blocks of sites and draws each block from its conditional distribution,

.. math::
    x_B \sim p(x_B \mid x_{\setminus B}), \qquad B = B_1, \dots, B_n       \tag{1}

The blocks are those that the energy knows to be independent inside: the colours of a
lattice, the hidden and the visible layer of a restricted Boltzmann machine. Of any
other energy they are the single sites, at one evaluation for each other value of each.

Visiting the blocks from last to first is the time reversal of (1), which annealing in
both directions needs. Alternating the layers of a machine is its own reversal.

References:
    Geman & Geman (1984), IEEE Transactions on Pattern Analysis 6, 721-741.
"""

__all__ = ["Gibbs"]

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.energies.finite import finite_values
from pyro_ebm.energies.lattice import LatticeEnergy
from pyro_ebm.energies.rbm import RBMEnergy
from pyro_ebm.mcmc.base import ChainState, StepInfo


@final
@dataclass(frozen=True)
class Gibbs:
    """Draw block after block from its conditional, all chains at once.

    It has ``init`` and ``step`` as every kernel has, but no step size: nothing is
    rejected, and nothing is to be adapted. The state's ``grad`` is ``nan`` throughout.

    Args:
        num_sweeps: Sweeps in one step, at least 1.
        is_reversed: Whether the blocks are visited from last to first.

    Raises:
        ValueError: If ``num_sweeps`` is below 1.

    Example:
        >>> energy = pyro_ebm.energies.IsingEnergy((8, 8), coupling=0.4)
        >>> kernel = Gibbs()
        >>> state = kernel.init(energy, torch.ones(100, 8, 8))
        >>> state, info = kernel.step(energy, state)
        >>> state.x.shape, state.energy.shape
        (torch.Size([100, 8, 8]), torch.Size([100]))
    """

    num_sweeps: int = 1
    is_reversed: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.num_sweeps < 1:
            raise ValueError(f"num_sweeps must be at least 1, got {self.num_sweeps}.")

    @torch.no_grad()
    def init(self, energy: Energy, x: Tensor) -> ChainState:
        """Evaluate the energy at the chains' points, once.

        Args:
            energy: Over a finite support.
            x: Points of the support, shape ``(*chains, *event)``.

        Raises:
            ValueError: If the support is not finite, or a point is outside of it.
        """
        _values(energy)
        inside = energy.support.check(x)
        if not inside.all():
            raise ValueError(
                f"x must lie in the support {energy.support} of the energy, and "
                f"{int((~inside).sum())} of {inside.numel()} points do not. Start from "
                "draws of pyro_ebm.energies.FiniteUniform(energy.support, "
                "energy.event_shape)."
            )
        x = x.detach().to(**energy.tensor_options(x))
        return ChainState(x, energy(x), torch.full_like(x, torch.nan))

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Sweep every chain ``num_sweeps`` times; see :meth:`Kernel.step`."""
        x = self.sweep(energy, state.x)
        value = energy(x)
        moved = torch.ones_like(value, dtype=torch.bool)
        info = StepInfo(torch.ones_like(value), moved, value.isfinite())
        return ChainState(x, value, state.grad), info

    @torch.no_grad()
    def sweep(self, energy: Energy, x: Tensor) -> Tensor:
        """Where ``num_sweeps`` sweeps (1) take the chains, without their energy.

        Args:
            energy: Over a finite support.
            x: Points of the support, shape ``(*chains, *event)``.
        """
        for _ in range(self.num_sweeps):
            if isinstance(energy, LatticeEnergy):
                x = _sweep_lattice(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, RBMEnergy):
                hidden = _flip(energy.hidden_logits(x))
                x = _flip(energy.visible_logits(hidden))
            else:
                x = _sweep_sites(energy, x, is_reversed=self.is_reversed)
        return x

    def num_evaluations(self, energy: Energy) -> int:
        """What a step costs a chain, in evaluations of the energy.

        A sweep by blocks counts as one: its conditionals cost about as much.
        """
        if isinstance(energy, LatticeEnergy | RBMEnergy):
            return self.num_sweeps
        num_others = len(_values(energy)) - 1
        return self.num_sweeps * (energy.event_shape.numel() * num_others + 1)


def _sweep_lattice(energy: LatticeEnergy, x: Tensor, *, is_reversed: bool) -> Tensor:
    for block in energy.blocks.flip(0) if is_reversed else energy.blocks:
        x = torch.where(block, energy.values[_draw(energy.site_logits(x))], x)  # (1)
    return x


def _sweep_sites(energy: Energy, x: Tensor, *, is_reversed: bool) -> Tensor:
    batch_shape = energy.batch_shape_of(x)
    values = torch.tensor(_values(energy), dtype=x.dtype, device=x.device)
    shifts = torch.arange(1, len(values), device=x.device)
    shifts = shifts.reshape(-1, *(1,) * len(batch_shape))
    current, x = energy(x), x.reshape(*batch_shape, -1).clone()
    sites = range(x.shape[-1])
    for site in reversed(sites) if is_reversed else sites:
        index = (x[..., site, None] == values).long().argmax(-1)
        others = x.expand(len(shifts), *x.shape).clone()
        others[..., site] = values[(index + shifts) % len(values)]
        other = energy(others.reshape(len(shifts), *batch_shape, *energy.event_shape))
        options = torch.cat([current[None], other])
        # Where no value has a finite energy nothing is drawn but the first, the old.
        logits = (-options).where(options.isfinite(), -torch.inf).movedim(0, -1)
        drawn = _draw(logits)
        x[..., site] = values[(index + drawn) % len(values)]  # (1)
        current = options.gather(0, drawn[None])[0]
    return x.reshape(*batch_shape, *energy.event_shape)


def _draw(logits: Tensor) -> Tensor:
    """Indices drawn with these logits, shape of ``logits`` without its last axis."""
    if logits.shape[-1] == 2:
        probability = (logits[..., 1] - logits[..., 0]).sigmoid()
        return (torch.rand_like(probability) < probability).long()
    # The first of exponential clocks to ring; a value of no probability never does.
    clocks = torch.empty_like(logits).exponential_()
    return (logits.softmax(-1) / clocks).argmax(-1)


def _flip(logits: Tensor) -> Tensor:
    """Coins of these logits, as numbers 0 and 1."""
    return (torch.rand_like(logits) < logits.sigmoid()).to(logits)


def _values(energy: Energy) -> tuple[float, ...]:
    values = finite_values(energy.support)
    if values is None:
        raise ValueError(
            f"energy must have a finite support for Gibbs sampling, got "
            f"{energy.support}. independent(boolean, n), "
            "independent(integer_interval(a, b), n) and independent(spins, n) are "
            "finite; on a continuous support use pyro_ebm.mcmc.HMC."
        )
    return values
