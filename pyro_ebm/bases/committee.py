r"""A committee: many mixtures of normals as one, weighted by rows they have not seen.

The rows are cut into :math:`F` parts. Each setting :math:`s`, a number of components
and a floor of the variances, is fitted :math:`F` times, without part :math:`f` in turn,
which gives each row a density by a fit that has not seen it. The committee is

.. math::
    p(x) = \sum_s w_s \frac1F \sum_f p_{s, -f}(x), \qquad
    w = \arg\max_w \sum_i \log \sum_s w_s\, p_{s, -f(i)}(x_i)                \tag{1}

By Jensen's inequality it is at least as good as a member of it in the mean; and all
rows serve both to fit and to choose. Where there are fifty rows for each parameter of
a mixture of 32 there are two parts and no floor, and the time that this saves goes to
larger mixtures: up to 256 components, with five rows for each parameter.

Where entries are missing all of this is by what was seen: each mixture is fitted to
rows that a small one has filled, and goes on with expectation maximisation for
incomplete rows (:mod:`~pyro_ebm.bases.conditional`); (1) has the density of what was
seen.

References:
    Smyth & Wolpert (1999), Machine Learning 36, 59-83.
    Ormoneit & Tresp (1998), IEEE Trans. Neural Networks 9, 639-650.
"""

__all__ = ["committee"]

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.conditional import (
    conditional_draws,
    fitted_incomplete,
    seen_log_prob,
)
from pyro_ebm.bases.mixture import (
    NUMBERS,
    ROWS_EACH,
    NormalMixture,
    fitted_mixture,
    imported,
    joined_mixture,
)
from pyro_ebm.bases.rows import Rows, repetitions, shuffled
from pyro_ebm.bases.stack import stacking_weights
from pyro_ebm.core.stopwatch import Stopwatch

#: Parts of the rows, floors of the variances relative to the columns', and the weight
#: from which on a setting is kept.
_PARTS, _FLOORS, _LEAST = 5, (1e-6, 1e-2, 1e-1), 0.02
#: Rows for each parameter of the largest mixture that are many, and parts of these.
_MANY, _PARTS_OF_MANY = 50, 2
#: Larger mixtures, and the rows for each of their parameters.
_LARGE, _ROWS_OF_LARGE = (64, 128, 256), 5
#: Rows that a member is fitted to, at most.
_MAX_ROWS = 20_000
#: Components, and rows for each, of the mixture that fills missing entries first.
_SMALL, _ROWS_OF_SMALL = 2, 50


def committee(
    data: Tensor,
    *,
    support: Constraint | None = None,
    weights: Tensor | None = None,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> dist.TorchDistribution:
    """The committee (1) of Gaussian mixtures of 1, 2, 4, ... 32 components, or more.

    Args:
        data: Shape ``(N, *event)``. Of vectors of real numbers, ``nan`` is an entry
            that is missing, at random given the others of its row.
        support: Of a row; the mixtures are then in unconstrained space, pushed to the
            support. Default: all real numbers.
        weights: Of the rows, shape ``(N,)``: in (1), and by repetitions of the rows
            that a member is fitted to. Default: all equal.
        max_seconds: Seconds that it may take; larger mixtures are tried only where
            there is time for them.
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
    missing = None
    if isinstance(data, Tensor) and data.dim() == 2 and support is None:
        missing = data.isnan() if bool(data.isnan().any()) else None
        data = data if missing is None else _started(data, missing)
    rows = Rows.of(data, support)
    share = torch.ones(len(rows.u)) if weights is None else weights.cpu()
    count = int((share > 0).sum())
    if count < 3:
        raise ValueError(
            f"data must have at least 3 rows for a committee, got {count}. Use "
            "pyro_ebm.bases.normal."
        )
    u, order = rows.u, _order(rows.u, share, seed)
    is_many = _has_many(share[order], u.shape[1])
    parts = order.chunk(_PARTS_OF_MANY if is_many else _PARTS)
    if missing is not None:
        small = max(1, min(_SMALL, len(order) // _ROWS_OF_SMALL))
        index = order[repetitions(share[order])]
        found = fitted_incomplete(u[index], missing[index], small, seed, _FLOORS[0])
        u = conditional_draws(found, u, missing, 1)[0]
    return rows.distribution(_assembled(u, missing, parts, share, max_seconds, seed))


def _started(data: Tensor, missing: Tensor) -> Tensor:
    """Rows whose missing entries are draws of what was seen in their column.

    Raises:
        ValueError: If nothing was seen in a column.
    """
    filled = data.clone()
    for column in range(data.shape[1]):
        gone = missing[:, column]
        if gone.all():
            raise ValueError(
                f"data has no entry at all in column {column}. Leave it out."
            )
        known = data[~gone, column]
        filled[gone, column] = known[torch.randint(len(known), (int(gone.sum()),))]
    return filled


def _assembled(
    u: Tensor,
    missing: Tensor | None,
    parts: Sequence[Tensor],
    share: Tensor,
    max_seconds: float,
    seed: int,
) -> NormalMixture:
    """The mixture (1).

    Args:
        u: Rows, shape ``(N, D)``.
        missing: Entries that are not what was seen, or ``None``.
        parts: Indices of rows.
        share: Weights of the rows.
        max_seconds: That it may take.
        seed: Of the first components.
    """
    imported()  # which is no measure of what larger mixtures take
    watch, began, members, unseen = Stopwatch(), 0.0, [], []
    order = torch.cat(tuple(parts))
    fewest = len(order) - max(map(len, parts))
    is_many = _has_many(share[order], u.shape[1])
    floors = _FLOORS[:1] if is_many else _FLOORS
    for number in NUMBERS + _LARGE:
        # The next takes about twice the time of the last.
        is_late = 3 * watch.seconds - 2 * began > max_seconds
        began = watch.seconds
        few = number * ROWS_EACH
        if number in _LARGE:
            few = _ROWS_OF_LARGE * _num_parameters(number, u.shape[1])
        if number > 1 and (is_late or few > fewest):
            break
        for floor in floors:
            fits, values = _fits(u, missing, parts, share, number, floor, seed)
            members.append(fits)
            unseen.append(values)
    chances = stacking_weights(torch.stack(unseen), share[order])
    kept = (chances >= _LEAST).nonzero().flatten().tolist()
    shares = (chances[kept] / chances[kept].sum()).repeat_interleave(len(parts))
    chosen = [fit for index in kept for fit in members[index]]
    return joined_mixture(chosen, shares / len(parts))


def _has_many(share: Tensor, dim: int) -> bool:
    """Whether there are rows enough for the largest mixture to fit them as they are.

    Of rows with weights, shape ``(N,)``, the effective number counts.
    """
    number = float(share.sum().square() / share.square().sum())
    return number >= _MANY * _num_parameters(NUMBERS[-1], dim)


def _num_parameters(number: int, dim: int) -> int:
    return number * (dim + 1) * (dim + 2) // 2


def _order(u: Tensor, share: Tensor, seed: int) -> Tensor:
    """Rows that count, shuffled; not too many."""
    order = shuffled(u, seed)
    return order[share[order] > 0][:_MAX_ROWS]


def _fits(
    u: Tensor,
    missing: Tensor | None,
    parts: Sequence[Tensor],
    share: Tensor,
    number: int,
    floor: float,
    seed: int,
) -> tuple[list[NormalMixture], Tensor]:
    """A fit without each part, and its log density there; shape ``(N,)``."""
    fits, values = [], []
    for part in parts:
        others = torch.cat([other for other in parts if other is not part])
        if not bool((share[others] == 1).all()):
            others = others[repetitions(share[others])]
        if missing is None:
            fits.append(fitted_mixture(u[others], number, seed, floor))
            values.append(fits[-1].log_prob(u[part]))
        else:
            at = u[others], missing[others]
            fits.append(fitted_incomplete(*at, number, seed, floor))
            values.append(seen_log_prob(fits[-1], u[part], missing[part]))
    return fits, torch.cat(values)
