"""Cache of draws from an energy, each of which is handed out once.

A few dozen chains cost little more than one, and a sampler runs that many whatever is
wanted. What is left over is kept for later calls, as long as the energy stands.
"""

__all__ = ["Pool"]

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.energies import Energy
from pyro_ebm.mcmc import Sampler
from pyro_ebm.mcmc.samplers.sampler import Draws, SamplingDiagnostics, warn_of

#: Draws of the second pool and those after it, in units of the first. When the second
#: is begun, as many chains have been run as if each draw had had chains of its own.
_GROWTH = 32
#: Draws at which the energy is looked at before more are handed out.
_NUM_PROBES = 4

# Not attributes of the energies, which would be copied, pickled and compared.
_POOLS: "WeakKeyDictionary[Energy, Pool]" = WeakKeyDictionary()


class Pool:
    """Draws of one energy by one sampler, handed out in order, none twice.

    It is dropped when a parameter or buffer of the energy is written to, when the
    energy has changed at some of the draws, as it may by a closure, and when torch's
    seed is set anew.

    Args:
        energy: As it is now.
        sampler: That fills the pool.
    """

    def __init__(self, energy: Energy, sampler: Sampler) -> None:
        self.diagnostics: SamplingDiagnostics | None = None
        self._sampler, self._version = sampler, _version(energy)
        self._draws: Tensor | None = None
        self._num_taken = 0
        self._probes: tuple[Tensor, Tensor] | None = None
        self._seed = torch.initial_seed()
        self._origin: Tensor | None = None
        self._has_warned = False

    @staticmethod
    def of(energy: Energy, sampler: Sampler) -> "Pool":
        """The pool of an energy, a new one where the last does not stand.

        Args:
            energy: Target of the sampler.
            sampler: That makes the draws.
        """
        pool = _POOLS.get(energy)
        if pool is None or not pool.stands(energy, sampler):
            pool = _POOLS[energy] = Pool(energy, sampler)
        return pool

    @staticmethod
    def last_diagnostics(
        energy: Energy, sampler: Sampler
    ) -> SamplingDiagnostics | None:
        """Diagnostics of the last draws, if the energy has not changed since."""
        pool = _POOLS.get(energy)
        if pool is None or not pool.is_of(energy, sampler):
            return None
        return pool.diagnostics

    def is_of(self, energy: Energy, sampler: Sampler) -> bool:
        """Whether sampler, parameters and buffers are the same, and not written to."""
        now = _version(energy)
        return (
            _is_same(self._sampler, sampler)
            and len(now) == len(self._version)
            and (
                all(
                    a is b and m == n
                    for (a, m), (b, n) in zip(now, self._version, strict=True)
                )
            )
        )

    def stands(self, energy: Energy, sampler: Sampler) -> bool:
        """Whether draws from here are what the sampler would give now."""
        if not self.is_of(energy, sampler) or torch.initial_seed() != self._seed:
            return False
        if self._origin is not None and torch.equal(_stream(energy), self._origin):
            return False  # as when the same seed is set again
        if self._probes is None:
            return True
        points, values = self._probes
        options = energy.tensor_options(points)
        if (points.dtype, points.device) != (options["dtype"], options["device"]):
            return False
        return torch.allclose(energy(points), values, equal_nan=True)

    def take(self, energy: Energy, num_draws: int) -> Tensor:
        """Independent draws that were not returned before, ``(num_draws, *event)``.

        Args:
            energy: That of the pool.
            num_draws: How many; fewer than the sampler runs chains at least come from
                what is left over of earlier ones.

        Warns:
            UnreliableWarning: If the sampler says that its draws are unreliable, once
                as long as the energy stands.
        """
        spare = getattr(self._sampler, "min_chains", 1)
        if num_draws >= spare:
            return self._fresh(energy, num_draws)
        if self._draws is None or num_draws > len(self._draws) - self._num_taken:
            self._refill(energy, spare if self._draws is None else _GROWTH * spare)
        assert self._draws is not None
        first, self._num_taken = self._num_taken, self._num_taken + num_draws
        return self._draws[first : self._num_taken].clone()

    def _refill(self, energy: Energy, size: int) -> None:
        before = _stream(energy)
        draws = self._fresh(energy, size)
        if self._draws is None and not torch.equal(_stream(energy), before):
            self._origin = before
        self._draws, self._num_taken = draws, 0
        points = draws[:_NUM_PROBES]
        self._probes = points, energy(points)

    def _fresh(self, energy: Energy, num_draws: int) -> Tensor:
        x, self.diagnostics = _drawn(self._sampler, energy, num_draws)
        if not self._has_warned:
            self._has_warned = warn_of(self.diagnostics)
        return x


def _drawn(sampler: Any, energy: Energy, num_draws: int) -> Draws:
    if hasattr(sampler, "draw_diagnosed"):
        found: Draws = sampler.draw_diagnosed(energy, num_draws)
        return found
    name = type(sampler).__name__
    silent = Finding(
        Reason.NOT_ESTIMATED, f"{name} does not say how good its draws are"
    )
    unknown = SamplingDiagnostics(name, Status.UNRELIABLE, (silent,))
    return Draws(sampler(energy, num_draws), unknown)


def _version(energy: Energy) -> list[tuple[Tensor, int]]:
    """The tensors of an energy, and how often each was written to."""
    tensors = (*energy.parameters(), *energy.buffers())
    return [(t, 0 if t.is_inference() else t._version) for t in tensors]


def _is_same(one: Any, other: Any) -> bool:
    try:
        return bool(one is other or one == other)
    except (RuntimeError, ValueError):  # settings that are tensors
        return False


def _stream(energy: Energy) -> Tensor:
    """Where torch's random numbers are."""
    device = torch.device(energy.tensor_options()["device"])
    is_cuda = device.type == "cuda"
    return torch.cuda.get_rng_state(device) if is_cuda else torch.get_rng_state()
