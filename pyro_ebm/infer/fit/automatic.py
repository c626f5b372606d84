r"""What a fit does that is told nothing but the model and the data.

A part of the data is held out. A density is fitted to the rest and becomes the base,
where the model has none; a network starts as its correction. Log Z and its gradient
come from draws of a proposal, renewed again and again
(:class:`~pyro_ebm.partition.tracking.weighted_draws.WeightedDraws`), as long as enough
of them count; then from a proposal that is fitted to the draws by their weights; and
from chains where that fails. Where a network of few coordinates has many rows, one
normal as base is tried too, as a base that follows the rows closely leaves nothing to
learn from them. The model of the record with the best held-out likelihood is kept,
unless that is better than the start by less than two standard errors. At last, if there
are few rows, some time is left and no number of steps was asked for, the base is fitted
once more, to the rows held out too, and mixed with the first; what was said of these
stays.

Over a finite support the base is independent sites, the gradient is exact, by
persistent chains, or that of the pseudolikelihood where all sites are tied to each
other, and weights decay as much as the held-out rows want
(:func:`~pyro_ebm.infer.fit.optimiser.decay_by_gap`). A restricted Boltzmann machine
learns in weights between units less their means
(:class:`~pyro_ebm.infer.fit.optimiser.Centring`); one of real units by the exact
gradient, where its log Z is cheap.
"""

__all__ = [
    "FEW_DIMENSIONS",
    "PATIENCE",
    "Plan",
    "WeightedSteps",
    "chains_instead",
]

import copy
import itertools
import logging
import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm import bases
from pyro_ebm.bases.rows import split_indices
from pyro_ebm.bases.stack import Stack
from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.stopwatch import Stopwatch
from pyro_ebm.distributions import EnergyModel
from pyro_ebm.energies import Energy, NeuralEnergy, RBMEnergy, unconstrained
from pyro_ebm.energies.discrete.finite import num_points
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.energies.views.unconstrained import is_finite_support, is_unconstrained
from pyro_ebm.infer.fit.optimiser import FitOptim, weights_of
from pyro_ebm.infer.fit.points import Points
from pyro_ebm.infer.fit.stages import Stage
from pyro_ebm.infer.likelihood import mean_and_error
from pyro_ebm.infer.objectives.likelihood.exact_likelihood import (
    ExactMaximumLikelihood,
)
from pyro_ebm.infer.objectives.likelihood.importance import (
    ImportanceSampledLikelihood,
)
from pyro_ebm.infer.objectives.likelihood.maximum_likelihood import MaximumLikelihood
from pyro_ebm.infer.objectives.objective import Objective
from pyro_ebm.infer.objectives.score.site_conditionals import Pseudolikelihood
from pyro_ebm.partition.tracking.weighted_draws import WeightedDraws

_LOG = logging.getLogger(__name__)
#: Rows below which none is held out.
_FEWEST = 20
#: Draws of the pool, of that of many dimensions, and those of a step.
_POOL, _LARGE_POOL, _DRAWS = 20_000, 50_000, 1024
#: Dimensions beyond which a few effective draws say too little for a nearer proposal.
FEW_DIMENSIONS = 30
#: Part of the draws that must count; from below, a new proposal, and again below a
#: quarter of that; below, chains.
_LOW, _AGAIN, _LOST = 0.03, 0.25, 0.001
#: Steps by importance, and by chains, which cost twenty times as much.
_STEPS, _CHAIN_STEPS = 4000, 2000
#: Of the optimiser.
_RATE, _WARMUP, _LAST_RATE = 2e-3, 100, 0.02
#: Of a network over one normal, which has all to learn; rows from which on it is tried,
#: and the part of the time of the base that this takes.
_BOLD_RATE, _MANY_FOR_TRIAL, _FOR_TRIAL = 5e-3, 5000, 1 / 3
#: What a network over one normal is called among the kinds of base.
_ALONE = "network over a normal"
#: Over a finite support: of the optimiser, steps, sweeps of the chains in one, and the
#: number of states up to which all are summed at each step.
_FINITE_RATE, _FINITE_STEPS, _SWEEPS, _FEW_STATES = (1e-2, 6e-3), 60_000, 1, 2**12
#: Of these steps, so many to a record; and records without a better one until the end:
#: much is gained as the rate falls.
_FINITE_RECORDS, _FINITE_PATIENCE = 100, 50
#: Blocks of sites above which a sweep of chains is dear.
_MANY_BLOCKS = 16
#: Seconds of a gradient of the exact log Z, above which chains are the cheaper.
_CHEAP = 0.005
#: Records without a better one after which it ends.
PATIENCE = 15
#: Part of the time that the base may take, and seconds for a nearer proposal.
_FOR_BASE, _FOR_PROPOSAL = 0.3, 3.0
#: Times that the first fit of the base took, for which there must be time for another.
_AGAIN_TIMES = 1.5
#: Rows from which on those held out would add nothing to it.
_MANY_ROWS = 10_000
#: Draws for the log Z at the end, and the part of the time that they may take.
_AT_THE_END, _FOR_END = 100_000, 0.25


class Plan(NamedTuple):
    """How a fit is to go.

    Attributes:
        stages: Estimators with their steps.
        train: Rows to learn from.
        held_out: Rows to choose by, or ``None``.
        held_out_weights: Theirs, shape ``(M,)``, or ``None``.
        base: What was fitted to the rows, or ``None``.
        proposal: Where weighted draws come from; ``None`` where log Z comes otherwise.
        watch: Of the fit, since before its base.
        max_seconds: After which learning ends, with log Z of weighted draws.
        rate: Of the optimiser, at its highest.
        decays: Whether weights decay as much as held-out rows want.
        patience: Records without a better one after which it ends.
        keeps_base: Whether nothing is learned: the model starts as its base, and no
            rows tell whether a correction is better.
        points: All rows, of which some were held out here, where the base may be
            fitted to all of them; else ``None``.
        base_seconds: That the base has taken.
    """

    stages: list[Stage]
    train: Points
    held_out: Tensor | None
    held_out_weights: Tensor | None
    base: bases.FittedBase | None
    proposal: Any
    watch: Stopwatch
    max_seconds: float
    rate: float = _RATE
    decays: bool = False
    patience: float = PATIENCE
    keeps_base: bool = False
    points: Points | None = None
    base_seconds: float = math.inf

    @classmethod
    def automatic(
        cls,
        model: EnergyModel,
        points: Points,
        held_out: Tensor | None,
        num_steps: int | None,
        max_seconds: float,
        *,
        progress_bar: bool,
    ) -> "Plan":
        """Hold out rows, fit the base, and choose where log Z comes from.

        Args:
            model: What is fitted; it gets its base here, if it has none.
            points: The data.
            held_out: Rows to choose by; default: a part of the data.
            num_steps: Parameter steps; default: as many as are worth it.
            max_seconds: For the base and the steps, wall-clock.
            progress_bar: Whether to show the fit of the base.

        Raises:
            ValueError: If a base was given that does not cover the data, or with rows
                that have missing entries.
        """
        watch, train, weights = Stopwatch(), points, None
        everything = points if held_out is None and num_steps is None else None
        is_finite = is_finite_support(model.energy.support)
        if held_out is None:
            train, held_out, weights = _held_out(points, is_finite=is_finite)
        rows = train, held_out, weights
        if is_finite or (points.missing is None and _is_exact_machine(model.energy)):
            stages = [_finite_stage(model, train.counted(), num_steps)]
            plan = cls(stages, *rows, None, None, watch, max_seconds)
            rate = _FINITE_RATE[isinstance(model.energy, RBMEnergy)]
            return plan._replace(rate=rate, decays=True, patience=_FINITE_PATIENCE)
        base = None
        if model.awaits_base:
            most = max_seconds * _FOR_BASE
            base, train = fit_base(model, *rows, most, progress_bar=progress_bar)
        else:
            _require_given_base(model, points, train)
        proposal = model.base if base is not None else _towards(model, train.counted())
        objective = ImportanceSampledLikelihood(proposal, _DRAWS)
        has_no_choice = base is not None and held_out is None
        keeps_base = has_no_choice and _is_base(model, train.rows)
        if keeps_base:
            _LOG.warning("data: too few rows to hold some out; the base is the model")
        stages = [Stage(objective, 1 if keeps_base else num_steps or _STEPS)]
        plan = cls(stages, train, held_out, weights, base, proposal, watch, max_seconds)
        plan = plan._replace(keeps_base=keeps_base, points=everything)
        if base is not None and _ALONE in base.compared:
            plan = plan._replace(rate=_BOLD_RATE)
        return plan._replace(base_seconds=math.inf if base is None else watch.seconds)

    @classmethod
    def given(
        cls,
        model: EnergyModel,
        points: Points,
        held_out: Tensor | None,
        stages: list[Stage],
        max_seconds: float | None,
    ) -> "Plan":
        """What was asked for; a model that awaits a base keeps its standard normal.

        Args:
            model: What is fitted.
            points: The data.
            held_out: Rows whose likelihood is recorded.
            stages: Estimators with their steps.
            max_seconds: Default: no limit.

        Raises:
            ValueError: If the base does not cover the data.
        """
        _require_cover(model.base, points.rows, awaits_base=model.awaits_base)
        limit = math.inf if max_seconds is None else max_seconds
        return cls(stages, points, held_out, None, None, None, Stopwatch(), limit)

    def base_of_all(self, model: EnergyModel) -> Any:
        """Half the base, half the same fitted to the rows held out too; or ``None``.

        That is by Jensen's inequality at least as good as the two in the mean, and no
        row loses more than log 2 by a fit that came out badly. It is made where there
        are few rows, and time for it and log Z again.

        Args:
            model: Whose energy corrects it.
        """
        left = self.max_seconds - self.watch.seconds
        if self.points is None or self.held_out is None or self.base is None:
            return None
        is_correction = getattr(model.energy, "base", None) is model.base
        is_worth_it = is_correction and len(self.points.rows) < _MANY_ROWS
        is_late = left < _AGAIN_TIMES * self.base_seconds
        if is_late or not (is_worth_it and self.base.shares):
            return None
        try:
            again = self.base.fitted_to(
                self.points.rows,
                support=_real_or(model.energy.support),
                max_seconds=self.max_seconds * _FOR_BASE,
                progress_bar=False,
            )
        except (ArithmeticError, ValueError):
            return None
        return Stack([model.base, again], torch.full((2,), 0.5).to(self.held_out))

    def left(self, seconds_each: float) -> float:
        """Seconds to learn, before log Z is found from draws that take so long each."""
        at_end = min(_AT_THE_END * seconds_each, _FOR_END * self.max_seconds)
        return self.max_seconds - self.watch.seconds - at_end

    @property
    def record_interval(self) -> int:
        """Steps between two records."""
        steps = sum(stage.num_steps for stage in self.stages)
        return max(100, steps // _FINITE_RECORDS if self.decays else 0)

    def optim(self, model: EnergyModel) -> torch.optim.lr_scheduler.LambdaLR:
        """Adam, with a rate that rises quickly and falls to little by the end.

        The clock has a say only where there is no time for all steps, so that a seed
        gives the same parameters again. Weights that decay are a group of their own.
        """
        groups = [{"params": [*model.parameters()]}]
        if self.decays:
            weights = weights_of(model.energy)
            others = [p for p in model.parameters() if all(p is not w for w in weights)]
            groups = [{"params": others}, {"params": weights}]
        adam = torch.optim.Adam(groups, lr=self.rate, fused=self.decays or None)
        total, start = sum(s.num_steps for s in self.stages), self.watch.seconds
        wanted = total

        def rate(step: int) -> float:
            nonlocal total
            looks_again = self.decays and step % _WARMUP == 0 and total < wanted
            if step == _WARMUP or looks_again:
                each = (self.watch.seconds - start) / max(step, 1)
                left = max(self.max_seconds - self.watch.seconds, 0.0)
                if each * (wanted - step) > left:
                    total = step + max(1, int(left / each))
            falling = (1 + math.cos(math.pi * min(step / total, 1.0))) / 2
            return min(1.0, (step + 1) / _WARMUP) * (falling + _LAST_RATE)

        return torch.optim.lr_scheduler.LambdaLR(adam, rate)


def _require_given_base(model: EnergyModel, points: Points, train: Points) -> None:
    if points.missing is not None and bool(points.missing.any()):
        raise ValueError(
            "data with missing entries need a model without a base, whose base is then "
            "fitted to what is there: EnergyModel(energy). Or drop the rows with nan."
        )
    _require_cover(model.base, train.rows, awaits_base=False)


@torch.no_grad()
def _require_cover(base: Any, rows: Tensor, *, awaits_base: bool) -> None:
    """Check that a base that was not fitted to the rows is somewhere near them.

    Args:
        base: Of the model.
        rows: Shape ``(N, *event)``.
        awaits_base: Whether the base is the one that stands in for one to be fitted.

    Raises:
        ValueError: If half of the rows have a density lower by 1,000 nats a number
            than all of 1,000 draws.
    """
    with torch.random.fork_rng(devices=[]):
        draws = base.sample((1000,))
    lowest = base.log_prob(draws).min()
    typical = base.log_prob(rows[:2000].to(draws)).median()
    if typical > lowest - 1000 * max(1, rows[0].numel()):
        return
    advice = "Build the EnergyModel without a base: fit then fits one"
    if awaits_base:
        advice = "Leave objective at 'auto', which fits a base"
    raise ValueError(
        f"the base of the model does not cover the data: their log density there is "
        f"{float(typical):.3g} in the median, and at least {float(lowest):.3g} at "
        f"1,000 of its draws. {advice}; or standardise the data."
    )


@torch.no_grad()
def _is_base(model: EnergyModel, rows: Tensor) -> bool:
    """Whether what is learned of the energy is nothing yet."""
    return not bool(model.energy.correction(rows).any())


def _held_out(
    points: Points, *, is_finite: bool
) -> tuple[Points, Tensor | None, Tensor | None]:
    """Rows to learn from, rows that are held out, and their weights.

    Of rows of which some have missing entries only complete ones are held out, at most
    half of them.
    """
    number = len(points.rows)
    if points.missing is None:
        if number < _FEWEST:
            return points, None, None
        train, apart = split_indices(points.rows, seed=0, is_finite=is_finite)
    else:
        whole = (~points.missing.any(1)).nonzero()[:, 0].cpu()
        if len(whole) < _FEWEST:
            _LOG.warning("data: %d rows are complete, too few to hold out", len(whole))
            return points, None, None
        _, order = split_indices(points.rows[whole.to(points.rows.device)], seed=0)
        share = len(split_indices(points.rows, seed=0)[1]) / len(whole)
        if share > len(order) / len(whole):
            generator = torch.Generator().manual_seed(0)
            shuffled = torch.randperm(len(whole), generator=generator)
            order = shuffled[: round(min(share, 0.5) * len(whole))]
        apart = whole[order]
        is_apart = torch.zeros(number, dtype=torch.bool)
        is_apart[apart] = True
        train = (~is_apart).nonzero()[:, 0]
    chosen = points.at(apart)
    if chosen.weights is not None and int((chosen.weights > 0).sum()) < 2:
        return points, None, None
    return points.at(train), chosen.rows, chosen.weights


def _finite_stage(model: EnergyModel, train: Tensor, num_steps: int | None) -> Stage:
    """Learning over a finite support: by the exact likelihood, by chains, or by site.

    The base is independent sites with the frequencies of the data; of a machine of real
    units, which is learned by the exact likelihood too, a normal.
    """
    energy = model.energy
    if model.awaits_base and not energy.support.is_discrete:
        model.use_base(bases.normal(train), train)
    elif model.awaits_base:
        model.use_base(IndependentSites.fitted(energy.support, train), train)
    count = num_points(energy.support, energy.event_shape)
    is_small = count is not None and count <= _FEW_STATES
    steps = _FINITE_STEPS if num_steps is None else num_steps
    if is_small or _is_exact_cheap(energy):
        objective: Objective = ExactMaximumLikelihood()
    elif isinstance(energy, SiteEnergy) and len(energy.blocks) > _MANY_BLOCKS:
        objective = Pseudolikelihood()  # as dear as a block, of which a sweep has many
    else:
        objective = MaximumLikelihood(num_steps=_SWEEPS, restart_fraction=0.0)
    model.log_partition.refresh(energy, progress_bar=False)
    return Stage(objective, steps)


def _is_exact_machine(energy: Energy) -> bool:
    """Whether it is a machine of real units whose log Z and gradient are cheap."""
    is_real = isinstance(energy, RBMEnergy) and energy.visible == "gaussian"
    return is_real and _is_exact_cheap(energy)


def _is_exact_cheap(energy: Energy) -> bool:
    """Whether log Z has a closed form whose gradient takes no longer than chains."""
    for _ in range(2):  # the first has caches to fill
        watch, known = Stopwatch(), energy.closed_form()
        if known is None:
            return False
        if known.log_partition.requires_grad:
            learned = [p for p in energy.parameters() if p.requires_grad]
            torch.autograd.grad(known.log_partition, learned, allow_unused=True)
    return watch.seconds < _CHEAP


def fit_base(
    model: EnergyModel,
    train: Points,
    held_out: Tensor | None,
    held_out_weights: Tensor | None,
    max_seconds: float,
    *,
    progress_bar: bool,
) -> tuple[bases.FittedBase, Points]:
    """Fit the base that a model awaits, and give it to the model.

    Args:
        model: What awaits it.
        train: Rows to fit to; with weights, or with missing entries and no row to
            choose by, the base is a committee of mixtures of normals.
        held_out: Rows to choose by.
        held_out_weights: Theirs.
        max_seconds: That it may take.
        progress_bar: Whether to show the fit.

    Returns:
        The base, and the rows with candidates for what is missing.
    """
    support = _real_or(model.energy.support)
    is_whole = train.missing is None or (support is None and held_out is not None)
    if train.weights is None and is_whole:
        found = bases.fit(
            train.rows,
            support=support,
            held_out=held_out,
            max_seconds=max_seconds,
            progress_bar=progress_bar,
        )
    else:
        found = _committee(train, held_out, support, max_seconds, held_out_weights)
    train = train.filled_by(found.distribution)
    if train.weights is None and train.missing is None and held_out is not None:
        found = _simpler(model, found, train, held_out, max_seconds)
    model.use_base(found.distribution, train.counted())
    return found, train.with_candidates(model)


def _simpler(
    model: EnergyModel,
    found: bases.FittedBase,
    train: Points,
    held_out: Tensor,
    max_seconds: float,
) -> bases.FittedBase:
    """One normal as base, where a network over it is soon better than what was found.

    A density that follows many rows closely leaves nothing in these rows to learn from.
    It is tried where a network can follow them too.

    Args:
        model: Whose network learns.
        found: The base so far.
        train: Rows to learn from.
        held_out: Rows to choose by.
        max_seconds: That the base may take.
    """
    energy, rows = model.energy, train.rows
    is_network = is_unconstrained(energy.support) and isinstance(energy, NeuralEnergy)
    if len(rows) < _MANY_FOR_TRIAL or not is_network or train.loader is not None:
        return found
    trial, base = copy.deepcopy(model), bases.normal(rows)
    trial.use_base(base, rows)
    projections: Any = trial.energy.frequency
    if not projections.numel():
        return found
    objective = ImportanceSampledLikelihood(base, _DRAWS)
    limits = None, None, base, Stopwatch(), _FOR_TRIAL * max_seconds, _BOLD_RATE
    plan = Plan([Stage(objective, _STEPS)], train, held_out, *limits)
    optim = FitOptim.of(plan.optim(trial), trial, None)
    steps = WeightedSteps(trial, optim, base, rows[:_DRAWS])
    batches = train.batches(_DRAWS // 4, trial)
    with torch.random.fork_rng(devices=[]):  # how many steps there are changes nothing
        for batch in itertools.islice(batches, _STEPS):
            steps.step(batch)
            optim.advance_schedule()
            if plan.watch.seconds > plan.max_seconds:
                break
        steps.look_afresh()
    with torch.no_grad():
        learned = trial.averaged().log_prob(held_out)
        gain, error = mean_and_error(learned - found.distribution.log_prob(held_out))
        value, std_error = mean_and_error(base.log_prob(held_out))
    if not gain > error:
        return found
    compared = {**found.compared, _ALONE: learned.mean().item()}
    return bases.FittedBase(base, "normal", value, std_error, compared)


def _committee(
    train: Points,
    held_out: Tensor | None,
    support: Constraint | None,
    max_seconds: float,
    weights: Tensor | None,
) -> bases.FittedBase:
    settings: Any = {"weights": train.weights, "max_seconds": max_seconds}
    kind = "committee"
    if isinstance(support, MixedSupport):
        kind = "latent_classes"
        base: Any = bases.latent_classes(train.rows, support=support, **settings)
    else:
        base = bases.committee(train.rows, support=support, **settings)
    rows, weights = (
        (train.rows, train.weights) if held_out is None else (held_out, weights)
    )
    value, error = mean_and_error(base.log_prob(rows), weights)
    return bases.FittedBase(base, kind, value, error, {kind: value})


def _real_or(support: Constraint) -> Constraint | None:
    return None if is_unconstrained(support) else support


def _towards(model: EnergyModel, rows: Tensor) -> Any:
    """The base, mixed with a density that was fitted to the data."""
    try:
        near = _quick(rows, model.energy.support)
    except (ArithmeticError, ImportError, ValueError):
        return model.base
    return Stack([model.base, near], torch.full((2,), 0.5).to(rows))


def _quick(rows: Tensor, support: Constraint) -> dist.TorchDistribution:
    where = _real_or(support)
    if isinstance(where, MixedSupport):
        return bases.latent_classes(rows, support=where, max_seconds=_FOR_PROPOSAL)
    try:
        return bases.gaussian_mixture(rows, support=where)
    except ImportError:
        return bases.normal(rows, support=where)


class WeightedSteps:
    r"""Parameter steps with log Z from weighted draws; it stands where ``SVI`` does.

    .. math::
        \ell = \frac1B \sum_i g_\theta(x_i) +
            \log \frac1N \sum_k e^{-g_\theta(y_k) - f_0(y_k) - \log p(y_k)}

    with what is learned of the energy, :math:`g`, and what is not, :math:`f_0`.

    Args:
        model: What is fitted.
        optim: What moves its parameters.
        proposal: Where the draws come from.
        rows: Some of the data, for the constant of the loss; shape ``(N, *event)``.
    """

    def __init__(
        self, model: EnergyModel, optim: FitOptim, proposal: Any, rows: Tensor
    ) -> None:
        self.model, self.optim, self.proposal = model, optim, proposal
        energy = model.energy
        self.draws = WeightedDraws()
        is_large = energy.event_shape.numel() > FEW_DIMENSIONS
        self.pool, self.wanted = (_LARGE_POOL, 0.0) if is_large else (_POOL, _LOW)
        self.pool_seconds = 0.0
        self._start()
        with torch.no_grad():
            self.constant = (energy(rows) - energy.correction(rows)).mean().item()
        model.log_partition.follow_by(energy, self.draws)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def _start(self) -> None:
        """Draw a pool of the proposal, and note how long that takes."""
        watch = Stopwatch()
        self.draws.start(self.model.energy, self.proposal, self.pool)
        self.pool_seconds = watch.seconds

    @property
    def seconds_each(self) -> float:
        """Of a draw and its weight."""
        return self.pool_seconds / self.pool

    def step(self, batch: Tensor) -> float:
        """Take a step down the loss, and return it in nats a point."""
        energy = self.model.energy
        log_weights = self.draws.some(energy, _DRAWS)
        log_partition = log_weights.logsumexp(0) - math.log(_DRAWS)
        loss = energy.correction(batch).mean() + log_partition
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        self.optim(self.parameters)
        self.model.log_partition.follow(energy)
        return loss.item() + self.constant

    def look_afresh(self) -> None:
        """Have log Z from draws that nothing was learned from."""
        self.draws.renew(self.model.energy)

    @torch.no_grad()
    def keeps_up(self) -> bool:
        """Whether enough draws count, if need be those of a nearer proposal."""
        energy, draws = self.model.log_partition.averaged_energy, self.draws
        fraction = draws.effective_fraction(energy)
        if fraction < self.wanted:
            self.wanted = _AGAIN * fraction
            near = self._nearer(energy, fraction)
            if near is not None:
                self.proposal = near
                self._start()
                fraction = draws.effective_fraction(energy)
                self.wanted = min(_LOW, _AGAIN * fraction)
        return fraction >= _LOST

    def _nearer(self, energy: Energy, fraction: float) -> Stack | None:
        """The proposal mixed with a density of its weighted draws, if that helps."""
        try:
            near = _quick(self._smoothed(energy, fraction), energy.support)
        except (ArithmeticError, ValueError):
            return None
        halves = torch.full((2,), 0.5).to(self.draws.x)
        mixed, trial = Stack([self.proposal, near], halves), WeightedDraws()
        trial.start(energy, mixed, _POOL // 4)
        return mixed if trial.effective_fraction(energy) > 2 * fraction else None

    def _smoothed(self, energy: Energy, fraction: float) -> Tensor:
        """Draws of the model by their weights, spread out as kernels about them."""
        flat, to_support = unconstrained(energy)
        u = to_support.inv(self.draws.resampled(energy, 2000))
        number = max(fraction * self.pool, 1.0)
        width = u.std(0) * number ** (-1 / (flat.event_shape.numel() + 4))
        noise = width * torch.randn_like(u)
        if isinstance(flat.support, MixedSupport):
            noise[:, list(flat.support.finite)] = 0
        smoothed: Tensor = to_support(u + noise)
        return smoothed


def chains_instead(num_steps: int) -> Stage:
    """The stage that goes on where importance has failed."""
    return Stage(MaximumLikelihood(), max(1, min(num_steps, _CHAIN_STEPS)))
