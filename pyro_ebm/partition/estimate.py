r"""Choose an estimator of :math:`\log Z` automatically."""

__all__ = ["estimate"]

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_ebm.bases.mixed import latent_classes
from pyro_ebm.bases.stack import Stack
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.energies import Energy, PyroModelEnergy, unconstrained
from pyro_ebm.energies.base import require_no_batch
from pyro_ebm.energies.corrections import corrected
from pyro_ebm.energies.discrete.finite import finite_values
from pyro_ebm.energies.views.pointwise import check_pointwise
from pyro_ebm.mcmc import IndependentChains
from pyro_ebm.mcmc.starts.modes import Descent
from pyro_ebm.mcmc.tempering.path import GeometricPath
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.base_check import check_draws
from pyro_ebm.partition.default_base import default_base, describe, reach_of
from pyro_ebm.partition.exact.closed_form import closed_form
from pyro_ebm.partition.exact.enumeration import enumeration, num_states
from pyro_ebm.partition.exact.quadrature import quadrature
from pyro_ebm.partition.importance.importance import importance_sampling
from pyro_ebm.partition.normalizability import check_normalizability
from pyro_ebm.partition.particles.annealed import annealed_importance_sampling
from pyro_ebm.partition.particles.gibbs_annealing import gibbs_annealing
from pyro_ebm.partition.particles.smc import smc
from pyro_ebm.partition.progress import CountedEnergy, Limits
from pyro_ebm.partition.two_routes import two_routes

Method = Literal["auto", "exact", "sampling", "smc", "importance", "ais", "gibbs"]

#: Draws of the base at which an energy is looked at first.
_NUM_CHECKED = 64
#: Draws that the check of a base against its density takes.
_NUM_DRAWN = 20_000
#: States that ``"auto"`` enumerates rather than samples: those, and where they take no
#: more than a part of the time so many.
_FEW_STATES, _MAX_STATES = 2**18, 2**22
#: Nats below the bulk at which mass is none.
_NOTHING = 100.0
#: Over a mixed support: draws of a proposal, chains that it is fitted to, about what
#: these cost, and evaluations at most.
_FIRST_DRAWS, _MOST_DRAWS, _NUM_CHAINS = 20_000, 180_000, 1000
_COST_OF_CHAINS, _MOST_EVALUATIONS = 3_000_000, 20_000_000
#: Gradients of the descents that these begin with, where the base is a guess.
_DESCENT = 100
#: By how much a run of annealing is larger than the one before.
_GROWTH = 3


def estimate(
    target: Any,
    base: dist.TorchDistribution | None = None,
    method: Method = "auto",
    *,
    tolerance: float = 0.02,
    max_seconds: float = 60.0,
    budget: int | None = None,
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
            the target; default: that of an ``EnergyModel``, the prior of a Pyro model,
            else :func:`~pyro_ebm.partition.default_base.default_base`, which the
            ``method`` of the result names, and around which modes are looked for far
            and wide. A base that is given must reach all that counts.
        method: ``"auto"`` takes the closed form where there is one, enumeration of up
            to 2^18 states (2^22 where they take less than a third of the time),
            quadrature for events of one or two numbers, else ``"sampling"``: particles
            and modes from the base, held against each other, over a finite support
            ``"gibbs"``, and over a mixed one importance sampling from the base and from
            what chains have found. ``"exact"`` is what is exact alone, for up to three
            numbers or 2^22 states. See :func:`smc`, :func:`importance_sampling`,
            :func:`annealed_importance_sampling` and :func:`gibbs_annealing` for the
            others.
        tolerance: Standard error wanted, in nats.
        max_seconds: Seconds after which the estimate ends with what there is.
        budget: Energy evaluations aimed at; default: as many as the time allows.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; its ``method`` says what was done.

    Raises:
        TypeError: If ``target`` is no energy, has none and is no Pyro model.
        ValueError: If an argument is out of range, a base does not fit or is not
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
    _check(method, tolerance, max_seconds, budget)
    limits = Limits(tolerance, max_seconds, budget)
    base = _base_of(target, energy) if base is None else base
    result = _exact(energy, base, method, limits, progress_bar=progress_bar)
    if result is None:
        result = _sampled(energy, base, method, limits, progress_bar=progress_bar)
    if not result.is_reliable:
        warnings.warn(str(result), UnreliableWarning, stacklevel=2)
    return result


def _check(
    method: str, tolerance: float, max_seconds: float, budget: int | None
) -> None:
    names = ("auto", "exact", "sampling", "gibbs", *_SAMPLERS)
    if method not in names:
        raise ValueError(
            f"method must be one of {', '.join(map(repr, names))}; got {method!r}."
        )
    if not isinstance(tolerance, int | float) or not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}.")
    if not isinstance(max_seconds, int | float) or not max_seconds > 0:
        raise ValueError(f"max_seconds must be a positive number, got {max_seconds!r}.")
    if budget is not None and not (isinstance(budget, int) and budget > 0):
        raise ValueError(f"budget must be a positive whole number, got {budget}.")


def _energy_of(target: Any) -> Energy:
    energy = target if isinstance(target, Energy) else getattr(target, "energy", None)
    if isinstance(energy, Energy):
        require_no_batch(energy, "target")
        return energy
    if callable(target) and not isinstance(target, type | Distribution):
        return PyroModelEnergy(target)
    raise TypeError(
        "target must be an Energy, have one as .energy or be a Pyro model, got "
        f"{type(target).__name__}. Wrap a callable: "
        "pyro_ebm.energies.FunctionEnergy(fn, event_shape); a distribution: "
        "pyro_ebm.energies.DistributionEnergy(distribution)."
    )


def _base_of(target: Any, energy: Energy) -> dist.TorchDistribution | None:
    base: dist.TorchDistribution | None = getattr(target, "base", None)
    if base is None and isinstance(energy, PyroModelEnergy):
        return energy.prior
    return base


def _exact(
    energy: Energy,
    base: dist.TorchDistribution | None,
    method: Method,
    limits: Limits,
    *,
    progress_bar: bool,
) -> LogPartitionEstimate | None:
    """What is exact, or ``None`` where that is not asked for or has failed."""
    if method not in ("auto", "exact"):
        return None
    result = closed_form(energy)
    if result is None and isinstance(energy.support, MixedSupport):
        _require_sampling(energy, method)
        return None
    states = num_states(energy)
    if result is None and states is not None:
        if method == "exact":
            return enumeration(energy, progress_bar=progress_bar)
        return _enumerated(energy, states, limits, progress_bar=progress_bar)
    if result is None and (method == "exact" or energy.event_shape.numel() <= 2):
        share = 1.0 if method == "exact" else 0.3
        limit = 2**21 if limits.budget is None else limits.budget
        result = quadrature(
            energy,
            base=base,
            max_evaluations=limit,
            max_seconds=share * limits.left,
            progress_bar=progress_bar,
        )
        # Against a proper prior no grid proves that an integral does not end.
        is_proper = isinstance(energy, PyroModelEnergy)
        is_doubtful = result.status == Status.UNRELIABLE or is_proper
        if method == "auto" and not result.is_reliable and is_doubtful:
            return None
    return result


def _enumerated(
    energy: Energy, states: int, limits: Limits, *, progress_bar: bool
) -> LogPartitionEstimate | None:
    """The sum over all states, or ``None`` where there are too many for the time."""
    if states > _MAX_STATES:
        return None
    if states <= _FEW_STATES:
        return enumeration(energy, progress_bar=progress_bar)
    if limits.budget is not None and limits.budget < states:
        return None
    seconds = 0.3 * limits.left
    found = enumeration(energy, max_seconds=seconds, progress_bar=progress_bar)
    is_whole = all(why.reason is not Reason.OUT_OF_BUDGET for why in found.reasons)
    return found if is_whole else None


def _require_sampling(energy: Energy, method: str) -> None:
    if method == "exact":
        raise ValueError(
            "method must be 'auto', 'sampling' or 'importance' for an energy over "
            f"{energy.support}, whose sum over states is one of integrals; got "
            "'exact'. Given all real columns the sum is exact: "
            "estimate(distribution.condition(...))."
        )


def _sampled(
    energy: Energy,
    given: dist.TorchDistribution | None,
    method: Method,
    limits: Limits,
    *,
    progress_bar: bool,
) -> LogPartitionEstimate:
    is_finite = finite_values(energy.support) is not None
    if method == "gibbs" or (is_finite and method not in _SAMPLERS):
        return _annealed(energy, given, limits, is_shown=progress_bar)
    base = default_base(energy) if given is None else given
    result, doubts = _looked_at(energy, base, limits)
    if result is None and method in _SAMPLERS:
        budget = limits.budget or 50_000
        result = _SAMPLERS[method](energy, base, budget, progress_bar)
    elif result is None and isinstance(energy.support, MixedSupport):
        result = _by_classes(
            energy, base, limits, is_guess=given is None, is_shown=progress_bar
        )
    elif result is None:
        reach = 1.0 if given is not None else reach_of(base)
        result, _ = two_routes(energy, base, limits, is_shown=progress_bar, reach=reach)
    if doubts:
        reasons = (*result.reasons, *doubts)
        result = result._replace(status=Status.UNRELIABLE, reasons=reasons)
    if given is None:
        how = f"{result.method}; base: {describe(base)}"
        result = result._replace(method=how)
    return result


def _by_classes(
    energy: Energy,
    given: dist.TorchDistribution,
    limits: Limits,
    *,
    is_guess: bool,
    is_shown: bool,
) -> LogPartitionEstimate:
    """Over a mixed support: importance from the base and from what chains have found.

    Latent classes are fitted to the ends of chains that began at the base. One that is
    a guess is not believed by itself: its draws tell nothing of what lies elsewhere.
    """
    left = _MOST_EVALUATIONS if limits.budget is None else limits.budget
    number, proposal, before = min(_FIRST_DRAWS, left), given, None
    while True:
        found = importance_sampling(
            energy, proposal, num_samples=number, progress_bar=is_shown
        )
        left -= number
        if before is not None:
            found = _held_against(before, found, "chains")
        may_do = not is_guess or proposal is not given
        is_enough = may_do and found.is_reliable and found.std_error <= limits.tolerance
        is_late = limits.seconds > limits.max_seconds / _GROWTH
        if is_enough or is_late or left < number or number >= _MOST_DRAWS:
            break
        if proposal is given and left > _COST_OF_CHAINS:
            counted, before = CountedEnergy(energy), None if is_guess else found
            start = _low_points(counted, given) if is_guess else given
            chains = IndependentChains(start, progress_bar=is_shown)
            ends = chains.draw_diagnosed(counted, _NUM_CHAINS).x
            left -= counted.num_evaluations
            seconds = limits.left / _GROWTH
            near = latent_classes(ends, support=energy.support, max_seconds=seconds)
            proposal = Stack([given, near], torch.tensor([0.1, 0.9]).to(ends))
        else:
            number = min(_GROWTH * number, left)
    if proposal is not given:
        found = found._replace(method=f"{found.method} from what chains have found")
    spent = (limits.budget or _MOST_EVALUATIONS) - left
    return found._replace(num_evaluations=spent, num_seconds=limits.seconds)


@torch.no_grad()
def _low_points(energy: Energy, base: dist.TorchDistribution) -> dist.TorchDistribution:
    """Draws of a base moved to where the energy is least, given their finite columns.

    So chains begin in states too whose real columns lie elsewhere than in the others.
    """
    flat, to_support = unconstrained(energy)
    support: Any = flat.support
    u = to_support.inv(base.sample((_NUM_CHAINS,)).to(**energy.tensor_options()))
    moves = torch.ones_like(u[0]).index_fill_(-1, torch.tensor(support.finite), 0.0)

    def value_and_grad(u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = flat.value_and_grad(u)
        return value, grad * moves

    descent = Descent(value_and_grad, u)
    for _ in range(_DESCENT):
        descent.step()
    points = to_support(descent.z)
    return dist.Empirical(points, torch.zeros_like(points[:, 0]))


def _held_against(
    before: LogPartitionEstimate, found: LogPartitionEstimate, what: str
) -> LogPartitionEstimate:
    """An estimate that is not reliable if one before it was, and disagrees."""
    if not (found.is_reliable and before.is_reliable):
        return found
    error = math.hypot(found.std_error, before.std_error)
    if abs(found.value - before.value) <= 5 * error + 1e-6:
        return found
    apart = f"{what} moved log Z from {before.value:.4f} to {found.value:.4f}"
    reasons = (Finding(Reason.ROUTES_DISAGREE, apart),)
    return found._replace(status=Status.UNRELIABLE, reasons=reasons)


def _annealed(
    energy: Energy,
    given: dist.TorchDistribution | None,
    limits: Limits,
    *,
    is_shown: bool,
) -> LogPartitionEstimate:
    """Over a finite support: larger runs until one is good enough, or time is up."""
    budget, before = limits.budget, None
    while True:
        start = limits.seconds
        found = gibbs_annealing(energy, given, budget=budget, progress_bar=is_shown)
        if before is not None:
            larger = f"a run of {_GROWTH} times the size"
            found = _held_against(before, found, larger)
        is_enough = found.is_reliable and found.std_error <= limits.tolerance
        seconds = _GROWTH * (limits.seconds - start)
        if is_enough or limits.budget is not None or seconds > limits.left:
            return found._replace(num_seconds=limits.seconds)
        before, budget = found, _GROWTH * found.num_evaluations


def _looked_at(
    energy: Energy, base: dist.TorchDistribution, limits: Limits
) -> tuple[LogPartitionEstimate | None, list[Finding]]:
    """What speaks against an energy or its base before anything is estimated.

    Returns:
        The estimate where there is evidence that log Z is infinite, and doubts.

    Raises:
        ValueError: If the base does not fit, or the energy is no function of a point.
    """
    is_discrete = energy.support.is_discrete
    if not is_discrete:
        GeometricPath(energy, base)  # checks that they fit
    start = time.perf_counter()
    draws = corrected(base).sample(torch.Size((_NUM_CHECKED,)))
    seconds = (time.perf_counter() - start) / _NUM_CHECKED * _NUM_DRAWN
    draws = draws.to(**energy.tensor_options(draws))
    check_pointwise(energy, draws[: _NUM_CHECKED // 8])
    is_slow = seconds > 0.2 * limits.max_seconds  # a prior run draw by draw
    doubt = None
    if not (is_discrete or is_slow):
        doubt = check_draws(base)
    doubts = [] if doubt is None else [doubt]
    if is_discrete or energy(draws).isfinite().sum() < 2:
        return None, doubts
    found = check_normalizability(energy, draws, base=base)
    if found.status != Status.NOT_NORMALIZABLE or found.finding is None:
        return None, doubts
    if isinstance(energy, PyroModelEnergy):
        # Against a proper prior no ray is a proof, and what could hold no mass this
        # side of the largest numbers is no doubt either.
        return None, doubts + [found.finding] * (found.log_mass > -_NOTHING)
    nan = math.nan
    infinite = LogPartitionEstimate(
        math.inf,
        nan,
        nan,
        nan,
        nan,
        Status.NOT_NORMALIZABLE,
        "ray test",
        found.num_evaluations,
        (found.finding,),
        limits.seconds,
    )
    return infinite, []


def _smc(
    energy: Energy,
    base: dist.TorchDistribution,
    budget: int,
    is_shown: bool,  # noqa: FBT001
) -> LogPartitionEstimate:
    number = max(64, min(8192, budget // 400 // 16 * 16))
    return smc(energy, base, num_particles=number, progress_bar=is_shown)


def _importance(
    energy: Energy,
    base: dist.TorchDistribution,
    budget: int,
    is_shown: bool,  # noqa: FBT001
) -> LogPartitionEstimate:
    return importance_sampling(energy, base, num_samples=budget, progress_bar=is_shown)


def _ais(
    energy: Energy,
    base: dist.TorchDistribution,
    budget: int,
    is_shown: bool,  # noqa: FBT001
) -> LogPartitionEstimate:
    num_chains = 64
    num_temperatures = max(2, budget // num_chains // 5)
    return annealed_importance_sampling(
        energy,
        base,
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        progress_bar=is_shown,
    )


_Sampler: TypeAlias = Callable[
    [Energy, dist.TorchDistribution, int, bool], LogPartitionEstimate
]
_SAMPLERS: dict[str, _Sampler] = {"smc": _smc, "importance": _importance, "ais": _ais}
