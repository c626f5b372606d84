r"""Tests of whether an energy is normalisable, along lines and rays.

Along a ray of random direction :math:`v` in :math:`D` dimensions, and along a line
through a point that is in no way special, :math:`e^{-f}` can only be integrable if

.. math::
    g_{\mathrm{ray}}(s) = D \log s - f(c + s v), \qquad
    g_{\mathrm{line}}(s) = \log s - f(x + s v)                             \tag{1}

fall with :math:`\log s` in the end. The largest value of (1) within an octave of ``s``
is compared between three octaves in the far half of all that floating-point numbers
reach. On a constrained support the energy is moved to unconstrained space, where the
change of variables is as accurate as its round trip; if that ends early, power laws at
the boundary have become exponentials, and it is :math:`f` itself that must rise.

A ray along which (1) does not fall is evidence only if

- it does not fall at other distances either, nor is its rise coming to an end;
- the differences exceed the rounding of the energy, which is computed in double
  precision where it can be;
- its mass beyond the bulk is no less than :math:`e^{-10}` of that of the bulk;
- there is no proof of the contrary: with a normalised base of energy :math:`f_0`,
  :math:`Z = \mathbb{E}_0[e^{f_0 - f}]` is finite where :math:`f - f_0` is bounded
  below, as it is for a proper prior and a bounded likelihood.

The directions of the lines are the axes, the extreme eigenvectors of the covariance of
the points, and those of a secant Hessian from differences of the gradient.

Not found are singularities within the bulk, and mass that escapes along a curved or a
narrow way which no line meets.
"""

__all__ = [
    "Normalizability",
    "check_normalizability",
    "is_placed",
    "lost_to_rounding",
    "round_trip",
]

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.energies import (
    Energy,
    PyroModelEnergy,
    UnconstrainedEnergy,
    unconstrained,
)
from pyro_ebm.energies.distribution import base_energy
from pyro_ebm.energies.views.double import DoubleEnergy
from pyro_ebm.partition.exact.precision import PreciseEnergy
from pyro_ebm.partition.progress import CountedEnergy

#: A slope of (1) above this is none that falls; per unit of log s.
_MIN_FALL = 0.003
#: The same for -f per unit of s, where the change of variables ends early.
_MIN_RISE = 0.001
#: Change of the energy along a direction that is flat up to rounding, by precision.
_FLAT = {True: 1e-3, False: 0.03}
#: Log-mass beyond the bulk, relative to it, that is too little to count.
_NO_MASS = -10.0
#: Octaves of the particles' spread that a ray reaches: the farthest that works counts.
_OCTAVES = (300, 200, 100, 60, 40, 28, 20, 14, 10, 7)
_MAX_OCTAVES = {True: 300, False: 60}
#: Octaves within which flat directions and the mass beyond the bulk are looked for.
_NEAR_OCTAVES = 20
#: Distances in unconstrained space where the change of variables ends early; nearer
#: than the last the bulk may not be over.
_DISTANCES = (700, 400, 200, 100, 60, 45, 36, 30, 25)
#: Steps of the descent to a likely point, and from how many particles.
_STEPS, _NUM_DESCENTS = 40, 16
#: Of the reach of a ray, where its three groups of points end; and the size of a group.
_ENDS = (0.5, 0.75, 1.0)
_POINTS = 3
#: Particles that are looked at for rounding, and the share that may be lost to it.
_NUM_PLACED, _MAX_LOST = 20_000, 1e-3
#: Suspicious rays that are looked at more closely.
_MAX_SUSPECTS = 16


class Normalizability(NamedTuple):
    """The result of :func:`check_normalizability`.

    Attributes:
        status: ``"ok"`` without evidence, ``"not_normalizable"``, or ``"unreliable"``
            where the energy is numerical nonsense not far out.
        finding: The evidence; ``None`` if there is none.
        num_evaluations: Energy evaluations spent, one a point.
        log_mass: Of what was found, at the distance to which it was followed, beside
            the bulk of the mass, in nats and at most; ``-inf`` without evidence.
    """

    status: Status
    finding: Finding | None
    num_evaluations: int
    log_mass: float = -math.inf

    @property
    def is_normalizable(self) -> bool:
        """False where there is evidence that the integral is infinite."""
        return self.status != Status.NOT_NORMALIZABLE

    @property
    def evidence(self) -> str:
        """The finding in words; empty if there is none."""
        return "" if self.finding is None else str(self.finding)


class _Rays(NamedTuple):
    """Rays ``start + s * direction``, ``R`` of them in ``D`` dimensions."""

    start: Tensor  # (R, D)
    direction: Tensor  # (R, D)
    power: Tensor  # (R,): the factor of log s in (1)
    name: Tensor  # (R,): index into the names of directions

    def at(self, distance: Tensor) -> Tensor:
        """Points at distances of shape ``(R, *P)``, shape ``(R, *P, D)``."""
        shape = (len(distance), *(1,) * (distance.dim() - 1), self.start.shape[-1])
        start, direction = self.start.reshape(shape), self.direction.reshape(shape)
        return start + distance[..., None] * direction

    def select(self, which: Tensor) -> "_Rays":
        """Those that a mask of shape ``(R,)`` or indices name."""
        return _Rays(*(part[which] for part in self))


class _Level(NamedTuple):
    """How far rays reach, and what is asked of them there."""

    reach: float  # octaves of the spread; a distance if it is short
    is_short: bool = False  # where the change of variables ends early
    is_flat: bool = False  # for directions that are flat up to rounding


class _Look(NamedTuple):
    """Energies along ``R`` rays, in three groups of ``P`` points each."""

    distance: Tensor  # (R, 3, P)
    value: Tensor  # (R, 3, P)
    is_seen: Tensor  # (R,): whether the energies mean anything so far out

    def select(self, which: Tensor) -> "_Look":
        """Those of some rays."""
        return _Look(*(part[which] for part in self))


class _Trend(NamedTuple):
    """How (1) goes on along rays, each of shape ``(R,)``."""

    is_bad: Tensor  # it does not fall
    slope: Tensor
    change: Tensor  # between the first and the last group, at least what would matter


@torch.no_grad()
def check_normalizability(
    energy: Energy,
    particles: Tensor,
    *,
    base: dist.TorchDistribution | None = None,
    num_rays: int = 64,
    num_particles: int = 3,
    max_axes: int = 32,
) -> Normalizability:
    r"""Look for evidence that :math:`e^{-f}` cannot be integrated, by (1).

    Args:
        energy: On any support that ``biject_to`` knows.
        particles: Points about where the mass is, shape ``(N, *event)``: draws of a
            base, or better the particles of a run of SMC.
        base: A normalised distribution on the event and support of the energy; for a
            Pyro model its prior. Along a ray where ``f`` falls no faster than minus the
            log-density of the base there is no evidence.
        num_rays: Random rays from the centre of the particles.
        num_particles: Particles, chosen at random, through which lines are drawn.
        max_axes: Axes, chosen at random if there are more, along which they are drawn.

    Returns:
        The evidence, if there is any. No evidence is no proof.

    Raises:
        ValueError: If ``particles`` has another event shape, or holds fewer than two
            points of finite energy; or the base another event or support.

    Exactness: a test; see the module for what it does not see.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> f = pyro_ebm.energies.FunctionEnergy(lambda x: x[..., 0] ** 2, (2,))
        >>> check_normalizability(f, torch.randn(100, 2)).evidence
        'e^-f does not vanish far out along ...'
    """
    if particles.shape[1:] != energy.event_shape or len(particles) < 2:
        raise ValueError(
            f"particles must have shape (N, *event) with N >= 2 and event "
            f"{tuple(energy.event_shape)}, as the energy has; got "
            f"{tuple(particles.shape)}."
        )
    probe = _Probe(energy, particles, base)
    finding = probe.search(probe.rays(num_rays, num_particles, max_axes))
    status = Status.OK
    if finding is not None:
        is_divergent = finding.reason is Reason.DIVERGENT
        status = Status.NOT_NORMALIZABLE if is_divergent else Status.UNRELIABLE
    number = probe.energy.num_evaluations
    return Normalizability(status, finding, number, probe.log_mass)


class _Probe:
    """The energy over flat unconstrained vectors, and where it is probed."""

    def __init__(
        self, energy: Energy, particles: Tensor, base: dist.TorchDistribution | None
    ) -> None:
        flat, to_support = unconstrained(energy)
        self.flat, self.log_mass = flat, -math.inf
        x = particles.detach().to(**energy.tensor_options(particles))
        u = to_support.inv(x)
        self.energy = PreciseEnergy(flat, u)
        self.base = None
        if (prior := base_energy(base, energy)) is not None:
            self.base = PreciseEnergy(unconstrained(prior)[0], u)
        u = u.double().reshape(len(x), -1)
        value = self(u)
        is_usable = value.isfinite() & u.isfinite().all(-1)
        u, value = u[is_usable], value[is_usable]
        if len(u) < 2:
            raise ValueError(
                f"particles must hold at least 2 points of finite energy, got {len(u)} "
                f"of {len(x)}."
            )
        self.u, self.dim = u, u.shape[-1]
        self.least, self.has_descended = value.min(), False
        self.likely = u[value <= value.median()]
        # Robust against a few particles that are far out already.
        self.centre = u.median(0).values
        spread = (u - self.centre).abs().median(0).values
        self.scale = 1.5 * spread.square().mean().sqrt().clamp(1e-3, 1e3).item()

    def __call__(self, u: Tensor, energy: PreciseEnergy | None = None) -> Tensor:
        """Energy at ``u`` of shape ``(*batch, D)``."""
        energy = self.energy if energy is None else energy
        return energy(u.reshape(*u.shape[:-1], *self.energy.event_shape))

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient at ``u`` of shape ``(N, D)``; zeros if it has none."""
        shaped = u.reshape(-1, *self.energy.event_shape)
        try:
            value, grad = self.energy.value_and_grad(shaped)
        except ValueError:
            return self(u), torch.zeros_like(u)
        return value, grad.reshape(u.shape).nan_to_num(0.0, 0.0, 0.0)

    def rays(self, num_rays: int, num_particles: int, max_axes: int) -> _Rays:
        """Random rays from the centre, and both ways along lines through particles."""
        random = torch.randn(num_rays, self.dim).to(self.u)
        axes = torch.randperm(self.dim)[:max_axes].sort().values.tolist()
        lines = torch.eye(self.dim).to(self.u)[axes]
        special = self.soft_directions()
        lines = torch.cat([lines, special])
        self.names = ["a random ray", *(f"axis {axis}" for axis in axes)]
        self.first_special = len(self.names)
        self.names += ["an extreme direction"] * len(special)
        chosen = self.likely[torch.randperm(len(self.likely))[:num_particles]]
        start = chosen.repeat_interleave(2 * len(lines), 0)
        direction = torch.cat([lines, -lines]).repeat(len(chosen), 1)
        name = torch.arange(1, len(lines) + 1).repeat(2 * len(chosen))
        direction = torch.nn.functional.normalize(
            torch.cat([random, direction]), dim=-1
        )
        power = torch.ones(len(direction)).to(self.u)
        power[:num_rays] = self.dim
        return _Rays(
            torch.cat([self.centre.expand_as(random), start]),
            direction,
            power,
            torch.cat([torch.zeros(num_rays, dtype=torch.long), name]).to(start.device),
        )

    def soft_directions(self) -> Tensor:
        """Extreme eigenvectors of the covariance and of a secant Hessian."""
        if self.dim == 1 or self.dim > 200:
            return self.u[:0]
        covariance = (self.u - self.u.mean(0)).mT @ (self.u - self.u.mean(0))
        found = [self.eigenvectors(covariance)]
        for distance in (1.0, 30.0):
            steps = distance * self.scale * torch.eye(self.dim).to(self.u)
            ends = torch.cat([self.centre + steps, self.centre - steps])
            _, grad = self.value_and_grad(ends)
            above, below = grad.reshape(2, self.dim, self.dim)
            found.append(self.eigenvectors(above - below))
        return torch.cat(found)

    def eigenvectors(self, matrix: Tensor) -> Tensor:
        """The first and last eigenvectors of a matrix that is nearly symmetric."""
        matrix = (matrix + matrix.mT).nan_to_num(0.0, 0.0, 0.0)
        vectors = torch.linalg.eigh(matrix / matrix.abs().max().clamp(min=1e-30))[1].mT
        return vectors[[0, 1, -1]] if self.dim > 2 else vectors

    def search(self, rays: _Rays) -> Finding | None:
        """Follow the rays as far as each can be; the evidence, or ``None``."""
        # A flat direction is never met but to rounding, which shows at a distance.
        special = rays.select(rays.name >= self.first_special)
        flat = _Level(_NEAR_OCTAVES, is_flat=True)
        finding, _, _ = self.judge(special, flat)
        last, is_noise = self.u.new_zeros(len(rays.name), 0), rays.name < 0
        for level in self.levels():
            if finding is not None or not len(rays.name):
                return finding
            finding, is_noise, is_settled = self.judge(rays, level)
            rays, is_noise = rays.select(~is_settled), is_noise[~is_settled]
            last = self.last.value[~is_settled].flatten(1)
        if finding is not None or not len(rays.name):
            return finding
        if (last == -torch.inf).any():
            detail = "the energy is -inf at some points far out"
            return Finding(Reason.NUMERICAL, detail)
        if is_noise.any():
            detail = "far out the energy falls, but by no more than its own rounding"
            return Finding(Reason.NUMERICAL, detail)
        return None

    def levels(self) -> list[_Level]:
        """From the farthest to the nearest."""
        cap = _MAX_OCTAVES[self.energy.is_double]
        # Where a power law became an exponential, (1) holds only very far out.
        is_mapped = round_trip(self.flat) is not None
        floor = 28 if is_mapped else 0
        levels = [_Level(n) for n in _OCTAVES if floor <= n <= cap]
        if is_mapped:
            levels += [_Level(distance, is_short=True) for distance in _DISTANCES]
        return levels

    def judge(
        self, rays: _Rays, level: _Level
    ) -> tuple[Finding | None, Tensor, Tensor]:
        """Evidence at one level; and which rays are noise there, and which settled."""
        self.last = look = self.look(rays, level)
        trend = self.trend(rays, look, level)
        is_noise = torch.zeros_like(look.is_seen)
        suspects = (trend.is_bad & look.is_seen).nonzero().squeeze(-1)
        order = trend.slope[suspects].argsort(descending=True)[:_MAX_SUSPECTS]
        suspects = suspects[order]
        if len(suspects):
            chosen, seen = rays.select(suspects), look.select(suspects)
            rounding = self.rounding(chosen, seen)
            is_noise[suspects] = ~(rounding <= 0.05 * trend.change[suspects])
            is_evidence = ~is_noise[suspects] & self.confirm(chosen, seen, level)
            if is_evidence.any():
                worst = int(is_evidence.nonzero()[0])
                return self.describe(chosen, seen, worst), is_noise, look.is_seen
        return None, is_noise, look.is_seen & ~is_noise

    def look(self, rays: _Rays, level: _Level, num_points: int = _POINTS) -> _Look:
        """Energies at the level, at random distances within each group."""
        distance = self.distances(len(rays.name), level, num_points)
        u = rays.at(distance)
        is_seen = self.is_accurate(u)
        value = torch.full(distance.shape, torch.nan).to(self.u)
        if is_seen.any():
            value[is_seen] = self(u[is_seen])
            self.note(value)
        near, far = value[:, 0], value[:, 2]
        overflown = (near < torch.inf).any(-1) & (far == torch.inf).any(-1)
        lost = (value.isnan() | (value == -torch.inf)).flatten(1).any(-1)
        return _Look(distance, value, is_seen & ~overflown & ~lost)

    def distances(self, num_rays: int, level: _Level, num_points: int) -> Tensor:
        """Distances of three groups, shape ``(num_rays, 3, num_points)``."""
        part = torch.rand(num_rays, 3, num_points).to(self.u)
        part = (torch.arange(num_points).to(part) + part) / num_points  # in (0, 1)
        ends = torch.tensor(_ENDS).to(self.u)[:, None] * level.reach
        if level.is_short:
            return ends - level.reach / 8 * (1 - part)
        return self.scale * 2 ** (ends - 1 + part)

    def is_accurate(self, u: Tensor) -> Tensor:
        """Whether no point of a ray is lost to rounding, ``(R,)``."""
        # Where the energy insists on single precision its bijection is no better.
        seen = u if self.energy.is_double else u.float()
        return is_placed(self.flat, seen).flatten(1).all(-1)

    def trend(self, rays: _Rays, look: _Look, level: _Level) -> _Trend:
        """How (1) goes on from group to group, at the largest value of each."""
        where, mass = look.distance, -look.value
        if not level.is_short:
            where = look.distance.log()
            mass = mass + rays.power[:, None, None] * where  # (1)
        where, mass = where.mean(-1), mass.amax(-1)
        run = where.diff(dim=-1)
        first, second = (mass.diff(dim=-1) / run).unbind(-1)
        slack = _MIN_RISE if level.is_short else _MIN_FALL
        is_bad = (first > -slack) & (second > -slack) & (second > first / 2 - slack)
        if level.is_flat:
            rise = look.value.flatten(1)
            rise = rise.amax(-1) - rise.amin(-1)
            is_bad = rise < _FLAT[self.energy.is_double]
        is_bad &= (look.value[:, 2] < torch.inf).any(-1)  # else there is no mass
        change = (mass[:, 2] - mass[:, 0]).abs()
        return _Trend(is_bad, second, change.clamp(min=slack) + slack * run.sum(-1))

    def rounding(self, rays: _Rays, look: _Look) -> Tensor:
        """Rounding of the energies in the far groups, shape ``(R,)``."""
        distance = look.distance[:, 1:].flatten(1)
        step = max(1e-7, 8 * self.energy.eps) * distance[..., None]
        u, h = rays.at(distance), step * rays.direction[:, None]
        shape = (-1, *self.energy.event_shape)
        rounding = self.energy.rounding(u.reshape(shape), h.reshape(shape))
        return rounding.reshape(distance.shape).amax(-1)

    def confirm(self, rays: _Rays, look: _Look, level: _Level) -> Tensor:
        """Whether suspicious rays are so at other points too, shape ``(R,)``."""
        again = self.look(rays, level, 2 * _POINTS)
        is_bad = self.trend(rays, again, level).is_bad & again.is_seen
        is_bad &= self.has_mass(rays, look, level)
        return is_bad & ~self.is_bounded(rays, look, level)

    def is_bounded(self, rays: _Rays, look: _Look, level: _Level) -> Tensor:
        """Whether ``f - f0`` does not fall on and on, shape ``(R,)``."""
        if self.base is None:
            return torch.zeros_like(look.is_seen)
        ratio = look.value - self(rays.at(look.distance), self.base)
        least = ratio.nan_to_num(-torch.inf, torch.inf).amin(-1)
        where = look.distance if level.is_short else look.distance.log()
        slack = (_MIN_RISE if level.is_short else _MIN_FALL) * where.mean(-1).diff()
        size = look.value.abs().amax(-1)
        rounding = 64 * self.energy.eps * torch.maximum(size[:, 1:], size[:, :-1])
        falls = least.diff(dim=-1) < -(slack + rounding)
        return ~falls.all(-1)

    def has_mass(self, rays: _Rays, look: _Look, level: _Level) -> Tensor:
        """Whether the mass not too far out counts beside the bulk, ``(R,)``."""
        if level.is_short:
            # Behind a hill the way down to the bulk may be long.
            far = look.value[:, 2].amin(-1)
            return far < self.least_energy() - _NO_MASS + self.dim
        octave = torch.arange(0, min(level.reach, _NEAR_OCTAVES), 0.25).to(self.u)
        distance = (self.scale * 2**octave).expand(len(rays.name), -1)
        mass = rays.power[:, None] * distance.log() - self(rays.at(distance))
        mass = mass.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        bulk, beyond = mass[:, :16].amax(-1), mass[:, -12:].amax(-1)
        return beyond > bulk + _NO_MASS

    def least_energy(self) -> Tensor:
        """The least of all energies seen, and of those some way down from particles."""
        if not self.has_descended:
            self.has_descended = True
            u, size = self.likely[:_NUM_DESCENTS].clone(), torch.zeros(())
            for step in range(_STEPS):
                value, grad = self.value_and_grad(u)
                self.note(value)
                size = 0.8 * size + 0.2 * grad.square()
                rate = (1 - step / _STEPS) * self.scale / 2
                u = u - rate * grad / (size.sqrt() + 1e-30)
        return self.least

    def note(self, value: Tensor) -> None:
        """Remember the least energy."""
        value = value[value.isfinite()]
        if len(value):
            self.least = torch.minimum(self.least, value.min())

    def describe(self, rays: _Rays, look: _Look, which: int) -> Finding:
        """The evidence in words."""
        value, distance = look.value[which], look.distance[which]
        volume = self.dim * distance.log()
        self.log_mass = (self.least - value + volume).amax().item()
        return Finding(
            Reason.DIVERGENT,
            f"e^-f does not vanish far out along {self.names[int(rays.name[which])]}: "
            f"the energy is {value[0, 0].item():.3g} at distance "
            f"{distance[0, 0].item():.1g} and {value[-1, -1].item():.3g} at "
            f"{distance[-1, -1].item():.1g}",
        )


def is_placed(energy: Energy, u: Tensor) -> Tensor:
    """Whether points keep their place on the way to the support and back.

    Mass where they do not is lost to rounding, or counted in the wrong place.

    Args:
        energy: Over unconstrained space.
        u: Flat points, shape ``(*batch, D)``, in the precision that is asked about.

    Returns:
        Shape ``(*batch,)``.
    """
    way = round_trip(energy)
    if way is None:
        return torch.ones_like(u[..., 0], dtype=torch.bool)
    back = way(u.reshape(*u.shape[:-1], *energy.event_shape)).double().reshape(u.shape)
    u = u.double()
    return ((back - u).abs() <= 1e-2 + 1e-5 * u.abs()).all(-1)


def lost_to_rounding(energy: Energy, particles: Tensor) -> list[Finding]:
    """Whether the change of variables loses particles to rounding.

    Args:
        energy: Over unconstrained space.
        particles: Shape ``(N, D)``.
    """
    some = particles[torch.randperm(len(particles))[:_NUM_PLACED]]
    share = 1 - is_placed(energy, some).double().mean().item()
    if share <= _MAX_LOST:
        return []
    text = (
        f"{share:.2%} of the particles lie nearer to an end of the support than "
        "numbers can tell apart. Write the energy in a coordinate that is finite "
        "there, such as the logit or the logarithm"
    )
    return [Finding(Reason.NUMERICAL, text)]


def round_trip(energy: Energy) -> Callable[[Tensor], Tensor] | None:
    """From unconstrained points to the support and back, or ``None`` for no way.

    Args:
        energy: Over unconstrained space.
    """
    while isinstance(energy, CountedEnergy | DoubleEnergy):
        energy = energy.energy
    if isinstance(energy, UnconstrainedEnergy):
        transform = energy.transform
        return lambda u: transform.inv(transform(u))
    if isinstance(energy, PyroModelEnergy) and energy.is_constrained:
        model = energy
        return lambda u: model.unconstrain(model.constrain(u))
    return None
