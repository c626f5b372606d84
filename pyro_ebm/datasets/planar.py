r"""Three toy data sets in the plane, centred at the origin.

Draws come from torch's global stream, in its default dtype. Their densities are known,
two exactly, that of the moons as an integral in one dimension:

.. math::
    p_{\text{eight}}(x) &= \tfrac18 \sum_{k=0}^7
        \mathcal{N}\big(x;\, r (\cos \tfrac{k\pi}4, \sin \tfrac{k\pi}4),
        \sigma^2 I\big), \qquad r = 3,\ \sigma = 0.3                        \tag{1} \\
    p_{\text{board}}(x) &= \tfrac1{32} \quad \text{on 8 of the 16 squares of side 2 in }
        [-4, 4]^2                                                          \tag{2} \\
    p_{\text{moons}}(x) &= \frac1{2\pi} \int_0^\pi
        \mathcal{N}\big(x; c(t), \sigma^2 I\big)
        + \mathcal{N}\big(x; -c(t), \sigma^2 I\big)\, dt,                      \\
    c(t) &= (\cos t - \tfrac12, \sin t - \tfrac14)                        \tag{3}
"""

__all__ = [
    "checkerboard",
    "checkerboard_density",
    "eight_gaussians",
    "eight_gaussians_density",
    "two_moons",
    "two_moons_density",
]

import math

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor


def two_moons(num_samples: int, *, noise: float = 0.1) -> Tensor:
    """Two interleaving half circles of radius 1, blurred by Gaussian noise.

    The points lie within about [-1.8, 1.8] x [-1.1, 1.1]. Each is on either moon with
    equal probability.

    Args:
        num_samples: Number of points ``N``.
        noise: Standard deviation of the blur, in units of the radius.

    Returns:
        Shape ``(N, 2)``.

    Raises:
        ValueError: If ``noise`` is negative.

    Example:
        >>> x = two_moons(1000, noise=0.0)
        >>> centres = torch.tensor([[-0.5, -0.25], [0.5, 0.25]])
        >>> (torch.cdist(x, centres) - 1).abs().amin(-1).max() < 1e-4  # on the moons
        tensor(True)
    """
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}.")
    angle = math.pi * torch.rand(num_samples)
    side = torch.randint(2, (num_samples,)) * 2 - 1  # +1 upper moon, -1 lower moon
    centre = torch.stack([-0.5 * side, -0.25 * side], -1)
    circle = torch.stack([side * angle.cos(), side * angle.sin()], -1)
    return centre + circle + noise * torch.randn(num_samples, 2)


def two_moons_density(
    *, noise: float = 0.1, num_nodes: int = 80
) -> dist.MixtureSameFamily:
    """The density (3) as a Pyro distribution: Gaussians at Gauss-Legendre nodes.

    Args:
        noise: Standard deviation of the blur, in units of the radius.
        num_nodes: Nodes of the quadrature on each moon.

    Returns:
        A distribution of event shape ``(2,)``, log density in nats.

    Raises:
        ValueError: If ``noise`` is not positive, or there is no node.

    Exactness: up to the error of the quadrature, which falls faster than any power of
    ``num_nodes * noise``: at ``noise=0.1`` log p is off by less than 1e-11 nats where
    draws fall, in double precision. At half the noise take twice the nodes.

    Example:
        >>> density, x = two_moons_density(), two_moons(5)
        >>> density.log_prob(x).shape
        torch.Size([5])
        >>> torch.allclose(density.log_prob(x), density.log_prob(-x), atol=1e-4)
        True
    """
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be positive and finite, got {noise}.")
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1, got {num_nodes}.")
    node, weight = np.polynomial.legendre.leggauss(num_nodes)  # of [-1, 1]
    dtype = torch.get_default_dtype()
    angle = torch.tensor((node + 1) * (math.pi / 2), dtype=dtype)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
    probs = torch.tensor(weight / 4, dtype=dtype).repeat(2)  # half on each moon
    along = dist.Normal(torch.cat([upper, -upper]), noise).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(probs=probs), along)  # (3)


def eight_gaussians(num_samples: int) -> Tensor:
    """Draws from (1), within about [-4, 4] in both coordinates.

    Args:
        num_samples: Number of points ``N``.

    Returns:
        Shape ``(N, 2)``.

    Example:
        >>> x = eight_gaussians(1000)
        >>> x.shape, x.norm(dim=-1).mean()  # on a circle of radius 3
        (torch.Size([1000, 2]), tensor(3.0))
    """
    return eight_gaussians_density().sample((num_samples,))


def eight_gaussians_density() -> dist.MixtureSameFamily:
    """The density (1) as a Pyro distribution.

    Returns:
        A distribution of event shape ``(2,)``, log density in nats.

    Exactness: *exact*.

    Example:
        >>> eight_gaussians_density().log_prob(torch.tensor([3.0, 0.0]))
        tensor(-1.5094)
    """
    angle = torch.arange(8) * (math.pi / 4)
    centre = 3.0 * torch.stack([angle.cos(), angle.sin()], -1)
    return dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(8)), dist.Normal(centre, 0.3).to_event(1)
    )  # (1)


def checkerboard(num_samples: int) -> Tensor:
    """Draws from (2), within [-4, 4] in both coordinates.

    Args:
        num_samples: Number of points ``N``.

    Returns:
        Shape ``(N, 2)``.

    Example:
        >>> x = checkerboard(1000)
        >>> (x / 2).floor().sum(-1).remainder(2).max()  # on black squares only
        tensor(0.)
    """
    return checkerboard_density().sample((num_samples,))


def checkerboard_density() -> dist.MixtureSameFamily:
    """The density (2) as a Pyro distribution; ``-inf`` off the squares.

    Returns:
        A distribution of event shape ``(2,)``, log density in nats.

    Exactness: *exact*.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        >>> checkerboard_density().log_prob(x)  # -log 32 on black squares
        tensor([-3.4657,    -inf])
    """
    row, column = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(-1)
    black = (row + column) % 2 == 0
    low = 2.0 * torch.stack([row[black], column[black]], -1) - 4.0
    squares = dist.Uniform(low, low + 2.0, validate_args=False)
    return dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(8)),
        squares.to_event(1),
        validate_args=False,
    )  # (2)
