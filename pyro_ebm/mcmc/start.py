"""Where many chains start: in groups that share a point, so that memory of it shows."""

__all__ = ["start_chains"]

from typing import Any

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, replace_nonfinite
from pyro_ebm.mcmc.target import ChainKernel, ChainTarget

#: From so many chains on they start in groups.
_MANY = 64
#: Groups that are wanted, at least and at most; Margossian et al. (2024) use 16.
_GROUPS = (8, 16)


def start_chains(
    target: ChainTarget, kernel: ChainKernel, num_chains: int, initial: Any = None
) -> tuple[ChainState, int]:
    """Place the chains.

    Args:
        target: What they run on.
        kernel: What will move them.
        num_chains: ``C``.
        initial: ``K`` points of the support, ``K`` a divisor of ``C``; each is where
            ``C / K`` chains side by side start. Default: the target's own.

    Returns:
        The state and ``K``. Groups at points of non-finite energy or gradient start
        where randomly chosen others do.

    Raises:
        ValueError: If ``initial`` has another shape, or a number of points that does
            not divide that of the chains.
        DivergenceError: If energy and gradient are finite at no point.
    """
    if initial is None:
        num_groups = _num_groups(num_chains)
        size = num_chains // num_groups
        # As many as chains: another batch size may have to be traced anew.
        points = target.start(num_chains)[::size]
    else:
        points = _checked(target, initial, num_chains)
        num_groups = len(points)
        size = num_chains // num_groups
    state = kernel.init(target.energy, points.repeat_interleave(size, 0))
    groups = ChainState(*(value[::size] for value in state))
    if target.energy.support.is_discrete:  # where gradients may be missing
        groups = groups._replace(grad=torch.zeros_like(groups.x))
        x = replace_nonfinite(groups).x.repeat_interleave(size, 0)
        return kernel.init(target.energy, x), num_groups
    groups = replace_nonfinite(groups)
    return ChainState(*(v.repeat_interleave(size, 0) for v in groups)), num_groups


def _num_groups(num_chains: int) -> int:
    if num_chains < _MANY:
        return num_chains
    low, high = _GROUPS
    divisors = [k for k in range(low, high + 1) if num_chains % k == 0]
    return max(divisors, default=num_chains)


def _checked(target: ChainTarget, initial: Any, num_chains: int) -> Tensor:
    energy: Energy = target.energy
    points = target.unconstrain(initial)
    if not isinstance(points, Tensor) or points.dim() != energy.event_dim + 1:
        shape = tuple(points.shape) if isinstance(points, Tensor) else type(points)
        raise ValueError(
            "initial must hold points of shape (K, *event), that is (K, "
            f"*{tuple(energy.event_shape)}) in unconstrained space; got {shape}."
        )
    energy.batch_shape_of(points)
    if not len(points) or num_chains % len(points):
        raise ValueError(
            f"initial must hold K points, K a divisor of num_chains = {num_chains}, so "
            f"that num_chains / K chains start at each; got {len(points)}."
        )
    return points.detach().to(**energy.tensor_options(points))
