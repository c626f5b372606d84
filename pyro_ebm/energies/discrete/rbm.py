r"""The restricted Boltzmann machine over its visible units.

With binary visible units :math:`v` and hidden units :math:`h`,

.. math::
    f(v) &= -\log \sum_h e^{v^\top W h + b^\top v + c^\top h}                  \\
         &= -b^\top v - \sum_j \log\left(1 + e^{c_j + (W^\top v)_j}\right)  \tag{1}

the free energy. Either layer is independent given the other:

.. math::
    p(h_j = 1 \mid v) &= \sigma(c_j + (W^\top v)_j)                            \\
    p(v_i = 1 \mid h) &= \sigma(b_i + (W h)_i)                              \tag{2}

References:
    Hinton (2002), Neural Computation 14, 1771-1800.
    Salakhutdinov & Murray (2008), On the quantitative analysis of deep belief networks
    (annealing from a machine without weights but with biases).
"""

__all__ = ["RBMEnergy"]

import math
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import softplus

from pyro_ebm.energies.base import ClosedForm, Energy, live_or_parameter
from pyro_ebm.energies.discrete.finite import AnnealingPath

#: Damped steps to the mean field. It is only a base: it need not have converged.
_NUM_STEPS = 50


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
        return -(x @ self.visible_bias) - softplus(self.hidden_logits(x)).sum(-1)  # (1)

    def hidden_logits(self, x: Tensor) -> Tensor:
        """Logits (2) of the hidden units, shape ``(*batch, H)``."""
        return self.hidden_bias + x @ self.weight

    def visible_logits(self, hidden: Tensor) -> Tensor:
        """Logits (2) of the visible units, shape ``(*batch, V)``."""
        return self.visible_bias + hidden @ self.weight.mT

    def transposed(self) -> "RBMEnergy":
        """The free energy over the hidden units, of the same partition function."""
        return RBMEnergy(self.weight.mT, self.hidden_bias, self.visible_bias)

    @torch.no_grad()
    def annealing_path(self) -> AnnealingPath:
        r"""From independent units to this energy: weights and hidden biases are scaled.

        The visible biases go from those of the mean field :math:`a = b + W \sigma(c +
        W^\top \sigma(a))` to :math:`b`, so that each unit is on about as often at the
        start as at the end.
        """
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


def _bias(bias: Tensor | None, name: str, size: int, weight: Tensor) -> Tensor:
    bias = weight.new_zeros(size) if bias is None else bias
    if bias.shape != (size,):
        raise ValueError(
            f"{name} must have shape {(size,)} to match weight of shape "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}."
        )
    return bias
