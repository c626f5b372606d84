r"""Find the modes of many-chain energies: descend from many starts, then measure.

All starts descend side by side in one tensor. Each keeps its own limited-memory
approximation of the inverse Hessian and its own step length,

.. math::
    z' = z - t\, H \nabla f(z), \qquad
    f(z') \le f(z) - c\, t\, \nabla f(z)^\top H \nabla f(z)                \tag{1}

with :math:`t` cut down after a step that breaks (1) and set to one after a step that
keeps it, so that one gradient of all starts is one round of the search. The distinct
ends are polished by Newton's method, with Hessians from central differences of the
gradient. A mode :math:`m` with Hessian :math:`A` stands for the Gaussian
:math:`\mathcal{N}(m, A^{-1})` and for the Laplace approximation of its mass,

.. math::
    \log Z_m = -f(m) + \tfrac{D}{2} \log 2\pi - \tfrac12 \log \det A       \tag{2}

References:
    Nocedal & Wright (2006), Numerical Optimization, algorithms 3.1 and 7.4.
    Raftery & Bao (2010), Biometrics 66, 1162-1173 (descents as starts of a sampler).
"""

__all__ = [
    "Memory",
    "Modes",
    "ValueAndGrad",
    "clean",
    "descend",
    "find_modes",
    "location_and_scale",
]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Gradients and steps that a descent remembers.
_MEMORY = 10
#: The factor ``c`` of (1), and what a step is cut by.
_SUFFICIENT = 1e-4
_CUT = 0.3
#: Descent ends when no start gains more than this in so many rounds, in nats.
_GAIN = 1e-3
_PATIENCE = 20
#: Rounds of Newton's method.
_NEWTON = 6
#: Ends this near to a mode, in its own standard deviations, are the same mode.
_SAME = 1.0
#: A mode with less of the mass than this, in nats below the largest, is left out.
_NO_MASS = 25.0

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
#: Sees points, gradients and memories after each round; ``True`` ends the descent.
Watch = Callable[[Tensor, Tensor, "Memory"], bool]


class Modes(NamedTuple):
    r"""Modes, by falling mass (2).

    Attributes:
        loc: Where they are, shape ``(K, D)``.
        energy: Energy there in nats, shape ``(K,)``.
        scale_tril: Cholesky factors of :math:`A^{-1}`, shape ``(K, D, D)``.
        log_mass: (2), shape ``(K,)``.
        ends: Where the descents ended, finite ones only, shape ``(S, D)``.
        is_complete: Whether all distinct ends were polished and kept; if not, there
            were more than could be measured.
    """

    loc: Tensor
    energy: Tensor
    scale_tril: Tensor
    log_mass: Tensor
    ends: Tensor
    is_complete: bool


@torch.no_grad()
def find_modes(
    value_and_grad: ValueAndGrad,
    starts: Tensor,
    *,
    max_rounds: int = 300,
    max_modes: int = 64,
) -> Modes | None:
    """Descend from many points, and measure the modes where that ends.

    Args:
        value_and_grad: Maps ``(N, D)`` to energies ``(N,)`` and gradients ``(N, D)``;
            best in double precision.
        starts: Shape ``(S, D)``. Their spread is the scale of the first steps.
        max_rounds: Gradients at each start.
        max_modes: Modes that are measured; ``2 D`` gradients each, a few times.

    Returns:
        The modes, or ``None`` if no energy is finite or no mode has a curvature.
    """
    loc, scale = location_and_scale(starts)

    def scaled(z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(loc + scale * z)
        return value, grad * scale

    z, energy = descend(scaled, (starts - loc) / scale, max_rounds)
    is_finite = energy.isfinite() & z.isfinite().all(-1)
    if not is_finite.any():
        return None
    z, energy = z[is_finite], energy[is_finite]
    chosen, is_complete = _distinct_ends(z, energy, max_modes)
    found = _polish(scaled, z[chosen])
    if found is None:
        return None
    modes, energies, factor = found
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_mass = -energies + modes.shape[-1] / 2 * math.log(2 * math.pi) + log_det  # (2)
    kept = _distinct_modes(modes, factor, log_mass)
    return Modes(
        loc + scale * modes[kept],
        energies[kept],
        scale[:, None] * factor[kept],
        log_mass[kept] + scale.log().sum(),
        loc + scale * z,
        is_complete,
    )


def location_and_scale(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Median and robust spread of the starts, shape ``(D,)`` each."""
    loc = starts.median(0).values
    spread = 1.5 * (starts - loc).abs().median(0).values
    return loc, torch.where(spread > 0, spread, torch.ones_like(spread))


def descend(
    value_and_grad: ValueAndGrad,
    z: Tensor,
    max_rounds: int,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the starts end by (1), and the energies there; ``inf`` if never finite.

    Args:
        value_and_grad: As for :func:`find_modes`.
        z: Starts, shape ``(S, D)``, at a scale of about one.
        max_rounds: Gradients at each start.
        watch: Called after each round.
    """
    z = z.clone()
    energy, grad = value_and_grad(z)
    grad = clean(grad)
    memory = Memory(z)
    direction = -grad
    step = 1 / grad.norm(dim=-1).clamp(min=1e-300)
    best, waited = energy, 0
    for _ in range(max_rounds):
        trial = z + step[:, None] * direction
        value, new = value_and_grad(trial)
        slope = (grad * direction).sum(-1)
        is_taken = value <= energy + _SUFFICIENT * step * slope  # (1)
        is_taken &= value.isfinite() & new.isfinite().all(-1)
        wide = is_taken[:, None]
        new = torch.where(wide, new, grad)
        trial = torch.where(wide, trial, z)
        memory.add(trial - z, new - grad)
        z, grad, energy = trial, new, torch.where(is_taken, value, energy)
        fresh = memory.direction(grad)
        is_down = (fresh * grad).sum(-1) < 0
        fresh = torch.where(is_down[:, None], fresh, -grad)
        first = 1 / grad.norm(dim=-1).clamp(min=1e-300)
        restart = torch.where(is_down & memory.is_used, 1.0, first.clamp(max=1.0))
        direction = torch.where(wide, fresh, direction)
        step = torch.where(is_taken, restart, step * _CUT)
        # A direction along which nothing helps is given up for the steepest.
        is_lost = step < 1e-12
        direction = torch.where(is_lost[:, None], -grad, direction)
        step = torch.where(is_lost, first.clamp(max=1.0) * 1e-3, step)
        if watch is not None and watch(z, grad, memory):
            break
        waited += 1
        if waited == _PATIENCE:
            if not ((best - energy).nan_to_num(0.0) > _GAIN).any():
                break
            best, waited = energy, 0
    return z, energy


class Memory:
    """The last steps and changes of the gradient of each start, the oldest first.

    Attributes:
        steps: Shape ``(M, S, D)``; 0 where there are fewer than ``M``.
        changes: Of the gradients along them, the same shape.
        rho: One over their products, shape ``(M, S)``; 0 where there are fewer.
        gamma: The approximate inverse Hessian without a step, shape ``(S,)``.
        is_used: Whether there is any, shape ``(S,)``.
    """

    def __init__(self, z: Tensor) -> None:
        self.steps = z.new_zeros(_MEMORY, *z.shape)
        self.changes = z.new_zeros(_MEMORY, *z.shape)
        self.rho = z.new_zeros(_MEMORY, len(z))
        self.gamma = z.new_ones(len(z))
        self.is_used = torch.zeros(len(z), dtype=torch.bool, device=z.device)

    def add(self, step: Tensor, change: Tensor) -> None:
        """Remember a step where the curvature along it is positive."""
        product = (step * change).sum(-1)
        size = change.square().sum(-1)
        is_good = product > 1e-10 * (step.norm(dim=-1) * size.sqrt())
        rho = torch.where(is_good, 1 / product, 0.0)
        gamma = torch.where(is_good, product / size, self.gamma)
        for name, value in (("steps", step), ("changes", change), ("rho", rho)):
            old = getattr(self, name)
            moved = torch.cat([old[1:], value[None]])
            mask = is_good.reshape(1, -1, *[1] * (old.dim() - 2))
            setattr(self, name, torch.where(mask, moved, old))
        self.gamma = gamma
        self.is_used = self.is_used | is_good

    def direction(self, grad: Tensor) -> Tensor:
        """Minus the approximate inverse Hessian times the gradient."""
        q, alphas = grad.clone(), []
        for s, y, rho in zip(
            self.steps.flip(0), self.changes.flip(0), self.rho.flip(0), strict=True
        ):
            alpha = rho * (s * q).sum(-1)
            q = q - alpha[:, None] * y
            alphas.append(alpha)
        q = q * self.gamma[:, None]
        for s, y, rho, alpha in zip(
            self.steps, self.changes, self.rho, reversed(alphas), strict=True
        ):
            q = q + (alpha - rho * (y * q).sum(-1))[:, None] * s
        return -q


def _distinct_ends(z: Tensor, energy: Tensor, max_modes: int) -> tuple[list[int], bool]:
    """Ends that may be different modes, the lowest first, and whether these are all."""
    chosen: list[int] = []
    order = energy.argsort()
    lowest = energy[order[0]]
    left = order[(energy[order] - lowest) < 2 * _NO_MASS + 10 * z.shape[-1]]
    while len(left) and len(chosen) < max_modes:
        first = left[0]
        chosen.append(int(first))
        apart = (z[left] - z[first]).abs().amax(-1) > 1e-3
        left = left[apart]
    return chosen, not len(left)


def _polish(
    value_and_grad: ValueAndGrad, z: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Newton's method; modes, energies and Cholesky factors of the covariances."""
    z = z.clone()
    energy, grad = value_and_grad(z)
    spacing = torch.full_like(z, 1e-5)
    for number in range(_NEWTON):
        hessian = _hessian(value_and_grad, z, spacing)
        values, vectors = _eigh(hessian)
        spacing = 0.02 / hessian.diagonal(dim1=-2, dim2=-1).abs().clamp(1e-8).sqrt()
        if number == _NEWTON - 1:
            break
        curvature = values.abs().clamp(min=1e-8)
        rotated = (vectors.mT @ clean(grad)[:, :, None])[:, :, 0] / curvature
        step = -(vectors @ rotated[:, :, None])[:, :, 0]
        # Far from the mode a Newton step may lead anywhere: the best of a few lengths.
        lengths = torch.tensor([1.0, 0.3, 0.05]).to(z)
        trials = z + lengths[:, None, None] * step
        value, new = value_and_grad(trials.flatten(0, 1))
        value = value.reshape(len(lengths), len(z)).nan_to_num(torch.inf)
        index = value.argmin(0)
        rows = torch.arange(len(z), device=z.device)
        is_lower = value[index, rows] < energy
        z = torch.where(is_lower[:, None], trials[index, rows], z)
        new = new.reshape(trials.shape)[index, rows]
        grad = torch.where(is_lower[:, None], new, grad)
        gain = (energy - value[index, rows]).clamp(min=0).amax()
        energy = torch.where(is_lower, value[index, rows], energy)
        if number and gain < 1e-6:
            break
    is_mode = (values > 1e-10 * values.amax(-1, keepdim=True)).all(-1)
    is_mode &= energy.isfinite() & values.isfinite().all(-1)
    if not is_mode.any():
        return None
    z, energy, values, vectors = (
        part[is_mode] for part in (z, energy, values, vectors)
    )
    # Directions that are flat to the eye are as wide as the base, not wider.
    inverse = vectors @ (values.clamp(min=1e-2).reciprocal()[:, :, None] * vectors.mT)
    factor, info = torch.linalg.cholesky_ex(inverse)
    if (info != 0).all():
        return None
    good = info == 0
    return z[good], energy[good], factor[good]


def _hessian(value_and_grad: ValueAndGrad, z: Tensor, spacing: Tensor) -> Tensor:
    """Hessians by central differences of the gradient, shape ``(K, D, D)``."""
    size = z.shape[-1]
    steps = spacing.diag_embed()
    ends = torch.stack([z[:, None] + steps, z[:, None] - steps])
    _, grad = value_and_grad(ends.reshape(-1, size))
    above, below = grad.reshape(ends.shape)
    hessian = (above - below) / (2 * spacing[:, :, None])
    return (hessian + hessian.mT) / 2


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; ``nan`` for matrices that are not finite."""
    is_finite = matrix.isfinite().all(-1).all(-1)
    clean = torch.where(
        is_finite[:, None, None], matrix, torch.eye(len(matrix[0])).to(matrix)
    )
    values, vectors = torch.linalg.eigh(clean)
    return values.where(is_finite[:, None], torch.nan), vectors


def _distinct_modes(loc: Tensor, factor: Tensor, log_mass: Tensor) -> list[int]:
    """One of each group of ends at the same mode, by falling mass."""
    kept: list[int] = []
    left = log_mass.argsort(descending=True)
    left = left[log_mass[left] > log_mass[left[0]] - _NO_MASS]
    while len(left):
        first = left[0]
        kept.append(int(first))
        apart = torch.linalg.solve_triangular(
            factor[first], (loc[left] - loc[first]).mT, upper=False
        )
        left = left[apart.square().sum(0) > _SAME**2]
    return kept


def clean(grad: Tensor) -> Tensor:
    """Gradients with 0 in the place of what is not finite."""
    return grad.nan_to_num(0.0, 0.0, 0.0)
