r"""Denoising score matching: fit the score of noisy data.

.. math::
    J = -\frac{\sigma_l^2}{2\,\overline{\sigma^2}} \left\lVert
        \nabla f_\theta(\tilde x) - \frac{\varepsilon}{\sigma_l}\right\rVert^2,
    \qquad \tilde x = x + \sigma_l\,\varepsilon, \quad
    \varepsilon \sim \mathcal{N}(0, I)                                     \tag{1}

Of one level :math:`\sigma` the best energy is that of the noisy data,
:math:`p * \mathcal{N}(0, \sigma^2 I)`. Of several, each point gets one at random,
weighted as in the second reference so that all levels count about the same. On a
constrained support the noise is added in unconstrained space.

References:
    Vincent (2011), Neural Computation 23, 1661-1674.
    Song & Ermon (2019), NeurIPS (several levels).
"""

__all__ = ["DenoisingScoreMatching"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import unconstrained
from pyro_ebm.infer.objectives.objective import Need, Objective, Surrogate, Terms


@final
@dataclass(frozen=True)
class DenoisingScoreMatching(Objective):
    r"""Denoising score matching (1), without second derivatives in ``x``.

    Args:
        noise_scale: :math:`\sigma`, in units of unconstrained space, or several. Large
            noise sees the weight of modes and blurs them; small noise has gradients of
            variance :math:`1 / \sigma^2`.

    Raises:
        ValueError: If a level is not positive and finite, or there is none.

    Exactness: *biased* by the noise: a variance is learned too large by
    :math:`\sigma^2`; of several levels the energy, which does not know them apart, is a
    compromise. It leaves no log Z.

    Cost: one gradient and one value a data point, and the gradient of the former in the
    parameters.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> loss = DenoisingScoreMatching(0.3).loss(energy, torch.randn(100, 2))
        >>> loss.backward()
        >>> energy.loc.grad.shape
        torch.Size([2])
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})

    noise_scale: float | Sequence[float] = 0.1

    def __post_init__(self) -> None:
        levels = self._levels()
        if not len(levels) or not ((levels > 0) & levels.isfinite()).all():
            raise ValueError(
                "noise_scale must be positive and finite, one number or several, got "
                f"{self.noise_scale}."
            )

    def bias(self) -> tuple[Finding, ...]:
        """That of the noise; see :meth:`Objective.bias`."""
        noisy = (
            "the interval is about the energy of the noisy data: each variance is too "
            "large by noise_scale squared"
        )
        return (Finding(Reason.INCONSISTENT_ESTIMATOR, noisy),)

    def _levels(self) -> Tensor:
        return torch.as_tensor(self.noise_scale, dtype=torch.float64).reshape(-1)

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy = distribution.energy

        def surrogate(x: Tensor) -> Terms:
            flat, to_support = unconstrained(energy)
            levels = self._levels().to(x)
            with torch.no_grad():
                u = to_support.inv(x)
                batch = flat.batch_shape_of(u)
                index = torch.randint(len(levels), batch, device=x.device)
                sigma = levels[index].reshape(*batch, *(1,) * flat.event_dim)
                noise = torch.randn_like(u)
            noisy = (u + sigma * noise).requires_grad_()
            (grad,) = torch.autograd.grad(flat(noisy).sum(), noisy, create_graph=True)
            residual = (sigma * grad - noise).reshape(*batch, -1)
            objective = -residual.square().sum(-1) / (2 * levels.square().mean())
            with torch.no_grad():
                value = energy(x)
            return Terms(objective, value)  # (1)

        return surrogate
