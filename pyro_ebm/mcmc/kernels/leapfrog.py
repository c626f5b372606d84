r"""The leapfrog integrator, the inner loop of every Hamiltonian kernel.

With momenta :math:`r \sim \mathcal{N}(0, I)`, a scale matrix :math:`S` and a step
:math:`\epsilon`,

.. math::
    x &\leftarrow x + \epsilon S r                                         \tag{1} \\
    r &\leftarrow r - h\, \epsilon S^\top \nabla f(x)                      \tag{2} \\
    \log\alpha &= f(x) + \tfrac12 |r|^2 - f(x') - \tfrac12 |r'|^2         \tag{3}

A trajectory is (2) with :math:`h = \tfrac12`, then (1) and (2) in turn, with
:math:`h = 1` where two half steps of the momentum meet, and :math:`h = \tfrac12` at the
end. It is the usual scheme with inverse mass matrix :math:`S S^\top`.

References:
    Neal (2011), MCMC using Hamiltonian dynamics. Handbook of MCMC, chapter 5.
"""

__all__ = ["FusedEnergy", "Phase", "Trajectory", "leapfrog", "trajectory"]

from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.base import ChainState, flat_event
from pyro_ebm.mcmc.kernels.metric import Factor, times_scale, times_transposed

#: Points, their energies, the gradients there, and the momenta.
Phase: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class FusedEnergy(Protocol):
    """Protocol of energies with a fused leapfrog step of their own.

    An energy whose class has this method, such as a compiled one, does the whole step
    by it; any other needs ``value_and_grad`` alone.
    """

    def leapfrog(
        self,
        x: Tensor,
        r: Tensor,
        eps: Tensor,
        half: float,
        factor: Factor | None,
    ) -> Phase:
        """As :func:`leapfrog`: the same numbers up to rounding, one evaluation.

        It is called under ``no_grad``, must not write to its arguments, and must give
        new tensors at each call: a kernel keeps what an earlier one returned.
        """


def leapfrog(
    energy: Energy,
    x: Tensor,
    r: Tensor,
    eps: Tensor,
    half: float,
    factor: Factor | None = None,
) -> Phase:
    """Advance points and momenta by (1) and (2), with one energy gradient.

    Args:
        energy: Over unconstrained space.
        x: Points, shape ``(*chains, *event)``.
        r: Momenta, half a step ahead of the points, shape of ``x``.
        eps: Step sizes, shape of ``x``: of each chain, times a diagonal scale.
        half: What part of ``eps`` the momentum moves by: 1, or 0.5 in the last step.
        factor: An :math:`S` for vector events that is no diagonal: dense, of shape
            ``(D, D)``, or of low rank.

    Returns:
        New points, their energies ``(*chains,)`` and gradients, and new momenta.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> x, r, eps = torch.ones(5, 2), torch.zeros(5, 2), torch.full((5, 2), 0.1)
        >>> x, value, grad, r = leapfrog(energy, x, r, eps, half=0.5)
        >>> r[0]
        tensor([-0.0500, -0.0500])
    """
    # Of the class: a module looks for a missing attribute in four places, each time.
    if hasattr(type(energy), "leapfrog"):
        phase: Phase = cast(FusedEnergy, energy).leapfrog(x, r, eps, half, factor)
        return phase
    x = x.addcmul(eps, times_scale(r, factor))  # (1)
    value, grad = energy.value_and_grad(x)
    force = times_transposed(grad, factor)
    return x, value, grad, r.addcmul(eps, force, value=-half)  # (2)


class Trajectory(NamedTuple):
    """The end of a trajectory of leapfrog steps.

    Attributes:
        end: The chains at its end.
        momentum: Their momenta there, shape ``(*chains, *event)``.
        log_ratio: Log acceptance ratio, shape ``(*chains,)``.
    """

    end: ChainState
    momentum: Tensor
    log_ratio: Tensor


def trajectory(
    energy: Energy,
    state: ChainState,
    eps: Tensor,
    num_leapfrog: int,
    factor: Factor | None = None,
) -> Trajectory:
    r"""Draw momenta and take ``num_leapfrog`` leapfrog steps, each with one gradient.

    Args:
        energy: The energy of ``state``.
        state: Where the chains are.
        eps: As for :func:`leapfrog`.
        num_leapfrog: At least 1.
        factor: As for :func:`leapfrog`.
    """
    momentum = torch.randn_like(state.x)
    force = times_transposed(state.grad, factor)
    x, r = state.x, momentum.addcmul(eps, force, value=-0.5)  # (2)
    for number in range(1, num_leapfrog + 1):
        half = 0.5 if number == num_leapfrog else 1.0
        x, value, grad, r = leapfrog(energy, x, r, eps, half, factor)
    twice_kinetic = momentum.square().addcmul_(r, r, value=-1)
    twice_kinetic = flat_event(twice_kinetic, state.energy.dim()).sum(-1)
    log_ratio = (state.energy - value).add_(twice_kinetic, alpha=0.5)  # (3)
    return Trajectory(ChainState(x, value, grad), r, log_ratio)
