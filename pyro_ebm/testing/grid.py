r"""A density of one number on a fine grid, and integrals over grids of several.

The trapezoidal rule, which is exact to rounding for a smooth density that vanishes at
both ends of the grid. Everything is in double precision.
"""

__all__ = ["GridDensity", "log_integral"]

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor


@final
class GridDensity:
    r"""The density :math:`e^{g(t)}` on an interval, not normalised.

    Args:
        log_density: :math:`g`, maps points of shape ``(N,)`` to ``(N,)``.
        low: Lower end of the interval.
        high: Upper end.
        num_points: Of the grid.

    Attributes:
        points: The grid, shape ``(N,)``.
        mass: Probability of each point, shape ``(N,)``.
        log_integral: :math:`\log \int e^{g(t)} dt`.

    Exactness: *exact* to rounding, if the density vanishes at both ends.

    Example:
        >>> normal = GridDensity(lambda t: -t.square() / 2, -10, 10)
        >>> round(normal.log_integral, 6), round(normal.mean(normal.points**2), 6)
        (0.918939, 1.0)
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        low: float,
        high: float,
        num_points: int = 20_001,
    ) -> None:
        self.points = torch.linspace(low, high, num_points, dtype=torch.float64)
        values = log_density(self.points)
        step = (high - low) / (num_points - 1)
        self.log_integral = torch.logsumexp(values, 0).item() + math.log(step)
        self.mass = values.softmax(0)
        middle = (self.mass[1:] + self.mass[:-1]) / 2
        self._cdf = torch.cat([middle.new_zeros(1), middle.cumsum(0)])

    def mean(self, values: Tensor) -> float:
        """Expectation of a function, given by its values on the grid."""
        return (self.mass @ values).item()

    def sample(self, shape: Sequence[int]) -> Tensor:
        """Draws of this shape in the default dtype, by inversion."""
        uniform = torch.rand(tuple(shape))
        level = uniform.double()
        index = torch.searchsorted(self._cdf, level).clamp(1, len(self.points) - 1)
        below, above = self._cdf[index - 1], self._cdf[index]
        start, end = self.points[index - 1], self.points[index]
        return (start + (level - below) / (above - below) * (end - start)).to(uniform)


def log_integral(
    log_density: Callable[..., Tensor], *axes: tuple[float, float, int]
) -> float:
    r"""Log integral of :math:`e^{g}` over a box of two or three dimensions.

    Args:
        log_density: :math:`g`, maps one tensor of numbers for each axis to a tensor of
            the same shape.
        axes: Lower end, upper end and number of points of each.

    Returns:
        The logarithm of the integral, in nats.

    Exactness: *exact* to rounding, if the density vanishes at the faces of the box and
        is smooth on the scale of the grid.

    Example:
        >>> axis = (-9.0, 9.0, 91)
        >>> round(log_integral(lambda s, t: -(s**2 + t**2) / 2, axis, axis), 6)
        1.837877
    """
    first, *others = (torch.linspace(*axis, dtype=torch.float64) for axis in axes)
    rest = torch.meshgrid(*others, indexing="ij")
    rows = [log_density(t.expand_as(rest[0]), *rest).flatten() for t in first]
    total = torch.logsumexp(torch.stack([row.logsumexp(0) for row in rows]), 0).item()
    return total + sum(math.log((high - low) / (n - 1)) for low, high, n in axes)
