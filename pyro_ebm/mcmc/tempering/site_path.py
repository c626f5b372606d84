r"""Paths of energies over finite supports, from independent sites to a target.

Where the target knows its blocks the energies :math:`f_\beta` of the path know them
too: lattices and graphs are scaled from uniform sites,

.. math::
    f_\beta(x) = (1 - \beta)\, f_0(x) + \beta\, f(x), \qquad f_0 = -\log p_0 \tag{1}

or mixed with a base that is a product over the sites; a restricted Boltzmann machine is
scaled in its weights. What a factor graph forbids is only unlikely on the way. Any
other energy is mixed by (1) with any base, and moves site by site or by its gradient.
"""

__all__ = [
    "SitePath",
    "SiteState",
    "WAY_OUT",
    "path_between",
    "reversal",
]

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast, final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import Energy
from pyro_ebm.energies.base import ClosedForm
from pyro_ebm.energies.discrete.boltzmann import BoltzmannEnergy
from pyro_ebm.energies.discrete.exact.elimination import Factors
from pyro_ebm.energies.discrete.finite import (
    AnnealingPath,
    finite_values,
)
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.energies.discrete.rbm import RBMEnergy
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.energies.distribution import base_energy
from pyro_ebm.energies.views.unconstrained import is_finite_support
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, replace_nonfinite
from pyro_ebm.mcmc.kernels.gibbs import Gibbs, SweepKernel
from pyro_ebm.mcmc.tempering.path import GeometricPath, real_path

#: Half the step of a derivative along the path.
_STEP = 1e-3
#: Where hardly any point is allowed.
WAY_OUT = (
    "Give a base whose draws fall where the energy is finite, or write what is "
    "forbidden as -inf in the potentials of a FactorGraphEnergy: its path leads there."
)


def reversal(kernel: Kernel) -> Kernel:
    """The time reversal: sweeps from the last block to the first, else the same."""
    if isinstance(kernel, SweepKernel):
        backwards = not kernel.is_reversed
        return dataclasses.replace(cast(Any, kernel), is_reversed=backwards)
    return kernel


@final
class SitePath:
    """A path over a finite support, with what chains need to travel it.

    Args:
        energy: The target.
        base: A normalised distribution over the same support; default: uniform sites,
            or what the energy itself begins with. What is no product over the sites
            leaves the blocks of the energy unused.

    Attributes:
        inverse_temperature: Where kernels move, in [0, 1].
        log_start: Log Z of the energy at 0.
        is_linear: Whether the energies between are those of (1).
        num_evaluations: What the moves have cost, in evaluations of a point.
        on_move: Called at each move.

    Raises:
        ValueError: If the support is not finite or the base does not fit.
    """

    def __init__(
        self, energy: Energy, base: dist.TorchDistribution | None = None
    ) -> None:
        path = _path(energy, base)
        self.event_shape, self.event_dim = energy.event_shape, energy.event_dim
        self.distribution = path.start.distribution
        self.log_start = float(path.start.log_partition)
        self.transform = torch.distributions.transforms.identity_transform
        self.is_linear = path.is_linear
        self._at = functools.lru_cache(maxsize=32)(path.at)
        self.inverse_temperature, self.num_evaluations = 1.0, 0
        self.on_move: Callable[[], Any] = lambda: None

    def at(self, beta: float) -> Energy:
        """The energy at an inverse temperature, 1 at the target."""
        return self._at(beta)

    def evaluate(self, x: Tensor) -> "SiteState":
        """Chains at points of the support, shape ``(*chains, *event)``."""
        return SiteState(x.to(**self.at(1.0).tensor_options(x)), self)

    def sample_base(self, *shape: int) -> "SiteState":
        """Exact draws at the inverse temperature 0, chain shape ``shape``."""
        return self.evaluate(self.distribution.sample(torch.Size(shape)))

    def start(self, *shape: int) -> "SiteState":
        """Go to the base; exact draws of it.

        Raises:
            DivergenceError: If the energy on the way is finite at none of them.
        """
        self.inverse_temperature = 0.0
        state = self.sample_base(*shape)
        if not self.at(0.5)(state.x).isfinite().any():
            number = state.x.numel() // max(self.event_shape.numel(), 1)
            raise DivergenceError(
                f"energy is finite at none of {number} draws of the base. {WAY_OUT}"
            )
        return state

    def with_finite_chains(self, state: "SiteState") -> "SiteState":
        """Chains whose energy is not finite on the way, put where others are.

        Raises:
            DivergenceError: If it is at no chain.
        """
        x = state.x.flatten(0, -self.event_dim - 1)
        chains = ChainState(x, self.at(0.5)(x), torch.zeros_like(x))
        return SiteState(replace_nonfinite(chains).x.reshape(state.x.shape), self)

    def step(self, kernel: Kernel, state: "SiteState") -> tuple["SiteState", StepInfo]:
        """One transition of a kernel at the current temperature.

        Args:
            kernel: For finite supports.
            state: Chain shape ``(*chains,)``.
        """
        energy, x = self.at(self.inverse_temperature), state.x
        chains = x.shape[: x.dim() - self.event_dim]
        if isinstance(kernel, SweepKernel):  # whose step has the energy too
            x = kernel.sweep(energy, x)
            taken = torch.ones(chains, device=x.device)
            info = StepInfo(taken, taken.bool(), taken.bool())
        else:
            (x, *_), info = kernel.step(energy, kernel.init(energy, x))
        self.num_evaluations += self.cost(kernel) * chains.numel()
        self.on_move()
        return SiteState(x, self), info

    def joined(self, states: "Sequence[SiteState]") -> "SiteState":
        """Concatenate states of chain shapes ``(M, N_i)`` to ``(M, sum(N_i))``."""
        return SiteState(torch.cat([state.x for state in states], 1), self)

    def cost(self, kernel: Kernel) -> int:
        """Evaluations that a move with its weight costs a chain; by blocks it is one.

        Args:
            kernel: For finite supports.
        """
        if isinstance(kernel, Gibbs):
            cost = kernel.num_evaluations(self.at(1.0))
            # Site by site a weight is two evaluations more, not a small part.
            return cost + 2 if cost > kernel.num_sweeps else cost
        return kernel.num_gradients + 3 * kernel.has_step_size


@final
class SiteState:
    """Points of a finite support that travel a path.

    Attributes:
        x: Shape ``(*chains, *event)``.
        path: That they travel.
    """

    def __init__(
        self, x: Tensor, path: SitePath, ends: tuple[Tensor, ...] | None = None
    ) -> None:
        self.x, self.path, self._ends = x, path, ends
        self._neighbours: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def u(self) -> Tensor:
        """The points, which move in their own space."""
        return self.x

    @property
    def target(self) -> Tensor:
        """Energy of the target, shape ``(*chains,)``."""
        return self.energy(1.0)

    def select(self, chains: tuple[Any, ...]) -> "SiteState":
        """The points that an index tuple names."""
        ends = self._ends and tuple(end[chains] for end in self._ends)
        return SiteState(self.x[chains], self.path, ends)

    def energy(self, beta: float) -> Tensor:
        """At an inverse temperature, in double precision, shape ``(*chains,)``."""
        at = self.path.at
        if not self.path.is_linear:
            value: Tensor = at(beta)(self.x)
            return value.double()
        if self._ends is None:
            self._ends = at(0.0)(self.x).double(), at(1.0)(self.x).double()
        if beta in (0, 1):
            return self._ends[int(beta)]
        return (1 - beta) * self._ends[0] + beta * self._ends[1]  # (1)

    def log_weight(self, low: float, high: float) -> Tensor:
        """Log-weight of a step along the path, ``-inf`` where it leads nowhere."""
        there, new = self.energy(low), self.energy(high)
        return (there - new).where(new != torch.inf, -torch.inf)

    def neighbours(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights at the temperatures above and below, each ``(C, K - 1)``.

        Args:
            betas: That the replicas are at, shape ``(K,)``; chain shape ``(C, K)``.
        """
        if self._neighbours is None or not torch.equal(self._neighbours[0], betas):
            at = betas.tolist()
            columns = [self.select((slice(None), k)) for k in range(len(at))]
            steps = list(zip(at[:-1], at[1:], strict=True))
            up = [x.log_weight(*s) for x, s in zip(columns[:-1], steps, strict=True)]
            down = [
                x.log_weight(*reversed(s))
                for x, s in zip(columns[1:], steps, strict=True)
            ]
            self._neighbours = betas, torch.stack(up, 1), torch.stack(down, 1)
        return self._neighbours[1:]

    def slope(self, beta: float) -> Tensor:
        """The derivative of the energy along the path, shape ``(*chains,)``."""
        low, high = max(beta - _STEP, 0.0), min(beta + _STEP, 1.0)
        if self.path.is_linear:
            low, high = 0.0, 1.0
        return (self.energy(high) - self.energy(low)) / (high - low)


def _path(energy: Energy, base: dist.TorchDistribution | None) -> AnnealingPath:
    if finite_values(energy.support) is None:
        raise ValueError(
            "energy must have a finite support for a path over sites, got "
            f"{energy.support}. On a continuous support use pyro_ebm.partition.estimate"
            "."
        )
    is_sites = isinstance(base, IndependentSites)
    is_uniform = base is None or (is_sites and base.is_uniform)
    if is_uniform and isinstance(energy, SiteEnergy | RBMEnergy):
        return energy.annealing_path()
    if base is None:
        like = torch.empty(0, **energy.tensor_options())
        base = IndependentSites.uniform(energy.support, energy.event_shape, like)
    first = cast(Energy, base_energy(base, energy))  # None only for no base
    logits = _site_logits(base, energy)
    is_finite = logits is not None and bool(logits.isfinite().all())
    if is_finite and isinstance(energy, BoltzmannEnergy | RBMEnergy):
        return energy.annealing_path(logits)
    start = ClosedForm(torch.zeros(()), base)
    if logits is not None and isinstance(energy, SiteEnergy):
        return AnnealingPath(
            start,
            lambda beta: _BetweenSites(first, logits, energy, beta),
            is_linear=True,
        )
    return AnnealingPath(
        start, lambda beta: _Between(first, energy, beta), is_linear=True
    )


def path_between(
    energy: Energy, base: dist.TorchDistribution | None
) -> GeometricPath | SitePath:
    """The path of an energy over a finite support, or through real space.

    Args:
        energy: The target.
        base: A normalised distribution over the same support; over a finite one it may
            be ``None``, see :class:`SitePath`.

    Raises:
        NotImplementedError: If the support is discrete and infinite.
        TypeError: If the base is missing.
        ValueError: If it does not fit.
    """
    if is_finite_support(energy.support):
        return SitePath(energy, base)
    if base is None:
        raise TypeError(
            f"base must be a Pyro distribution over the support {energy.support}, got "
            "None: only a finite support has one of its own."
        )
    return real_path(energy, base)


def _site_logits(base: Any, energy: Energy) -> Tensor | None:
    """Log-probabilities of a product over sites, ``(q, *event)``, if it is one."""
    values = torch.tensor(finite_values(energy.support), **energy.tensor_options())
    if isinstance(base, IndependentSites):
        return base.log_probs.to(values)
    if not isinstance(base, torch.distributions.Independent) or base.batch_shape:
        return None
    one: Any = base.base_dist
    while isinstance(one, torch.distributions.Independent):
        one = one.base_dist
    if one.event_shape or one.batch_shape != energy.event_shape:
        return None
    points = values.reshape(-1, *(1,) * energy.event_dim)
    logits: Tensor = one.log_prob(points.expand(-1, *energy.event_shape))
    return logits.to(values)


@final
class _BetweenSites(SiteEnergy):
    """The geometric path from independent sites, which keeps the blocks."""

    def __init__(
        self, base: Energy, logits: Tensor, target: SiteEnergy, beta: float
    ) -> None:
        super().__init__(
            target.event_shape, target.support, target.blocks, target.values
        )
        self.sites: SiteEnergy = target
        self.logits, self.between = logits, _Between(base, target, beta)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.between(x)
        return value

    def factors(self) -> Factors | None:
        factors, beta = self.sites.factors(), self.between.beta
        if factors is None or beta == 1:
            return factors
        base = (1 - beta) * self.logits.flatten(1).mT
        own = (torch.arange(len(base))[:, None], base)
        scaled = [(sites, beta * table) for sites, table in factors if beta]
        return [own, *scaled]

    def site_logits(self, x: Tensor) -> Tensor:
        beta, shape = self.between.beta, (-1, *(1,) * (x.dim() - self.event_dim))
        base = self.logits.reshape(*shape, *self.event_shape)
        if beta == 0:  # where the target may be infinite
            return base.expand(len(base), *x.shape)
        target = self.sites.site_logits(x)
        if beta == 1:
            return target
        mixed = (1 - beta) * base + beta * target  # of -inf torch.lerp makes nan
        return mixed.where(target > -torch.inf, -torch.inf)


@final
class _Between(Energy):
    """The geometric path, for energies that have none in their own family."""

    def __init__(self, base: Energy, target: Energy, beta: float) -> None:
        super().__init__(target.event_shape, target.support)
        self.base, self.target, self.beta = base, target, beta

    def forward(self, x: Tensor) -> Tensor:
        if self.beta == 0:  # where the target may be infinite
            return self.base(x)
        if self.beta == 1:
            return self.target(x)
        return (1 - self.beta) * self.base(x) + self.beta * self.target(x)
