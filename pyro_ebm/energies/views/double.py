r"""Evaluate energies in double precision.

Single precision loses what an estimate of :math:`\log Z` needs: an energy of a million
nats is rounded to a tenth of one, and a bijection saturates at seven digits. On a CPU
double precision costs little, so estimators and chains evaluate there.

Three ways are tried in turn, and each is held against the energy's own values:

#. a copy of the energy with every tensor in double precision, made anew when a
   parameter has changed;
#. the operators that the energy applies to one point, recorded and repeated, for what
   hides a tensor of single precision in a closure;
#. the energy as it is, with points and values converted.
"""

__all__ = ["in_double"]

import copy
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, biject_to

from pyro_ebm.energies.base import ClosedForm, Energy, require_no_batch
from pyro_ebm.energies.corrections import map_tensors
from pyro_ebm.energies.discrete.finite import finite_values
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.energies.graphs.batching import (
    CastFunction,
    PointFunction,
    TracedFunction,
)
from pyro_ebm.energies.graphs.compiled import CompiledEnergy
from pyro_ebm.energies.graphs.precision import is_rounded, wide
from pyro_ebm.energies.pyro_model.energy import PyroModelEnergy
from pyro_ebm.energies.pyro_model.prior import ModelPrior
from pyro_ebm.energies.pyro_modules import apart_from_store

#: Points at which the precisions are compared.
_NUM_CHECKED = 16


def in_double(energy: Energy) -> Energy:
    """The same energy over the same event, evaluated in double precision.

    Parameters and buffers stay those of the energy, and live. An energy that is in
    double precision already is given back as it is; a compiled one is not compiled.

    Args:
        energy: Stays as it is.

    Returns:
        A :class:`PyroModelEnergy` for one; else an energy whose ``tensor_options`` say
        double precision.
    """
    require_no_batch(energy)
    if isinstance(energy, PyroModelEnergy):
        return energy.in_double()
    if isinstance(energy, CompiledEnergy):
        return in_double(energy.energy)
    with torch.random.fork_rng(devices=[]):
        points = _some_points(energy)
        if points is not None:
            return _checked(energy, points)
    return DoubleEnergy(energy, CastFunction(_Own(energy), _own_dtype(energy)))


def _checked(energy: Energy, points: Tensor) -> Energy:
    """The first of the ways that agrees with the energy at some points."""
    single = CastFunction(_Own(energy), _own_dtype(energy))
    converted = _Converted(energy)
    if _is_double(energy) and _agree(_Own(energy), single, points):
        return energy
    if _agree(converted, single, points):
        return DoubleEnergy(energy, converted)
    try:
        traced = TracedFunction(_Own(energy).at_one, energy)
        traced = traced.in_double(points[0].to(_own_dtype(energy)))
        if _agree(traced, single, points):
            return DoubleEnergy(energy, traced)
    except (RuntimeError, ValueError, TypeError):
        pass
    return DoubleEnergy(energy, single)


def _agree(function: PointFunction, single: CastFunction, points: Tensor) -> bool:
    """Whether a function gives in double precision what another gives in single."""
    try:
        mine = _evaluated(function, points)
    except (RuntimeError, ValueError, TypeError):  # it mixes precisions
        return False
    if any(part.dtype is not torch.float64 for part in mine):
        return False
    try:
        return is_rounded(_evaluated(single, points), mine)
    except (RuntimeError, ValueError, TypeError):  # which takes double precision only
        return True


def _evaluated(function: PointFunction, points: Tensor) -> tuple[Tensor, ...]:
    try:
        pair: tuple[Tensor, ...] = function.value_and_grad(points)
    except ValueError:  # it has no gradient
        with torch.no_grad():
            pair = (function.value(points),)
    return pair


@final
class DoubleEnergy(Energy):
    """An energy evaluated by a function of double precision.

    Args:
        energy: The energy, whose parameters these are.
        function: Of the points as vectors.
    """

    def __init__(self, energy: Energy, function: PointFunction) -> None:
        super().__init__(energy.event_shape, energy.support)
        self.energy = energy
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the energy at ``x`` of shape ``(*batch, *event)``."""
        batch_shape = self.batch_shape_of(x)
        if not x.numel():
            return x.new_zeros(batch_shape, dtype=torch.float64)
        value: Tensor = self._function.value(self._flat(x))
        return value.reshape(batch_shape)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient, both of double precision."""
        batch_shape = self.batch_shape_of(x)
        if not x.numel():
            empty = torch.zeros_like(x, dtype=torch.float64)
            return empty.new_zeros(batch_shape), empty
        value, grad = self._function.value_and_grad(self._flat(x.detach()))
        return value.reshape(batch_shape), grad.reshape(x.shape)

    def _flat(self, x: Tensor) -> Tensor:
        return x.double().reshape(-1, self.event_shape.numel())

    def closed_form(self) -> ClosedForm | None:
        """That of the energy. Exactness: *exact* where it is not ``None``."""
        return self.energy.closed_form()

    def tensor_options(self, like: Tensor | None = None) -> dict[str, Any]:
        """Double precision, on the device of the energy."""
        return {**self.energy.tensor_options(like), "dtype": torch.float64}


class _Own:
    """The energy as it is, as a function of vectors."""

    def __init__(self, energy: Energy) -> None:
        self.energy = energy

    def value(self, u: Tensor) -> Tensor:
        return self.energy(u.reshape(-1, *self.energy.event_shape))

    def at_one(self, u: Tensor) -> Tensor:
        return self.energy(u.reshape(self.energy.event_shape))

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        x = u.reshape(-1, *self.energy.event_shape)
        value, grad = self.energy.value_and_grad(x)
        return value, grad.reshape(u.shape)


class _Converted:
    """A copy of the energy in double precision, made anew when a tensor changed."""

    def __init__(self, energy: Energy) -> None:
        self.energy = energy
        self._twins: dict[int, Any] = {}
        self._key: Any = None
        self._current: _Own | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"energy": self.energy, "_twins": {}, "_key": None, "_current": None}

    def value(self, u: Tensor) -> Tensor:
        return self._own().value(u)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._own().value_and_grad(u)

    def _own(self) -> _Own:
        key = [self.energy.training, *map(_version, _tensors(self.energy))]
        if self._current is None or key != self._key:
            with torch.enable_grad():  # for the parameters, through the conversion
                twin = apart_from_store(_copy_in_double(self.energy, self._twins))
                self._current = _Own(twin)
            self._key = key
        return self._current


def _copy_in_double(module: Any, twins: dict[int, Any]) -> Any:
    """A module with every tensor in double precision.

    Args:
        module: To be copied.
        twins: Energies inside of it in double precision by their ids, which are live.
    """
    clone = module.__new__(type(module))
    for name, value in vars(module).items():
        vars(clone)[name] = _value_in_double(value, twins)
    for name, part in module._modules.items():
        # Those of sites are asked for more than values, and are made of tensors alone.
        if isinstance(part, Energy) and not isinstance(part, SiteEnergy):
            if id(part) not in twins:
                twins[id(part)] = in_double(part)
            clone._modules[name] = twins[id(part)]
        elif part is not None:
            clone._modules[name] = _copy_in_double(part, twins)
    return clone


def _value_in_double(value: Any, twins: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return wide(value)
    if isinstance(value, ModelPrior):
        if id(value) not in twins:
            twins[id(value)] = value.with_energy(in_double(value.energy))
        return twins[id(value)]
    if isinstance(value, Distribution | Transform):
        return map_tensors(value, wide)
    if type(value) in (list, tuple):
        return type(value)(_value_in_double(part, twins) for part in value)
    if type(value) is dict:
        return {name: _value_in_double(part, twins) for name, part in value.items()}
    return copy.copy(value) if type(value) is set else value


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _version(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version


def _is_double(energy: Energy) -> bool:
    """Whether the energy says so of itself."""
    return energy.tensor_options()["dtype"] is torch.float64 and all(
        wide(tensor) is tensor for tensor in _tensors(energy)
    )


def _own_dtype(energy: Energy) -> torch.dtype:
    dtype: torch.dtype = energy.tensor_options()["dtype"]
    return dtype


def _some_points(energy: Energy) -> Tensor | None:
    """Points of the support as vectors of double precision, shape ``(B, D)``."""
    options = energy.tensor_options()
    shape = (_NUM_CHECKED, *energy.event_shape)
    if finite_values(energy.support) is not None:
        like = torch.empty(0, **options)
        uniform = IndependentSites.uniform(energy.support, energy.event_shape, like)
        return (
            uniform.sample(torch.Size([_NUM_CHECKED]))
            .double()
            .reshape(_NUM_CHECKED, -1)
        )
    if energy.support.is_discrete:
        return None
    try:
        transform = biject_to(energy.support)
    except NotImplementedError:
        return None
    shape = transform.inverse_shape(shape)
    x = transform(torch.empty(shape, **options).uniform_(-2, 2))
    return x.double().reshape(_NUM_CHECKED, -1)
