"""What chains can be run on: energies, distributions that have one, Pyro models."""

__all__ = ["ChainKernel", "ChainTarget", "resolve_target", "standardised"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_ebm.core.spaces import require_not_mixed
from pyro_ebm.energies import Energy, PyroModelEnergy, unconstrained
from pyro_ebm.energies.graphs.compiled import CompiledEnergy
from pyro_ebm.energies.pyro_model.non_centred import NonCentring
from pyro_ebm.energies.views.double import in_double
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo
from pyro_ebm.mcmc.kernels.gibbs import has_blocks
from pyro_ebm.mcmc.samplers.independent import IndependentChains

#: The one site of a target that is no Pyro model.
_SITE = "x"


@runtime_checkable
class ChainKernel(Protocol):
    """What moves chains: a :class:`Kernel`, or for discrete spaces less than that."""

    def init(self, energy: Energy, x: Tensor) -> ChainState:
        """See :meth:`Kernel.init`."""

    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """See :meth:`Kernel.step`."""


class ChainTarget(NamedTuple):
    """An energy where the chains move, and the way to and from there.

    Attributes:
        energy: Over unconstrained or discrete space.
        constrain: From points ``(*batch, *flat_event)`` to the value of each site.
        unconstrain: The inverse, for starting points.
        start: Starting points for a number of chains.
        model: The energy of a Pyro model, whose sites have names; its own coordinates.
        non_centred: Sites of the model that are standardised where the chains move.
    """

    energy: Energy
    constrain: Callable[[Tensor], dict[str, Tensor]]
    unconstrain: Callable[[Any], Tensor]
    start: Callable[[int], Tensor]
    model: PyroModelEnergy | None = None
    non_centred: tuple[str, ...] = ()

    @property
    def is_model(self) -> bool:
        """Whether the target is a Pyro model, with sites that have names."""
        return self.model is not None


def resolve_target(
    target: Any,
    kernel: ChainKernel | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    compile: bool,
    dtype: torch.dtype | None = None,
) -> ChainTarget:
    """Find the energy behind ``target``.

    Args:
        target: An energy, ``EnergyDistribution``, ``EnergyModel`` or a Pyro model.
        kernel: That is to move the chains; ``None`` if it is chosen by the target.
        args: Of the model.
        kwargs: Of the model.
        compile: Whether to compile the energy's gradient. One that knows its blocks
            has none.
        dtype: In which the chains move and the energy is computed; default: double
            precision for a traced Pyro model on a CPU, else the energy's own.

    Raises:
        TypeError: If ``target`` is none of these, or arguments are given to an energy.
        ValueError: If the support is discrete and the kernel is not, or ``dtype`` is
            neither double precision nor that of the energy.
    """
    found = _in_precision(_find(target, kernel, args, kwargs), dtype)
    if compile and not has_blocks(found.energy):
        return found._replace(energy=CompiledEnergy(found.energy))
    return found


def _find(
    target: Any,
    kernel: ChainKernel | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> ChainTarget:
    if isinstance(target, PyroModelEnergy):
        return _model_target(_without_arguments(target, args, kwargs))
    # A Pyro model may have an energy too; what has a log Z of it is its distribution.
    is_energy = isinstance(target, Energy) or hasattr(target, "log_partition")
    energy = target if isinstance(target, Energy) else getattr(target, "energy", None)
    if is_energy and isinstance(energy, Energy):
        return _energy_target(_without_arguments(energy, args, kwargs), target, kernel)
    if isinstance(target, torch.distributions.Distribution) or not callable(target):
        raise TypeError(
            "target must be an Energy, an EnergyDistribution, an EnergyModel or a Pyro "
            f"model, got {type(target).__name__}. Wrap a callable f(x) as "
            "pyro_ebm.energies.FunctionEnergy(fn, event_shape), a Pyro distribution as "
            "DistributionEnergy(distribution)."
        )
    return _model_target(PyroModelEnergy(target, *args, **kwargs))


def _in_precision(target: ChainTarget, dtype: torch.dtype | None) -> ChainTarget:
    """The same with points and energy in another precision, sites in their own."""
    energy = target.energy
    options = energy.tensor_options()
    if dtype is None:
        is_cheap = options["device"].type == "cpu"
        is_cheap &= isinstance(energy, PyroModelEnergy) and energy.is_traced
        dtype = torch.float64 if is_cheap else options["dtype"]
    if dtype == options["dtype"]:
        return target
    if dtype != torch.float64 or energy.support.is_discrete:
        raise ValueError(
            f"dtype must be torch.float64, for a continuous support, or that of the "
            f"energy, {options['dtype']}; got {dtype}. Move the model itself, "
            "energy.to(dtype), for another."
        )

    def constrain(u: Tensor) -> dict[str, Tensor]:
        own = options["dtype"]
        return {name: v.to(own) for name, v in target.constrain(u).items()}

    def start(num_chains: int) -> Tensor:
        return target.start(num_chains).double()

    wide = in_double(energy)
    model = wide if isinstance(wide, PyroModelEnergy) else None
    return target._replace(energy=wide, constrain=constrain, start=start, model=model)


def standardised(target: ChainTarget, sites: Sequence[str]) -> ChainTarget:
    """The same with some normal sites of a model standardised where the chains move.

    Args:
        target: A model in its own coordinates.
        sites: Names of sites; their values come out as before.
    """
    if not sites or target.model is None:
        return target
    centring = NonCentring(target.model, sites)
    energy = centring.energy()
    return target._replace(
        energy=CompiledEnergy(energy)
        if isinstance(target.energy, CompiledEnergy)
        else energy,
        constrain=lambda u: target.constrain(centring.to_model(u)),
        unconstrain=lambda given: centring.from_model(target.unconstrain(given)),
        start=energy.initial_points,
        non_centred=tuple(sites),
    )


def _without_arguments(
    energy: Energy, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if args or kwargs:
        raise TypeError(
            f"{type(energy).__name__} takes no arguments, got {len(args)} positional "
            f"ones and {list(kwargs)}. Only a Pyro model is run with arguments."
        )
    return energy


def _model_target(energy: PyroModelEnergy) -> ChainTarget:
    def unconstrain(initial: Any) -> Tensor:
        if isinstance(initial, Mapping):
            initial = energy.unconstrain(initial)
        return initial

    return ChainTarget(
        energy, energy.constrain, unconstrain, energy.initial_points, energy
    )


def _energy_target(
    energy: Energy, target: Any, kernel: ChainKernel | None
) -> ChainTarget:
    is_blind = getattr(type(kernel), "init", None) is Kernel.init
    if is_blind:
        require_not_mixed(energy.support, type(kernel).__name__)
    if energy.support.is_discrete and is_blind:
        raise ValueError(
            f"{type(kernel).__name__} moves through real space, and the support of the "
            f"target is discrete: {energy.support}. Give no kernel, for one that suits "
            "the target, or Gibbs()."
        )
    flat, to_support = unconstrained(energy)

    def start(num_chains: int) -> Tensor:
        return to_support.inv(_points(energy, target, num_chains))

    return ChainTarget(flat, lambda u: {_SITE: to_support(u)}, to_support.inv, start)


def _points(energy: Energy, target: Any, num_chains: int) -> Tensor:
    """Points of the target's sampler or base, else standard normal or uniform ones."""
    sampler, base = getattr(target, "sampler", None), getattr(target, "base", None)
    if sampler is None:
        sampler = IndependentChains(base=base)
    return sampler.start(energy, num_chains)
