r"""A proposal fitted to draws of the target, from several families at once.

.. math::
    q = \alpha_1 q_{\text{marginals}} + \alpha_2 q_{\text{triangular}}
      + \alpha_3 q_{\text{Student}} + \alpha_4 p_0                         \tag{1}

The families fail differently, and the base :math:`p_0` keeps its share, so that a mode
which the draws have missed still gets some. Which of them fits is told by weighted
draws of the mixture itself: with weights :math:`w_n` and component responsibilities
:math:`\rho_{nj} = \alpha_j q_j(x_n) / q(x_n)`,

.. math::
    \alpha_j \leftarrow \frac{\sum_n w_n \rho_{nj}}{\sum_n w_n}            \tag{2}

which lowers the Kullback-Leibler divergence from the target to the mixture.

References:
    Hesterberg (1995), Technometrics 37, 185-194 (the defensive mixture).
    Cappé, Douc, Guillin, Marin & Robert (2008), Statistics and Computing 18, 447-459.
"""

__all__ = ["Proposal", "fit_proposal"]

from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.importance.marginals import fit_marginals
from pyro_ebm.partition.importance.refit import fit_student_t
from pyro_ebm.partition.importance.triangular import fit_triangular

#: No component is given up: with less it could not show that it has become good.
_MIN_WEIGHT = 0.04
#: Draws of the base that tell where the wide components are.
_NUM_WIDE = 256
#: Draws to which the marginals are fitted, on the way and at the end.
_NUM_EXPLORING = 1000
_NUM_MEASURING = 4000
#: Shares of marginals, triangular, Student and base before anything is known.
_FIRST_WEIGHTS = (0.3, 0.3, 0.3, 0.1)


@final
class Proposal:
    """The mixture (1), over flat vectors in unconstrained space.

    Densities are computed in double precision, whatever the precision of the draws.

    Args:
        components: Fitted distributions over vectors of size ``D``.
        path: For its base, the last component.
        weights: Of the components and the base, shape ``(J,)``.
        dtype: Of the draws.
    """

    def __init__(
        self,
        components: list[dist.TorchDistribution],
        path: GeometricPath,
        weights: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.components, self.path = components, path
        self.weights, self.dtype = weights, dtype

    def sample(self, num: int) -> Tensor:
        """Independent draws, sorted by component, shape ``(num, D)``."""
        chosen = self.weights.multinomial(num, replacement=True)
        counts = torch.bincount(chosen, minlength=len(self.weights)).tolist()
        # A mixture of torch cannot draw nothing.
        draws = [
            component.sample(torch.Size((count,)))
            for component, count in zip(self.components, counts[:-1], strict=True)
            if count
        ]
        if counts[-1]:
            draws.append(_base_draws(self.path, counts[-1]))
        return torch.cat(draws).to(self.dtype)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of (1), shape ``(N,)`` for ``u`` of shape ``(N, D)``."""
        return self._log_joint(u).logsumexp(0)

    def improved_weights(self, u: Tensor, log_weights: Tensor) -> Tensor:
        """The update (2), with a floor under every component.

        Args:
            u: Draws of the mixture, shape ``(N, D)``.
            log_weights: Shape ``(N,)``.
        """
        responsibilities = self._log_joint(u).softmax(0).nan_to_num(0.0)
        weights = responsibilities @ log_weights.softmax(0)  # (2)
        return _MIN_WEIGHT + (1 - len(weights) * _MIN_WEIGHT) * weights / weights.sum()

    def _log_joint(self, u: Tensor) -> Tensor:
        parts = [component.log_prob(u.double()) for component in self.components]
        base = -self.path.base(u.reshape(len(u), *self.path.event_shape))
        # A far draw overflows a square: that component would not have proposed it.
        parts = [part.nan_to_num(-torch.inf, -torch.inf) for part in (*parts, base)]
        return torch.stack(parts).double() + self.weights.log()[:, None]


def fit_proposal(
    u: Tensor,
    num_effective: float,
    path: GeometricPath,
    weights: Tensor | None = None,
    *,
    explore: bool = False,
) -> Proposal:
    """Fit every component of (1) to draws of the target.

    Args:
        u: Draws in unconstrained space, shape ``(N, D)``.
        num_effective: How many independent draws they are worth.
        path: From the base.
        weights: Of the components; default: equal, with less for the base.
        explore: Give every marginal a wide component besides, from the base, so that
            a mode of one coordinate which all draws lack is found.
    """
    dim, dtype, u = u.shape[-1], u.dtype, u.double()
    if weights is None:
        weights = u.new_tensor(_FIRST_WEIGHTS)
    wide = None
    if explore:
        wide = _base_draws(path, _NUM_WIDE).double()
    # On average half a coordinate of a draw is wide, whatever the dimension.
    step = max(1, len(u) // (_NUM_EXPLORING if explore else _NUM_MEASURING))
    marginals = fit_marginals(u[::step], wide, wide_weight=min(0.05, 0.5 / dim))
    triangular = fit_triangular(u, num_effective)
    z = triangular.inv(u)[::step]
    share = min(0.05, 0.5 / dim) if explore else min(0.05, 0.2 / dim)
    residuals = fit_marginals(z, 4 * z, wide_weight=share)
    bent = dist.TransformedDistribution(residuals, [triangular], validate_args=False)
    return Proposal([marginals, bent, fit_student_t(u)], path, weights, dtype)


def _base_draws(path: GeometricPath, num: int) -> Tensor:
    """Draws of the base in unconstrained space, not evaluated, shape ``(num, D)``."""
    draws = path.distribution.sample(torch.Size((num,)))
    return path.transform.inv(draws).reshape(num, path.event_shape.numel())
