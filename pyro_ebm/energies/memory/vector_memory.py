r"""The associative memory of vectors, whose descent is attention.

With patterns :math:`\xi^1, \dots, \xi^P` and log-weights :math:`\ell`,

.. math::
    f(x) &= \frac\beta2 |x|^2 - \log \sum_\mu e^{\ell_\mu + \beta\, \xi^\mu \cdot x}
        \tag{1} \\
    \nabla f(x) &= \beta\, (x - \textstyle\sum_\mu p_\mu \xi^\mu), \qquad
        p = \mathrm{softmax}_\mu(\ell_\mu + \beta\, \xi^\mu \cdot x)        \tag{2} \\
    x &\leftarrow \textstyle\sum_\mu p_\mu \xi^\mu                          \tag{3}

The update (3) is one head of attention with :math:`x` as the query and the patterns as
keys and values; it never raises the energy. Completing the square in (1),

.. math::
    e^{-f(x)} &= \sum_\mu e^{\ell_\mu + \beta |\xi^\mu|^2 / 2}\,
        e^{-\beta |x - \xi^\mu|^2 / 2}                                        \\
    \log Z &= \frac D2 \log \frac{2\pi}\beta
        + \log \sum_\mu e^{\ell_\mu + \beta |\xi^\mu|^2 / 2}                \tag{4}

So the memory is a mixture of Gaussians, (3) is an EM step for where a draw was before
noise was added (the mean shift), and with :math:`\ell_\mu = -\beta |\xi^\mu|^2 / 2` the
memory that stores a data set is its kernel density estimate.

References:
    Ramsauer et al. (2021), Hopfield networks is all you need, ICLR.
    Cheng (1995), IEEE Transactions on Pattern Analysis 17, 790-799 (the mean shift).
"""

__all__ = ["VectorMemoryEnergy"]

import math
from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.memory.associative_memory import (
    Retrieval,
    keep,
    require_patterns,
    require_sharpness,
)


@final
class VectorMemoryEnergy(Energy):
    r"""The memory (1) over vectors, a mixture of Gaussians with equal precision.

    Without ``logits`` longer patterns weigh more, by (4).

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
        super().__init__(require_patterns(patterns).shape[1:])
        self.sharpness = require_sharpness(sharpness)
        keep(self, "patterns", patterns)
        logits = (
            patterns.detach().new_zeros(len(patterns)) if logits is None else logits
        )
        if logits.shape != patterns.shape[:1] or not logits.isfinite().all():
            raise ValueError(
                f"logits must be {len(patterns)} finite numbers, one for each of the "
                f"patterns; got shape {tuple(logits.shape)}: {logits}."
            )
        keep(self, "logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, D)``."""
        log_sum = torch.logsumexp(self._scores(x), -1)
        return self.sharpness / 2 * x.square().sum(-1) - log_sum  # (1)

    @torch.no_grad()
    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and its gradient (2), without autograd."""
        self.batch_shape_of(x)
        return self(x), self.sharpness * (x - self.attend(x))  # (2)

    def attend(self, x: Tensor) -> Tensor:
        """The mean (3) of the patterns as ``x`` sees them, in the shape of ``x``."""
        return self._scores(x).softmax(-1) @ self.patterns  # (3)

    @torch.no_grad()
    def retrieve(
        self, cue: Tensor, *, max_steps: int = 1000, tolerance: float = 1e-5
    ) -> Retrieval:
        """Repeat the update (3) until it moves no coordinate by ``tolerance``.

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
        r"""The mixture of Gaussians with :math:`\log Z` of (4). Exactness: *exact*."""
        size, beta = self.event_shape.numel(), self.sharpness
        log_weights = self.logits + beta / 2 * self.patterns.square().sum(-1)
        scale = self.patterns.new_full((), beta**-0.5)
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights, validate_args=False),
            dist.Normal(self.patterns, scale, validate_args=False).to_event(1),
            validate_args=False,
        )
        log_volume = size / 2 * math.log(2 * math.pi / beta)
        return ClosedForm(torch.logsumexp(log_weights, -1) + log_volume, mixture)  # (4)

    def _scores(self, x: Tensor) -> Tensor:
        return self.logits + self.sharpness * (x @ self.patterns.mT)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"num_patterns={len(self.patterns)}, sharpness={self.sharpness}"
