r"""One door to all estimators of :math:`\log Z`."""

__all__ = ["estimate"]

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import pyro.distributions as dist

from pyro_ebm.energies import Energy, PyroModelEnergy
from pyro_ebm.errors import UnreliableWarning
from pyro_ebm.mcmc.path import GeometricPath
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.bridge.bridge import bridge_sampling
from pyro_ebm.partition.exact.enumeration import enumeration, num_states
from pyro_ebm.partition.exact.exact import closed_form, quadrature
from pyro_ebm.partition.importance.importance import importance_sampling
from pyro_ebm.partition.particles.annealed import annealed_importance_sampling
from pyro_ebm.partition.particles.gibbs_annealing import gibbs_annealing
from pyro_ebm.partition.particles.refined import refined_smc
from pyro_ebm.partition.particles.smc import run_smc
from pyro_ebm.partition.progress import watched

Method = Literal["auto", "exact", "smc", "importance", "ais", "bridge", "gibbs"]

#: States that ``"auto"`` enumerates rather than samples.
_MAX_STATES = 2**18


def estimate(
    target: Any,
    base: dist.TorchDistribution | None = None,
    method: Method = "auto",
    budget: int | None = None,
    *,
    num_replicates: int = 4,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` of an energy, with an error bar and a verdict.

    For a Pyro model it is the log evidence :math:`\log p(y)`, the path leads from the
    prior to the posterior, and factors count as observations.

    Args:
        target: An :class:`~pyro_ebm.energies.Energy`; anything that has one as its
            ``energy``: an ``EnergyDistribution``, an ``EnergyModel``; or a Pyro model.
            ``functools.partial(model, y)`` gives a model its arguments.
        base: A normalised Pyro distribution on the same event and support, wider than
            the target; default: that of an ``EnergyModel``, the prior of a Pyro model.
            Needed unless the answer is exact.
        method: ``"auto"`` takes the closed form where there is one, quadrature for
            events of one or two numbers, else ``"smc"``. ``"exact"`` is the first two
            alone, for up to three numbers. Over a finite support they are
            :func:`enumeration` of up to 2^18 states (``"exact"``: 2^22), else
            ``"gibbs"``, which needs no base. See :func:`refined_smc`,
            :func:`importance_sampling`, :func:`annealed_importance_sampling`,
            :func:`bridge_sampling` and :func:`gibbs_annealing` for the others.
        budget: Energy evaluations aimed at; default 50,000, see :func:`gibbs_annealing`
            for its own.
        num_replicates: Independent islands of SMC.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; its ``method`` says what was done.

    Raises:
        TypeError: If ``target`` is no energy, has none and is no Pyro model.
        ValueError: If an argument is out of range, a base is needed and missing or not
            normalised, or a model has an energy whose log Z is unknown.

    Warns:
        UnreliableWarning: If the status is neither ``"exact"`` nor ``"ok"``.

    Exactness: *exact* where the status says so, else *consistent*.

    Example:
        >>> energy = pyro_ebm.energies.FunctionEnergy(lambda x: x**4, ())
        >>> print(estimate(energy).status, round(estimate(energy).value, 4))
        exact 0.5949
    """
    energy = _energy_of(target)
    if isinstance(energy, PyroModelEnergy):
        energy.check_evidence()
    if budget is not None and not (isinstance(budget, int) and budget > 0):
        raise ValueError(f"budget must be a positive whole number, got {budget}.")
    result = closed_form(energy) if method in ("auto", "exact") else None
    if result is None:
        result = _over_finite(
            energy, base, method, budget, num_replicates, progress_bar
        )
    dim = energy.event_shape.numel()
    if result is None and (method == "exact" or (method == "auto" and dim <= 2)):
        result = quadrature(energy, progress_bar=progress_bar)
        # A ridge between the points of a grid looks like a tail that does not end: the
        # sampler, which follows it, has a test of its own.
        has_base = base is not None or getattr(target, "base", None) is not None
        is_doubtful = result.status == "not_normalizable" and has_base
        if method == "auto" and (result.status == "unreliable" or is_doubtful):
            result = None
    if result is None:
        base = _base_of(target, energy) if base is None else base
        budget = 50_000 if budget is None else budget
        sampler = _sampler_of(method)
        result = _watched(sampler, energy, base, budget, num_replicates, progress_bar)
    if not result.is_reliable:
        warnings.warn(str(result), UnreliableWarning, stacklevel=2)
    return result


def _energy_of(target: Any) -> Energy:
    energy = target if isinstance(target, Energy) else getattr(target, "energy", None)
    if isinstance(energy, Energy):
        return energy
    if callable(target) and not isinstance(target, type):
        return PyroModelEnergy(target)
    raise TypeError(
        "target must be an Energy, have one as .energy or be a Pyro model, got "
        f"{type(target).__name__}. Wrap a callable: "
        "pyro_ebm.energies.FunctionEnergy(fn, event_shape)."
    )


def _over_finite(
    energy: Energy,
    base: dist.TorchDistribution | None,
    method: Method,
    budget: int | None,
    num_replicates: int,
    progress_bar: bool,  # noqa: FBT001
) -> LogPartitionEstimate | None:
    """What only a finite support allows, or ``None``."""
    states = num_states(energy)
    if states is not None and method in ("auto", "exact"):
        if method == "exact" or states <= _MAX_STATES:
            return enumeration(energy, progress_bar=progress_bar)
        method = "gibbs"
    if method != "gibbs":
        return None
    return gibbs_annealing(
        energy,
        base,
        budget=budget,
        num_islands=num_replicates,
        progress_bar=progress_bar,
    )


def _base_of(target: Any, energy: Energy) -> dist.TorchDistribution | None:
    base: dist.TorchDistribution | None = getattr(target, "base", None)
    if base is None and isinstance(energy, PyroModelEnergy):
        return energy.prior
    return base


def _sampler_of(method: Method) -> "_Sampler":
    if method != "auto" and method not in _SAMPLERS:
        raise ValueError(
            f"method must be one of 'auto', 'exact', 'gibbs', "
            f"{', '.join(map(repr, _SAMPLERS))}; got {method!r}."
        )
    return _SAMPLERS["smc" if method == "auto" else method]


def _watched(
    sampler: "_Sampler",
    energy: Energy,
    base: dist.TorchDistribution | None,
    budget: int,
    num_replicates: int,
    progress_bar: bool,  # noqa: FBT001
) -> LogPartitionEstimate:
    """Run a sampler under a progress bar."""
    if base is None:
        raise ValueError(
            "base is None, and the energy has no exact log Z: give a normalised "
            "Pyro distribution on its event and support, wider than the target. "
            '(method="exact" integrates over up to three numbers without one.)'
        )
    with watched(energy, budget, is_shown=progress_bar) as target:
        return sampler(target, base, budget, num_replicates)


def _smc(
    energy: Energy, base: dist.TorchDistribution, budget: int, num_replicates: int
) -> LogPartitionEstimate:
    return refined_smc(
        energy, base, budget=budget, num_replicates=num_replicates, progress_bar=False
    )


def _importance(
    energy: Energy, base: dist.TorchDistribution, budget: int, _: int
) -> LogPartitionEstimate:
    return importance_sampling(energy, base, num_samples=budget, progress_bar=False)


def _ais(
    energy: Energy, base: dist.TorchDistribution, budget: int, _: int
) -> LogPartitionEstimate:
    num_chains = 64
    num_temperatures = max(2, budget // num_chains // 5)
    return annealed_importance_sampling(
        energy,
        base,
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        progress_bar=False,
    )


def _bridge(
    energy: Energy, base: dist.TorchDistribution, budget: int, num_replicates: int
) -> LogPartitionEstimate:
    islands = run_smc(energy, base, num_islands=num_replicates, num_particles=128)
    path = GeometricPath(energy, base)
    # The second axis runs over 16 times of 8 ancestors: make it chains in time order.
    u = islands.state.u.unflatten(1, (16, 8)).transpose(1, 2).flatten(0, 1)
    left = max(u.shape[0] * u.shape[1], budget - islands.num_evaluations)
    result = bridge_sampling(
        energy,
        path.transform(u),
        num_proposal_draws=min(left, 10_000),
        progress_bar=False,
    )
    spent = result.num_evaluations + islands.num_evaluations
    return result._replace(num_evaluations=spent)


_Sampler: TypeAlias = Callable[
    [Energy, dist.TorchDistribution, int, int], LogPartitionEstimate
]
_SAMPLERS: dict[str, _Sampler] = {
    "smc": _smc,
    "importance": _importance,
    "ais": _ais,
    "bridge": _bridge,
}
