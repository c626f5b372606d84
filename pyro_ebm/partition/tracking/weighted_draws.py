r"""Log Z by importance sampling from a pool of draws that is renewed.

.. math::
    \log \hat Z = \log \frac1K \sum_{k=1}^{K} e^{-f_\theta(y_k) - \log p(y_k)},
    \qquad y_k \sim p                                                      \tag{1}

A step of learning takes some of the draws, and has by (1) a value and its whole
gradient; all of them tell how many still count. A pool that is drawn once is learned by
heart: the energy rises at its few heavy draws alone, and (1) falls below log Z. So each
draw serves a few times only, and values are read off draws that nothing was learned
from. Where an energy is the correction of the proposal, the density of the latter drops
out of (1), and draws cost next to nothing.
"""

__all__ = ["WeightedDraws"]

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.mcmc.samplers.persistent import StatefulModule
from pyro_ebm.mcmc.samplers.resampling import is_corrected
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.importance.importance import estimate_from_weights
from pyro_ebm.partition.particles.resampling import systematic_resample

#: Numbers in a batch of points that are evaluated at once.
_CHUNK = 1_000_000
#: How often a draw serves in steps.
_PASSES = 5
#: Draws at which an energy is seen to have changed.
_FEW = 64


class WeightedDraws(StatefulModule):
    """Draws of a proposal, with what is known of their weights.

    Example:
        >>> draws = WeightedDraws()
        >>> proposal = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> draws.start(energy, proposal, 10_000)
        >>> abs(draws.estimate(energy).value - 1.8379) < 0.05  # log(2 pi)
        True
    """

    x: Tensor
    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.empty(0))
        self.register_buffer("known", torch.empty(0))
        self.proposal: Any = None
        self.num_used = 0  # of draws by steps, since they were drawn
        self._read: tuple[Tensor, Tensor] | None = None

    @property
    def is_started(self) -> bool:
        """Whether there are draws."""
        return bool(self.known.numel())

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
        self.proposal, self.num_used, self._read = proposal, 0, None
        # What is not learned of the log-weights: with the energy of a base inside.
        self.known = torch.zeros(number).to(self.x)
        if is_corrected(energy, proposal):
            return
        size = max(1, _CHUNK // energy.event_shape.numel())
        self.known = torch.cat(
            [
                energy(part)
                - energy.correction(part)
                + proposal.log_prob(part).to(part)
                for part in self.x.split(size)
            ]
        )

    def renew(self, energy: Energy) -> None:
        """Other draws of the same proposal, unless none of these was used."""
        if self.num_used:
            self.start(energy, self.proposal, len(self.x))

    def some(self, energy: Energy, number: int) -> Tensor:
        """Log-weights of some of the draws, with gradient; shape ``(number,)``.

        They are taken in turn, and renewed when they have served a few times.
        """
        count = len(self.x)
        if self.num_used >= _PASSES * count:
            self.renew(energy)
        index = torch.arange(self.num_used, self.num_used + number) % count
        index = index.to(self.x.device)
        self.num_used += number
        return -energy.correction(self.x[index]) - self.known[index]

    @torch.no_grad()
    def log_weights(self, energy: Energy) -> Tensor:
        """Of all draws, shape ``(K,)``; those of the same parameters are kept."""
        # Values as well as parameters, as a closure may have others.
        few = energy.correction(self.x[:_FEW])
        key = torch.cat(
            [
                t.flatten().double()
                for t in (few, *energy.parameters(), *energy.buffers())
            ]
        )
        if self._read is None or not torch.equal(self._read[0], key):
            size = max(1, _CHUNK // energy.event_shape.numel())
            parts = [energy.correction(part) for part in self.x.split(size)]
            self._read = key, -torch.cat(parts) - self.known
        return self._read[1]

    def estimate(self, energy: Energy) -> LogPartitionEstimate:
        r""":math:`\log Z` by (1) from all draws, with a verdict."""
        found = self.log_weights(energy)
        return estimate_from_weights(found, "importance sampling", len(self.x))

    def resampled(self, energy: Energy, number: int) -> Tensor:
        """About draws of the model, with repetitions; shape ``(number, *event)``."""
        weights = self.log_weights(energy).softmax(0)
        return self.x[torch.multinomial(weights, number, replacement=True)]

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
        log_weights = self.log_weights(energy)
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
        return float(effective_sample_fraction(self.log_weights(energy)).item())
