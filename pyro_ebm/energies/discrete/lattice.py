r"""Ising and Potts energies on lattices of any dimension.

With one term for each bond :math:`\langle i j \rangle` between nearest neighbours,

.. math::
    f_{\mathrm{Ising}}(s) &= -J \sum_{\langle ij \rangle} s_i s_j - \sum_i h_i s_i,
        \quad s_i \in \{-1, 1\}                                            \tag{1} \\
    f_{\mathrm{Potts}}(x) &= -J \sum_{\langle ij \rangle} [x_i = x_j],
        \quad x_i \in \{0, \dots, q - 1\}                                  \tag{2}

The inverse temperature is part of :math:`J`. The sites fall into blocks without a bond
inside, the two colours of a chessboard where that is possible: given the rest, the
sites of a block are independent, with logits linear in their neighbours.

References:
    Ising (1925), Zeitschrift fuer Physik 31, 253-258. Potts (1952), Mathematical
    Proceedings of the Cambridge Philosophical Society 48, 106-109.
"""

__all__ = ["IsingEnergy", "LatticeEnergy", "PottsEnergy"]

import functools
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import final

import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.base import live_or_parameter
from pyro_ebm.energies.discrete.exact.distribution import ExactClosedForm
from pyro_ebm.energies.discrete.exact.elimination import (
    MAX_COST,
    Factors,
    exact_closed_form,
)
from pyro_ebm.energies.discrete.finite import AnnealingPath, spins
from pyro_ebm.energies.discrete.graph import lattice_edges
from pyro_ebm.energies.discrete.sites import SiteEnergy


class LatticeEnergy(SiteEnergy):
    """An energy of nearest neighbours on a lattice.

    Attributes:
        coupling: :math:`J`, of shape ``()``.

    Args:
        shape: Sites along each dimension.
        support: Of one site.
        coupling: :math:`J` in nats; positive if neighbours like to agree. A tensor that
            carries a graph (a latent variable, ``pyro.param``) stays live, a
            ``nn.Parameter`` is shared, and anything else becomes a parameter.
        periodic: Whether the lattice closes to a torus. There a side of two has each of
            its bonds twice.

    Raises:
        ValueError: If there is no site, or a periodic side of one: a site is not its
            own neighbour.
    """

    coupling: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        support: Constraint,
        coupling: float | Tensor,
        *,
        periodic: bool,
    ) -> None:
        shape = tuple(shape)
        if not shape or min(shape) < (2 if periodic else 1):
            raise ValueError(
                "shape must hold at least one side, of at least 2 sites if periodic "
                f"and 1 if not; got {shape} with periodic={periodic}."
            )
        if not isinstance(coupling, Tensor):
            if not math.isfinite(coupling):
                raise ValueError(f"coupling must be finite, got {coupling}.")
            coupling = torch.tensor(float(coupling))
        if coupling.shape or not coupling.is_floating_point():
            raise ValueError(
                "coupling must be one floating-point number, got a tensor of shape "
                f"{tuple(coupling.shape)} and dtype {coupling.dtype}."
            )
        support = constraints.independent(support, len(shape))
        blocks = _blocks(shape, periodic=periodic)
        super().__init__(shape, support, blocks, coupling)
        self.periodic = periodic
        live_or_parameter(self, "coupling", coupling)

    @abstractmethod
    def factors(self) -> Factors:
        """Log potentials of all bonds, and of the sites."""

    def closed_form(self) -> ExactClosedForm | None:
        r""":math:`\log Z` and the distribution where elimination is cheap.

        It is on lines of any length, and on lattices whose smaller side is short: up to
        about eight spins on a torus, twice as many with a free boundary.

        Exactness: *exact* where it is not ``None``.
        """
        # The treewidth is at least that of a square of the second longest side.
        side = sorted(self.event_shape)[-2] if self.event_dim > 1 else 1
        if len(self.values) ** (side + 1) > MAX_COST:
            return None
        return exact_closed_form(self, self.factors())

    def _edges(self) -> Tensor:
        return lattice_edges(self.event_shape, periodic=self.periodic)

    def _bonds(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The two ends of all bonds, one dimension of the lattice at a time."""
        for dim in range(-self.event_dim, 0):
            if self.periodic:
                yield x, x.roll(1, dim)
            else:
                length = x.shape[dim] - 1
                yield x.narrow(dim, 1, length), x.narrow(dim, 0, length)

    def neighbours(self, x: Tensor) -> Tensor:
        """Sum over the neighbours of each site, shape of ``x``."""
        total = torch.zeros_like(x)
        for dim in range(-self.event_dim, 0):
            if self.periodic:
                total += x.roll(1, dim)
                total += x.roll(-1, dim)
            else:
                length = x.shape[dim] - 1
                total.narrow(dim, 1, length).add_(x.narrow(dim, 0, length))
                total.narrow(dim, 0, length).add_(x.narrow(dim, 1, length))
        return total


@final
class IsingEnergy(LatticeEnergy):
    r"""The Ising energy (1) over spins -1 and +1.

    Args:
        shape: Sites along each dimension.
        coupling: :math:`J`, in nats: inverse temperature times strength of a bond.
        field: :math:`h`, a number or one for each site; default: none. What carries a
            graph stays live, as of the coupling.
        periodic: Whether the lattice closes to a torus.

    Raises:
        ValueError: If ``shape`` is no lattice or a parameter has the wrong shape.

    Example:
        >>> energy = IsingEnergy((8, 8), coupling=0.4)
        >>> energy(torch.ones(8, 8)).item()
        -51.2
    """

    field: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        coupling: float | Tensor,
        field: float | Tensor | None = None,
        *,
        periodic: bool = True,
    ) -> None:
        super().__init__(shape, spins, coupling, periodic=periodic)
        if field is None:
            self.field = None
        else:
            value = torch.as_tensor(field)
            if value.shape not in ((), self.event_shape):
                raise ValueError(
                    f"field must be a number or have shape {tuple(self.event_shape)}, "
                    f"one number for each site; got shape {tuple(value.shape)}."
                )
            live_or_parameter(self, "field", value.to(self.coupling))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, *shape)``."""
        dims = self.event_dim
        bonds = sum(sum_rightmost(a * b, dims) for a, b in self._bonds(x))
        energy = -self.coupling * bonds  # (1)
        if self.field is None:
            return energy
        return energy - sum_rightmost(self.field * x, dims)

    def site_logits(self, x: Tensor) -> Tensor:
        """Logits of -1 and +1 given all other sites, shape ``(2, *batch, *shape)``."""
        up = self.coupling * self.neighbours(x)
        if self.field is not None:
            up = up + self.field
        return torch.stack([-up, up])

    def factors(self) -> Factors:
        """Log potentials of all bonds, and of the sites."""
        both = self.values * self.values[:, None]
        factors = [(self._edges(), (self.coupling * both)[None])]
        if self.field is not None:
            sites = torch.arange(self.event_shape.numel())[:, None]
            table = self.field.reshape(-1, 1) * self.values
            factors.append((sites, table))
        return factors

    def annealing_path(self) -> AnnealingPath:
        """From fair spins to this energy, by scaling coupling and field."""

        def at(beta: float) -> IsingEnergy:
            field = None if self.field is None else beta * self.field
            coupling = beta * self.coupling
            return IsingEnergy(
                self.event_shape, coupling, field, periodic=self.periodic
            )

        return super().annealing_path()._replace(at=at)


@final
class PottsEnergy(LatticeEnergy):
    r"""The Potts energy (2) over categories, written as floating-point numbers.

    Args:
        shape: Sites along each dimension.
        num_categories: :math:`q`, at least 2.
        coupling: :math:`J` in nats. With ``q = 2`` it is the Ising energy of half the
            coupling, up to a constant.
        periodic: Whether the lattice closes to a torus.

    Raises:
        ValueError: If ``shape`` is no lattice or there are fewer than two categories.

    Example:
        >>> energy = PottsEnergy((6, 6), num_categories=3, coupling=1.0)
        >>> energy(torch.zeros(6, 6)).item()
        -72.0
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_categories: int,
        coupling: float | Tensor,
        *,
        periodic: bool = True,
    ) -> None:
        if num_categories < 2 or num_categories != int(num_categories):
            raise ValueError(
                "num_categories must be a whole number from 2 on, got "
                f"{num_categories}."
            )
        categories = constraints.integer_interval(0, num_categories - 1)
        super().__init__(shape, categories, coupling, periodic=periodic)
        self.num_categories = num_categories

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (2) at ``x`` of shape ``(*batch, *shape)``."""
        dims = self.event_dim
        equal = sum(sum_rightmost((a == b).to(x), dims) for a, b in self._bonds(x))
        # What is no number equals nothing: without this it would have an energy.
        return -self.coupling * equal + 0 * sum_rightmost(x, dims)  # (2)

    def site_logits(self, x: Tensor) -> Tensor:
        """Logits of the categories of each site, shape ``(q, *batch, *shape)``."""
        one_hot = (x == self.values.reshape(-1, *(1,) * x.dim())).to(torch.int8)
        return self.coupling * self.neighbours(one_hot)

    def factors(self) -> Factors:
        """Log potentials of all bonds."""
        equal = torch.eye(len(self.values)).to(self.values)
        return [(self._edges(), (self.coupling * equal)[None])]

    def annealing_path(self) -> AnnealingPath:
        """From uniform categories to this energy, by scaling the coupling."""

        def at(beta: float) -> PottsEnergy:
            return PottsEnergy(
                self.event_shape,
                self.num_categories,
                beta * self.coupling,
                periodic=self.periodic,
            )

        return super().annealing_path()._replace(at=at)


@functools.lru_cache(maxsize=32)
def _blocks(shape: tuple[int, ...], *, periodic: bool) -> Tensor:
    """Masks of the colours of a proper colouring, shape ``(B, *shape)``.

    A line is coloured 0, 1, 0, 1, ...; the last site of an odd ring gets a 2. The sum
    of the colours along the dimensions, modulo the largest number of colours, then
    differs between neighbours.
    """
    colour = torch.zeros(shape, dtype=torch.long)
    num_colours = 2
    for dim, length in enumerate(shape):
        line = torch.arange(length) % 2
        if periodic and length % 2:
            line[-1] = 2
            num_colours = 3
        colour = colour + line.reshape(-1, *(1,) * (len(shape) - dim - 1))
    masks = (colour % num_colours) == torch.arange(num_colours).reshape(
        -1, *(1,) * len(shape)
    )
    return masks[masks.flatten(1).any(-1)]
