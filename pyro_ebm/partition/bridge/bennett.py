r"""Bennett's acceptance ratio: the ratio of two partition functions from draws of both.

With unnormalised densities :math:`q_1, q_2`, :math:`\ell = \log q_2 - \log q_1` and
sample sizes :math:`n_1, n_2`, the ratio :math:`c = \log Z_2 - \log Z_1` solves

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

__all__ = ["BennettRatio", "bennett", "chains_ess", "require_draws", "solve"]

import math
from typing import NamedTuple

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, sentence
from pyro_ebm.energies import Energy

#: Overlap (3), and effective number of draws in it, below which there is no error bar.
_MIN_OVERLAP = 0.01
_MIN_SHARED = 30
#: Standard errors that are too many.
_MAX_Z = 4.0


class BennettRatio(NamedTuple):
    r"""The result of Bennett's estimate.

    Attributes:
        log_ratio: :math:`\log Z_2 - \log Z_1`.
        std_error: Its asymptotic standard error (2).
        overlap: (3), from 0 to 1.
        num_shared: Effective number of draws, on the side that has fewer, that lie
            where the densities overlap.
        slope_z: Score statistic for a slope of one; standard normal if the draws are
            those of the two densities.
        reasons: Why the numbers cannot be trusted; empty if nothing speaks against
            them.
    """

    log_ratio: float
    std_error: float
    overlap: float
    num_shared: float
    slope_z: float
    reasons: tuple[Finding, ...]

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)


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
    middle = solve(first[None], second[None], n_1, n_2).item()
    log_ratio = middle - math.log(n_1) + math.log(n_2)
    if not math.isfinite(middle):
        apart = "no draw of either density lies where the other is positive"
        none = (Finding(Reason.POOR_OVERLAP, apart),)
        return BennettRatio(log_ratio, math.inf, 0.0, 0.0, math.nan, none)
    t_1, t_2 = (first - middle).sigmoid(), (middle - second).sigmoid()
    variance = _relative_variance(t_1) / n_1 + _relative_variance(t_2) / n_2  # (2)
    overlap = min(t_1.mean().item() * (n_1 + n_2) / n_2, 1.0)  # (3)
    num_shared = min(
        n / len(t) * (t.sum() ** 2 / t.square().sum()).item()
        for t, n in ((t_1, n_1), (t_2, n_2))
    )
    slope_z = _slope_z(first - middle, second - middle, n_1, n_2)
    reasons = _findings(overlap, num_shared, slope_z)
    std_error = math.sqrt(variance) if math.isfinite(variance) else math.inf
    return BennettRatio(log_ratio, std_error, overlap, num_shared, slope_z, reasons)


def chains_ess(values: Tensor) -> float:
    """Effective number of values of chains, shape ``(C, N)``, at most their number."""
    ess = effective_sample_size(values.double(), chain_dim=0, sample_dim=1).item()
    if not math.isfinite(ess):  # all values are equal
        return float(values.numel())
    return min(max(ess, 1.0), float(values.numel()))


def require_draws(draws: Tensor, energy: Energy, name: str = "draws") -> int:
    """Check the shape of draws; return how many dimensions stand before the event.

    Args:
        draws: Shape ``(N, *event)``, or ``(C, N, *event)`` of chains.
        energy: What they are draws of.
        name: Of the argument, for the message.

    Raises:
        ValueError: If they have another shape.
    """
    batch_dim = draws.dim() - energy.event_dim
    if batch_dim not in (1, 2) or draws.shape[batch_dim:] != energy.event_shape:
        raise ValueError(
            f"{name} must have shape (N, *event) or (C, N, *event) with event "
            f"{tuple(energy.event_shape)}, as the energy has; got "
            f"{tuple(draws.shape)}."
        )
    return batch_dim


def _checked(log_ratio: Tensor, name: str) -> Tensor:
    if log_ratio.dim() != 1 or len(log_ratio) < 2 or log_ratio.isnan().any():
        raise ValueError(
            f"{name} must have shape (n,), n >= 2, without nan; got shape "
            f"{tuple(log_ratio.shape)} with {int(log_ratio.isnan().sum())} nan. "
            "Flatten it, and give draws where a density is zero an infinite ratio."
        )
    return log_ratio.double()


def solve(first: Tensor, second: Tensor, n_1: float = 1.0, n_2: float = 1.0) -> Tensor:
    r"""Solve (1) for ``m`` by bisection, for each row.

    Args:
        first: :math:`\ell` at draws of the first density, shape ``(M, N_1)``.
        second: :math:`\ell` at draws of the second, shape ``(M, N_2)``.
        n_1: Effective number of the first draws; only the ratio to ``n_2`` counts.
        n_2: Effective number of the second draws.

    Returns:
        Shape ``(M,)``, of double precision; infinite where all draws of one density lie
        where the other is zero, ``nan`` where those of both do.
    """
    first, second = first.double(), second.double()
    nothing_1 = (first == -torch.inf).all(-1)
    nothing_2 = (second == torch.inf).all(-1)
    both = torch.cat([first, second], -1)
    ends = both.where(both.isfinite(), torch.nan)
    # The least value of either side, beyond the ends, is far below 1e-17 of the other.
    margin = 50 + math.log(both.shape[-1])
    low = ends.nan_to_num(torch.inf).amin(-1) - margin
    high = ends.nan_to_num(-torch.inf).amax(-1) + margin
    # Few draws of a vague density may be at 1e100: halve on a scale that bends.
    centre = ends.nanmedian(-1).values.nan_to_num(0.0)
    low, high = (low - centre).asinh(), (high - centre).asinh()
    for _ in range(80):
        half = (low + high) / 2
        middle = (centre + half.sinh())[:, None]
        left = n_1 * (first - middle).sigmoid().mean(-1)
        is_low = left > n_2 * (middle - second).sigmoid().mean(-1)
        low, high = torch.where(is_low, half, low), torch.where(is_low, high, half)
    found = centre + ((low + high) / 2).sinh()
    found = torch.where(nothing_1, -torch.inf, found)
    found = torch.where(nothing_2, torch.inf, found)
    return torch.where(nothing_1 & nothing_2, torch.nan, found)


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


def _findings(overlap: float, num_shared: float, slope_z: float) -> tuple[Finding, ...]:
    """The first thing that speaks against the ratio, if anything does."""
    if not overlap > _MIN_OVERLAP:
        poor = f"poor overlap of the two densities: {overlap:.2g} of 1"
        return (Finding(Reason.POOR_OVERLAP, poor),)
    if not num_shared > _MIN_SHARED:
        few = f"poor overlap: only {num_shared:.1f} draws lie where both densities are"
        return (Finding(Reason.POOR_OVERLAP, few),)
    if not abs(slope_z) < _MAX_Z:
        wrong = (
            "the draws are not those of the two densities: the slope of their log "
            f"ratio is {abs(slope_z):.1f} standard errors from 1"
        )
        return (Finding(Reason.WRONG_DRAWS, wrong),)
    return ()
