r"""Kernel densities, of rows or of each coordinate; or counts over a finite set.

The density with data :math:`x_1 \dots x_n` is

.. math::
    p(x) = \frac1n \sum_i \mathcal{N}(x; x_i, h^2 \sigma^2)                  \tag{1}

with the standard deviations :math:`\sigma` of the data and the width :math:`h` that is
best for each datum by the others. That of a coordinate with :math:`K` values, seen
:math:`n_k` times, is

.. math::
    p(k) = \frac{n_k + 1/2}{n + K/2}                                         \tag{2}

References:
    Silverman (1986), Density Estimation for Statistics and Data Analysis, section 3.4.
    Krichevsky & Trofimov (1981), IEEE Trans. Information Theory 27, 199-207.
"""

__all__ = ["Kernels", "NormalKernels", "independent", "kernel_density"]

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.rows import Rows

#: Widths that are tried, in the data's standard deviations, at so many points at most;
#: and the most centres.
_WIDTHS, _MAX_POINTS, _MAX_CENTRES = torch.logspace(-2, 0, 25), 1000, 4000
#: Numbers that the centres of independent columns may take, the fewest of these, and
#: the most.
_NUMBERS, _FEWEST, _MOST = 30_000, 300, 1000
#: Of distances: products would cancel.
_EXACT = "donot_use_mm_for_euclid_dist"
#: Numbers that a density holds in memory at once.
_CHUNK = 10_000_000


def kernel_density(
    data: Tensor, *, support: Constraint | None = None, seed: int = 0
) -> dist.TorchDistribution:
    """The kernel density (1) of whole rows.

    Args:
        data: Shape ``(N, *event)``.
        support: Of a row; the kernels are then in unconstrained space. Default: all
            real numbers.
        seed: Of the choice of 4,000 centres where there are more rows.

    Returns:
        A normalised Pyro distribution over the event.

    Raises:
        ValueError: If the data do not fit, see :class:`~pyro_ebm.bases.rows.Rows`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> base = kernel_density(torch.randn(500, 2))
        >>> base.sample((3,)).shape
        torch.Size([3, 2])
    """
    rows = Rows.of(data, support)
    centres = rows.u[_chosen(len(rows.u), seed)]
    width = _width(centres)
    probs = torch.full_like(centres[:, 0], 1 / len(centres))
    return rows.distribution(Kernels(probs, centres, width.expand_as(centres)))


class NormalKernels(dist.MixtureSameFamily):
    """Mixtures of normals with independent coordinates, however many, soon drawn.

    Args:
        probs: Weights of the kernels, shape ``(*batch, n)``.
        kernels: ``Normal``, or that with ``to_event``; batch shape ``(*batch, n)``.
    """

    def __init__(self, probs: Tensor, kernels: dist.TorchDistribution) -> None:
        weights = dist.Categorical(probs, validate_args=False)
        super().__init__(weights, kernels, validate_args=False)

    expand = dist.TorchDistribution.expand  # torch's is for its own class alone

    @property
    def normal(self) -> dist.Normal:
        """The kernels, coordinate by coordinate."""
        kernels: Any = self.component_distribution
        return kernels.base_dist if kernels.event_shape else kernels

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, ``(*sample, *batch, *event)``; none of a kernel that is not chosen."""
        shape = self._extended_shape(torch.Size(sample_shape))
        axis = len(shape) - len(self.event_shape)
        chosen = self.mixture_distribution.sample(sample_shape)
        index = chosen.reshape(chosen.shape + (1,) * (len(shape) - axis + 1))
        index = index.expand(*shape[:axis], 1, *shape[axis:])
        loc, scale = (
            part.expand(*sample_shape, *part.shape).gather(axis, index).squeeze(axis)
            for part in (self.normal.loc, self.normal.scale)
        )
        return torch.normal(loc, scale)


class Kernels(NormalKernels):
    """A mixture of normal kernels of one shape, whose density takes little memory.

    Args:
        probs: Weights of the centres, shape ``(n,)``.
        loc: The centres, shape ``(n, D)``.
        scale: Standard deviations, shape ``(n, D)``, with equal rows.
    """

    def __init__(self, probs: Tensor, loc: Tensor, scale: Tensor) -> None:
        kernels = dist.Normal(loc, scale, validate_args=False)
        super().__init__(probs, kernels.to_event(1))
        self._centres, self._width = loc / scale[0], scale[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (1) at ``(*batch, D)``, shape ``(*batch,)``."""
        number, dim = self._centres.shape
        rows = (value / self._width).reshape(-1, dim)
        scale = self._width.log().sum() + dim / 2 * math.log(2 * math.pi)
        constant = self.mixture_distribution.probs.log() - scale
        found = [
            (constant - apart.square() / 2).logsumexp(-1)
            for part in rows.split(max(1, _CHUNK // number))
            for apart in [torch.cdist(part, self._centres, compute_mode=_EXACT)]
        ]
        return torch.cat(found).reshape(value.shape[:-1])


def independent(
    data: Tensor, *, support: Constraint | None = None, seed: int = 0
) -> dist.TorchDistribution:
    """The product of the marginal distributions, by (1) or (2).

    Args:
        data: Shape ``(N, *event)``; whole numbers from 0 where they are of an integer
            type.
        support: Of a row of floating-point data; the kernels are then in unconstrained
            space. Default: all real numbers.
        seed: Of the choice of centres, 1,000 or 30,000 numbers, where there are more.

    Returns:
        A normalised Pyro distribution over the event.

    Raises:
        ValueError: If whole numbers are negative; or as the data do not fit, see
            :class:`~pyro_ebm.bases.rows.Rows`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> base = independent(
        ...     torch.rand(500, 2), support=dist.constraints.unit_interval
        ... )
        >>> base.event_shape, bool((base.sample((100,)) < 1).all())
        (torch.Size([2]), True)
        >>> independent(torch.tensor([[0, 2], [1, 2], [1, 0]])).sample().shape
        torch.Size([2])
    """
    if isinstance(data, Tensor) and not data.is_floating_point():
        return _counted(data)
    rows = Rows.of(data, support)
    most = min(_MOST, max(_FEWEST, _NUMBERS // rows.u.shape[1]))
    centres = rows.u[_chosen(len(rows.u), seed)[:most]].mT  # (D, n)
    width = torch.cat([_width(column[:, None]) for column in centres])
    probs = torch.full_like(centres, 1 / centres.shape[1])
    widths = width[:, None].expand_as(centres)
    kernels = dist.Normal(centres, widths, validate_args=False)
    return rows.distribution(NormalKernels(probs, kernels).to_event(1))


def _chosen(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(number, generator=generator)[:_MAX_CENTRES]


def _width(points: Tensor) -> Tensor:
    r"""Widths :math:`h \sigma`, ``(D,)``, of the kernels (1) at points ``(n, D)``."""
    spread = points.std(0).clamp(min=1e-6 * (1 + points.abs().amax(0)))
    z = points / spread
    apart = torch.cdist(z[:_MAX_POINTS], z, compute_mode=_EXACT).square()
    # Each by the others, and by none that is equal to it.
    apart = apart.where(apart > 0, torch.inf)
    dim = points.shape[1]
    scores = torch.stack(
        [
            (-apart / (2 * h**2)).logsumexp(1).mean() - dim * math.log(h)
            for h in _WIDTHS.tolist()
        ]
    )
    return spread * _WIDTHS.to(points)[scores.argmax()]


def _counted(data: Tensor) -> dist.TorchDistribution:
    if data.dim() == 0 or not len(data):
        raise ValueError(
            f"data must have shape (N, *event) with N >= 1, got {tuple(data.shape)}."
        )
    values = data.long()
    if (values < 0).any():
        raise ValueError(
            "data must be whole numbers from 0 where they are of an integer type, got "
            f"{int(values.min())}. Shift them, or give floating-point numbers."
        )
    number = max(2, int(values.max()) + 1)
    counts = torch.nn.functional.one_hot(values, number).sum(0)
    probs = (counts + 0.5) / (len(values) + number / 2)  # (2)
    return dist.Categorical(probs).to_event(data.dim() - 1)
