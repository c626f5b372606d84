r"""Bridge sampling: :math:`\log Z` from draws of the target and of a proposal.

The ratio of the partition functions of the target and of a normalised proposal
:math:`p`, by the estimator of :mod:`~pyro_ebm.partition.bridge.bennett` with

.. math::
    \ell(x) = -f(x) - \log p(x)                                           \tag{1}

References:
    Meng & Wong (1996), Statistica Sinica 6, 831-860.
    Gronau et al. (2017), Journal of Mathematical Psychology 81, 80-97.
"""

__all__ = ["bridge_sampling"]

import math
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, status_of
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.bridge.bennett import (
    BennettRatio,
    bennett,
    chains_ess,
    require_draws,
)
from pyro_ebm.partition.importance.importance import check_proposal, log_weights_of
from pyro_ebm.partition.progress import watched


@torch.no_grad()
def bridge_sampling(
    energy: Energy,
    draws: Tensor,
    *,
    proposal: dist.TorchDistribution | Literal["gaussian", "student"] = "gaussian",
    num_proposal_draws: int | None = None,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Estimate :math:`\log Z` from draws of the target, by the bridge to a proposal.

    The proposal is fitted to one half of the draws in unconstrained space, and the
    bridge is built with the other half; then the halves change places. The value is the
    mean of the two.

    Nothing is learned of a region where the draws have never been, unless the proposal
    reaches it; then the draws often fail the test of the slope.

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
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

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
    with watched(energy, is_shown=progress_bar) as target:
        bridge = _Bridge(target, draws, proposal)
        count = num_proposal_draws or bridge.num_draws
        if count < 4:
            raise ValueError(f"num_proposal_draws must be at least 4, got {count}.")
        halves = [bridge.cross(fit, count // 2) for fit in (0, 1)]
    value = sum(h.log_ratio for h in halves) / 2
    std_error = _combined_error(*halves)
    reasons = list(dict.fromkeys(finding for h in halves for finding in h.reasons))
    apart = abs(halves[0].log_ratio - halves[1].log_ratio)
    if not apart < 4 * max(math.hypot(*(h.std_error for h in halves)), 1e-3):
        differ = f"the two halves of the draws differ by {apart:.2g} nats"
        reasons.append(Finding(Reason.WRONG_DRAWS, differ))
    if bridge.num_nan:
        nan = f"the energy is nan at {bridge.num_nan} draws of the proposal"
        reasons.append(Finding(Reason.NOT_FINITE, nan))
    return LogPartitionEstimate(
        value,
        std_error,
        value - 1.96 * std_error,
        value + 1.96 * std_error,
        min(h.num_shared for h in halves),
        status_of(reasons),
        f"bridge sampling, {bridge.name} proposal",
        bridge.num_evaluations,
        tuple(reasons),
    )


class _Bridge:
    """The draws in unconstrained space, in two halves, and a bridge to each."""

    def __init__(self, energy: Energy, draws: Tensor, proposal: Any) -> None:
        batch_dim = require_draws(draws, energy)
        if draws.shape[batch_dim - 1] < 8:
            raise ValueError(
                f"draws must hold at least 8 a chain, got "
                f"{draws.shape[batch_dim - 1]}. Hundreds are better."
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
        x = draws.detach().to(**energy.tensor_options(draws))
        if not self.is_fitted:
            check_proposal(energy, proposal, "proposal")
            self.energy = energy
        else:
            x = transform.inv(x)
        self.event_shape = self.energy.event_shape
        self.by_chain = x if batch_dim == 2 else x[None]
        self.is_correlated = batch_dim == 2
        self.num_draws = draws.shape[:batch_dim].numel()
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
        at_target = log_weights_of(self.energy, proposal, own)  # (1)
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


def _combined_error(first: BennettRatio, second: BennettRatio) -> float:
    """Standard error of the mean of the two bridges.

    They share all draws, and the more alike target and proposal are, the more of the
    error of either comes from the fit, which is the same in both. With the overlap
    squared as their correlation 95 % intervals covered in 94 to 98 % of runs.
    """
    correlation = first.overlap * second.overlap
    one, two = first.std_error, second.std_error
    return math.sqrt(one**2 + two**2 + 2 * correlation * one * two) / 2


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
