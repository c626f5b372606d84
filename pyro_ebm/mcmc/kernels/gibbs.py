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
from pyro_ebm.energies.discrete.finite import finite_values
from pyro_ebm.energies.discrete.lattice import LatticeEnergy
from pyro_ebm.energies.discrete.rbm import RBMEnergy
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
                "draws of pyro_ebm.energies.discrete.finite.FiniteUniform("
                "energy.support, energy.event_shape)."
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
    values = _values(energy)
    noise = _noise(len(values), x)  # each site is drawn once a sweep
    for block in energy.blocks.flip(0) if is_reversed else energy.blocks:
        drawn = _pick(values, _draw(energy.site_logits(x), noise))
        x = torch.where(block, drawn, x)  # (1)
    return x


def _sweep_sites(energy: Energy, x: Tensor, *, is_reversed: bool) -> Tensor:
    shape, batch_shape = x.shape, energy.batch_shape_of(x)
    values = _values(energy)
    shifts = torch.arange(1, len(values), device=x.device)
    shifts = shifts.reshape(-1, *(1,) * len(batch_shape))
    current, x = energy(x), x.reshape(*batch_shape, -1).clone()
    sites = range(x.shape[-1])
    for site in reversed(sites) if is_reversed else sites:
        index = sum((x[..., site] > value).long() for value in values[:-1])
        others = x.expand(len(shifts), *x.shape).clone()
        others[..., site] = _pick(values, (index + shifts) % len(values))
        options = torch.cat([current[None], energy(others.reshape(-1, *shape))])
        # Where no value has a finite energy nothing is drawn but the first, the old.
        logits = (-options).where(options.isfinite(), -torch.inf)
        drawn = _draw(logits, _noise(len(values), current)).long()
        x[..., site] = _pick(values, (index + drawn) % len(values))  # (1)
        current = options.gather(0, drawn[None])[0]
    return x.reshape(shape)


def _noise(num_values: int, like: Tensor) -> Tensor:
    """What :func:`_draw` needs for one draw at each entry of ``like``."""
    if num_values == 2:
        return torch.rand_like(like)
    return like.new_empty(num_values, *like.shape).exponential_()


def _draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Indices along the first axis, drawn with these logits."""
    if len(logits) == 2:
        return noise < (logits[1] - logits[0]).sigmoid()
    # The first of exponential clocks to ring; a value of no probability never does.
    return (logits.softmax(0) / noise).argmax(0)


def _pick(values: tuple[float, ...], index: Tensor) -> Tensor:
    """The values at these indices; they are equally far from each other."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    return values[0] + step * index


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
