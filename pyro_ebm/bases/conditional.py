r"""The missing part of rows, by a mixture of normals given what was seen.

With seen coordinates :math:`o`, missing ones :math:`m` and precisions :math:`P_k`, the
inverse covariances, a component :math:`k` has the chance and the law

.. math::
    r_k \propto w_k\, \mathcal{N}(x_o; \mu_{k,o}, S_{k,oo}), \quad
    x_m \mid x_o, k \sim \mathcal{N}\left(\mu_{k,m}
    - C_k P_{k,mo} (x_o - \mu_{k,o}),\; C_k\right), \quad C_k = P_{k,mm}^{-1}  \tag{1}

and expectation maximisation for rows :math:`i` of which a part was seen has the step

.. math::
    \mu_k = \frac{\sum_i r_{ik} \hat x_{ik}}{\sum_i r_{ik}}, \quad
    S_k = \frac{\sum_i r_{ik} \left[(\hat x_{ik} - \mu_k)(\hat x_{ik} - \mu_k)^\top
    + C_{ik}\right]}{\sum_i r_{ik}}                                        \tag{2}

in which the missing part of :math:`\hat x_{ik}` is the mean (1).

References:
    Ghahramani & Jordan (1994), Advances in Neural Information Processing Systems 6.
    Little & Rubin (2019), Statistical Analysis with Missing Data, 3rd ed., section 11.
"""

__all__ = ["as_mixture", "conditional_draws", "fitted_incomplete", "seen_log_prob"]

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.bases.kernels import Kernels
from pyro_ebm.bases.mixed import LatentClasses
from pyro_ebm.bases.mixture import NormalMixture, fitted_mixture, joined_mixture
from pyro_ebm.bases.stack import Stack

#: Numbers that are in memory at once; steps (2) after a fit to rows that were filled.
_CHUNK, _STEPS = 5_000_000, 5


def as_mixture(base: Any) -> NormalMixture | LatentClasses:
    """A base as a mixture of normals; of a stack, those of its parts that are one.

    Of a mixed event latent classes, the first of a stack.

    Args:
        base: From :mod:`pyro_ebm.bases`, over ``(D,)`` and all real numbers, or of a
            mixed event.

    Raises:
        TypeError: If no part is a mixture of normals over all real numbers.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> len(as_mixture(pyro_ebm.bases.normal(torch.randn(50, 2))).loc)
        1
    """
    for part in getattr(base, "parts", (base,)):
        if isinstance(part, LatentClasses):
            return part
    found = _mixture(base)
    if found is None:
        raise TypeError(
            f"the base, {type(base).__name__}, is no mixture of normals over vectors "
            "of real numbers, of which missing entries could be drawn. Fit a model "
            "without a base, or drop the rows with missing entries."
        )
    return found


def _mixture(base: Any) -> NormalMixture | None:
    if isinstance(base, NormalMixture):
        return base
    if isinstance(base, dist.MultivariateNormal):
        one = torch.ones_like(base.loc[:1])
        return NormalMixture(one, base.loc[None], base.scale_tril[None])
    if isinstance(base, Kernels):
        parts: Any = base.component_distribution.base_dist
        probs = base.mixture_distribution.probs
        return NormalMixture(probs, parts.loc, parts.scale.diag_embed())
    if isinstance(base, Stack):
        pairs = [
            (mixture, share)
            for part, share in zip(base.parts, base.probs, strict=True)
            if (mixture := _mixture(part)) is not None
        ]
        if pairs:
            shares = torch.stack([share for _, share in pairs])
            return joined_mixture([part for part, _ in pairs], shares / shares.sum())
    return None


@torch.no_grad()
def conditional_draws(
    mixture: NormalMixture | LatentClasses, x: Tensor, missing: Tensor, number: int
) -> Tensor:
    """Rows whose missing entries are drawn by (1), the others as they are.

    Args:
        mixture: Over ``(D,)``.
        x: Shape ``(N, D)``; what stands at missing entries does not matter.
        missing: Which are, shape ``(N, D)``.
        number: Of draws of each row.

    Returns:
        Shape ``(number, N, D)``.

    Exactness: *exact* draws of the mixture's conditional.

    Example:
        >>> eye = torch.eye(2)
        >>> mixture = NormalMixture(torch.ones(1), torch.zeros(1, 2), eye[None])
        >>> x = torch.tensor([[3.0, torch.nan]])
        >>> draws = conditional_draws(mixture, x, x.isnan(), 5)
        >>> draws.shape, bool((draws[..., 0] == 3).all())
        (torch.Size([5, 1, 2]), True)
    """
    if isinstance(mixture, LatentClasses):
        return mixture.filled(x, missing, number)
    draws = x.expand(number, *x.shape).clone()
    for some in _given(mixture, x, missing, number):
        chance = some.log_prob.softmax(0).mT
        which = torch.multinomial(chance, number, replacement=True).mT  # (number, n)
        noise = torch.randn(*which.shape, some.gone.shape[1], 1).to(some.mean)
        root = some.root[which, some.pattern]
        spread = torch.linalg.solve_triangular(root.mT, noise, upper=True)[..., 0]
        among = torch.arange(len(some.rows), device=x.device)
        found = some.mean[which, among] + spread  # (1)
        draws[:, some.rows[:, None], some.gone] = found.to(draws)
    return draws


class _Given(NamedTuple):
    """The law (1) of rows that lack the same number of entries, ``m``, of ``K`` parts.

    Attributes:
        rows: Which they are, shape ``(n,)``.
        gone: Columns of their missing entries, shape ``(n, m)``.
        pattern: The number of that pattern, shape ``(n,)``.
        columns: The patterns, shape ``(p, m)``.
        mean: Shape ``(K, n, m)``.
        root: Factors of the precisions, lower triangular, shape ``(K, p, m, m)``.
        log_prob: Of what was seen, with the weight of the part, shape ``(K, n)``.
    """

    rows: Tensor
    gone: Tensor
    pattern: Tensor
    columns: Tensor
    mean: Tensor
    root: Tensor
    log_prob: Tensor


def _given(
    mixture: NormalMixture, x: Tensor, missing: Tensor, number: int = 1
) -> Iterator[_Given]:
    """The law (1) of all rows, some at a time; ``number`` is of their draws."""
    loc, factor = mixture.loc.double(), mixture.scale_tril.double()
    precision = torch.cholesky_inverse(factor)
    constant = mixture.mixture_distribution.probs.double().log()
    constant = constant - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    parts, dim = loc.shape
    lacking = missing.sum(1)
    for count in lacking.unique().tolist():
        size = max(parts, number) * (dim + count**2)
        index = (lacking == count).nonzero()[:, 0]
        for rows in index.split(max(1, _CHUNK // size)):
            mask = missing[rows]
            patterns, pattern = mask.unique(dim=0, return_inverse=True)
            columns = patterns.nonzero()[:, 1].reshape(len(patterns), count)
            gone = columns[pattern]
            block = precision[:, columns[:, :, None], columns[:, None]]
            root = torch.linalg.cholesky(block)
            apart = (x[rows].double() - loc[:, None]).masked_fill(mask, 0.0)
            pulled = apart @ precision
            at_gone = pulled.gather(-1, gone.expand(parts, *gone.shape))
            shift = -torch.cholesky_solve(at_gone[..., None], root[:, pattern])[..., 0]
            square = (pulled * apart).sum(-1) + (at_gone * shift).sum(-1)
            log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, pattern]
            scale = (dim - count) / 2 * math.log(2 * math.pi)
            log_prob = constant[:, None] - log_root - scale - square / 2
            mean = loc[:, gone] + shift  # (1)
            yield _Given(rows, gone, pattern, columns, mean, root, log_prob)


@torch.no_grad()
def seen_log_prob(mixture: NormalMixture, x: Tensor, missing: Tensor) -> Tensor:
    """Log density of what was seen of rows, shape ``(N,)``.

    Args:
        mixture: Over ``(D,)``.
        x: Shape ``(N, D)``; what stands at missing entries does not matter.
        missing: Which are, shape ``(N, D)``.

    Exactness: *exact*.

    Example:
        >>> eye = torch.eye(2)
        >>> mixture = NormalMixture(torch.ones(1), torch.zeros(1, 2), eye[None])
        >>> x = torch.tensor([[1.0, torch.nan]])
        >>> seen_log_prob(mixture, x, x.isnan()), dist.Normal(0, 1).log_prob(x[0, 0])
        (tensor([-1.4189]), tensor(-1.4189))
    """
    found = x.new_empty(len(x))
    for some in _given(mixture, x, missing):
        found[some.rows] = some.log_prob.logsumexp(0).to(found)
    return found


@torch.no_grad()
def fitted_incomplete(
    u: Tensor, missing: Tensor, num_components: int, seed: int, floor: float
) -> NormalMixture:
    """A mixture of normals by expectation maximisation (2) of what was seen.

    Args:
        u: Shape ``(N, D)``, with something plausible at missing entries, to which the
            mixture is fitted before.
        missing: Which are, shape ``(N, D)``.
        num_components: At most ``N``.
        seed: Of the first components.
        floor: Added to variances, relative to those of the columns.
    """
    loc, scale = u.double().mean(0), u.double().std(0, correction=0)
    scale = scale.where(scale > 0, 1.0)
    z = (u.double() - loc) / scale
    found = fitted_mixture(z, num_components, seed, floor)
    for _ in range(_STEPS):
        found = _maximised(found, z, missing, floor)
    factor = found.scale_tril * scale[:, None]
    parts = found.mixture_distribution.probs, loc + scale * found.loc, factor
    return NormalMixture(*(part.to(u) for part in parts))


def _maximised(
    mixture: NormalMixture, z: Tensor, missing: Tensor, floor: float
) -> NormalMixture:
    """A step (2); of rows whose missing entries do not matter."""
    parts, dim = mixture.loc.shape
    total, first = torch.zeros_like(mixture.loc[:, 0]), torch.zeros_like(mixture.loc)
    second = torch.zeros_like(mixture.scale_tril)
    part = torch.arange(parts, device=z.device)[:, None, None, None]
    for some in _given(mixture, z, missing):
        shares = some.log_prob.softmax(0)
        where = some.gone.expand(parts, *some.gone.shape)
        filled = z[some.rows].expand(parts, -1, dim).scatter(-1, where, some.mean)
        shared = shares[..., None] * filled
        total += shares.sum(1)
        first += shared.sum(1)
        second += shared.mT @ filled
        of_pattern = shares.new_zeros(parts, len(some.columns))
        of_pattern.index_add_(1, some.pattern, shares)
        left = of_pattern[..., None, None] * torch.cholesky_inverse(some.root)
        places = part, some.columns[:, :, None], some.columns[:, None]
        second.index_put_(places, left, accumulate=True)
    total = total + 1e-12
    mean = first / total[:, None]
    covariance = second / total[:, None, None] - mean[:, :, None] * mean[:, None]
    covariance.diagonal(dim1=-2, dim2=-1).add_(floor)
    return NormalMixture(total / total.sum(), mean, torch.linalg.cholesky(covariance))
