r"""Starting points for chains: the best normal approximation on the way to a mode.

A mode is a good start where the posterior is like a Gaussian, and a trap where the
density grows without bound, as that of a hierarchy whose scale goes to 0. So descents
from many starts are followed by :mod:`pyro_ebm.mcmc.starts.modes`, and each stands for
the one of its normal approximations with the best evidence lower bound. With the
limited-memory inverse Hessian :math:`H = J J^\top` at the point :math:`z`,

.. math::
    q &= \mathcal{N}(z - H \nabla f(z),\, H), \qquad
    \mathrm{ELBO} = \mathbb{E}_q[-f(x) - \log q(x)]                        \tag{1} \\
    J &= (I - s_m v_m^\top) \cdots (I - s_1 v_1^\top)\, A^{1/2}, \qquad
    v_j = \rho_j \Bigl(y_j - \tfrac{b_j}{\sqrt{\rho_j s_j^\top b_j}}\Bigr),
    \quad b_j = H_{j-1}^{-1} s_j                                          \tag{2}

where :math:`s_j` are the last steps, :math:`y_j` the changes of the gradient along
them, :math:`\rho_j = 1 / s_j^\top y_j`, and :math:`A` is a diagonal matrix that has
learned from all steps. Draws of these approximations, with the
gradients there, give the metric in which chains start.

References:
    Zhang, Carpenter, Gelman & Vehtari (2022), JMLR 23(306), 1-49.
    Nocedal & Wright (2006), Numerical Optimization, chapters 6 and 7.
"""

__all__ = ["Approximations", "find_approximations"]

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.metric import MAX_DENSE
from pyro_ebm.mcmc.starts.modes import (
    Descent,
    Memory,
    ValueAndGrad,
    clean,
    location_and_scale,
)

#: Draws of each approximation in a round of the descent, at least.
_MIN_DRAWS = 4
#: Gradients at each start, and rounds without a better bound, after which it ends.
_MAX_ROUNDS, _PATIENCE = 300, 30
#: Draws in all for the bounds and the metric, and for each column of a dense one.
_NUM_DRAWS, _DRAWS_PER_COORDINATE = 512, 5


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
    """Normal approximations (2) where some descents have got to.

    Args:
        z: Points, shape ``(K, D)``.
        grad: The gradients there.
        memory: Of the descents.
        diagonal: Of :math:`A`, shape ``(K, D)``.
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
            self.lines[j] = weight[:, None] * (y - factor[:, None] * b)  # (2)
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
            x = x - s * (v * x).sum(-1, keepdim=True)  # (2)
        return x

    def evaluated(
        self, value_and_grad: ValueAndGrad, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``-f - log q`` of (1) at so many draws; these, energies and gradients."""
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
            return self._waited >= _PATIENCE
        self._learn(memory)
        normal = _Normals(z, clean(grad), memory, self._diagonal)
        gap, *_ = normal.evaluated(self._value_and_grad, self._num_draws)
        bound = gap.mean(1)  # (1)
        is_better = has_moved & (bound > self._bound)
        self.normal.replace(is_better, normal)
        self._bound = torch.where(is_better, bound, self._bound)
        self._waited = 0 if is_better.any() else self._waited
        return self._waited >= _PATIENCE

    def _learn(self, memory: Memory) -> None:
        """The diagonal of the last update of the Hessian, scaled to fit the step."""
        s, y, rho = memory.steps[-1], memory.changes[-1], memory.rho[-1][:, None]
        old = self._diagonal
        a = (old * y.square()).sum(1, keepdim=True)
        c = (s.square() / old).sum(1, keepdim=True)
        inverse = rho * (a / old + y.square() - a / c * (s / old).square())
        is_good = (rho > 0) & (inverse > 0) & inverse.isfinite()
        self._diagonal = torch.where(is_good, 1 / inverse, old)
