r"""Estimators over finite supports from the conditional of each site, without log Z.

With :math:`p_i(v) \propto e^{-f(x_1, \dots, v, \dots, x_D)}`, the conditional of site
:math:`i` given the others at a datum, pseudolikelihood and ratio matching maximise

.. math::
    J_{\text{pseudo}} = \sum_i \log p_i(x_i), \qquad
    J_{\text{ratio}} = -\frac12 \sum_i \sum_v \left(p_i(v) - [v = x_i]\right)^2
                                                                           \tag{1}

log Z cancels in each. Of two values the second is Hyvarinen's
:math:`-\sum_i (1 + p(x) / p(\bar x_i))^{-2}` with the site flipped.

References:
    Besag (1975), The Statistician 24, 179-195 (pseudolikelihood). Hyvarinen (2007),
    Computational Statistics & Data Analysis 51, 2499-2512 (ratio matching).
"""

__all__ = ["Pseudolikelihood", "RatioMatching"]

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.finite import finite_values, num_states
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.infer.objectives.objective import Need, Objective, Surrogate, Terms


class _OfSites(Objective):
    """A score of the conditional of each site, summed over sites."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    num_sites: int | None

    def __post_init__(self) -> None:
        if self.num_sites is not None and self.num_sites < 1:
            raise ValueError(f"num_sites must be at least 1, got {self.num_sites}.")

    @staticmethod
    @abstractmethod
    def _score(log_probs: Tensor, own: Tensor) -> Tensor:
        """The term of each site in (1).

        Args:
            log_probs: Of each value, shape ``(q, *batch, K)``.
            own: Index of the value at the datum, shape ``(*batch, K)``.
        """

    def check(self, distribution: EnergyDistribution, x: Tensor) -> None:
        """Refuse supports that are not finite; see :meth:`Objective.check`."""
        energy = distribution.energy
        if not is_finite_support(energy.support):
            raise ValueError(
                f"energy must have a finite support for {type(self).__name__}, got "
                f"{energy.support}. On a continuous one ScoreMatching compares slopes "
                "in the same way."
            )

    def surrogate(
        self, distribution: EnergyDistribution, state: nn.Module
    ) -> Surrogate:
        """See :meth:`Objective.surrogate`."""
        energy = distribution.energy
        self.check(distribution, torch.empty(0))

        def surrogate(x: Tensor) -> Terms:
            value = energy(x)
            values = torch.tensor(finite_values(energy.support)).to(x)
            own = torch.searchsorted(values, x.contiguous()).reshape(*value.shape, -1)
            if isinstance(energy, SiteEnergy):
                logits = energy.site_logits(x).reshape(len(values), *own.shape)
                return Terms(self._score(logits.log_softmax(0), own).sum(-1), value)
            size = own.shape[-1]
            count = size if self.num_sites is None else min(self.num_sites, size)
            sites = torch.rand(own.shape, device=x.device).argsort(-1)[..., :count]
            logits = _logits(energy, x, value, values, own, sites)
            chosen = own.gather(-1, sites)
            total = self._score(logits.log_softmax(0), chosen).sum(-1)
            return Terms(total * (size / count), value)

        return surrogate


@final
@dataclass(frozen=True)
class Pseudolikelihood(_OfSites):
    """The pseudolikelihood (1) of data over a finite support.

    Args:
        num_sites: Sites that are looked at in each datum, chosen at random anew at each
            step; default: all. Of no use where the energy knows its conditionals.

    Raises:
        ValueError: If ``num_sites`` is below 1, or the support is not finite.

    Exactness: *consistent*, and nearly as good as maximum likelihood where sites depend
    little on each other. It leaves no log Z.

    Cost: one value a data point where the energy knows its conditionals
    (:class:`~pyro_ebm.energies.IsingEnergy`, say), else one for each other value of
    each site.

    Example:
        >>> energy = pyro_ebm.energies.IsingEnergy((4, 4), coupling=0.0)
        >>> loss = Pseudolikelihood().loss(energy, torch.ones(10, 4, 4))
        >>> round(loss.item() / 16, 4)  # log(2) a site
        0.6931
    """

    num_sites: int | None = None

    @staticmethod
    def _score(log_probs: Tensor, own: Tensor) -> Tensor:
        return log_probs.gather(0, own[None])[0]  # (1)


@final
@dataclass(frozen=True)
class RatioMatching(_OfSites):
    """Ratio matching (1) of data over a finite support.

    Less than the pseudolikelihood it minds sites that the model is sure of, and wrong.

    Args:
        num_sites: As for :class:`Pseudolikelihood`.

    Raises:
        ValueError: If ``num_sites`` is below 1, or the support is not finite.

    Exactness: *consistent*. It leaves no log Z.

    Cost: as for :class:`Pseudolikelihood`.

    Example:
        >>> energy = pyro_ebm.energies.IsingEnergy((4, 4), coupling=0.0)
        >>> RatioMatching().loss(energy, torch.ones(10, 4, 4)).item() / 16
        0.25
    """

    num_sites: int | None = None

    @staticmethod
    def _score(log_probs: Tensor, own: Tensor) -> Tensor:
        probs = log_probs.exp()
        at_own = probs.gather(0, own[None])[0]
        return -(probs.square().sum(0) - 2 * at_own + 1) / 2  # (1)


def _logits(
    energy: Energy, x: Tensor, value: Tensor, values: Tensor, own: Tensor, sites: Tensor
) -> Tensor:
    """Minus the energy with each value at each of some sites, ``(q, *batch, K)``."""
    flat = x.reshape(*own.shape)
    number = num_states(energy.support, energy.event_shape)
    rows = []
    for k in range(sites.shape[-1]):
        site = sites[..., k : k + 1]
        at = own.gather(-1, site)
        changed = flat.expand(len(values) - 1, *flat.shape).clone()
        shifts = torch.arange(1, len(values), device=x.device)
        index = (at + shifts.reshape(-1, *(1,) * at.dim())) % len(values)
        changed.scatter_(-1, site.expand(index.shape), values[index])
        others = -energy(changed.reshape(-1, *x.shape))
        if number is not None:
            states = number.flatten().to(x.device)[site]
            others = others.where((index < states)[..., 0], -torch.inf)
        logits = torch.cat([-value[None], others])
        places = torch.cat([at[None], index])[..., 0]
        rows.append(torch.zeros_like(logits).scatter(0, places, logits))
    return torch.stack(rows, -1)
