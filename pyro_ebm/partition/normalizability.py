r"""Whether an energy has a partition function at all, tested along lines and rays.

Along a ray of random direction :math:`v` in :math:`D` dimensions, and along a line
through a point that is in no way special, :math:`e^{-f}` can only be integrable if

.. math::
    g_{\mathrm{ray}}(s) = D \log s - f(c + s v), \qquad
    g_{\mathrm{line}}(s) = \log s - f(x + s v)                             \tag{1}

fall with :math:`\log s` in the end. The slope of (1) is taken over the far half of all
octaves that floating-point numbers reach. On a constrained support the energy is moved
to unconstrained space, where the change of variables is as accurate as its round trip;
if that ends early, power laws at the boundary have become exponentials, and it is
:math:`f` itself that must rise, unless it is out of reach of the bulk already.

The directions of the lines are the axes, the extreme eigenvectors of the covariance of
the points, and those of a secant Hessian from differences of the gradient.

Not found are singularities within the bulk, and mass that escapes along a curved or a
narrow way which no line meets.
"""

__all__ = ["Normalizability", "check_normalizability"]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.energies import (
    Energy,
    PyroModelEnergy,
    UnconstrainedEnergy,
    unconstrained,
)
from pyro_ebm.partition.progress import CountedEnergy

#: A slope of (1) above this is none that falls.
_MIN_FALL = -0.003
#: Along a line a slope of (1) as near to 1 as this is that of a constant energy.
_FLAT = 0.005
#: The same for f against the distance, where it must rise exponentially.
_MIN_RISE = 0.01
#: Where the change of variables ends early, an energy so far above the least of all
#: particles, in nats, is on a hill and tells nothing of what is behind it.
_NO_MASS = 20.0
#: Octaves of the particles' spread that a ray reaches: the farthest that works counts.
_OCTAVES = (300, 200, 100, 60, 40, 28, 20, 14, 10, 7)
_MAX_OCTAVES = {torch.float64: 300, torch.float32: 60}
#: Distances in unconstrained space where the change of variables ends early.
_DISTANCES = (700, 400, 200, 100, 60, 36, 25, 15, 10, 6)
#: Points on a ray: half of them far out, half of them at half that distance.
_POINTS = 6


class Normalizability(NamedTuple):
    """What :func:`check_normalizability` found.

    Attributes:
        is_normalizable: False where there is evidence against it.
        evidence: That evidence in words; empty otherwise.
        num_evaluations: Energy evaluations spent, one a point.
    """

    is_normalizable: bool
    evidence: str
    num_evaluations: int


class _Rays(NamedTuple):
    """Rays ``start + s * direction``, ``R`` of them in ``D`` dimensions."""

    start: Tensor  # (R, D)
    direction: Tensor  # (R, D)
    power: Tensor  # (R,): the factor of log s in (1)
    name: Tensor  # (R,): index into the names of directions

    def at(self, log_s: Tensor) -> Tensor:
        """Points at distances of shape ``(P,)``, shape ``(R, P, D)``."""
        return self.start[:, None] + log_s.exp()[:, None] * self.direction[:, None]

    def select(self, which: Tensor) -> "_Rays":
        """Those that a mask of shape ``(R,)`` names."""
        return _Rays(*(part[which] for part in self))


@torch.no_grad()
def check_normalizability(
    energy: Energy,
    particles: Tensor,
    *,
    num_rays: int = 64,
    num_particles: int = 3,
    max_axes: int = 32,
) -> Normalizability:
    r"""Look for evidence that :math:`e^{-f}` cannot be integrated, by (1).

    Args:
        energy: On any support that ``biject_to`` knows.
        particles: Points about where the mass is, shape ``(N, *event)``: draws of a
            base, or better the particles of a run of SMC.
        num_rays: Random rays from the centre of the particles.
        num_particles: Particles, chosen at random, through which lines are drawn.
        max_axes: Axes, chosen at random if there are more, along which they are drawn.

    Returns:
        Whether no evidence was found. ``is_normalizable`` is no proof.

    Raises:
        ValueError: If ``particles`` has another event shape, or holds fewer than two
            points of finite energy.

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
    probe = _Probe(energy, particles)
    rays = probe.rays(num_rays, num_particles, max_axes)
    evidence = probe.search(rays)
    return Normalizability(not evidence, evidence, probe.num_evaluations)


class _Probe:
    """The energy over flat unconstrained vectors, counted, and where it is probed."""

    def __init__(self, energy: Energy, particles: Tensor) -> None:
        self.energy, to_support = unconstrained(energy)
        self.round_trip = _round_trip(self.energy)
        x = particles.detach().to(**energy.tensor_options(particles))
        u = to_support.inv(x).reshape(len(x), -1)
        self.num_evaluations = 0
        value = self(u)
        is_usable = value.isfinite() & u.isfinite().all(-1)
        u, value = u[is_usable], value[is_usable]
        if len(u) < 2:
            raise ValueError(
                f"particles must hold at least 2 points of finite energy, got {len(u)} "
                f"of {len(x)}."
            )
        self.u, self.dim = u, u.shape[-1]
        self.least = value.min()
        # Robust against a few particles that are far out already.
        self.centre = u.median(0).values
        spread = (u - self.centre).abs().median(0).values
        self.scale = 1.5 * spread.square().mean().sqrt().clamp(1e-3, 1e3).item()

    def __call__(self, u: Tensor) -> Tensor:
        """Energy at ``u`` of shape ``(*batch, D)``."""
        self.num_evaluations += u.shape[:-1].numel()
        return self.energy(u.reshape(*u.shape[:-1], *self.energy.event_shape))

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
        chosen = self.u[torch.randperm(len(self.u))[:num_particles]]
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
            shaped = ends.reshape(-1, *self.energy.event_shape)
            _, grad = self.energy.value_and_grad(shaped)
            self.num_evaluations += len(ends)
            above, below = grad.reshape(2, self.dim, self.dim)
            found.append(self.eigenvectors(above - below))
        return torch.cat(found)

    def eigenvectors(self, matrix: Tensor) -> Tensor:
        """The first and last eigenvectors of a matrix that is nearly symmetric."""
        matrix = (matrix + matrix.mT).nan_to_num(0.0, 0.0, 0.0)
        vectors = torch.linalg.eigh(matrix / matrix.abs().max().clamp(min=1e-30))[1].mT
        return vectors[[0, 1, -1]] if self.dim > 2 else vectors

    def search(self, rays: _Rays) -> str:
        """Follow the rays as far as each can be; the evidence, or an empty string."""
        # A flat direction is never met but to rounding, which shows at a distance.
        special = rays.select(rays.name >= self.first_special)
        log_s = self.log_distances(20)
        value, is_seen = self.look(special.at(log_s))
        evidence = self.judge(
            special.select(is_seen), log_s, value[is_seen], is_flat=True
        )
        if evidence:
            return evidence
        cap = _MAX_OCTAVES.get(self.u.dtype, 14)
        # Where a power law became an exponential, (1) holds only very far out.
        is_mapped = self.round_trip is not None
        floor = 28 if is_mapped else 0
        levels = [(self.log_distances(n), False) for n in _OCTAVES if floor <= n <= cap]
        if is_mapped:
            part = torch.linspace(0.5, 1.0, _POINTS).to(self.u)
            levels += [((part * distance).log(), True) for distance in _DISTANCES]
        for log_s, is_short in levels:
            value, is_seen = self.look(rays.at(log_s))
            evidence = self.judge(
                rays.select(is_seen), log_s, value[is_seen], is_short=is_short
            )
            if evidence:
                return evidence
            rays, value = rays.select(~is_seen), value[~is_seen]
            if not len(value):
                return ""
        endless = (value == -torch.inf).any(-1)
        return "the energy is -inf at some points far out" if endless.any() else ""

    def look(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Energies along rays, and whether they mean anything so far out.

        Args:
            u: Points of ``R`` rays, shape ``(R, P, D)``.

        Returns:
            Energies of shape ``(R, P)``; and the mask of shape ``(R,)`` of the rays
            where the change of variables is accurate, and no energy has overflowed
            between the near and the far half.
        """
        is_seen = self.is_accurate(u)
        value = torch.full(u.shape[:-1], torch.nan).to(self.u)
        if is_seen.any():
            value[is_seen] = self(u[is_seen])
        near, far = value[:, : _POINTS // 2], value[:, _POINTS // 2 :]
        overflown = (near < torch.inf).any(-1) & (far == torch.inf).any(-1)
        lost = (value.isnan() | (value == -torch.inf)).any(-1)
        return value, is_seen & ~overflown & ~lost

    def log_distances(self, octaves: int) -> Tensor:
        """Logarithms of distances around half of so many octaves, and around all."""
        ends = torch.tensor([octaves / 2, octaves - 1.0]).to(self.u)
        within = torch.linspace(0, 1, _POINTS // 2).repeat(2).to(self.u)
        log_2 = ends.repeat_interleave(_POINTS // 2) + within
        return math.log(self.scale) + math.log(2) * log_2

    def is_accurate(self, u: Tensor) -> Tensor:
        """Whether the way to the support and back ends where it began, ``(R,)``."""
        if self.round_trip is None:
            return torch.ones(len(u), dtype=torch.bool, device=u.device)
        shaped = u.reshape(*u.shape[:-1], *self.energy.event_shape)
        back = self.round_trip(shaped).reshape(u.shape)
        return ((back - u).abs() <= 1e-2 * (1 + u.abs())).flatten(1).all(-1)

    def judge(
        self,
        rays: _Rays,
        log_s: Tensor,
        value: Tensor,
        *,
        is_short: bool = False,
        is_flat: bool = False,
    ) -> str:
        """Evidence from energies of shape ``(R, P)``, or an empty string."""
        if not len(value):
            return ""
        half = _POINTS // 2
        near, far = value[:, :half], value[:, half:]
        if is_short:
            run = log_s[half:].exp().mean() - log_s[:half].exp().mean()
            slope = (near.amin(-1) - far.amin(-1)) / run
            is_bad = (slope > -_MIN_RISE) & (far.amin(-1) < self.least + _NO_MASS)
        else:
            run = log_s[half:].mean() - log_s[:half].mean()
            power_log_s = rays.power[:, None] * log_s
            mass = power_log_s - value  # (1)
            slope = (mass[:, half:].amax(-1) - mass[:, :half].amax(-1)) / run
            is_bad = (slope - 1).abs() < _FLAT if is_flat else slope > _MIN_FALL
        is_bad &= (far < torch.inf).any(-1)  # else there is no mass
        if not is_bad.any():
            return ""
        worst = int(torch.where(is_bad, slope, -torch.inf).argmax())
        return (
            f"e^-f does not vanish far out along {self.names[int(rays.name[worst])]}: "
            f"the energy is {value[worst, 0].item():.3g} at distance "
            f"{log_s[0].exp().item():.1g} and {value[worst, -1].item():.3g} at "
            f"{log_s[-1].exp().item():.1g}"
        )


def _round_trip(energy: Energy) -> Callable[[Tensor], Tensor] | None:
    """From unconstrained points to the support and back, or ``None`` for no way."""
    while isinstance(energy, CountedEnergy):
        energy = energy.energy
    if isinstance(energy, UnconstrainedEnergy):
        transform = energy.transform
        return lambda u: transform.inv(transform(u))
    if isinstance(energy, PyroModelEnergy) and energy.is_constrained:
        model = energy
        return lambda u: model.unconstrain(model.constrain(u))
    return None
