r"""Samples, moments and diagnostics of a run, and advice where chains have not mixed.

No advice decides about the verdict: each finding is a statistic of the draws that
tells one cause from the others, and is looked for only where a run is not ok. The
exception are divergent transitions that start in one tail. With :math:`u_i`, the rank
of start :math:`i` among all draws in one coordinate, as a part of them,

.. math::
    e = \frac1n \sum_{i=1}^n |2 u_i - 1|, \qquad
    z = \sqrt{12 n}\, \left(e - \tfrac12\right)                           \tag{1}

is near standard normal if starts are draws like any others. If they are all in a tail
of a coordinate, or of the energy, the chains hardly enter what lies beyond.
"""

__all__ = ["diagnose", "moments_of", "summarize"]

import math
from typing import NamedTuple

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.diagnostics import Convergence, convergence, energy_bfmi
from pyro_ebm.diagnostics.convergence import quantiles
from pyro_ebm.energies.corrections import without_independent
from pyro_ebm.energies.pyro_model.runs import samples as samples_in
from pyro_ebm.mcmc.base import bias_of
from pyro_ebm.mcmc.report.results import MIN_DRAWS, Diagnostics, Moments
from pyro_ebm.mcmc.report.summary import SiteSummary, Summary, coordinate_names
from pyro_ebm.mcmc.run.batch_moments import BatchMoments
from pyro_ebm.mcmc.run.draws import KeptDraws
from pyro_ebm.mcmc.run.driver import ChainRun, step_size_of

#: Share of divergent transitions below which their starts are not looked at.
_MIN_DIVERGENT = 0.002
#: Standard deviations of the energy within chains, by which the mean of one is off.
_STRAY = 5.0
_MIN_DRAWS_STRAY = 50
#: Draws of all chains together that are looked at.
_MAX_DRAWS = 8192
#: Draws of a chain below which its group is looked at instead, and of that nothing.
_MIN_DRAWS_CHAIN, _MIN_DRAWS_LATER = 20, 10
#: Coordinates beyond which correlations are not looked at, as the table has D**2.
_MAX_COORDINATES = 512
#: Chains whose mean energy is so many standard deviations above the median one's.
_FAR = 4.0
#: Fall of the energy between two halves, in its standard deviations, of a chain that is
#: on its way; it is 1.7 on a straight line.
_FALLING = 1.0
#: Gap between chains, in standard deviations within them, that makes two places, and
#: how many of these there may be.
_GAP, _MAX_PLACES = 4.0, 8
#: Rows that a place has on average, at least.
_MIN_ROWS = 2
#: Part of its transitions in which a row moves, if it is not stuck.
_MIN_MOVES = 0.05
#: Coordinates of a vector that can be a funnel.
_MIN_FUNNEL = 4
#: Posterior correlation that a diagonal metric cannot undo.
_COLLINEAR = 0.99
#: Correlation of log scale and log spread above which the data hardly tell them apart.
_FUNNEL = 0.7
#: R-hat of chains that are nowhere together.
_PARTED = 1.5
#: Distinct starts, and chains that have any, below which nothing is said.
_MIN_STARTS, _MIN_CHAINS = 8, 3
#: Least (1) of starts that are in a tail, and its least score for one coordinate.
_TAIL, _MIN_SCORE = 0.8, 4.0
#: Part of the points among the draws at which an infinite energy is no accident.
_HOLE = 0.05


def diagnose(run: ChainRun) -> Diagnostics:
    """Compute all diagnostics of a run, with the verdict."""
    tally, kernel = run.tally, run.warmup.kernel
    count = max(tally.num_transitions, 1)
    found = Diagnostics(
        sites=_convergence_of(run),
        accept_prob=tally.accept_prob.mean().item() / count,
        step_size=float(step_size_of(kernel)),
        num_divergences=int(tally.divergent.sum()),
        num_stuck=int(run.is_stuck().sum()),
        energy_bfmi=_bfmi_of(run),
        num_chains=len(run.state.energy),
        num_draws=run.draws.num_draws,
        num_superchains=run.num_superchains,
        num_moved=run.num_moved,
        num_stray=_num_stray(run),
        dtype=run.state.energy.dtype,
        non_centred=run.target.non_centred,
    )
    share = found.num_divergences / (found.num_chains * count)
    is_looked_at = share >= _MIN_DIVERGENT and not run.target.energy.support.is_discrete
    advice = hole_in_support(_among_the_draws(run)) if is_looked_at else []
    narrow = _narrow_place(run, share) if is_looked_at and not advice else []
    found = found.judged(count, (*bias_of(kernel), *narrow))
    if found.is_reliable:
        return found
    advice = _unbounded(run, found) or advice
    if isinstance(run.draws, KeptDraws) and not advice:
        advice = advise(run.samples(), run.draws["energy"].mT, found)
    return found._replace(reasons=(*found.reasons, *advice))


def _unbounded(run: ChainRun, found: Diagnostics) -> list[Finding]:
    """Sites of a flat prior in which chains have parted or have gone to infinity."""
    if run.target.model is None or found.num_draws < MIN_DRAWS:
        return []
    names = [
        repr(name)
        for name, site in samples_in(run.target.model.run())
        if isinstance(without_independent(site["fn"]), ImproperUniform)
        and name in found.sites
        and not (found.sites[name].r_hat.nan_to_num(torch.inf) < _PARTED).all()
    ]
    if not names:
        return []
    return [
        Finding(
            Reason.DIVERGENT,
            f"the prior of {' and '.join(names)} is flat, and chains are nowhere "
            "together: if the data give it no end, there is no posterior. Give a "
            "proper prior",
        )
    ]


def _narrow_place(run: ChainRun, share: float) -> list[Finding]:
    """Few divergences tell of a place that was missed, if they start in one tail."""
    if not isinstance(run.draws, KeptDraws):
        return []
    energy, divergent = (run.draws[name].mT for name in ("energy", "divergent"))
    tail = starts_in_a_tail(run.samples(), energy, divergent)
    if not tail:
        return []
    return [
        Finding(
            Reason.DIVERGENCES,
            f"divergent transitions, {share:.2%} of all, start at {tail}, beyond which "
            "chains hardly get: raise target_accept_prob to 0.95 or above",
        )
    ]


def _among_the_draws(run: ChainRun) -> Tensor:
    """Energies at the chains' points, each moved by the difference of two others."""
    x = run.state.x
    x = x + x.roll(1, 0) - x.roll(2, 0)
    return run.warmup.kernel.init(run.target.energy, x).energy


def _convergence_of(run: ChainRun) -> dict[str, Convergence]:
    if isinstance(run.draws, BatchMoments):
        parts = [run.by_site(v) for v in run.draws.convergence(run.num_superchains)]
        return {name: Convergence(*(part[name] for part in parts)) for name in parts[0]}
    found = {}
    for name, draws in run.samples().items():
        if draws.shape[1] < MIN_DRAWS:
            nothing = torch.full(draws.shape[2:], torch.nan, device=draws.device)
            found[name] = Convergence(*[nothing] * len(Convergence._fields))
        else:
            found[name] = convergence(draws, run.num_superchains)
    return found


def _bfmi_of(run: ChainRun) -> Tensor:
    energy = run.target.energy
    size = energy.event_shape.numel()
    has_momenta = getattr(run.warmup.kernel, "num_gradients", 0) > 0
    if run.draws.num_draws < MIN_DRAWS or energy.support.is_discrete or not has_momenta:
        return torch.full_like(run.state.energy, torch.nan)
    if isinstance(run.draws, KeptDraws):
        return energy_bfmi(run.draws["energy"].mT, size)
    return size / (run.draws.energy_variance() + size / 2)


def _num_stray(run: ChainRun) -> int:
    if run.draws.num_draws < _MIN_DRAWS_STRAY:
        return 0
    if isinstance(run.draws, KeptDraws):
        variance, mean = torch.var_mean(run.draws["energy"].double(), 0)
    else:
        variance, mean = run.draws.energy_variance(), run.draws.energy_mean()
    off = (mean - mean.median()).abs()
    spread = torch.maximum(variance.median().sqrt(), 1.5 * off.median())
    return int((off > _STRAY * spread).sum())


def moments_of(run: ChainRun, found: Diagnostics) -> dict[str, Moments]:
    """Mean and variance of each site, with errors."""
    if isinstance(run.draws, BatchMoments):
        mean, variance = (run.by_site(v) for v in run.draws.mean_and_variance())
    else:
        samples = run.samples()
        mean = {name: v.mean((0, 1)) for name, v in samples.items()}
        variance = {name: v.var((0, 1)) for name, v in samples.items()}
    return {
        name: Moments(mean[name], variance[name], c.mean_std_error, c.sd_std_error)
        for name, c in found.sites.items()
    }


def summarize(run: ChainRun, found: Diagnostics, prob: float) -> Summary:
    """The table of all sites, with a central interval of probability ``prob``."""
    if not 0 < prob < 1:
        raise ValueError(f"prob must be between 0 and 1, got {prob}.")
    probs = (0.5, (1 - prob) / 2, (1 + prob) / 2)
    samples = run.samples() if isinstance(run.draws, KeptDraws) else {}
    sites = {}
    for name, moments in moments_of(run, found).items():
        checks, draws = found.sites[name], samples.get(name)
        median, lower, upper = (_quantile(draws, p, moments.mean) for p in probs)
        sites[name] = SiteSummary(
            moments.mean,
            moments.variance.sqrt(),
            moments.mean_std_error,
            median,
            lower,
            upper,
            checks.bulk_ess,
            checks.tail_ess,
            found.r_hat(name),
        )
    return Summary(sites, prob, found)


def _quantile(draws: Tensor | None, prob: float, like: Tensor) -> Tensor:
    if draws is None or draws.shape[0] * draws.shape[1] < 2:
        return torch.full_like(like, torch.nan)
    rows = draws.reshape(*draws.shape[:2], -1).movedim(2, 0)
    return quantiles(rows, prob).reshape(like.shape)


# Likely causes, and what to change -------------------------------------------------


class _Rows(NamedTuple):
    """The later draws, of each chain, or of each group where these are few.

    Attributes:
        energy: Shape ``(U, M)``.
        values: Of all sites side by side, shape ``(U, M, D)``.
        names: Of the coordinates.
        units: What a row is: ``"64 chains"``.
    """

    energy: Tensor
    values: Tensor
    names: list[str]
    units: str


@torch.no_grad()
def advise(
    samples: dict[str, Tensor], energy: Tensor, found: Diagnostics
) -> list[Finding]:
    """Find likely causes of poor mixing in the draws.

    Args:
        samples: Of each site, shape ``(C, N, *site)``.
        energy: Shape ``(C, N)``.
        found: Of a run that is not ok.
    """
    rows = _later_rows(samples, energy, found)
    if rows.energy.shape[1] < _MIN_DRAWS_LATER:
        return []
    if not (rows.energy.isfinite().all() and rows.values.isfinite().all()):
        return []
    is_far = _is_far(rows.energy)
    if _is_falling(rows.energy, is_far):
        return [_not_arrived(rows, is_far)]
    near = rows._replace(values=rows.values[~is_far])
    findings = _separate(rows) or _funnels(near, samples, found)
    if not findings and is_far.any():
        return [_not_arrived(rows, is_far)]
    return findings or _collinear(near)


def _later_rows(
    samples: dict[str, Tensor], energy: Tensor, found: Diagnostics
) -> _Rows:
    """The later half of each chain, thinned."""
    num_chains, num_draws = energy.shape
    most = max(_MAX_DRAWS // num_chains, _MIN_DRAWS_CHAIN)
    by_chain = num_draws // 2 >= _MIN_DRAWS_CHAIN
    late = slice(num_draws // 2, None, max(num_draws // 2 // most, 1))
    columns = [v[:, late, ..., None].double().flatten(2) for v in samples.values()]
    rows, values = energy[:, late].double(), torch.cat(columns, -1)
    units = f"{num_chains:,} chains"
    if not by_chain:
        rows, values = _by_group(rows, found), _by_group(values, found)
        kind = " groups of chains" if found.is_nested else " chains"
        units = f"{found.num_superchains:,}{kind}"
    names = [n for k, v in samples.items() for n in coordinate_names(k, v.shape[2:])]
    return _Rows(rows, values, names, units)


def _by_group(values: Tensor, found: Diagnostics) -> Tensor:
    """``(C, N, ...)`` as ``(G, N * C / G, ...)``."""
    groups = values.unflatten(0, (found.num_superchains, -1))
    return groups.transpose(1, 2).flatten(1, 2)


def _is_far(energy: Tensor) -> Tensor:
    """Rows that lie far above the others, shape ``(U,)``."""
    mean, sd = energy.mean(1), energy.std(1)
    return mean > mean.median() + _FAR * sd.median()


def _is_falling(energy: Tensor, is_far: Tensor) -> bool:
    """Whether most of the far rows are on their way down."""
    far = energy[is_far]
    if not len(far):
        return False
    half = far.shape[1] // 2
    fall = far[:, :half].mean(1) - far[:, -half:].mean(1)
    fall = (fall / far.std(1)).nan_to_num(0.0)
    return bool(fall.median() > _FALLING)


def _not_arrived(rows: _Rows, is_far: Tensor) -> Finding:
    mean = rows.energy.mean(1)
    above = (mean[is_far].min() - mean.median()).item()
    return Finding(
        Reason.CHAINS_BEHIND,
        f"{int(is_far.sum())} of {rows.units} did not arrive where the others are, "
        f"{above:.3g} nats and more below in energy: give more warmup_steps, or "
        "initial points nearer to the bulk",
    )


def _separate(rows: _Rows) -> list[Finding]:
    """Rows in places that they hardly leave, by the coordinate that shows it best."""
    moves = (rows.energy.diff(dim=1) != 0).double().mean(1) > _MIN_MOVES
    values = rows.values[moves]
    if len(values) < 2 * _MIN_ROWS:
        return []
    along, name = _principal(values)
    ordered = torch.cat([values, along], -1).sort(1).values
    count = ordered.shape[1]
    # A row that was elsewhere for a short time has the median of where it stays.
    middle = ordered[:, count // 2]
    spread = (ordered[:, 3 * count // 4] - ordered[:, count // 4]) / 1.349
    column, cuts = _cuts(middle, spread)
    if not cuts:
        return []
    shown = column if column < values.shape[-1] else name
    order = middle[:, column].argsort()
    parts = middle[order, shown].tensor_split(cuts)
    places = sorted((part.mean().item(), len(part)) for part in parts)
    around = " and ".join(f"{place:.3g} ({count})" for place, count in places)
    return [
        Finding(
            Reason.SEPARATE_MODES,
            f"the {rows.units} are in {len(parts)} places that they hardly leave, "
            f"{rows.names[shown]} around {around}: for separate modes take "
            "mcmc.ReplicaExchange",
        )
    ]


def _principal(values: Tensor) -> tuple[Tensor, int]:
    """The direction in which rows differ most, ``(U, M, 1)``, and its main coordinate.

    Modes that are far from each other may be near in each coordinate.
    """
    if values.shape[-1] > _MAX_COORDINATES or values.shape[-1] < 2:
        return values[..., :0], 0
    scale = values.std(1).median(0).values
    whitened = (values - values.mean((0, 1))) / scale.clamp(min=1e-300)
    whitened = torch.where(scale > 0, whitened, 0.0)
    _, _, axes = torch.linalg.svd(whitened.mean(1), full_matrices=False)
    return whitened @ axes[0, :, None], int(axes[0].abs().argmax())


def _cuts(middle: Tensor, spread: Tensor) -> tuple[int, list[int]]:
    """The column with the widest gap, and where its sorted rows are to be cut.

    Args:
        middle: Medians of the rows, shape ``(U, D)``.
        spread: Standard deviations within them, shape ``(U, D)``.
    """
    middle, order = middle.sort(0)
    spread, gaps = spread.gather(0, order), middle.diff(dim=0)
    widest = gaps.argmax(0)
    is_left = torch.arange(len(middle), device=widest.device)[:, None] <= widest
    sides = (spread.where(side, torch.nan) for side in (is_left, ~is_left))
    scale = torch.stack([side.nanmedian(0).values for side in sides]).amax(0)
    ratio = (gaps.amax(0) / scale).nan_to_num(0.0, 0.0, 0.0)
    column = int(ratio.argmax())
    is_cut = gaps[:, column] > _GAP * scale[column]
    cuts = (is_cut.nonzero().squeeze(-1) + 1).tolist()
    # As many places as rows are chains that hardly move, no modes; wide places too.
    if not cuts or len(cuts) + 1 > min(len(middle) / _MIN_ROWS, _MAX_PLACES):
        return column, []
    parts = middle[:, column].tensor_split(cuts)
    width = max(part.max() - part.min() for part in parts)
    return column, cuts if width < gaps[is_cut, column].max() else []


def _collinear(rows: _Rows) -> list[Finding]:
    values, names = rows.values, rows.names
    if values.shape[-1] > _MAX_COORDINATES:
        return []
    centred = (values - values.mean(1, keepdim=True)).flatten(0, 1)
    correlation = torch.corrcoef(centred.mT).reshape(len(names), -1).nan_to_num(0.0)
    # What is 1 up to rounding is one coordinate twice, as in a symmetric matrix.
    size = correlation.tril(-1).abs()
    size[size > 1 - 1e-9] = 0.0
    largest = int(size.argmax())
    first, second = divmod(largest, len(names))
    if size.flatten()[largest] <= _COLLINEAR:
        return []
    value = correlation[first, second].item()
    return [
        Finding(
            Reason.COLLINEAR,
            f"{names[second]} and {names[first]} correlate at {value:.4f}: center what "
            "multiplies one of them, as x - x.mean() of a slope and an intercept",
        )
    ]


def _funnels(
    rows: _Rows, samples: dict[str, Tensor], found: Diagnostics
) -> list[Finding]:
    """Coordinates, or their logarithms, that the spread of another site follows."""
    parts = rows.values.split([v[0, 0].numel() for v in samples.values()], -1)
    if len(parts) == 1:
        return _own_funnel(rows)
    sites, findings = dict(zip(samples, parts, strict=True)), []
    for scale, values in sites.items():
        is_scale = bool((values > 0).all())
        for site, others in sites.items():
            is_done = site in found.non_centred
            if is_done or site == scale or others.shape[-1] < 3:
                continue
            heights = values.log() if is_scale else values
            pair = [heights, others.std(-1, keepdim=True).log()]
            centred = torch.cat([v - v.mean(1, keepdim=True) for v in pair], -1)
            table = torch.corrcoef(centred.flatten(0, 1).mT).nan_to_num(0.0)
            best = int(table[-1, :-1].argmax())
            if table[-1, best] > _FUNNEL:
                names = list(coordinate_names(scale, found.sites[scale].r_hat.shape))
                size = table[-1, best].item()
                findings.append(_funnel(site, names[best], size, is_scale=is_scale))
    return findings


def _funnel(site: str, name: str, size: float, *, is_scale: bool) -> Finding:
    follows, scale = f"their logarithms correlate at {size:.2f}", name
    if not is_scale:
        follows = f"its logarithm and {name} correlate at {size:.2f}"
        scale = f"its scale exp(... {name})"
    return Finding(
        Reason.FUNNEL,
        f"the spread of {site!r} follows {name} ({follows}), a funnel: try a "
        f"non-centred form, {site} = location + {scale} * z, by "
        "pyro.infer.reparam.LocScaleReparam",
    )


def _own_funnel(rows: _Rows) -> list[Finding]:
    """A coordinate of a vector that the spread of the other coordinates follows."""
    values = rows.values.flatten(0, 1)
    if not _MIN_FUNNEL <= values.shape[1] <= _MAX_COORDINATES:
        return []
    centred = values - values.median(0).values
    square = (centred / centred.abs().median(0).values).square()
    spread = (square.sum(1, keepdim=True) - square).log() / 2  # of the others
    pair = [v - v.mean(0) for v in (values, spread)]
    common = (pair[0] * pair[1]).mean(0)
    first, second = (v.square().mean(0) for v in pair)
    table = (common / (first * second).sqrt()).nan_to_num(0.0)
    best = int(table.abs().argmax())
    if table[best].abs() <= _FUNNEL:
        return []
    slope, name = (common / first)[best].item(), rows.names[best]
    return [
        Finding(
            Reason.FUNNEL,
            f"the spread of the other coordinates follows {name} (its logarithm "
            f"correlates at {table[best].item():.2f}), a funnel: try a non-centred "
            f"form, in which the others are exp({slope:.2g} * {name}) * z",
        )
    ]


@torch.no_grad()
def starts_in_a_tail(
    samples: dict[str, Tensor], energy: Tensor, divergent: Tensor
) -> str:
    """Find the tail in which divergent transitions start; empty if there is none.

    Args:
        samples: Of each site, shape ``(C, N, *site)``.
        energy: Shape ``(C, N)``.
        divergent: Whether the transition to a draw was, which then stayed where it
            had started; shape ``(C, N)``.
    """
    chains, times = _distinct(energy, divergent)
    if len(chains) < _MIN_STARTS or len(chains.unique()) < _MIN_CHAINS:
        return ""
    names, extremes, sides = ["the energy"], *_ranks(energy, chains, times)
    for site, draws in samples.items():
        names += coordinate_names(site, draws.shape[2:])
        more = _ranks(draws, chains, times)
        extremes, sides = torch.cat([extremes, more[0]]), torch.cat([sides, more[1]])
    best = int(extremes.argmax())
    score = math.sqrt(12 * len(chains)) * (extremes[best].item() - 0.5)  # (1)
    least = math.sqrt(_MIN_SCORE**2 + 2 * math.log(len(names)))
    if extremes[best] < _TAIL or score < least:
        return ""
    side, end = sides[best].item(), "both ends"
    if abs(side - 0.5) > 0.2:
        end = "the upper end" if side > 0.5 else "the lower end"
    return f"{end} of {names[best]}"


def _distinct(energy: Tensor, divergent: Tensor) -> tuple[Tensor, Tensor]:
    """Chains and times of the starts, each of which counts once.

    A chain comes back to no point, and so has one energy only where it has stayed.
    """
    chains, times = divergent.nonzero().unbind(1)
    points = torch.stack([chains.to(energy), energy[chains, times]], 1)
    _, number = points.unique(dim=0, return_inverse=True)
    count = int(number.max()) + 1 if len(number) else 0
    some = number.new_zeros(count).scatter_(
        0, number, torch.arange(len(number), device=number.device)
    )
    return chains[some], times[some]


def _ranks(draws: Tensor, chains: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (1) and mean rank of the starts in each coordinate, shape ``(D,)``."""
    columns = draws.reshape(*draws.shape[:2], -1)
    rows = columns.flatten(0, 1)
    some = rows[:: -(-len(rows) // _MAX_DRAWS)].mT.contiguous().sort(1).values
    starts = columns[chains, times].mT.contiguous()
    low, high = (torch.searchsorted(some, starts, right=r) for r in (False, True))
    ranks = (low + high) / (2.0 * some.shape[1])
    return (2 * ranks - 1).abs().mean(1), ranks.mean(1)


def hole_in_support(energy: Tensor) -> list[Finding]:
    """Find out whether the density is zero inside the support.

    Args:
        energy: At points among the draws.
    """
    share = 1 - energy.isfinite().double().mean().item()
    if share < _HOLE:
        return []
    return [
        Finding(
            Reason.ZERO_DENSITY,
            f"the density is zero at {share:.0%} of the points among the draws, inside "
            "the support, where no gradient leads away: sample on the support alone, "
            "as Uniform(max(y), ...) for a bound of the data y",
        )
    ]
