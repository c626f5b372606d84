r"""Change of variables from the support of an energy to unconstrained space.

With :math:`T = \mathrm{biject\_to}(\mathcal{X})` and :math:`x = T(u)`,

.. math::
    f_u(u) = f(T(u)) - \log\left|\det \frac{\partial T}{\partial u}\right|  \tag{1}

has the same partition function as :math:`f`, and :math:`T` maps its draws to draws of
:math:`e^{-f}`.
"""

__all__ = [
    "UnconstrainedEnergy",
    "is_finite_support",
    "is_unconstrained",
    "same_support",
    "unconstrained",
]

import itertools
from typing import final

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import MixedSupport, scalar_of
from pyro_ebm.energies.base import Energy, require_no_batch
from pyro_ebm.energies.discrete.finite import finite_values


@final
class UnconstrainedEnergy(Energy):
    """The energy (1), over all real ``u``.

    Args:
        energy: An energy on any continuous support that ``biject_to`` knows, or on a
            mixed one, whose columns of few states stay as they are.

    Raises:
        NotImplementedError: If the support has no bijection from real space; a discrete
            one has none.

    Example:
        >>> gamma = pyro_ebm.energies.DistributionEnergy(dist.Gamma(2.0, 1.0))
        >>> flat = UnconstrainedEnergy(gamma)  # u = log x
        >>> u = torch.tensor(0.5)
        >>> bool(torch.isclose(flat(u), gamma(u.exp()) - u))
        True
    """

    def __init__(self, energy: Energy) -> None:
        support, where = energy.support, None
        if isinstance(support, MixedSupport):
            where, transform = support.unconstrained(), support.bijection()
        elif support.is_discrete:
            raise NotImplementedError(
                "energy must have a continuous support to be seen from real space, got "
                f"the discrete {energy.support}. Give it a finite one, such as "
                "independent(boolean, n) or independent(integer_interval(a, b), n), "
                "where chains move by pyro_ebm.mcmc.Gibbs."
            )
        else:
            transform = biject_to(support)
        super().__init__(transform.inverse_shape(energy.event_shape), where)
        self.energy = energy
        self.transform = transform

    def forward(self, u: Tensor) -> Tensor:
        """Evaluate (1) in nats at ``u``, ``(*batch, *unconstrained_event)``."""
        x = self.transform(u)
        return self._inside(x) - self.transform.log_abs_det_jacobian(u, x)  # (1)

    def _inside(self, x: Tensor) -> Tensor:
        """The energy, infinite at points that rounding has moved out of the support.

        Distributions of Pyro refuse such points, and all others along with them.
        """
        try:
            return self.energy(x)
        except ValueError:
            batch_shape = self.energy.batch_shape_of(x)
            is_inside = _is_inside(self.energy.support, x, batch_shape)
            if is_inside.all():
                raise
            value = x.new_full(batch_shape, torch.inf)
            if is_inside.any():
                inside = is_inside.nonzero(as_tuple=True)
                value = value.index_put(inside, self.energy(x[inside]).to(value))
            return value


def unconstrained(energy: Energy) -> tuple[Energy, torch.distributions.Transform]:
    """The energy over unconstrained space, and the map from there to its support.

    Args:
        energy: On a finite support, any continuous one that ``biject_to`` knows, or a
            mixed one.

    Returns:
        ``(energy, identity)`` where the support is real already or finite, else an
        :class:`UnconstrainedEnergy` and its bijection, which takes points of shape
        ``(*batch, *unconstrained_event)`` to ``(*batch, *event)``.

    Raises:
        NotImplementedError: If the support has no bijection from real space.
        ValueError: If it is a batch of energies.

    Example:
        >>> simplex = pyro_ebm.energies.DistributionEnergy(
        ...     dist.Dirichlet(torch.ones(3))
        ... )
        >>> flat, to_support = unconstrained(simplex)
        >>> flat.event_shape, round(to_support(torch.randn(2)).sum().item(), 4)
        (torch.Size([2]), 1.0)
    """
    require_no_batch(energy)
    support = energy.support
    is_free = is_unconstrained(support) or is_finite_support(support)
    if isinstance(support, MixedSupport):
        is_free = is_unconstrained(support.real_support)
    if is_free:
        return energy, torch.distributions.transforms.identity_transform
    pulled_back = UnconstrainedEnergy(energy)
    return pulled_back, pulled_back.transform


def is_finite_support(support: Constraint) -> bool:
    """Whether a support has finitely many points, and chains on it no gradient.

    Args:
        support: Of an energy or a distribution.

    Example:
        >>> is_finite_support(dist.constraints.boolean)
        True
        >>> is_finite_support(dist.constraints.nonnegative_integer)
        False
    """
    return support.is_discrete and finite_values(support) is not None


def is_unconstrained(support: Constraint) -> bool:
    """Whether a support is all of real space, whatever its event dimensions.

    Args:
        support: Of an energy or a distribution.

    Example:
        >>> is_unconstrained(dist.constraints.real_vector)
        True
        >>> is_unconstrained(dist.constraints.unit_interval)
        False
    """
    # Comparing types alone would take a subclass, such as a bounded real, for real.
    return type(scalar_of(support)) is type(constraints.real)


def same_support(first: Constraint, second: Constraint) -> bool:
    """Whether two supports are the same set up to its boundary.

    Args:
        first: Of an energy or a distribution.
        second: The other; the two may be swapped.

    Example:
        >>> constraints = dist.constraints
        >>> same_support(constraints.positive, constraints.nonnegative)
        True
        >>> same_support(constraints.positive, constraints.real)
        False
    """
    if first.event_dim != second.event_dim:
        return False
    first, second = scalar_of(first), scalar_of(second)
    if str(first) == str(second):
        return True
    if isinstance(first, MixedSupport) and isinstance(second, MixedSupport):
        columns = itertools.zip_longest(first.columns, second.columns)
        return all(a and b and same_support(a, b) for a, b in columns)
    ends, other_ends = _bounds(first), _bounds(second)
    if ends is not None and other_ends is not None:
        pairs = zip(ends, other_ends, strict=True)
        return all(bool((a == b).all()) for a, b in pairs)
    try:
        return bool(biject_to(first) == biject_to(second))
    except NotImplementedError:
        return False


def _bounds(support: Constraint) -> tuple[Tensor, Tensor] | None:
    """The ends of an interval, whether given as numbers or tensors."""
    names = ("lower_bound", "upper_bound")
    if support.is_discrete or not any(hasattr(support, name) for name in names):
        return None
    lower = getattr(support, "lower_bound", -torch.inf)
    upper = getattr(support, "upper_bound", torch.inf)
    return torch.as_tensor(lower), torch.as_tensor(upper)


def _is_inside(support: Constraint, x: Tensor, batch_shape: torch.Size) -> Tensor:
    """Whether finite points lie in a support, shape ``batch_shape``."""
    if isinstance(support, constraints.independent):
        return _is_inside(support.base_constraint, x, batch_shape)
    if isinstance(support, constraints.cat):  # its own check loses the shape
        parts = x.split(support.lengths, support.dim)
        answers = [
            _is_inside(each, part, batch_shape)
            for each, part in zip(support.cseq, parts, strict=True)
        ]
        return torch.stack(answers).all(0)
    answer = support.check(x).reshape(*batch_shape, -1).all(-1)
    return answer & x.isfinite().reshape(*batch_shape, -1).all(-1)
