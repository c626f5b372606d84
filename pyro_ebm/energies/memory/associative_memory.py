r"""Associative memories of spins: patterns are stored as minima of the energy.

Patterns :math:`\xi^1, \dots, \xi^P` and a state :math:`s \in \{-1, 1\}^N` meet in their
overlaps :math:`u_\mu = \xi^\mu \cdot s`, between :math:`-N` and :math:`N`:

.. math::
    f_{\mathrm{polynomial}}(s) &= -\frac Nn \sum_\mu (u_\mu / N)^n          \tag{1} \\
    f_{\mathrm{exponential}}(s) &= -\log \sum_\mu e^{\beta u_\mu}           \tag{2}

Degree :math:`n = 2` is the network of Hopfield. The higher the degree, the more does
the nearest pattern outweigh the crosstalk of the others, and the more of them can be
stored: about :math:`0.14\, N` for :math:`n = 2`, of the order of :math:`N^{n-1}` for
:math:`n`, and exponentially many in :math:`N` for (2).

The exponential memory of Demircigil et al. is :math:`-\sum_\mu e^{\beta u_\mu} =
-e^{-f}` with :math:`f` of (2). In the library that is ``-(-f).exp()``. A monotone map
moves no minimum and no descent, so the two retrieve alike; but the depth of (2) is
:math:`\beta N` nats, and that of the other :math:`e^{\beta N}`.

By (2), :math:`e^{-f}` is a sum of products over the sites. So :math:`\log Z` is known,

.. math::
    \log Z = \log \sum_\mu \prod_i 2 \cosh(\beta \xi^\mu_i)                 \tag{3}

and the distribution is a mixture of independent spins, which is sampled exactly.

References:
    Hopfield (1982), PNAS 79, 2554-2558. Amit, Gutfreund & Sompolinsky (1985), Physical
    Review Letters 55, 1530-1533 (the 0.14). Krotov & Hopfield (2016), NeurIPS 29.
    Demircigil et al. (2017), Journal of Statistical Physics 168, 288-299.
"""

__all__ = [
    "AssociativeMemory",
    "HopfieldEnergy",
    "Retrieval",
    "SpinMemoryEnergy",
    "keep",
    "require_patterns",
    "require_sharpness",
]

import math
from abc import abstractmethod
from typing import NamedTuple, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.discrete.finite import Spin, log_two_cosh, spins


class Retrieval(NamedTuple):
    """What a memory made of a cue.

    Attributes:
        state: Where the descent ended, in the shape of the cue.
        converged: Whether it ended there by itself, shape ``(*batch,)``.
        num_steps: Sweeps or updates made, the last of which changed nothing if all
            have converged.

    Example:
        It is what ``retrieve`` of a memory returns.

        >>> found = HopfieldEnergy(torch.ones(1, 4)).retrieve(
        ...     torch.tensor([-1.0, 1, 1, 1])
        ... )
        >>> found.state, found.converged, found.num_steps
        (tensor([1., 1., 1., 1.]), tensor(True), 2)
    """

    state: Tensor
    converged: Tensor
    num_steps: int


class AssociativeMemory(Energy):
    """An energy over spins that depends on them through overlaps with patterns.

    Attributes:
        patterns: Shape ``(P, N)``; a parameter if it was given as one, else a buffer.

    Args:
        patterns: One pattern a row, finite; their entries may be any numbers.

    Raises:
        ValueError: If ``patterns`` is no matrix of finite numbers.
    """

    patterns: Tensor

    def __init__(self, patterns: Tensor) -> None:
        shape = require_patterns(patterns).shape[1:]
        super().__init__(shape, constraints.independent(spins, 1))
        keep(self, "patterns", patterns)

    @abstractmethod
    def from_overlaps(self, overlaps: Tensor) -> Tensor:
        """Energy of states with these overlaps, ``(*batch, P)`` to ``(*batch,)``."""

    def overlaps(self, x: Tensor) -> Tensor:
        """Overlaps of ``x`` of shape ``(*batch, N)`` with the patterns."""
        return x @ self.patterns.mT

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the energy at ``x`` of shape ``(*batch, N)``."""
        return self.from_overlaps(self.overlaps(x))

    @torch.no_grad()
    def retrieve(self, cue: Tensor, *, max_sweeps: int = 100) -> Retrieval:
        """Descend from a cue to a minimum: the dynamics at temperature zero.

        Site after site, a spin turns if that lowers the energy, until none does. The
        sites are visited in their order, all cues at once.

        Args:
            cue: States to start from, shape ``(*batch, N)``.
            max_sweeps: Sweeps after which to stop, at least 1.

        Returns:
            The minima, and whether each was reached.

        Raises:
            ValueError: If a cue is no spin, or ``max_sweeps`` is below 1.

        Cost: one exponential or power for each site and pattern in each sweep.
        """
        if max_sweeps < 1:
            raise ValueError(f"max_sweeps must be at least 1, got {max_sweeps}.")
        self.batch_shape_of(cue)
        if not self.support.check(cue).all():
            raise ValueError(
                "cue must hold spins, -1 or +1 throughout, got other numbers. Take the "
                "signs of real numbers, or 2 * x - 1 of x in {0, 1}."
            )
        state, num_steps = cue, 0
        converged = torch.zeros_like(cue[..., 0], dtype=torch.bool)
        while num_steps < max_sweeps and not converged.all():
            before, state = state, self._sweep(state)
            converged = (state == before).all(-1)
            num_steps += 1
        return Retrieval(state, converged, num_steps)

    def _sweep(self, state: Tensor) -> Tensor:
        """Visit every site once."""
        overlaps = self.overlaps(state)
        energy = self.from_overlaps(overlaps)
        visited = []
        columns = self.patterns.unbind(-1)
        for spin, column in zip(state.unbind(-1), columns, strict=True):
            turned = overlaps - 2 * spin.unsqueeze(-1) * column
            turned_energy = self.from_overlaps(turned)
            turns = turned_energy < energy  # a tie stays
            energy = torch.where(turns, turned_energy, energy)
            overlaps = torch.where(turns.unsqueeze(-1), turned, overlaps)
            visited.append(torch.where(turns, -spin, spin))
        return torch.stack(visited, -1)


@final
class HopfieldEnergy(AssociativeMemory):
    r"""The polynomial memory (1); of degree two the network of Hopfield.

    An even degree stores the negative of each pattern as well.

    Args:
        patterns: :math:`\xi`, shape ``(P, N)``, of entries -1 and +1 by custom.
        degree: :math:`n`, at least 2.

    Raises:
        ValueError: If ``patterns`` is no matrix of finite numbers or the degree is
            below 2.

    Example:
        >>> patterns = torch.tensor([[1.0, 1, 1, 1, 1, 1], [1.0, 1, 1, -1, -1, -1]])
        >>> memory = HopfieldEnergy(patterns)
        >>> memory(patterns)  # -N / 2 each, as these two are orthogonal
        tensor([-3., -3.])
        >>> memory.retrieve(torch.tensor([-1.0, 1, 1, 1, 1, 1])).state
        tensor([1., 1., 1., 1., 1., 1.])
    """

    def __init__(self, patterns: Tensor, degree: int = 2) -> None:
        if degree != int(degree) or degree < 2:
            raise ValueError(f"degree must be a whole number from 2, got {degree}.")
        super().__init__(patterns)
        self.degree = int(degree)

    def from_overlaps(self, overlaps: Tensor) -> Tensor:
        """Evaluate (1), ``(*batch, P)`` to ``(*batch,)``."""
        size = self.event_shape.numel()
        return -(overlaps / size).pow(self.degree).sum(-1) * size / self.degree  # (1)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"num_patterns={len(self.patterns)}, degree={self.degree}"


@final
class SpinMemoryEnergy(AssociativeMemory):
    r"""The exponential memory (2), in nats, with :math:`\log Z` known.

    Args:
        patterns: :math:`\xi`, shape ``(P, N)``, of entries -1 and +1 by custom.
        sharpness: :math:`\beta > 0`; 1 is the memory of Demircigil et al.

    Raises:
        ValueError: If ``patterns`` is no matrix of finite numbers or the sharpness is
            not positive.

    Example:
        >>> patterns = 2 * torch.randint(2, (1024, 64)).float() - 1
        >>> memory = SpinMemoryEnergy(patterns)
        >>> cue = patterns[:20].clone()
        >>> cue[:, :6] *= -1  # every tenth spin is wrong
        >>> memory.retrieve(cue).state.equal(patterns[:20])
        True
    """

    def __init__(self, patterns: Tensor, sharpness: float = 1.0) -> None:
        super().__init__(patterns)
        self.sharpness = require_sharpness(sharpness)

    def from_overlaps(self, overlaps: Tensor) -> Tensor:
        """Evaluate (2), ``(*batch, P)`` to ``(*batch,)``."""
        return -torch.logsumexp(self.sharpness * overlaps, -1)  # (2)

    def closed_form(self) -> ClosedForm:
        r"""The mixture of independent spins with :math:`\log Z` of (3).

        Exactness: *exact*.
        """
        fields = self.sharpness * self.patterns
        log_weights = log_two_cosh(fields).sum(-1)
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights, validate_args=False),
            Spin(fields, validate_args=False).to_event(1),
            validate_args=False,
        )
        return ClosedForm(torch.logsumexp(log_weights, -1), mixture)  # (3)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"num_patterns={len(self.patterns)}, sharpness={self.sharpness}"


def require_patterns(patterns: Tensor) -> Tensor:
    """The patterns, after a check.

    Raises:
        ValueError: If they are no matrix of finite numbers.
    """
    if patterns.dim() != 2 or not patterns.numel() or not patterns.isfinite().all():
        raise ValueError(
            "patterns must be a matrix of finite numbers, one pattern a row, shape "
            f"(P, N) with P and N at least 1; got shape {tuple(patterns.shape)}."
        )
    return patterns


def require_sharpness(sharpness: float) -> float:
    """The sharpness, after a check.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be positive and finite, got {sharpness}.")
    return float(sharpness)


def keep(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a tensor: as a parameter if it is one, so that it is learned."""
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, tensor)
    else:
        module.register_buffer(name, tensor)
