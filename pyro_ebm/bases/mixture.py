"""Normal distributions, and mixtures of them by scikit-learn."""

__all__ = [
    "NUMBERS",
    "NormalMixture",
    "ROWS_EACH",
    "fitted_mixture",
    "gaussian_mixture",
    "imported",
    "joined_mixture",
    "normal",
]

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.bases.rows import Rows, split

#: Numbers of components that are tried, and rows that each component needs.
NUMBERS, ROWS_EACH = (1, 2, 4, 8, 16, 32), 4
#: Added to variances, relative to those of the columns.
_FLOOR = 1e-6
#: Numbers that a density holds in memory at once.
_CHUNK = 10_000_000


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
        wanted = [k for k in NUMBERS if k == 1 or k * ROWS_EACH <= len(train)]
        fits = {k: fitted_mixture(train, k, seed) for k in wanted}
        num_components = max(
            wanted, key=lambda k: float(fits[k].log_prob(held_out).mean())
        )
    return rows.distribution(fitted_mixture(rows.u, num_components, seed))


class NormalMixture(dist.MixtureSameFamily):
    """A mixture of normals whose density takes little memory.

    Args:
        probs: Weights of the components, shape ``(K,)``.
        loc: Their means, shape ``(K, D)``.
        scale_tril: Lower triangular factors of their covariances, ``(K, D, D)``.
    """

    def __init__(self, probs: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(
            dist.Categorical(probs, validate_args=False),
            dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False),
            validate_args=False,
        )
        eye = torch.eye(loc.shape[-1]).to(loc)
        self._whitening = torch.linalg.solve_triangular(scale_tril, eye, upper=False)

    expand = dist.TorchDistribution.expand  # torch's is for its own class alone

    @property
    def loc(self) -> Tensor:
        """Means of the components, shape ``(K, D)``."""
        loc: Tensor = self.component_distribution.loc
        return loc

    @property
    def scale_tril(self) -> Tensor:
        """Factors of their covariances, shape ``(K, D, D)``."""
        scale_tril: Tensor = self.component_distribution.scale_tril
        return scale_tril

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at ``(*batch, D)``, shape ``(*batch,)``."""
        count, dim = self.loc.shape
        rows = value.reshape(-1, dim)
        constant = self.mixture_distribution.probs.log() - dim / 2 * math.log(
            2 * math.pi
        )
        constant = constant + self._whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        size = max(1, _CHUNK // (count * dim))
        found = [
            (constant - self._squares(part) / 2).logsumexp(-1)
            for part in rows.split(size)
        ]
        return torch.cat(found).reshape(value.shape[:-1])

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``(*sample, D)``; none of a component that was not chosen."""
        shape, dim = torch.Size(sample_shape), self.loc.shape[-1]
        probs = self.mixture_distribution.probs
        chosen = torch.multinomial(probs, shape.numel(), replacement=True)
        draws = torch.randn(shape.numel(), dim).to(self.loc)
        for k in chosen.unique().tolist():
            rows = (chosen == k).nonzero()[:, 0]
            draws[rows] = self.loc[k] + draws[rows] @ self.scale_tril[k].mT
        return draws.reshape(*shape, dim)

    def _squares(self, rows: Tensor) -> Tensor:
        """Squared distances of rows from all components, shape ``(n, K)``."""
        apart = rows - self.loc[:, None]  # (K, n, D)
        # Of the wider type, if there are two.
        return (apart @ self._whitening.mT.to(apart)).square().sum(-1).mT


def joined_mixture(parts: Sequence[NormalMixture], weights: Tensor) -> NormalMixture:
    """A mixture of mixtures as one.

    Args:
        parts: Over the same event.
        weights: Shape ``(len(parts),)``, with sum 1.
    """
    pairs = zip(parts, weights, strict=True)
    probs = [part.mixture_distribution.probs * weight for part, weight in pairs]
    return NormalMixture(
        torch.cat(probs),
        torch.cat([part.loc for part in parts]),
        torch.cat([part.scale_tril for part in parts]),
    )


def imported() -> tuple[Any, Any]:
    """Scikit-learn's mixture and its limit of threads; the first time takes a second.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ImportError as error:
        message = "gaussian_mixture needs scikit-learn: pip install 'pyro-ebm[bases]'."
        raise ImportError(message) from error
    return GaussianMixture, threadpool_limits


def fitted_mixture(
    u: Tensor, num_components: int, seed: int, floor: float = _FLOOR
) -> NormalMixture:
    """A mixture of normals by expectation maximisation.

    Args:
        u: Shape ``(N, D)``.
        num_components: At most ``N``.
        seed: Of the first components.
        floor: Added to variances, relative to those of the columns.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    mixture, threadpool_limits = imported()
    x = u.double().cpu().numpy()
    loc, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    model = mixture(num_components, reg_covar=floor, random_state=seed)
    # So small a problem takes several threads seven times as long as one.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # 100 steps are enough for a base
        model.fit((x - loc) / scale)
    factors = np.linalg.cholesky(model.covariances_) * scale[:, None]
    parts = [model.weights_, loc + scale * model.means_, factors]
    return NormalMixture(*(torch.as_tensor(part).to(u) for part in parts))
