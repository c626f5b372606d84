r"""Stacking: a mixture of fitted densities, weighted by what held-out rows say.

.. math::
    p(x) = \sum_k w_k\, p_k(x), \qquad
    w = \arg\max_w \sum_{i \text{ held out}} \log \sum_k w_k\, p_k(x_i)      \tag{1}

The weights are found by expectation maximisation, for which (1) is concave. Parts of
little weight are left out.

References:
    Smyth & Wolpert (1999), Machine Learning 36, 59-83.
"""

__all__ = ["Stack", "stacked", "stacking_weights"]

from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

#: Steps of expectation maximisation, and the weight from which on a part is kept.
_STEPS, _LEAST = 200, 0.02
#: Rows that are evaluated at once: kernels take a thousand numbers for each.
_ROWS = 2000


@final
class Stack(dist.TorchDistribution):
    """A mixture of distributions of different kinds over the same event.

    Args:
        parts: Normalised, with empty batch shapes and the same support.
        probs: Their weights, shape ``(K,)``, which sum to one.
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(self, parts: Sequence[dist.TorchDistribution], probs: Tensor) -> None:
        self.parts, self.probs = tuple(parts), probs
        super().__init__(torch.Size(), parts[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the parts."""
        support: Any = self.parts[0].support
        return support

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (1) at ``(*batch, *event)``, shape ``(*batch,)``."""
        rows = value.reshape(-1, *self.event_shape)
        found = [
            torch.stack([part.log_prob(x) for part in self.parts], -1)
            for x in rows.split(_ROWS)
        ]
        at_rows = torch.cat(found) + self.probs.log()
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return at_rows.logsumexp(-1).reshape(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``(*sample, *event)``."""
        shape = torch.Size(sample_shape)
        number = shape.numel()
        chosen = torch.multinomial(self.probs, number, replacement=True)
        counts = torch.bincount(chosen, minlength=len(self.parts)).tolist()
        pairs = zip(self.parts, counts, strict=True)
        draws = torch.cat([part.sample((count,)) for part, count in pairs if count])
        order = torch.randperm(number, device=draws.device)
        return draws[order].reshape(shape + self.event_shape)


@torch.no_grad()
def stacked(parts: Sequence[dist.TorchDistribution], held_out: Tensor) -> Stack:
    """The mixture (1) of densities that were fitted to other rows.

    Args:
        parts: Fitted densities.
        held_out: Rows that none of them has seen, shape ``(N, *event)``.

    Exactness: the *largest likelihood* over the weights, but for those left out.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> parts = [dist.Normal(-2.0, 1.0), dist.Normal(2.0, 1.0)]
        >>> data = torch.cat([torch.randn(300) - 2, torch.randn(100) + 2])
        >>> stacked(parts, data).probs.round(decimals=1)
        tensor([0.8000, 0.2000])
    """
    at_rows = torch.stack([part.log_prob(held_out) for part in parts])
    probs = stacking_weights(at_rows)
    kept = [part for part, share in zip(parts, probs, strict=True) if share >= _LEAST]
    probs = probs[probs >= _LEAST]
    return Stack(kept, probs / probs.sum())


def stacking_weights(at_rows: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """The weights (1), shape ``(K,)``.

    Args:
        at_rows: Log densities of ``K`` parts at rows that they have not seen, shape
            ``(K, N)``; rows that no part can have say nothing.
        row_weights: Of the rows in the sum, shape ``(N,)``; default: all equal.
    """
    at_rows = at_rows.nan_to_num(nan=-torch.inf)
    counts = at_rows.isfinite().any(0)
    at_rows = at_rows[:, counts]
    if row_weights is None:
        row_weights = torch.ones(len(counts), device=counts.device)
    shares = row_weights[counts].to(at_rows) / row_weights[counts].sum()
    probs = torch.full_like(at_rows[:, 0], 1 / len(at_rows))
    for _ in range(_STEPS):
        probs = (at_rows + probs.log()[:, None]).softmax(0) @ shares
    return probs
