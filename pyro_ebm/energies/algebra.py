r"""Sums, multiples, exponentials and mixtures of energies.

A sum of energies is a product of distributions, up to a constant (eq. (1.3) to (1.6)):

.. math::
    f(x) = \sum_k w_k f_k(x) + c, \qquad
    e^{-f(x)} \propto \prod_k q_k(x)^{w_k}                                 \tag{1}

The constant, the partition function of the product, is not the product of the
constants. Of Gaussian and of conjugate parts it is known
(:mod:`pyro_ebm.energies.closed_form.gaussian`,
:mod:`pyro_ebm.energies.closed_form.products`), and of finite sites whose sums can be
done (:mod:`pyro_ebm.energies.discrete.exact.elimination`); otherwise
:mod:`pyro_ebm.partition` estimates it.

A mixture is minus the log of a weighted sum of densities:

.. math::
    f(x) &= -\log \sum_{k=1}^K \exp(\ell_k - f_k(x))                        \tag{2} \\
    \nabla f(x) &= \sum_k r_k(x)\, \nabla f_k(x), \qquad
        r_k(x) = \exp(\ell_k - f_k(x) + f(x))                              \tag{3} \\
    Z &= \sum_k \exp(\ell_k)\, Z_k                                         \tag{4}
"""

__all__ = ["ExpEnergy", "MixtureEnergy", "SumEnergy"]

import numbers
from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.closed_form.gaussian import (
    GaussianForm,
    ImproperProductError,
    gaussian_form,
    product_form,
)
from pyro_ebm.energies.closed_form.products import product_closed_form
from pyro_ebm.energies.discrete.exact.elimination import (
    Factors,
    exact_closed_form,
    factors_of,
)
from pyro_ebm.energies.discrete.finite import finite_values, site_states
from pyro_ebm.energies.views.unconstrained import same_support


@final
class SumEnergy(Energy):
    r"""The weighted sum (1) of energies of the same event and support.

    Usually written with operators: ``f1 + f2``, ``2.0 * f``, ``f1 - f2``, ``f + 3.0``.
    Sums of sums are flattened, so each part is evaluated once.

    Args:
        energies: The parts :math:`f_k`, at least one.
        weights: One number or scalar tensor a part; a ``nn.Parameter`` is learned.
        offset: The constant :math:`c`, in nats; it moves :math:`\log Z` by ``-c``.

    Raises:
        ValueError: If the parts differ in event shape or support, if there is none, or
            if a weight or the offset is not a finite scalar.

    Example:
        >>> f = pyro_ebm.energies.FunctionEnergy(lambda x: x**2 / 2, ())
        >>> g = 2.0 * f + f - 1.0
        >>> g(torch.tensor(2.0)).item()
        5.0
    """

    offset: float | Tensor

    def __init__(
        self,
        energies: Sequence[Energy],
        weights: Sequence[float | Tensor] | None = None,
        offset: float | Tensor = 0.0,
    ) -> None:
        if not energies:
            raise ValueError("energies must hold at least one Energy, got none.")
        first = energies[0]
        _require_same_space(*energies)
        weights = [1.0] * len(energies) if weights is None else list(weights)
        if len(weights) != len(energies):
            raise ValueError(
                f"weights must hold one number for each of the {len(energies)} "
                f"energies, got {len(weights)}."
            )
        shape = broadcast_shape(*(energy.batch_shape for energy in energies))
        super().__init__(first.event_shape, first.support, shape)
        contexts = (energy.context_shape for energy in energies)
        self.context_shape = next((c for c in contexts if c is not None), None)
        self.energies: Sequence[Energy] = nn.ModuleList(energies)  # type: ignore[assignment]
        for index, weight in enumerate(weights):
            _keep_scalar(self, f"weight_{index}", weight)
        _keep_scalar(self, "offset", offset)

    @property
    def weights(self) -> list[float | Tensor]:
        """The weight of each part."""
        return [getattr(self, f"weight_{k}") for k in range(len(self.energies))]

    @property
    def terms(self) -> list[tuple[Energy, float | Tensor]]:
        """The parts, each with its weight."""
        return list(zip(self.energies, self.weights, strict=True))

    def given(self, context: Tensor) -> "SumEnergy":
        """The sum of the parts, those in the context that take one."""
        if self.context_shape is None:
            super().given(context)
        parts = [_given(part, context) for part in self.energies]
        return SumEnergy(parts, self.weights, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*sample, *batch, *event)``."""
        # One after the other: networks of one architecture stacked for one call by vmap
        # took 0.85 to 3 times as long on a CPU, with 4 to 16 of them.
        total: Any = sum(w * f(x) for f, w in self.terms)
        return total + self.offset  # (1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the parts' own gradients, so that closed forms are kept."""
        value: Any = 0.0
        grad: Any = 0.0
        for part, weight in self.terms:
            part_value, part_grad = part.value_and_grad(x)
            value = value + _detach(weight) * part_value
            grad = grad + _detach(weight) * part_grad
        return value + _detach(self.offset), grad

    def closed_form(self) -> ClosedForm | None:
        r"""Of parts that are Gaussian, or conjugate, and of a single part.

        Of finite sites by elimination of all factors, or over at most 4096 states.
        ``None`` also where the closed form shows that there is no partition function.

        Exactness: *exact* where it is not ``None``.
        """
        try:
            return self.proper_closed_form()
        except ImproperProductError:
            return None

    def proper_closed_form(self) -> ClosedForm | None:
        """The same, but an error where there is no partition function.

        Raises:
            ImproperProductError: A ``ValueError`` that says why.

        Exactness: *exact* where it is not ``None``.
        """
        (part, weight), *more = self.terms
        is_alone = not more and not isinstance(weight, Tensor) and weight == 1
        has_offset = isinstance(self.offset, Tensor) or self.offset != 0
        known = part.closed_form() if is_alone else None
        if known is None or has_offset:
            factors = self.factors()
            if factors is not None:
                return exact_closed_form(self, factors)
        if not is_alone:
            known = product_closed_form(self.terms)
        if known is None or not has_offset:
            return known
        log_partition = known.log_partition - self.offset
        return ClosedForm(log_partition, known.distribution)

    def factors(self) -> Factors | None:
        """The weighted log potentials of all parts, over finite sites.

        Returns:
            ``None`` where a part has none, see
            :meth:`~pyro_ebm.energies.discrete.sites.SiteEnergy.factors`, and more
            points than are to list.
        """
        has_context = self.context_shape is not None
        if has_context or finite_values(self.support) is None:
            return None
        found: list[tuple[Tensor, Tensor]] = []
        for part, weight in self.terms:
            factors = factors_of(part)
            if factors is None:
                return None
            found += [(sites, weight * table) for sites, table in factors]
        states = site_states(self.support, self.event_shape)
        offset = -torch.as_tensor(self.offset).to(found[0][1])
        return [*found, (torch.tensor([[0]]), offset.expand(1, states[0]))]

    def extra_repr(self) -> str:
        """Weights and offset, for ``repr``."""
        *weights, offset = (
            v.item() if isinstance(v, Tensor) else v
            for v in (*self.weights, self.offset)
        )
        return f"weights={weights}, offset={offset}"


@final
class ExpEnergy(Energy):
    r"""The energy :math:`\exp(g(x))`; written ``g.exp()``.

    It is bounded below by 0, so on an unbounded support it has a partition function
    only where :math:`g` grows. The twin :math:`-\exp(-g(x))`, written ``-(-g).exp()``,
    is bounded *above* by 0: on an unbounded support :math:`e^{-f} \ge 1` has no
    partition function, whatever :math:`g` is. Give it a box as its support, or add the
    energy of a base.

    Args:
        energy: The inner energy :math:`g`.

    Example:
        >>> g = pyro_ebm.energies.FunctionEnergy(lambda x: x**2, ())
        >>> base = pyro_ebm.energies.DistributionEnergy(dist.Normal(0.0, 1.0))
        >>> twin = -(-g).exp()
        >>> quadrature = pyro_ebm.partition.quadrature
        >>> quadrature(twin).status, quadrature(twin + base).status
        ('not_normalizable', 'exact')
    """

    def __init__(self, energy: Energy) -> None:
        super().__init__(energy.event_shape, energy.support, energy.batch_shape)
        self.context_shape = energy.context_shape
        self.energy = energy

    def given(self, context: Tensor) -> "ExpEnergy":
        """The exponential of the inner energy in a context."""
        return ExpEnergy(self.energy.given(context))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate ``exp(g(x))`` at ``x`` of shape ``(*batch, *event)``."""
        return self.energy(x).exp()

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the chain rule to the inner energy's own gradient."""
        value, grad = self.energy.value_and_grad(x)
        value = value.exp()
        return value, grad * value.reshape(value.shape + (1,) * self.event_dim)


@final
class MixtureEnergy(Energy):
    r"""The mixture (2) of unnormalised densities :math:`e^{-f_k}`.

    By (4) the weight of the *normalised* component :math:`q_k = e^{-f_k} / Z_k` is
    proportional to :math:`\exp(\ell_k)\, Z_k`, not to :math:`\exp(\ell_k)`: adding
    :math:`c` to :math:`f_k` lowers the weight of its component by :math:`e^{-c}`. For
    chosen weights :math:`w_k` pass :math:`\ell_k = \log w_k - \log Z_k`.

    Args:
        energies: The components :math:`f_k`, at least one.
        logits: :math:`\ell_k`, shape ``(K,)``, default: zeros. A ``nn.Parameter`` is
            learned.

    Raises:
        TypeError: If a component is no energy.
        ValueError: If there is no component, if they differ in event shape or support,
            or if ``logits`` are not ``K`` finite numbers.

    Example:
        >>> gaussian = pyro_ebm.energies.QuadraticEnergy
        >>> parts = [gaussian(torch.zeros(2)), gaussian(torch.ones(2))]
        >>> f = MixtureEnergy(parts, torch.tensor([0.0, 1.0]))
        >>> closed = f.closed_form()
        >>> closed.distribution.mixture_distribution.probs
        tensor([0.2689, 0.7311], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(
        self, energies: Sequence[Energy], logits: Tensor | None = None
    ) -> None:
        if not energies:
            raise ValueError("energies must hold at least one Energy, got none.")
        _require_same_space(*energies)
        logits = torch.zeros(len(energies)) if logits is None else logits
        if logits.shape != (len(energies),) or not logits.isfinite().all():
            raise ValueError(
                f"logits must be {len(energies)} finite numbers, one for each of the "
                f"energies; got {logits}. Leave out a component of weight 0."
            )
        shape = broadcast_shape(*(energy.batch_shape for energy in energies))
        super().__init__(energies[0].event_shape, energies[0].support, shape)
        self.energies: Sequence[Energy] = nn.ModuleList(energies)  # type: ignore[assignment]
        if isinstance(logits, nn.Parameter):
            self.logits = logits
        else:
            self.register_buffer("logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (2) at ``x`` of shape ``(*sample, *batch, *event)``."""
        energies = torch.stack([energy(x) for energy in self.energies], -1)
        return -torch.logsumexp(self.logits - energies, -1)  # (2)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the parts' own gradients by the responsibilities (3)."""
        parts = [energy.value_and_grad(x) for energy in self.energies]
        log_weights = self.logits.detach() - torch.stack([p[0] for p in parts], -1)
        value = -torch.logsumexp(log_weights, -1)
        grad = torch.zeros_like(x)
        responsibilities = log_weights.softmax(-1).unbind(-1)
        for r, (_, part_grad) in zip(responsibilities, parts, strict=True):
            r = r.reshape(r.shape + (1,) * self.event_dim)
            # A component outside its domain has no weight and often no gradient.
            grad = grad + (r * part_grad).where(r != 0, 0.0)  # (3)
        return value, grad

    def closed_form(self) -> ClosedForm | None:
        r""":math:`\log Z` by (4), where every component is Gaussian by its own account.

        Exactness: *exact* where it is not ``None``.
        """
        known = (energy.closed_form() for energy in self.energies)
        closed = [form for form in known if form is not None]
        parts = [form.distribution for form in closed]
        gaussian = [part for part in parts if isinstance(part, dist.MultivariateNormal)]
        if len(gaussian) < len(self.energies):
            return None
        shape = self.batch_shape
        constants = [c.log_partition.expand(shape) for c in closed]
        log_weights = self.logits + torch.stack(constants, -1)
        gaussian = [part.expand(shape) for part in gaussian]
        components = dist.MultivariateNormal(
            torch.stack([p.loc for p in gaussian], -2),
            scale_tril=torch.stack([p.scale_tril for p in gaussian], -3),
            validate_args=False,
        )
        mixture = dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights, validate_args=False),
            components,
            validate_args=False,
        )
        return ClosedForm(torch.logsumexp(log_weights, -1), mixture)  # (4)


@gaussian_form.register
def _(energy: SumEnergy) -> GaussianForm | None:
    forms = []
    for part in energy.energies:
        form = gaussian_form(part)
        if form is None:
            return None
        forms.append(form)
    product = product_form(forms, energy.weights)
    return product and product._replace(constant=product.constant - energy.offset)


def _linear(*terms: tuple[Energy | float | Tensor, float | Tensor]) -> Any:
    """Sum of ``weight * term``, flattened; plain numbers go into the offset."""
    energies: list[Energy] = []
    weights: list[float | Tensor] = []
    offset: float | Tensor = 0.0
    for term, scale in terms:
        if _is_distribution(scale):  # its own operator makes the product
            return NotImplemented
        if not isinstance(scale, numbers.Real | Tensor):
            raise TypeError(
                f"an energy can be multiplied by a number, got {type(scale).__name__}. "
                "For the product of two distributions add their energies: f1 + f2."
            )
        if isinstance(term, SumEnergy) and _can_flatten(term, scale):
            energies += list(term.energies)
            weights += [_times(scale, weight) for weight in term.weights]
            offset = _plus(offset, _times(scale, term.offset))
        elif isinstance(term, Energy):
            energies.append(term)
            weights.append(scale)
        elif isinstance(term, numbers.Real | Tensor):
            offset = _plus(offset, _times(scale, term))
        else:
            raise TypeError(
                f"an Energy or a number can be added to an energy, got "
                f"{type(term).__name__}. Wrap a callable in FunctionEnergy."
            )
    return SumEnergy(energies, weights, offset)


# The product or sum of a parameter and anything else is no parameter, and not learned:
# so multiply by one and add zero without arithmetic, and keep a sum as it is where its
# learned scalars would have to change.


def _given(energy: Energy, context: Tensor) -> Energy:
    return energy if energy.context_shape is None else energy.given(context)


def _is_distribution(factor: Any) -> bool:
    """Whether it is a distribution, or a model that gives one when called."""
    has_energy = isinstance(getattr(factor, "energy", None), Energy)
    return isinstance(factor, Distribution) or (
        has_energy and not isinstance(factor, Energy)
    )


def _can_flatten(term: SumEnergy, scale: float | Tensor) -> bool:
    if any(p is term.offset for p in term.parameters(recurse=False)):
        return False
    if not isinstance(scale, Tensor) and scale == 1:
        return True
    return not any(isinstance(v, nn.Parameter) for v in (scale, *term.weights))


def _times(scale: float | Tensor, value: float | Tensor) -> float | Tensor:
    return value if not isinstance(scale, Tensor) and scale == 1 else scale * value


def _plus(offset: float | Tensor, value: float | Tensor) -> float | Tensor:
    return value if not isinstance(offset, Tensor) and offset == 0 else offset + value


def _detach(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value


def _keep_scalar(module: nn.Module, name: str, value: float | Tensor) -> None:
    """Register a scalar: parameter, buffer or plain number."""
    tensor = torch.as_tensor(value).detach()
    if tensor.dim() != 0 or not tensor.isfinite():
        raise ValueError(
            f"{name} must be one finite number or a tensor of shape (), got {value}."
        )
    if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
        setattr(module, name, value)
    else:
        module.register_buffer(name, value)


def _require_same_space(first: Energy, *others: Energy) -> None:
    """Check that energies can be combined.

    Raises:
        TypeError: If one of them is no energy.
        ValueError: If they differ in event shape or support, or their batch shapes do
            not broadcast.
    """
    shapes = [energy.batch_shape for energy in others if isinstance(energy, Energy)]
    try:
        broadcast_shape(getattr(first, "batch_shape", ()), *shapes)
    except ValueError:
        raise ValueError(
            "energies must have batch shapes that broadcast, got "
            f"{[tuple(energy.batch_shape) for energy in (first, *others)]}."
        ) from None
    for energy in (first, *others):
        if not isinstance(energy, Energy):
            raise TypeError(
                f"energies must hold Energy objects, got {type(energy).__name__}. "
                "Wrap a callable in FunctionEnergy, a distribution in "
                "DistributionEnergy."
            )
        if first.event_shape != energy.event_shape:
            raise ValueError(
                "energies must share one event_shape, got "
                f"{tuple(first.event_shape)} and {tuple(energy.event_shape)}. Make an "
                "energy of a part of a larger event one of all of it by PartEnergy."
            )
        if first.support.is_discrete != energy.support.is_discrete:
            raise ValueError(
                "energies must be all discrete or all continuous to share one support, "
                f"got {first.support} and {energy.support}. A discrete variable beside "
                "a continuous one is a site of its own in a Pyro model."
            )
        if not same_support(first.support, energy.support):
            raise ValueError(
                f"energies must share one support, got {first.support} and "
                f"{energy.support}. Restrict one of them explicitly with "
                "FunctionEnergy(f, event_shape, support)."
            )


Energy._linear = staticmethod(_linear)
Energy._exp = ExpEnergy
