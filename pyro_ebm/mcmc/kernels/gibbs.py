r"""Block Gibbs sampling over finite supports.

A sweep visits blocks of sites and draws each block from its conditional distribution,

.. math::
    x_B \sim p(x_B \mid x_{\setminus B}), \qquad B = B_1, \dots, B_n       \tag{1}

The blocks are those that the energy knows to be independent inside: the colours of a
lattice, the hidden and the visible layer of a restricted Boltzmann machine. Where all
units are connected each is a block, and what it does to the fields of the others is
added up, strip by strip. Of any other energy the blocks are the single sites, at one
evaluation for each other value of each.

Visiting the blocks from last to first is the time reversal of (1), which annealing in
both directions needs. Alternating the layers of a machine is its own reversal.

References:
    Geman & Geman (1984), IEEE Transactions on Pattern Analysis 6, 721-741.
"""

__all__ = ["Gibbs", "SweepKernel", "checked_points", "draw_index", "has_blocks"]

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from pyro_ebm.core.spaces import require_not_mixed
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.boltzmann import BoltzmannEnergy
from pyro_ebm.energies.discrete.finite import finite_values, num_states
from pyro_ebm.energies.discrete.free_energy import FreeEnergy
from pyro_ebm.energies.discrete.lattice import IsingEnergy, PottsEnergy
from pyro_ebm.energies.discrete.rbm import RBMEnergy
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.energies.views.clamped import ClampedEnergy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, evaluate

#: Steps of a path along which chains at forbidden points get to allowed ones.
_NUM_RELAXED = 100
#: Units of a dense machine whose fields are kept up one by one.
_STRIP = 10
#: Nats that exponentials are safe within, in single precision.
_SAFE = 80.0


class SweepKernel(Kernel):
    """A kernel for finite supports that rejects nothing, and so has no step size.

    The state's ``grad`` is zero throughout.
    """

    has_step_size: ClassVar[bool] = False

    num_sweeps: int = 1
    is_reversed: bool = False

    @abstractmethod
    def sweep(self, energy: Energy, x: Tensor) -> Tensor:
        """Where one step takes the chains, without their energy.

        Args:
            energy: Over a finite support.
            x: Points of the support, shape ``(*chains, *event)``.
        """

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
        x = checked_points(energy, x, type(self).__name__)
        if isinstance(energy, SiteEnergy) and energy(x).isposinf().all():
            path = energy.annealing_path()
            for beta in torch.linspace(0, 1, _NUM_RELAXED + 1)[1:].tolist():
                x = Gibbs().sweep(path.at(beta), x)
        return ChainState(x, *evaluate(energy, x))

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; see :meth:`Kernel.step`."""
        x = self.sweep(energy, state.x)
        value = energy(x)
        moved = torch.ones_like(value, dtype=torch.bool)
        info = StepInfo(torch.ones_like(value), moved, value.isfinite())
        return ChainState(x, value, torch.zeros_like(x)), info


@final
@dataclass(frozen=True)
class Gibbs(SweepKernel):
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
    def sweep(self, energy: Energy, x: Tensor) -> Tensor:
        """Where ``num_sweeps`` sweeps (1) take the chains, without their energy.

        Args:
            energy: Over a finite support.
            x: Points of the support, shape ``(*chains, *event)``.
        """
        for _ in range(self.num_sweeps):
            if isinstance(energy, IsingEnergy):
                x = _sweep_spins(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, PottsEnergy):
                x = _sweep_categories(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, BoltzmannEnergy):
                x = _sweep_units(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, SiteEnergy):
                x = _sweep_blocks(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, RBMEnergy):
                x = energy.draw_visible(energy.draw_hidden(x))
            elif isinstance(energy, FreeEnergy):
                x = _sweep_visible(energy, x, is_reversed=self.is_reversed)
            elif isinstance(energy, ClampedEnergy) and has_blocks(energy):
                x = _sweep_clamped(energy, x, is_reversed=self.is_reversed)
            else:
                x = _sweep_sites(energy, x, is_reversed=self.is_reversed)
        return x

    def num_evaluations(self, energy: Energy) -> int:
        """What a step costs a chain, in evaluations of the energy.

        A sweep by blocks counts as one: its conditionals cost about as much.
        """
        if has_blocks(energy):
            return self.num_sweeps
        number = num_states(energy.support, energy.event_shape)
        num_others = energy.event_shape.numel() * (len(_values(energy)) - 1)
        if number is not None:
            num_others = int((number - 1).sum())
        return self.num_sweeps * (num_others + 1)


def has_blocks(energy: Energy) -> bool:
    """Whether an energy knows which of its sites are independent given the others.

    Args:
        energy: Over any support.
    """
    if isinstance(energy, ClampedEnergy):
        return isinstance(energy.energy, SiteEnergy | RBMEnergy)
    return isinstance(energy, SiteEnergy | RBMEnergy | FreeEnergy)


def _sweep_visible(energy: FreeEnergy, x: Tensor, *, is_reversed: bool) -> Tensor:
    """Hidden sites given the visible ones, which then are drawn by blocks."""
    sites, whole = energy.energy, energy.draw_whole(x)
    is_seen = torch.zeros_like(sites.blocks[0]).flatten()
    is_seen[energy.visible] = True
    blocks = _part_of(sites, is_seen)
    whole = _sweep_blocks(sites, whole, is_reversed=is_reversed, blocks=blocks)
    return whole.flatten(-sites.event_dim)[..., energy.visible]


def _part_of(sites: SiteEnergy, kept: Tensor) -> Tensor:
    """The blocks, of the sites alone that are kept; ``(D,)`` booleans."""
    blocks = sites.blocks & kept.reshape(sites.event_shape)
    return blocks[blocks.flatten(1).any(-1)]


def _sweep_clamped(energy: ClampedEnergy, x: Tensor, *, is_reversed: bool) -> Tensor:
    """The blocks of the whole, of which what is observed stays."""
    whole, inner = energy.expand_event(x), energy.energy
    if isinstance(inner, RBMEnergy):
        return energy.free_part(inner.draw_visible(inner.draw_hidden(whole)))
    sites: Any = inner
    is_free = torch.zeros_like(sites.blocks[0]).flatten()
    is_free[energy.free] = True
    blocks = _part_of(sites, is_free)
    whole = _sweep_blocks(sites, whole, is_reversed=is_reversed, blocks=blocks)
    return energy.free_part(whole)


def _sweep_blocks(
    energy: SiteEnergy,
    x: Tensor,
    *,
    is_reversed: bool,
    blocks: Tensor | None = None,
) -> Tensor:
    blocks = energy.blocks if blocks is None else blocks
    noise = torch.rand_like(x)  # each site is drawn once a sweep
    first, step = energy.values[0], energy.values[:2].diff().sum()
    for block in blocks.flip(0) if is_reversed else blocks:
        # The values are equally far from each other, and an index costs more.
        drawn = first + step * draw_index(energy.site_logits(x), noise)
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


def _sweep_categories(energy: PottsEnergy, x: Tensor, *, is_reversed: bool) -> Tensor:
    """A sweep of a lattice of categories in bytes."""
    coupling = energy.coupling
    is_steep = bool(coupling.abs() * 2 * energy.event_dim > _SAFE)
    if is_steep or energy.num_categories > 2**7:
        return _sweep_blocks(energy, x, is_reversed=is_reversed)
    noise, x_new = torch.rand_like(x), x.to(torch.int8)
    values = torch.arange(len(energy.values), dtype=torch.int8, device=x.device)
    values = values.reshape(-1, *(1,) * x.dim())
    blocks = energy.blocks.to(torch.int8)
    for block in blocks.flip(0) if is_reversed else blocks:
        terms = (coupling * energy.neighbours((x_new == values).to(torch.int8))).exp_()
        drawn = _inverted(terms, noise)
        x_new = drawn.bitwise_xor_(x_new).mul_(block).bitwise_xor_(x_new)  # (1)
    return x_new.to(x.dtype)


def _sweep_units(energy: BoltzmannEnergy, x: Tensor, *, is_reversed: bool) -> Tensor:
    """A sweep of units that are all connected, whose fields are kept.

    A unit takes the higher value where its field is above a threshold that was drawn.
    What the units of a strip do to the fields within it is added up one by one, what
    they do to later ones at once.
    """
    weight, bias = energy.symmetric_weight, energy.bias
    states = x.reshape(-1, len(bias)).mT.contiguous()
    if is_reversed:
        weight, bias, states = weight.flip(0, 1), bias.flip(0), states.flip(0)
    low, high = energy.values
    threshold = torch.rand_like(states).logit_().div_(high - low)
    field = torch.addmm(bias[:, None], weight, states).sub_(threshold)
    for start in range(0, len(weight), _STRIP):
        strip = range(start, min(start + _STRIP, len(weight)))
        change = states[start : strip.stop].neg()
        for i in strip:
            torch.where(field[i] > 0, high, low, out=states[i])  # (1)
            change[i - start] += states[i]
            within = slice(i + 1, strip.stop)
            field[within].addr_(weight[within, i], change[i - start])
        later = slice(strip.stop, None)
        field[later].addmm_(weight[later, start : strip.stop], change)
    states = states.flip(0) if is_reversed else states
    return states.mT.contiguous().reshape(x.shape)


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
        drawn = draw_index(logits, torch.rand_like(current)).long()
        index[..., site] = (index[..., site] + drawn) % counts[site]
        x[..., site] = values[index[..., site]]  # (1)
        current = options.gather(0, drawn[None])[0]
    return x.reshape(shape)


def draw_index(logits: Tensor, noise: Tensor) -> Tensor:
    """Indices along the first axis, drawn with these logits by uniform numbers."""
    if len(logits) == 2:
        return noise < (logits[1] - logits[0]).sigmoid()
    return _inverted((logits - logits.amax(0)).exp_(), noise).to(noise)


def _inverted(terms: Tensor, noise: Tensor) -> Tensor:
    """Indices drawn in proportion to terms, which are overwritten."""
    for low, high in zip(terms[:-1], terms[1:], strict=True):
        high += low
    # Short of the whole by more than rounding: the last may have no probability.
    limit = noise * (1 - 4 * torch.finfo(noise.dtype).eps) * terms[-1]
    dtype = torch.int8 if len(terms) <= 2**7 else torch.int32
    index = (limit >= terms[0]).to(dtype)
    for term in terms[1:-1]:
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
    require_not_mixed(energy.support, kernel)
    values = finite_values(energy.support)
    if values is None:
        raise ValueError(
            f"energy must have a finite support for {kernel}, got "
            f"{energy.support}. independent(boolean, n), "
            "independent(integer_interval(a, b), n) and independent(spins, n) are "
            "finite; on a continuous support use pyro_ebm.mcmc.HMC."
        )
    return values
