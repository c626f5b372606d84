r"""The missing part of rows, drawn from a mixture of normals given what was seen.

With seen coordinates :math:`o` and missing ones :math:`m`, a component :math:`k` has
the chance and the law

.. math::
    r_k \propto w_k\, \mathcal{N}(x_o; \mu_{k,o}, S_{k,oo}), \quad
    x_m \mid x_o, k \sim \mathcal{N}\left(\mu_{k,m} + G_k (x_o - \mu_{k,o}),\;
    S_{k,mm} - G_k S_{k,om}\right), \quad G_k = S_{k,mo} S_{k,oo}^{-1}        \tag{1}

References:
    Little & Rubin (2019), Statistical Analysis with Missing Data, 3rd ed., section 11.
"""

__all__ = ["as_mixture", "conditional_draws"]

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.bases.kernels import Kernels
from pyro_ebm.bases.mixed import LatentClasses
from pyro_ebm.bases.mixture import NormalMixture, joined_mixture
from pyro_ebm.bases.stack import Stack


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
    patterns, of_row = missing.unique(dim=0, return_inverse=True)
    factor = mixture.scale_tril.double()
    covariance = factor @ factor.mT
    for index, pattern in enumerate(patterns):
        if not pattern.any():
            continue
        rows = (of_row == index).nonzero()[:, 0]
        seen, gone = (~pattern).nonzero()[:, 0], pattern.nonzero()[:, 0]
        found = _drawn(
            mixture, covariance, x[rows][:, seen].double(), seen, gone, number
        )
        draws[:, rows[:, None], gone] = found.to(draws)
    return draws


def _drawn(
    mixture: NormalMixture,
    covariance: Tensor,
    x: Tensor,
    seen: Tensor,
    gone: Tensor,
    number: int,
) -> Tensor:
    """Missing entries of rows of one pattern, shape ``(number, n, len(gone))``."""
    loc, probs = mixture.loc.double(), mixture.mixture_distribution.probs.double()
    among = torch.linalg.cholesky(covariance[:, seen[:, None], seen])
    across = covariance[:, seen[:, None], gone]  # (K, seen, gone)
    gain = torch.cholesky_solve(across, among).mT
    apart = x - loc[:, None, seen]  # (K, n, seen)
    white = torch.linalg.solve_triangular(among, apart.mT, upper=False)
    log_chance = probs.log() - among.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    chance = (log_chance[:, None] - white.square().sum(1) / 2).softmax(0)
    left = covariance[:, gone[:, None], gone] - gain @ across  # (1)
    floor = 1e-9 * covariance.diagonal(dim1=-2, dim2=-1)[:, gone]
    factor = torch.linalg.cholesky(left + floor.diag_embed())
    mean = loc[:, None, gone] + apart @ gain.mT  # (K, n, gone)
    which = torch.multinomial(chance.mT, number, replacement=True).mT  # (number, n)
    noise = torch.randn(*which.shape, len(gone), 1).to(mean)
    spread = (factor[which] @ noise)[..., 0]
    return mean[which, torch.arange(len(x), device=x.device)] + spread
