r"""Importance sampling of :math:`\log Z` from any normalised distribution.

.. math::
    \hat Z = \frac1N \sum_n w_n, \qquad w_n = e^{-f(x_n)} / p(x_n), \quad x_n \sim p
                                                                           \tag{1}

The standard error is that of :func:`pyro_ebm.diagnostics.pareto.pareto_std_error`; with
it, the interval of :math:`\log Z` is skewed as the weights are,

.. math::
    \left[\log \hat Z - \log(1 + 2 s),\ \log \hat Z - \log(1 - 2 s)\right]   \tag{2}

Measured on 300 runs each of 12 pairs of target and proposal, Gaussian and Student, in 1
to 10 dimensions, with 300, 2,000 and 10,000 draws and tails of shape ``k`` up to 0.7:
(2) covered in 0.93 to 1.0 of all runs, and of those not flagged in 0.92 to 1.0, but for
the settings in which fewer than one run in five is not; the delta method on the raw
weights covered in 0.71 to 0.97. What is heavier should be flagged: it
was in 0.55 to 0.7 of the runs with ``k = 0.8``, of whose other intervals 0.68 to 0.87
covered, in 0.75 to 0.89 with ``k = 0.9`` and in 0.86 to 0.97 with ``k = 0.98``, of
whose other intervals few or none did.

References:
    Vehtari, Simpson, Gelman, Yao & Gabry (2024), Pareto smoothed importance sampling,
    JMLR 25.
"""

__all__ = ["estimate_from_weights", "importance_sampling", "log_weights_of"]

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_ebm.core.verdict import Finding, Reason, status_of
from pyro_ebm.diagnostics import effective_sample_fraction, log_mean_exp
from pyro_ebm.diagnostics.pareto import pareto_k, pareto_std_error
from pyro_ebm.energies import Energy
from pyro_ebm.energies.corrections import shared_support
from pyro_ebm.energies.normalization import require_normalized
from pyro_ebm.energies.views.unconstrained import is_unconstrained, same_support
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.base_check import check_reach, reach_finding
from pyro_ebm.partition.progress import watched

#: Numbers drawn at once.
_CHUNK = 2**22
#: Tail shape beyond which the mean of the weights cannot be trusted.
_MAX_K = 0.7
#: Effective number of draws below which there is no error bar.
_MIN_ESS = 50


@torch.no_grad()
def importance_sampling(
    energy: Energy,
    proposal: dist.TorchDistribution,
    *,
    num_samples: int = 10_000,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` by the mean weight (1) of draws of a proposal.

    A region that the proposal does not reach is missed, and the weights show it only in
    part: their tail is heavy where the proposal is merely too narrow, but a mode at
    which no draw lands leaves no trace in any diagnostic of the draws. Use a proposal
    wider than the target.

    Args:
        energy: On any support.
        proposal: A normalised distribution with ``sample`` and ``log_prob`` over the
            same event: a base, a fitted Gaussian, a flow. Its support is that of the
            energy, or all real numbers: then draws outside have weight zero.
        num_samples: Draws, an energy evaluation each; at least 25, better thousands.
            Over a finite support the check of the proposal takes some more.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate with the 95 % interval (2); ``"unreliable"`` if the shape
        :math:`\hat k` of the tail of the weights exceeds 0.7, or
        :math:`1 - 1 / \log_{10} N` if that is less, the effective sample size is below
        50, an energy is ``nan`` or ``-inf``, or over a finite support the proposal has
        no draws of states that count.

    Raises:
        TypeError: If ``proposal`` is no distribution.
        ValueError: If it does not fit the energy, is not normalised, or ``num_samples``
            is below 25.

    Exactness: *unbiased for Z*, if the proposal covers the support.

    Example:
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> proposal = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        >>> estimate = importance_sampling(energy, proposal)
        >>> estimate.status, abs(estimate.value - 1.8379) < 0.05
        ('ok', True)
    """
    if num_samples < 25:
        raise ValueError(
            f"num_samples must be at least 25 for an error bar, got {num_samples}. "
            "Thousands are better."
        )
    check_proposal(energy, proposal, "proposal")
    chunk = max(1, _CHUNK // energy.event_shape.numel())
    found: list[Tensor] = []
    kept: list[Tensor] = []
    with watched(energy, num_samples, is_shown=progress_bar) as target:
        for count in chunks(num_samples, chunk):
            x = proposal.sample(torch.Size((count,)))
            kept = kept or [x]  # a full chunk, as the last one need not be
            found.append(log_weights_of(target, proposal, x))
    log_weights = torch.cat(found)
    estimate = estimate_from_weights(log_weights, "importance sampling", num_samples)
    share, spent = check_reach(
        energy, lambda x: log_weights_of(energy, proposal, x), kept[0], log_weights
    )
    reasons = (*estimate.reasons, *reach_finding(share))
    spent += num_samples
    return estimate._replace(
        status=status_of(reasons), num_evaluations=spent, reasons=reasons
    )


def log_weights_of(
    energy: Energy, proposal: dist.TorchDistribution, x: Tensor
) -> Tensor:
    r"""Log-weights :math:`-f(x) - \log p(x)`, shape ``(*batch,)``.

    Args:
        energy: :math:`f`.
        proposal: :math:`p`; see :func:`importance_sampling`.
        x: Shape ``(*batch, *event)``.

    Returns:
        ``-inf`` outside of the support of the energy, ``nan`` where the energy is.

    Exactness: *unnormalised*.
    """
    log_density = -energy(x.to(**energy.tensor_options(x)))
    support = support_of(proposal)
    if support is None or not same_support(support, energy.support):
        log_density = log_density.where(energy.support.check(x), -torch.inf)
    return log_density - proposal.log_prob(x).to(log_density)


class _Verdict(NamedTuple):
    k: float
    ess: float
    reasons: list[Finding]


def estimate_from_weights(
    log_weights: Tensor, method: str, num_evaluations: int, num_errors: float = 2.0
) -> LogPartitionEstimate:
    r"""Log of the mean weight with the interval (2) and a verdict.

    Args:
        log_weights: Of independent draws, shape ``(N,)``; ``-inf`` is a weight of zero,
            ``nan`` is taken for one and held against the estimate.
        method: Name of the estimator.
        num_evaluations: What the draws have cost.
        num_errors: Standard errors to each side in (2).

    Returns:
        The estimate, as :func:`importance_sampling` describes it.

    Exactness: *unbiased for Z* if the weights are.
    """
    verdict = judge_weights(log_weights)
    log_weights = log_weights.double().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    value = log_mean_exp(log_weights).item()
    std_error, lower, upper = math.inf, -math.inf, math.inf
    if math.isfinite(value):
        std_error = pareto_std_error(log_weights)
        half = num_errors * std_error
        lower = value - math.log1p(half)  # (2)
        upper = value - math.log1p(-half) if half < 1 else math.inf
    return LogPartitionEstimate(
        value,
        std_error,
        lower,
        upper,
        verdict.ess,
        status_of(verdict.reasons),
        method,
        num_evaluations,
        tuple(verdict.reasons),
    )


def judge_weights(log_weights: Tensor) -> _Verdict:
    """Tail shape, effective number and what speaks against a set of weights.

    Args:
        log_weights: Shape ``(N,)``.
    """
    count = len(log_weights)
    reasons: list[Finding] = []
    num_nan = int(log_weights.isnan().sum())
    if num_nan:
        nan = f"the energy is nan at {num_nan} of {count} draws"
        reasons.append(Finding(Reason.NOT_FINITE, nan))
    clean = log_weights.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    if (clean == torch.inf).any():
        infinite = "the energy is -inf, or the proposal density 0, at a draw"
        reasons.append(Finding(Reason.NOT_FINITE, infinite))
        return _Verdict(math.inf, 0.0, reasons)
    if (clean == -torch.inf).all():
        nowhere = f"the energy is finite at none of {count} draws"
        reasons.append(Finding(Reason.BASE_MISSES, nowhere))
        return _Verdict(math.inf, 0.0, reasons)
    k = pareto_k(clean)
    ess = effective_sample_fraction(clean).item() * count
    # So many draws are too few to see by their tail that it is heavier still.
    max_k = min(_MAX_K, 1 - 1 / math.log10(count))
    if k > max_k:
        heavy = (
            f"the tail of the weights is too heavy: k-hat {k:.2f} exceeds {max_k:.2f}"
            if math.isfinite(k)
            else "a few draws hold all the weight, so that k-hat cannot be fitted"
        )
        reasons.append(Finding(Reason.HEAVY_WEIGHTS, heavy))
    if ess < _MIN_ESS:
        few = f"effective sample size {ess:.1f}, below {_MIN_ESS}"
        reasons.append(Finding(Reason.FEW_EFFECTIVE, few))
    return _Verdict(k, ess, reasons)


def check_proposal(energy: Energy, proposal: dist.TorchDistribution, name: str) -> None:
    """Check that the argument ``name`` can propose points of the energy.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If its batch, event or support does not fit, or it is not
            normalised.
    """
    if not isinstance(proposal, torch.distributions.Distribution):
        raise TypeError(
            f"{name} must be a distribution with sample and log_prob, got "
            f"{type(proposal).__name__}. A zuko flow becomes one when called: flow()."
        )
    require_normalized(proposal, name)
    shapes = tuple(proposal.batch_shape), tuple(proposal.event_shape)
    if shapes != ((), tuple(energy.event_shape)):
        raise ValueError(
            f"{name} must be one distribution over events of shape "
            f"{tuple(energy.event_shape)}, as the energy is; got batch_shape "
            f"{shapes[0]} and event_shape {shapes[1]}. .to_event(n) makes a batch an "
            "event."
        )
    support = support_of(proposal)
    if support is None or same_support(support, energy.support):
        return
    if not is_unconstrained(support):
        raise ValueError(
            f"{name} must have the support of the energy, {energy.support}, or all "
            f"real numbers; got {support}. Map it to the support with "
            "dist.TransformedDistribution."
        )


def support_of(proposal: dist.TorchDistribution) -> Constraint | None:
    """The support, or ``None`` where a distribution, such as a flow, names none."""
    try:
        support: Constraint | None = proposal.support
    except NotImplementedError:
        return None
    if support is None or support is constraints.dependent:
        return None
    return shared_support(support)


def chunks(total: int, size: int) -> list[int]:
    """Sizes, none above ``size``, that add up to ``total``."""
    return [min(size, total - start) for start in range(0, total, size)]
