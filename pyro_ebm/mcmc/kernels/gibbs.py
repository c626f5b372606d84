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

__all__ = ["Gibbs", "checked_points"]

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.finite import finite_values, num_states
from pyro_ebm.energies.discrete.lattice import IsingEnergy
from pyro_ebm.energies.discrete.rbm import RBMEnergy
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, evaluate

#: Steps of a path along which chains at forbidden points get to allowed ones.
_NUM_RELAXED = 100


@final
@dataclass(frozen=True)
class Gibbs(Kernel):
    """Draw block after block from its conditional, all chains at once.

    It has no step size: nothing is rejected, and nothing is to be adapted. The state's
    ``grad`` is zero throughout.

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

    has_step_size: ClassVar[bool] = False

    num_sweeps: int = 1
    is_reversed: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.num_sweeps < 1:
            raise ValueError(f"num_sweeps must be at least 1, got {self.num_sweeps}.")

    @property
    def num_gradients(self) -> int:
        """Evaluations that a step by blocks costs, a chain: one a sweep."""
        return self.num_sweeps

    @torch.no_grad()
    def init(self, energy: Energy, x: Tensor) -> ChainState:
        """Evaluate the energy at the chains' points, once.

        If all are forbidden, and the energy knows its blocks, the chains first sweep
        along its path from uniform sites, on which nothing is forbidden.

        Args:
            energy: Over a finite support.
            x: Points of the support, shape ``(*chains, *event)``.

        Raises:
            ValueError: If the support is not finite, or a point is outside of it.
        """
        x = checked_points(energy, x)
        if isinstance(energy, SiteEnergy) and energy(x).isposinf().all():
            path = energy.annealing_path()
            for beta in torch.linspace(0, 1, _NUM_RELAXED + 1)[1:].tolist():
                x = self.sweep(path.at(beta), x)
        return ChainState(x, *evaluate(energy, x))

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
            if isinstance(energy, IsingEnergy):
                x = _sweep_spins(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, SiteEnergy):
                x = _sweep_blocks(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, RBMEnergy):
                x = energy.draw_visible(energy.draw_hidden(x))
            else:
                x = _sweep_sites(energy, x, is_reversed=self.is_reversed)
        return x

    def num_evaluations(self, energy: Energy) -> int:
        """What a step costs a chain, in evaluations of the energy.

        A sweep by blocks counts as one: its conditionals cost about as much.
        """
        if isinstance(energy, SiteEnergy | RBMEnergy):
            return self.num_sweeps
        number = num_states(energy.support, energy.event_shape)
        num_others = energy.event_shape.numel() * (len(_values(energy)) - 1)
        if number is not None:
            num_others = int((number - 1).sum())
        return self.num_sweeps * (num_others + 1)


def _sweep_blocks(energy: SiteEnergy, x: Tensor, *, is_reversed: bool) -> Tensor:
    noise = torch.rand_like(x)  # each site is drawn once a sweep
    first, step = energy.values[0], energy.values[:2].diff().sum()
    for block in energy.blocks.flip(0) if is_reversed else energy.blocks:
        # The values are equally far from each other, and an index costs more.
        drawn = first + step * _draw(energy.site_logits(x), noise)
        x = torch.where(block, drawn, x)  # (1)
    return x


def _sweep_spins(energy: IsingEnergy, x: Tensor, *, is_reversed: bool) -> Tensor:
    r"""A sweep of a lattice of spins in bytes.

    A spin points up where its draw :math:`u < \sigma(2 J n + 2 h)`, with the sum
    :math:`n` of its neighbours; so each has one threshold a sweep, which :math:`n` is
    above, or below where :math:`J < 0`.
    """
    coupling, field = energy.coupling, energy.field
    threshold = torch.rand_like(x).logit_().mul_(0.5)
    if field is not None:
        threshold -= field
    threshold /= coupling.abs().clamp(min=torch.finfo(x.dtype).tiny)
    threshold = threshold.floor_().clamp_(-128, 127).to(torch.int8)
    sign, spins = coupling.sign().to(torch.int8), x.to(torch.int8)
    blocks = energy.blocks.to(torch.int8)
    for block in blocks.flip(0) if is_reversed else blocks:
        neighbours = energy.neighbours(spins)
        up = (neighbours.mul_(sign) > threshold).view(torch.int8)
        # 2 up - 1 where the block is, else what was there
        new = up.mul_(2).sub_(1)
        spins = new.bitwise_xor_(spins).mul_(block).bitwise_xor_(spins)  # (1)
    return spins.to(x.dtype)


def _sweep_sites(energy: Energy, x: Tensor, *, is_reversed: bool) -> Tensor:
    shape, batch_shape = x.shape, energy.batch_shape_of(x)
    values = torch.tensor(_values(energy)).to(x)
    number = num_states(energy.support, energy.event_shape)
    counts = [len(values)] * energy.event_shape.numel()
    if number is not None:
        counts = number.flatten().tolist()
    current, x = energy(x), x.reshape(*batch_shape, -1).clone()
    index = torch.searchsorted(values, x.contiguous())
    sites = range(x.shape[-1])
    for site in reversed(sites) if is_reversed else sites:
        shifts = torch.arange(1, counts[site], device=x.device)
        shifts = shifts.reshape(-1, *(1,) * len(batch_shape))
        others = x.expand(len(shifts), *x.shape).clone()
        others[..., site] = values[(index[..., site] + shifts) % counts[site]]
        options = torch.cat([current[None], energy(others.reshape(-1, *shape))])
        # Where no value has a finite energy nothing is drawn but the first, the old.
        logits = (-options).where(options.isfinite(), -torch.inf)
        drawn = _draw(logits, torch.rand_like(current)).long()
        index[..., site] = (index[..., site] + drawn) % counts[site]
        x[..., site] = values[index[..., site]]  # (1)
        current = options.gather(0, drawn[None])[0]
    return x.reshape(shape)


def _draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Indices along the first axis, drawn with these logits by uniform numbers."""
    if len(logits) == 2:
        return noise < (logits[1] - logits[0]).sigmoid()
    terms = (logits - logits.amax(0)).exp_()
    for low, high in zip(terms[:-1], terms[1:], strict=True):
        high += low
    # Short of the whole by more than rounding: the last may have no probability.
    limit = noise * (1 - 4 * torch.finfo(noise.dtype).eps) * terms[-1]
    index = torch.zeros_like(noise)
    for term in terms[:-1]:
        index += limit >= term
    return index


def checked_points(energy: Energy, x: Tensor, kernel: str = "Gibbs") -> Tensor:
    """Points of a support, in the dtype and on the device of an energy.

    Args:
        energy: Over a finite support, or what the kernel else can draw.
        x: Shape ``(*chains, *event)``.
        kernel: Its name, for the message.

    Raises:
        ValueError: If the support is not finite, the event has another shape, or a
            point is outside of the support.
    """
    if kernel != "Gibbs" or not isinstance(energy, RBMEnergy):  # it may be real
        _values(energy, kernel)
    energy.batch_shape_of(x)
    inside = energy.support.check(x)
    if not inside.all():
        raise ValueError(
            f"x must lie in the support {energy.support} of the energy, and "
            f"{int((~inside).sum())} of {inside.numel()} points do not. Start from "
            "draws of pyro_ebm.energies.discrete.independent.IndependentSites."
            "uniform(energy.support, energy.event_shape)."
        )
    return x.detach().to(**energy.tensor_options(x))


def _values(energy: Energy, kernel: str = "Gibbs") -> tuple[float, ...]:
    values = finite_values(energy.support)
    if values is None:
        raise ValueError(
            f"energy must have a finite support for {kernel}, got "
            f"{energy.support}. independent(boolean, n), "
            "independent(integer_interval(a, b), n) and independent(spins, n) are "
            "finite; on a continuous support use pyro_ebm.mcmc.HMC."
        )
    return values
