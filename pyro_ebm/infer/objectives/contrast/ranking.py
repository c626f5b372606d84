r"""Ranking noise contrast: find the datum among noise; log Z cancels.

.. math::
    s(x) &= -f_\theta(x) - \log p_n(x), \qquad y_j \sim p_n                     \\
    J    &= s(x) - \log\frac{1}{K + 1}
        \Big(e^{s(x)} + \sum_{j=1}^{K} e^{s(y_j)}\Big)                     \tag{1}

References:
    Ma & Collins (2018), EMNLP, 3698-3707.
"""

__all__ = ["RankingNoiseContrastive"]

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.objectives.contrast.noise import Noise, noise_of, require_noise
from pyro_ebm.infer.objectives.contrast.noise_contrastive import (
    require_num_noise,
    with_noise,
)
from pyro_ebm.infer.objectives.objective import Need, Objective, Surrogate, Terms


@final
@dataclass(frozen=True)
class RankingNoiseContrastive(Objective):
    r"""The classification (1) of one datum among ``num_noise`` draws of noise.

    Args:
        noise: See :class:`~pyro_ebm.infer.NoiseContrastive`: it must cover the model as
            well as the data, or the energy is free where no noise falls.
        num_noise: :math:`K`, noise points a data point, drawn anew at each step.

    Raises:
        ValueError: If ``num_noise`` is not positive.

    Exactness: *consistent* for any :math:`K`, under the conditions of
    :class:`~pyro_ebm.infer.NoiseContrastive`. It leaves no log Z.

    Cost: ``1 + num_noise`` values a data point, with gradient in the parameters only.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> noise = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> objective = RankingNoiseContrastive(noise)
        >>> objective.loss(energy, torch.randn(100, 2)).shape
        torch.Size([])
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"noise"})

    noise: Noise = None
    num_noise: int = 15

    def __post_init__(self) -> None:
        require_num_noise(self.num_noise)

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse noise that does not fit; see :meth:`Objective.check`."""
        require_noise(noise_of(self.noise, distribution), distribution.energy)

    def current_proposal(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Any:
        """The noise; see :meth:`Objective.current_proposal`."""
        return noise_of(self.noise, distribution)

    def num_proposed(self, batch_size: int) -> int:
        """See :meth:`Objective.num_proposed`."""
        return batch_size * self.num_noise

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy = distribution.energy
        noise = noise_of(self.noise, distribution)

        def surrogate(x: Tensor) -> Terms:
            points, log_noise = with_noise(x, noise, self.num_noise, energy.event_dim)
            values = energy(points)
            scores = -values - log_noise
            mean = scores.logsumexp(0) - math.log(len(scores))
            return Terms(scores[0] - mean, values[0])  # (1)

        return surrogate
