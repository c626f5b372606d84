r"""A better base, fitted to draws of the target.

Draws of :math:`e^{-f}`, however rough, tell where it is. A multivariate Student t is
fitted to them in unconstrained space by expectation maximisation,

.. math::
    w_n &= \frac{\nu + d}{\nu + (u_n - m)^\top S^{-1} (u_n - m)}               \\
    m   &\leftarrow \frac{\sum_n w_n u_n}{\sum_n w_n}                         \\
    S   &\leftarrow \frac1N \sum_n w_n (u_n - m)(u_n - m)^\top            \tag{1}

and mixed with the old base :math:`p_0`, so that a mode which the draws have missed
still has its share of particles:

.. math::
    p_1 = (1 - \alpha)\, t_\nu(m, S) + \alpha\, p_0                         \tag{2}

References:
    Liu & Rubin (1995), Statistica Sinica 5, 19-39.
    Hesterberg (1995), Technometrics 37, 185-194 (the defensive mixture).
"""

__all__ = ["RefittedBase", "fit_student_t"]

import math
from collections.abc import Sequence
from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.mcmc.path import GeometricPath


def fit_student_t(
    u: Tensor, degrees: float = 5.0, num_iterations: int = 20
) -> dist.MultivariateStudentT:
    """Fit (1) with given degrees of freedom.

    Args:
        u: Draws of shape ``(N, D)``.
        degrees: Degrees of freedom, of a tail heavier than those of most targets.
        num_iterations: Of expectation maximisation.
    """
    dim = u.shape[-1]
    loc, covariance = u.mean(0), torch.cov(u.mT).reshape(dim, dim)
    # Few draws say nothing of correlations; any shrinkage undoes a strong one.
    shrink = 0.0 if len(u) > 5 * dim else min(1.0, dim / len(u))
    for _ in range(num_iterations):
        factor = _cholesky(covariance, shrink)
        whitened = torch.linalg.solve_triangular(factor, (u - loc).mT, upper=False)
        weights = (degrees + dim) / (degrees + whitened.square().sum(0))
        loc = weights @ u / weights.sum()
        centred = u - loc
        covariance = (centred * weights[:, None]).mT @ centred / len(u)
    return dist.MultivariateStudentT(
        u.new_tensor(degrees), loc, _cholesky(covariance, shrink), validate_args=False
    )


def _cholesky(covariance: Tensor, shrink: float) -> Tensor:
    variance = covariance.diagonal().clamp(min=1e-20)
    shrunk = covariance.lerp(variance.diag_embed(), shrink)
    factor, info = torch.linalg.cholesky_ex(shrunk)
    return factor if info == 0 else variance.sqrt().diag_embed()


@final
class RefittedBase(dist.TorchDistribution):
    r"""The mixture (2), over flat vectors in unconstrained space.

    Args:
        u: Draws of the target in unconstrained space, shape ``(N, *event)``.
        path: The path from the old base.
        base_weight: :math:`\alpha`, the share of the old base.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        u: Tensor,
        path: GeometricPath,
        base_weight: float = 0.1,
    ) -> None:
        super().__init__(torch.Size(), path.event_shape, validate_args=False)
        self.student = fit_student_t(u.reshape(len(u), -1))
        self.path, self.base_weight = path, base_weight

    @property
    def support(self) -> constraints.Constraint:
        """All of unconstrained space."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, u: Tensor) -> Tensor:
        """Log of (2) at ``u`` of shape ``(*batch, *event)``."""
        shape = u.shape[: u.dim() - len(self.event_shape)]
        student = self.student.log_prob(u.reshape(*shape, -1))
        return torch.logaddexp(
            student + math.log(1 - self.base_weight),
            math.log(self.base_weight) - self.path.base(u),
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of shape ``(*sample, *event)``."""
        shape = torch.Size(sample_shape) + self.event_shape
        student = self.student.sample(torch.Size(sample_shape)).reshape(shape)
        base = self.path.distribution.sample(torch.Size(sample_shape))
        base = self.path.transform.inv(base)
        ones = (1,) * len(self.event_shape)
        from_base = torch.rand((*sample_shape, *ones), device=base.device)
        return torch.where(from_base < self.base_weight, base, student)
