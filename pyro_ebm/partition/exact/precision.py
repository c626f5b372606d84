r"""An energy over flat real vectors, evaluated in double precision where it can be.

Most energies are written for any floating-point type, even where the data of the user
are in single precision. Far out, and where large terms cancel, the difference between
:math:`10^{-7}` and :math:`10^{-16}` of the largest term decides what is seen.
"""

__all__ = ["PreciseEnergy"]

import copy
import warnings
from typing import final

import torch
from torch import Tensor

from pyro_ebm.energies import Energy
from pyro_ebm.errors import CompilationWarning

#: What an energy may raise that was not written for double precision.
_REFUSED = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError)
#: Points at which it is seen whether an energy computes in double precision.
_NUM_TRIED = 8
#: Copies of a point, a few units of the last place apart, that show its rounding.
_NUM_COPIES = 9


@final
class PreciseEnergy(Energy):
    r"""An energy that takes and gives double precision, and counts its evaluations.

    The energy itself is asked first, then a copy of it in double precision; if neither
    computes in double precision, points are rounded to the type of the energy.

    Args:
        energy: Over unconstrained space.
        points: Points like those that will come, shape ``(N, *event)``.

    Attributes:
        eps: Relative rounding of the type in which the energy computes.
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
        self.own_type: torch.dtype = energy.tensor_options(points)["dtype"]
        self.num_evaluations = 0
        self.energy = energy
        self.is_double = self._computes_in_double(energy, points)
        if not self.is_double:
            twin = _copy_in_double(energy)
            if twin is not None and self._computes_in_double(twin, points):
                self.energy, self.is_double = twin, True
        if not self.is_double and self.own_type == torch.float64:
            self.own_type = torch.get_default_dtype()
        computed = torch.float64 if self.is_double else self.own_type
        self.eps = torch.finfo(computed).eps

    def _computes_in_double(self, energy: Energy, points: Tensor) -> bool:
        self.num_evaluations += len(points)
        try:
            value = energy(points)
        except _REFUSED:
            return False
        # What was computed in single precision and then cast is a single number.
        seen = value[value.isfinite() & (value != value.round())].detach()
        is_cast = len(seen) > 0 and bool((seen == seen.float()).all())
        return value.dtype == torch.float64 and not is_cast

    def forward(self, x: Tensor) -> Tensor:
        """Energies of points of shape ``(*batch, *event)``, in double precision."""
        self.num_evaluations += self.batch_shape_of(x).numel()
        return self.energy(self.cast(x)).double()

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and gradients, in double precision."""
        self.num_evaluations += self.batch_shape_of(x).numel()
        value, grad = self.energy.value_and_grad(self.cast(x))
        return value.double(), grad.double()

    def cast(self, x: Tensor) -> Tensor:
        """Points in the type in which the energy takes them."""
        return x.double() if self.is_double else x.to(self.own_type)

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


def _copy_in_double(energy: Energy) -> Energy | None:
    """A copy of an energy in double precision, or ``None`` if there can be none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompilationWarning)
            return copy.deepcopy(energy).double()
    except _REFUSED:  # a copy of tensors that carry a graph, or of a progress bar
        return None
