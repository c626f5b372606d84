r"""Free energies: some finite sites of an energy summed out.

With hidden sites :math:`h` beside visible ones :math:`v`,

.. math::
    F(v) = -\log \sum_h e^{-f(v, h)}                                       \tag{1}

is the energy of the marginal distribution of :math:`v`, with the same partition
function. The sum is done by messages or elimination given :math:`v`, all points at
once: what is seen cuts the graph, so that hidden units without edges among each other
cost next to nothing, and those of a deep machine as much as their layers are wide.

References:
    Salakhutdinov & Hinton (2009), Deep Boltzmann machines, AISTATS.
"""

__all__ = ["FreeEnergy"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from pyro_ebm.core.spaces import support_at
from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.discrete.exact.distribution import (
    ExactClosedForm,
    ExactDistribution,
    Solver,
    site_number,
)
from pyro_ebm.energies.discrete.exact.elimination import (
    MAX_COST,
    elimination_cost,
    exact_sums,
)
from pyro_ebm.energies.discrete.finite import site_states
from pyro_ebm.energies.discrete.sites import SiteEnergy


@final
class FreeEnergy(Energy):
    r"""The free energy (1) of the visible sites, as one vector in the event's order.

    Parameters of the energy stay live.

    Args:
        energy: Of factors: a Boltzmann machine, a factor graph, a chain or a lattice.
        hidden: Sites to sum out: their numbers in the flattened event, their names, or
            a boolean mask of the event's shape.

    Raises:
        TypeError: If the energy is not made of factors.
        ValueError: If a site is not in the event or there twice, none is hidden or
            visible, or the sum given the visible sites has too many terms.

    Exactness: its values are *exact*.

    Example:
        >>> weight = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
        >>> machine = pyro_ebm.energies.BoltzmannEnergy(weight)
        >>> visible = FreeEnergy(machine, hidden=[2])
        >>> visible(torch.ones(2)).item()  # -log(1 + e^4)
        -4.0181
        >>> pair = visible.closed_form().distribution
        >>> pair.marginals()[0].detach()
        tensor([0.1397, 0.8603])
    """

    def __init__(self, energy: SiteEnergy, hidden: Sequence[Any] | Tensor) -> None:
        factors = energy.factors() if isinstance(energy, SiteEnergy) else None
        if factors is None:
            raise TypeError(
                "energy must be made of factors, as BoltzmannEnergy, ChainEnergy, "
                f"FactorGraphEnergy and lattices are, got {type(energy).__name__}."
            )
        summed = _numbers(energy, hidden)
        number = energy.event_shape.numel()
        visible = [site for site in range(number) if site not in summed]
        states = site_states(energy.support, energy.event_shape)
        cost = elimination_cost(states, [sites for sites, _ in factors], visible)
        if cost > MAX_COST:
            raise ValueError(
                f"the sum over {len(summed)} hidden sites given the others must have "
                f"at most {MAX_COST:.1e} terms, got {cost:.1e}. Hide fewer sites, or "
                "keep them all in the event and draw by pyro_ebm.mcmc.Gibbs."
            )
        support = support_at(energy.support, energy.event_shape, visible)
        super().__init__((len(visible),), support, energy.batch_shape)
        self.energy, self.visible = energy, visible

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*sample, *batch, V)``."""
        solver, is_outside = self._given(x)
        value = -solver.log_partition()  # (1)
        # What is no number is no state: without this it would have an energy.
        return value.where(~is_outside, torch.inf) + 0 * x.sum(-1)

    @torch.no_grad()
    def draw_whole(self, x: Tensor) -> Tensor:
        """States of all sites, hidden ones drawn given the visible ones.

        Args:
            x: Visible sites, shape ``(*sample, *batch, V)``.

        Returns:
            Shape ``(*sample, *batch, *event)`` of the energy over all sites.

        Exactness: *exact*.
        """
        solver, _ = self._given(x)
        drawn = self.energy.values[solver.sample(1)[0]]
        return drawn.reshape(*x.shape[:-1], *self.energy.event_shape)

    def _given(self, x: Tensor) -> tuple[Solver, Tensor]:
        """The sums over hidden sites at points, and which of these are no states."""
        values = self.energy.values
        states = site_states(self.energy.support, self.energy.event_shape)
        most = torch.tensor(states, device=x.device)[self.visible] - 1
        x = x.detach().to(values).contiguous()
        index = torch.searchsorted(values, x.nan_to_num(0.0)).minimum(most)
        is_outside = (values[index] != x).any(-1)
        solver = exact_sums(states, self.energy.factors() or (), x.shape[:-1])
        seen = dict(zip(self.visible, index.movedim(-1, 0), strict=True))
        return solver.given(seen), is_outside

    def closed_form(self) -> ExactClosedForm | None:
        r""":math:`\log Z` and the distribution, where all sites together are cheap.

        Exactness: *exact* where it is not ``None``.
        """
        whole = self.energy.closed_form()
        if not isinstance(whole, ExactClosedForm):
            return None
        solver = _Marginal(whole.distribution.solver, self.visible)
        return ExactClosedForm.of(ExactDistribution(self, solver, self.batch_shape))

    def extra_repr(self) -> str:
        """How many sites are hidden, for ``repr``."""
        number = self.energy.event_shape.numel()
        return f"hidden={number - len(self.visible)} of {number} sites"


@dataclass(frozen=True)
class _Marginal:
    """Sums over the states of all sites, of which some are looked at."""

    whole: Solver
    sites: list[int]

    def log_partition(self) -> Tensor:
        return self.whole.log_partition()

    def marginals(self) -> Tensor:
        return self.whole.marginals()[..., self.sites, :]

    def mode(self) -> Tensor:
        raise NotImplementedError(
            "the most probable state of visible sites alone is not to be had by "
            "messages or elimination. Look among draws, or take the mode of the energy "
            "over all sites."
        )

    def sample(self, num_draws: int) -> Tensor:
        return self.whole.sample(num_draws)[..., self.sites]

    def given(self, observed: Mapping[int, Tensor]) -> "_Marginal":
        seen = {self.sites[place]: state for place, state in observed.items()}
        return _Marginal(self.whole.given(seen), self.sites)


def _numbers(energy: SiteEnergy, hidden: Sequence[Any] | Tensor) -> set[int]:
    """The hidden sites, by their numbers in the flattened event."""
    number, names = energy.event_shape.numel(), getattr(energy, "names", None)
    if isinstance(hidden, Tensor) and hidden.dtype == torch.bool:
        if hidden.shape != energy.event_shape:
            raise ValueError(
                f"a mask of hidden sites must have the event's shape "
                f"{tuple(energy.event_shape)}, got {tuple(hidden.shape)}."
            )
        hidden = hidden.flatten().nonzero().squeeze(-1)
    listed = hidden.tolist() if isinstance(hidden, Tensor) else list(hidden)
    sites = [site_number(names, site) for site in listed]
    known = all(type(site) is int and 0 <= site < number for site in sites)
    if not known or not 0 < len(set(sites)) < number or len(set(sites)) < len(sites):
        raise ValueError(
            f"hidden must name some of the {number} sites and not all, each once, by "
            f"numbers from 0 to {number - 1}{'' if names is None else ' or by names'}; "
            f"got {listed[:6]}."
        )
    return set(sites)
