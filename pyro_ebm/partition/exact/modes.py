r"""The modes of a density of up to three coordinates, with their curvature.

From many starts at once: some steps of Adam, which need no scale, then Newton's steps
with a Hessian :math:`H` from differences of the gradient, whose negative eigenvalues
are turned round, and whose length is halved until the energy falls. To a mode
:math:`m` belongs the mass of its Gaussian,

.. math::
    \log M = -f(m) + \tfrac{D}{2} \log 2\pi - \tfrac12 \log \det H            \tag{1}
"""

__all__ = ["ENOUGH", "Modes", "find_modes"]

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: Steps of Adam; the first and the last as parts of the spread of the starts.
_ADAM_STEPS, _FIRST, _LAST = 60, 0.3, 0.003
#: Newton's steps, and how much of each is tried.
_NEWTON_STEPS, _PARTS = 30, (1.0, 0.4, 0.1, 0.01)
#: Starts at once, how often at most, and modes that are too many.
_AT_ONCE, _MAX_ROUNDS, _MANY = 64, 24, 200
#: Descents that should end at each mode: a mode where ``n`` of them end on average is
#: met by none with probability e^-n.
_WANTED = 12
#: With fewer others of its kind may have been missed.
ENOUGH = 6
#: Distance of two points for a difference, as part of the width of the mode.
_DIFFERENCE = 1e-3
#: Expected fall of the energy below which a mode has been found.
_FOUND = 1e-6
#: Ratio of curvatures below which there is a ridge and no mode.
_FLAT = 1e-11
#: Least distance of two modes in standard deviations; and log-mass that is too little.
_APART, _NO_MASS = 0.3, 36.0


class _Target(Protocol):
    """An energy over vectors of shape ``(N, D)``."""

    def value(self, u: Tensor) -> Tensor:
        """Energies, shape ``(N,)``; ``inf`` where there is no density."""

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and gradients."""

    def may_go_on(self) -> bool:
        """Whether there is time for more descents."""


class Modes(NamedTuple):
    """``K`` modes in ``D`` dimensions, that of the most mass first.

    Attributes:
        loc: Shape ``(K, D)``.
        root: A root of the inverse Hessian, along its axes, shape ``(K, D, D)``.
        log_mass: (1), shape ``(K,)``.
        hits: How many descents have ended there, shape ``(K,)``. Where a mode was met
            once there may well be others.
    """

    loc: Tensor
    root: Tensor
    log_mass: Tensor
    hits: Tensor


def find_modes(target: _Target, starts: Tensor) -> Modes | None:
    """Find modes by descents from batches of starts, until no new ones appear.

    Each mode has to be met several times, and the last starts to lead to no new one.

    Args:
        target: The energy.
        starts: Shape ``(N, D)``, the most promising first.

    Returns:
        The modes that have mass; ``None`` if none has a curvature, or the energy has no
        gradient.
    """
    spread = (starts - starts.median(0).values).abs().median(0).values
    spread = spread.clamp(min=1e-6)
    modes = None
    for some in starts.split(_AT_ONCE)[:_MAX_ROUNDS]:
        if modes is not None and not target.may_go_on():
            break
        try:
            found = _descend(target, some, spread)
        except ValueError:  # it has no gradient
            return None
        if found is None:
            continue
        before = 0 if modes is None else len(modes.loc)
        if modes is not None:
            pairs = zip(modes, found, strict=True)
            found = Modes(*(torch.cat(pair) for pair in pairs))
        modes = _distinct(found)
        # A look at one coordinate has been everywhere already.
        is_sure = starts.shape[-1] == 1 or bool((modes.hits >= _WANTED).all())
        if (len(modes.loc) <= before and is_sure) or len(modes.loc) > _MANY:
            break
    return modes


def _descend(target: _Target, starts: Tensor, spread: Tensor) -> Modes | None:
    u = _adam(target, starts, spread)
    u, value, hessian, is_found = _newton(target, u, spread)
    curvature, axes = torch.linalg.eigh(hessian)
    is_found &= curvature[:, 0] > _FLAT * curvature[:, -1].abs().clamp(min=1e-300)
    if not is_found.any():
        return None
    curvature, axes = curvature[is_found], axes[is_found]
    normaliser = u.shape[-1] / 2 * math.log(2 * math.pi)
    log_mass = normaliser - value[is_found] - curvature.log().sum(-1) / 2  # (1)
    hits = torch.ones_like(log_mass)
    return Modes(u[is_found], axes * curvature.rsqrt()[:, None], log_mass, hits)


def _adam(target: _Target, u: Tensor, spread: Tensor) -> Tensor:
    first, second = torch.zeros_like(u), torch.zeros_like(u)
    best, least = u, torch.full_like(u[:, 0], torch.inf)
    for step in range(_ADAM_STEPS):
        value, grad = target.value_and_grad(u)
        grad = grad.nan_to_num(0.0, 0.0, 0.0)
        is_better = value < least
        best = torch.where(is_better[:, None], u, best)
        least = torch.where(is_better, value, least)
        first = 0.8 * first + 0.2 * grad
        second = 0.9 * second + 0.1 * grad.square()
        bias = (1 - 0.9 ** (step + 1)) ** 0.5 / (1 - 0.8 ** (step + 1))
        rate = _FIRST * (_LAST / _FIRST) ** (step / _ADAM_STEPS)
        u = u - rate * spread * bias * first / (second.sqrt() + 1e-300)
    return best


def _newton(
    target: _Target, u: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, energies, Hessians, and whether a minimum was found."""
    u, width = u.clone(), spread.expand_as(u).clone()
    value = torch.full_like(u[:, 0], torch.inf)
    hessian = torch.zeros(*u.shape, u.shape[-1]).to(u)
    is_found = torch.zeros_like(value, dtype=torch.bool)
    active = torch.arange(len(u), device=u.device)
    for _ in range(_NEWTON_STEPS):
        now = u[active]
        here, grad, curvature = _derivatives(target, now, width[active])
        step, fall = _step(grad, curvature)
        parts = torch.tensor([0.0, *_PARTS]).to(u)[:, None, None]
        tried = now + parts * step
        values = target.value(tried[1:].flatten(0, 1)).reshape(len(_PARTS), -1)
        values, which = torch.cat([here[None], values]).min(0)
        u[active] = tried[which, torch.arange(len(active))]
        value[active], hessian[active] = values, curvature
        is_found[active] = fall < _FOUND
        size = curvature.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-300)
        width[active] = torch.minimum(size.rsqrt(), spread)
        active = active[(fall >= _FOUND) & (which > 0)]
        if not len(active):
            break
    return u, value, hessian, is_found & value.isfinite()


def _step(grad: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's step, and by how much the energy should fall."""
    eigenvalues, axes = torch.linalg.eigh(hessian)
    size = eigenvalues.abs()
    size = torch.maximum(size, 1e-12 * size[:, -1:].clamp(min=1e-300))
    along = (axes.mT @ grad[..., None]).squeeze(-1)
    step = -(axes @ (along / size)[..., None]).squeeze(-1)
    return step, (along.square() / size).sum(-1).nan_to_num(torch.inf)


def _derivatives(
    target: _Target, u: Tensor, width: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy, gradient and Hessian, the last from differences of the gradient."""
    dim = u.shape[-1]
    h = torch.maximum(_DIFFERENCE * width, 1e-8 * (1 + u.abs()))  # (N, D)
    steps = h[:, :, None] * torch.eye(dim).to(u)  # one axis a row
    points = torch.stack([u[:, None] + steps, u[:, None] - steps], 1)
    points = torch.cat([u[:, None], points.flatten(1, 2)], 1)  # (N, 1 + 2 D, D)
    value, grad = target.value_and_grad(points.flatten(0, 1))
    grad = grad.nan_to_num(0.0, 0.0, 0.0).reshape(points.shape)
    above, below = grad[:, 1:].unflatten(1, (2, dim)).unbind(1)
    hessian = (above - below) / (2 * h[:, :, None])
    value = value.reshape(points.shape[:2])[:, 0]
    return value, grad[:, 0], (hessian + hessian.mT) / 2


def _distinct(modes: Modes) -> Modes:
    """Each mode once, without those of no mass."""
    order = modes.log_mass.argsort(descending=True)
    modes = Modes(*(part[order] for part in modes))
    kept: list[int] = []
    hits = torch.zeros_like(modes.hits)
    for k in range(len(order)):
        if modes.log_mass[k] < modes.log_mass[0] - _NO_MASS:
            break
        away = modes.loc[k] - modes.loc[kept]
        scaled = torch.linalg.solve(modes.root[kept], away[..., None]).squeeze(-1)
        same = (scaled.norm(dim=-1) <= _APART).nonzero()
        if not len(same):
            kept.append(k)
        hits[kept[int(same[0])] if len(same) else k] += modes.hits[k]
    modes = Modes(*(part[kept] for part in modes))
    return modes._replace(hits=hits[kept])
