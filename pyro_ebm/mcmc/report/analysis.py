"""Samples, moments and diagnostics computed from the state of a run."""

__all__ = ["diagnose", "moments_of", "samples_of", "summarize"]

import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.diagnostics import Convergence, convergence, energy_bfmi
from pyro_ebm.diagnostics.convergence import quantiles
from pyro_ebm.mcmc.base import bias_of
from pyro_ebm.mcmc.report.advice import advise, hole_in_support, starts_in_a_tail
from pyro_ebm.mcmc.report.results import Diagnostics, Moments, verdict
from pyro_ebm.mcmc.report.summary import SiteSummary, Summary
from pyro_ebm.mcmc.run.batch_moments import BatchMoments
from pyro_ebm.mcmc.run.draws import KeptDraws
from pyro_ebm.mcmc.run.driver import ChainRun, step_size_of

#: Points that are mapped to the support at a time.
_CHUNK = 2**17
#: Draws of a chain below which nothing can be said.
_MIN_DRAWS = 4
#: Share of divergent transitions below which their starts are not looked at.
_MIN_DIVERGENT = 0.002
#: Standard deviations of the energy within chains, by which the mean of one is off.
_STRAY = 5.0
_MIN_DRAWS_STRAY = 50


@torch.no_grad()
def samples_of(run: ChainRun) -> dict[str, Tensor]:
    """Values of each site, shape ``(num_chains, num_draws, *site)``.

    Raises:
        RuntimeError: If the draws were not kept.
    """
    if not isinstance(run.draws, KeptDraws):
        raise RuntimeError(
            "there are no samples, since keep_draws is False. moments() and summary() "
            "tell what was kept of them."
        )
    u = run.draws["u"]
    found: dict[str, Tensor] = {}
    size = max(_CHUNK // u.shape[1], 1)
    for first in range(0, len(u), size):
        part = run.target.constrain(u[first : first + size])
        for name, value in part.items():
            if not first:
                shape = (u.shape[1], len(u), *value.shape[2:])
                found[name] = value.new_empty(shape)
            found[name][:, first : first + size] = value.transpose(0, 1)
    return found or _no_samples(run)


def _no_samples(run: ChainRun) -> dict[str, Tensor]:
    sites = run.target.constrain(run.state.x)
    return {name: v.new_empty((len(v), 0, *v.shape[1:])) for name, v in sites.items()}


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
    found = verdict(found, count, (*bias_of(kernel), *narrow))
    if found.is_reliable:
        return found
    if isinstance(run.draws, KeptDraws) and not advice:
        advice = advise(samples_of(run), run.draws["energy"].mT, found)
    return found._replace(reasons=(*found.reasons, *advice))


def _narrow_place(run: ChainRun, share: float) -> list[Finding]:
    """Few divergences tell of a place that was missed, if they start in one tail."""
    if not isinstance(run.draws, KeptDraws):
        return []
    energy, divergent = (run.draws[name].mT for name in ("energy", "divergent"))
    tail = starts_in_a_tail(samples_of(run), energy, divergent)
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
        parts = [_by_site(run, v) for v in run.draws.convergence(run.num_superchains)]
        return {name: Convergence(*(part[name] for part in parts)) for name in parts[0]}
    found = {}
    for name, draws in samples_of(run).items():
        if draws.shape[1] < _MIN_DRAWS:
            nothing = torch.full(draws.shape[2:], torch.nan, device=draws.device)
            found[name] = Convergence(*[nothing] * len(Convergence._fields))
        else:
            found[name] = convergence(draws, run.num_superchains)
    return found


def _by_site(run: ChainRun, columns: Tensor) -> dict[str, Tensor]:
    """Numbers of all sites side by side, ``(D,)``, in the shapes of the sites."""
    shapes = {k: v.shape[1:] for k, v in run.target.constrain(run.state.x[:1]).items()}
    parts = columns.split([shape.numel() for shape in shapes.values()])
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.reshape(shape) for (name, shape), part in named}


def _bfmi_of(run: ChainRun) -> Tensor:
    energy = run.target.energy
    size = energy.event_shape.numel()
    has_momenta = getattr(run.warmup.kernel, "num_gradients", 0) > 0
    if (
        run.draws.num_draws < _MIN_DRAWS
        or energy.support.is_discrete
        or not has_momenta
    ):
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
        mean, variance = (_by_site(run, v) for v in run.draws.mean_and_variance())
    else:
        samples = samples_of(run)
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
    samples = samples_of(run) if isinstance(run.draws, KeptDraws) else {}
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
