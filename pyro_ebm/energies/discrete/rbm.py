r"""The restricted Boltzmann machine over its visible units.

With binary visible units :math:`v` and hidden units :math:`h`,

.. math::
    f(v) &= -\log \sum_h e^{v^\top W h + b^\top v + c^\top h}                  \\
         &= -b^\top v - \sum_j \log\left(1 + e^{c_j + (W^\top v)_j}\right)  \tag{1}

the free energy. Either layer is independent given the other:

.. math::
    p(h_j = 1 \mid v) &= \sigma(c_j + (W^\top v)_j)                            \\
    p(v_i = 1 \mid h) &= \sigma(b_i + (W h)_i)                              \tag{2}

So the sum of the partition function runs over the states of the smaller layer alone,

.. math::
    Z = \sum_h e^{c^\top h} \prod_i \left(1 + e^{b_i + (W h)_i}\right),      \tag{3}

and a draw is one of the hidden state, then of the visible units given that.

References:
    Hinton (2002), Neural Computation 14, 1771-1800.
    Salakhutdinov & Murray (2008), On the quantitative analysis of deep belief networks
    (annealing from a machine without weights but with biases).
"""

__all__ = ["RBMEnergy"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_ebm.energies.base import ClosedForm, Energy, live_or_parameter
from pyro_ebm.energies.discrete.exact.distribution import (
    ExactClosedForm,
    ExactDistribution,
)
from pyro_ebm.energies.discrete.finite import AnnealingPath
from pyro_ebm.energies.discrete.independent import IndependentSites

#: Damped steps to the mean field. It is only a base: it need not have converged.
_NUM_STEPS = 50
#: Terms up to which (3) is cheap: states of a layer times units of the other.
_MAX_COST = 2**22


@final
class RBMEnergy(Energy):
    r"""Free energy (1) of visible units in {0, 1}, hidden units summed out.

    Tensors that carry a graph (latent variables, ``pyro.param``, outputs of a network)
    stay live, a ``nn.Parameter`` is shared, and any other becomes a parameter.

    Args:
        weight: :math:`W`, shape ``(V, H)``.
        visible_bias: :math:`b`, shape ``(V,)``; default: zeros.
        hidden_bias: :math:`c`, shape ``(H,)``; default: zeros.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> energy = RBMEnergy(torch.zeros(3, 2))
        >>> energy(torch.ones(5, 3))  # two hidden units with two states each
        tensor([-1.3863, -1.3863, -1.3863, -1.3863, -1.3863], grad_fn=<SubBackward0>)
    """

    weight: Tensor
    visible_bias: Tensor
    hidden_bias: Tensor

    def __init__(
        self,
        weight: Tensor,
        visible_bias: Tensor | None = None,
        hidden_bias: Tensor | None = None,
    ) -> None:
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(
                "weight must have shape (V, H) with V visible and H hidden units, got "
                f"{tuple(weight.shape)}."
            )
        num_visible, num_hidden = weight.shape
        super().__init__(
            (num_visible,), constraints.independent(constraints.boolean, 1)
        )
        live_or_parameter(self, "weight", weight)
        visible_bias = _bias(visible_bias, "visible_bias", num_visible, weight)
        live_or_parameter(self, "visible_bias", visible_bias)
        hidden_bias = _bias(hidden_bias, "hidden_bias", num_hidden, weight)
        live_or_parameter(self, "hidden_bias", hidden_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, V)``."""
        x = x.to(self.weight.dtype)
        return -(x @ self.visible_bias) - softplus(self.hidden_logits(x)).sum(-1)  # (1)

    def hidden_logits(self, x: Tensor) -> Tensor:
        """Logits (2) of the hidden units, shape ``(*batch, H)``."""
        return self.hidden_bias + x.to(self.weight.dtype) @ self.weight

    def visible_logits(self, hidden: Tensor) -> Tensor:
        """Logits (2) of the visible units, shape ``(*batch, V)``."""
        return self.visible_bias + hidden @ self.weight.mT

    @torch.no_grad()
    def correct(self, base: dist.TorchDistribution, x: Tensor) -> None:
        """Turn the visible units on as often as the base does, if none has a bias yet.

        Without weights the machine then is the base.
        """
        bias = self.visible_bias
        is_free = isinstance(bias, nn.Parameter) and not bias.any()
        if is_free and isinstance(base, IndependentSites):
            bias.copy_(base.log_probs[1] - base.log_probs[0])

    def transposed(self) -> "RBMEnergy":
        """The free energy over the hidden units, of the same partition function."""
        return RBMEnergy(self.weight.mT, self.hidden_bias, self.visible_bias)

    def closed_form(self) -> ExactClosedForm | None:
        r""":math:`\log Z` by (3), and the distribution, where a layer is small.

        It is where the states of the smaller layer times the units of the other are at
        most four million: 16 units and 64, say.

        Exactness: *exact* where it is not ``None``.
        """
        small, large = sorted(self.weight.shape)
        if 2**small * large > _MAX_COST:
            return None
        solver = _Layers(self.weight, self.visible_bias, self.hidden_bias)
        return ExactClosedForm.of(ExactDistribution(self, solver))

    @torch.no_grad()
    def annealing_path(self, bias: Tensor | None = None) -> AnnealingPath:
        r"""From independent units to this energy: weights and hidden biases are scaled.

        Args:
            bias: Logits :math:`a` of the visible units where it begins, shape ``(V,)``,
                such as those of data. Default: the mean field :math:`a = b + W \sigma(c
                + W^\top \sigma(a))`, so that each unit is on about as often at the
                start as at the end.
        """
        if bias is None:
            bias = self.visible_bias.detach()
            for _ in range(_NUM_STEPS):
                hidden = self.hidden_logits(bias.sigmoid()).sigmoid()
                bias = (bias + self.visible_logits(hidden)) / 2
        base = dist.Bernoulli(logits=bias, validate_args=False).to_event(1)
        log_partition = softplus(bias).sum() + len(self.hidden_bias) * math.log(2)

        def at(beta: float) -> RBMEnergy:
            visible_bias = torch.lerp(bias, self.visible_bias, beta)
            return RBMEnergy(beta * self.weight, visible_bias, beta * self.hidden_bias)

        return AnnealingPath(ClosedForm(log_partition, base), at)


@dataclass(frozen=True)
class _Layers:
    """The sum (3), over the states of the smaller layer.

    Attributes:
        weight: Of the visible units that are free, shape ``(V, H)``.
        visible: Their biases.
        hidden: Biases of the hidden units, with what observed units add.
        constant: Log of what observed units alone contribute.
        fixed: States of the observed units.
    """

    weight: Tensor
    visible: Tensor
    hidden: Tensor
    constant: Tensor | float = 0.0
    fixed: dict[int, int] = field(default_factory=dict)

    def log_partition(self) -> Tensor:
        """By (3); only states of some weight are kept for the gradient."""
        states = self._states()
        with torch.no_grad():
            log_weights = self._log_weights(states)
            # What is left out is below the rounding of the sum.
            least = log_weights.max() - 50 - math.log(len(states))
        learned = (self.weight, self.visible, self.hidden)
        if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
            log_weights = self._log_weights(states[log_weights >= least])
        return log_weights.logsumexp(0) + self.constant

    def marginals(self) -> Tensor:
        """Means of the visible units given a state, weighted."""
        states = self._states()
        probs = self._log_weights(states).softmax(0)
        on = probs @ self._visible(states)
        number = len(self.fixed) + len(on)
        free = [i for i in range(number) if i not in self.fixed]
        whole = on.new_zeros(number)
        for site, state in self.fixed.items():
            whole[site] = state
        whole = whole.index_put((torch.tensor(free, device=on.device),), on)
        return torch.stack([1 - whole, whole], -1)

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
        states = self._states()
        probs = self._log_weights(states).softmax(0)
        chosen = states[torch.multinomial(probs, num_draws, replacement=True)]
        mean = self._visible(chosen)
        return self._whole((torch.rand_like(mean) < mean).to(mean))

    def given(self, observed: Mapping[int, Tensor]) -> "_Layers":
        """What is observed moves into the biases of the hidden units."""
        number = len(self.visible) + len(self.fixed)
        free = [i for i in range(number) if i not in self.fixed]
        states = {site: int(state) for site, state in observed.items()}
        on = [free.index(site) for site, state in states.items() if state]
        kept = [place for place, site in enumerate(free) if site not in states]
        return replace(
            self,
            weight=self.weight[kept],
            visible=self.visible[kept],
            hidden=self.hidden + self.weight[on].sum(0),
            constant=self.constant + self.visible[on].sum(),
            fixed={**self.fixed, **states},
        )

    @property
    def _is_hidden(self) -> bool:
        """Whether the states of the hidden layer are those that are summed."""
        return self.weight.shape[1] <= self.weight.shape[0]

    def _states(self) -> Tensor:
        size = min(self.weight.shape)
        number = torch.arange(2**size, device=self.weight.device)[:, None]
        return (number >> torch.arange(size, device=number.device) & 1).to(self.weight)

    def _log_weights(self, states: Tensor) -> Tensor:
        """Log of the terms of (3), shape ``(N,)``."""
        if self._is_hidden:
            logits = self.visible + states @ self.weight.mT
            return states @ self.hidden + softplus(logits).sum(-1)  # (3)
        logits = self.hidden + states @ self.weight
        return states @ self.visible + softplus(logits).sum(-1)

    def _visible(self, states: Tensor) -> Tensor:
        """Means of the visible units, shape ``(N, V)``; their states, if summed."""
        if not self._is_hidden:
            return states
        return (self.visible + states @ self.weight.mT).sigmoid()  # (2)

    def _whole(self, free: Tensor) -> Tensor:
        """All visible units, from those that are free."""
        number = free.shape[-1] + len(self.fixed)
        whole = free.new_zeros(len(free), number).long()
        for site, state in self.fixed.items():
            whole[:, site] = state
        sites = [i for i in range(number) if i not in self.fixed]
        whole[:, sites] = free.long()
        return whole


def _bias(bias: Tensor | None, name: str, size: int, weight: Tensor) -> Tensor:
    bias = weight.new_zeros(size) if bias is None else bias
    if bias.shape != (size,):
        raise ValueError(
            f"{name} must have shape {(size,)} to match weight of shape "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}."
        )
    return bias
