r"""Tests of a base: its draws against its density, and its reach over finite supports.

A base is believed twice, in its draws and in its density; where they differ, every
estimate that starts from it is off, with nothing to show it. With a proposal :math:`q`
fitted to some draws, and both densities normalised, for any function :math:`\varphi`

.. math::
    n \, \mathbb{E}_p\left[\varphi \, \frac{m q}{n p + m q}\right] =
    m \, \mathbb{E}_q\left[\varphi \, \frac{n p}{n p + m q}\right]          \tag{1}

so the difference of the two sums, over :math:`n` draws of the one and :math:`m` of the
other, is a score statistic with mean zero. The fractions are those of Bennett's ratio:
bounded, whatever the tails are. Here :math:`\varphi` is one (is the integral one?), the
log ratio, and each coordinate and its square.

Draws that fail are not condemned at once: a second, larger sample decides. Seen: no
alarm in 20 runs on each of 40 sound distributions; LKJ of torch for three to six
dimensions, and a normal whose draws are 3 % too wide, in 40 of 40 runs.

A base over a finite support may also have probability zero where the energy is finite,
of which no draw of it can tell. The weight of a draw is then compared with points that
the draws lead to by moves of the energy alone: the base does not reach a point whose
weight would exceed those of all draws together,

.. math::
    e^{-f(x)} / p(x) > \sum_n e^{-f(x_n)} / p(x_n)                         \tag{2}

which has a probability of at most one in the effective number of draws under the
target, if the draws are enough.

References:
    Shirts (2013), J. Chem. Theory Comput. 9, 909-926.
"""

__all__ = ["BaseFingerprint", "check_draws", "check_reach", "reach_finding"]

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.verdict import Finding, Reason
from pyro_ebm.energies import DistributionEnergy, Energy, unconstrained
from pyro_ebm.energies.discrete.finite import finite_points, finite_values, num_points
from pyro_ebm.energies.views.double import in_double
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.mcmc.tempering.site_path import SitePath
from pyro_ebm.partition.particles.movers import adaptive
from pyro_ebm.partition.particles.resampling import systematic_resample

#: Draws that the proposal is fitted to; draws of it for each draw that is tested.
_NUM_FITTED = 2000
_PROPOSALS = 4
#: Degrees of freedom of the proposal, and scales after which a draw is an outlier.
_DEGREES = 6.0
_MAX_SCALES = 5.0
#: Chance of a second look at sound draws, how much larger it is, and of a false alarm.
_LOOK_AGAIN = 0.1
_LARGER = 4
_ALARM = 1e-5
#: What the log ratio is cut off at.
_MAX_RATIO = 50.0
#: Points at which the densities are evaluated at once.
_CHUNK = 20_000
#: Effective number of draws below which nothing can be said, and the largest share that
#: one draw may have in the variance of a statistic.
_MIN_EFFECTIVE = 200.0
_MAX_SHARE = 0.05
#: States that are all compared by (2), else chains and their moves.
_MAX_STATES, _NUM_CHAINS, _NUM_MOVES = 2**12, 128, 4
#: Moves of one column of a mixed event.
_NUM_FLIPS = 32


@torch.no_grad()
def check_draws(
    distribution: dist.TorchDistribution,
    num: int = 20_000,
    *,
    draws: Tensor | None = None,
) -> Finding | None:
    """Test the draws of a distribution against its density, by (1).

    Args:
        distribution: Normalised, continuous, without a batch shape.
        num: Draws that are tested, at least 4,000. It is enough to see a scale that is
            3 % off.
        draws: These instead, independent, of shape ``(N, *event)``.

    Returns:
        What is wrong, or ``None``; also ``None`` for discrete distributions, and where
        no proposal comes close enough to say anything. Fewer than one of a hundred
        thousand sound distributions is condemned.

    Example:
        >>> check_draws(dist.Gamma(2.0, 1.0)) is None
        True
        >>> print(check_draws(dist.LKJCholesky(4, 1.0)).reason)
        the draws of the base are not those of its density
    """
    energy = DistributionEnergy(distribution)
    if energy.support.is_discrete:
        return None
    flat, transform = unconstrained(in_double(energy))
    draws = distribution.sample(torch.Size((num,))) if draws is None else draws
    with torch.random.fork_rng(devices=[]):
        chance, _ = _smallest_chance(flat, transform.inv(draws.double()))
        if chance > _LOOK_AGAIN:
            return None
        again = distribution.sample(torch.Size((_LARGER * len(draws),)))
        chance, what = _smallest_chance(flat, transform.inv(again.double()))
    if chance > _ALARM:
        return None
    return Finding(
        Reason.BASE_INCONSISTENT,
        f"the draws of {type(distribution).__name__} are not those of its density: "
        f"{what} is off in {len(again):,} draws, with a chance of "
        f"{max(chance, 1e-99):.1g}. "
        "Take another base, or mend its sample.",
    )


@torch.no_grad()
def check_reach(
    energy: Energy,
    log_weight: Callable[[Tensor], Tensor],
    draws: Tensor,
    log_weights: Tensor,
) -> tuple[float, int]:
    """Mass at states that draws of a base do not reach, by (2).

    Args:
        energy: The target, over a finite or a mixed support; over others nothing is
            looked for.
        log_weight: Log-weights of importance sampling at points of the support.
        draws: Independent, of the base, shape ``(N, *event)``.
        log_weights: Theirs first, and of more draws behind; shape ``(M,)``.

    Returns:
        About the share of the target's mass there, and the evaluations spent.
    """
    known = log_weights.nan_to_num(-torch.inf, -torch.inf)
    is_known = known[: len(draws)].isfinite().any()
    support = energy.support
    if not is_known:
        return 0.0, 0
    if isinstance(support, MixedSupport):
        chosen = systematic_resample(known[None, : len(draws)], _NUM_CHAINS)
        x = _flipped(energy, support, draws[chosen[-1][0]])
        own = log_weight(x).nan_to_num(-torch.inf, torch.inf)
        share = (own > known.logsumexp(0)).double().mean().item()
        return share, (_NUM_FLIPS + 2) * len(x)
    if not is_finite_support(support):
        return 0.0, 0
    number = num_points(energy.support, energy.event_shape) or 0
    if number <= _MAX_STATES:
        index = torch.arange(number)
        x = finite_points(energy.support, energy.event_shape, index, draws)
        log_density = (-energy(x)).double().nan_to_num(-torch.inf, -torch.inf)
        cost, shares = 2 * number, log_density.softmax(0)
    else:
        some = known[: len(draws)]
        path, chosen = SitePath(energy), systematic_resample(some[None], _NUM_CHAINS)
        chains = path.evaluate(draws[chosen[-1]])
        move: Any = adaptive(path, _NUM_MOVES, keeps_all=False)
        x = move(chains, some, chains, 1.0).x[0]
        cost, shares = path.num_evaluations + len(x), known.new_ones(len(x)) / len(x)
    is_beyond = log_weight(x).nan_to_num(-torch.inf, torch.inf) > known.logsumexp(0)
    return shares[is_beyond].sum().item(), cost


def _flipped(energy: Energy, support: MixedSupport, x: Tensor) -> Tensor:
    """Points whose finite columns were moved by Metropolis' rule, shape of ``x``."""
    here = energy(x)
    for _ in range(_NUM_FLIPS):
        column = support.finite[int(torch.randint(len(support.finite), ()))]
        values = x.new_tensor(finite_values(support.at([column])) or ())
        new = x.clone()
        new[:, column] = values[torch.randint(len(values), (len(x),))]
        there = energy(new)
        is_taken = torch.rand_like(there) < (here - there).exp()
        x = torch.where(is_taken[:, None], new, x)
        here = torch.where(is_taken, there, here)
    return x


def reach_finding(share: float, largest: float = 1e-3) -> tuple[Finding, ...]:
    """What a share of mass that the base does not reach says, if it is too large."""
    if share <= largest:
        return ()
    text = (
        f"about {share:.2g} of the mass is at states that the base has no draws of, "
        "though their energy is finite. Give each value of each site a probability in "
        "the base"
    )
    return (Finding(Reason.BASE_MISSES, text),)


def _smallest_chance(flat: Energy, u: Tensor) -> tuple[float, str]:
    """The least p-value of all statistics, for as many as they are, and its name."""
    u = u.reshape(len(u), -1)
    u = u[u.isfinite().all(-1)]
    if len(u) < 2 * _NUM_FITTED:  # most have no place among numbers
        return 1.0, ""
    proposal = _fitted(u[:_NUM_FITTED])
    mine, theirs = _Sums(), _Sums()
    for points in u[_NUM_FITTED:].split(_CHUNK):
        mine.add(flat, proposal, points, -1.0)
        for _ in range(_PROPOSALS):
            theirs.add(flat, proposal, proposal.sample(len(points)), 1.0)
    z = (mine.total - theirs.total) / (mine.variance + theirs.variance).sqrt()
    p = torch.special.erfc(z.abs() / math.sqrt(2))
    p = p.where(mine.is_known & theirs.is_known & z.isfinite(), 1.0)
    index = int(p.argmin())
    names = ["its integral", "the log density"]
    what = names[index] if index < 2 else f"coordinate {(index - 2) % u.shape[1]}"
    return min(1.0, (p[index] * len(p)).item()), what


class _Sums:
    """Sums over draws of either side of (1), one for each function."""

    def __init__(self) -> None:
        self.num = 0
        self.total = self.squares = self.largest = torch.zeros(())

    def add(self, flat: Energy, proposal: "_Student", u: Tensor, sign: float) -> None:
        z = proposal.standardised(u)
        log_prob = -flat(u.reshape(-1, *flat.event_shape)).to(u)
        # (1) holds for any set of points: here those where the density is a number.
        is_known = log_prob.isfinite()
        log_ratio = log_prob.where(is_known, 0.0) - proposal.log_prob(z)
        weight = (sign * (log_ratio - math.log(_PROPOSALS))).sigmoid()
        ratio = log_ratio.clamp(-_MAX_RATIO, _MAX_RATIO).unsqueeze(-1)
        functions = torch.cat([torch.ones_like(ratio), ratio, z, z.square()], -1)
        values = weight.where(is_known, 0.0).unsqueeze(-1) * functions
        self.num += len(u)
        self.total = self.total + values.sum(0)
        self.squares = self.squares + values.square().sum(0)
        self.largest = torch.maximum(self.largest, values.square().amax(0))

    @property
    def variance(self) -> Tensor:
        """Of the totals."""
        return self.squares - self.total.square() / self.num

    @property
    def is_known(self) -> Tensor:
        """Where the normal approximation holds: no few draws decide."""
        effective = self.total[0].square() / self.squares[0]
        is_shared = self.largest < _MAX_SHARE * self.variance
        return is_shared & self.variance.isfinite() & (effective > _MIN_EFFECTIVE)


class _Student(NamedTuple):
    """A multivariate Student distribution."""

    loc: Tensor
    scale_tril: Tensor

    def sample(self, num: int) -> Tensor:
        normal = torch.randn(num, len(self.loc)).to(self.loc)
        mixing = dist.Chi2(torch.full((num, 1), _DEGREES).to(self.loc)).sample()
        z = normal * (_DEGREES / mixing).sqrt()
        return self.loc + z @ self.scale_tril.mT

    def standardised(self, u: Tensor) -> Tensor:
        difference = (u - self.loc).mT
        return torch.linalg.solve_triangular(
            self.scale_tril, difference, upper=False
        ).mT

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of points that are given standardised."""
        dim, half = len(self.loc), _DEGREES / 2
        constant = math.lgamma(half + dim / 2) - math.lgamma(half)
        constant -= dim / 2 * math.log(math.pi * _DEGREES)
        volume = self.scale_tril.diagonal().log().sum()
        squares = z.square().sum(-1) / _DEGREES
        return constant - volume - (half + dim / 2) * squares.log1p()


def _fitted(u: Tensor) -> _Student:
    """A proposal with the median, scales and correlations of draws, outliers cut."""
    low, loc, high = u.quantile(u.new_tensor([0.25, 0.5, 0.75]), 0)
    scale = ((high - low) / 1.349).clamp(min=torch.finfo(u.dtype).tiny ** 0.5)
    z = ((u - loc) / scale).clamp(-_MAX_SCALES, _MAX_SCALES)
    covariance = z.mT @ z / len(z)
    covariance.diagonal().add_(1e-6 + 2 * z.shape[1] / len(z))
    factor = torch.linalg.cholesky(covariance)
    return _Student(loc, scale.unsqueeze(-1) * factor)


@torch.no_grad()
def _at_two_points(energy: Energy) -> Tensor:
    """Energies at two points, by which a base is known again, shape ``(2,)``.

    Args:
        energy: Of a base.
    """
    base, _ = unconstrained(energy)
    options, shape = base.tensor_options(), base.event_shape
    if isinstance(base.support, MixedSupport):
        return base(base.support.two_points(torch.empty(0, **options)))
    values = finite_values(base.support)
    if values is not None:
        ends = torch.tensor([values[0], values[-1]], **options)
        return base(ends.reshape(2, *(1,) * base.event_dim).expand(2, *shape))
    point = torch.arange(1.0, 1 + shape.numel()).reciprocal()
    point = point.reshape(shape).to(**options)
    return base(torch.stack([point, -point]))


class BaseFingerprint(nn.Module):
    """A base, which no state dict holds, and the fingerprint it is checked by.

    Args:
        base: A normalised distribution.
    """

    def __init__(self, base: dist.TorchDistribution) -> None:
        super().__init__()
        self.energy = DistributionEnergy(base)  # a module, so that .to() moves it

    @property
    def distribution(self) -> dist.TorchDistribution:
        """The base."""
        return self.energy.distribution

    def get_extra_state(self) -> Tensor:
        """Its energy at two points."""
        return _at_two_points(self.energy)

    def set_extra_state(self, state: Tensor) -> None:
        r"""Check that what is loaded was saved with this base.

        Raises:
            ValueError: If not: :math:`\log Z` and the walkers would be wrong.
        """
        own = self.get_extra_state()
        if not torch.allclose(state.to(own), own, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"base must be the one that log Z was saved with; {self.distribution} "
                f"has log densities {(-own).tolist()} at two points where that one had "
                f"{(-state).tolist()}. Build the EnergyModel as it was, then load. The "
                "parameters alone are in energy.state_dict()."
            )
