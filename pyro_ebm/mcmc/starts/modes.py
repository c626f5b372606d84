r"""Descents from many points: modes, and the best normal approximations on the way.

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

A mode is a good start where the posterior is like a Gaussian, and a trap where the
density grows without bound, as that of a hierarchy whose scale goes to 0. So for the
start of chains each descent stands for the one of its normal approximations with the
best evidence lower bound. With the limited-memory inverse Hessian :math:`H = J J^\top`
at the point :math:`z`,

.. math::
    q &= \mathcal{N}(z - H \nabla f(z),\, H), \qquad
    \mathrm{ELBO} = \mathbb{E}_q[-f(x) - \log q(x)]                        \tag{3} \\
    J &= (I - s_m v_m^\top) \cdots (I - s_1 v_1^\top)\, \Lambda^{1/2}, \qquad
    v_j = \rho_j \Bigl(y_j - \tfrac{b_j}{\sqrt{\rho_j s_j^\top b_j}}\Bigr),
    \quad b_j = H_{j-1}^{-1} s_j                                          \tag{4}

where :math:`s_j` are the last steps, :math:`y_j` the changes of the gradient along
them, :math:`\rho_j = 1 / s_j^\top y_j`, and :math:`\Lambda` is a diagonal matrix that
has learned from all steps. Draws of these approximations, with the gradients there,
give the metric in which chains start.

References:
    Zhang, Carpenter, Gelman & Vehtari (2022), JMLR 23(306), 1-49.
    Nocedal & Wright (2006), Numerical Optimization, chapters 6 and 7.
    Raftery & Bao (2010), Biometrics 66, 1162-1173 (descents as starts of a sampler).
"""

__all__ = [
    "Approximations",
    "Modes",
    "ValueAndGrad",
    "find_approximations",
    "find_modes",
    "valleys",
]

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.metric import MAX_DENSE

#: Gradients and steps that a descent remembers.
_MEMORY = 10
#: The factor ``c`` of (1), and what a step is cut by.
_SUFFICIENT = 1e-4
_CUT = 0.3
#: A start has arrived when it gains no more than this in so many rounds, in nats.
_GAIN = 1e-3
_PATIENCE = 20
#: Each time, half of those that have more to gain are given up, the highest first, down
#: to this.
_FEWEST = 256
#: Starts this many times as far apart as their lower half are not all in earnest.
_ABSURD = 1e3
#: Points that are compared with their neighbours, and how many those are.
_BLOCK, _NEIGHBOURS = 2048, 7
#: Rounds of Newton's method.
_NEWTON = 6
#: Ends this near to a mode, in its own standard deviations, are the same mode.
_SAME = 1.0
#: A mode with less of the mass than this, in nats below the largest, is left out.
_NO_MASS = 25.0
#: Draws of each approximation in a round of the descent, at least.
_MIN_DRAWS = 4
#: Gradients at each start, and rounds without a better bound, after which it ends.
_MAX_ROUNDS, _PATIENCE_OF_BOUND = 300, 30
#: Draws in all for the bounds and the metric, and for each column of a dense one.
_NUM_DRAWS, _DRAWS_PER_COORDINATE = 512, 5

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class Modes(NamedTuple):
    r"""Modes, by falling mass (2).

    Attributes:
        loc: Where they are, shape ``(K, D)``.
        energy: Energy there in nats, shape ``(K,)``.
        scale_tril: Cholesky factors of :math:`A^{-1}`, shape ``(K, D, D)``.
        log_mass: (2), shape ``(K,)``.
        hits: Descents that ended within a standard deviation, shape ``(K,)``. Where a
            mode was met by one there may well be others.
        ends: Where the descents ended, of those with a finite energy that were not
            given up as the slowest, shape ``(S, D)``.
        is_complete: Whether all distinct ends were polished and kept; if not, there
            were more than could be measured.
    """

    loc: Tensor
    energy: Tensor
    scale_tril: Tensor
    log_mass: Tensor
    hits: Tensor
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
    value, _ = value_and_grad(starts)
    low = starts[value.nan_to_num(torch.inf).argsort()[: len(starts) // 2 + 1]]
    low_loc, low_scale = location_and_scale(low)
    if (scale > _ABSURD * low_scale).any():  # draws of a vague prior
        loc, scale = low_loc, low_scale

    def scaled(z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(loc + scale * z)
        return value, grad * scale

    z, energy = _descend(scaled, (starts - loc) / scale, max_rounds)
    if not len(z):
        return None
    chosen, is_complete = _distinct_ends(z, energy, max_modes)
    found = _polish(scaled, z[chosen])
    if found is None:
        return None
    modes, energies, factor = found
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_mass = -energies + modes.shape[-1] / 2 * math.log(2 * math.pi) + log_det  # (2)
    kept = _distinct_modes(modes, factor, log_mass)
    hits = [int((_apart(modes[k], factor[k], z) < _SAME).sum()) for k in kept]
    return Modes(
        loc + scale * modes[kept],
        energies[kept],
        scale[:, None] * factor[kept],
        log_mass[kept] + scale.log().sum(),
        torch.tensor(hits, device=z.device),
        loc + scale * z,
        is_complete,
    )


def valleys(u: Tensor, value: Tensor) -> Tensor:
    """Points with lower energy than their nearest neighbours, the lowest first.

    Args:
        u: Shape ``(N, D)``, compared in blocks of 2,048.
        value: Energies, shape ``(N,)``; points where they are not finite are left out.
    """
    u, value = u[value.isfinite()], value[value.isfinite()]
    found = [
        _low(*block) for block in zip(u.split(_BLOCK), value.split(_BLOCK), strict=True)
    ]
    is_low = torch.cat([*found, u.new_zeros(0, dtype=torch.bool)])
    return u[is_low][value[is_low].argsort()]


def _low(u: Tensor, value: Tensor) -> Tensor:
    """Which are no higher than their neighbours, themselves among them, ``(N,)``."""
    if len(u) <= _NEIGHBOURS:
        return torch.ones_like(value, dtype=torch.bool)
    # Places in the order of each coordinate: no scale and no outlier matters.
    place = u.argsort(0).argsort(0).double()
    near = torch.cdist(place, place).topk(_NEIGHBOURS, largest=False).indices
    return (value[:, None] <= value[near]).all(-1)


def location_and_scale(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Median and robust spread of the starts, shape ``(D,)`` each."""
    loc = starts.median(0).values
    spread = 1.5 * (starts - loc).abs().median(0).values
    return loc, torch.where(spread > 0, spread, torch.ones_like(spread))


def _descend(
    value_and_grad: ValueAndGrad, z: Tensor, max_rounds: int
) -> tuple[Tensor, Tensor]:
    """Where starts end by (1), and the energies there: those finite, not given up."""
    ends, lows = [z[:0]], [z[:0, 0]]
    descent = Descent(value_and_grad, z)
    best = descent.energy
    for number in range(1, max_rounds + 1):
        descent.step()
        if number % _PATIENCE and number < max_rounds:
            continue
        energy = descent.energy
        is_on_its_way = (best - energy).nan_to_num(0.0) > _GAIN
        is_end = ~is_on_its_way & energy.isfinite()
        if number == max_rounds:
            is_end = energy.isfinite()
        ends.append(descent.z[is_end])
        lows.append(energy[is_end])
        left = is_on_its_way.nonzero().squeeze(-1)
        is_near = descent.decrement[left] < _GAIN  # its next look will tell
        most = max(_FEWEST, len(energy) // 2, int(is_near.sum()))
        left = left[energy[left].where(~is_near, -torch.inf).argsort()[:most]]
        if not len(left):
            break
        descent.select(left)
        best = descent.energy
    return torch.cat(ends), torch.cat(lows)


class Descent:
    """Quasi-Newton descents (1) from many starts, side by side.

    Args:
        value_and_grad: As for :func:`find_modes`.
        z: Starts, shape ``(S, D)``, at a scale of about one.

    Attributes:
        z: Where they are.
        energy: Their energies, shape ``(S,)``.
        grad: The gradients there, shape ``(S, D)``; 0 where they are not finite.
        memory: Of the last steps.
    """

    def __init__(self, value_and_grad: ValueAndGrad, z: Tensor) -> None:
        self.value_and_grad = value_and_grad
        self.z = z
        self.energy, grad = value_and_grad(z)
        self.grad = clean(grad)
        self.memory = Memory(z)
        self.direction = -self.grad
        self.length = 1 / self.grad.norm(dim=-1).clamp(min=1e-300)

    @property
    def decrement(self) -> Tensor:
        """What is left to gain by the quadratic model, in nats, shape ``(S,)``.

        References:
            Boyd & Vandenberghe (2004), Convex Optimization, section 9.5.1.
        """
        gain = -(self.grad * self.memory.direction(self.grad)).sum(-1) / 2
        return torch.where(self.memory.is_used & (gain >= 0), gain, torch.inf)

    def select(self, which: Tensor) -> None:
        """Go on with some of them."""
        for name in ("z", "energy", "grad", "direction", "length"):
            setattr(self, name, getattr(self, name)[which])
        self.memory.select(which)

    def step(self) -> None:
        """One gradient of each."""
        z, grad, energy = self.z, self.grad, self.energy
        trial = z + self.length[:, None] * self.direction
        value, new = self.value_and_grad(trial)
        slope = (grad * self.direction).sum(-1)
        is_taken = value <= energy + _SUFFICIENT * self.length * slope  # (1)
        is_taken &= value.isfinite() & new.isfinite().all(-1)
        wide = is_taken[:, None]
        new = torch.where(wide, new, grad)
        trial = torch.where(wide, trial, z)
        self.memory.add(trial - z, new - grad)
        self.z, self.grad = trial, new
        self.energy = torch.where(is_taken, value, energy)
        fresh = self.memory.direction(new)
        is_down = (fresh * new).sum(-1) < 0
        fresh = torch.where(is_down[:, None], fresh, -new)
        first = 1 / new.norm(dim=-1).clamp(min=1e-300)
        restart = torch.where(is_down & self.memory.is_used, 1.0, first.clamp(max=1.0))
        direction = torch.where(wide, fresh, self.direction)
        length = torch.where(is_taken, restart, self.length * _CUT)
        # A direction along which nothing helps is given up for the steepest.
        is_lost = length < 1e-12
        self.direction = torch.where(is_lost[:, None], -new, direction)
        self.length = torch.where(is_lost, first.clamp(max=1.0) * 1e-3, length)


class Memory:
    """Limited memory of steps and gradient changes of each descent, the oldest first.

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

    def select(self, which: Tensor) -> None:
        """Keep the memories of some starts."""
        for name in ("steps", "changes", "rho"):
            setattr(self, name, getattr(self, name)[:, which])
        self.gamma, self.is_used = self.gamma[which], self.is_used[which]

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
        before = energy
        z, energy, grad = _best_of_step(value_and_grad, z, energy, grad, step)
        if number and (before - energy).amax() < 1e-6:
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


def _best_of_step(
    value_and_grad: ValueAndGrad, z: Tensor, energy: Tensor, grad: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points, energies and gradients after the best of a few lengths of a step.

    Far from the mode a Newton step may lead anywhere; nothing moves to more energy.
    """
    lengths = torch.tensor([1.0, 0.3, 0.05]).to(z)
    trials = z + lengths[:, None, None] * step
    value, new = value_and_grad(trials.flatten(0, 1))
    value = value.reshape(len(lengths), len(z)).nan_to_num(torch.inf)
    index = value.argmin(0)
    rows = torch.arange(len(z), device=z.device)
    is_lower = value[index, rows] < energy
    new = new.reshape(trials.shape)[index, rows]
    return (
        torch.where(is_lower[:, None], trials[index, rows], z),
        torch.where(is_lower, value[index, rows], energy),
        torch.where(is_lower[:, None], new, grad),
    )


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
        left = left[_apart(loc[first], factor[first], loc[left]) > _SAME]
    return kept


def _apart(loc: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    """Distances of points from a mode in its standard deviations, shape ``(N,)``."""
    away = torch.linalg.solve_triangular(factor, (z - loc).mT, upper=False)
    return away.square().sum(0).sqrt()


def clean(grad: Tensor) -> Tensor:
    """Replace non-finite gradients by 0."""
    return grad.nan_to_num(0.0, 0.0, 0.0)


# Normal approximations -------------------------------------------------------------


class Approximations(NamedTuple):
    """The best normal approximation on each path, with draws.

    Attributes:
        loc: Means, shape ``(K, D)``.
        bound: Evidence lower bounds in nats, shape ``(K,)``, with the median for the
            mean, which a few draws without density do not spoil.
        x: Draws of each, shape ``(K, N, D)``.
        energy: Their energies, shape ``(K, N)``.
        grad: The gradients there, shape ``(K, N, D)``.
    """

    loc: Tensor
    bound: Tensor
    x: Tensor
    energy: Tensor
    grad: Tensor


@torch.no_grad()
def find_approximations(
    value_and_grad: ValueAndGrad, starts: Tensor, batch_size: int
) -> Approximations:
    """Follow descents from some starts, and keep the best approximation of each.

    Args:
        value_and_grad: Maps ``(N, D)`` to energies ``(N,)`` and gradients ``(N, D)``.
        starts: Shape ``(K, D)``, in double precision.
        batch_size: Points at which the energy is evaluated together.
    """
    loc, scale = location_and_scale(starts)

    def scaled(z: Tensor) -> tuple[Tensor, Tensor]:
        parts = [loc + scale * part for part in z.split(batch_size)]
        last = parts[-1]  # other numbers of points would be traced anew
        filling = last[-1:].expand(batch_size - len(last), -1)
        parts[-1] = torch.cat([last, filling])
        values, grads = zip(*map(value_and_grad, parts), strict=True)
        value, grad = torch.cat(values)[: len(z)], torch.cat(grads)[: len(z)]
        return value, grad * scale

    z = (starts - loc) / scale
    best = _Best(scaled, z, max(batch_size // len(z), _MIN_DRAWS))
    descent = Descent(scaled, z)
    for _ in range(_MAX_ROUNDS):
        descent.step()
        if best.watch(descent.z, descent.grad, descent.memory):
            break
    wanted = max(_NUM_DRAWS, _DRAWS_PER_COORDINATE * min(z.shape[1], MAX_DENSE))
    count = math.ceil(wanted / max(len(z), batch_size))
    count *= max(batch_size // len(z), 1)
    gap, draws, energy, grad = best.normal.evaluated(scaled, count)
    return Approximations(
        loc + scale * best.normal.loc,
        gap.median(1).values + scale.log().sum(),
        loc + scale * draws,
        energy,
        grad / scale,
    )


class _Normals:
    r"""Normal approximations (4) where some descents have got to.

    Args:
        z: Points, shape ``(K, D)``.
        grad: The gradients there.
        memory: Of the descents.
        diagonal: Of :math:`\Lambda`, shape ``(K, D)``.
    """

    def __init__(
        self, z: Tensor, grad: Tensor, memory: Memory, diagonal: Tensor
    ) -> None:
        self.steps, self.root = memory.steps, diagonal.sqrt()
        self.log_det = self.root.log().sum(1)
        self.lines = torch.zeros_like(self.steps)
        products = self.steps / diagonal  # H^-1 s, of all steps
        for j, (s, y, rho) in enumerate(
            zip(memory.steps, memory.changes, memory.rho, strict=True)
        ):
            b = products[j]
            ratio = rho * (s * b).sum(-1)
            is_used = ratio > 0
            factor = torch.where(is_used, ratio, 1.0).rsqrt()
            weight = torch.where(is_used, rho, 0.0)
            self.lines[j] = weight[:, None] * (y - factor[:, None] * b)  # (4)
            self.log_det = self.log_det - factor.log()
            later = memory.steps[j + 1 :]
            gain = (later * y).sum(-1) * weight
            loss = (later * b).sum(-1) * weight * factor.square()
            products[j + 1 :] += gain[..., None] * y - loss[..., None] * b
        for s, v in zip(self.steps.flip(0), self.lines.flip(0), strict=True):
            grad = grad - v * (s * grad).sum(-1, keepdim=True)
        self.loc = z - self._spread(self.root * grad)

    def _spread(self, noise: Tensor) -> Tensor:
        x = noise * self.root
        for s, v in zip(self.steps, self.lines, strict=True):
            x = x - s * (v * x).sum(-1, keepdim=True)  # (4)
        return x

    def evaluated(
        self, value_and_grad: ValueAndGrad, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``-f - log q`` of (3) at so many draws; these, energies and gradients."""
        num, size = self.loc.shape
        noise = torch.randn(count, num, size).to(self.loc)
        x = self.loc + self._spread(noise)
        energy, grad = value_and_grad(x.flatten(0, 1))
        energy, grad = energy.reshape(count, num), grad.reshape(x.shape)
        log_q = -noise.square().sum(-1) / 2 - self.log_det
        gap = -energy - log_q + size / 2 * math.log(2 * math.pi)
        gap = gap.where(gap.isfinite(), -torch.inf)
        return gap.T, x.transpose(0, 1), energy.T, grad.transpose(0, 1)

    def replace(self, is_better: Tensor, other: "_Normals") -> None:
        """Take over some of another, where ``is_better`` of shape ``(K,)``."""
        for name, value in vars(other).items():
            mask = is_better if value.dim() == 1 else is_better[:, None]
            setattr(self, name, torch.where(mask, value, getattr(self, name)))


class _Best:
    """The best approximation so far on each path."""

    def __init__(self, value_and_grad: ValueAndGrad, z: Tensor, num_draws: int) -> None:
        self._value_and_grad, self._num_draws = value_and_grad, num_draws
        self._diagonal = torch.ones_like(z)
        self.normal = _Normals(z, torch.zeros_like(z), Memory(z), self._diagonal)
        self._bound = z.new_full((len(z),), -torch.inf)
        self._last, self._waited = z, 0

    def watch(self, z: Tensor, grad: Tensor, memory: Memory) -> bool:
        """Look at the approximations where descents have got to; whether to stop."""
        has_moved = (z != self._last).any(-1)
        self._last = z
        self._waited += 1
        if not has_moved.any():
            return self._waited >= _PATIENCE_OF_BOUND
        self._learn(memory)
        normal = _Normals(z, clean(grad), memory, self._diagonal)
        gap, *_ = normal.evaluated(self._value_and_grad, self._num_draws)
        bound = gap.mean(1)  # (3)
        is_better = has_moved & (bound > self._bound)
        self.normal.replace(is_better, normal)
        self._bound = torch.where(is_better, bound, self._bound)
        self._waited = 0 if is_better.any() else self._waited
        return self._waited >= _PATIENCE_OF_BOUND

    def _learn(self, memory: Memory) -> None:
        """The diagonal of the last update of the Hessian, scaled to fit the step."""
        s, y, rho = memory.steps[-1], memory.changes[-1], memory.rho[-1][:, None]
        old = self._diagonal
        a = (old * y.square()).sum(1, keepdim=True)
        c = (s.square() / old).sum(1, keepdim=True)
        inverse = rho * (a / old + y.square() - a / c * (s / old).square())
        is_good = (rho > 0) & (inverse > 0) & inverse.isfinite()
        self._diagonal = torch.where(is_good, 1 / inverse, old)
