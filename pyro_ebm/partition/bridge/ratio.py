r"""The ratio of the partition functions of two neighbouring energies.

Bennett's acceptance ratio (:mod:`~pyro_ebm.partition.bridge.bennett`) with
:math:`\ell = f_2 - f_1` at draws of both gives :math:`\log Z_1 - \log Z_2` at the cost
of the draws and one evaluation of the other energy at each. Where the two energies are
near, what they have in common cancels: the error is far below that of two estimates.

References:
    Bennett (1976), Journal of Computational Physics 22, 245-268.
"""

__all__ = ["LogRatioEstimate", "log_ratio"]

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.core.verdict import Finding, Status, in_words, sentence, status_of
from pyro_ebm.energies import Energy
from pyro_ebm.energies.views.unconstrained import same_support
from pyro_ebm.mcmc import IndependentChains, Sampler
from pyro_ebm.mcmc.base import bias_of
from pyro_ebm.partition.bridge.bennett import (
    BennettRatio,
    bennett,
    chains_ess,
    require_draws,
)
from pyro_ebm.partition.progress import CountedEnergy, bar_settings


class LogRatioEstimate(NamedTuple):
    r"""An estimate of :math:`\log Z_1 - \log Z_2` in nats, with its error and verdict.

    Attributes:
        value: The estimate.
        std_error: Its standard error.
        lower: Lower end of the 95 % interval.
        upper: Upper end of the 95 % interval.
        overlap: How far the two densities overlap, from 0 to 1.
        status: ``"ok"`` or ``"unreliable"``.
        num_evaluations: Energy evaluations spent on both, one a point.
        reasons: The findings that led to it; empty if it is ``"ok"``.

    Example:
        It is what :func:`log_ratio` returns.

        >>> energy = pyro_ebm.energies.QuadraticEnergy(torch.zeros(1))
        >>> x, y = torch.randn(500, 1), torch.randn(500, 1)
        >>> ratio = log_ratio(energy, energy + 1.0, x, y)
        >>> round(ratio.value, 4), ratio.overlap, ratio.status
        (1.0, 1.0, 'ok')
    """

    value: float
    std_error: float
    lower: float
    upper: float
    overlap: float
    status: Status
    num_evaluations: int
    reasons: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """The findings in one line; empty if there are none."""
        return sentence(self.reasons)

    @property
    def is_reliable(self) -> bool:
        """Whether the status is ``"ok"``."""
        return self.status.is_reliable

    def __str__(self) -> str:
        return (
            f"log Z1 - log Z2 = {self.value:.4f} +- {self.std_error:.4f} "
            f"[{in_words(self.status, self.reasons)}], "
            f"{self.num_evaluations:,} energy evaluations"
        )


@torch.no_grad()
def log_ratio(
    target1: Energy,
    target2: Energy,
    draws1: Tensor | None = None,
    draws2: Tensor | None = None,
    *,
    base: dist.TorchDistribution | None = None,
    sampler: Sampler | None = None,
    num_draws: int = 2_000,
    progress_bar: bool = True,
) -> LogRatioEstimate:
    r"""Estimate :math:`\log Z_1 - \log Z_2` from draws of both.

    Args:
        target1: The energy :math:`f_1`.
        target2: The energy :math:`f_2`, over the same event and support.
        draws1: Draws of :math:`e^{-f_1}`, shape ``(N, *event)`` if they are
            independent, ``(C, N, *event)`` from ``C`` chains, whose autocorrelation is
            then accounted for; default: they are drawn by ``sampler``.
        draws2: The same of :math:`e^{-f_2}`.
        base: Where the default sampler starts its chains.
        sampler: Whatever draws from an energy; default:
            ``IndependentChains(base)``.
        num_draws: How many it draws of each.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; ``"unreliable"`` if the overlap is poor, or if the draws are not
        those of the two energies as far as their log ratio can tell: chains that have
        not mixed are often, not always, found so.

    Raises:
        ValueError: If the energies, the draws or the settings do not fit each other.

    Exactness: *consistent*, if the draws are those of the energies.

    Example:
        >>> f1 = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))
        >>> f2 = pyro_ebm.energies.QuadraticEnergy(torch.zeros(2), 2 * torch.eye(2))
        >>> ratio = log_ratio(f1, f2)
        >>> ratio.status, abs(ratio.value - 0.6931) < 0.1
        ('ok', True)
    """
    _check_pair(target1, target2, base, sampler, num_draws)
    sampler = sampler or IndependentChains(base, progress_bar=False)
    with tqdm(
        desc="log ratio",
        unit_scale=True,
        **bar_settings(is_shown=progress_bar),
    ) as bar:
        first, second = (CountedEnergy(f, bar=bar) for f in (target1, target2))
        at_1 = _difference(first, second, first, draws1, sampler, num_draws, "draws1")
        at_2 = _difference(first, second, second, draws2, sampler, num_draws, "draws2")
    result = _bennett_of_chains(at_1, at_2)
    reasons = (*bias_of(getattr(sampler, "kernel", None)), *result.reasons)
    value, half = -result.log_ratio, 1.96 * result.std_error
    return LogRatioEstimate(
        value,
        result.std_error,
        value - half,
        value + half,
        result.overlap,
        status_of(reasons),
        first.num_evaluations + second.num_evaluations,
        reasons,
    )


def _bennett_of_chains(at_1: Tensor, at_2: Tensor) -> BennettRatio:
    """Bennett's ratio, with the autocorrelation of draws of shape ``(C, N)``."""
    # As bennett has it: the first density, then the second; our ratio is upside down.
    result = bennett(at_1.flatten(), at_2.flatten())
    if at_1.dim() == at_2.dim() == 1:
        return result
    centred = [-(at_1 - result.log_ratio), at_2 - result.log_ratio]
    ess_1, ess_2 = (
        chains_ess((-v).sigmoid()) if v.dim() == 2 else None for v in centred
    )
    return bennett(at_1.flatten(), at_2.flatten(), ess_first=ess_1, ess_second=ess_2)


def _difference(
    first: Energy,
    second: Energy,
    own: Energy,
    draws: Tensor | None,
    sampler: Sampler,
    num_draws: int,
    name: str,
) -> Tensor:
    r""":math:`f_1 - f_2 = \log q_2 - \log q_1` at draws of one of them."""
    if draws is None:
        draws = sampler(own, num_draws)
    require_draws(draws, own, name)
    x = draws.detach().to(**own.tensor_options(draws))
    value_1, value_2 = first(x).double(), second(x).double()
    value = value_1 if own is first else value_2
    other = value_2 if own is first else value_1
    if not value.isfinite().all():
        raise ValueError(
            f"{name} must have finite energy, and {int((~value.isfinite()).sum())} of "
            f"{value.numel()} have not. They are no draws of that energy."
        )
    if other.isnan().any():
        raise ValueError(
            f"the energies must be defined at {name}, and one of them is nan at "
            f"{int(other.isnan().sum())} of {value.numel()} draws. Return inf where "
            "the density is zero."
        )
    return value_1 - value_2


def _check_pair(
    target1: Energy, target2: Energy, base: Any, sampler: Any, num_draws: int
) -> None:
    for name, target in (("target1", target1), ("target2", target2)):
        if not isinstance(target, Energy):
            raise TypeError(
                f"{name} must be an Energy, got {type(target).__name__}. Of an "
                "EnergyDistribution, give its .energy."
            )
    if target1.event_shape != target2.event_shape or not same_support(
        target1.support, target2.support
    ):
        raise ValueError(
            "target2 must have the event_shape and support of target1, "
            f"{tuple(target1.event_shape)} and {target1.support}; got "
            f"{tuple(target2.event_shape)} and {target2.support}. Log Z of energies "
            "over different spaces have no common unit."
        )
    if base is not None and sampler is not None:
        raise ValueError("give base or sampler, not both: a sampler has its own start.")
    if num_draws < 2:
        raise ValueError(
            f"num_draws must be at least 2, got {num_draws}. Thousands are better."
        )
