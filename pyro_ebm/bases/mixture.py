"""Normal distributions, and mixtures of them by scikit-learn."""

__all__ = ["NormalMixture", "gaussian_mixture", "normal"]

import math
import warnings
from collections.abc import Sequence
from typing import final

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.rows import Rows, split

#: Numbers of components that are tried, and rows that each component needs.
_NUMBERS, _ROWS_EACH = (1, 2, 4, 8, 16, 32), 4
#: Added to variances, relative to those of the columns.
_FLOOR = 1e-6


def normal(
    data: Tensor, *, support: Constraint | None = None
) -> dist.TorchDistribution:
    """The normal distribution of the largest likelihood.

    Args:
        data: Shape ``(N, *event)``.
        support: Of a row; the normal is then in unconstrained space, pushed to the
            support. Default: all real numbers.

    Returns:
        A normalised Pyro distribution over the event. Variances are at least a
        millionth of those of the columns, so that columns may depend on each other.

    Raises:
        ValueError: If the data do not fit, see :class:`~pyro_ebm.bases.rows.Rows`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> normal(2 + torch.randn(1000, 3)).mean
        tensor([2.0, 2.0, 2.0])
    """
    rows = Rows.of(data, support)
    u = rows.u.double()
    loc, scale = u.mean(0), u.std(0, correction=0)
    scale = scale.where(scale > 0, 1.0)
    z = (u - loc) / scale
    covariance = z.mT @ z / len(z)
    covariance.diagonal().add_(_FLOOR)
    scale_tril = scale[:, None] * torch.linalg.cholesky(covariance)
    return rows.distribution(
        dist.MultivariateNormal(
            loc.to(rows.u), scale_tril=scale_tril.to(rows.u), validate_args=False
        )
    )


def gaussian_mixture(
    data: Tensor,
    num_components: int | None = None,
    *,
    support: Constraint | None = None,
    seed: int = 0,
) -> dist.TorchDistribution:
    """A mixture of normal distributions with full covariances.

    Args:
        data: Shape ``(N, *event)``.
        num_components: Default: the number of 1, 2, 4, ... 32 whose fit to 85 % of the
            rows gives the others the largest likelihood.
        support: Of a row; the mixture is then in unconstrained space, pushed to the
            support. Default: all real numbers.
        seed: Of the held-out rows and of the first components.

    Returns:
        A normalised Pyro distribution over the event.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If ``num_components`` is not positive or more than the rows; or as
            the data do not fit, see :class:`~pyro_ebm.bases.rows.Rows`.

    Exactness: a *local maximum* of the likelihood.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> data = torch.cat([torch.randn(300, 2) - 3, torch.randn(300, 2) + 3])
        >>> base = gaussian_mixture(data, 2)
        >>> base.event_shape, base.mixture_distribution.probs
        (torch.Size([2]), tensor([0.5, 0.5]))
    """
    rows = Rows.of(data, support)
    number = len(rows.u)
    if num_components is not None and not 1 <= num_components <= number:
        raise ValueError(
            f"num_components must be from 1 to the number of rows, {number}; got "
            f"{num_components}."
        )
    if num_components is None:
        train, held_out = split(rows.u, seed)
        wanted = [k for k in _NUMBERS if k == 1 or k * _ROWS_EACH <= len(train)]
        scores = {k: _fitted(train, k, seed).log_prob(held_out).mean() for k in wanted}
        num_components = max(scores, key=lambda k: scores[k].item())
    return rows.distribution(_fitted(rows.u, num_components, seed))


def _fitted(u: Tensor, num_components: int, seed: int) -> dist.TorchDistribution:
    try:
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ImportError as error:
        message = "gaussian_mixture needs scikit-learn: pip install 'pyro-ebm[bases]'."
        raise ImportError(message) from error
    x = u.double().cpu().numpy()
    loc, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    model = GaussianMixture(num_components, reg_covar=_FLOOR, random_state=seed)
    # So small a problem takes several threads seven times as long as one.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # 100 steps are enough for a base
        model.fit((x - loc) / scale)
    factors = np.linalg.cholesky(model.covariances_) * scale[:, None]
    parts = [model.weights_, loc + scale * model.means_, factors]
    probs, locs, scale_tril = (torch.as_tensor(part).to(u) for part in parts)
    return NormalMixture(probs, locs, scale_tril)


@final
class NormalMixture(dist.MixtureSameFamily):
    """A mixture of normal distributions that draws from one component a draw.

    Its parent draws from all of them, and solves a system for each at each point:
    together ten times the work.

    Args:
        probs: Weights of the components, shape ``(K,)``.
        loc: Their means, shape ``(K, D)``.
        scale_tril: Cholesky factors of their covariances, shape ``(K, D, D)``.

    Example:
        >>> loc = torch.tensor([[-3.0, 0.0], [3.0, 0.0]])
        >>> q = NormalMixture(torch.ones(2) / 2, loc, torch.eye(2).expand(2, 2, 2))
        >>> q.log_prob(loc)
        tensor([-2.5310, -2.5310])
    """

    def __init__(self, probs: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(
            dist.Categorical(probs, validate_args=False),
            dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False),
            validate_args=False,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``(*batch, D)``, shape ``(*batch,)``."""
        parts = self.component_distribution
        loc, factors = parts.loc, parts.scale_tril
        number, dim = loc.shape
        identity = torch.eye(dim).to(loc)
        inverse = torch.linalg.solve_triangular(factors, identity, upper=False)
        # About the mean of all, lest the difference of two large products cancels.
        centre = loc.mean(0)
        offset = (inverse @ (loc - centre)[..., None])[..., 0]
        centred = value - centre  # of the wider type, if there are two
        z = centred @ inverse.flatten(0, 1).mT.to(centred)
        z = z.reshape(*value.shape[:-1], number, dim) - offset
        log_det = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_probs = self.mixture_distribution.probs.log()
        constant = log_probs - log_det - dim / 2 * math.log(2 * math.pi)
        return (constant - z.square().sum(-1) / 2).logsumexp(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``(*sample, D)``."""
        shape, parts = torch.Size(sample_shape), self.component_distribution
        probs = self.mixture_distribution.probs
        chosen = torch.multinomial(probs, shape.numel(), replacement=True)
        noise = torch.randn(shape.numel(), self.event_shape[0]).to(parts.loc)
        draws = parts.loc[chosen]
        for k in chosen.unique().tolist():  # a gather of all factors would not fit
            own = chosen == k
            draws[own] += noise[own] @ parts.scale_tril[k].mT
        return draws.reshape(shape + self.event_shape)
