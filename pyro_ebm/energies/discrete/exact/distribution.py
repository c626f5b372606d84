r"""Exact distributions over finite sites: draws, marginals, the most probable state.

Where the sum of a partition function can be rearranged (along a chain, a tree, an order
of elimination, the hidden states of a small machine) everything else comes from it:

.. math::
    \log q(x) &= -f(x) - \log Z                                          \tag{1} \\
    q(x_S \mid x_{\setminus S}) &\propto e^{-f(x_S, x_{\setminus S})}    \tag{2} \\
    p(x_i = v) &= \frac{\partial \log Z}{\partial u_{iv}}                \tag{3}

with :math:`u_{iv}` added to :math:`-f` where site :math:`i` has its value number
:math:`v`.
"""

__all__ = [
    "ExactClosedForm",
    "ExactDistribution",
    "FORBIDDEN",
    "MAX_LISTED",
    "Solver",
    "can_be_enumerated",
    "categorical",
    "enumerated",
    "flat_states",
    "site_number",
    "where_allowed",
]

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import support_at
from pyro_ebm.energies.base import ClosedForm, Energy
from pyro_ebm.energies.discrete.finite import (
    finite_points,
    finite_values,
    num_points,
    num_states,
    require_inside,
)
from pyro_ebm.energies.discrete.independent import IndependentSites

#: The log potential of what is forbidden: minus infinity has no gradient.
FORBIDDEN = -1e30
#: Points that are worth listing, for Pyro's sums over a discrete site.
MAX_LISTED = 2**12


def where_allowed(log_partition: Tensor) -> Tensor:
    """Minus infinity in place of a log Z of forbidden states alone; ``nan`` stays.

    Args:
        log_partition: From potentials with :data:`FORBIDDEN` in them.
    """
    is_nothing = log_partition.detach() <= FORBIDDEN / 2
    return log_partition.masked_fill(is_nothing, -torch.inf)


def flat_states(
    observed: Mapping[int, Tensor], batch_shape: torch.Size
) -> dict[int, Tensor]:
    """Observed states with one axis for the batch, of length 1 where all are alike.

    Args:
        observed: Indices by site, of shapes that broadcast with the batch.
        batch_shape: Of the graphs.
    """
    return {
        site: state.expand(batch_shape if state.dim() else ()).reshape(-1)
        for site, state in observed.items()
    }


class Solver(Protocol):
    """How sums over all states are done; sites are numbered, and states by index."""

    def log_partition(self) -> Tensor:
        r""":math:`\log Z`, shape ``batch``, differentiable in the parameters."""

    def marginals(self) -> Tensor:
        """Probabilities (3), shape ``(*batch, D, q)``."""

    def mode(self) -> Tensor:
        """A most probable state, shape ``(*batch, D)``."""

    def sample(self, num_draws: int) -> Tensor:
        """Independent draws, shape ``(num_draws, *batch, D)``."""

    def given(self, observed: Mapping[int, Tensor]) -> "Solver":
        """The same where these sites have these states; the others keep their number.

        Args:
            observed: Indices of states, each of a shape that broadcasts with ``batch``.
        """


class ExactClosedForm(ClosedForm):
    r"""A closed form whose :math:`\log Z` is computed when it is asked for."""

    distribution: "ExactDistribution"

    @classmethod
    def of(cls, distribution: "ExactDistribution") -> "ExactClosedForm":
        """That of a distribution.

        Args:
            distribution: Whose ``log_partition`` it is.
        """
        return cls(torch.tensor(torch.nan), distribution)

    @property
    def log_partition(self) -> Tensor:
        r""":math:`\log Z` in nats."""
        return self.distribution.log_partition


@final
class ExactDistribution(dist.TorchDistribution):
    r"""The normalised distribution (1) of an energy whose sums can be done.

    It is what ``energy.closed_form().distribution`` is for chains, for graphs of low
    treewidth and for small machines.

    Args:
        energy: Over a finite support.
        solver: Does the sums.
        batch_shape: Of the energy.
        free: Numbers of the sites that are left, where others are observed; the event
            is then a vector of these.
        observed: States of the other sites.

    Exactness: ``log_prob``, ``sample``, ``marginals`` and ``mode`` are *exact*.

    Example:
        >>> unary = torch.tensor([[0.0, 1.0], [0.5, 0.0], [0.0, 0.0]])
        >>> energy = pyro_ebm.energies.ChainEnergy(unary, 2 * torch.eye(2))
        >>> chain = energy.closed_form().distribution
        >>> chain.mode
        tensor([1., 1., 1.])
        >>> chain.condition({0: 0.0}).mode
        tensor([0., 0.])
    """

    arg_constraints: dict[str, Constraint] = {}

    def __init__(
        self,
        energy: Energy,
        solver: Solver,
        batch_shape: Sequence[int] = (),
        free: Sequence[int] | None = None,
        observed: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.energy, self.solver = energy, solver
        self.observed = dict(observed or {})
        self._free = None if free is None else list(free)
        event = energy.event_shape if free is None else torch.Size([len(free)])
        self._own_batch = torch.Size(batch_shape)
        self._found: Tensor | None = None
        super().__init__(self._own_batch, event)

    @property
    def support(self) -> Constraint:
        """The support of the energy, at the sites that are left."""
        if self._free is None:
            return self.energy.support
        return support_at(self.energy.support, self.energy.event_shape, self._free)

    @property
    def log_partition(self) -> Tensor:
        r""":math:`\log Z` in nats, shape ``batch``, with its gradient."""
        # What was found without a gradient will not do where one is wanted.
        has_graph = self._found is not None and self._found.requires_grad
        if self._found is None or (torch.is_grad_enabled() and not has_graph):
            self._found = self.solver.log_partition()
        return self._found.expand(self.batch_shape)

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "ExactDistribution":
        """The same distribution with another batch shape.

        Raises:
            NotImplementedError: If that repeats members of a batch.
        """
        own, batch_shape = self._own_batch, torch.Size(batch_shape)
        if own.numel() > 1 and batch_shape[len(batch_shape) - len(own) :] != own:
            raise NotImplementedError(
                f"batch_shape must end in {tuple(own)}, that of the energy, got "
                f"{tuple(batch_shape)}. Expand the potentials of the energy first."
            )
        new = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        new._batch_shape = batch_shape
        return new

    def log_prob(self, x: Tensor) -> Tensor:
        """Evaluate (1) in nats, shape ``(*sample, *batch)``; ``-inf`` outside.

        Raises:
            ValueError: If a point is outside the support, while Pyro validates.
        """
        if self._validate_args:
            self._validate_sample(x)
        shape = torch.broadcast_shapes(self._batch_of(x), self.batch_shape)
        x = x.expand(*shape, *self.event_shape)
        log_prob = -self.energy(self._whole(x)) - self.log_partition  # (1)
        if self._validate_args:
            return log_prob
        return log_prob.where(self.support.check(x), -torch.inf)

    def _validate_sample(self, value: Tensor) -> None:
        require_inside(self.support, value)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample, *batch, *event)``.

        Raises:
            ValueError: If no state has a positive probability, or log Z is ``nan``; so
                do ``marginals``, ``mode`` and ``condition``.
        """
        self._require_states()
        shape = self._extended_shape(torch.Size(sample_shape))
        count = shape.numel() // self.event_shape.numel()
        index = self.solver.sample(count // self._own_batch.numel())
        return self._points(index).reshape(shape)

    def marginals(self) -> Tensor:
        """Probability (3) of each value at each site, shape ``(*batch, *event, q)``."""
        self._require_states()
        probs = self.solver.marginals()
        if self._free is not None:
            probs = probs[..., self._free, :]
        probs = probs.reshape(*self._own_batch, *self.event_shape, -1)
        return probs.expand(*self.batch_shape, *probs.shape[len(self._own_batch) :])

    @property
    def mean(self) -> Tensor:
        """Mean of each site, shape ``(*batch, *event)``."""
        probs = self.marginals()
        return probs @ self._values(probs)

    @property
    def variance(self) -> Tensor:
        """Variance of each site, shape ``(*batch, *event)``."""
        probs = self.marginals()
        return probs @ self._values(probs).square() - self.mean.square()

    def entropy(self) -> Tensor:
        """Entropy in nats, shape ``batch``.

        That of the uniform distribution, less the divergence from it.

        Raises:
            NotImplementedError: If the energy is not made of factors, and there are
                more than 4096 states.
        """
        uniform = IndependentSites.uniform(
            self.support, self.event_shape, self._values(torch.empty(0))
        )
        log_size = -uniform.log_probs.amax(0).sum()
        return log_size - torch.distributions.kl_divergence(self, uniform)

    @property
    def mode(self) -> Tensor:
        """A most probable state, shape ``(*batch, *event)``."""
        self._require_states()
        with torch.no_grad():
            x = self._points(self.solver.mode())
        x = x.reshape(*self._own_batch, *self.event_shape)
        return x.expand(*self.batch_shape, *self.event_shape)

    def condition(self, observed: Mapping[Any, Any]) -> "ExactDistribution":
        """The distribution (2) of the other sites, as one vector in their order.

        Args:
            observed: Values by site: a number, a tuple of numbers in an event of
                several dimensions, or a name where the energy has names of sites. A
                value is a number or has the shape of the batch.

        Raises:
            ValueError: If a site is not in the event, a value is none of its states, or
                no site is left.
        """
        if self._found is not None:  # what is new says so when it is used
            self._require_states()
        own = self._free or range(self.energy.event_shape.numel())
        sites = self._numbered(observed, own)
        states = {
            own[site]: self._index(own[site], value) for site, value in sites.items()
        }
        free = [site for site in own if site not in states]
        if not free:
            raise ValueError(
                "observed holds all sites of the event: none is left to have a "
                "distribution. Its probability is log_prob(x)."
            )
        solver = self.solver.given(states)
        observed = {**self.observed, **states}
        return ExactDistribution(self.energy, solver, self._own_batch, free, observed)

    def _numbered(
        self, observed: Mapping[Any, Any], own: Sequence[int]
    ) -> dict[int, Any]:
        """Values by the number of a site, among those that are left."""
        names = getattr(self.energy, "names", None)
        own_names = None if names is None else [names[site] for site in own]
        places = torch.arange(self.event_shape.numel()).reshape(self.event_shape)
        try:
            return {
                int(places[site_number(own_names, site)]): value
                for site, value in observed.items()
            }
        except (IndexError, ValueError, RuntimeError, TypeError):
            raise ValueError(
                f"observed must name sites of an event of shape "
                f"{tuple(self.event_shape)}, by a number, a tuple of numbers or the "
                f"name of a site{'' if own_names is None else f' in {own_names}'}; got "
                f"{list(observed)}."
            ) from None

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are at most 4096 states, which Pyro can list."""
        return can_be_enumerated(self)

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        """All states, shape ``(N, *batch, *event)``, or with ones for the batch.

        Raises:
            NotImplementedError: If there are more than 4096.
        """
        return enumerated(self, self._values(torch.empty(0)), expand=expand)

    def _values(self, like: Tensor) -> Tensor:
        options = self.energy.tensor_options(like)
        return torch.tensor(finite_values(self.energy.support), **options)

    def _points(self, index: Tensor) -> Tensor:
        """Values of the free sites, from the states of all."""
        if self._free is not None:
            index = index[..., self._free]
        return self._values(torch.empty(0))[index].reshape(
            *index.shape[:-1], *self.event_shape
        )

    def _index(self, site: int, value: Any) -> Tensor:
        """Which state of a site a value is."""
        values = self._values(torch.empty(0))
        value = torch.as_tensor(value).to(values)
        if not _fits(value.shape, self._own_batch):
            raise ValueError(
                f"the observed value of site {site} must be a number or fit the batch "
                f"of shape {tuple(self._own_batch)}, got shape {tuple(value.shape)}. "
                "Condition once for each value."
            )
        states = num_states(self.energy.support, self.energy.event_shape)
        count = len(values) if states is None else int(states.flatten()[site])
        same = value[..., None] == values[:count]
        if not same.any(-1).all():
            raise ValueError(
                f"the observed value of site {site} must be one of "
                f"{values[:count].tolist()}, got {value.tolist()}."
            )
        return same.long().argmax(-1)

    def _whole(self, x: Tensor) -> Tensor:
        """Events of the energy, from those of the free sites."""
        if self._free is None:
            return x
        batch = x.shape[:-1]
        values = self._values(x)
        columns: list[Tensor] = [x[..., 0]] * self.energy.event_shape.numel()
        for place, site in enumerate(self._free):
            columns[site] = x[..., place]
        for site, index in self.observed.items():
            columns[site] = values[index].to(x).expand(batch)
        return torch.stack(columns, -1).reshape(*batch, *self.energy.event_shape)

    @torch.no_grad()
    def _require_states(self) -> None:
        """Refuse what is no distribution: there would be draws of it all the same."""
        value = self.log_partition
        if value.isfinite().all():
            return
        given = " that agrees with what is observed" if self.observed else ""
        if value.isnan().any() or value.isposinf().any():
            raise ValueError(
                "the potentials of an exact distribution must be finite, or -inf for "
                f"what is forbidden, got log Z = {value.tolist()}. Look for an "
                "overflow in what they are computed from."
            )
        raise ValueError(
            f"no state{given} has a positive probability: log Z must be finite, got "
            f"{value.tolist()}. Allow a state, by potentials above -inf, or observe "
            "values that can occur together."
        )

    def _batch_of(self, x: Tensor) -> torch.Size:
        return x.shape[: x.dim() - len(self.event_shape)]


def site_number(names: Sequence[Any] | None, site: Any) -> Any:
    """The number of a site that is given by its name; what is no name stays.

    Args:
        names: In the order of the sites; ``None`` if they have none.
        site: A name, or any index.
    """
    if names is None or isinstance(site, Tensor) or site not in names:
        return site
    return names.index(site)


def _fits(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether a shape expands to that of a batch."""
    return len(shape) <= len(batch) and all(
        own in (1, wanted)
        for own, wanted in zip(reversed(shape), reversed(batch), strict=False)
    )


def can_be_enumerated(distribution: Any) -> bool:
    """Whether the support has at most 4096 points.

    Args:
        distribution: Any.
    """
    count = num_points(distribution.support, distribution.event_shape)
    return count is not None and count <= MAX_LISTED


def enumerated(distribution: Any, like: Tensor, *, expand: bool) -> Tensor:
    """All points of a finite support in the form that Pyro's enumeration wants.

    Args:
        distribution: Over a finite support.
        like: A tensor whose dtype and device the points have.
        expand: Whether along the batch.

    Raises:
        NotImplementedError: If there are more than 4096, or infinitely many.
    """
    event, batch = distribution.event_shape, distribution.batch_shape
    count = num_points(distribution.support, event)
    if count is None or count > MAX_LISTED:
        number = "infinitely many" if count is None else f"2^{math.log2(count):.4g}"
        raise NotImplementedError(
            f"{type(distribution).__name__} must have at most {MAX_LISTED:,} states "
            f"for its support to be enumerated, got {number}. Sample it, or split the "
            "site into several."
        )
    index = torch.arange(count, device=like.device)
    x = finite_points(distribution.support, event, index, like)
    x = x.reshape(count, *(1,) * len(batch), *event)
    return x.expand(count, *batch, *event) if expand else x


def categorical(logits: Tensor) -> Tensor:
    """Indices along the last axis, drawn with these logits; ``-inf`` never is.

    Args:
        logits: Shape ``(*batch, q)``.

    Returns:
        Shape ``(*batch,)``.
    """
    noise = torch.empty_like(logits).exponential_()
    clocks = noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()
    return (logits - clocks).argmax(-1)
