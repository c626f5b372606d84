r"""Associative memories: patterns are stored as minima of the energy.

**Spins.** Patterns :math:`\xi^1, \dots, \xi^P` and a state :math:`s \in \{-1, 1\}^N`
meet in their overlaps :math:`u_\mu = \xi^\mu \cdot s`, from :math:`-N` to :math:`N`:

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

and the distribution is a mixture of independent spins, which is sampled exactly. One
spin in a field :math:`h` has

.. math::
    p(s) = e^{h s} / (2 \cosh h), \qquad \mathbb{E}[s] = \tanh h             \tag{8}

**Vectors.** The descent in a memory of vectors is attention. With patterns
:math:`\xi^1, \dots, \xi^P` and log-weights :math:`\ell`,

.. math::
    f(x) &= \frac\beta2 |x|^2 - \log \sum_\mu e^{\ell_\mu + \beta\, \xi^\mu \cdot x}
        \tag{4} \\
    \nabla f(x) &= \beta\, (x - \textstyle\sum_\mu p_\mu \xi^\mu), \qquad
        p = \mathrm{softmax}_\mu(\ell_\mu + \beta\, \xi^\mu \cdot x)        \tag{5} \\
    x &\leftarrow \textstyle\sum_\mu p_\mu \xi^\mu                          \tag{6}

The update (6) is one head of attention with :math:`x` as the query and the patterns as
keys and values; it never raises the energy. Completing the square in (4),

.. math::
    e^{-f(x)} &= \sum_\mu e^{\ell_\mu + \beta |\xi^\mu|^2 / 2}\,
        e^{-\beta |x - \xi^\mu|^2 / 2}                                        \\
    \log Z &= \frac D2 \log \frac{2\pi}\beta
        + \log \sum_\mu e^{\ell_\mu + \beta |\xi^\mu|^2 / 2}                \tag{7}

So the memory is a mixture of Gaussians, (6) is an EM step for where a draw was before
noise was added (the mean shift), and with :math:`\ell_\mu = -\beta |\xi^\mu|^2 / 2` the
memory that stores a data set is its kernel density estimate.

References:
    Hopfield (1982), PNAS 79, 2554-2558. Amit, Gutfreund & Sompolinsky (1985), Physical
    Review Letters 55, 1530-1533 (the 0.14). Krotov & Hopfield (2016), NeurIPS 29.
    Demircigil et al. (2017), Journal of Statistical Physics 168, 288-299.
    Ramsauer et al. (2021), Hopfield networks is all you need, ICLR.
    Cheng (1995), IEEE Transactions on Pattern Analysis 17, 790-799 (the mean shift).
"""

__all__ = [
    "AssociativeMemory",
    "HopfieldEnergy",
    "Retrieval",
    "Spin",
    "SpinMemoryEnergy",
    "VectorMemoryEnergy",
]

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.discrete.finite import spins


class Retrieval(NamedTuple):
    """Result of a retrieval: where the descent from a cue has ended.

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
        shape = _require_patterns(patterns).shape[1:]
        super().__init__(shape, constraints.independent(spins, 1))
        _keep(self, "patterns", patterns)

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
        self.sharpness = _require_sharpness(sharpness)

    def from_overlaps(self, overlaps: Tensor) -> Tensor:
        """Evaluate (2), ``(*batch, P)`` to ``(*batch,)``."""
        return -torch.logsumexp(self.sharpness * overlaps, -1)  # (2)

    def closed_form(self) -> ClosedForm:
        r"""The mixture of independent spins with :math:`\log Z` of (3).

        Exactness: *exact*.
        """
        fields = self.sharpness * self.patterns
        log_weights = _log_two_cosh(fields).sum(-1)
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights, validate_args=False),
            Spin(fields, validate_args=False).to_event(1),
            validate_args=False,
        )
        return ClosedForm(torch.logsumexp(log_weights, -1), mixture)  # (3)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"num_patterns={len(self.patterns)}, sharpness={self.sharpness}"


@final
class Spin(dist.TorchDistribution):
    r"""A spin -1 or +1 in a field, eq. (8); a Bernoulli variable by another name.

    Args:
        field: :math:`h` in nats, any shape: that of the batch.

    Exactness: ``log_prob`` is *exact*.

    Example:
        >>> spin = Spin(torch.tensor([0.0, 20.0]))
        >>> spin.mean, spin.log_prob(torch.ones(2))
        (tensor([0., 1.]), tensor([-0.6931,  0.0000]))
    """

    arg_constraints = {"field": constraints.real}
    support = spins

    def __init__(
        self,
        field: Tensor,
        validate_args: bool | None = None,  # noqa: FBT001
    ) -> None:
        self.field = field
        super().__init__(field.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean (8), shape of the batch."""
        return self.field.tanh()

    @property
    def variance(self) -> Tensor:
        """One less the squared mean."""
        return 1 - self.mean.square()

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Spin":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        new.field = self.field.expand(torch.Size(batch_shape))
        super(Spin, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample, *batch)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        up = torch.bernoulli((2 * self.field.detach()).sigmoid().expand(shape))
        return 2 * up - 1

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability (8) in nats, shape ``(*sample, *batch)``."""
        if self._validate_args:
            self._validate_sample(x)
        return self.field * x - _log_two_cosh(self.field)  # (8)


def _log_two_cosh(field: Tensor) -> Tensor:
    """The log partition function of a spin in a field, without overflow."""
    return torch.logaddexp(field, -field)


def _require_patterns(patterns: Tensor) -> Tensor:
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


def _require_sharpness(sharpness: float) -> float:
    """The sharpness, after a check.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be positive and finite, got {sharpness}.")
    return float(sharpness)


def _keep(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a tensor: as a parameter if it is one, so that it is learned."""
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, tensor)
    else:
        module.register_buffer(name, tensor)


@final
class VectorMemoryEnergy(Energy):
    r"""The memory (4) over vectors, a mixture of Gaussians with equal precision.

    Without ``logits`` longer patterns weigh more, by (7).

    Args:
        patterns: :math:`\xi`, shape ``(P, D)``; a ``nn.Parameter`` is learned.
        sharpness: :math:`\beta > 0`, the precision of the Gaussians.
        logits: :math:`\ell`, shape ``(P,)``; default: zeros. A ``nn.Parameter`` is
            learned.

    Raises:
        ValueError: If ``patterns`` is no matrix of finite numbers, the sharpness is
            not positive, or ``logits`` are not ``P`` finite numbers.

    Example:
        >>> patterns = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> memory = VectorMemoryEnergy(patterns, sharpness=20.0)
        >>> memory.retrieve(torch.tensor([0.7, 0.2])).state
        tensor([1.0000e+00, 2.0612e-09])
    """

    patterns: Tensor
    logits: Tensor

    def __init__(
        self, patterns: Tensor, sharpness: float = 1.0, logits: Tensor | None = None
    ) -> None:
        super().__init__(_require_patterns(patterns).shape[1:])
        self.sharpness = _require_sharpness(sharpness)
        _keep(self, "patterns", patterns)
        logits = (
            patterns.detach().new_zeros(len(patterns)) if logits is None else logits
        )
        if logits.shape != patterns.shape[:1] or not logits.isfinite().all():
            raise ValueError(
                f"logits must be {len(patterns)} finite numbers, one for each of the "
                f"patterns; got shape {tuple(logits.shape)}: {logits}."
            )
        _keep(self, "logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (4) at ``x`` of shape ``(*batch, D)``."""
        log_sum = torch.logsumexp(self._scores(x), -1)
        return self.sharpness / 2 * x.square().sum(-1) - log_sum  # (4)

    @torch.no_grad()
    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and its gradient (5), without autograd."""
        self.batch_shape_of(x)
        return self(x), self.sharpness * (x - self.attend(x))  # (5)

    def attend(self, x: Tensor) -> Tensor:
        """The mean (6) of the patterns as ``x`` sees them, in the shape of ``x``."""
        return self._scores(x).softmax(-1) @ self.patterns  # (6)

    @torch.no_grad()
    def retrieve(
        self, cue: Tensor, *, max_steps: int = 1000, tolerance: float = 1e-5
    ) -> Retrieval:
        """Repeat the update (6) until it moves no coordinate by ``tolerance``.

        Args:
            cue: Points to start from, shape ``(*batch, D)``.
            max_steps: Updates after which to stop, at least 1.
            tolerance: In units of ``x``.

        Raises:
            ValueError: If a cue is not finite, or ``max_steps`` is below 1.
        """
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
        self.batch_shape_of(cue)
        if not cue.isfinite().all():
            raise ValueError("cue must be finite, got nan or inf. Leave such cues out.")
        state, num_steps = cue, 0
        converged = torch.zeros_like(cue[..., 0], dtype=torch.bool)
        while num_steps < max_steps and not converged.all():
            before, state = state, self.attend(state)
            converged = ((state - before).abs() <= tolerance).all(-1)
            num_steps += 1
        return Retrieval(state, converged, num_steps)

    def closed_form(self) -> ClosedForm:
        r"""The mixture of Gaussians with :math:`\log Z` of (7). Exactness: *exact*."""
        size, beta = self.event_shape.numel(), self.sharpness
        log_weights = self.logits + beta / 2 * self.patterns.square().sum(-1)
        scale = self.patterns.new_full((), beta**-0.5)
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights, validate_args=False),
            dist.Normal(self.patterns, scale, validate_args=False).to_event(1),
            validate_args=False,
        )
        log_volume = size / 2 * math.log(2 * math.pi / beta)
        return ClosedForm(torch.logsumexp(log_weights, -1) + log_volume, mixture)  # (7)

    def _scores(self, x: Tensor) -> Tensor:
        return self.logits + self.sharpness * (x @ self.patterns.mT)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"num_patterns={len(self.patterns)}, sharpness={self.sharpness}"
