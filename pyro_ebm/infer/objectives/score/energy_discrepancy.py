r"""Energy discrepancy: compare the energy of a datum with that of perturbed copies.

.. math::
    J = -\log\Big(\frac wM + \frac1M \sum_{m=1}^{M}
        e^{f_\theta(x) - f_\theta(x + \sqrt t\, \xi + \sqrt t\, \xi_m)}\Big) \tag{1}

With standard normal :math:`\xi` and :math:`\xi_m`,
:math:`x + \sqrt t\,\xi` is what is seen of the datum, and :math:`\xi_m` lead back to
where it may have come from; log Z cancels. The population value is that of score
matching for :math:`t \to 0` and of maximum likelihood for :math:`t \to \infty`. The
weight :math:`w` of the datum itself keeps the logarithm, and its gradient, bounded.

Over a finite support of :math:`D` sites there is no normal noise. What is seen of the
datum, and each copy of that, is a step of the heat equation between the states of each
site,

.. math::
    p_t(y \mid x) = \prod_{i=1}^{D} \Big(
        e^{-t}\, [y_i = x_i] + \frac{1 - e^{-t}}{q_i}\Big)                \tag{2}

a site is drawn anew from its :math:`q_i` states with probability :math:`1 - e^{-t}`.

With :math:`w = 1` and :math:`y = x + \sqrt t\,\xi`, (1) is the log-probability that it
is :math:`x`, and none of :math:`M` draws from :math:`\mathcal N(y, t)` (or (2), which
is as symmetric), that came from the data: a ranking by noise that depends on
:math:`y`, as :class:`~pyro_ebm.infer.RankingNoiseContrastive` has it. Given :math:`y`
the data have a density proportional to their own times that of the noise, so that the
best energy is theirs for any :math:`M`.

References:
    Schroder, Ou, Lim, Li, Vollmer & Duncan (2023), NeurIPS (1). Schroder, Ou, Li &
    Duncan (2024), NeurIPS (2).
"""

__all__ = ["EnergyDiscrepancy"]

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.views.unconstrained import is_finite_support
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

    Perturbations are Gaussian in unconstrained space, or (2) over a finite support.

    Args:
        time: :math:`t`, the variance of each of the two perturbations, or the rate at
            which sites are drawn anew. Default: 0.25, and :math:`1 / D` over a finite
            support: about one site changes.
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

    time: float | None = None
    num_copies: int = 32
    stabilizer: float = 1.0

    def __post_init__(self) -> None:
        if self.time is not None and not 0 < self.time < math.inf:
            raise ValueError(f"time must be positive and finite, got {self.time}.")
        if self.num_copies < 1:
            raise ValueError(f"num_copies must be at least 1, got {self.num_copies}.")
        if not 0 <= self.stabilizer < math.inf:
            raise ValueError(
                f"stabilizer must be finite and not negative, got {self.stabilizer}."
            )

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse supports without an end; see :meth:`Objective.check`."""
        support = distribution.energy.support
        if support.is_discrete and not is_finite_support(support):
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
                seen = self._perturbed(flat, u)
                copies = self._perturbed(flat, seen.expand(self.num_copies, *u.shape))
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

    def _perturbed(self, energy: Energy, u: Tensor) -> Tensor:
        """A perturbation of each point, shape ``(*batch, *event)``."""
        if not is_finite_support(energy.support):
            time = 0.25 if self.time is None else self.time
            return u + math.sqrt(time) * torch.randn_like(u)
        time = self.time or 2 / energy.event_shape.numel()
        anew = IndependentSites.uniform(energy.support, energy.event_shape, u)
        is_kept = torch.rand_like(u) < math.exp(-time)
        return u.where(is_kept, anew.sample(energy.batch_shape_of(u)))  # (2)
