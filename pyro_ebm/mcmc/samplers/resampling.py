r"""Draws by importance resampling: many points of a proposal, a few kept.

.. math::
    y_k \sim p, \qquad w_k \propto e^{-f(y_k)} / p(y_k), \qquad
    x = y_k \text{ with probability } w_k                                  \tag{1}

Where the proposal is near the energy, as a density fitted to the data is to the model
that corrects it, this takes one evaluation for a point instead of hundreds for a
chain, and separate modes are as likely as they are heavy.

References:
    Rubin (1987), J. Amer. Statist. Assoc. 82, 543-546.
"""

__all__ = ["ImportanceResampling", "is_corrected", "weighted_draws"]

from dataclasses import dataclass
from typing import ClassVar, final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.verdict import Status
from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.samplers.independent import IndependentChains
from pyro_ebm.mcmc.samplers.sampler import Draws, SamplingDiagnostics, warn_of

#: Points of the proposal for each that is kept, and numbers of all in any case, at
#: most; effective points.
_MOST, _NUMBERS, _EFFECTIVE = 200, 30_000_000, 2
#: Draws at which a proposal is seen to be the base of an energy, but for rounding.
_FEW, _ROUNDING = 16, 2e-3
#: Points that are proposed first, and at a time.
_FIRST, _CHUNK = 8192, 16_384


@final
@dataclass(frozen=True)
class ImportanceResampling:
    """Independent draws (1), or those of chains where too few points count.

    Args:
        proposal: A normalised distribution over the events of the energy, with tails no
            lighter than the energy's.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.ones(2))
        >>> proposal = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        >>> ImportanceResampling(proposal)(energy, 1000).mean(0).round(decimals=1)
        tensor([1., 1.])
    """

    proposal: dist.TorchDistribution

    #: Draws that one run gives at least.
    min_chains: ClassVar[int] = 400

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Draws, shape ``(num_draws, *event)``.

        Warns:
            UnreliableWarning: If they are those of chains that have not converged.
        """
        draws = self.draw_diagnosed(energy, num_draws)
        warn_of(draws.diagnostics)
        return draws.x

    @torch.no_grad()
    def draw_diagnosed(self, energy: Energy, num_draws: int) -> Draws:
        """Draws, and what is known of them; see :class:`Sampler`."""
        points, weights = self._weighted(energy, _FIRST)
        fraction = effective_sample_fraction(weights).item()
        wanted = int(1.2 * _EFFECTIVE * num_draws / max(fraction, 1e-9))
        enough = _NUMBERS // max(1, energy.event_shape.numel())
        enough = min(enough, 500_000) if is_corrected(energy, self.proposal) else 0
        if _FIRST < wanted <= max(_MOST * num_draws, enough):
            more, their_weights = self._weighted(energy, wanted - _FIRST)
            points = torch.cat([points, more])
            weights = torch.cat([weights, their_weights])
        fraction = effective_sample_fraction(weights).item()
        if not fraction * len(weights) >= _EFFECTIVE * num_draws:
            chains = IndependentChains(self.proposal)
            return chains.draw_diagnosed(energy, num_draws)
        chosen = torch.multinomial(weights.softmax(0), num_draws, replacement=True)
        found = SamplingDiagnostics(
            "ImportanceResampling", Status.OK, effective_fraction=fraction
        )
        return Draws(points[chosen], found)

    def _weighted(self, energy: Energy, number: int) -> tuple[Tensor, Tensor]:
        """Points of the proposal, and their log-weights; no weight for ``nan``."""
        points, weights = weighted_draws(energy, self.proposal, number)
        return points, weights.nan_to_num(-torch.inf, torch.inf, -torch.inf)

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Draws of the proposal, shape ``(num_draws, *event)``."""
        return _drawn(energy, self.proposal, num_draws)


@torch.no_grad()
def weighted_draws(
    energy: Energy, proposal: dist.TorchDistribution, number: int
) -> tuple[Tensor, Tensor]:
    """Draws of a proposal with their log-weights (1), not normalised.

    Args:
        energy: Of the target.
        proposal: A normalised distribution over its events.
        number: Of draws.

    Returns:
        Points of shape ``(number, *event)``, and log-weights of shape ``(number,)``,
        ``nan`` where the energy is.
    """
    points, log_weights = [], []
    fn = energy.correction if is_corrected(energy, proposal) else None
    for begin in range(0, number, _CHUNK):
        y = _drawn(energy, proposal, min(_CHUNK, number - begin))
        points.append(y)
        log_weights.append(-energy(y) - proposal.log_prob(y) if fn is None else -fn(y))
    return torch.cat(points), torch.cat(log_weights)


@torch.no_grad()
def is_corrected(energy: Energy, proposal: dist.TorchDistribution) -> bool:
    """Whether an energy corrects a proposal, whose density then drops out of (1).

    Args:
        energy: Of the target.
        proposal: A normalised distribution over its events.
    """
    if getattr(energy, "base", None) is None:
        return False
    with torch.random.fork_rng(devices=[]):  # to look must not move the stream
        x = _drawn(energy, proposal, _FEW)
    unlearned = energy(x) - energy.correction(x) + proposal.log_prob(x)
    return bool(unlearned.abs().max() < _ROUNDING)


def _drawn(energy: Energy, proposal: dist.TorchDistribution, number: int) -> Tensor:
    y = proposal.sample(torch.Size((number,)))
    return y.to(**energy.tensor_options(y))
