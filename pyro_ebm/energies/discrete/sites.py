r"""The contract of an energy over finite sites whose conditionals are known.

Given all other sites, a site :math:`i` has the distribution

.. math::
    p(x_i = v \mid x_{\setminus i}) \propto e^{\ell_{iv}(x)}               \tag{1}

and sites without a common term are independent given the others. So the sites fall into
blocks, each of which is drawn at once: what block Gibbs sampling needs to know.
"""

__all__ = ["SiteEnergy", "path_through", "softened"]

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.discrete.exact.elimination import Factors
from pyro_ebm.energies.discrete.finite import (
    AnnealingPath,
    finite_values,
    num_points,
)
from pyro_ebm.energies.discrete.independent import IndependentSites, without_missing

#: Nats below all that is allowed where what is forbidden is not yet so.
_PENALTY = 30.0


class SiteEnergy(Energy):
    r"""An energy that knows the conditional of each site given all others.

    Attributes:
        blocks: Masks of sites that are independent given the others, shape
            ``(B, *event)``; each site is in one of them.
        values: What a site may be, shape ``(q,)``, in increasing order. A site with
            fewer states than ``q`` has the first of them.

    Args:
        event_shape: Shape of one point.
        support: Finite, with as many event dimensions.
        blocks: See above; booleans.
        like: A tensor whose dtype and device ``values`` has.
        batch_shape: Of a batch of energies.
    """

    blocks: Tensor
    values: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        support: Constraint,
        blocks: Tensor,
        like: Tensor,
        batch_shape: Sequence[int] = (),
    ) -> None:
        super().__init__(event_shape, support, batch_shape)
        self.register_buffer("blocks", blocks.to(like.device), persistent=False)
        values = torch.tensor(finite_values(support)).to(like)
        self.register_buffer("values", values, persistent=False)

    @abstractmethod
    def site_logits(self, x: Tensor) -> Tensor:
        r"""The logits :math:`\ell_{iv}` of (1), up to a constant for each site.

        Args:
            x: Points of shape ``(*batch, *event)``.

        Returns:
            Shape ``(q, *batch, *event)``; ``-inf`` at values that a site does not have.
        """

    def factors(self) -> Factors | None:
        """The log potentials of few sites each whose sum is minus the energy.

        Returns:
            Pairs of the sites, numbers in the flattened event of shape ``(F, k)``, and
            a table of shape ``(*batch, F, *states)``, or ``(*batch, 1, *states)`` if
            all have the same. ``None`` where the energy is not known by such tables.
        """
        return None

    def annealing_path(self) -> AnnealingPath:
        """From uniform sites to this energy, by scaling it."""
        like = self.values
        uniform = IndependentSites.uniform(self.support, self.event_shape, like)
        number = num_points(self.support, self.event_shape) or 1
        start = ClosedForm(like.new_tensor(math.log(number)), uniform)
        return AnnealingPath(start, lambda b: _ScaledSites(self, b), is_linear=True)


def softened(table: Tensor) -> Tensor:
    """Potentials with a finite penalty where a state is forbidden."""
    finite = table[table.isfinite()]
    if not len(finite):
        return torch.zeros_like(table)
    low, high = finite.aminmax()
    return table.where(table > -torch.inf, 2 * low - high - _PENALTY)


def path_through(soft: SiteEnergy, path: AnnealingPath) -> AnnealingPath:
    """The path of an energy that forbids nothing, up to the end of another.

    Args:
        soft: Where what is forbidden at the end is only unlikely.
        path: To the energy itself.
    """
    at = soft.annealing_path().at
    return path._replace(
        at=lambda beta: at(beta) if beta < 1 else path.at(beta), is_linear=False
    )


@final
class _ScaledSites(SiteEnergy):
    """A multiple of an energy, from 0 on."""

    def __init__(self, energy: SiteEnergy, scale: float) -> None:
        super().__init__(
            energy.event_shape,
            energy.support,
            energy.blocks,
            energy.values,
            energy.batch_shape,
        )
        self.energy, self.scale = energy, scale

    def forward(self, x: Tensor) -> Tensor:
        value = self.energy(x)
        # Zero times infinity is no number: nothing is forbidden at the start.
        return self.scale * value if self.scale else torch.zeros_like(value)

    def factors(self) -> Sequence[tuple[Tensor, Tensor]] | None:
        factors = self.energy.factors()
        if factors is None or not self.scale:
            return factors and []
        return [(sites, self.scale * table) for sites, table in factors]

    def site_logits(self, x: Tensor) -> Tensor:
        logits = self.energy.site_logits(x)
        if self.scale:
            return self.scale * logits
        return without_missing(self.support, torch.zeros_like(logits))
