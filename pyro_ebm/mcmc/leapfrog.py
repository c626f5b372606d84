r"""One step of the leapfrog integrator, the inner loop of every Hamiltonian kernel.

With a scale matrix :math:`S` and a step :math:`\epsilon`,

.. math::
    x &\leftarrow x + \epsilon S r                                     \tag{1} \\
    r &\leftarrow r - h\, \epsilon S^\top \nabla f(x)                  \tag{2}

with :math:`h = 1` between two steps, where two half steps of the momentum meet, and
:math:`h = \tfrac12` at the end of a trajectory.
"""

__all__ = ["FusedEnergy", "Phase", "leapfrog"]

from typing import Protocol, TypeAlias, cast

from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.mcmc.metric import times_scale, times_transposed

#: Points, their energies, the gradients there, and the momenta.
Phase: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class FusedEnergy(Protocol):
    """An energy that brings its own version of the step.

    An energy whose class has this method, such as a compiled one, does the whole step
    by it; any other needs ``value_and_grad`` alone.
    """

    def leapfrog(
        self,
        x: Tensor,
        r: Tensor,
        eps: Tensor,
        half: float,
        scale_tril: Tensor | None,
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
    scale_tril: Tensor | None = None,
) -> Phase:
    """Advance points and momenta by (1) and (2), with one energy gradient.

    Args:
        energy: Over unconstrained space.
        x: Points, shape ``(*chains, *event)``.
        r: Momenta, half a step ahead of the points, shape of ``x``.
        eps: Step sizes, shape of ``x``: of each chain, times a diagonal scale.
        half: What part of ``eps`` the momentum moves by: 1, or 0.5 in the last step.
        scale_tril: A dense :math:`S` for vector events, shape ``(D, D)``.

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
        phase: Phase = cast(FusedEnergy, energy).leapfrog(x, r, eps, half, scale_tril)
        return phase
    x = x.addcmul(eps, times_scale(r, scale_tril))  # (1)
    value, grad = energy.value_and_grad(x)
    force = times_transposed(grad, scale_tril)
    return x, value, grad, r.addcmul(eps, force, value=-half)  # (2)
