r"""Factors of a product of experts, collected and simplified.

.. math::
    \prod_k e^{-w_k f_k(x)}                                                \tag{1}

Equal factors are collected, :math:`p^a p^b = p^{a + b}`, so that each is evaluated
once, and those whose powers cancel are left out. For weights that add up to one,
Hoelder's inequality gives

.. math::
    Z = \int \prod_k \left(e^{-f_k(x)}\right)^{w_k} dx \le \prod_k Z_k^{w_k},
    \qquad w_k \ge 0,\ \sum_k w_k = 1                                      \tag{2}

with equality if and only if all :math:`e^{-f_k} / Z_k` are the same distribution.
"""

__all__ = ["LogPartitionBound", "ProductTerms", "Term"]

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.distributions.energy import EnergyDistribution
from pyro_ebm.distributions.mixture import MixtureOfExperts
from pyro_ebm.distributions.model import EnergyModel
from pyro_ebm.energies import DistributionEnergy, Energy, PyroModelEnergy, SumEnergy
from pyro_ebm.energies.corrections import without_independent
from pyro_ebm.energies.distribution import require_single
from pyro_ebm.partition.default_base import standard_base

#: What is left of powers that cancel is rounding below this part of them.
_ROUNDING = 1e-15
#: Powers that differ by less add up to the same.
_SAME_POWER = 1e-6
#: Characters of a distribution in a formula.
_MAX_NAME = 50


class LogPartitionBound(NamedTuple):
    r"""A bound of :math:`\log Z` in nats.

    Attributes:
        value: The bound.
        std_error: Its standard error; 0 where all :math:`\log Z_k` are exact.

    Exactness: *upper bound*, given exact :math:`\log Z_k`.

    Example:
        >>> experts = [dist.Normal(0.0, 1.0), dist.Normal(2.0, 1.0)]
        >>> product = pyro_ebm.distributions.ProductOfExperts(experts, [0.5, 0.5])
        >>> bound = product.upper_bound()
        >>> bound.std_error, bound.value > product.log_partition.item()
        (0.0, True)
    """

    value: float
    std_error: float


class Term(NamedTuple):
    """One factor of (1).

    Attributes:
        expert: As it was given.
        energy: What is multiplied by the weight; of a Pyro distribution minus its log
            density, of all others the energy as it is.
        weight: The power.
    """

    expert: Any
    energy: Energy
    weight: float | Tensor

    @property
    def key(self) -> int:
        """Equal for views of the same energy, and for the same Pyro distribution."""
        is_own = isinstance(self.expert, Energy | EnergyDistribution | EnergyModel)
        return id(self.energy if is_own else self.expert)

    @property
    def name(self) -> str:
        """The expert in a formula."""
        expert = self.expert
        if isinstance(expert, EnergyDistribution | EnergyModel):
            return f"{type(expert).__name__}({type(expert.energy).__name__})"
        expert = without_independent(expert)
        full = "" if isinstance(expert, Energy) else repr(expert)
        is_short = 0 < len(full) <= _MAX_NAME and "\n" not in full
        return full if is_short else f"{type(expert).__name__}(...)"

    @property
    def power(self) -> float:
        """The weight, without the gradient that it may have."""
        return _number_of(self.weight)

    @property
    def is_positive(self) -> bool:
        """Whether the power is."""
        return self.power > 0

    @property
    def is_zero(self) -> bool:
        """Whether the power is, and no optimiser can change that."""
        return not isinstance(self.weight, Tensor) and self.weight == 0


class ProductTerms(tuple[Term, ...]):
    """The factors of a product, of which there is at least one."""

    __slots__ = ()

    @classmethod
    def of(
        cls, experts: Sequence[Any], weights: Sequence[float | Tensor]
    ) -> "ProductTerms":
        """The factors of (1), flattened and simplified.

        Args:
            experts: At least one.
            weights: As many.

        Returns:
            At least one term; one of weight zero where all cancel.

        Raises:
            TypeError: If an expert is neither distribution nor energy.
            ValueError: If an expert has a batch of its own, or a weight is not finite.
            NotImplementedError: If Pyro models with constrained sites are multiplied.
        """
        if not experts:
            raise ValueError("experts must hold at least one distribution, got none.")
        if len(weights) != len(experts):
            raise ValueError(
                f"weights must hold one number for each of the {len(experts)} experts, "
                f"got {len(weights)}."
            )
        terms: dict[int, Term] = {}
        for k, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            _require_number(weight, k)
            for term in _flattened(expert, weight, k):
                same = terms.get(term.key)
                if same is None:
                    terms[term.key] = term
                elif _is_learned(same.weight) or _is_learned(term.weight):
                    terms[-len(terms)] = term  # a sum would no longer be a parameter
                else:
                    total = _plus(same.weight, term.weight)
                    terms[term.key] = same._replace(weight=total)
        kept = [term for term in terms.values() if not term.is_zero]
        _require_one_jacobian(kept)
        return cls(kept or list(terms.values())[:1])

    def normalised(self) -> list[dist.TorchDistribution]:
        """Normalised distributions that experts of positive power are or bring along.

        The power itself where its closed form is known, else the expert, else its base.
        """
        found = (_normalised(term) for term in self if term.is_positive)
        return [distribution for distribution in found if distribution is not None]

    def default_base(self, energy: Energy) -> dist.TorchDistribution | None:
        """The widest normalised expert, or a mixture where that is not known.

        Without any it is standard normal in unconstrained space, or ``None`` for
        discrete energies.

        Args:
            energy: Of the product.
        """
        known = self.normalised()
        if not known:
            return None if energy.support.is_discrete else standard_base(energy)
        volumes = [_log_volume(distribution) for distribution in known]
        if len(known) > 1 and not all(map(math.isfinite, volumes)):
            return MixtureOfExperts(known)
        return known[max(range(len(known)), key=volumes.__getitem__)]

    def upper_bound(self) -> LogPartitionBound:
        r"""Evaluate the logarithm of the bound (2).

        Returns:
            The bound. Its error is that of estimated :math:`\log Z_k`, taken for
            independent.

        Raises:
            ValueError: If weights are negative or do not add up to one, or the
                :math:`\log Z_k` of an expert is not known.

        Exactness: *upper bound*, given exact :math:`\log Z_k`.
        """
        weights = [term.power for term in self]
        if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(
                "weights must be positive and add up to 1 for Hoelder's bound, got "
                f"{weights}. Estimate log Z: product.estimate_log_partition()."
            )
        known = list(zip(weights, map(_log_partition_of, self), strict=True))
        return LogPartitionBound(
            sum(w * value for w, (value, _) in known),
            math.hypot(*(w * error for w, (_, error) in known)),
        )  # (2)


def _number_of(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _log_partition_of(term: Term) -> tuple[float, float]:
    """Log Z of an expert and its standard error."""
    closed = term.energy.closed_form()
    if closed is not None:
        return _number_of(closed.log_partition), 0.0
    expert = term.expert
    if isinstance(expert, EnergyModel):
        with torch.no_grad():
            expert = expert()
    if not isinstance(expert, EnergyDistribution) or not expert.is_normalized:
        raise ValueError(
            "the log Z of every expert must be known for a bound, and that of "
            f"{term.name} is not. Estimate it: EnergyDistribution(energy, "
            "pyro_ebm.partition.estimate(energy, base))."
        )
    error = expert.log_partition_std_error
    return _number_of(expert.log_partition), _number_of(error)


def _require_one_jacobian(terms: Sequence[Term]) -> None:
    r"""Refuse posteriors whose product has another Jacobian than one of them.

    The energy of a Pyro model is that of unconstrained :math:`u`, with
    :math:`x = T(u)`: the product of densities of :math:`x` has
    :math:`\sum_k w_k f_k(u) + (\sum_k w_k - 1) \log |\det T'(u)|`.
    """
    models = [
        term
        for term in terms
        if isinstance(term.energy, PyroModelEnergy) and term.energy.is_constrained
    ]
    total = sum(term.power for term in models)
    if not models or abs(total - 1) < _SAME_POWER:
        return
    raise NotImplementedError(
        "experts must not be posteriors of Pyro models with constrained sites "
        f"(positive, say), of powers that add up to {total:.6g}: their energies live "
        "in unconstrained space, and the Jacobian of the sites would count that often. "
        "Bring it to once: with f the sum of w_k * model_k, "
        f"EnergyDistribution(f + ({total:.6g} - 1) * FunctionEnergy(model.log_abs_det, "
        "model.event_shape)) is the product of the densities of the sites; "
        "EnergyDistribution(f) alone that of the densities of unconstrained values."
    )


def _flattened(expert: Any, weight: float | Tensor, number: int) -> list[Term]:
    inner: Sequence[Term] | None = getattr(expert, "terms", None)
    if inner is not None and isinstance(expert, EnergyDistribution):
        learned = any(_is_learned(w) for w in (weight, *(t.weight for t in inner)))
        if not learned or (not isinstance(weight, Tensor) and weight == 1):
            return [t._replace(weight=_times(weight, t.weight)) for t in inner]
    return [Term(expert, _energy_of(expert, number), weight)]


def _energy_of(expert: Any, number: int) -> Energy:
    if isinstance(expert, EnergyDistribution | EnergyModel):
        return expert.energy
    if isinstance(expert, Energy):
        return expert
    name = f"experts[{number}]"
    if not isinstance(expert, Distribution):
        raise TypeError(
            f"{name} must be a distribution, an energy or an EnergyModel, got "
            f"{type(expert).__name__}. A number is a power: p ** 2.0."
        )
    distribution: Any = expert
    inner = distribution
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
        if isinstance(inner, EnergyDistribution):
            raise TypeError(
                f"{name} must be an EnergyDistribution itself, not one inside of "
                f"{type(expert).__name__}, whose log Z is that of several. Multiply "
                "first and call .to_event or .mask on the product; copies of an "
                "energy on parts of an event are a pyro_ebm.energies.PartEnergy."
            )
    require_single(distribution, name)
    return DistributionEnergy(distribution)


def _normalised(term: Term) -> dist.TorchDistribution | None:
    energy, expert = term.energy, term.expert
    known = energy.closed_form()
    if known is not None:
        power = SumEnergy([energy], [term.weight]).closed_form()
        return (power or known).distribution
    holders = (
        expert,
        getattr(expert, "owner", None),
        getattr(expert, "sampler", None),
        energy,
    )
    bases: list[Any] = [getattr(holder, "base", None) for holder in holders]
    return next((base for base in bases if hasattr(base, "log_prob")), None)


def _log_volume(distribution: Any) -> float:
    """Log of the product of all variances, infinite where it is not known."""
    if isinstance(distribution, MixtureOfExperts):
        return math.inf  # wide by its distances, not by what it covers
    try:
        volume = _number_of(distribution.variance.double().log().sum())
    except NotImplementedError:
        return math.inf
    return math.inf if math.isnan(volume) else volume


def _require_number(weight: Any, number: int) -> None:
    name = f"weights[{number}]"
    if not isinstance(weight, numbers.Real | Tensor):
        raise TypeError(
            f"{name}, a power, must be a number, got {type(weight).__name__}."
        )
    value = torch.as_tensor(weight).detach()
    if value.dim() or not value.isfinite():
        raise ValueError(
            f"{name}, a power, must be one finite number or a tensor of shape (), got "
            f"{weight}."
        )


def _is_learned(weight: float | Tensor) -> bool:
    return isinstance(weight, nn.Parameter)


def _times(scale: float | Tensor, weight: float | Tensor) -> float | Tensor:
    # One times a parameter would no longer be learned.
    return weight if not isinstance(scale, Tensor) and scale == 1 else scale * weight


def _plus(first: Any, second: Any) -> float | Tensor:
    total: float | Tensor = first + second
    if isinstance(total, Tensor):
        return total
    return 0.0 if abs(total) <= _ROUNDING * (abs(first) + abs(second)) else total
