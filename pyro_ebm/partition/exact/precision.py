r"""Energies in double precision where they can be, with their rounding.

Most energies are written for any floating-point type, even where the data of the user
are in single precision. Far out, and where large terms cancel, the difference between
:math:`10^{-7}` and :math:`10^{-16}` of the largest term decides what is seen.
"""

__all__ = ["PreciseEnergy", "insists_on_single"]

from typing import final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.energies.graphs.batching import CastFunction
from pyro_ebm.energies.views.double import DoubleEnergy, in_double

#: Points at which it is seen whether an energy computes in double precision.
_NUM_TRIED = 8
#: Copies of a point that show the rounding of its energy.
_NUM_COPIES = 9


@final
class PreciseEnergy(Energy):
    r"""An energy in double precision that counts evaluations and knows its rounding.

    Args:
        energy: Over unconstrained space.
        points: Points like those that will come, shape ``(N, *event)``.

    Attributes:
        eps: Relative rounding of the type in which the energy computes: that of single
            precision where it insists on it.
        num_evaluations: Evaluations so far, one a point, with gradient or not.

    Example:
        >>> energy = PreciseEnergy(
        ...     pyro_ebm.energies.QuadraticEnergy(torch.zeros(2)), torch.randn(8, 2)
        ... )
        >>> energy(torch.ones(2)).dtype, energy.eps < 1e-15
        (torch.float64, True)
    """

    def __init__(self, energy: Energy, points: Tensor) -> None:
        super().__init__(energy.event_shape)
        points = points[:_NUM_TRIED].detach().double()
        self.energy = energy
        self.num_evaluations = 0
        is_said = energy.tensor_options()["dtype"] == torch.float64
        value = self._tried(points) if is_said else None
        if value is None:
            self.energy = in_double(energy)
            value = self(points)
        # What was computed in single precision and then cast is a single number.
        seen = value[value.isfinite() & (value != value.round())].detach()
        is_single = len(seen) > 0 and bool((seen == seen.float()).all())
        is_single |= insists_on_single(self.energy)
        self.is_double = not is_single
        self.eps = torch.finfo(torch.float32 if is_single else torch.float64).eps

    def _tried(self, points: Tensor) -> Tensor | None:
        """Energies, or ``None`` if some tensor is not of double precision after all."""
        try:
            value = self(points)
        except RuntimeError:
            return None
        return value if value.dtype == torch.float64 else None

    def forward(self, x: Tensor) -> Tensor:
        """Energies of points of shape ``(*batch, *event)``, in double precision."""
        self.num_evaluations += self.batch_shape_of(x).numel()
        return self.energy(x.double())

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and gradients, in double precision."""
        self.num_evaluations += self.batch_shape_of(x).numel()
        value, grad = self.energy.value_and_grad(x.double())
        return value.double(), grad.double()

    @torch.no_grad()
    def rounding(self, x: Tensor, step: Tensor) -> Tensor:
        r"""How far rounding may have moved the energies, in nats.

        The scatter of :math:`f(x + k h)` for some small whole numbers ``k`` about a
        parabola, or :math:`\epsilon |f(x)|` if that is larger.

        Args:
            x: Shape ``(N, *event)``.
            step: ``h``, small as compared with any feature of the energy, but no
                smaller than some units of the last place of ``x``; same shape.

        Returns:
            Shape ``(N,)``; ``inf`` where a copy is not finite.
        """
        k = torch.arange(_NUM_COPIES, dtype=torch.float64, device=x.device) - 4
        copies = x + k.reshape(-1, *(1,) * x.dim()) * step
        value = self(copies)  # (K, N)
        value = value - value.mean(0)
        basis = torch.linalg.qr(torch.stack([k**0, k, k**2], -1)).Q
        residual = value - basis @ (basis.mT @ value)
        scatter = (residual.square().sum(0) / (_NUM_COPIES - 3)).sqrt()
        floor = self.eps * self(x).abs()
        return torch.maximum(scatter, floor).nan_to_num(torch.inf, torch.inf)


def insists_on_single(energy: Energy) -> bool:
    """Whether an energy computes in single precision although it was cast to double.

    Args:
        energy: What :func:`pyro_ebm.energies.views.double.in_double` has returned.
    """
    if not isinstance(energy, DoubleEnergy):
        return False
    is_cast = isinstance(energy._function, CastFunction)
    return is_cast and energy.energy.tensor_options()["dtype"] != torch.float64
