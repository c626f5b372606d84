r"""Gaussians and their mixtures in information form, in which products are sums.

.. math::
    e^{-f(x)} &= \sum_{k=1}^K \exp\big(c_k + \eta_k^\top x
        - \tfrac12 x^\top \Lambda_k x\big)                                 \tag{1} \\
    Z &= \sum_{k=1}^K \exp\big(c_k + \tfrac12 \eta_k^\top \Lambda_k^{-1} \eta_k
        - \tfrac12 \log\det \Lambda_k + \tfrac D2 \log 2\pi\big)           \tag{2}

Of a batch of energies everything has its shape, after the components.

A factor on a part of ``x`` has a singular :math:`\Lambda` and no partition function of
its own; the product of such factors often has.
"""

__all__ = [
    "GaussianForm",
    "ImproperProductError",
    "gaussian_closed_form",
    "gaussian_form",
    "product_form",
]

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.corrections import without_independent
from pyro_ebm.energies.quadratic import QuadraticEnergy

#: Numbers in all precision matrices together, beyond which there is no closed form.
_MAX_NUMBERS = 2**24
#: What is left of a sum in double precision is rounding below this part of its terms.
_ROUNDING = 2**-44


class ImproperProductError(ValueError):
    """A closed form shows that there is no partition function."""


class GaussianForm(NamedTuple):
    r"""The coefficients of (1), in double precision.

    Attributes:
        constant: :math:`c`, shape ``(K, *batch)``.
        information: :math:`\eta`, shape ``(K, *batch, D)``.
        precision: :math:`\Lambda`, shape ``(K, *batch, D, D)``.
        magnitude: Sum of the absolute values that went into the diagonal of
            :math:`\Lambda`, shape ``(K, *batch, D)``: rounding is relative to it.
    """

    constant: Tensor
    information: Tensor
    precision: Tensor
    magnitude: Tensor

    @property
    def is_mixture(self) -> bool:
        """Whether there is more than one component."""
        return len(self.constant) > 1

    @property
    def batch_shape(self) -> torch.Size:
        """Of the energies."""
        return self.constant.shape[1:]

    def expand(self, batch_shape: torch.Size) -> "GaussianForm":
        """The same for each energy of a larger batch."""
        if batch_shape == self.batch_shape:
            return self
        num_new = len(batch_shape) - len(self.batch_shape)

        def grown(value: Tensor, event_dim: int) -> Tensor:
            event = value.shape[value.dim() - event_dim :]
            inner = value.reshape(len(value), *(1,) * num_new, *value.shape[1:])
            return inner.expand(len(value), *batch_shape, *event)

        return GaussianForm(
            grown(self.constant, 0),
            grown(self.information, 1),
            grown(self.precision, 2),
            grown(self.magnitude, 1),
        )

    def power(self, weight: float | Tensor) -> "GaussianForm | None":
        """The form of a power; of a mixture a natural number, or there is none."""
        if not self.is_mixture:
            c, eta, precision, magnitude = self
            size: Any = abs(weight)
            return GaussianForm(
                weight * c, weight * eta, weight * precision, size * magnitude
            )
        if isinstance(weight, Tensor) or weight < 1 or weight != int(weight):
            return None
        power: GaussianForm | None = self
        for _ in range(int(weight) - 1):
            power = power and power.times(self)
        return power

    def times(self, other: "GaussianForm") -> "GaussianForm | None":
        """The product: every component with every other; ``None`` if that is too many.

        Its coefficients are sums.
        """
        size = len(self.constant) * len(other.constant) * self.precision[0].numel()
        if size > _MAX_NUMBERS:
            return None
        return GaussianForm(
            *((a[:, None] + b).flatten(0, 1) for a, b in zip(self, other, strict=True))
        )

    def scattered(self, positions: Tensor, dim: int) -> "GaussianForm | None":
        """The form of a function of parts, as one of all of ``x``.

        Args:
            positions: Of the coordinates of each part, shape ``(J, D)``; of a mixture,
                of one part.
            dim: Size of ``x``.
        """
        if self.batch_shape:
            return None
        k = torch.arange(len(self.constant), device=positions.device)
        if len(k) * dim**2 > _MAX_NUMBERS:
            return None
        num_parts, part_dim = positions.shape
        rows = (k[:, None, None], positions)
        cells = (k[:, None, None, None], positions[..., None], positions[:, None])
        shape = (len(k), num_parts, part_dim)
        precision = self.precision[:, None].expand(*shape, part_dim)
        vector = precision.new_zeros(len(k), dim)

        def add(into: Tensor, index: Any, values: Tensor) -> Tensor:
            return into.index_put(index, values, accumulate=True)

        return GaussianForm(
            num_parts * self.constant,
            add(vector, rows, self.information[:, None].expand(shape)),
            add(precision.new_zeros(len(k), dim, dim), cells, precision),
            add(vector, rows, self.magnitude[:, None].expand(shape)),
        )

    def pulled_back(
        self, matrix: Tensor, offset: Tensor | None
    ) -> "GaussianForm | None":
        """The form of a function of ``y = A x + b``, as one of ``x``.

        Args:
            matrix: ``A``, shape ``(D, dim)``.
            offset: ``b``, shape ``(D,)``.
        """
        if len(self.constant) * matrix.shape[1] ** 2 > _MAX_NUMBERS:
            return None
        constant, information = self.constant, self.information
        if offset is not None:
            at_offset = self.precision @ offset
            constant = constant + (information - at_offset / 2) @ offset
            information = information - at_offset
        return GaussianForm(
            constant,
            information @ matrix,
            matrix.mT @ self.precision @ matrix,
            self.magnitude @ matrix.detach().square(),
        )

    def closed_form(
        self, event_shape: torch.Size, options: dict[str, Any]
    ) -> ClosedForm:
        """Evaluate (2), and normalise (1).

        Args:
            event_shape: Shape of ``x``, of ``D`` numbers.
            options: Dtype and device of the result.

        Raises:
            ImproperProductError: If a precision is not positive definite.
        """
        factor, info = torch.linalg.cholesky_ex(self.precision)
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        if info.any() or (pivots.square() <= _ROUNDING * self.magnitude).any():
            smallest = torch.linalg.eigvalsh(self.precision.detach()).min().item()
            raise ImproperProductError(
                "the product of these Gaussian experts has no partition function: its "
                f"precision has the eigenvalue {smallest:.3g}. Divide by less, or "
                "multiply by an expert that confines that direction."
            )
        loc = torch.cholesky_solve(self.information[..., None], factor)[..., 0]
        log_det = 2 * pivots.log().sum(-1)
        square = (self.information * loc).sum(-1)
        log_two_pi = loc.shape[-1] * math.log(2 * math.pi)
        log_weights = self.constant + (square - log_det + log_two_pi) / 2  # (2)
        normalised = _mixture(log_weights, loc, self.precision, event_shape, options)
        return ClosedForm(torch.logsumexp(log_weights, 0).to(**options), normalised)


def product_form(
    forms: Sequence[GaussianForm], weights: Sequence[float | Tensor]
) -> GaussianForm | None:
    """The form of a product of powers, or ``None`` if it is no mixture of Gaussians.

    Args:
        forms: Of the experts, at least one.
        weights: The powers.
    """
    shape = torch.broadcast_shapes(*(form.batch_shape for form in forms))
    forms = [form.expand(shape) for form in forms]
    powers = [form.power(w) for form, w in zip(forms, weights, strict=True)]
    product = powers[0]
    for power in powers[1:]:
        product = product.times(power) if product and power else None
    return product


@functools.singledispatch
def gaussian_form(energy: Energy) -> GaussianForm | None:
    """The form (1) of an energy, where it has one."""
    known = energy.closed_form()
    if known is None:
        return None
    form = _form_of(known.distribution)
    if form is None:
        return None
    return form._replace(constant=form.constant + known.log_partition.double())


def gaussian_closed_form(energy: Energy) -> ClosedForm | None:
    """The closed form that follows from :func:`gaussian_form`, where there is one.

    Exactness: *exact* where it is not ``None``.
    """
    form = gaussian_form(energy)
    if form is None:
        return None
    try:
        return form.closed_form(energy.event_shape, energy.tensor_options())
    except ImproperProductError:
        return None


@gaussian_form.register
def _(energy: QuadraticEnergy) -> GaussianForm:
    # By way of the covariance, as in its closed form, some accuracy would be lost.
    factor, loc = energy.scale_tril_of_precision.double(), energy.loc.double()
    precision = (factor @ factor.mT).expand(*energy.batch_shape, *factor.shape[-2:])
    return _from_moments(loc.expand(precision.shape[:-1])[None], precision[None])


def _form_of(distribution: Any) -> GaussianForm | None:
    """The form of a normalised distribution."""
    num_batch = distribution.batch_shape.numel()
    if num_batch * distribution.event_shape.numel() ** 2 > _MAX_NUMBERS:
        return None
    log_weights: Any = 0.0
    if not isinstance(distribution, torch.distributions.MixtureSameFamily):
        form = _unnormalised_form_of(distribution)
        form = form and GaussianForm(*(value[None] for value in form))
    else:
        logits = distribution.mixture_distribution.logits.double()
        form = _unnormalised_form_of(distribution.component_distribution)
        if form is not None:  # the components first
            axis = len(distribution.batch_shape)
            form = GaussianForm(*(value.movedim(axis, 0) for value in form))
            log_weights = logits.expand(*distribution.batch_shape, -1).movedim(-1, 0)
    if form is None:
        return None
    # Their log-determinant is what makes the components normalised.
    log_det = torch.linalg.cholesky(form.precision).diagonal(dim1=-2, dim2=-1).log()
    log_norm = log_det.sum(-1) - form.information.shape[-1] / 2 * math.log(2 * math.pi)
    return form._replace(constant=form.constant + log_norm + log_weights)


def _unnormalised_form_of(distribution: Any) -> GaussianForm | None:
    """The form of normal distributions without constants, in their batch's shape."""
    shape = distribution.batch_shape
    vector = isinstance(
        distribution,
        torch.distributions.MultivariateNormal
        | torch.distributions.LowRankMultivariateNormal,
    )
    if vector:
        dim = distribution.event_shape[0]
        precision = distribution.precision_matrix.double().expand(*shape, dim, dim)
        return _from_moments(distribution.loc.double().expand(*shape, dim), precision)
    distribution = without_independent(distribution)
    if not isinstance(distribution, torch.distributions.Normal):
        return None
    loc = distribution.loc.double().reshape(*shape, -1)
    scale = distribution.scale.double().reshape(*shape, -1)
    return _from_moments(loc, scale.square().reciprocal().diag_embed())


def _from_moments(loc: Tensor, precision: Tensor) -> GaussianForm:
    """The form of the exponential of minus half the square."""
    information = (precision @ loc[..., None])[..., 0]
    return GaussianForm(
        -(information * loc).sum(-1) / 2,
        information,
        precision,
        precision.diagonal(dim1=-2, dim2=-1).detach().abs(),
    )


def _mixture(
    log_weights: Tensor,
    loc: Tensor,
    precision: Tensor,
    event_shape: torch.Size,
    options: dict[str, Any],
) -> dist.TorchDistribution:
    """The normalised mixture, or its one component, over events of any shape."""
    if len(loc) == 1:
        loc, precision = loc[0], precision[0]
    else:  # the components are the last dimension of a batch
        num_batch = log_weights.dim() - 1
        loc, precision = loc.movedim(0, num_batch), precision.movedim(0, num_batch)
    if not event_shape:
        scale = precision[..., 0, 0].rsqrt().to(**options)
        parts = dist.Normal(loc[..., 0].to(**options), scale, validate_args=False)
    else:
        exact = dist.MultivariateNormal(
            loc, precision_matrix=precision, validate_args=False
        )
        parts = dist.MultivariateNormal(
            loc.to(**options),
            scale_tril=exact.scale_tril.to(**options),
            validate_args=False,
        )
    if len(event_shape) > 1:
        reshape = dist.transforms.ReshapeTransform(loc.shape[-1:], event_shape)
        parts = dist.TransformedDistribution(parts, [reshape], validate_args=False)
    if len(log_weights) == 1:
        return parts
    logits = log_weights.movedim(0, -1).to(**options)
    mixture = dist.Categorical(logits=logits, validate_args=False)
    return dist.MixtureSameFamily(mixture, parts, validate_args=False)
