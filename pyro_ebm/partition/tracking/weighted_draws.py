r"""Log Z by importance sampling from a fixed pool of draws.

.. math::
    \log \hat Z = \log \frac1K \sum_{k=1}^{K} e^{-f_\theta(y_k) - \log p(y_k)},
    \qquad y_k \sim p                                                      \tag{1}

The draws and their log-densities are kept. A step of learning takes some of them, and
has by (1) a value and its whole gradient; all of them tell how many still count.
"""

__all__ = ["WeightedDraws"]

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.mcmc.samplers.persistent import StatefulModule
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.importance.importance import estimate_from_weights
from pyro_ebm.partition.particles.resampling import systematic_resample

#: Numbers in a batch of points that are evaluated at once.
_CHUNK = 1_000_000


class WeightedDraws(StatefulModule):
    """Draws of a proposal, with their log-density.

    Example:
        >>> draws = WeightedDraws()
        >>> proposal = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> draws.start(energy, proposal, 10_000)
        >>> abs(draws.estimate(energy).value - 1.8379) < 0.05  # log(2 pi)
        True
    """

    x: Tensor
    log_proposal: Tensor
    base: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.empty(0))
        self.register_buffer("log_proposal", torch.empty(0))
        self.register_buffer("base", torch.empty(0))

    @property
    def is_started(self) -> bool:
        """Whether there are draws."""
        return bool(self.log_proposal.numel())

    @torch.no_grad()
    def start(self, energy: Energy, proposal: Any, number: int) -> None:
        """Draw anew.

        Args:
            energy: Whose device and dtype the draws take.
            proposal: A normalised distribution over its events.
            number: Of draws.
        """
        x = proposal.sample(torch.Size((number,)))
        self.x = x.to(**energy.tensor_options(x))
        self.log_proposal = proposal.log_prob(x).to(self.x)
        # That of a base inside the energy, which is not learned: evaluated once.
        self.base = torch.zeros_like(self.log_proposal)
        self.base = energy(self.x) - self._corrections(energy)

    def some(self, energy: Energy, number: int) -> Tensor:
        """Log-weights of some of the draws, with gradient; shape ``(number,)``."""
        count = len(self.log_proposal)
        index = torch.randint(count, (number,), device=self.log_proposal.device)
        known = self.base[index] + self.log_proposal[index]
        return -energy.correction(self.x[index]) - known

    @torch.no_grad()
    def energies(self, energy: Energy) -> Tensor:
        """The energy at all draws, shape ``(K,)``."""
        return self._corrections(energy) + self.base

    def _corrections(self, energy: Energy) -> Tensor:
        size = max(1, _CHUNK // energy.event_shape.numel())
        return torch.cat([energy.correction(part) for part in self.x.split(size)])

    def estimate(self, energy: Energy) -> LogPartitionEstimate:
        r""":math:`\log Z` by (1) from all draws, with a verdict."""
        log_weights = -self.energies(energy) - self.log_proposal
        return estimate_from_weights(log_weights, "importance sampling", len(self.x))

    def mean_energy(self, energy: Energy) -> tuple[Tensor, Tensor]:
        """Mean energy under the model, and its standard error."""
        values = self.energies(energy)
        log_weights = -values - self.log_proposal
        weights = log_weights.softmax(0)
        finite = values.nan_to_num(0.0, 0.0, 0.0)
        mean = weights @ finite
        return mean, (weights.square() @ (finite - mean).square()).sqrt()

    def resampled(self, energy: Energy, number: int) -> Tensor:
        """About draws of the model, with repetitions; shape ``(number, *event)``."""
        log_weights = -self.energies(energy) - self.log_proposal
        chosen = torch.multinomial(log_weights.softmax(0), number, replacement=True)
        return self.x[chosen]

    def in_islands(self, energy: Energy, num_islands: int) -> tuple[Tensor, Tensor]:
        """Draws by their weights in islands that each have an estimate (1).

        Args:
            energy: Of the target.
            num_islands: ``M``, of ``N`` draws each.

        Returns:
            About draws, where chains move, shape ``(M, N, *event)``; and log Z by
            island.

        Raises:
            DivergenceError: If no draw of an island counts.
        """
        log_weights = -self.energies(energy) - self.log_proposal
        log_weights = log_weights.nan_to_num(-torch.inf).reshape(num_islands, -1)
        if not log_weights.isfinite().any(1).all():
            raise DivergenceError(
                f"the energy is finite at no draw of one of {num_islands} islands. "
                "Give a base whose draws fall where it is finite."
            )
        chosen = systematic_resample(log_weights, log_weights.shape[1])
        x = self.x.reshape(*log_weights.shape, *energy.event_shape)[chosen]
        _, to_support = unconstrained(energy)
        return to_support.inv(x), log_mean_exp(log_weights)

    def effective_fraction(self, energy: Energy) -> float:
        """Effective number of the draws, as a part of all."""
        log_weights = -self.energies(energy) - self.log_proposal
        return float(effective_sample_fraction(log_weights).item())
