r"""Neural networks as energies of vectors and images.

.. math::
    f(x) = g_\theta(x) - \log p_0(x)                                        \tag{1}

with a network :math:`g_\theta`, a multi-layer perceptron or strided convolutions, and,
if given, a normalised base :math:`p_0`. Of a perceptron, with
:math:`a_l = W_l h_{l-1} + b_l`, :math:`h_l = s(a_l)`, :math:`g = w^\top h_L + b`
and :math:`h_0 = x`, the gradient in :math:`h_0` is the recursion

.. math::
    \partial_{h_L} g = w, \qquad
    \partial_{h_{l-1}} g = W_l^\top
        \big(s'(a_l) \odot \partial_{h_l} g\big)                           \tag{2}

A layer of bounded spectral norm never stretches a vector by more than a factor
:math:`c`:

.. math::
    \tilde W &= W \min\Big(1, \frac{c}{\hat\sigma(W)}\Big)                    \\
    \hat\sigma(W) &= \big(\operatorname{tr} (W^\top W)^{32}\big)^{1/64}
    \ge \sigma_{\max}(W)                                                   \tag{3}

:math:`\hat\sigma` is the Schatten norm of order 64, by four squarings of the smaller
Gram matrix: above the spectral norm by a factor of at most :math:`n^{1/64}`, 1.08 for
128 columns. Power iteration is cheaper, and its result depends on how often it was
asked: then :math:`f` is no function of :math:`x` alone, and a Metropolis kernel
compares energies that do not belong together. (3) has no memory.

Where the base was fitted to data, :math:`h_0` is :math:`z = (x - m) / \sigma`; and up
to three coordinates are joined by sines and cosines of random projections of them,

.. math::
    h_0 = (z, \sin \Omega z, \cos \Omega z), \qquad
    \Omega_{kd} \sim \operatorname{Normal}(0, 3^2)                          \tag{4}

without which a perceptron takes very long to follow what bends within a fraction of a
standard deviation.

References:
    Miyato, Kataoka, Koyama & Yoshida (2018), ICLR (by power iteration, always to 1).
    Tancik et al. (2020), NeurIPS (the features of (4), and why they are needed).
"""

__all__ = ["BoundedLinear", "ConvolutionalEnergy", "NeuralEnergy"]

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyro_ebm.core.spaces import MixedSupport, states_of
from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.discrete.finite import finite_values, num_states
from pyro_ebm.energies.distribution import base_energy

#: Coordinates up to which (4) is used; its projections, and their deviation.
_FEW, _PROJECTIONS, _FREQUENCY = 3, 32, 3.0


@final
class BoundedLinear(nn.Linear):
    """``nn.Linear`` with the weight (3); a weight that is small enough stays as it is.

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
        """The weight (3), with its gradient."""
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
    return squared.clamp(min=tiny).sqrt()  # (3)


# s'(a) * grad in one fused operation, from (activation, grad, a, s(a)).
_SLOPE_TIMES: dict[type, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    nn.SiLU: lambda s, grad, a, h: torch.ops.aten.silu_backward(grad, a),
    nn.Tanh: lambda s, grad, a, h: torch.ops.aten.tanh_backward(grad, h),
    nn.GELU: lambda s, grad, a, h: torch.ops.aten.gelu_backward(
        grad, a, approximate=s.approximate
    ),
    nn.Softplus: lambda s, grad, a, h: torch.ops.aten.softplus_backward(
        grad, a, s.beta, s.threshold
    ),
}


@final
class NeuralEnergy(Energy):
    r"""A multi-layer perceptron (1), by default with smooth activations.

    The output layer starts small, so that :math:`f` starts close to the energy of the
    base. Without a base :math:`f` starts almost constant and grows at most linearly,
    possibly downwards: nothing then makes :math:`e^{-f}` integrable over an unbounded
    space, so give a base unless the training keeps it so.

    With a base that :func:`pyro_ebm.fit` has fitted, the network sees standardised
    coordinates, and of up to three also their projections (4).

    Any activation works; one with a kink (``nn.ReLU``) makes :math:`f` piecewise linear
    and its gradient jump, which costs Hamiltonian and Langevin kernels acceptance, and
    score matching, which differentiates twice, its meaning.

    The gradient comes from (2), without autograd, for ``nn.SiLU``, ``nn.Softplus``,
    ``nn.Tanh`` and ``nn.GELU``; forward hooks on the layers are called there too.

    Over a finite support, or a mixed one, a coordinate of more than two states enters
    as one input for each state, 1 for the one that it is in; one of two states as it
    is. These inputs have no gradient.

    Args:
        event_shape: Shape of one point, usually ``(D,)``; it is flattened.
        hidden_sizes: Width of each hidden layer.
        activation: Builds one activation module a hidden layer, such as ``nn.SiLU``.
        support: Real, finite or mixed; default: all of :math:`\mathbb{R}^D`.
        base: Normalised distribution :math:`p_0` over the support, kept fixed; see
            :class:`~pyro_ebm.energies.DistributionEnergy`.
        spectral_norm: Largest spectral norm :math:`c` that a weight matrix may have;
            larger ones are scaled down when used, by a bound of it that is at most 8 %
            above up to a width of 128. Then :math:`|\partial_x g| \le c^{L+1} s^L`
            with the steepest slope ``s`` of the activation (1.1 for ``nn.SiLU``): the
            energy cannot rise or fall faster, and learning cannot blow it up. Too small
            a bound cannot fit sharp edges of the data. A gradient of 256 chains takes
            about 2.5 times as long, that of 1,024 and wide layers 1.2 times. Default:
            no bound.

    Raises:
        TypeError: If ``activation`` does not build a module, or ``base`` is no
            distribution.
        ValueError: If the base has another event shape or support or is batched, or
            ``spectral_norm`` is not positive and finite.

    Example:
        >>> base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> f = NeuralEnergy((2,), hidden_sizes=(64, 64), base=base)
        >>> value, grad = f.value_and_grad(torch.randn(5, 2))
        >>> value.shape, grad.shape
        (torch.Size([5]), torch.Size([5, 2]))
    """

    loc: Tensor
    scale: Tensor
    frequency: Tensor  # of (4), shape (width, F)
    plain: Tensor  # coordinates that enter as they are
    wide: Tensor  # those that enter state by state, shape (F,)
    states: Tensor  # theirs, shape (F, q), nan beyond their own
    is_state: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden_sizes: Sequence[int] = (128, 128),
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        support: Constraint | None = None,
        base: dist.TorchDistribution | None = None,
        spectral_norm: float | None = None,
    ) -> None:
        super().__init__(event_shape, support)
        self.base_energy = base_energy(base, self)
        self._set_code()
        width = self._num_plain + int(self.is_state.sum())
        self.register_buffer("loc", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("frequency", torch.empty(width, 0))
        self._is_bounded = spectral_norm is not None
        linear: Callable[[int, int], nn.Linear] = nn.Linear
        if spectral_norm is not None:
            linear = functools.partial(BoundedLinear, max_norm=spectral_norm)
        layers: list[nn.Module] = []
        for size in hidden_sizes:
            layers += [linear(width, size), _build_activation(activation)]
            width = size
        self.network = nn.Sequential(*layers, small_output(width, linear))

    @property
    def base(self) -> dist.TorchDistribution | None:
        """The distribution :math:`p_0`, or ``None``."""
        return None if self.base_energy is None else self.base_energy.distribution

    @torch.no_grad()
    def correct(self, base: dist.TorchDistribution, x: Tensor) -> None:
        r"""Start as the energy of a base, and see standardised coordinates, or (4).

        Nothing is done where there is a base already. For (4) the first layer is a new
        one.

        Args:
            base: Normalised, over the support.
            x: Points to standardise by, shape ``(N, *event)``; not used with a
                ``spectral_norm``, which is of the network as a function of ``x``.
        """
        if self.base_energy is not None:
            return
        self.base_energy = base_energy(base, self)
        if not self._is_bounded:
            inputs = self._inputs(x)
            scale = inputs.std(0)
            self.loc.copy_(inputs.mean(0))
            self.scale.copy_(scale.where(scale > 0, 1.0))
            self._add_projections()
        output: Any = self.network[-1]
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def _add_projections(self) -> None:
        """Let the first layer see (4), if there are few coordinates, and all real."""
        first: Any = self.network[0]
        dim, is_real = len(self.loc), not self.support.is_discrete
        is_real = is_real and not isinstance(self.support, MixedSupport)
        if not is_real or dim > _FEW or len(self.network) == 1:
            return
        self.frequency = _FREQUENCY * torch.randn(dim, _PROJECTIONS).to(self.loc)
        wider = nn.Linear(dim + 2 * _PROJECTIONS, first.out_features)
        self.network[0] = wider.to(first.weight)

    def correction(self, x: Tensor) -> Tensor:
        """The network alone, shape ``(*batch,)``; see :meth:`Energy.correction`."""
        z = (self._inputs(x) - self.loc) / self.scale
        value: Tensor = self.network(self._joined(z)).squeeze(-1)
        return value

    def _joined(self, z: Tensor) -> Tensor:
        """What the first layer sees, (4)."""
        if not self.frequency.shape[-1]:
            return z
        angle = z @ self.frequency
        return torch.cat([z, angle.sin(), angle.cos()], -1)

    def _set_code(self) -> None:
        """Find the coordinates that enter state by state."""
        states = _states_of_coordinates(self)
        wide = [n for n, values in enumerate(states) if len(values) > 2]
        plain = [n for n, values in enumerate(states) if len(values) <= 2]
        table = torch.full((len(wide), max(map(len, states), default=0)), torch.nan)
        for row, number in zip(table, wide, strict=True):
            row[: len(states[number])] = states[number]
        self._num_plain = len(plain)
        for name, tensor in (
            ("plain", torch.tensor(plain, dtype=torch.long)),
            ("wide", torch.tensor(wide, dtype=torch.long)),
            ("states", table),
            ("is_state", ~table.isnan()),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def _inputs(self, x: Tensor) -> Tensor:
        """What the network sees, before it is standardised, ``(*batch, width)``."""
        flat = x.reshape(self.batch_shape_of(x) + (self.event_shape.numel(),))
        if not len(self.wide):
            return flat
        is_in = flat[..., self.wide, None] == self.states
        code = is_in[..., self.is_state].to(flat)
        return torch.cat([flat[..., self.plain], code], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, *event)``."""
        energy = self.correction(x)
        return energy if self.base_energy is None else energy + self.base_energy(x)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient by (2) where the activation allows it."""
        batch_shape = self.batch_shape_of(x)
        activations = list(self.network)[1::2]
        if len(self.wide) or any(
            type(s) not in _SLOPE_TIMES or getattr(s, "inplace", False)
            for s in activations
        ):
            return super().value_and_grad(x)
        flat = x.detach().reshape(batch_shape + (self.event_shape.numel(),))
        h = self._joined((flat - self.loc) / self.scale)
        value, grad = self._network_value_and_grad(h)
        if self.frequency.shape[-1]:
            sizes = [len(self.loc), *[self.frequency.shape[-1]] * 2]
            (_, sin, cos), (grad, by_sin, by_cos) = (
                h.split(sizes, -1),
                grad.split(sizes, -1),
            )
            grad = grad + (by_sin * cos - by_cos * sin) @ self.frequency.mT
        grad = (grad / self.scale).reshape(x.shape)
        if self.base_energy is None:
            return value, grad
        base_value, base_grad = self.base_energy.value_and_grad(x)
        return value + base_value, grad + base_grad

    @torch.no_grad()
    def _network_value_and_grad(self, h: Tensor) -> tuple[Tensor, Tensor]:
        hidden: list[Any] = list(self.network)
        output = hidden.pop()
        tape = []
        for linear, activation in zip(hidden[::2], hidden[1::2], strict=True):
            a, weight = _apply(linear, h)
            h = activation(a)
            tape.append((weight, activation, a, h))
        value, weight = _apply(output, h)
        value, grad = value.squeeze(-1), weight[0].expand(h.shape)
        for weight, activation, a, h_out in reversed(tape):
            grad = _SLOPE_TIMES[type(activation)](activation, grad, a, h_out)
            # A contiguous transpose makes the product with a narrow input layer five
            # times faster on a CPU, and no other slower.
            grad = nn.functional.linear(grad, weight.mT.contiguous())  # (2)
        return value, grad


def _states_of_coordinates(energy: Energy) -> list[Tensor]:
    """The states of each coordinate of the flattened event, none of a real one.

    Raises:
        ValueError: If there are infinitely many.
    """
    support, shape = energy.support, energy.event_shape
    if isinstance(support, MixedSupport):
        none = torch.empty(0)
        return [states_of(c) if c.is_discrete else none for c in support.columns]
    values = finite_values(support)
    if values is None and support.is_discrete:
        raise ValueError(
            f"support must be real, finite or mixed, got {support}. "
            "independent(integer_interval(a, b), n) is finite."
        )
    number = num_states(support, shape)
    counts = [len(values or ())] * shape.numel()
    counts = counts if number is None else number.flatten().tolist()
    return [torch.tensor((values or ())[:count]) for count in counts]


def _apply(linear: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes of its input, and the weight by which it does."""
    if isinstance(linear, BoundedLinear):
        weight = linear.bounded_weight()
        return linear(h, weight), weight
    return linear(h), linear.weight


def _build_activation(activation: Callable[[], nn.Module]) -> nn.Module:
    """Call ``activation``, and check that a module comes out.

    Raises:
        TypeError: If it is a module already, or does not build one.
    """
    module = None if isinstance(activation, nn.Module) else activation()
    if not isinstance(module, nn.Module):
        raise TypeError(
            "activation must build a module when called, as nn.SiLU or "
            f"functools.partial(nn.Softplus, beta=2) do; got {activation!r}."
        )
    return module


def small_output(
    width: int, linear: Callable[[int, int], nn.Linear] = nn.Linear
) -> nn.Linear:
    """Linear layer with one output that starts close to zero."""
    layer = linear(width, 1)
    nn.init.normal_(layer.weight, std=0.01 / width**0.5)
    nn.init.zeros_(layer.bias)
    return layer


@final
class ConvolutionalEnergy(Energy):
    r"""Strided convolutions and a linear output (1), for images.

    A 3x3 convolution at full resolution, then one 4x4 convolution of stride 2 for each
    further entry of ``channels``, each of which halves height and width (rounded down).
    No normalisation layers: they would tie the energies of a batch together. As for
    :class:`~pyro_ebm.energies.NeuralEnergy`, the output starts small, a smooth
    activation suits gradient-based kernels, and without a base nothing makes
    :math:`e^{-f}` integrable over all of space.

    Args:
        event_shape: ``(channels, height, width)`` of one image.
        channels: Number of channels after each convolution.
        activation: Builds one activation module a convolution, such as ``nn.SiLU``.
        base: Normalised distribution :math:`p_0` over the image, kept fixed.

    Raises:
        TypeError: If ``activation`` does not build a module, or ``base`` is no
            distribution.
        ValueError: If the event has not three dimensions, if the image is too small to
            be halved that often, or if the base has another event shape or support or
            is batched.

    Example:
        >>> f = ConvolutionalEnergy((1, 8, 8), channels=(4, 8))
        >>> f(torch.zeros(2, 3, 1, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 64),
        *,
        activation: Callable[[], nn.Module] = nn.SiLU,
        base: dist.TorchDistribution | None = None,
    ) -> None:
        super().__init__(event_shape)
        halvings = max(len(channels) - 1, 0)
        if self.event_dim != 3 or min(event_shape[1:]) >> halvings < 1:
            raise ValueError(
                "event_shape must be (channels, height, width) with height and width "
                f"at least {2**halvings} for {len(channels)} convolutions, got "
                f"{tuple(event_shape)}. Reshape the images, or pass fewer channels."
            )
        self.base_energy = base_energy(base, self)
        layers: list[nn.Module] = []
        width = event_shape[0]
        for index, size in enumerate(channels):
            kernel, stride = (3, 1) if index == 0 else (4, 2)
            layers.append(nn.Conv2d(width, size, kernel, stride, padding=1))
            layers.append(_build_activation(activation))
            width = size
        pixels = (event_shape[1] >> halvings) * (event_shape[2] >> halvings)
        output = small_output(width * pixels)
        self.network = nn.Sequential(*layers, nn.Flatten(), output)

    @property
    def base(self) -> dist.TorchDistribution | None:
        """The distribution :math:`p_0`, or ``None``."""
        return None if self.base_energy is None else self.base_energy.distribution

    @torch.no_grad()
    def correct(self, base: dist.TorchDistribution, x: Tensor) -> None:
        """Start as the energy of a base, unless there is one.

        Args:
            base: Normalised, over the image.
            x: Not used: images are of one scale.
        """
        if self.base_energy is not None:
            return
        self.base_energy = base_energy(base, self)
        output: Any = self.network[-1]
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def correction(self, x: Tensor) -> Tensor:
        """The network alone, shape ``(*batch,)``; see :meth:`Energy.correction`."""
        batch_shape = self.batch_shape_of(x)
        images = x.reshape((batch_shape.numel(), *self.event_shape))
        value: Tensor = self.network(images).reshape(batch_shape)
        return value

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*batch, *event)``."""
        energy = self.correction(x)
        return energy if self.base_energy is None else energy + self.base_energy(x)
