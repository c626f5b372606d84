r"""Log evidence of a Pyro model, from its prior or from a guide.

.. math::
    \log p(y) \approx \log \frac1N \sum_n
        \frac{p(y, z_n)}{q(z_n)}, \qquad z_n \sim q                         \tag{1}

References:
    Yao, Vehtari, Simpson & Gelman (2018), Yes, but did it work?: Evaluating variational
    inference. ICML.
"""

__all__ = ["evidence"]

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_ebm.core.errors import CompilationWarning, UnreliableWarning
from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.diagnostics.pareto import pareto_std_error
from pyro_ebm.energies import PyroModelEnergy
from pyro_ebm.energies.graphs.recording import first_line
from pyro_ebm.energies.pyro_model.prior import ModelPrior
from pyro_ebm.energies.pyro_model.runs import retried
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.base_check import check_draws
from pyro_ebm.partition.default_base import default_base, describe
from pyro_ebm.partition.estimate import Method, estimate
from pyro_ebm.partition.importance.guide import (
    GuideRuns,
    density_or_run,
    log_weights,
    proposal_of,
)
from pyro_ebm.partition.importance.importance import (
    estimate_from_weights,
    judge_weights,
)
from pyro_ebm.partition.progress import bar_settings

#: Draws of the guide to begin with, and at most.
_NUM_DRAWS, _MAX_DRAWS = 10_000, 160_000
#: Fewer have no error bar.
_MIN_DRAWS = 25
#: Draws made at once, and one by one between two looks at the clock.
_CHUNK, _FEW = 1_000, 25
#: Draws of the prior that are checked, if so many times as many, in case a second look
#: is needed, take no more than a share of the time.
_NUM_CHECKED, _LOOKS, _SHARE_CHECKED = (20_000, 4_000), 5, 0.25
#: Nats by which the integral of a prior may be off.
_MASS_TOLERANCE = 0.002
#: Share of runs that may raise.
_MAX_FAILED = 0.01
#: Weights that are believed with nothing to hold them against: effective share of the
#: draws at least, tail shape at most.
_GOOD_ESS, _GOOD_K = 0.1, 0.5
#: Nats, added to three standard errors, within which two routes agree.
_SLACK = 0.05
#: An unbiased estimate of Z is a hundred times too large once in a hundred times.
_TOO_HIGH = math.log(100)


class _Limits(NamedTuple):
    """What an estimate may cost, and how exact it has to be."""

    method: Method
    tolerance: float
    deadline: float
    budget: int | None
    progress_bar: bool

    def seconds_left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def for_guide(self) -> "_Limits":
        """A third of the time that is left."""
        return self._replace(deadline=time.monotonic() + self.seconds_left() / 3)


def evidence(
    model: Callable[..., Any],
    guide: Any = None,
    *args: Any,
    method: Method = "auto",
    tolerance: float = 0.02,
    max_seconds: float = 60.0,
    budget: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LogPartitionEstimate:
    r"""Estimate the log evidence :math:`\log p(y)` of a Pyro model.

    Without a guide it is :func:`~pyro_ebm.partition.estimate` of the model's
    :class:`~pyro_ebm.energies.PyroModelEnergy`, from the prior; where the draws of the
    prior are not those of its density, as of ``LKJCholesky``, from a standard normal in
    unconstrained space. A guide is a proposal: (1) with a fifth of the draws from the
    prior, held against that estimate. A model that is no energy, as it branches on
    latent values or has discrete sites that cannot be enumerated, is weighed by its
    runs, from the guide or from the prior.

    Factors count as observations; the rows that an ``obs_mask`` hides do not count.

    Args:
        model: Pyro model with observed sites or factors.
        guide: A guide over the latent sites of the model, by hand or automatic, trained
            or not; or a normalised distribution over the vector of
            :class:`~pyro_ebm.energies.PyroModelEnergy`, such as a zuko flow (an
            unconditional one is called for it). Default: none.
        *args: Arguments of model and guide.
        method: Of :func:`~pyro_ebm.partition.estimate`.
        tolerance: Standard error aimed at, in nats.
        max_seconds: After which no more draws are made.
        budget: Energy evaluations, or runs, aimed at; default: as many as ``tolerance``
            takes. With a guide, half of them are its draws.
        progress_bar: Whether to show what is done, if it takes more than a second.
        **kwargs: Arguments of model and guide. One that has a name from above is given
            by ``functools.partial(model, budget=...)``.

    Returns:
        The log evidence with interval and verdict. With a guide, ``"ok"`` says that the
        guide and the estimate from the prior agree, or that the guide is a bad proposal
        and the other is not; the reasons say which. Weights alone are believed only
        where they are excellent.

    Raises:
        TypeError: If the model cannot be called with the arguments, or ``guide`` is
            none.
        ValueError: If guide and model do not have the same latent sites, the guide is a
            point or not normalised, a plate of a model that is no energy is subsampled,
            an energy does not know its log Z, or ``budget`` is below 50.

    Warns:
        UnreliableWarning: If the status is neither ``"exact"`` nor ``"ok"``.

    Exactness: *exact* where the status says so, else *consistent*.

    Example:
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("z", dist.Normal(y / 2, 0.7))
        >>> found = evidence(model, guide, torch.tensor(0.0))
        >>> found.status, round(found.value, 4)  # log N(0; 0, 2)
        ('exact', -1.2655)
    """
    if budget is not None and not (isinstance(budget, int) and budget >= 50):
        raise ValueError(f"budget must be a whole number of at least 50, got {budget}.")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
    if not (guide is None or callable(guide) or isinstance(guide, Distribution)):
        raise TypeError(
            "guide must be a Pyro guide, a distribution or None, got "
            f"{type(guide).__name__}. The arguments of the model come after it: "
            "evidence(model, None, y)."
        )
    deadline = time.monotonic() + max_seconds
    limits = _Limits(method, tolerance, deadline, budget, progress_bar)
    whole: Any = _SumsToOne()(model)
    whole.__wrapped__ = model  # whose signature is its own
    program = _Program(whole, args, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        result = _evidence(program, guide, limits)
    if not result.is_reliable:
        warnings.warn(str(result), UnreliableWarning, stacklevel=2)
    return result


class _Program(NamedTuple):
    """A model and the arguments that it and its guide are run with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, guide: Callable[..., Any]) -> Trace:
        trace = poutine.trace(guide)
        return retried(lambda: trace.get_trace(*self.args, **self.kwargs))

    def energy(self) -> PyroModelEnergy | str:
        """The model as an energy, or why it is none that can be evaluated fast."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CompilationWarning)
                energy = PyroModelEnergy(self.model, *self.args, **self.kwargs)
            energy.check_evidence()
        except (ValueError, NotImplementedError) as error:
            return first_line(error)
        return energy if energy.is_traced else "the model cannot be traced"


class _SumsToOne(Messenger):
    """Takes the mask off what ``obs_mask`` leaves to be drawn.

    The rows that are seen are drawn too, and not used: behind the mask their density is
    one everywhere, and the integral infinite; without it, it is one.
    """

    def _pyro_sample(self, site: Any) -> None:
        if site["name"].endswith("_unobserved") and not site["is_observed"]:
            site["mask"] = None


def _evidence(program: _Program, guide: Any, limits: _Limits) -> LogPartitionEstimate:
    energy = program.energy()
    if guide is None:
        if isinstance(energy, str):
            return _by_runs(program, None, limits, energy)
        base, note = _base_of(energy, limits)
        return _in_view_of(_from_base(energy, base, limits), note)
    density, trace = density_or_run(guide, program.run)
    if not isinstance(energy, str):
        return _held_against_prior(program, guide, density, trace, energy, limits)
    if density is not None:
        raise ValueError(
            "guide is a distribution over the unconstrained latent values of a model "
            f"that has a density in them, and this one has none: {energy}. Write a "
            "Pyro guide, or take guide=None."
        )
    return _by_runs(program, guide, limits, energy)


def _base_of(
    energy: PyroModelEnergy, limits: _Limits
) -> tuple[dist.TorchDistribution, tuple[Finding, ...]]:
    """The prior, or what stands in for one that cannot be a base, and why."""
    stand_in = default_base(energy)
    try:
        prior = energy.prior
    except NotImplementedError as error:
        why = Finding(Reason.BASE_INCONSISTENT, first_line(error))
    else:
        num = _num_checked(prior, limits)
        found = check_draws(prior, num) if num else None
        if found is None:
            return prior, ()
        why = found
        lost = _lost_mass(prior, stand_in, limits)
        if lost is not None:
            return stand_in, (lost,)
    detail = f"started from a {describe(stand_in)}, not from the prior: {why}"
    return stand_in, (Finding(why.reason, detail),)


def _lost_mass(
    prior: ModelPrior, stand_in: dist.TorchDistribution, limits: _Limits
) -> Finding | None:
    """What the density of a prior lacks in floating point, or has too much.

    Where its draws are not those of its density, one of the two is wrong: if the
    density integrates to one, the draws are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableWarning)
        found = estimate(
            prior.energy,
            stand_in,
            tolerance=_MASS_TOLERANCE,
            max_seconds=_SHARE_CHECKED * limits.seconds_left(),
            progress_bar=False,
        )
    if not abs(found.value) > 4 * found.std_error + _MASS_TOLERANCE:
        return None
    return Finding(
        Reason.NUMERICAL,
        f"the density of the prior integrates to {math.exp(found.value):.3g} in "
        "floating point, not to 1: mass lies nearer to an end of a support than "
        "numbers can tell apart. Write the model in a coordinate that is finite there, "
        "such as the logit or the logarithm",
    )


def _in_view_of(
    found: LogPartitionEstimate, notes: tuple[Finding, ...]
) -> LogPartitionEstimate:
    """With notes on the prior; unreliable where its density is none."""
    noted = _noted(found, notes)
    if any(note.reason is Reason.NUMERICAL for note in notes):
        return noted._replace(status=Status.UNRELIABLE)
    return noted


def _num_checked(prior: dist.TorchDistribution, limits: _Limits) -> int:
    """Draws of the prior that are checked; none if they cost too much of the time."""

    def seconds(num: int) -> float:
        start = time.monotonic()
        prior.sample(torch.Size((num,)))
        return time.monotonic() - start

    seconds(2)  # finds out whether many can be made at once
    two = seconds(2)
    many = 100 if two < 0.05 else 10
    each = max(seconds(many) - two, 0.0) / (many - 2)
    for num in _NUM_CHECKED:
        if _LOOKS * num * each < _SHARE_CHECKED * limits.seconds_left():
            return num
    return 0


def _from_base(
    energy: PyroModelEnergy, base: dist.TorchDistribution, limits: _Limits
) -> LogPartitionEstimate:
    return estimate(
        energy,
        base,
        limits.method,
        tolerance=limits.tolerance,
        max_seconds=limits.seconds_left(),
        budget=limits.budget,
        progress_bar=limits.progress_bar,
    )


def _held_against_prior(
    program: _Program,
    guide: Any,
    density: Any,
    trace: Trace | None,
    energy: PyroModelEnergy,
    limits: _Limits,
) -> LogPartitionEstimate:
    """The weights of a guide, and the estimate from the prior."""
    base, note = _base_of(energy, limits)
    if limits.budget is not None:
        limits = limits._replace(budget=limits.budget // 2)
    _, args, kwargs = program
    chosen = guide if density is None else density
    proposal = proposal_of(chosen, trace, energy, args, kwargs)
    if proposal is None:
        own = _weighed_by_runs(program, guide, limits.for_guide())
    else:
        second = "the prior" if isinstance(base, ModelPrior) else f"a {describe(base)}"
        own = _weighed(
            lambda count: log_weights(energy, proposal, base, count),
            _CHUNK,
            limits.for_guide(),
            f"importance sampling from the guide and {second}",
        )
    try:
        other = _from_base(energy, base, limits)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        alone = _alone(own, f"the estimate from the prior failed, {error}")
        return _in_view_of(alone, note)
    return _in_view_of(_reconciled(own, other), note)


def _by_runs(
    program: _Program, guide: Any, limits: _Limits, problem: str
) -> LogPartitionEstimate:
    """The weights of runs, with nothing to hold them against."""
    own = _weighed_by_runs(program, guide, limits)
    if guide is None:  # the prior misses nothing by being narrow
        own = own._replace(is_good=True)
    return _alone(own, problem)


class _Weighed(NamedTuple):
    """An estimate from weights, and whether these are excellent."""

    estimate: LogPartitionEstimate
    is_good: bool


def _weighed_by_runs(program: _Program, guide: Any, limits: _Limits) -> _Weighed:
    with torch.no_grad():
        runs = GuideRuns(program.model, guide, program.args, program.kwargs)
    how = "vectorised" if runs.is_vectorized else "one by one"
    whence = "prior" if guide is None else "guide"
    method = f"importance sampling from the {whence}, {how}"
    own = _weighed(runs.draw, _CHUNK if runs.is_vectorized else _FEW, limits, method)
    if not runs.num_failed:
        return own
    count = own.estimate.num_evaluations
    detail = f"{runs.num_failed} of {count} runs of the model raised; their weight is 0"
    found = _noted(own.estimate, (Finding(Reason.NOT_FINITE, detail),))
    if runs.num_failed > _MAX_FAILED * count:
        found = found._replace(status=Status.UNRELIABLE)
    return own._replace(estimate=found)


@torch.no_grad()
def _weighed(
    draw: Callable[[int], Tensor], chunk: int, limits: _Limits, method: str
) -> _Weighed:
    """Weights of draws until they are enough or the time is up."""
    parts: list[Tensor] = []
    count, goal = 0, limits.budget or _NUM_DRAWS
    with tqdm(
        total=goal,
        desc="evidence",
        **bar_settings(is_shown=limits.progress_bar),
    ) as bar:
        while count < goal:
            size = min(chunk, goal - count)
            parts.append(draw(size))
            count += size
            bar.update(size)
            if count >= _MIN_DRAWS and time.monotonic() > limits.deadline:
                break
            if count == goal and _need_more(torch.cat(parts), limits):
                goal = bar.total = 2 * goal
    weights = torch.cat(parts)
    found = estimate_from_weights(weights, method, count)
    k, ess, _ = judge_weights(weights)
    return _Weighed(found, k < _GOOD_K and ess > _GOOD_ESS * count)


def _need_more(weights: Tensor, limits: _Limits) -> bool:
    """Whether the error is too large, and twice as many draws are allowed."""
    if limits.budget is not None or 2 * len(weights) > _MAX_DRAWS:
        return False
    return pareto_std_error(weights.nan_to_num(-torch.inf)) > limits.tolerance


def _noted(
    found: LogPartitionEstimate, notes: tuple[Finding, ...]
) -> LogPartitionEstimate:
    return found._replace(reasons=found.reasons + notes)


def _alone(own: _Weighed, problem: str) -> LogPartitionEstimate:
    """What the weights say by themselves."""
    detail = f"there is nothing to hold the weights against: {problem}"
    found = _noted(own.estimate, (Finding(Reason.ONE_ROUTE, detail),))
    return found if own.is_good else found._replace(status=Status.UNRELIABLE)


def _reconciled(own: _Weighed, other: LogPartitionEstimate) -> LogPartitionEstimate:
    """One estimate of that by the guide and that from the prior."""
    mine, is_reliable = own.estimate, own.estimate.is_reliable
    if not math.isfinite(other.std_error) and other.status == Status.UNRELIABLE:
        return _alone(own, f"the estimate from the prior is none, {other.reason}")
    spent = mine.num_evaluations + other.num_evaluations
    method = f"{mine.method}, held against {other.method}"
    both: dict[str, Any] = {"method": method, "num_evaluations": spent}
    gap = mine.value - other.value
    error = math.hypot(mine.std_error, other.std_error)
    too_high = mine.value - other.upper > _TOO_HIGH
    if (is_reliable and not abs(gap) <= 3 * error + _SLACK) or too_high:
        return _disagreeing(mine, other)._replace(**both)
    if not is_reliable:
        detail = f"the guide is a bad proposal: {mine.reason}"
        note = Finding(Reason.HEAVY_WEIGHTS, detail)
        return _noted(other, (note,))._replace(**both)
    if not other.is_reliable:
        detail = (
            f"the estimate from the prior agrees, but is unreliable: {other.reason}"
        )
        return _noted(mine, (Finding(Reason.ONE_ROUTE, detail),))._replace(**both)
    best = min(other, mine, key=lambda found: found.std_error)
    if best.status == Status.EXACT or abs(gap) <= 2 * error:
        return best._replace(**both)
    return _widened(best, mine, other)._replace(**both)


def _disagreeing(
    mine: LogPartitionEstimate, other: LogPartitionEstimate
) -> LogPartitionEstimate:
    detail = (
        f"by the guide {mine.value:.4f} +- {mine.std_error:.2g}, from the prior "
        f"{other.value:.4f} +- {other.std_error:.2g}"
    )
    best = other if other.is_reliable else mine
    found = _widened(best, mine, other)._replace(status=Status.UNRELIABLE)
    findings = (Finding(Reason.ROUTES_DISAGREE, detail), *mine.reasons, *other.reasons)
    return found._replace(reasons=findings)


def _widened(
    best: LogPartitionEstimate, mine: LogPartitionEstimate, other: LogPartitionEstimate
) -> LogPartitionEstimate:
    """An estimate with an interval that holds both."""
    return best._replace(
        std_error=max(best.std_error, abs(mine.value - other.value) / 2),
        lower=min(mine.lower, other.lower),
        upper=max(mine.upper, other.upper),
    )
