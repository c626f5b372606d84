r"""Product of experts: the normalised product of powers of densities.

The energies add up (eq. (1.3) to (1.6)):

.. math::
    f(x) &= \sum_k w_k f_k(x), \qquad
    q(x) = e^{-f(x)} / Z = \frac1Z \prod_k e^{-w_k f_k(x)}                 \tag{1} \\
    Z &= \int \prod_k e^{-w_k f_k(x)}\, dx                                 \tag{2}

What is multiplied, and so what :math:`\log Z` is the logarithm of, depends on the kind
of expert:

* an :class:`~pyro_ebm.energies.Energy`, an :class:`EnergyDistribution`, an
  :class:`EnergyModel` stand for the unnormalised :math:`e^{-f_k}`, whatever is known of
  :math:`\log Z_k`;
* any Pyro distribution stands for its exact density: :math:`f_k = -\log q_k`.

So :math:`\log Z` of ``Normal(0, 1) * Normal(2, 1)`` is :math:`\log \mathcal{N}(2; 0, 2)
= -2.2655`, and that of the product of :math:`e^{-x^2/2}` and :math:`e^{-(x-2)^2/2}` is
:math:`\tfrac12 \log \pi - 1 = -0.4276`. The product is the same distribution. With
normalised experts and :math:`w_k = 1` it is the log of the overlap of the experts. It
is the sum of their :math:`\log Z_k` only where the experts are on separate parts of the
event.
"""

__all__ = ["ProductOfExperts"]

import math
import warnings
from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.mixture import MixtureOfExperts
from pyro_ebm.distributions.operators import Factor
from pyro_ebm.distributions.representation import distribution_html
from pyro_ebm.distributions.terms import LogPartitionBound, ProductTerms
from pyro_ebm.energies import ClosedForm, Energy, SumEnergy
from pyro_ebm.energies.closed_form.gaussian import ImproperProductError
from pyro_ebm.energies.discrete.finite import finite_values
from pyro_ebm.energies.distribution import base_energy
from pyro_ebm.mcmc import IndependentChains, Sampler
from pyro_ebm.partition import (
    LogPartitionEstimate,
    estimate,
    importance_sampling,
)

_BUDGET = 50_000
#: Effective fraction of draws of the experts above which no proposal fitted to the
#: product does much better.
_MIN_FRACTION = 0.5
_MIN_PILOT = 500


@final
class ProductOfExperts(EnergyDistribution):
    r"""Product (1) of distributions and energies.

    Usually written with operators: ``p * q``, ``p / q``, ``p ** beta``, where one of
    the two may be any Pyro distribution: ``dist.Normal(0, 1) * p``. Products of
    products are flattened and equal factors collected, so each expert is evaluated
    once: ``p * q / q`` is ``p``, and so is ``p ** 1``. ``p ** 0`` is 1 in a product,
    ``p ** 0 * base`` is ``base``; alone it is flat, and refused when used.

    Gaussian and quadratic experts, mixtures of them and conjugate experts
    (:func:`pyro_ebm.energies.register_product`) have an exact :math:`\log Z` and exact
    draws. Otherwise :math:`\log Z` is unknown until it is estimated. Experts on parts
    of the event (:class:`~pyro_ebm.energies.PartEnergy`,
    :class:`~pyro_ebm.energies.LinearMapEnergy`) make a Markov random field.

    Parameters of all experts are learned by
    :class:`pyro_ebm.infer.Learn`; no :math:`\log Z` is tracked then. To track that of
    the product, learn ``EnergyModel(product.energy, product.base)``.

    Args:
        experts: At least one; their batch shapes are broadcast.
        weights: The powers :math:`w_k`, default: 1. A ``nn.Parameter`` is learned.
        log_partition: :math:`\log Z` of (2); see :class:`EnergyDistribution`. Default:
            that of the closed form, where there is one.
        base: Normalised, on the same event and support: start of chains, reference for
            :math:`\log Z`. Default: the widest normalised expert, their mixture where
            the widest is not known, standard normal where there is none.
        sampler: How to draw; default: exactly where there is a closed form, else an
            HMC chain a draw from the base. For separated modes take
            ``ReplicaExchange(product.base)`` of :mod:`pyro_ebm.mcmc`.
        validate_args: Whether ``log_prob`` checks its argument; Pyro's default.

    Raises:
        TypeError: If an expert is neither distribution nor energy.
        ValueError: If there is no expert, if experts differ in event shape or support,
            have batch shapes that do not broadcast or, of a Pyro distribution, any, or
            if a weight is not finite. When used, if a closed form shows that there is
            no partition function.

    Exactness: as :class:`EnergyDistribution`; *exact* where there is a closed form.

    Example:
        >>> p = dist.Normal(0.0, 1.0)
        >>> product = ProductOfExperts([p, dist.Normal(2.0, 1.0)])
        >>> product.closed_form().distribution
        Normal(loc: 1.0, scale: 0.7071067690849304)
        >>> ring = pyro_ebm.energies.FunctionEnergy(
        ...     lambda x: 8 * (x.abs() - 2) ** 2, ()
        ... )
        >>> p * pyro_ebm.EnergyDistribution(ring) ** 0.5
        ProductOfExperts(Normal(loc: 0.0, scale: 1.0) *
            EnergyDistribution(FunctionEnergy) ** 0.5, batch_shape: (), event_shape: (),
            log Z: unknown)
    """

    energy: SumEnergy

    def __init__(
        self,
        experts: Sequence[Any],
        weights: "Sequence[float | Tensor] | Tensor | None" = None,
        log_partition: "float | Tensor | LogPartitionEstimate | None" = None,
        *,
        base: dist.TorchDistribution | None = None,
        sampler: Sampler | None = None,
        validate_args: bool | None = None,
    ) -> None:
        powers = [1.0] * len(experts) if weights is None else list(weights)
        #: The factors, each with its energy and weight, simplified.
        self.terms = ProductTerms.of(experts, powers)
        energy = SumEnergy(
            [term.energy for term in self.terms], [term.weight for term in self.terms]
        )
        base_energy(base, energy)  # checks that it fits
        closed = self._find_closed_form(energy)
        if log_partition is None and closed is not None:
            log_partition = closed.log_partition
        self._base = base
        if sampler is None and closed is None and not energy.support.is_discrete:
            if base is None:
                self._base = self.terms.default_base(energy)
            sampler = IndependentChains(base=self._base)
        super().__init__(
            energy, log_partition, sampler=sampler, validate_args=validate_args
        )
        self._batch_shape = _batch_shape(experts)

    @property
    def base(self) -> dist.TorchDistribution | None:
        r"""Reference for :math:`\log Z` and start of chains."""
        if self._base is None:
            self._base = self.terms.default_base(self.energy)
        return self._base

    def _find_closed_form(self, energy: SumEnergy) -> ClosedForm | None:
        self._improper = ""
        try:
            closed = energy.proper_closed_form()
        except ImproperProductError as error:
            self._improper = str(error)
            return None
        if closed is None and all(term.is_zero for term in self.terms):
            self._improper = (
                "the power 0 of an expert is flat, and has no partition function by "
                "itself. Multiply it by a base, such as a wide normal distribution."
            )
        return closed

    def _require_proper(self) -> None:
        if self._improper:
            raise ValueError(f"{self} cannot be used: {self._improper}")

    def closed_form(self) -> ClosedForm | None:
        """What is known of the product without sampling, or ``None``.

        Raises:
            ValueError: If there is no partition function.
        """
        self._require_proper()
        return super().closed_form()

    def log_prob(self, x: Tensor) -> Tensor:
        """See :meth:`EnergyDistribution.log_prob`; an error if there is no ``Z``."""
        self._require_proper()
        return super().log_prob(x)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """See :meth:`EnergyDistribution.sample`; an error if there is no ``Z``."""
        self._require_proper()
        return super().sample(sample_shape)

    def with_log_partition(
        self, log_partition: "float | Tensor | LogPartitionEstimate"
    ) -> "ProductOfExperts":
        r"""The same product, normalised.

        Args:
            log_partition: See :class:`EnergyDistribution`.

        Example:
            >>> p = dist.StudentT(3.0)
            >>> product = ProductOfExperts([p, dist.Normal(0.0, 1.0)])
            >>> log_partition = product.estimate_log_partition()
            >>> product.with_log_partition(log_partition).is_normalized
            True
        """
        new = ProductOfExperts(
            [term.expert for term in self.terms],
            [term.weight for term in self.terms],
            log_partition,
            base=self._base,
            sampler=self.sampler,
            validate_args=self._validate_args,
        )
        new._batch_shape = self.batch_shape
        return new

    def estimate_log_partition(
        self, budget: int | None = None, **settings: Any
    ) -> LogPartitionEstimate:
        r"""Estimate :math:`\log Z` of (2), with an error bar and a verdict.

        As :func:`pyro_ebm.partition.estimate` with the product's base, but where a part
        of the budget shows that draws of the normalised experts, all together, reach
        the product well, the rest goes into such draws.

        Args:
            budget: Evaluations of the product aimed at; default: 50,000 draws of the
                experts, and else as many as the time allows.
            **settings: Others of :func:`pyro_ebm.partition.estimate`.

        Returns:
            The estimate; ``"not_normalizable"`` where a closed form or the tails of the
            energy say so, as they may for quotients.

        Warns:
            UnreliableWarning: If the status is neither ``"exact"`` nor ``"ok"``.

        Example:
            >>> p = dist.StudentT(3.0).expand([4]).to_event(1)
            >>> q = dist.Normal(torch.zeros(4), 3.0).to_event(1)
            >>> print(ProductOfExperts([p, q]).estimate_log_partition())
            log Z = -8.4... by importance sampling from the experts, ...
        """
        if self._improper:
            nan = math.nan
            result = LogPartitionEstimate(
                math.inf, nan, nan, nan, nan, Status.NOT_NORMALIZABLE, "closed form", 0,
                (Finding(Reason.DIVERGENT, self._improper),),
            )  # fmt: skip
            warnings.warn(str(result), UnreliableWarning, stacklevel=2)
            return result
        if settings.get("method", "auto") == "auto" and self._needs_draws():
            measured, spent = self._from_experts(budget or _BUDGET, **settings)
            if measured is not None:
                return measured
            budget = None if budget is None else max(budget - spent, budget // 2)
        return estimate(self, self.base, budget=budget, **settings)

    def _needs_draws(self) -> bool:
        """Whether the value cannot be had exactly."""
        if self.energy.support.is_discrete:
            is_small = finite_values(self.energy.support) is not None
        else:
            is_small = self.event_shape.numel() <= 2
        return not is_small and self.energy.closed_form() is None

    def _from_experts(
        self, budget: int, *, progress_bar: bool = True, **_: Any
    ) -> tuple[LogPartitionEstimate | None, int]:
        """Importance sampling from the normalised experts, if a pilot finds it good."""
        known = self.terms.normalised()
        num_pilot = budget // 10
        if not known or num_pilot < _MIN_PILOT:
            return None, 0
        proposal = known[0] if len(known) == 1 else MixtureOfExperts(known)
        pilot = importance_sampling(
            self.energy, proposal, num_samples=num_pilot, progress_bar=False
        )
        # Over infinitely many states there is no other way.
        wanted = 0.0 if self.energy.support.is_discrete else _MIN_FRACTION * num_pilot
        if not pilot.is_reliable or pilot.ess < wanted:
            return None, num_pilot
        result = importance_sampling(
            self.energy,
            proposal,
            num_samples=budget - num_pilot,
            progress_bar=progress_bar,
        )
        if not result.is_reliable:
            return None, budget
        method = "importance sampling from the experts"
        return result._replace(num_evaluations=budget, method=method), budget

    def upper_bound(self) -> LogPartitionBound:
        r"""A bound of :math:`\log Z` from the experts' own :math:`\log Z_k`.

        Hoelder's: the sum of :math:`w_k \log Z_k`, for weights that add up to one.

        Raises:
            ValueError: If weights are negative or do not add up to one, or the
                :math:`\log Z_k` of an expert is not known.

        Exactness: *upper bound*, given exact :math:`\log Z_k`.

        Example:
            >>> experts = [dist.Normal(0.0, 1.0), dist.Normal(2.0, 1.0)]
            >>> product = ProductOfExperts(experts, weights=[0.5, 0.5])
            >>> product.upper_bound().value, round(product.log_partition.item(), 4)
            (0.0, -0.5)
        """
        return self.terms.upper_bound()

    def _formula(self) -> str:
        formula = ""
        for term in self.terms:
            sign = " * " if formula else ""
            weight = term.power
            if formula and weight == -1:
                sign, weight = " / ", 1
            power = "" if weight == 1 else f" ** {weight:.6g}"
            formula += f"{sign}{term.name}{power}"
        return formula

    def _repr_html_(self) -> str:
        return distribution_html(self, f"{self._formula()} / Z", self._improper)


def _batch_shape(experts: Sequence[Any]) -> torch.Size:
    own = EnergyDistribution | Energy
    shapes = [e.batch_shape for e in experts if isinstance(e, own)]
    try:
        return torch.Size(broadcast_shape(*shapes))
    except ValueError:
        raise ValueError(
            f"experts must have batch shapes that broadcast, got "
            f"{[tuple(shape) for shape in shapes]}. Expand the product instead: "
            "(p * q).expand(batch_shape)."
        ) from None


def _multiply(*factors: tuple[Any, float | Tensor]) -> EnergyDistribution:
    """The product of powers; where only one expert is left, that very object."""
    experts, powers = zip(*factors, strict=True)
    product = ProductOfExperts(experts, powers)
    kept = [(term.expert, term.weight) for term in product.terms]
    if len(factors) == 1:  # of a product of its own keep base, sampler and log Z
        kept = list(factors)
    ((expert, power), *more) = kept
    is_single = not more and not isinstance(power, Tensor) and power == 1
    if not is_single or not isinstance(expert, EnergyDistribution):
        return product
    if expert.batch_shape == product.batch_shape:
        return expert
    return expert.expand(product.batch_shape)


Factor._product = staticmethod(_multiply)
