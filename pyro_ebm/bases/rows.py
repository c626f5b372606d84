"""Data as rows of numbers in unconstrained space."""

__all__ = ["Rows", "repetitions", "shuffled", "split", "split_indices"]

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint

#: Share of the rows that are held out, and the least of them.
_HELD_OUT, _FEWEST = 0.15, 2
#: Rows are nearly equal that are so much nearer than the ordinary ones of a
#: neighbourhood. Rows that tell whether there are such, the share of them that says so,
#: and the most rows that are then compared with each other.
_NEAR, _LOOKED_AT, _SHARE, _MOST = 0.01, 200, 0.2, 10_000
#: Chance of such a neighbour among rows that are spread evenly.
_BY_CHANCE = 0.05
#: Links from row to row that are followed, and distances that are held at once.
_LINKS, _CHUNK = 5, 10_000_000


class Rows(NamedTuple):
    """Data in unconstrained space, and the way back.

    Attributes:
        u: Shape ``(N, D)``.
        event_shape: Of a row as it was given.
        to_support: From ``(D,)`` to the row; ``None`` where that is a reshape alone.
    """

    u: Tensor
    event_shape: torch.Size
    to_support: Transform | None

    @staticmethod
    def of(data: Tensor, support: Constraint | None) -> "Rows":
        """Rows of data.

        Args:
            data: Shape ``(N, *event)``, floating-point, with at least two rows.
            support: Of a row; default: all real numbers.

        Raises:
            TypeError: If ``data`` is no floating-point tensor.
            ValueError: If there are fewer than two rows, or some entry is not finite or
                not in the interior of the support.
        """
        if not isinstance(data, Tensor) or not data.is_floating_point():
            kind = data.dtype if isinstance(data, Tensor) else type(data).__name__
            raise TypeError(
                f"data must be a floating-point tensor, got {kind}. Convert it by "
                "torch.as_tensor(data, dtype=torch.float32)."
            )
        if data.dim() == 0 or len(data) < _FEWEST:
            raise ValueError(
                f"data must have shape (N, *event) with N >= {_FEWEST}, got "
                f"{tuple(data.shape)}."
            )
        data = data.detach()
        to_support = None if support is None else biject_to(support)
        u = data if to_support is None else to_support.inv(data)
        u = u.reshape(len(data), -1)
        is_bad = ~u.isfinite().all(-1)
        if is_bad.any():
            where = "finite" if support is None else f"inside of {support}"
            raise ValueError(
                f"data must be {where}; {int(is_bad.sum())} of {len(data)} rows are "
                f"not, the first of them row {int(is_bad.nonzero()[0])}. Drop these "
                "rows, or move them off the boundary."
            )
        return Rows(u, data.shape[1:], to_support)

    @staticmethod
    def like(
        over_rows: dist.TorchDistribution,
        event_shape: torch.Size,
        support: Constraint | None,
    ) -> "Rows":
        """Rows of the shape and support that a density over ``(D,)`` belongs to."""
        to_support = None if support is None else biject_to(support)
        empty = torch.empty((0, *over_rows.event_shape))
        return Rows(empty, event_shape, to_support)

    def distribution(self, over_rows: dist.TorchDistribution) -> dist.TorchDistribution:
        """A distribution over ``(D,)`` as one over the rows as they were given."""
        transforms: list[Transform] = []
        flat = self.event_shape
        if self.to_support is not None:
            flat = torch.Size(self.to_support.inverse_shape(self.event_shape))
        if flat != over_rows.event_shape:
            reshape = torch.distributions.transforms.ReshapeTransform
            transforms.append(reshape(over_rows.event_shape, flat))
        if self.to_support is not None:
            transforms.append(self.to_support)
        if not transforms:
            return over_rows
        return dist.TransformedDistribution(over_rows, transforms, validate_args=False)


def split(data: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit to, and about a seventh of them held out.

    Args:
        data: Shape ``(N, *event)``.
        seed: Of the choice of rows, which leaves torch's own stream as it is.
    """
    train, apart = split_indices(data, seed)
    return data[train.to(data.device)], data[apart.to(data.device)]


def split_indices(
    data: Tensor, seed: int, *, is_finite: bool = False
) -> tuple[Tensor, Tensor]:
    """Of the rows of :func:`split`, those to fit to and those held out.

    Equal rows, and nearly equal ones, are on the same side: else a density of spikes at
    rows that were seen would be taken for the best. Over a finite support there are no
    spikes, and rows are equal because few can differ: there each is held out by chance.
    """
    if is_finite:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data), generator=generator)
        number = max(1, round(_HELD_OUT * len(order)))
        return order[number:], order[:number]
    order, kind = _kinds_shuffled(data, seed)
    number = max(1, round(_HELD_OUT * len(order)))
    ends = 1 + kind.diff().nonzero()[:, 0]
    ends = ends[(ends >= number) & (ends <= len(order) // 2)]
    number = int(ends[0]) if len(ends) else number
    return order[number:], order[:number]


def shuffled(data: Tensor, seed: int) -> Tensor:
    """Indices of rows in a random order, but for equal rows, which are neighbours."""
    return _kinds_shuffled(data, seed)[0]


def _kinds_shuffled(data: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of :func:`shuffled`, and numbers that (nearly) equal rows share."""
    number, generator = len(data), torch.Generator().manual_seed(seed)
    order = torch.randperm(number, generator=generator)
    rows = data.reshape(number, -1).detach().cpu()[order].double()
    # Rows are equal where a random combination of their numbers is.
    combined = rows * torch.randn(rows.shape[1], generator=generator).double()
    _, value = combined.sum(1).unique(return_inverse=True)
    places = torch.arange(number)
    first = places.scatter_reduce(0, value, places, "amin", include_self=False)[value]
    if number <= _MOST and number > 2:
        near = _first_near(rows, places[-_LOOKED_AT:])
        if float((near < first[-_LOOKED_AT:]).double().mean()) >= _SHARE:
            first = torch.minimum(first, _first_near(rows, places))
            for _ in range(_LINKS):
                first = first[first]
    index = first.argsort(stable=True)
    return order[index], first[index]


def _first_near(rows: Tensor, index: Tensor) -> Tensor:
    r"""The first row that each of some rows nearly equals, shape ``(n,)``.

    That is relative to the distance of the neighbour of rank about :math:`\sqrt N`, and
    hardly ever by chance.
    """
    scale = rows.std(0, correction=0)
    z = (rows - rows.mean(0)) / scale.where(scale > 0, 1.0)
    rank = min(len(z), 10 + math.isqrt(len(z)))
    near = min(_NEAR, (_BY_CHANCE / rank) ** (1 / max(1, int((scale > 0).sum()))))
    found = []
    for part in index.split(max(1, _CHUNK // len(z))):
        apart = torch.cdist(z[part], z)
        limit = near * apart.kthvalue(rank, 1, keepdim=True).values
        is_near = (apart <= limit).scatter(1, part[:, None], value=True)
        found.append(is_near.int().argmax(1))
    return torch.cat(found)


def repetitions(weights: Tensor, offset: float = 0.5) -> Tensor:
    """Indices of rows, each as often as its weight says (systematic resampling).

    Args:
        weights: Shape ``(N,)``, nonnegative, not all 0. Where they are whole numbers of
            a sum up to ``10 N`` each row comes exactly so many times; otherwise there
            are ``N`` indices, and a row comes as often as its share, up or down.
        offset: From 0 to 1, uniform for counts that are right in the mean.
    """
    weights = weights.double()
    total, number = float(weights.sum()), len(weights)
    if bool((weights == weights.round()).all()) and total <= 10 * number:
        number = round(total)
    edges = (weights.cumsum(0) * (number / total) + offset).floor().long()
    edges[-1] = number
    counts = edges.diff(prepend=torch.zeros_like(edges[:1]))
    return torch.arange(len(weights), device=weights.device).repeat_interleave(counts)
