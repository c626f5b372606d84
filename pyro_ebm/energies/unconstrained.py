r"""An energy on a constrained support, seen from unconstrained space.

With :math:`T = \mathrm{biject\_to}(\mathcal{X})` and :math:`x = T(u)`,

.. math::
    f_u(u) = f(T(u)) - \log\left|\det \frac{\partial T}{\partial u}\right|  \tag{1}

has the same partition function as :math:`f`, and :math:`T` maps its draws to draws of
:math:`e^{-f}`.
"""

__all__ = ["UnconstrainedEnergy", "is_unconstrained", "unconstrained"]

from typing import final

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from pyro_ebm.energies.base import Energy


@final
class UnconstrainedEnergy(Energy):
    """The energy (1), over all real ``u``.

    Args:
        energy: An energy on any continuous support that ``biject_to`` knows.

    Raises:
        NotImplementedError: If the support has no bijection from real space.
    """

    def __init__(self, energy: Energy) -> None:
        transform = biject_to(energy.support)
        super().__init__(transform.inverse_shape(energy.event_shape))
        self.energy = energy
        self.transform = transform

    def forward(self, u: Tensor) -> Tensor:
        """Evaluate (1) at ``u`` of shape ``(*batch, *unconstrained_event)``."""
        x = self.transform(u)
        return self.energy(x) - self.transform.log_abs_det_jacobian(u, x)  # (1)


def unconstrained(energy: Energy) -> tuple[Energy, torch.distributions.Transform]:
    """An energy over real space, and the map from there to the energy's own space.

    Returns:
        ``(energy, identity)`` where the support is real already, else an
        :class:`UnconstrainedEnergy` and its bijection.
    """
    if is_unconstrained(energy.support):
        return energy, torch.distributions.transforms.identity_transform
    pulled_back = UnconstrainedEnergy(energy)
    return pulled_back, pulled_back.transform


def is_unconstrained(support: Constraint) -> bool:
    """Whether a support is all of real space, whatever its event dimensions."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    # Comparing types alone would take a subclass, such as a bounded real, for real.
    return type(support) is type(constraints.real)
