r"""A proposal fitted to weighted draws of the target, from several families at once.

.. math::
    q = \sum_j \alpha_j q_j + \alpha_0 p_0                                  \tag{1}

The families fail differently: a Student mixture on modes and clusters, marginals that
are independent, and marginals behind a triangular map that bends them. The base
:math:`p_0` keeps its share, so that a region which all draws have missed still gets
some. Which family fits is told by draws of the mixture itself: with weights :math:`w_n`
and responsibilities :math:`\rho_{nj} = \alpha_j q_j(u_n) / q(u_n)`,

.. math::
    \alpha_j \leftarrow \frac{\sum_n w_n \rho_{nj}}{\sum_n w_n}            \tag{2}

which lowers the Kullback-Leibler divergence from the target to the mixture.

References:
    Hesterberg (1995), Technometrics 37, 185-194 (the defensive mixture).
    Cappé, Douc, Guillin, Marin & Robert (2008), Statistics and Computing 18, 447-459.
"""

__all__ = ["Proposal", "families"]

from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.importance.marginals import fit_marginals
from pyro_ebm.partition.importance.pool import Proposes
from pyro_ebm.partition.importance.triangular import fit_triangular

#: No part is given up: with less it could not show that it has become good.
MIN_WEIGHT = 0.04
#: Draws of the base that tell where the wide components are.
_NUM_WIDE = 256
#: Draws to which the marginals are fitted.
_NUM_FITTED = 2000


@final
class Proposal:
    """The mixture (1), over flat vectors in unconstrained space, in double precision.

    Args:
        parts: Fitted densities over vectors of size ``D``.
        path: For its base, the last part.
        weights: Of the parts and the base, shape ``(J + 1,)``, of sum 1.
    """

    def __init__(
        self, parts: list[Proposes], path: GeometricPath, weights: Tensor
    ) -> None:
        self.parts, self.path, self.weights = parts, path, weights

    def sample(self, num: int) -> Tensor:
        """Independent draws, in blocks by part, shape ``(num, D)``."""
        chosen = self.weights.multinomial(num, replacement=True)
        counts = torch.bincount(chosen, minlength=len(self.weights)).tolist()
        draws = [q.sample(n) for q, n in zip(self.parts, counts[:-1], strict=True) if n]
        if counts[-1]:
            draws.append(base_draws(self.path, counts[-1]))
        return torch.cat(draws)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of (1), shape ``(N,)`` for ``u`` of shape ``(N, D)``."""
        return self._log_joint(u).logsumexp(0)

    def improved(self, u: Tensor, log_weights: Tensor) -> Tensor:
        """The weights (2), with a floor under every part.

        Args:
            u: Draws, shape ``(N, D)``.
            log_weights: Shape ``(N,)``.
        """
        responsibilities = self._log_joint(u).softmax(0).nan_to_num(0.0)
        weights = responsibilities @ log_weights.softmax(0)  # (2)
        return MIN_WEIGHT + (1 - len(weights) * MIN_WEIGHT) * weights / weights.sum()

    def _log_joint(self, u: Tensor) -> Tensor:
        parts = [q.log_prob(u).double() for q in self.parts]
        base = -self.path.base(u.reshape(len(u), *self.path.event_shape)).double()
        # A far draw overflows a square: that part would not have proposed it.
        parts = [part.nan_to_num(-torch.inf, -torch.inf) for part in (*parts, base)]
        return torch.stack(parts) + self.weights.log()[:, None]


@final
class _Fitted:
    """A distribution of torch as a density that a pool can use."""

    def __init__(self, distribution: dist.TorchDistribution) -> None:
        self.distribution = distribution

    def sample(self, num: int) -> Tensor:
        """See :class:`Proposes`."""
        return self.distribution.sample(torch.Size((num,)))

    def log_prob(self, u: Tensor) -> Tensor:
        """See :class:`Proposes`."""
        return self.distribution.log_prob(u)


def families(u: Tensor, num_effective: float, path: GeometricPath) -> list[Proposes]:
    """Marginals, and marginals behind a triangular map, fitted to draws of the target.

    Every marginal is given a wide component besides, from the base, so that a mode of
    one coordinate which all draws lack is found.

    Args:
        u: Draws, shape ``(N, D)``, of double precision.
        num_effective: How many independent draws they are worth.
        path: From the base.
    """
    dim, wide = u.shape[-1], base_draws(path, _NUM_WIDE)
    wide = wide[wide.isfinite().all(-1)]
    # On average half a coordinate of a draw is wide, whatever the dimension.
    share = min(0.05, 0.5 / dim)
    step = max(1, len(u) // _NUM_FITTED)
    marginals = fit_marginals(u[::step], wide if len(wide) > 2 else None, share)
    triangular = fit_triangular(u, num_effective)
    z = triangular.inv(u)[::step]
    residuals = fit_marginals(z, 4 * z, share)
    bent = dist.TransformedDistribution(residuals, [triangular], validate_args=False)
    return [_Fitted(marginals), _Fitted(bent)]


def base_draws(path: GeometricPath, num: int) -> Tensor:
    """Draws of the base in unconstrained space, shape ``(num, D)``."""
    return path.draw_base(num).reshape(num, -1).double()
