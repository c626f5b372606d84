r"""Supports of mixed events: vectors with real columns and columns of few states.

A mixed support :math:`\mathcal{X} = \mathcal{R} \times \mathcal{F}` is split here, once
for all who ask: into the columns of real numbers, on an interval or not, and those of
finitely many integers, with the support of either part. torch writes it as
``constraints.cat`` along the last dimension, whose own ``check`` does not tell rows
from columns.
"""

__all__ = [
    "MixedSupport",
    "of_columns",
    "require_not_mixed",
    "scalar_of",
    "states_of",
    "support_at",
]

import copy
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, final

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    CatTransform,
    IndependentTransform,
    identity_transform,
)

#: Integers that are looked at for the states of a column which names no ends.
_REACH = 1000


@final
class MixedSupport(Constraint):
    """Vectors of which each column is real, on an interval or not, or of few states.

    An energy makes it of ``constraints.cat([...], dim=-1, lengths=[...])``.

    Args:
        columns: The constraint of each column, for numbers; of both kinds.

    Raises:
        ValueError: If the columns are all of one kind, one has infinitely many
            integers, or those of few states do not begin at the same number.

    Example:
        >>> real, bit = dist.constraints.real, dist.constraints.boolean
        >>> support = MixedSupport([real, real, bit])
        >>> support.check(torch.tensor([[0.3, -2.0, 1.0], [0.3, -2.0, 0.5]]))
        tensor([ True, False])
        >>> support.real, support.finite, support
        ((0, 1), (2,), MixedSupport(0-1: Real(), 2: Boolean()))
    """

    is_discrete = True  # no gradient leads along all of it
    event_dim = 1

    def __init__(self, columns: Iterable[Constraint]) -> None:
        self.columns = tuple(columns)
        kinds = [column.is_discrete for column in self.columns]
        for number, column in enumerate(self.columns):
            if column.event_dim or (kinds[number] and not len(states_of(column))):
                raise ValueError(
                    f"column {number} must be a number on an interval or one of "
                    f"finitely many integers, got {column}. Take real, positive, "
                    "interval(a, b), boolean or integer_interval(a, b)."
                )
        self.real = tuple(n for n, is_finite in enumerate(kinds) if not is_finite)
        self.finite = tuple(n for n, is_finite in enumerate(kinds) if is_finite)
        if not (self.real and self.finite):
            raise ValueError(
                "columns must be of both kinds, real and of finitely many states; got "
                f"{_shown(self.columns)}. Others are independent(constraint, 1)."
            )
        self.real_support, self.finite_support = (
            self.at(self.real),
            self.at(self.finite),
        )

    def check(self, value: Tensor) -> Tensor:
        """Which points lie in it, shape ``(*batch,)``."""
        return self.check_columns(value).all(-1)

    def check_columns(self, value: Tensor) -> Tensor:
        """The same of each column, shape of ``value``."""
        parts = value.split(self._lengths, -1)
        runs = zip(self._runs, parts, strict=True)
        return torch.cat([run.check(part) for (run, _), part in runs], -1)

    @property
    def _runs(self) -> list[tuple[Constraint, int]]:
        return _runs(self.columns)

    @property
    def _lengths(self) -> list[int]:
        return [length for _, length in self._runs]

    def at(self, numbers: "Sequence[int] | Tensor") -> Constraint:
        """The support of a vector of some of the columns.

        Args:
            numbers: Of the columns, in the order of the vector.
        """
        listed = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        return _joint([self.columns[number] for number in listed])

    def bijection(self) -> Transform:
        """From points whose real columns are all of the real line, in their order."""
        if all(column is constraints.real for column in self._real_columns):
            return identity_transform
        moves = [
            identity_transform if run.is_discrete else biject_to(run)
            for run, _ in self._runs
        ]
        return IndependentTransform(CatTransform(moves, -1, self._lengths), 1)

    def unconstrained(self) -> "MixedSupport":
        """Where chains move: real columns are all of the real line."""
        free = (c if c.is_discrete else constraints.real for c in self.columns)
        return MixedSupport(free)

    def two_points(self, like: Tensor) -> Tensor:
        """Points where chains move: -1 or 1, and the first or last states; ``(2, D)``.

        Args:
            like: A tensor whose dtype and device they have.
        """
        points = torch.tensor([[-1.0], [1.0]]).to(like).repeat(1, len(self.columns))
        for number in self.finite:
            points[:, number] = states_of(self.columns[number])[[0, -1]].to(like)
        return points

    @property
    def _real_columns(self) -> list[Constraint]:
        return [self.columns[number] for number in self.real]

    def __repr__(self) -> str:
        """The columns, runs of the same together."""
        return f"{type(self).__name__}({_shown(self.columns)})"


def of_columns(support: Constraint, event_shape: Sequence[int]) -> Constraint:
    """A support that names its columns by ``constraints.cat``, in its plain form.

    Args:
        support: Of vectors; any other comes back as it is.
        event_shape: Shape of one point.

    Returns:
        A :class:`MixedSupport` of columns of both kinds, ``independent`` of an
        ``integer_interval`` of columns of few states; else ``support``.

    Raises:
        ValueError: If the lengths do not sum up to that of the vector, or the columns
            do not fit, see :class:`MixedSupport`.

    Example:
        >>> constraints = dist.constraints
        >>> parts = [constraints.real, constraints.boolean]
        >>> of_columns(constraints.cat(parts, dim=-1, lengths=[2, 1]), (3,))
        MixedSupport(0-1: Real(), 2: Boolean())
    """
    cat = scalar_of(support)
    is_vector = len(event_shape) == 1 and getattr(cat, "dim", None) in (-1, 0)
    if not isinstance(cat, constraints.cat) or not cat.is_discrete or not is_vector:
        return support
    if sum(cat.lengths) != event_shape[0]:
        raise ValueError(
            f"support must have as many columns as the event_shape "
            f"{tuple(event_shape)}, got lengths {list(cat.lengths)} of {cat}."
        )
    pairs = zip(cat.cseq, cat.lengths, strict=True)
    return _joint([column for part, n in pairs for column in _columns(part, n)])


def scalar_of(support: Constraint) -> Constraint:
    """The constraint inside all ``independent`` wrappers, that of each number."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def support_at(
    support: Constraint, event_shape: Sequence[int], numbers: "Sequence[int] | Tensor"
) -> Constraint:
    """The support of a vector of some coordinates; bounds may differ between them.

    Args:
        support: Of an energy; it does not tie coordinates together.
        event_shape: Shape of one point.
        numbers: Of the coordinates in the flattened event, as many as the vector has.
    """
    if isinstance(support, MixedSupport):
        return support.at(numbers)
    scalar, shape = scalar_of(support), tuple(event_shape)
    chosen = torch.as_tensor(numbers, dtype=torch.long)
    bounds = {
        name: bound.expand(shape).reshape(-1)[chosen.to(bound.device)]
        for name, bound in vars(scalar).items()
        if isinstance(bound, Tensor) and bound.dim()
    }
    if bounds:
        scalar = copy.copy(scalar)
        vars(scalar).update(bounds)
    return constraints.independent(scalar, 1)


def require_not_mixed(support: Constraint, kernel: str) -> None:
    """Check that a kernel which moves one kind of column has no other.

    Args:
        support: Of an energy.
        kernel: Its name, for the message.

    Raises:
        ValueError: If the support is mixed.
    """
    if isinstance(support, MixedSupport):
        raise ValueError(
            f"{kernel} moves columns of one kind, and the energy is over {support}. "
            "Take one for each part: pyro_ebm.mcmc.Alternating({'real': HMC(), "
            "'finite': Gibbs()})."
        )


def _joint(columns: Sequence[Constraint]) -> Constraint:
    """The support of a vector with these columns."""
    runs = _runs(columns)
    if len({column.is_discrete for column in columns}) == 2:
        return MixedSupport(columns)
    if len(runs) == 1:
        return constraints.independent(columns[0], 1)
    if not columns[0].is_discrete:
        parts, lengths = zip(*runs, strict=True)
        joined = constraints.cat(list(parts), dim=-1, lengths=list(lengths))
        return constraints.independent(joined, 1)
    states = [states_of(column) for column in columns]
    low = int(states[0][0])
    if any(v[0] != low or (v.diff() != 1).any() for v in states):
        raise ValueError(
            "columns of finitely many states must all be spins, or boolean and "
            f"integer_interval(a, b) with the same a; got {_shown(columns)}. Number "
            "the states of each column from 0."
        )
    highs = torch.stack([values[-1] for values in states])
    return constraints.independent(constraints.integer_interval(low, highs), 1)


def _columns(part: Constraint, number: int) -> list[Constraint]:
    """The constraint of each of the columns that one of ``constraints.cat`` is for."""
    part = scalar_of(part)
    bounds = {
        name: bound.expand(number)
        for name, bound in vars(part).items()
        if isinstance(bound, Tensor) and bound.dim()
    }
    if not bounds:
        return [part] * number
    rows = [dict(zip(bounds, row, strict=True)) for row in zip(*bounds.values())]  # noqa: B905
    family: Any = type(part)
    return [family(**{**vars(part), **row}) for row in rows]


def _runs(columns: Sequence[Constraint]) -> list[tuple[Constraint, int]]:
    """Neighbours of the same constraint together, with their number."""
    groups = [list(group) for _, group in groupby(columns, key=repr)]
    return [(group[0], len(group)) for group in groups]


def states_of(column: Constraint) -> Tensor:
    """The values that a column of finitely many integers has, none if it is endless.

    Args:
        column: A discrete constraint of numbers.

    Example:
        >>> states_of(dist.constraints.boolean)
        tensor([0, 1])
    """
    if isinstance(column, constraints.integer_interval):
        return torch.arange(int(column.lower_bound), int(column.upper_bound) + 1)
    some = torch.arange(-_REACH, _REACH + 1)
    inside = column.check(some)
    return some[inside & ~(inside[0] | inside[-1])]


def _shown(columns: Sequence[Constraint]) -> str:
    shown, first = [], 0
    for run, length in _runs(columns):
        last = first + length - 1
        shown.append(f"{first}: {run}" if length == 1 else f"{first}-{last}: {run}")
        first += length
    return ", ".join(shown)
