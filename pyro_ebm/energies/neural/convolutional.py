r"""A convolutional network as an energy of images.

.. math::
    f(x) = g_\theta(x) - \log p_0(x)                                        \tag{1}

with a network :math:`g_\theta` of strided convolutions and, if given, a normalised base
:math:`p_0`.
"""

__all__ = ["ConvolutionalEnergy"]

from collections.abc import Callable, Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.energies.base import Energy
from pyro_ebm.energies.distribution import base_energy
from pyro_ebm.energies.neural.neural import build_activation, small_output


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
            layers.append(build_activation(activation))
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
