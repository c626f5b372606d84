r"""Restricted Boltzmann machines over their visible units.

With visible units :math:`v`, their statistics :math:`t(v)` and hidden units :math:`h`,

.. math::
    f(v) &= -\log \sum_h e^{t(v)^\top W h + b^\top t(v) + c^\top h + g(v)}      \\
         &= -b^\top t(v) - g(v)
            - \sum_j \log \sum_{h_j} e^{h_j (c_j + (W^\top t(v))_j)}        \tag{1}

the free energy. Binary units are 0 and 1, spins -1 and 1, in both layers; of both
:math:`t(v) = v`. A visible unit of :math:`q` categories has the statistic of ones and
zeros that says which it has, a real one of scale :math:`\sigma`

.. math::
    t(v_i) = v_i / \sigma_i^2, \qquad
    g(v) = -\sum_i (v_i^2 + b_i^2) / 2 \sigma_i^2                          \tag{2}

so that it is normal given the hidden units. Either layer is independent given the
other, in the fields

.. math::
    c + W^\top t(v) \text{ of the hidden}, \qquad
    b + W h \text{ of the visible units}                                   \tag{3}

which are the logits of binary units and of categories, half those of spins, and the
means of real ones. So the sum of the partition function runs over the states of the
smaller layer alone,

.. math::
    Z = \sum_h e^{c^\top h} \prod_i \sum_{v_i} e^{g_i(v_i) + t(v_i)^\top (b + W h)_i},
                                                                           \tag{4}

and a draw is one of the hidden state, then of the visible units given that.

References:
    Hinton (2002), Neural Computation 14, 1771-1800.
    Welling, Rosen-Zvi & Hinton (2004), Exponential family harmoniums, NeurIPS.
    Cho, Ilin & Raiko (2011), Improved learning of Gaussian-Bernoulli restricted
    Boltzmann machines, ICANN (the parameters of (2)).
    Salakhutdinov, Mnih & Hinton (2007), ICML (categories).
    Salakhutdinov & Murray (2008), On the quantitative analysis of deep belief networks
    (annealing from a machine without weights but with biases).
"""

__all__ = ["RBMEnergy"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from torch.nn.functional import linear, softplus

from pyro_ebm.energies.base import (
    ClosedForm,
    Energy,
    live_or_parameter,
    require_precision,
)
from pyro_ebm.energies.discrete.exact.distribution import (
    ExactClosedForm,
    ExactDistribution,
    categorical,
)
from pyro_ebm.energies.discrete.finite import AnnealingPath, spins
from pyro_ebm.energies.discrete.independent import IndependentSites

#: Damped steps to the mean field. It is only a base: it need not have converged.
_NUM_STEPS = 50
#: Terms up to which (4) is cheap: states of a layer times statistics of the other.
_MAX_COST = 2**22


@dataclass(frozen=True)
class _Pairs:
    """Units of two values; the field of one is a number.

    Attributes:
        low: One value.
        high: The other.
        support: Of one unit.
    """

    low: float
    high: float
    support: Constraint

    @property
    def values(self) -> tuple[float, ...]:
        """What a unit may be."""
        return (self.low, self.high)

    def statistic(self, x: Tensor) -> Tensor:
        """That of (1), shape of ``x``."""
        return x

    def log_sum(self, at: Tensor) -> Tensor:
        """Log of the sum over the values of a unit, shape ``(*batch, V)``."""
        # Beyond the usual threshold of 20 double precision would be lost.
        up = softplus(self._logits(at), threshold=40)
        return up + self.low * at if self.low else up

    def probs(self, at: Tensor) -> Tensor:
        """Probabilities of the values, shape ``(*batch, V, 2)``."""
        up = self._logits(at).sigmoid()
        return torch.stack([1 - up, up], -1)

    def mean(self, at: Tensor) -> Tensor:
        """Mean of the statistic, shape of the field."""
        return self.low + (self.high - self.low) * self.probs(at)[..., 1]

    def draw(self, at: Tensor) -> Tensor:
        """Values of the units, shape ``(*batch, V)``."""
        up = (torch.rand_like(at) < self._logits(at).sigmoid()).to(at)
        return up if self.low == 0 else up.mul_(self.high - self.low).add_(self.low)

    def _logits(self, at: Tensor) -> Tensor:
        """Log-odds of the larger value."""
        width = self.high - self.low
        return at if width == 1 else width * at

    def field_of(self, log_probs: Tensor) -> Tensor:
        """The field in which the values have probabilities of shape ``(2, V)``."""
        return (log_probs[1] - log_probs[0]) / (self.high - self.low)


@dataclass(frozen=True)
class _Categories:
    """Units of categories; the field of one has a number for each."""

    number: int

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(map(float, range(self.number)))

    @property
    def support(self) -> Constraint:
        states: Constraint = constraints.integer_interval(0, self.number - 1)
        return states

    def statistic(self, x: Tensor) -> Tensor:
        return (x[..., None] == torch.arange(self.number).to(x)).to(x)

    def log_sum(self, at: Tensor) -> Tensor:
        return at.logsumexp(-1)

    def probs(self, at: Tensor) -> Tensor:
        return at.softmax(-1)

    mean = probs

    def draw(self, at: Tensor) -> Tensor:
        return categorical(at).to(at)

    def field_of(self, log_probs: Tensor) -> Tensor:
        return log_probs.mT


@dataclass(frozen=True)
class _Normals:
    """Real units; the field of one is its mean."""

    scale: Tensor
    support: ClassVar[Constraint] = constraints.real

    def statistic(self, x: Tensor) -> Tensor:
        return x / self.scale.square()  # (2)

    def log_sum(self, at: Tensor) -> Tensor:
        return (at / self.scale).square() / 2 + (2 * math.pi * self.scale**2).log() / 2

    mean = statistic

    def draw(self, at: Tensor) -> Tensor:
        return at + self.scale * torch.randn_like(at)


_BINARY, _SPIN = _Pairs(0.0, 1.0, constraints.boolean), _Pairs(-1.0, 1.0, spins)
_KINDS = ("binary", "spin", "categorical", "gaussian")


@final
class RBMEnergy(Energy):
    r"""Free energy (1) of the visible units, hidden units summed out.

    Tensors that carry a graph (latent variables, ``pyro.param``, outputs of a network)
    stay live, a ``nn.Parameter`` is shared, and any other becomes a parameter; but for
    the scale, which then is a constant.

    Args:
        weight: :math:`W`, shape ``(V, H)``, or ``(V, q, H)`` for visible units of
            ``q`` categories.
        visible_bias: :math:`b`, shape ``(V,)`` or ``(V, q)``; default: zeros.
        hidden_bias: :math:`c`, shape ``(H,)``; default: zeros.
        visible: What a visible unit is: ``"binary"``, 0 or 1; ``"spin"``, -1 or 1, as
            the hidden units then are; ``"categorical"``, a category from 0 on, written
            as a floating-point number; ``"gaussian"``, a real number.
        scale: :math:`\sigma > 0` of real units given the hidden ones, in units of the
            data; a number or shape ``(V,)``.

    Raises:
        ValueError: If a shape does not fit, ``visible`` is none of these, or a scale is
            not positive or not of real units.

    Example:
        >>> energy = RBMEnergy(torch.zeros(3, 2))
        >>> energy(torch.ones(5, 3))  # two hidden units with two states each
        tensor([-1.3863, -1.3863, -1.3863, -1.3863, -1.3863], grad_fn=<NegBackward0>)
        >>> real = RBMEnergy(torch.ones(3, 2), visible="gaussian", scale=2.0)
        >>> round(real.closed_form().log_partition.item(), 4)
        6.9635
    """

    weight: Tensor
    visible_bias: Tensor
    hidden_bias: Tensor
    scale: Any

    def __init__(
        self,
        weight: Tensor,
        visible_bias: Tensor | None = None,
        hidden_bias: Tensor | None = None,
        *,
        visible: Literal["binary", "spin", "categorical", "gaussian"] = "binary",
        scale: float | Tensor = 1.0,
    ) -> None:
        if visible not in _KINDS:
            raise ValueError(f"visible must be one of {_KINDS}, got {visible!r}.")
        _require_weight(weight, visible)
        shape, num_hidden = weight.shape[:-1], weight.shape[-1]
        own_scale = _scale(scale, visible, weight)
        support = _units(visible, shape, own_scale).support
        super().__init__(shape[:1], constraints.independent(support, 1))
        self.visible = visible
        live_or_parameter(self, "weight", weight)
        visible_bias = _bias(visible_bias, "visible_bias", shape, weight)
        live_or_parameter(self, "visible_bias", visible_bias)
        hidden_bias = _bias(hidden_bias, "hidden_bias", (num_hidden,), weight)
        live_or_parameter(self, "hidden_bias", hidden_bias)
        if isinstance(own_scale, nn.Parameter) or visible != "gaussian":
            self.scale = own_scale
        else:
            keeps = not own_scale.requires_grad
            self.register_buffer("scale", own_scale, persistent=keeps)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, V)``; infinite off the categories.

        What lies between two binary values or spins has the mean field's energy.
        """
        value = -_layers(self).log_visible(x.to(self.weight.dtype))  # (1)
        if self.visible != "categorical":
            return value
        # Nothing flows back but zeros: there is no slope between categories.
        return value.where(self.support.check(x), torch.inf) + 0 * x.sum(-1)

    def hidden_field(self, x: Tensor) -> Tensor:
        """Fields (3) of the hidden units, shape ``(*batch, H)``.

        Args:
            x: Visible units, shape ``(*batch, V)``.
        """
        return _layers(self).hidden_field(x.to(self.weight.dtype))

    def visible_field(self, hidden: Tensor) -> Tensor:
        """Fields (3) of the visible units, shape ``(*batch, V)`` or ``(*batch, V, q)``.

        Args:
            hidden: Shape ``(*batch, H)``.
        """
        return _layers(self).visible_field(hidden)

    def draw_hidden(self, x: Tensor) -> Tensor:
        """Hidden units given visible ones ``x``, shape ``(*batch, H)``."""
        return _layers(self).hidden_units.draw(self.hidden_field(x))

    def draw_visible(self, hidden: Tensor) -> Tensor:
        """Visible units given hidden ones, shape ``(*batch, V)``."""
        drawn: Tensor = _layers(self).units.draw(self.visible_field(hidden))
        return drawn

    @torch.no_grad()
    def correct(self, base: dist.TorchDistribution, x: Tensor) -> None:
        """Let the visible units be as often what they are in the base, or as large.

        If none has a bias yet. Without weights the machine then is the base.
        """
        bias = self.visible_bias
        if not isinstance(bias, nn.Parameter) or bias.any():
            return
        if isinstance(base, IndependentSites):
            units = _layers(self).units
            bias.copy_(units.field_of(base.log_probs))
        elif self.visible == "gaussian":
            bias.copy_(x.mean(0))

    def over_hidden(self) -> Energy:
        """The energy over the hidden units, of the same partition function (4)."""
        return _OverHidden(self)

    def closed_form(self) -> ClosedForm | None:
        r""":math:`\log Z` by (4), and the distribution, where a layer is small.

        It is where the states of the smaller layer times the statistics of the other
        are at most four million: 16 hidden units and 64 visible ones, say.

        Exactness: *exact* where it is not ``None``.
        """
        solver = _layers(self)
        if solver.cost > _MAX_COST:
            return None
        if self.visible == "gaussian":
            return ExactClosedForm.of(_NormalMixture(self, solver))
        return ExactClosedForm.of(ExactDistribution(self, solver))

    @torch.no_grad()
    def annealing_path(self, log_probs: Tensor | None = None) -> AnnealingPath:
        r"""From independent units to this energy: weights and hidden biases are scaled.

        Args:
            log_probs: Of the values of the visible units where it begins, such as those
                of data, shape ``(q, V)``. Default: the mean field :math:`a = b + W
                \langle h \rangle`, with the hidden means given the visible ones in
                the fields :math:`a`, so that each unit is on about as often at the
                start as at the end.
        """
        layers = _layers(self)
        units, bias = layers.units, self.visible_bias.detach()
        if log_probs is not None and not isinstance(units, _Normals):
            bias = units.field_of(log_probs)
        else:
            for _ in range(_NUM_STEPS):
                means = units.mean(bias).flatten() @ self.weight.flatten(0, -2)
                means = layers.hidden_units.mean(self.hidden_bias + means)
                bias = (bias + layers.visible_field(means)) / 2
        if isinstance(units, _Normals):
            base: Any = dist.Normal(bias, self.scale.expand(bias.shape)).to_event(1)
            log_partition = units.log_sum(torch.zeros_like(bias)).sum()
        else:
            base = IndependentSites(
                self.support, units.probs(bias).log().movedim(-1, 0)
            )
            log_partition = units.log_sum(bias).sum()
        log_partition = log_partition + len(self.hidden_bias) * math.log(2)

        def at(beta: float) -> RBMEnergy:
            return RBMEnergy(
                beta * self.weight,
                torch.lerp(bias, self.visible_bias, beta),
                beta * self.hidden_bias,
                visible=self.visible,
                scale=self.scale,
            )

        return AnnealingPath(ClosedForm(log_partition, base), at)


@final
class _OverHidden(Energy):
    """The terms of (4) over the hidden units, visible ones summed out."""

    weight: Tensor

    def __init__(self, machine: RBMEnergy) -> None:
        support = _layers(machine).hidden_units.support
        shape = machine.hidden_bias.shape
        super().__init__(shape, constraints.independent(support, 1))
        # Its tensors, not itself: that is what a copy in double precision converts.
        self.visible = machine.visible
        for name in ("weight", "visible_bias", "hidden_bias", "scale"):
            value = getattr(machine, name)
            if isinstance(value, nn.Parameter) or not isinstance(value, Tensor):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return -_layers(self).log_hidden(x.to(self.weight.dtype))


@dataclass(frozen=True)
class _Layers:
    """Two layers, and the sum (4) over the states of the smaller one.

    Attributes:
        units: What the visible units are.
        hidden_units: What the hidden units are.
        weight: Of the visible units that are free, shape ``(V, H)`` or ``(V, q, H)``.
        visible: Their biases.
        hidden: Biases of the hidden units, with what observed units add.
        constant: Log of what observed units alone contribute.
        fixed: States of the observed units.
    """

    units: Any
    hidden_units: _Pairs
    weight: Tensor
    visible: Tensor
    hidden: Tensor
    constant: Tensor | float = 0.0
    fixed: dict[int, int] = field(default_factory=dict)

    def hidden_field(self, x: Tensor) -> Tensor:
        """Of the hidden units given visible ones, shape ``(*batch, H)``."""
        weight = self.weight.flatten(0, -2).mT
        return linear(self._statistic(x), weight, self.hidden)  # (3)

    def visible_field(self, hidden: Tensor) -> Tensor:
        """Of the visible units, shape ``(*batch, V)`` or ``(*batch, V, q)``."""
        at = linear(hidden, self.weight.flatten(0, -2), self.visible.flatten())  # (3)
        return at.unflatten(-1, self.visible.shape) if self.visible.dim() > 1 else at

    def log_visible(self, x: Tensor) -> Tensor:
        """Minus the free energy (1), shape ``(*batch,)``."""
        hidden = self.hidden_units.log_sum(self.hidden_field(x)).sum(-1)
        if isinstance(self.units, _Normals):
            off = (x - self.visible) / self.units.scale
            return hidden - off.square().sum(-1) / 2  # (2)
        return hidden + self._statistic(x) @ self.visible.flatten()

    def log_hidden(self, hidden: Tensor) -> Tensor:
        """Log of the terms of (4), shape ``(*batch,)``."""
        visible = self.units.log_sum(self.visible_field(hidden)).sum(-1)
        if isinstance(self.units, _Normals):
            visible = visible - (self.visible / self.units.scale).square().sum() / 2
        return hidden @ self.hidden + visible  # (4)

    @property
    def cost(self) -> float:
        """States of the smaller layer times statistics of the other."""
        if self._is_hidden:
            return 2.0 ** len(self.hidden) * self.visible.numel()
        return float(len(self.units.values)) ** len(self.visible) * len(self.hidden)

    def log_partition(self) -> Tensor:
        """By (4); only states of some weight are kept for the gradient."""
        states = self._states()
        with torch.no_grad():
            log_weights = self._log_weights(states)
            # What is left out is below the rounding of the sum.
            least = log_weights.max() - 50 - math.log(len(states))
        scale = getattr(self.units, "scale", self.hidden)
        learned = (self.weight, self.visible, self.hidden, scale)
        if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
            # What is nan stays, and is seen in the sum.
            log_weights = self._log_weights(states[~(log_weights < least)])
        return log_weights.logsumexp(0) + self.constant

    def marginals(self) -> Tensor:
        """Probabilities of the values of the visible units given a state, weighted."""
        states = self._states()
        weights = self._log_weights(states).softmax(0)
        if self._is_hidden:
            probs = self.units.probs(self.visible_field(states))
        else:
            probs = (states[..., None] == self._values()).to(self.weight)
        free = torch.tensordot(weights, probs, 1)
        whole = free.new_zeros(len(self._free) + len(self.fixed), free.shape[-1])
        for site, state in self.fixed.items():
            whole[site, state] = 1
        return whole.index_put((torch.tensor(self._free, device=free.device),), free)

    def mode(self) -> Tensor:
        """The best of all visible states.

        Raises:
            NotImplementedError: If the visible layer is not the one that is summed.
        """
        if self._is_hidden:
            raise NotImplementedError(
                "the most probable visible state is not to be had from sums over the "
                "hidden units, of which this machine has fewer. Look among draws."
            )
        states = self._states()
        return self._whole(states[self._log_weights(states).argmax()][None])[0]

    def sample(self, num_draws: int) -> Tensor:
        """The layer that is summed first, then the other."""
        return self._whole(self.draws(num_draws))

    def draws(self, num_draws: int) -> Tensor:
        """Values of the free visible units, shape ``(N, V)``."""
        states = self._states()
        probs = self._log_weights(states).softmax(0)
        chosen = states[torch.multinomial(probs, num_draws, replacement=True)]
        return (
            self.units.draw(self.visible_field(chosen)) if self._is_hidden else chosen
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Means of the fields of the visible units, and their variances."""
        states = self._states()
        weights, at = self._log_weights(states).softmax(0), self.visible_field(states)
        mean = weights @ at
        return mean, weights @ (at - mean).square()

    def given(self, observed: Mapping[int, Tensor]) -> "_Layers":
        """What is observed moves into the biases of the hidden units."""
        free, states = self._free, {site: int(x) for site, x in observed.items()}
        on = [free.index(site) for site in states]
        kept = [place for place, site in enumerate(free) if site not in states]
        x = self._values()[list(states.values())]
        statistic = self.units.statistic(x).flatten()
        return replace(
            self,
            weight=self.weight[kept],
            visible=self.visible[kept],
            hidden=self.hidden + statistic @ self.weight[on].flatten(0, -2),
            constant=self.constant + statistic @ self.visible[on].flatten(),
            fixed={**self.fixed, **states},
        )

    @property
    def _free(self) -> list[int]:
        """Numbers of the units that are not observed."""
        number = len(self.visible) + len(self.fixed)
        return [i for i in range(number) if i not in self.fixed]

    @property
    def _is_hidden(self) -> bool:
        """Whether the states of the hidden layer are those that are summed."""
        if isinstance(self.units, _Normals):
            return True
        num_states = len(self.units.values) ** len(self.visible)
        return 2 ** len(self.hidden) <= num_states

    def _values(self) -> Tensor:
        return torch.tensor(self.units.values).to(self.weight)

    def _states(self) -> Tensor:
        """All values of the layer that is summed, shape ``(N, H)`` or ``(N, V)``."""
        size = len(self.hidden) if self._is_hidden else len(self.visible)
        units = self.hidden_units if self._is_hidden else self.units
        values = torch.tensor(units.values).to(self.weight)
        number = torch.arange(len(values) ** size, device=values.device)[:, None]
        place = len(values) ** torch.arange(size, device=values.device)
        return values[number // place % len(values)]

    def _log_weights(self, states: Tensor) -> Tensor:
        return self.log_hidden(states) if self._is_hidden else self.log_visible(states)

    def _statistic(self, x: Tensor) -> Tensor:
        """Shape ``(*batch, V)``, or ``(*batch, V q)`` of categories."""
        found = self.units.statistic(x)
        return found.flatten(-2) if self.visible.dim() > 1 else found

    def _whole(self, x: Tensor) -> Tensor:
        """Indices of the states of all visible units, from values of those free."""
        index = torch.searchsorted(self._values(), x.contiguous())
        whole = index.new_zeros(len(x), len(self._free) + len(self.fixed))
        for site, state in self.fixed.items():
            whole[:, site] = state
        whole[:, self._free] = index
        return whole


class _NormalMixture(dist.TorchDistribution):
    """Real visible units, a mixture of a normal for each state of the hidden ones."""

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, energy: RBMEnergy, solver: _Layers) -> None:
        self.energy, self._solver = energy, solver
        self._found: Tensor | None = None
        super().__init__(torch.Size(), energy.event_shape)

    @property
    def log_partition(self) -> Tensor:
        """In nats, of shape ``batch``, with its gradient."""
        if self._found is None or torch.is_grad_enabled() > self._found.requires_grad:
            self._found = self._solver.log_partition()
        return self._found.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Shape ``(*batch, V)``."""
        mean, _ = self._solver.moments()
        return mean.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Of each unit, shape ``(*batch, V)``."""
        _, between = self._solver.moments()
        return (between + self.energy.scale.square()).expand(self._extended_shape())

    def expand(
        self, batch_shape: Sequence[int], _instance: Any = None
    ) -> "_NormalMixture":
        """The same distribution with another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def condition(self, observed: Mapping[Any, Any]) -> "_NormalMixture":
        """The other units: a machine of these alone, in other fields (3)."""
        sites = [int(i[0] if isinstance(i, tuple) else i) for i in observed]
        free = [i for i in range(*self.event_shape) if i not in sites]
        value = torch.stack([torch.as_tensor(x) for x in observed.values()])
        is_known = len(free) + len(sites) == self.event_shape.numel()
        if not free or not is_known or value.dim() > 1 or not value.isfinite().all():
            raise ValueError(
                "observed must hold a finite number for some of the units from 0 to "
                f"{self.event_shape.numel() - 1} and not for all, got {dict(observed)}."
            )
        machine, value = self.energy, value.to(self.energy.weight)
        scale = torch.as_tensor(machine.scale).expand(self.event_shape)
        statistic = value / scale[sites].square()
        hidden = machine.hidden_bias + statistic @ machine.weight[sites]
        parts = machine.weight[free], machine.visible_bias[free], hidden
        rest = RBMEnergy(*parts, visible="gaussian", scale=scale[free])
        off = (value - machine.visible_bias[sites]) / scale[sites]
        layers = replace(_layers(rest), constant=-off.square().sum() / 2)  # (2)
        return _NormalMixture(rest, layers)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Independent draws, shape ``(*sample, *batch, V)``."""
        if not self.log_partition.isfinite().all():
            value = self.log_partition.tolist()
            raise ValueError(f"parameters must be finite, got log Z = {value}.")
        shape = self._extended_shape(torch.Size(sample_shape))
        return self._solver.draws(shape[:-1].numel()).reshape(shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """In nats, shape ``(*sample, *batch)``."""
        if self._validate_args:
            self._validate_sample(x)
        shape = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        log_z = self.log_partition - self._solver.constant
        return -self.energy(x.expand(*shape, -1)) - log_z


def _layers(machine: Any) -> _Layers:
    """Both layers of a machine as they are now."""
    return _Layers(
        _units(machine.visible, machine.weight.shape, machine.scale),
        _SPIN if machine.visible == "spin" else _BINARY,
        machine.weight,
        machine.visible_bias,
        machine.hidden_bias,
    )


def _units(visible: str, shape: Sequence[int], scale: Any) -> Any:
    """What visible units are, with weights or biases of a shape."""
    if visible == "gaussian":
        return _Normals(torch.as_tensor(scale))
    if visible == "categorical":
        return _Categories(shape[1])
    return _SPIN if visible == "spin" else _BINARY


def _require_weight(weight: Tensor, visible: str) -> None:
    names = "(V, q, H)" if visible == "categorical" else "(V, H)"
    if weight.dim() != names.count(",") + 1 or not weight.numel():
        states = ", q categories" if visible == "categorical" else ""
        raise ValueError(
            f"weight must have shape {names} with V visible and H hidden "
            f"units{states}, got {tuple(weight.shape)} with visible={visible!r}."
        )
    require_precision(weight, "weight")


def _bias(
    bias: Tensor | None, name: str, shape: Sequence[int], weight: Tensor
) -> Tensor:
    bias = weight.detach().new_zeros(shape) if bias is None else bias
    if bias.shape != torch.Size(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} to match weight of shape "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}."
        )
    return bias


def _scale(scale: float | Tensor, visible: str, weight: Tensor) -> Any:
    """That of real units, as a tensor; of others there is none."""
    if visible != "gaussian":
        if not isinstance(scale, float) or scale != 1:
            raise ValueError(
                f"scale must be left at 1 with visible={visible!r}, got {scale}: only "
                "real units, visible='gaussian', have one."
            )
        return scale
    found = torch.as_tensor(scale, dtype=weight.dtype, device=weight.device)
    if found.shape not in ((), weight.shape[:1]) or not (found > 0).all():
        raise ValueError(
            f"scale must be a positive number or {len(weight)} of them, one for each "
            f"visible unit, got {scale}."
        )
    return found
