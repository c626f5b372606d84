r"""Bridge sampling: :math:`\log Z` from draws of the target and of a proposal.

With draws of two unnormalised densities :math:`q_1, q_2`,
:math:`\ell = \log q_2 - \log q_1` and sample sizes :math:`n_1, n_2`, the ratio
:math:`c = \log Z_2 - \log Z_1` solves

.. math::
    \sum_{x \sim q_1} \sigma(\ell(x) - m) =
    \sum_{x \sim q_2} \sigma(m - \ell(x)), \qquad
    m = c + \log n_1 - \log n_2                                            \tag{1}

with the logistic function :math:`\sigma`. It has the least variance of all estimators
that average a function of the draws of either side,

.. math::
    \mathrm{Var}(\hat c) \approx \sum_{k=1}^2 \frac{\mathrm{Var}(t_k)}{n_k E(t_k)^2},
    \qquad t_1 = \sigma(\ell - m),\ t_2 = \sigma(m - \ell)                  \tag{2}

where :math:`n_k` is the effective sample size of correlated draws. The overlap

.. math::
    o = \int \frac{p_1 p_2}{\pi_1 p_1 + \pi_2 p_2}\, dx = E(t_1) / \pi_2, \qquad
    \pi_k = n_k / (n_1 + n_2)                                              \tag{3}

is 1 for equal densities and 0 for disjoint ones. If the draws are what they are said to
be, (1) is the fit of a logistic regression whose slope on :math:`\ell` is one; the
score statistic of the slope tests that.

References:
    Bennett (1976), Journal of Computational Physics 22, 245-268.
    Meng & Wong (1996), Statistica Sinica 6, 831-860.
    Fruehwirth-Schnatter (2004), Econometrics Journal 7, 143-167 (equation 2).
    Shirts, Bair, Hooker & Pande (2003), Physical Review Letters 91, 140601.
    Shirts (2013), J. Chem. Theory Comput. 9, 909-926 (the test of the slope).
"""

__all__ = ["BennettRatio", "bennett", "bridge_sampling"]

import math
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.mcmc.base import placed_like
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.importance import check_proposal, log_weights_of

#: Overlap (3), and effective number of draws in it, below which there is no error bar.
_MIN_OVERLAP = 0.01
_MIN_SHARED = 30
#: Standard errors that are too many.
_MAX_Z = 4.0


class BennettRatio(NamedTuple):
    r"""What :func:`bennett` found.

    Attributes:
        log_ratio: :math:`\log Z_2 - \log Z_1`.
        std_error: Its asymptotic standard error (2).
        overlap: (3), from 0 to 1.
        num_shared: Effective number of draws, on the side that has fewer, that lie
            where the densities overlap.
        slope_z: Score statistic for a slope of one; standard normal if the draws are
            those of the two densities.
        reason: Why the numbers cannot be trusted; empty if nothing speaks against them.
    """

    log_ratio: float
    std_error: float
    overlap: float
    num_shared: float
    slope_z: float
    reason: str


@torch.no_grad()
def bennett(
    log_ratio_at_first: Tensor,
    log_ratio_at_second: Tensor,
    *,
    ess_first: float | None = None,
    ess_second: float | None = None,
) -> BennettRatio:
    r"""Solve (1) for the log ratio of two partition functions.

    Args:
        log_ratio_at_first: :math:`\log q_2 - \log q_1` at draws of the first density,
            shape ``(n_1,)``; ``-inf`` where the second is zero.
        log_ratio_at_second: The same at draws of the second density, shape ``(n_2,)``;
            ``inf`` where the first is zero.
        ess_first: Effective number of the first draws; default: they are independent.
        ess_second: The same of the second.

    Raises:
        ValueError: If there are fewer than two draws of either, or a ``nan``.

    Exactness: *consistent*.

    Example:
        >>> _ = torch.manual_seed(0)  # exp(-x^2 / 2) and exp(-(x - 1)^2 / 2)
        >>> x, y = torch.randn(4000), 1 + torch.randn(4000)
        >>> ratio = bennett(x - 0.5, y - 0.5)
        >>> abs(ratio.log_ratio) < 4 * ratio.std_error, ratio.reason
        (True, '')
    """
    first = _checked(log_ratio_at_first, "log_ratio_at_first")
    second = _checked(log_ratio_at_second, "log_ratio_at_second")
    n_1 = min(ess_first or math.inf, len(first))
    n_2 = min(ess_second or math.inf, len(second))
    middle = _solve(first, second, n_1, n_2)
    log_ratio = middle - math.log(n_1) + math.log(n_2)
    if not math.isfinite(middle):
        reason = "no draw of either density lies where the other is positive"
        return BennettRatio(log_ratio, math.inf, 0.0, 0.0, math.nan, reason)
    t_1, t_2 = (first - middle).sigmoid(), (middle - second).sigmoid()
    variance = _relative_variance(t_1) / n_1 + _relative_variance(t_2) / n_2  # (2)
    overlap = t_1.mean().item() * (n_1 + n_2) / n_2  # (3)
    num_shared = min(
        n / len(t) * (t.sum() ** 2 / t.square().sum()).item()
        for t, n in ((t_1, n_1), (t_2, n_2))
    )
    slope_z = _slope_z(first - middle, second - middle, n_1, n_2)
    reason = _reason(overlap, num_shared, slope_z)
    return BennettRatio(
        log_ratio, math.sqrt(variance), overlap, num_shared, slope_z, reason
    )


@torch.no_grad()
def bridge_sampling(
    energy: Energy,
    draws: Tensor,
    *,
    proposal: Literal["gaussian", "student"] | dist.TorchDistribution = "gaussian",
    num_proposal_draws: int | None = None,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` from draws of the target, by the bridge to a proposal.

    The proposal is fitted to one half of the draws in unconstrained space, and the
    bridge is built with the other half; then the halves change places. The value is the
    mean of the two.

    Nothing is learned of a region where the draws have never been, unless the proposal
    reaches it. The draws then fail the test of the slope.

    Args:
        energy: On any support that ``biject_to`` knows.
        draws: Draws of :math:`e^{-f}` in time order, shape ``(N, *event)`` if they are
            independent, ``(C, N, *event)`` from ``C`` chains, whose autocorrelation is
            then accounted for.
        proposal: A full Gaussian, a multivariate Student t with 5 degrees of freedom
            for heavier tails, or a normalised distribution of your own over the
            energy's event, such as a base or a flow; fit it to other draws than these.
        num_proposal_draws: Energy evaluations at draws of the proposal; default: as
            many as there are draws.

    Returns:
        The estimate; ``"unreliable"`` if the overlap is poor, the draws are not those
        of the target as far as the proposal can tell, or the two halves disagree.

    Raises:
        ValueError: If the draws are too few, of another event shape, or at points of
            infinite energy.

    Exactness: *consistent*, if the draws are those of the target.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(3))
        >>> estimate = bridge_sampling(energy, torch.randn(2000, 3))
        >>> estimate.status, abs(estimate.value - 2.7568) < 0.01
        ('ok', True)
    """
    bridge = _Bridge(energy, draws, proposal)
    count = num_proposal_draws or bridge.num_draws
    if count < 4:
        raise ValueError(f"num_proposal_draws must be at least 4, got {count}.")
    halves = [bridge.cross(fit, count // 2) for fit in (0, 1)]
    value = sum(h.log_ratio for h in halves) / 2
    std_error = math.hypot(*(h.std_error for h in halves)) / 2
    reasons = list(dict.fromkeys(h.reason for h in halves if h.reason))
    apart = abs(halves[0].log_ratio - halves[1].log_ratio)
    # The two have standard error 2 * std_error between them.
    if not apart < 3 * max(2 * std_error, 1e-3):
        reasons.append(f"the two halves of the draws differ by {apart:.2g} nats")
    if bridge.num_nan:
        reasons.append(f"the energy is nan at {bridge.num_nan} draws of the proposal")
    return LogPartitionEstimate(
        value,
        std_error,
        value - 1.96 * std_error,
        value + 1.96 * std_error,
        min(h.num_shared for h in halves),
        "unreliable" if reasons else "ok",
        f"bridge sampling, {bridge.name} proposal",
        bridge.num_evaluations,
        "; ".join(reasons),
    )


class _Bridge:
    """The draws in unconstrained space, in two halves, and what can be built on them."""

    def __init__(self, energy: Energy, draws: Tensor, proposal: Any) -> None:
        chain_dim = draws.dim() - energy.event_dim
        if chain_dim not in (1, 2) or draws.shape[chain_dim:] != energy.event_shape:
            raise ValueError(
                f"draws must have shape (N, *event) or (C, N, *event) with event "
                f"{tuple(energy.event_shape)}, as the energy has; got "
                f"{tuple(draws.shape)}."
            )
        if draws.shape[chain_dim - 1] < 8:
            raise ValueError(
                f"draws must hold at least 8 a chain, got "
                f"{draws.shape[chain_dim - 1]}. Hundreds are better."
            )
        if isinstance(proposal, str) and proposal not in ("gaussian", "student"):
            raise ValueError(
                'proposal must be "gaussian", "student" or a distribution, got '
                f"{proposal!r}."
            )
        self.is_fitted = isinstance(proposal, str)
        self.name = proposal if self.is_fitted else type(proposal).__name__
        self.proposal = proposal
        self.energy, transform = unconstrained(energy)
        x = placed_like(energy, draws.detach())
        if not self.is_fitted:
            check_proposal(energy, proposal, "proposal")
            self.energy = energy
        else:
            x = transform.inv(x)
        self.event_shape = self.energy.event_shape
        self.by_chain = x if chain_dim == 2 else x[None]
        self.is_correlated = chain_dim == 2
        self.num_draws = draws.shape[:chain_dim].numel()
        self.num_evaluations = self.num_nan = 0

    def half(self, index: int) -> Tensor:
        """One half of each chain, shape ``(C, N / 2, *event)``."""
        middle = self.by_chain.shape[1] // 2
        return self.by_chain[:, middle:] if index else self.by_chain[:, :middle]

    def cross(self, fit: int, count: int) -> BennettRatio:
        """Bridge the half that is not ``fit`` to the proposal fitted to ``fit``."""
        proposal = self.proposal
        if self.is_fitted:
            proposal = fitted(self.half(fit), self.name, self.event_shape)
        own = self.half(1 - fit)
        at_target = log_weights_of(self.energy, proposal, own)
        there = proposal.sample(torch.Size((count,)))
        at_proposal = log_weights_of(self.energy, proposal, there)
        self.num_evaluations += at_target.numel() + count
        self.num_nan += int(at_proposal.isnan().sum())
        if (at_target.isnan() | (at_target == -torch.inf)).any():
            raise ValueError(
                "draws must have finite energy, and some have not. They are no draws "
                "of this energy: check that both belong together."
            )
        at_proposal = at_proposal.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        # First the proposal, with partition function 1, then the target.
        ratio = bennett(at_proposal, at_target.flatten())
        if not self.is_correlated or not math.isfinite(ratio.log_ratio):
            return ratio
        shared = (ratio.log_ratio - at_target).sigmoid()
        ess = chains_ess(shared)
        return bennett(at_proposal, at_target.flatten(), ess_second=ess)


def fitted(u: Tensor, family: str, event_shape: torch.Size) -> dist.TorchDistribution:
    """A Gaussian or Student t with the mean and covariance of draws.

    Args:
        u: Draws, shape ``(*batch, *event)``.
        family: ``"gaussian"`` or ``"student"``.
        event_shape: Of the energy.
    """
    flat = u.reshape(-1, event_shape.numel())
    count, dim = flat.shape
    loc = flat.mean(0)
    covariance = (flat - loc).mT @ (flat - loc) / (count - 1)
    # With few draws a dimension only the variances can be had.
    shrink = min(1.0, dim / count)
    variance = covariance.diagonal().clamp(min=torch.finfo(u.dtype).tiny ** 0.5)
    covariance = (1 - shrink) * covariance + shrink * variance.diag_embed()
    factor, info = torch.linalg.cholesky_ex(covariance)
    factor = factor if info == 0 else variance.sqrt().diag_embed()
    vector: dist.TorchDistribution
    if family == "gaussian":
        vector = dist.MultivariateNormal(loc, scale_tril=factor, validate_args=False)
    else:
        df = torch.tensor(5.0).to(u)
        scale = factor * ((df - 2) / df).sqrt()
        vector = dist.MultivariateStudentT(df, loc, scale, validate_args=False)
    if event_shape == flat.shape[-1:]:
        return vector
    reshape = dist.transforms.ReshapeTransform(flat.shape[-1:], event_shape)
    return dist.TransformedDistribution(vector, [reshape], validate_args=False)


def chains_ess(values: Tensor) -> float:
    """Effective number of values of chains, shape ``(C, N)``, at most their number."""
    ess = effective_sample_size(values.double(), chain_dim=0, sample_dim=1).item()
    if not math.isfinite(ess):  # all values are equal
        return float(values.numel())
    return min(max(ess, 1.0), float(values.numel()))


def _checked(log_ratio: Tensor, name: str) -> Tensor:
    if log_ratio.dim() != 1 or len(log_ratio) < 2 or log_ratio.isnan().any():
        raise ValueError(
            f"{name} must have shape (n,), n >= 2, without nan; got shape "
            f"{tuple(log_ratio.shape)} with {int(log_ratio.isnan().sum())} nan. Flatten "
            "it, and give draws where a density is zero an infinite ratio."
        )
    return log_ratio.double()


def _solve(first: Tensor, second: Tensor, n_1: float, n_2: float) -> float:
    """The ``m`` of (1), by bisection; infinite where there is none."""
    shared_1, shared_2 = first[first > -torch.inf], second[second < torch.inf]
    if not len(shared_1) and not len(shared_2):
        return math.nan
    if not len(shared_1) or not len(shared_2):
        return -math.inf if len(shared_2) else math.inf

    def excess(m: float) -> float:
        left = n_1 * (first - m).sigmoid().mean()
        return (left - n_2 * (m - second).sigmoid().mean()).item()

    ends = torch.cat([shared_1, shared_2])
    ends = ends[ends.isfinite()]
    # The least value of either side, beyond the ends, is far below 1e-17 of the other.
    margin = 50 + math.log(len(first) + len(second))
    low, high = (ends.min().item() - margin, ends.max().item() + margin)
    for _ in range(200):
        middle = (low + high) / 2
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
        if high - low <= 1e-13 * max(1.0, abs(middle)):
            break
    return (low + high) / 2


def _relative_variance(t: Tensor) -> float:
    return (t.var() / t.mean() ** 2).item()


def _slope_z(first: Tensor, second: Tensor, n_1: float, n_2: float) -> float:
    """Score statistic of the slope of ``l - m``, with the intercept projected out."""
    weight_1, weight_2 = n_1 / len(first), n_2 / len(second)
    t_1, t_2 = first.sigmoid(), (-second).sigmoid()
    # Where a density is zero the label is certain, and says nothing of the slope.
    l_1 = first.masked_fill(t_1 == 0, 0.0)
    l_2 = second.masked_fill(t_2 == 0, 0.0)
    curve_1, curve_2 = weight_1 * t_1 * (1 - t_1), weight_2 * t_2 * (1 - t_2)
    total = curve_1.sum() + curve_2.sum()
    if not total > 0:
        return math.nan
    centre = ((curve_1 * l_1).sum() + (curve_2 * l_2).sum()) / total
    u_1, u_2 = -t_1 * (l_1 - centre), t_2 * (l_2 - centre)
    variance = n_1 * u_1.var() + n_2 * u_2.var()
    if not variance > 0:
        return 0.0
    return ((n_1 * u_1.mean() + n_2 * u_2.mean()) / variance.sqrt()).item()


def _reason(overlap: float, num_shared: float, slope_z: float) -> str:
    if not overlap > _MIN_OVERLAP:
        return f"poor overlap of the two densities: {overlap:.2g} of 1"
    if not num_shared > _MIN_SHARED:
        return f"poor overlap: only {num_shared:.1f} draws lie where both densities are"
    if not abs(slope_z) < _MAX_Z:
        return (
            "the draws are not those of the two densities: the slope of their log "
            f"ratio is {abs(slope_z):.1f} standard errors from 1"
        )
    return ""
