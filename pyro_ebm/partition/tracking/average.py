"""A copy of an energy whose parameters are set from outside: a running average."""

__all__ = ["FollowedEnergy"]

import copy

import torch
from torch import Tensor, nn

from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.pyro_modules import apart_from_store


class FollowedEnergy(nn.Module):
    """Running average of an energy's parameters, and an energy that has them.

    The copy holds its parameters as buffers: ``pyro.module`` and optimisers, which take
    every ``nn.Parameter`` that they find, leave it alone, while ``state_dict`` and
    ``.to()`` treat it as any module. (``torch.optim.swa_utils.AveragedModel`` keeps
    parameters, for which ``pyro.module`` warns at each call.)

    Args:
        energy: The energy to be followed.
    """

    mean: Tensor

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = apart_from_store(_with_buffers(copy.deepcopy(energy)))
        self._names = [name for name, _ in _parameters(energy)]
        self.register_buffer("mean", self._flatten(energy))

    @property
    def flat(self) -> Energy:
        """The copy, seen from unconstrained space."""
        return unconstrained(self.energy)[0]

    def reset(self, energy: Energy) -> None:
        """Begin again at the current parameters."""
        self.mean.copy_(self._flatten(energy))
        self._copy_buffers(energy)
        self.load(self.mean)

    def is_at(self, energy: Energy) -> bool:
        """Whether the copy has the current parameters."""
        return torch.equal(self.begin_update()[0], self._flatten(energy))

    def average(self, energy: Energy, weight: float) -> None:
        """Move the mean towards the current parameters; the copy stays as it is."""
        self.mean.lerp_(self._flatten(energy), weight)
        self._copy_buffers(energy)

    def begin_update(self) -> tuple[Tensor, Tensor]:
        """Parameters of the copy, and the mean that it should move to, as vectors."""
        buffers = dict(self.energy.named_buffers(remove_duplicate=False))
        old = [buffers[name].flatten() for name in self._names]
        return torch.cat(old) if old else self.mean, self.mean.clone()

    def load(self, vector: Tensor) -> None:
        """Give the copy the parameters in a vector."""
        buffers = dict(self.energy.named_buffers(remove_duplicate=False))
        owned = [buffers[name] for name in self._names]
        for buffer, part in zip(
            owned, vector.split([b.numel() for b in owned]), strict=True
        ):
            buffer.copy_(part.view_as(buffer))

    def write(self, energy: Energy) -> None:
        """Give an energy the parameters of the copy."""
        buffers = dict(self.energy.named_buffers(remove_duplicate=False))
        for name, parameter in _parameters(energy):
            parameter.copy_(buffers[name])

    def _flatten(self, energy: Energy) -> Tensor:
        parts = [value.detach().flatten() for _, value in _parameters(energy)]
        return torch.cat(parts) if parts else torch.empty(0, **energy.tensor_options())

    def _copy_buffers(self, energy: Energy) -> None:
        own = dict(self.energy.named_buffers(remove_duplicate=False))
        for name, buffer in energy.named_buffers(remove_duplicate=False):
            own[name].copy_(buffer)


def _parameters(energy: Energy) -> list[tuple[str, nn.Parameter]]:
    # Tied parameters come once for each name: the copy has no ties.
    return list(energy.named_parameters(remove_duplicate=False))


def _with_buffers(energy: Energy) -> Energy:
    """Turn all parameters of a module into buffers, in place."""
    for module in energy.modules():
        for name in list(module._parameters):
            parameter = module._parameters.pop(name)
            if parameter is not None:
                module.register_buffer(name, parameter.detach().clone())
            else:
                setattr(module, name, None)
    return energy
