r"""Generators: densities fitted to an energy, whose weighted draws need no chains.

.. math::
    g(x) = (1 - \epsilon) \sum_{k=1}^{K} \alpha_k\, \mathcal{N}(x; m_k, S_k)
           + \epsilon\, p(x)                                               \tag{1}

with the base :math:`p` as defensive part. The two routes of
:mod:`~pyro_ebm.partition.two_routes`, particles and descents, find where the mass is. A
round fits the mixture to points by their likelihood, which minimises the
Kullback-Leibler divergence from the model to (1), weighs draws of it, and takes its
points from these as soon as enough of them count: resampled, and moved by Hamiltonian
chains, so that no two are the same. The number of components doubles from round to
round as long as more draws count. Draws of the final generator have exact weights

.. math::
    w(x) = e^{-f(x)} / g(x)                                                \tag{2}

whose mean is Z, and none of which exceeds :math:`e^{-f(x)} / \epsilon p(x)`. That is
held against log Z by the two routes: a mode that the generator misses leaves no trace
in its own weights.

References:
    Gilks & Berzuini (2001), JRSS B 63, 127-146 (resample and move).
    Cappé, Douc, Guillin, Marin & Robert (2008), Statistics and Computing 18, 447-459
    (mixtures fitted to weighted draws).
    Hesterberg (1995), Technometrics 37, 185-194 (the defensive part).
"""

__all__ = ["FittedGenerator", "fit_generator", "restored", "saved"]

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint
from tqdm.auto import tqdm

from pyro_ebm import bases
from pyro_ebm.bases.saving import from_state, to_state
from pyro_ebm.bases.stack import Stack
from pyro_ebm.core.stopwatch import Stopwatch
from pyro_ebm.core.verdict import Finding, Reason, Status, in_words, status_of
from pyro_ebm.diagnostics import effective_sample_fraction
from pyro_ebm.energies import Energy
from pyro_ebm.energies.views.unconstrained import is_unconstrained
from pyro_ebm.mcmc.samplers.resampling import weighted_draws
from pyro_ebm.mcmc.tempering.path import real_path
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.importance.importance import (
    check_proposal,
    estimate_from_weights,
    judge_weights,
)
from pyro_ebm.partition.importance.pool import tempered
from pyro_ebm.partition.particles.movers import AdaptiveHMC
from pyro_ebm.partition.progress import Limits
from pyro_ebm.partition.two_routes import two_routes

#: Weight of the base in (1).
_DEFENCE = 0.05
#: Components at most, and rounds without a better generator after which it ends.
_MOST, _PATIENCE = 64, 2
#: Weighted draws of a round, and effective ones for points to be taken from them.
_DRAWS, _ENOUGH = 20_000, 2000
#: Points that a mixture is fitted to, and those for each component of a large one; by
#: how many transitions they are moved; effective points they are taken from at least.
_POINTS, _POINTS_EACH, _MOVES, _EFFECTIVE = 8192, 256, 5, 500
#: Groups of points that are moved by one step size; share of the time in which the
#: mass is found, and the error of log Z that is aimed at.
_GROUPS, _SHARE, _TOLERANCE = 8, 0.5, 0.05
#: What log Z by draws and by two routes may differ by, beyond three errors, in nats.
_SLACK = 0.02
#: Share of the draws that has to count.
_LEAST = 0.1


class FittedGenerator(NamedTuple):
    """A generator, with the efficiency of its draws.

    Attributes:
        distribution: The density (1), a Pyro distribution over the event.
        effective_fraction: Effective part of its draws under their weights (2).
        std_error: Of that.
        log_partition: Log Z by the mean of the weights.
        status: ``"ok"``, or ``"unreliable"`` where less than a tenth of the draws is
            effective, or the weights speak against log Z.
        reasons: The findings that led to it.
        num_components: Of the mixture.
        num_seconds: Seconds that it took.
    """

    distribution: dist.TorchDistribution
    effective_fraction: float
    std_error: float
    log_partition: LogPartitionEstimate
    status: Status
    reasons: tuple[Finding, ...]
    num_components: int
    num_seconds: float

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"ok"``."""
        return self.status.is_reliable

    def __str__(self) -> str:
        """Size, worth and verdict."""
        size = f"a mixture of {self.num_components} normals and the base"
        worth = f"{self.effective_fraction:.3f} +- {self.std_error:.2g} of its draws"
        return (
            f"generator: {size}; {worth} effective "
            f"[{in_words(self.status, self.reasons)}], {self.num_seconds:.1f} s"
        )


@torch.no_grad()
def fit_generator(
    energy: Energy,
    base: dist.TorchDistribution,
    *,
    max_seconds: float = 20.0,
    progress_bar: bool = True,
) -> FittedGenerator:
    """Fit a generator (1) to an energy.

    Args:
        energy: On any continuous support.
        base: A normalised distribution over its events, wider than the energy; mass
            to which no path from its draws leads is missed.
        max_seconds: After which no round begins.
        progress_bar: Whether to show the rounds, if it takes more than a second.

    Returns:
        The best generator of all rounds, judged by fresh draws.

    Raises:
        ImportError: If scikit-learn is not installed.
        NotImplementedError: If the support of the energy is finite.
        ValueError: If the base does not fit the energy, or ``max_seconds`` is not
            positive.
        DivergenceError: If the energy is finite at none of the points.

    Exactness: draws of the generator are *biased* by as much as it differs from the
    energy; with their weights (2) they are *consistent*, and ``log_partition`` is
    *unbiased for Z*.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.ones(3))
        >>> wide = dist.Normal(torch.zeros(3), 3.0).to_event(1)
        >>> found = fit_generator(energy, wide)
        >>> found.status, found.effective_fraction > 0.9
        ('ok', True)
        >>> abs(found.log_partition.value - 2.7568) < 0.01  # 1.5 log(2 pi)
        True
    """
    check_proposal(energy, base, "base")
    if not max_seconds > 0:
        raise ValueError(
            f"max_seconds must be positive, got {max_seconds}. Ten are enough for "
            "most energies of ten dimensions."
        )
    watch, rounds = Stopwatch(), _Rounds(energy, base)
    limits = Limits(_TOLERANCE, _SHARE * max_seconds, None)
    known = rounds.explore(limits, is_shown=progress_bar)
    best, worth, most, waited, number, last = base, (False, -1.0), -1.0, 0, 0, 0.0
    with tqdm(desc="generator", delay=1, disable=not progress_bar) as bar:
        for power in range(int(math.log2(_MOST)) + 1):
            began = watch.seconds
            is_late = number and began + 1.5 * last > max_seconds
            if waited == _PATIENCE or is_late:
                break
            found = rounds.fit(2**power)
            now = (_, fraction) = rounds.weigh(found)
            waited = 0 if fraction > most else waited + 1
            most = max(most, fraction)
            if now > worth:
                best, worth, number = found, now, 2**power
            last = watch.seconds - began
            bar.update()
            bar.set_postfix_str(f"{2**power} normals, {fraction:.3f} effective")
    _, weights = weighted_draws(energy, best, _DRAWS)
    return _judged(best, weights, known, number, watch.seconds)


def saved(generator: Any) -> dict[str, Any]:
    """The mixture of a generator for a ``state_dict``; the base is saved elsewhere."""
    return to_state(generator.parts[1])


def restored(
    state: dict[str, Any], base: dist.TorchDistribution, support: Constraint
) -> dist.TorchDistribution:
    """The generator that was saved, for a base and a support that are given.

    Args:
        state: From :func:`saved`.
        base: The defensive part.
        support: Of the energy.
    """
    where = None if is_unconstrained(support) else support
    return _defended(from_state(state, where), base, state["loc"])


def _defended(
    learned: dist.TorchDistribution, base: dist.TorchDistribution, like: Tensor
) -> dist.TorchDistribution:
    """The mixture (1), of the device and dtype of a tensor that both have."""
    return Stack([base, learned], torch.tensor([_DEFENCE, 1 - _DEFENCE]).to(like))


class _Rounds:
    """Weighted points in unconstrained space, and what is fitted to them."""

    def __init__(self, energy: Energy, base: dist.TorchDistribution) -> None:
        self.energy, self.base = energy, base
        self.path = real_path(energy, base)
        self.move = AdaptiveHMC(self.path, _MOVES, keeps_all=False)
        self.u, self.log_weights = torch.empty(0), torch.empty(0)

    def explore(self, limits: Limits, *, is_shown: bool) -> LogPartitionEstimate:
        """Take draws of a proposal that was fitted to all mass for the points."""
        energy, path = self.energy, self.path
        estimate, proposal = two_routes(energy, self.base, limits, is_shown=is_shown)
        flat = proposal.sample(_DRAWS)
        u = flat.reshape(-1, *path.event_shape).to(**path.target.tensor_options())
        self.u = u
        self.log_weights = -path.target(u) - proposal.log_prob(flat).to(u)
        return estimate

    def fit(self, number: int) -> Any:
        """A generator of ``number`` components, from the points."""
        size = max(_POINTS, _POINTS_EACH * number)
        wanted = min(_EFFECTIVE, len(self.u) / 2)
        weights = tempered(_clean(self.log_weights), wanted).softmax(0)
        u = self.u[torch.multinomial(weights, size, replacement=True)]
        state = self.path.evaluate(u.reshape(_GROUPS, -1, *u.shape[1:]))
        state = self.path.with_finite_chains(state)
        moved = self.move(state, torch.zeros_like(state.target), state, 1.0)
        x = self.path.transform(moved.u.flatten(0, 1))
        support = self.energy.support
        where = None if is_unconstrained(support) else support
        learned = bases.gaussian_mixture(x, number, support=where)
        return _defended(learned, self.base, x)

    def weigh(self, generator: Any) -> tuple[bool, float]:
        """Whether its weights stand, and the effective fraction of its draws.

        The draws become the points if they can. A generator whose weights have a heavy
        tail is worth less than any whose weights have none.
        """
        x, log_weights = weighted_draws(self.energy, generator, _DRAWS)
        fraction = _fraction(log_weights)
        if fraction * _DRAWS > _ENOUGH:
            self.u, self.log_weights = self.path.transform.inv(x), log_weights
        return not judge_weights(log_weights).reasons, fraction


def _clean(log_weights: Tensor) -> Tensor:
    """No weight for what is not finite, and equal ones if that is all."""
    clean = log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    return clean if clean.isfinite().any() else torch.zeros_like(clean)


def _fraction(log_weights: Tensor) -> float:
    return effective_sample_fraction(
        log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    ).item()


def _judged(
    generator: Any,
    log_weights: Tensor,
    known: LogPartitionEstimate,
    number: int,
    seconds: float,
) -> FittedGenerator:
    """Worth and verdict, from draws that the fit has not seen."""
    estimate = estimate_from_weights(log_weights, "generator", len(log_weights))
    fraction = _fraction(log_weights)
    # The error of (mean w)^2 / mean w^2, to first order.
    w = _clean(log_weights).double().softmax(0) * len(log_weights)
    square = w.square().mean()
    spread = (2 * (w - 1) - (w.square() / square - 1)).std()
    error = fraction * spread.item() / math.sqrt(len(w))
    reasons = [*estimate.reasons, *_held_against(estimate, known)]
    if not fraction - 2 * error > _LEAST:
        few = (
            f"{fraction:.3f} +- {error:.2g} of the draws of the generator are "
            f"effective, not surely above {_LEAST}: it is no stand-in for the model. "
            "Give more max_seconds, or draw by chains"
        )
        reasons.append(Finding(Reason.FEW_EFFECTIVE, few))
    return FittedGenerator(
        generator,
        fraction,
        error,
        estimate._replace(num_seconds=seconds),
        status_of(reasons),
        tuple(reasons),
        number,
        seconds,
    )


def _held_against(
    own: LogPartitionEstimate, known: LogPartitionEstimate
) -> list[Finding]:
    """What log Z by the two routes says against that by the draws."""
    if not known.is_reliable:
        alone = f"nothing to hold it against, as two routes are {known.status}"
        return [Finding(Reason.ONE_ROUTE, f"{alone}: {known.reason}")]
    most = 3 * math.hypot(own.std_error, known.std_error) + _SLACK
    if abs(own.value - known.value) <= most:
        return []
    apart = (
        f"log Z is {own.value:.3f} +- {own.std_error:.2g} by draws of the generator "
        f"and {known.value:.3f} +- {known.std_error:.2g} by {known.method}: the "
        "generator misses a part. Give more max_seconds"
    )
    return [Finding(Reason.ROUTES_DISAGREE, apart)]
