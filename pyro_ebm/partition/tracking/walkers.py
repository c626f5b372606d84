r"""Running average of an energy's parameters, and weighted walkers that follow it.

See :mod:`pyro_ebm.partition.tracking.log_partition` for what they are good for. A
walker ``n`` of island ``i`` has a weight, and

.. math::
    \log Z_i = o_i + \log \frac1N \sum_n w_{in}                           \tag{1}

where the offset :math:`o_i` takes in the mean weight at each resampling.
"""

__all__ = ["FollowedEnergy", "Walkers"]

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.pyro_modules import apart_from_store
from pyro_ebm.mcmc import HMC, ChainState, Kernel
from pyro_ebm.mcmc.base import evaluate
from pyro_ebm.mcmc.samplers.persistent import StatefulModule
from pyro_ebm.mcmc.warmup.adaptation import StepSizeAdaptation
from pyro_ebm.partition.particles.resampling import systematic_resample


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


class Walkers(StatefulModule):
    """Weighted walkers in unconstrained space or on a finite support, in islands.

    Args:
        kernel: How they move; its step size and metric are replaced by adapted ones.
    """

    u: Tensor
    energy: Tensor
    grad: Tensor
    log_weights: Tensor
    log_offset: Tensor
    metric: Tensor
    num_updates: Tensor
    num_resamplings: Tensor
    num_evaluations: Tensor

    #: Effective fraction of the weights at which an island is resampled.
    ESS_RESAMPLE = 0.5
    #: Effective fraction of one change of the weights below which it is refused.
    ESS_INCREMENT = 0.8

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        for name in ("u", "energy", "grad", "log_weights", "log_offset", "metric"):
            self.register_buffer(name, torch.empty(0))
        for name in ("num_updates", "num_resamplings", "num_evaluations"):
            self.register_buffer(name, torch.tensor(0))
        self.adaptation = StepSizeAdaptation(1.0)

    @property
    def is_started(self) -> bool:
        """Whether there are walkers."""
        return self.u.numel() > 0

    def start(self, chains: ChainState, log_partition: Tensor, kernel: Kernel) -> None:
        """Place the walkers, with equal weights.

        Args:
            chains: Draws of the energy, chain shape ``(M, N)``.
            log_partition: The estimate of each island, shape ``(M,)``.
            kernel: With step size and metric that suit the energy.
        """
        self.u, self.energy, self.grad = (part.clone() for part in chains)
        self.log_weights = torch.zeros_like(self.energy)
        self.log_offset = log_partition.to(self.log_weights, copy=True)
        tril, scale = (getattr(kernel, n, None) for n in ("scale_tril", "scale"))
        metric = scale if tril is None else tril
        self.metric = self.u.new_ones(self.u.shape[2:]) if metric is None else metric
        if kernel.has_step_size:
            self.adaptation.reset(kernel.step_size)
        self.num_updates.zero_()
        self.num_resamplings.zero_()

    def log_partition(self) -> Tensor:
        """The estimate (1) of each island, shape ``(M,)``."""
        return self.log_offset + log_mean_exp(self.log_weights)

    def anchor(self, value: float, std_error: float) -> None:
        """Give the islands a mean and a standard error from elsewhere.

        Their own deviations from the mean are kept, to scale.
        """
        own = self.log_partition()
        scale = std_error * math.sqrt(len(own)) / own.std().clamp(min=1e-12)
        deviations = (own - own.mean()) * scale
        wanted = value + deviations - log_mean_exp(deviations)
        self.log_offset = self.log_offset + wanted - own

    @property
    def pooled_log_weights(self) -> Tensor:
        """Weights among the walkers of all islands, each by its log Z, ``(M, N)``."""
        return self.log_weights + self.log_offset[:, None]

    def ess(self) -> float:
        """Effective number of walkers."""
        pooled = effective_sample_fraction(self.pooled_log_weights.flatten())
        return pooled.item() * self.log_weights.numel()

    def resampling_rate(self) -> float:
        """Resamplings per island and update since the start."""
        count = self.num_resamplings / (self.num_updates.clamp(min=100) * len(self.u))
        return count.item()

    def reweight(self, energy: Energy, *, force: bool) -> bool:
        """Take over a changed energy, unless the weights would suffer too much.

        Args:
            energy: The changed energy, over unconstrained space.
            force: Take it over in any case.

        Returns:
            Whether it was taken over.
        """
        value, grad = evaluate(energy, self.u)
        self.num_evaluations += value.numel()
        increment = self._increment(value)
        fraction = effective_sample_fraction(increment.flatten())
        if fraction < self.ESS_INCREMENT and not force:
            return False
        self.energy, self.grad = value, grad
        self.log_weights = self.log_weights + increment
        self.num_updates += 1
        poor = effective_sample_fraction(self.log_weights) < self.ESS_RESAMPLE
        if poor.any():
            self._resample(poor)
        return True

    def move(self, energy: Energy) -> None:
        """One transition of all walkers under the energy last taken over."""
        is_dense = self.metric.dim() > self.u.dim() - 2
        kernel = self.kernel
        if isinstance(kernel, HMC):
            kernel = dataclasses.replace(
                kernel,
                step_size=self.adaptation.step_size,
                scale_tril=self.metric if is_dense else None,
                scale=None if is_dense else self.metric,
            )
        else:
            kernel = kernel.with_step_size(self.adaptation.step_size)
        state = ChainState(self.u, self.energy, self.grad)
        state, info = kernel.step(energy, state)
        self.u, self.energy, self.grad = state
        if kernel.has_step_size:
            self.adaptation.update(kernel, info)
        self.num_evaluations += kernel.num_gradients * self.energy.numel()

    def log_ratio(self, energy: Energy) -> tuple[Tensor, float]:
        """Log of the mean of ``e^(own - other)`` an island, and its effective fraction.

        Args:
            energy: Another energy, over unconstrained space.
        """
        value = energy(self.u)
        self.num_evaluations += value.numel()
        increment = self._increment(value)
        mean = log_mean_exp(self.log_weights + increment)
        pooled = (self.pooled_log_weights + increment).flatten()
        ratio = mean - log_mean_exp(self.log_weights)
        return ratio, effective_sample_fraction(pooled).item()

    def _increment(self, value: Tensor) -> Tensor:
        """What the log-weights gain under another energy of these values."""
        return torch.where(value.isfinite(), self.energy - value, -torch.inf)

    def _resample(self, poor: Tensor) -> None:
        """Resample the islands that a mask of shape ``(M,)`` names."""
        chosen = systematic_resample(self.log_weights, self.log_weights.shape[1])
        self.log_offset = torch.where(poor, self.log_partition(), self.log_offset)
        self.log_weights = self.log_weights.masked_fill(poor[:, None], 0.0)
        for name in ("u", "energy", "grad"):
            old = getattr(self, name)
            mask = poor.reshape(-1, *[1] * (old.dim() - 1))
            setattr(self, name, torch.where(mask, old[chosen], old))
        self.num_resamplings += poor.sum()
