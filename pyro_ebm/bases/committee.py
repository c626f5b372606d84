r"""A committee: many mixtures of normals as one, weighted by rows they have not seen.

The rows are cut into :math:`F` parts. Each setting :math:`s`, a number of components
and a floor of the variances, is fitted :math:`F` times, without part :math:`f` in turn,
which gives each row a density by a fit that has not seen it. The committee is

.. math::
    p(x) = \sum_s w_s \frac1F \sum_f p_{s, -f}(x), \qquad
    w = \arg\max_w \sum_i \log \sum_s w_s\, p_{s, -f(i)}(x_i)                \tag{1}

By Jensen's inequality it is at least as good as a member of it in the mean; and all
rows serve both to fit and to choose.

References:
    Smyth & Wolpert (1999), Machine Learning 36, 59-83.
    Ormoneit & Tresp (1998), IEEE Trans. Neural Networks 9, 639-650.
"""

__all__ = ["committee"]

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.mixture import (
    NUMBERS,
    ROWS_EACH,
    Mixture,
    fitted_mixture,
    joined_mixture,
)
from pyro_ebm.bases.rows import Rows
from pyro_ebm.bases.stack import stacking_weights
from pyro_ebm.core.stopwatch import Stopwatch

#: Parts of the rows, floors of the variances relative to the columns', and the weight
#: from which on a setting is kept.
_PARTS, _FLOORS, _LEAST = 5, (1e-6, 1e-2, 1e-1), 0.02
#: Rows that a member is fitted to, at most.
_MAX_ROWS = 20_000


def committee(
    data: Tensor,
    *,
    support: Constraint | None = None,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> dist.TorchDistribution:
    """The committee (1) of Gaussian mixtures of 1, 2, 4, ... 32 components.

    Args:
        data: Shape ``(N, *event)``.
        support: Of a row; the mixtures are then in unconstrained space, pushed to the
            support. Default: all real numbers.
        max_seconds: Seconds after which no larger mixtures are tried.
        seed: Of the parts, and of the first components.

    Returns:
        A normalised Pyro distribution over the event: one mixture, of a few hundred
        components.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are fewer than three rows, or the data do not fit, see
            :class:`~pyro_ebm.bases.rows.Rows`.

    Exactness: each member is a *local maximum* of its likelihood.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> data = torch.cat([torch.randn(150, 2) - 4, torch.randn(150, 2) + 4])
        >>> base = committee(data)
        >>> base.event_shape, len(base.loc) > 2
        (torch.Size([2]), True)
    """
    rows = Rows.of(data, support)
    if len(rows.u) < 3:
        raise ValueError(
            f"data must have at least 3 rows for a committee, got {len(rows.u)}. Use "
            "pyro_ebm.bases.normal."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows.u), generator=generator)[:_MAX_ROWS]
    parts = order.chunk(min(_PARTS, len(order)))
    watch, members, unseen = Stopwatch(), [], []
    for number in NUMBERS:
        fewest = len(order) - max(map(len, parts))
        is_late = watch.seconds > max_seconds
        if number > 1 and (is_late or number * ROWS_EACH > fewest):
            break
        for floor in _FLOORS:
            fits, values = _fits(rows.u, parts, number, floor, seed)
            members.append(fits)
            unseen.append(values)
    weights = stacking_weights(torch.stack(unseen))
    kept = (weights >= _LEAST).nonzero().flatten().tolist()
    shares = (weights[kept] / weights[kept].sum()).repeat_interleave(len(parts))
    chosen = [fit for index in kept for fit in members[index]]
    return rows.distribution(joined_mixture(chosen, shares / len(parts)))


def _fits(
    u: Tensor, parts: tuple[Tensor, ...], number: int, floor: float, seed: int
) -> tuple[list[Mixture], Tensor]:
    """A fit without each part, and its log density there; shape ``(N,)``."""
    fits, values = [], []
    for part in parts:
        others = torch.cat([other for other in parts if other is not part])
        fits.append(fitted_mixture(u[others], number, seed, floor))
        values.append(fits[-1].log_prob(u[part]))
    return fits, torch.cat(values)
