r"""A linear layer that never stretches a vector by more than a given factor.

.. math::
    \tilde W &= W \min\Big(1, \frac{c}{\hat\sigma(W)}\Big)                    \\
    \hat\sigma(W) &= \big(\operatorname{tr} (W^\top W)^{32}\big)^{1/64}
    \ge \sigma_{\max}(W)                                                   \tag{1}

:math:`\hat\sigma` is the Schatten norm of order 64, by four squarings of the smaller
Gram matrix: above the spectral norm by a factor of at most :math:`n^{1/64}`, 1.08 for
128 columns. Power iteration is cheaper, and its result depends on how often it was
asked: then :math:`f` is no function of :math:`x` alone, and a Metropolis kernel
compares energies that do not belong together. (1) has no memory.

References:
    Miyato, Kataoka, Koyama & Yoshida (2018), ICLR (by power iteration, always to 1).
"""

__all__ = ["BoundedLinear"]

import math
from typing import final

import torch
from torch import Tensor, nn


@final
class BoundedLinear(nn.Linear):
    """``nn.Linear`` with the weight (1); a weight that is small enough stays as it is.

    Its ``state_dict`` is that of ``nn.Linear``, and holds :math:`W`.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        max_norm: :math:`c`.

    Raises:
        ValueError: If ``max_norm`` is not positive and finite.
    """

    def __init__(self, in_features: int, out_features: int, max_norm: float) -> None:
        if not 0 < max_norm < math.inf:
            raise ValueError(
                f"the spectral norm must be positive and finite, got {max_norm}. "
                "None leaves the weights free."
            )
        super().__init__(in_features, out_features)
        self.max_norm = max_norm

    def bounded_weight(self) -> Tensor:
        """The weight (1), with its gradient."""
        norm = spectral_norm_bound(self.weight)
        return self.weight * (self.max_norm / norm).clamp(max=1.0)

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: A002
        """Apply the layer, with a :meth:`bounded_weight` that is at hand already."""
        if weight is None:
            weight = self.bounded_weight()
        return nn.functional.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """What ``nn.Linear`` says, and the bound."""
        return f"{super().extra_repr()}, max_norm={self.max_norm:g}"


def spectral_norm_bound(weight: Tensor) -> Tensor:
    r"""An upper bound :math:`\hat\sigma` of the spectral norm, shape ``()``.

    Args:
        weight: Shape ``(m, n)``; below a norm of about 1e-7 in single precision the
            bound stays there.
    """
    if weight.shape[0] < weight.shape[1]:
        weight = weight.mT
    tiny = torch.finfo(weight.dtype).eps ** 2  # keeps the gradient at 0 finite
    if weight.shape[1] == 1:
        norm: Tensor = weight.norm().clamp(min=tiny)
        return norm
    power = weight.mT @ weight
    bound = torch.ones_like(power[0, 0])
    for exponent in (1, 1 / 4):  # divided by the trace, so that nothing underflows
        trace = power.trace().clamp(min=tiny)
        bound, power = bound * trace**exponent, power / trace
        power = power @ power
        power = power @ power
    last = power.norm().clamp(min=tiny)  # that of Frobenius, of the 16th power
    squared: Tensor = bound * last ** (1 / 16)
    return squared.clamp(min=tiny).sqrt()  # (1)
