r"""A proposal for importance sampling: a Student mixture, and the base in reserve.

.. math::
    q = \alpha_1 t + \alpha_0 p_0                                          \tag{1}

The base :math:`p_0` keeps its share, so that a region which all draws have missed still
gets some. The shares are learned from draws of the mixture itself: with weights
:math:`w_n` and responsibilities :math:`\rho_{nj} = \alpha_j q_j(u_n) / q(u_n)`,

.. math::
    \alpha_j \leftarrow \frac{\sum_n w_n \rho_{nj}}{\sum_n w_n}            \tag{2}

which lowers the Kullback-Leibler divergence from the target to the mixture.

References:
    Hesterberg (1995), Technometrics 37, 185-194 (the defensive mixture).
    Cappé, Douc, Guillin, Marin & Robert (2008), Statistics and Computing 18, 447-459.
"""

__all__ = ["Proposal"]

import math
from typing import final

import torch
from torch import Tensor

from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition.importance.student_mixture import StudentMixture

#: The base is not given up: with less it could not show that it has become good.
MIN_SHARE = 0.04
#: Nor is a component, of all components together.
_MIN_COMPONENT = 0.02
#: Weights of a draw, in units of their mean, that are too much for one; what they may
#: hold together; and components that are added there, at once and in all.
_HEAVY = 20.0
_MIN_HEAVY = 0.03
_NUM_NEW = 4
_MAX_COMPONENTS = 100


@final
class Proposal:
    r"""The mixture (1), over flat vectors in unconstrained space, in double precision.

    Args:
        path: For its base.
        mixture: Default: the base alone.
        base_share: :math:`\alpha_0`.
    """

    def __init__(
        self,
        path: GeometricPath,
        mixture: StudentMixture | None = None,
        base_share: float = 0.1,
    ) -> None:
        self.path, self.mixture = path, mixture
        self.base_share = 1.0 if mixture is None else base_share

    def sample(self, num: int) -> Tensor:
        """Independent draws, those of the base last, shape ``(num, D)``."""
        from_base = int((torch.rand(num) < self.base_share).sum())
        draws = []
        if self.mixture is not None and from_base < num:
            draws.append(self.mixture.sample(num - from_base))
        if from_base:
            draws.append(self._base_draws(from_base))
        return torch.cat(draws)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of (1), shape ``(N,)`` for ``u`` of shape ``(N, D)``."""
        return self._log_joint(u).logsumexp(0)

    def refitted(self, u: Tensor, weights: Tensor, num_steps: int = 3) -> "Proposal":
        """The proposal after some steps of expectation maximisation.

        Args:
            u: Draws, shape ``(N, D)``.
            weights: Shape ``(N,)``, of sum 1.
            num_steps: Of the mixture; the share (2) of the base is updated once.
        """
        if self.mixture is None:
            return self
        mixture = self.mixture
        for _ in range(num_steps):
            mixture = mixture.updated(u, weights, _MIN_COMPONENT)
        joint = Proposal(self.path, mixture, self.base_share)._log_joint(u)
        learned = float(joint.softmax(0).nan_to_num(0.0)[-1] @ weights)  # (2)
        share = min(max(learned, MIN_SHARE), 1 - MIN_SHARE)
        return Proposal(self.path, mixture, share)

    def thickened(self, u: Tensor, log_weights: Tensor) -> "Proposal":
        """The proposal with components where its own draws weigh too much.

        Args:
            u: Draws, shape ``(N, D)``.
            log_weights: Shape ``(N,)``.

        References:
            Raftery & Bao (2010), Biometrics 66, 1162-1173.
        """
        weights = log_weights.softmax(0)
        heavy = weights > _HEAVY / len(weights)
        share = weights[heavy].sum()
        if self.mixture is None or share < _MIN_HEAVY or self.size > _MAX_COMPONENTS:
            return self
        number = min(_NUM_NEW, int(heavy.sum()))
        chosen = weights.where(heavy, 0.0).multinomial(number)
        return self.joined(self.mixture.at(u[chosen]), min(0.3, share.item()))

    @property
    def size(self) -> int:
        """Components."""
        return 0 if self.mixture is None else len(self.mixture.loc)

    def joined(self, mixture: StudentMixture, share: float) -> "Proposal":
        """The proposal with another mixture in it.

        Args:
            mixture: Its components are added to those that there are.
            share: Of the new among all components.
        """
        if self.mixture is not None:
            mixture = self.mixture.joined(mixture, share)
        return Proposal(self.path, mixture, min(self.base_share, 0.2))

    def _base_draws(self, num: int) -> Tensor:
        return self.path.draw_base(num).reshape(num, -1).double()

    def _log_joint(self, u: Tensor) -> Tensor:
        base = -self.path.base(u.reshape(len(u), *self.path.event_shape)).double()
        parts = [base.nan_to_num(-torch.inf, -torch.inf) + math.log(self.base_share)]
        if self.mixture is not None:
            parts.insert(0, self.mixture.log_prob(u) + math.log1p(-self.base_share))
        return torch.stack(parts)
