r"""Closed forms of products of distributions that stay in one exponential family.

Of experts :math:`q_k(x) = e^{\eta_k^\top T(x) - A(\eta_k)}` of one exponential family,
with :math:`h = 1`, the product of powers is

.. math::
    \prod_k q_k(x)^{w_k} = Z\, r(x), \qquad
    r = \text{the member with } \eta = \sum_k w_k \eta_k                   \tag{1}

As (1) holds at every point, one point gives the partition function:

.. math::
    \log Z = \sum_k w_k \log q_k(x_0) - \log r(x_0)                        \tag{2}

So a rule of :func:`register_product` has only to name :math:`r`. Gaussians of any kind,
mixtures of them and Gaussians of parts of the event need no rule; see
:mod:`pyro_ebm.energies.closed_form.gaussian`.
"""

__all__ = ["product_closed_form", "register_product"]

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
import torch.distributions as torch_dist
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.closed_form.gaussian import (
    ImproperProductError,
    gaussian_form,
    product_form,
)

Weight: TypeAlias = float | Tensor
#: From experts and weights to the normalised product, or ``None``.
Rule: TypeAlias = Callable[
    [Sequence[Any], Sequence[Weight]], dist.TorchDistribution | None
]
_RULES: list[tuple[tuple[type, ...], Rule]] = []

#: What is left of a sum is rounding below this number of units in its last place.
_ROUNDING_UNITS = 8


def register_product(*types: type) -> Callable[[Rule], Rule]:
    r"""Add a rule for products of distributions of the given types.

    The rule is called as ``rule(experts, weights)`` with any number of experts, each an
    instance of one of the types (as by ``isinstance``), stripped of ``.to_event``. It
    returns the normalised distribution proportional to the product of the powers,
    differentiable in the experts and weights and with the experts' batch shape; or
    ``None`` where it knows none, or raises ``ValueError`` where there is none. The
    partition function follows by (2). Rules registered later come first.

    Args:
        *types: Torch's or Pyro's classes of distributions; Pyro's are subclasses of
            torch's.

    Returns:
        A decorator.

    Example:
        >>> @pyro_ebm.energies.register_product(dist.Laplace)
        ... def _(experts, weights):
        ...     first, *others = experts
        ...     if any((e.loc != first.loc).any() for e in others):
        ...         return None
        ...     rate = sum(w / e.scale for e, w in zip(experts, weights))
        ...     return dist.Laplace(first.loc, 1 / rate)
        >>> p = pyro_ebm.energies.DistributionEnergy(dist.Laplace(0.0, 1.0))
        >>> (2.0 * p).closed_form().distribution
        Laplace(loc: 0.0, scale: 0.5)
    """

    def register(rule: Rule) -> Rule:
        _RULES.insert(0, (types, rule))
        return rule

    return register


def product_closed_form(terms: Sequence[tuple[Energy, Weight]]) -> ClosedForm | None:
    r"""Distribution and :math:`\log Z` of a weighted sum of energies.

    Args:
        terms: Energies of one event and support with their weights, at least one.

    Returns:
        ``None`` if no rule applies.

    Raises:
        ImproperProductError: If a rule shows that there is no partition function.

    Exactness: *exact* where it is not ``None``.
    """
    energies, weights = zip(*terms, strict=True)
    closed = [energy.closed_form() for energy in energies]
    known = [form for form in closed if form is not None]
    if len(known) == len(closed):
        result = _by_rule(known, weights)
        if result is not None:
            return result
    forms = []
    for energy in energies:
        form = gaussian_form(energy)
        if form is None:
            return None
        forms.append(form)
    product = product_form(forms, weights)
    if product is None:
        return None
    options = [energy.tensor_options() for energy in energies]
    return product.closed_form(energies[0].event_shape, options[0])


def _by_rule(
    experts: Sequence[ClosedForm], weights: Sequence[Weight]
) -> ClosedForm | None:
    parts, num_events = zip(*(_strip(e.distribution) for e in experts), strict=True)
    rule = _find_rule(parts)
    if rule is None or len(set(num_events)) > 1:
        return None
    shapes = {part.batch_shape for part in parts}
    if len(shapes) > 1:
        shape = torch.broadcast_shapes(*shapes)
        parts = tuple(part.expand(shape) for part in parts)
    try:
        product: Any = rule(parts, weights)
    except ValueError as error:
        families = ", ".join(type(part).__name__ for part in parts)
        raise ImproperProductError(
            f"the product of these experts ({families}) with weights {[*weights]} has "
            f"no partition function: {error}"
        ) from error
    if product is None:
        return None
    x = _point_of(product).detach()
    log_ratio = sum(
        w * part.log_prob(x) for part, w in zip(parts, weights, strict=True)
    ) - product.log_prob(x)
    log_partition = sum_rightmost(log_ratio, num_events[0]) + sum(
        w * expert.log_partition for expert, w in zip(experts, weights, strict=True)
    )  # (2)
    return ClosedForm(log_partition, product.to_event(num_events[0]))


def _strip(distribution: Any) -> tuple[Any, int]:
    """What is inside of ``.to_event(n)``, and ``n``."""
    number = 0
    while isinstance(distribution, torch_dist.Independent):
        number += distribution.reinterpreted_batch_ndims
        distribution = distribution.base_dist
    return distribution, number


def _find_rule(parts: Sequence[Any]) -> Rule | None:
    matching = (
        rule for types, rule in _RULES if all(isinstance(p, types) for p in parts)
    )
    return next(matching, None)


def _point_of(distribution: Any) -> Tensor:
    """A point at which the density is neither nil nor infinite."""
    if isinstance(distribution, torch_dist.TransformedDistribution):
        x = _point_of(distribution.base_dist)
        for transform in distribution.transforms:
            x = transform(x)
        return x
    names = ["mode"] if distribution.support.is_discrete else ["mean", "mode"]
    for name in names:
        try:
            point: Tensor = getattr(distribution, name)
        except NotImplementedError:
            continue
        if (
            point.isfinite().all()
        ):  # the mode of a fair coin is nan, as is Cauchy's mean
            return point
    with torch.random.fork_rng(devices=[]):
        return distribution.sample()


def _exponential_family(
    *types: type,
    natural: Callable[[Any], Sequence[Tensor]],
    build: Callable[..., dist.TorchDistribution],
    unit_weight: bool = False,
) -> None:
    """Register (1): natural parameters add up.

    Args:
        types: Of the family's members.
        natural: From a member to its natural parameters.
        build: From natural parameters to a member; checks them.
        unit_weight: Whether there is a factor ``h`` that only weights which add up to
            one leave as it is.
    """

    @register_product(*types)
    def rule(
        experts: Sequence[Any], weights: Sequence[Weight]
    ) -> dist.TorchDistribution | None:
        total = torch.as_tensor(sum(weights)).detach()
        if unit_weight and abs(total - 1) > 1e-6:
            return None
        parameters = zip(*map(natural, experts), strict=True)
        return build(*(_weighted_sum(eta, weights) for eta in parameters))  # (1)


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """The sum; exactly zero, but with its gradient, where only rounding is left."""
    terms = [w * value for value, w in zip(values, weights, strict=True)]
    total: Any = sum(terms)
    size: Any = sum(term.detach().abs() for term in terms)
    noise = _ROUNDING_UNITS * torch.finfo(total.dtype).eps * size
    is_noise = (total.detach().abs() <= noise) & total.isfinite()
    return torch.where(is_noise, total - total.detach(), total)


def _normal(linear: Tensor, precision: Tensor) -> dist.Normal:
    scale = _positive(precision, "precision").rsqrt()
    return dist.Normal(linear / precision, scale, validate_args=True)


def _log_normal(linear: Tensor, precision: Tensor) -> dist.LogNormal:
    scale = _positive(precision, "precision of the logarithm").rsqrt()
    # The coefficient of log x has the -1 of the Jacobian.
    return dist.LogNormal((linear + 1) / precision, scale, validate_args=True)


def _half_normal(precision: Tensor) -> dist.HalfNormal:
    scale = _positive(precision, "precision").rsqrt()
    return dist.HalfNormal(scale, validate_args=True)


def _positive(value: Tensor, name: str) -> Tensor:
    if not (value > 0).all():
        raise ValueError(f"its {name} would be {value.min().item():.3g}.")
    return value


def _von_mises(cosine: Tensor, sine: Tensor) -> dist.VonMises:
    tiny = torch.finfo(cosine.dtype).tiny ** 0.5
    concentration = (cosine.square() + sine.square() + tiny).sqrt()
    return dist.VonMises(torch.atan2(sine, cosine), concentration, validate_args=True)


_exponential_family(
    torch_dist.Normal,
    natural=lambda p: (p.loc / p.scale**2, p.scale**-2),
    build=_normal,
)
_exponential_family(
    torch_dist.LogNormal,
    natural=lambda p: (p.loc / p.scale**2 - 1, p.scale**-2),
    build=_log_normal,
)
_exponential_family(
    torch_dist.HalfNormal,
    natural=lambda p: (p.scale**-2,),
    build=_half_normal,
)
_exponential_family(
    torch_dist.Gamma,
    torch_dist.Exponential,
    natural=lambda p: (
        getattr(p, "concentration", torch.ones_like(p.rate)) - 1,
        p.rate,
    ),
    build=lambda shape, rate: dist.Gamma(shape + 1, rate, validate_args=True),
)
_exponential_family(
    dist.InverseGamma,
    natural=lambda p: (p.concentration + 1, p.rate),
    build=lambda shape, rate: dist.InverseGamma(shape - 1, rate, validate_args=True),
)
_exponential_family(
    torch_dist.Beta,
    natural=lambda p: (p.concentration1 - 1, p.concentration0 - 1),
    build=lambda a, b: dist.Beta(a + 1, b + 1, validate_args=True),
)
_exponential_family(
    torch_dist.Dirichlet,
    natural=lambda p: (p.concentration - 1,),
    build=lambda a: dist.Dirichlet(a + 1, validate_args=True),
)
_exponential_family(
    torch_dist.VonMises,
    natural=lambda p: (
        p.concentration * p.loc.cos(),
        p.concentration * p.loc.sin(),
    ),
    build=_von_mises,
)
_exponential_family(
    torch_dist.Bernoulli,
    natural=lambda p: (p.logits,),
    build=lambda logits: dist.Bernoulli(logits=logits, validate_args=True),
)
_exponential_family(
    torch_dist.Categorical,
    natural=lambda p: (p.logits,),
    build=lambda logits: dist.Categorical(logits=logits, validate_args=True),
)
_exponential_family(
    torch_dist.OneHotCategorical,
    natural=lambda p: (p.logits,),
    build=lambda logits: dist.OneHotCategorical(logits=logits, validate_args=True),
)
_exponential_family(
    torch_dist.Geometric,
    natural=lambda p: (-(-p.probs).log1p(),),
    build=lambda rate: dist.Geometric(-torch.expm1(-rate), validate_args=True),
)
_exponential_family(
    torch_dist.Poisson,
    natural=lambda p: (p.rate.log(),),
    build=lambda log_rate: dist.Poisson(log_rate.exp(), validate_args=True),
    unit_weight=True,
)
