"""The base that log Z is measured from, known again when a state is loaded."""

__all__ = ["KnownBase"]

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.energies import DistributionEnergy, unconstrained
from pyro_ebm.energies.discrete.finite import finite_values


class KnownBase(nn.Module):
    """Holds a base, which no state dict does, and what it is recognised by.

    Args:
        base: A normalised distribution.
    """

    def __init__(self, base: dist.TorchDistribution) -> None:
        super().__init__()
        self.energy = DistributionEnergy(base)  # a module, so that .to() moves it

    @property
    def distribution(self) -> dist.TorchDistribution:
        """The base."""
        return self.energy.distribution

    @torch.no_grad()
    def get_extra_state(self) -> Tensor:
        """Its energy at two points."""
        base, _ = unconstrained(self.energy)
        values = finite_values(base.support)
        if values is not None:
            ends = torch.tensor([values[0], values[-1]], **base.tensor_options())
            shape = (2, *base.event_shape)
            return base(ends.reshape(2, *(1,) * base.event_dim).expand(shape))
        point = torch.arange(1.0, 1 + base.event_shape.numel()).reciprocal()
        point = point.reshape(base.event_shape).to(**base.tensor_options())
        return base(torch.stack([point, -point]))

    def set_extra_state(self, state: Tensor) -> None:
        r"""Check that what is loaded was saved with this base.

        Raises:
            ValueError: If not: :math:`\log Z` and the walkers would be wrong.
        """
        own = self.get_extra_state()
        if not torch.allclose(state.to(own), own, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"base must be the one that log Z was saved with; {self.distribution} "
                f"has log densities {(-own).tolist()} at two points where that one had "
                f"{(-state).tolist()}. Build the EnergyModel as it was, then load. The "
                "parameters alone are in energy.state_dict()."
            )
