r"""Energy discrepancy: compare the energy of a datum with that of perturbed copies.

.. math::
    J = -\log\Big(\frac wM + \frac1M \sum_{m=1}^{M}
        e^{f_\theta(x) - f_\theta(x + \sqrt t\, \xi + \sqrt t\, \xi_m)}\Big) \tag{1}

With standard normal :math:`\xi` and :math:`\xi_m`,
:math:`x + \sqrt t\,\xi` is what is seen of the datum, and :math:`\xi_m` lead back to
where it may have come from; log Z cancels. The population value is that of score
matching for :math:`t \to 0` and of maximum likelihood for :math:`t \to \infty`. The
weight :math:`w` of the datum itself keeps the logarithm, and its gradient, bounded.

With :math:`w = 1` and :math:`y = x + \sqrt t\,\xi`, (1) is the log-probability that it
is :math:`x`, and none of :math:`M` draws from :math:`\mathcal N(y, t)`, that came from
the data: a ranking by noise that depends on :math:`y`, as
:class:`~pyro_ebm.infer.RankingNoiseContrastive` has it. Given :math:`y` the data have a
density proportional to their own times that of the noise, so that the best energy is
theirs for any :math:`M`.

References:
    Schroder, Ou, Lim, Li, Vollmer & Duncan (2023), NeurIPS.
"""

__all__ = ["EnergyDiscrepancy"]

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import unconstrained
from pyro_ebm.infer.objectives.objective import (
    Need,
    Objective,
    Surrogate,
    Terms,
    require_differentiable,
)


@final
@dataclass(frozen=True)
class EnergyDiscrepancy(Objective):
    r"""Energy discrepancy (1), from values of the energy alone.

    Perturbations are Gaussian in unconstrained space; the support must be continuous.

    Args:
        time: :math:`t`, the variance of each of the two perturbations.
        num_copies: :math:`M`, perturbed copies a data point.
        stabilizer: :math:`w`, not negative.

    Raises:
        ValueError: If a setting is out of range.

    Exactness: *consistent* with :math:`w = 1`, for any :math:`M` and :math:`t`; with
    another weight *biased* by :math:`O(1/M)`, the more so the larger :math:`t`. It
    leaves no log Z.

    Cost: ``1 + num_copies`` values a data point, with gradient in the parameters only.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> EnergyDiscrepancy().loss(energy, torch.randn(100, 2)).backward()
        >>> energy.loc.grad.shape
        torch.Size([2])
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    time: float = 0.25
    num_copies: int = 32
    stabilizer: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.time < math.inf:
            raise ValueError(f"time must be positive and finite, got {self.time}.")
        if self.num_copies < 1:
            raise ValueError(f"num_copies must be at least 1, got {self.num_copies}.")
        if not 0 <= self.stabilizer < math.inf:
            raise ValueError(
                f"stabilizer must be finite and not negative, got {self.stabilizer}."
            )

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse discrete supports; see :meth:`Objective.check`."""
        if distribution.energy.support.is_discrete:
            require_differentiable(distribution.energy, x, type(self).__name__)

    def bias(self) -> tuple[Finding, ...]:
        """None with weight 1, which ranks the datum among its copies."""
        if self.stabilizer == 1:
            return ()
        off = (
            "the interval is about a value that is off by O(1 / num_copies), as it is "
            "not with stabilizer=1"
        )
        return (Finding(Reason.INCONSISTENT_ESTIMATOR, off),)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy = distribution.energy

        def surrogate(x: Tensor) -> Terms:
            flat, to_support = unconstrained(energy)
            with torch.no_grad():
                u = to_support.inv(x)
                seen = u + math.sqrt(self.time) * torch.randn_like(u)
                copies = seen.expand(self.num_copies, *u.shape)
                copies = copies + math.sqrt(self.time) * torch.randn_like(copies)
            values = flat(torch.cat([u[None], copies]))
            gaps = values[0] - values[1:]
            if self.stabilizer:
                weight = torch.full_like(gaps[:1], math.log(self.stabilizer))
                gaps = torch.cat([weight, gaps])
            objective = math.log(self.num_copies) - gaps.logsumexp(0)  # (1)
            value = values[0]
            if flat is not energy:
                value = value + to_support.log_abs_det_jacobian(u, x).detach()
            return Terms(objective, value)

        return surrogate
