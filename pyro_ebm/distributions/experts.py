"""The experts of a mixture: each normalised, with its draws, base and weight."""

__all__ = [
    "ExpertDraws",
    "base_of",
    "checked_weights",
    "energy_of",
    "normalised",
    "stacked",
]

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.verdict import Status, status_of
from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.model import EnergyModel
from pyro_ebm.energies import DistributionEnergy, Energy
from pyro_ebm.energies.distribution import require_single
from pyro_ebm.mcmc import SamplingDiagnostics
from pyro_ebm.mcmc.samplers.sampler import Draws


@final
class ExpertDraws:
    """The sampler of a mixture: each draw is one of an expert's own.

    Args:
        energy: Of the mixture.
        experts: Normalised.
        weights: Probability of each, shape ``(K,)``.
    """

    def __init__(
        self,
        energy: Energy,
        experts: Sequence[dist.TorchDistribution],
        weights: Tensor,
    ) -> None:
        self.energy, self.experts, self.weights = energy, experts, weights

    def __call__(self, energy: Energy, num_draws: int) -> Tensor:
        """Draws in no order, shape ``(num_draws, *event)``.

        Raises:
            ValueError: If ``energy`` is not that of the mixture.
        """
        if energy is not self.energy:
            raise ValueError(
                "the sampler of a MixtureOfExperts draws from that mixture only, got "
                f"another energy, a {type(energy).__name__}. Give a sampler such as "
                "pyro_ebm.mcmc.IndependentChains()."
            )
        return self._draw(num_draws, lambda expert, n: expert.sample(torch.Size([n])))

    def draw_diagnosed(self, energy: Energy, num_draws: int) -> Draws:
        """The same, with all that speaks against the draws of the experts."""
        x = self(energy, num_draws)
        energies = [e for e in self.experts if isinstance(e, EnergyDistribution)]
        found: list[SamplingDiagnostics] = []
        for expert in energies:
            with contextlib.suppress(RuntimeError):  # none of this one was drawn
                found.append(expert.sampling_diagnostics())
        reasons = tuple(reason for part in found for reason in part.reasons)
        is_exact = all(part.status is Status.EXACT for part in found)
        status = status_of(reasons, Status.EXACT if is_exact else Status.OK)
        return Draws(x, SamplingDiagnostics(type(self).__name__, status, reasons))

    def start(self, energy: Energy, num_draws: int) -> Tensor:
        """Starting points of the experts' own samplers, by weight."""
        return self._draw(num_draws, _cheap_draws)

    def _draw(
        self,
        num_draws: int,
        draw: Callable[[dist.TorchDistribution, int], Tensor],
    ) -> Tensor:
        chosen = torch.multinomial(self.weights, num_draws, replacement=True)
        counts = chosen.bincount(minlength=len(self.experts)).tolist()
        draws = [
            draw(expert, count)
            for expert, count in zip(self.experts, counts, strict=True)
            if count
        ]
        sorted_draws = torch.cat([part.to(draws[0]) for part in draws])
        return sorted_draws[chosen.argsort(stable=True).argsort()]


def _cheap_draws(expert: Any, num_draws: int) -> Tensor:
    if isinstance(expert, EnergyDistribution) and expert.closed_form() is None:
        return expert._sampler.start(expert.energy, num_draws)
    draws: Tensor = expert.sample(torch.Size([num_draws]))
    return draws


def normalised(expert: Any, number: int) -> dist.TorchDistribution:
    r"""The expert, with its :math:`\log Z`.

    Args:
        expert: Distribution or :class:`EnergyModel`.
        number: Its place, for messages.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If it has a batch shape, or its :math:`\log Z` is unknown or free.

    Warns:
        UnreliableWarning: If its :math:`\log Z` is unreliable.
    """
    name = f"experts[{number}]"
    if isinstance(expert, EnergyModel):
        tracked = expert.log_partition.value
        if expert.energy.closed_form() is None and not tracked.isfinite():
            raise _unknown(name, expert.energy)
        expert = expert()
    require_single(expert, name)
    if not isinstance(expert, EnergyDistribution):
        return expert
    expert.require_no_free_log_partition()
    if expert.is_normalized:
        return expert
    known = expert.closed_form()
    if known is not None:
        expert = expert.expand(())
        expert.log_partition, expert.log_partition_std_error = known.log_partition, 0.0
        expert.is_normalized = True
        return expert
    if not expert.log_partition_std_error > 0:  # an estimate has an error
        raise _unknown(name, expert.energy)
    warnings.warn(
        f"the log Z of {name}, {expert.log_partition.item():.4g} +- "
        f"{float(expert.log_partition_std_error):.2g}, is unreliable, and with it the "
        "weights of the mixture.",
        UnreliableWarning,
        stacklevel=3,
    )
    return expert


def _unknown(name: str, energy: Energy) -> ValueError:
    return ValueError(
        f"{name} must know its log Z, for the weights are those of normalised "
        f"densities; that of this {type(energy).__name__} is unknown. Estimate it: "
        "EnergyDistribution(energy, pyro_ebm.partition.estimate(energy, base)), or "
        "energy_model.log_partition.refresh(energy) before an EnergyModel has learned. "
        "(Where chosen constants are meant, not weights: energies.MixtureEnergy.)"
    )


def energy_of(expert: Any) -> Energy:
    """The energy of an expert, of a Pyro distribution minus its log density."""
    if isinstance(expert, EnergyDistribution):
        return expert.energy
    return DistributionEnergy(expert)


def base_of(expert: Any) -> dist.TorchDistribution | None:
    """A Pyro distribution itself, of an energy its closed form or its base."""
    if not isinstance(expert, EnergyDistribution):
        return expert
    known = expert.closed_form()
    if known is not None:
        return known.distribution
    holders = (expert, expert.owner, expert.sampler)
    bases = (getattr(holder, "base", None) for holder in holders)
    return next((base for base in bases if base is not None), None)


def checked_weights(
    weights: "Sequence[float] | Tensor | None", energies: Sequence[Energy]
) -> Tensor:
    """The weights as a tensor like those of the energies, divided by their sum.

    Raises:
        ValueError: If they are not positive numbers that sum to 1, one an expert.
    """
    tensors = (t for e in energies for t in (*e.parameters(), *e.buffers()))
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    number = len(energies)
    if weights is None:
        return like.new_full((number,), 1 / number)
    weights = torch.as_tensor(weights).to(like)
    if weights.shape != (number,) or not (
        (weights > 0).all() and abs(weights.sum() - 1) < 1e-4
    ):
        raise ValueError(
            f"weights must be {number} positive numbers that sum to 1, one for each "
            f"expert, got {weights}. Divide them by their sum; while learning, take "
            "logits.softmax(-1); leave out an expert of weight 0."
        )
    return weights / weights.sum()


def stacked(experts: Sequence[Any], name: str, like: Tensor) -> Tensor:
    """An attribute of each expert, 0 where a Pyro distribution has none."""
    values = (getattr(expert, name, 0.0) for expert in experts)
    return torch.stack([torch.as_tensor(value).to(like) for value in values])
