r"""Replicas of a chain on a ladder of temperatures, and how they swap places.

Replica :math:`k` is at inverse temperature :math:`\beta_k` of the geometric path from
the base to the energy, :math:`0 = \beta_0 < \dots < \beta_{K-1} = 1`. With
:math:`V = f - f_0`, neighbours swap their points with probability

.. math::
    \alpha_k = \min\big(1, \exp\{(\beta_{k+1} - \beta_k)
        (V(x_{k+1}) - V(x_k))\}\big)                                       \tag{1}

The pairs with even and with odd :math:`k` take turns. A point that moves then goes on
in its direction, so that it travels the ladder in about :math:`K` steps instead of
:math:`K^2`. With the rejection rates :math:`r_k = 1 - \mathbb{E}\,\alpha_k`,

.. math::
    \Lambda = \sum_k r_k                                                   \tag{2}

hardly depends on the ladder: the communication barrier between base and energy. Most
points arrive when all :math:`r_k` are equal.

References:
    Syed, Bouchard-Cote, Deligiannidis & Doucet (2022), JRSS B 84, 321-350.
"""

__all__ = [
    "Exchange",
    "Ladder",
    "Replicas",
    "SiteLadder",
    "above_base",
    "between_neighbours",
    "equalised",
    "first_temperatures",
    "interpolate",
    "require_hmc",
    "swap",
]

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo
from pyro_ebm.mcmc.kernels.hmc import HMC
from pyro_ebm.mcmc.tempering.path import GeometricPath, PathState, advance, joined
from pyro_ebm.mcmc.tempering.site_path import SitePath, SiteState


class Replicas(NamedTuple):
    """The points of all replicas.

    Attributes:
        state: Chain shape ``(C, K)``: chains, temperatures.
        is_fresh: Whether a replica has been at the base since it was last at the
            energy, shape ``(C, K)``.
        parity: Which pairs swap next: 0 the even ones, 1 the odd ones.
    """

    state: Any
    is_fresh: Tensor
    parity: int


class Exchange(NamedTuple):
    """The outcome of one step of all replicas.

    Attributes:
        replicas: After it.
        state: Before the swap, chain shape ``(C, K)``.
        info: What the kernel returned of those above the base.
        swap_prob: Probabilities (1) of all pairs, shape ``(C, K - 1)``.
        arrived: Chains in which a point that came from the base has arrived at the
            energy, shape ``(C,)``.
    """

    replicas: Replicas
    state: Any
    info: StepInfo
    swap_prob: Tensor
    arrived: Tensor


class Ladder(Energy):
    """The energies of all temperatures but the base's, as one for a kernel.

    Replicas move in coordinates ``z = u / scale``, each temperature in its own.

    Args:
        path: From the base to the energy.
        inverse_temperatures: From 0 to 1, shape ``(K,)``.
        scale: Shape ``(K - 1, *event)``.
    """

    inverse_temperatures: Tensor
    scale: Tensor

    def __init__(
        self, path: GeometricPath, inverse_temperatures: Tensor, scale: Tensor
    ) -> None:
        super().__init__(path.event_shape)
        self.path = path
        self.register_buffer("inverse_temperatures", inverse_temperatures)
        self.register_buffer("scale", scale)

    def forward(self, z: Tensor) -> Tensor:
        """Energies at ``z`` of shape ``(C, K - 1, *event)``."""
        return self.value_and_grad(z)[0]

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and gradients."""
        _, value, grad = self.chains(self._evaluate(z))
        return value, grad

    def chains(self, state: PathState) -> ChainState:
        """The replicas above the base as the kernel sees them."""
        u, value, grad = state.at(self.inverse_temperatures[1:])
        return ChainState(u / self.scale, value, grad * self.scale)

    def step(self, kernel: HMC, state: PathState) -> tuple[PathState, StepInfo]:
        """Move the replicas above the base once, each at its temperature.

        Args:
            kernel: With a step size for each of them, shape ``(K - 1,)``.
            state: Chain shape ``(C, K - 1)``.
        """
        return advance(kernel, self, state, self._evaluate, self.chains)

    def _evaluate(self, z: Tensor) -> PathState:
        return self.path.evaluate(z * self.scale)

    def exchange(self, kernel: HMC, replicas: Replicas) -> Exchange:
        """Draw from the base, move what is above it, and swap.

        Args:
            kernel: As for :meth:`step`.
            replicas: Chain shape ``(C, K)``.
        """
        fresh = self.path.sample_base(len(replicas.is_fresh), 1)
        moved, info = self.step(kernel, above_base(replicas.state))
        state = joined((fresh, moved))
        return _exchanged(state, info, replicas, self.inverse_temperatures)


class SiteLadder:
    """The temperatures of a path over a finite support.

    Args:
        path: From the base to the energy.
        inverse_temperatures: From 0 to 1, shape ``(K,)``.
    """

    def __init__(self, path: SitePath, inverse_temperatures: Tensor) -> None:
        self.path, self.inverse_temperatures = path, inverse_temperatures

    def exchange(self, kernel: Kernel, replicas: Replicas) -> Exchange:
        """Draw from the base, move what is above it, and swap.

        Args:
            kernel: With a step size for each temperature, shape ``(K - 1,)``, if it has
                one.
            replicas: Chain shape ``(C, K)``.
        """
        points = [self.path.sample_base(len(replicas.is_fresh)).x]
        infos = []
        for k, beta in enumerate(self.inverse_temperatures[1:].tolist()):
            one: Any = kernel
            if kernel.has_step_size:
                one = kernel.with_step_size(torch.as_tensor(kernel.step_size)[k])
            self.path.inverse_temperature = beta
            column = replicas.state.select((slice(None), k + 1))
            moved, info = self.path.step(one, column)
            points.append(moved.x)
            infos.append(info)
        state = self.path.evaluate(torch.stack(points, 1))
        joint = StepInfo(*(torch.stack(part, 1) for part in zip(*infos, strict=True)))
        return _exchanged(state, joint, replicas, self.inverse_temperatures)


def _exchanged(
    state: Any, info: StepInfo, replicas: Replicas, inverse_temperatures: Tensor
) -> Exchange:
    """The outcome of a swap of replicas that have moved, those at the base anew."""
    is_fresh = replicas.is_fresh.clone()
    is_fresh[:, 0] = True
    before = Replicas(state, is_fresh, replicas.parity)
    after, swap_prob, arrived = swap(before, inverse_temperatures)
    return Exchange(after, state, info, swap_prob, arrived)


def above_base(state: Any) -> Any:
    """The replicas above the base."""
    return state.select((slice(None), slice(1, None)))


def between_neighbours(
    state: Any, inverse_temperatures: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-weights of each replica at the temperature above it, and of that below.

    Args:
        state: Chain shape ``(C, K)``.
        inverse_temperatures: Shape ``(K,)``.

    Returns:
        Upwards for all but the last, and downwards for all but the first, each of shape
        ``(C, K - 1)``.
    """
    if isinstance(state, SiteState):
        return state.neighbours(inverse_temperatures)
    low, high = inverse_temperatures[:-1], inverse_temperatures[1:]
    lower = state.select((slice(None), slice(None, -1)))
    return lower.log_weight(low, high), above_base(state).log_weight(high, low)


def swap(
    replicas: Replicas, inverse_temperatures: Tensor
) -> tuple[Replicas, Tensor, Tensor]:
    """Propose swaps (1) of alternating pairs, and count arrivals at the energy.

    Args:
        replicas: Of which those at the base are fresh.
        inverse_temperatures: Shape ``(K,)``.

    Returns:
        The replicas after it; the probabilities (1) of all pairs, whether it was their
        turn or not, shape ``(C, K - 1)``; and the chains in which a point that came
        from the base has arrived at the energy, shape ``(C,)``.
    """
    state, is_fresh, parity = replicas
    up, down = between_neighbours(state, inverse_temperatures)
    log_ratio = up + down  # (1)
    # Not a number where both energies are infinite: such points stay.
    swap_prob = log_ratio.nan_to_num(-torch.inf, 0.0, -torch.inf).clamp(max=0.0).exp()
    pairs = torch.arange(swap_prob.shape[1], device=swap_prob.device)
    swapped = (torch.rand_like(swap_prob) < swap_prob) & (pairs % 2 == parity)
    # Each replica comes from one place above, one below, or where it is.
    rises = torch.nn.functional.pad(swapped, (0, 1)).long()
    places = torch.arange(rises.shape[1], device=rises.device)
    order = places + rises - rises.roll(1, -1)
    rows = torch.arange(len(order), device=rises.device)[:, None]
    is_fresh = is_fresh[rows, order]
    arrived = is_fresh[:, -1].clone()
    is_fresh[:, -1] = False
    moved = Replicas(state.select((rows, order)), is_fresh, 1 - parity)
    return moved, swap_prob, arrived


def first_temperatures(number: int) -> Tensor:
    r"""Where a ladder begins, :math:`(k / (K - 1))^3`, shape ``(number,)``."""
    return torch.linspace(0, 1, number) ** 3


def require_hmc(kernel: Any) -> None:
    """Check that a kernel can move replicas through real space.

    Raises:
        TypeError: If it takes no step size for each temperature.
    """
    if not isinstance(kernel, HMC):
        raise TypeError(
            "kernel must be HMC, which takes a step size for each temperature; got "
            f"{type(kernel).__name__}. HMC(num_leapfrog=1) is MALA without a bound on "
            "the drift. Over finite supports it is Gibbs, DiscreteLangevin or "
            "SwendsenWang."
        )


def equalised(inverse_temperatures: Tensor, rejection: Tensor) -> Tensor:
    """Temperatures at which all pairs would swap equally often.

    Args:
        inverse_temperatures: As they are, shape ``(K,)``.
        rejection: Rate at which each pair does not swap, shape ``(K - 1,)``.

    Returns:
        Equal parts of the barrier (2), interpolated linearly between the temperatures.

    Example:
        >>> betas = torch.tensor([0.0, 0.5, 1.0])
        >>> equalised(betas, torch.tensor([0.6, 0.2]))
        tensor([0.0000, 0.3336, 1.0000])
    """
    # With a little more than the rate it rises everywhere.
    barrier = torch.nn.functional.pad((rejection + 1e-3).cumsum(0), (1, 0))
    parts = torch.linspace(0, 1, len(barrier)).to(barrier) * barrier[-1]
    found = interpolate(parts, barrier, inverse_temperatures)
    found[0], found[-1] = 0.0, 1.0
    return found


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear interpolation, constant outside of the knots.

    Args:
        x: Where, shape ``(N,)``.
        knots: Rising, shape ``(K,)`` with ``K >= 2``.
        values: At the knots, shape ``(K, *event)``.

    Returns:
        Shape ``(N, *event)``.
    """
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    low, high = knots[right - 1], knots[right]
    weight = ((x - low) / (high - low)).clamp(0, 1)
    weight = weight.reshape(weight.shape + (1,) * (values.dim() - 1))
    return torch.lerp(values[right - 1], values[right], weight)
