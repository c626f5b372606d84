r"""Quadrature of :math:`\log Z` for events of up to three coordinates.

The energy is moved to unconstrained space and evaluated in double precision. The mass
is located first: by a coarse look, by draws, and by a descent from the best of them to
the modes. Around each mode lies a grid of its own
(:mod:`~pyro_ebm.partition.exact.grid`), which follows its curvature; where no mode has
one, or too many have, one grid along the axes covers everything. The grids are refined
until the sum changes no more.

The result is ``"exact"`` only if looks that do not depend on these grids agree: grids
of another spacing, shift and size; and importance sampling,

.. math::
    \log Z = \log \mathbb{E}_q\left[ e^{-f(x)} / q(x) \right]                 \tag{1}

from a heavy-tailed ``q`` around the mass that was found, and from the base if there is
one. No draw may lie outside of the grids and have mass, or be more likely than all that
the grids have seen. A needle that no draw and no descent meets is not found.
"""

__all__ = ["quadrature"]

import math
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.diagnostics import pareto_k
from pyro_ebm.energies import Energy, unconstrained
from pyro_ebm.energies.distribution import base_energy
from pyro_ebm.mcmc.starts.modes import valleys
from pyro_ebm.partition.base import LogPartitionEstimate
from pyro_ebm.partition.exact.budget import Budget, OutOfBudgetError
from pyro_ebm.partition.exact.grid import Grid, Sum
from pyro_ebm.partition.exact.modes import ENOUGH, Modes, find_modes
from pyro_ebm.partition.exact.precision import PreciseEnergy
from pyro_ebm.partition.normalizability import (
    check_normalizability,
    is_placed,
    round_trip,
)
from pyro_ebm.partition.progress import bar_settings

#: Points of the first look, by the number of coordinates.
_LOOK = {1: 2049, 2: 2048, 3: 2048}
#: The first look goes to sinh(14), 600,000 scales.
_FAR = 14.0
#: Draws of each independent look.
_DRAWS = 4096
#: Modes above which one grid for all of them is cheaper.
_MAX_MODES = 48
#: Nodes a side of the coarsest grid, and by how much the next one is finer.
_COARSEST, _FINER = 17, 1.5
#: Log-density below the peak of points that show how far the mass reaches.
_LIKELY = 12.0
#: Cells of a mode's width that a grid of one mode is about as costly as.
_CELLS = 16
#: Part of the limits that descents may take.
_DESCENTS = 0.25
#: Part of the points that the first kind of grid may take; and what is left for looks.
_FIRST_SHARE, _RESERVE = 0.6, 20_000
#: Fall of the integrand towards the ends of the boxes that says it dies out, in nats;
#: and where the end of what can be seen begins, as a part of it.
_DEAD, _ABOUT = 8.0, 0.9
#: Error bars above which a result is not exact, in nats.
_MAX_ERROR = 1e-2
#: Effective draws without which (1) says nothing; and the difference let pass.
_MIN_EFFECTIVE, _SLACK = 30.0, 5e-3
#: Shape of the tail of the weights beyond which their mean says nothing.
_MAX_K = 0.7
#: Log-density by which a draw may exceed the peak of the grid, and mass outside of it.
_ABOVE, _OUTSIDE = 0.1, 1e-3


@torch.no_grad()
def quadrature(
    energy: Energy,
    loc: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    *,
    base: dist.TorchDistribution | None = None,
    tolerance: float = 1e-6,
    max_evaluations: int = 2**21,
    max_seconds: float = 60.0,
    max_bytes: float = 2**30,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Integrate ``e^-f`` over its support, for events of up to three numbers.

    Args:
        energy: Its support may be anything that ``biject_to`` knows.
        loc: About where the mass is, in unconstrained space; broadcast to the event.
        scale: About how far it reaches. Neither needs to be good.
        base: A normalised distribution on the event and support of the energy, if there
            is one: its draws help to find the mass, and to check the result.
        tolerance: Change in :math:`\log Z` on refining the grid that ends the search.
        max_evaluations: Evaluations of the energy, one a point.
        max_seconds: Seconds after which the search is given up.
        max_bytes: By how much the memory of the process may grow: how many points are
            given to the energy at once. One that needs more for 64 points takes it.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; ``"unreliable"`` with the finding if two looks disagree, a limit
        was reached, or rounding matters; ``"not_normalizable"`` if there is evidence
        for that, see :func:`check_normalizability`.

    Raises:
        ValueError: If the event has more than three numbers, or the support is
            discrete.

    Exactness: *exact* up to the error bar where the status says so: the last change on
    refining the grid, the difference of two grids, and the rounding of the energy. It
    draws from torch's random stream.

    Example:
        >>> f = pyro_ebm.energies.FunctionEnergy(lambda x: x**2 / 2, ())
        >>> quadrature(f).status, round(quadrature(f).value, 5)
        ('exact', 0.91894)
    """
    if energy.support.is_discrete:
        raise ValueError(
            f"energy must have a continuous support for quadrature, got "
            f"{energy.support}, over which log Z is a sum: take "
            "pyro_ebm.partition.enumeration, or pyro_ebm.partition.estimate."
        )
    flat, _ = unconstrained(energy)
    dim = flat.event_shape.numel()
    if dim > 3:
        raise ValueError(
            f"energy must have an event of at most 3 numbers for quadrature, got {dim} "
            f"(event_shape {tuple(energy.event_shape)}). Use a sampling estimator such "
            "as pyro_ebm.partition.smc."
        )
    with tqdm(
        desc="log Z",
        unit="",
        unit_scale=True,
        **bar_settings(is_shown=progress_bar),
    ) as bar:
        budget = Budget(max_evaluations, max_seconds, max_bytes, bar)
        search = _Search(energy, base, loc, scale, tolerance, budget)
        try:
            search.run()
        except OutOfBudgetError as error:
            search.findings.append(Finding(Reason.OUT_OF_BUDGET, str(error)))
        return search.result()


class _Found(NamedTuple):
    """What grids gave: the last sum, how it changed, and a second sum."""

    last: Sum
    change: float
    second: Sum
    is_settled: bool


class _Integrand:
    """The energy over vectors in double precision, within a budget."""

    def __init__(self, energy: Energy, budget: Budget, origin: Tensor) -> None:
        self.flat, self.to_support = unconstrained(energy)
        self.budget, self.has_pole = budget, False
        self.shape = self.flat.event_shape
        self.energy = PreciseEnergy(self.flat, origin.reshape(-1, *self.shape))
        budget.num_evaluations = self.energy.num_evaluations
        self.limit = math.inf
        if round_trip(self.flat) is not None:
            # Farther out a bijection such as exp has run out of numbers.
            own = torch.float64 if self.energy.is_double else torch.float32
            self.limit = math.log(torch.finfo(own).max) - 10
        self.at_limit = -math.inf  # the largest log-density about there
        # The likeliest points of each look, in case the next one misses them.
        self.known = origin[:0]
        self.density = origin[:0, 0]

    def value(self, u: Tensor) -> Tensor:
        """Energies at ``(N, D)``; ``inf`` where they are nan, and at a pole."""
        (value,) = self.budget.evaluate(
            lambda part: (self.energy(part.reshape(-1, *self.shape)),), u
        )
        return self._seen(u, value)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and gradients at ``(N, D)``."""
        value, grad = self.budget.evaluate(
            lambda part: self.energy.value_and_grad(part.reshape(-1, *self.shape)), u
        )
        return self._seen(u, value), grad.reshape(u.shape)

    def may_go_on(self) -> bool:
        """Whether descents have taken less than their share of the limits."""
        budget = self.budget
        share = max(
            budget.num_evaluations / budget.max_evaluations,
            budget.seconds / budget.max_seconds,
        )
        return share < _DESCENTS

    def log_density(self, u: Tensor) -> Tensor:
        """Minus the energy."""
        return -self.value(u)

    def _seen(self, u: Tensor, value: Tensor) -> Tensor:
        value = value.masked_fill((u.abs() > self.limit).any(-1), torch.inf)
        is_pole = value == -torch.inf
        if is_pole.any():
            self.has_pole |= bool(self.is_placed(u[is_pole]).any())
        value = value.masked_fill(value.isnan() | is_pole, torch.inf)
        is_far = (u.abs() > _ABOUT * self.limit).any(-1)
        if is_far.any():
            self.at_limit = max(self.at_limit, -value[is_far].min().item())
        best = (-value).topk(min(16, len(value))).indices
        self.known = torch.cat([self.known, u[best]])
        self.density = torch.cat([self.density, -value[best]])
        if len(self.known) > 4096:
            best = self.density.topk(1024).indices
            self.known, self.density = self.known[best], self.density[best]
        return value

    def is_placed(self, u: Tensor) -> Tensor:
        """Whether points are not lost to rounding, ``(N,)``."""
        return is_placed(self.flat, u if self.energy.is_double else u.float())


class _Search:
    """One run of :func:`quadrature`."""

    def __init__(
        self,
        energy: Energy,
        base: dist.TorchDistribution | None,
        loc: Tensor | float,
        scale: Tensor | float,
        tolerance: float,
        budget: Budget,
    ) -> None:
        self.energy, self.base = energy, base
        self.tolerance, self.budget = tolerance, budget
        self.findings: list[Finding] = []
        self.value, self.error = -math.inf, math.inf
        self.is_infinite, self.num_checks = False, 0
        flat, to_support = unconstrained(energy)
        dim = flat.event_shape.numel()
        options = {
            "dtype": torch.float64,
            "device": energy.tensor_options()["device"],
        }
        self.loc = torch.as_tensor(loc, **options).reshape(-1).expand(dim)
        self.scale = torch.as_tensor(scale, **options).reshape(-1).expand(dim)
        origin = self.loc + self.scale * torch.randn(8, dim).to(self.loc)
        self.integrand = _Integrand(energy, budget, origin)
        self.prior = base_energy(base, energy)
        self.draws = origin[:0]
        if base is not None and self.prior is not None:
            x = base.sample(torch.Size((_DRAWS,)))
            draws = to_support.inv(x).double().reshape(_DRAWS, dim)
            self.draws = draws[draws.isfinite().all(-1)]

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.loc)

    def run(self) -> None:
        """Locate, integrate, and check."""
        starts = self.look()
        if not self.integrand.density.max().isfinite():
            nowhere = "the energy is infinite or nan all over the grid"
            self.findings.append(Finding(Reason.NOT_FINITE, nowhere))
            return
        modes = find_modes(self.integrand, starts)
        grids = [self.grid(kind) for kind in self.coordinates(modes)]
        for number, grid in enumerate(grids):
            share = 1.0 if number == len(grids) - 1 else _FIRST_SHARE
            found = self.integrate(grid, int(share * self.budget.left))
            if found.is_settled:
                break
        self.judge(grid, found)
        rare = int((grid.modes.hits < ENOUGH).sum())
        if grid.number > 1 and self.dim > 1 and rare:
            text = (
                f"{rare} of {grid.number} modes were met by fewer than {ENOUGH} "
                "descents: there may be others"
            )
            self.findings.append(Finding(Reason.NOT_CONVERGED, text))

    def look(self) -> Tensor:
        """Evaluate a coarse look and draws of the base; where to descend from."""
        number = _LOOK[self.dim]
        axis = torch.linspace(-_FAR, _FAR, number).to(self.loc)
        if self.dim > 1:  # a quasi-random sequence in place of a grid
            axis = torch.quasirandom.SobolEngine(self.dim, scramble=True).draw(number)
            axis = _FAR * (2 * axis.to(self.loc) - 1)
        far = self.loc + self.scale * axis.reshape(number, self.dim).sinh()
        near = self.loc + 4 * self.scale * torch.randn(number, self.dim).to(self.loc)
        looks = [far, near, self.draws[: _DRAWS // 2]]
        starts = [valleys(u, self.integrand.value(u)) for u in looks if len(u)]
        # One of each in turn; then at random.
        order = torch.cat([torch.arange(len(u)) for u in starts]).argsort(stable=True)
        nearby = torch.cat(looks[1:])
        others = nearby[torch.randperm(len(nearby))]
        return torch.cat([torch.cat(starts)[order.to(far.device)], others])

    def coordinates(self, modes: Modes | None) -> list[Modes]:
        """Of the grids to be tried, the cheaper ones first."""
        if modes is None:
            zero = torch.zeros(1).to(self.loc)
            return [Modes(self.loc[None], self.scale.diag_embed()[None], zero, zero)]
        width = modes.root.square().sum(-1).sqrt()  # (K, D), along the axes
        known, density = self.integrand.known, self.integrand.density
        likely = torch.cat([modes.loc, known[density > density.max() - _LIKELY]])
        low, high = likely.amin(0), likely.amax(0)
        box = Modes(
            (low + high)[None] / 2,
            ((high - low) / 2).clamp(min=1e-6).diag_embed()[None],
            modes.log_mass[:1],
            modes.hits[:1],
        )
        if len(modes.loc) > _MAX_MODES:
            return [box]
        cells = ((high - low) / width.amin(0)).clamp(min=1.0)
        is_cheap = cells.prod() < len(modes.loc) * _CELLS**self.dim
        if len(modes.loc) > 1 and is_cheap:
            return [box, modes]
        return [modes, box]

    def grid(self, modes: Modes) -> Grid:
        """Grids around modes."""
        return Grid(self.integrand.log_density, modes, self.integrand.limit)

    def integrate(self, grid: Grid, allowance: int) -> _Found:
        """Refine until two grids agree with the last, or the allowance is used up."""
        end = self.budget.num_evaluations + allowance - _RESERVE
        grid.find_boxes(self.integrand.known, self.integrand.density)
        sums: list[Sum] = []
        per_side, change, second = _COARSEST, math.inf, None
        spent = grid.cost(per_side)
        while True:
            before = self.budget.num_evaluations
            # As much again is kept for another grid.
            needed = 2.7 * min(grid.cost(per_side), _FINER**self.dim * spent)
            if needed > end - before and len(sums) > 1:
                break
            sums.append(grid.sum(per_side))
            spent = self.budget.num_evaluations - before
            self.value = sums[-1].value
            change = abs(sums[-1].value - sums[-2].value) if len(sums) > 1 else math.inf
            is_endless = len(sums) > 4 and not self.dies_out(*sums[-2:])
            if len(sums) > 2 and (change < self.tolerance or is_endless):
                second = self.another(grid, int(1.3 * per_side))
                apart = abs(second.value - sums[-1].value)
                if is_endless or apart < 10 * self.tolerance:
                    return _Found(sums[-1], change, second, is_settled=True)
            per_side = int(_FINER * per_side)
        if second is None:
            second = self.another(grid, int(per_side / 1.3))
        return _Found(sums[-1], change, second, is_settled=False)

    def dies_out(self, *sums: Sum) -> bool:
        """Whether any of the sums has, and the density does where sight ends."""
        if not max(total.drop for total in sums) > _DEAD:
            return False
        return sums[-1].peak - self.integrand.at_limit > _DEAD

    def another(self, grid: Grid, per_side: int) -> Sum:
        """A sum that shares no node with the others, over larger boxes."""
        return grid.sum(
            per_side, shift=0.37, stretch=1.2, is_placed=self.integrand.is_placed
        )

    def judge(self, grid: Grid, found: _Found) -> None:
        """Error bar and findings."""
        last, second = found.last, found.second
        self.value = second.value
        if not self.dies_out(second):
            self.judge_tail(second)
            return
        apart = abs(second.value - last.value)
        # What lies beyond the ends if the integrand falls on as it has fallen so far.
        size = grid.largest.abs().max().item()
        beyond = math.exp(min(0.0, second.edge - second.value)) * size / second.drop
        doubtful = 100 * math.exp(min(0.0, second.lost - second.value))
        rounding = self.rounding(grid, second)
        errors = (found.change, apart, beyond, doubtful, rounding, self.tolerance)
        self.error = max(errors)
        change = max(found.change, apart)
        if not change < max(10 * self.tolerance, 4 * rounding):
            text = f"refining the grid still changes log Z by {change:.2g} nats"
            self.findings.append(Finding(Reason.NOT_CONVERGED, text))
        if not max(rounding, doubtful) < _MAX_ERROR:
            text = (
                "rounding of the energy, or of its change of variables, moves log Z "
                f"by up to {max(rounding, doubtful):.2g} nats"
            )
            self.findings.append(Finding(Reason.NUMERICAL, text))
        if not beyond < 1e-4:
            text = f"about e^{math.log(beyond):.1f} of the mass is beyond the last node"
            self.findings.append(Finding(Reason.NOT_CONVERGED, text))
        if self.integrand.has_pole:
            text = "the energy is -inf at some points, which were left out"
            self.findings.append(Finding(Reason.NUMERICAL, text))
        self.compare(grid, second)

    def judge_tail(self, second: Sum) -> None:
        """The integrand has not died out at the ends of its box: is it infinite?"""
        near = self.loc + self.scale * torch.randn(256, self.dim).to(self.loc)
        u = torch.cat([near, self.draws[:256]])
        x = self.integrand.to_support(u.reshape(-1, *self.integrand.shape))
        try:
            found = check_normalizability(self.energy, x, base=self.base)
        except ValueError:  # nearly all of them have no density
            finding = None
        else:
            finding = found.finding
            self.num_checks = found.num_evaluations
            self.is_infinite = found.status is Status.NOT_NORMALIZABLE
        if finding is None:
            drop = min(second.drop, second.peak - self.integrand.at_limit)
            text = (
                "the integrand has not died out at the ends of the grid: "
                f"e^-{drop:.1f} of its peak"
            )
            finding = Finding(Reason.NOT_CONVERGED, text)
        self.findings.append(finding)

    def rounding(self, grid: Grid, total: Sum) -> float:
        """Rounding of log Z, as that of the energy where the mass is."""
        u, _, _ = self.weighed(grid, total, 64, 1.0)
        step = torch.full_like(u, 1e-4) * grid.modes.root[0].diagonal().abs()
        eps = self.integrand.energy.eps
        step = torch.maximum(step, 16 * eps * (1 + u.abs()))
        shape = (-1, *self.integrand.shape)
        energy = self.integrand.energy
        (rounding,) = self.budget.evaluate(
            lambda part: (
                energy.rounding(
                    part[:, : self.dim].reshape(shape),
                    part[:, self.dim :].reshape(shape),
                ),
            ),
            torch.cat([u, step], -1),
        )
        finite = rounding[rounding.isfinite()]
        return finite.median().item() if len(finite) else 0.0

    def weighed(
        self, grid: Grid, total: Sum, number: int, width: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws in ``t`` about where the mass is; log-weights; and whether inside."""
        share = 0.5 * (total.log_masses - total.value).exp() + 0.5 / grid.number
        share = share / share.sum()
        which = share.multinomial(number, replacement=True).sort().values
        law = dist.StudentT(torch.tensor(2.0).to(share))
        points, weights, inside = [], [], []
        for k in which.unique().tolist():
            size = (int((which == k).sum()), self.dim)
            z = law.sample(size)
            deviation = width * total.deviation[k].clamp(min=1e-3)
            t = total.mean[k] + deviation * z
            t = t.clamp(grid.largest[k, :, 0], grid.largest[k, :, 1])
            log_q = (law.log_prob(z) - deviation.log()).sum(-1) + share[k].log()
            log_value, u, _ = grid.log_integrand(k, t)
            points.append(u)
            weights.append(log_value - log_q)
            box = grid.boxes[k]
            inside.append(((t >= box[:, 0]) & (t <= box[:, 1])).all(-1))
        return torch.cat(points), torch.cat(weights), torch.cat(inside)

    def compare(self, grid: Grid, total: Sum) -> None:
        """Hold the sum against (1)."""
        looks = []
        _, weights, inside = self.weighed(grid, total, _DRAWS, 1.5)
        looks.append(("draws around the mass", weights, inside, 0.0))
        if self.prior is not None and len(self.draws):
            prior, _ = unconstrained(self.prior)
            shaped = self.draws.reshape(-1, *self.integrand.shape)
            weights = self.integrand.log_density(self.draws)
            weights = weights + PreciseEnergy(prior, shaped)(shaped)
            # Each mode by itself: the base may hold none of some.
            for k in range(grid.number):
                away = (self.draws - grid.modes.loc[k]).mT
                t = torch.linalg.solve(grid.modes.root[k], away).mT.asinh()
                box = grid.boxes[k]
                inside = ((t >= box[:, 0]) & (t <= box[:, 1])).all(-1)
                part = weights + grid.log_share(k, self.draws)
                share = (total.log_masses[k] - total.value).item()
                looks.append(("draws of the base", part, inside, share))
        for name, weights, inside, share in looks:
            self.findings += _disagreement(name, weights, inside, total.value, share)
        above = self.integrand.density.max().item() - total.peak
        if above > _ABOVE:
            text = f"a point off the grid is {above:.2g} nats likelier than all on it"
            self.findings.append(Finding(Reason.ROUTES_DISAGREE, text))

    def result(self) -> LogPartitionEstimate:
        """The estimate."""
        status = Status.UNRELIABLE if self.findings else Status.EXACT
        value, error = self.value, self.error
        if self.is_infinite:
            status, value, error = Status.NOT_NORMALIZABLE, math.inf, math.nan
        return LogPartitionEstimate(
            value, error, value - 2 * error, value + 2 * error, math.nan, status,
            "quadrature", self.integrand.energy.num_evaluations + self.num_checks,
            tuple(self.findings),
            self.budget.seconds,
        )  # fmt: skip


def _disagreement(
    name: str, log_weights: Tensor, inside: Tensor, value: float, log_share: float
) -> list[Finding]:
    """What importance sampling (1) says against a value, or a share of it."""
    number = len(log_weights)
    log_weights = log_weights.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    weights = (log_weights - value).exp()  # of the share as mean
    if not weights.max() > 0:
        return []
    outside = (weights * ~inside).sum().item() / number
    effective = (weights.sum().square() / weights.square().sum()).item()
    mean, error = weights.mean().item(), weights.std().item() / math.sqrt(number)
    share = math.exp(log_share)
    found = []
    if outside > _OUTSIDE:
        text = f"{name} find {outside:.2g} of the mass outside of the grid"
        found.append(Finding(Reason.ROUTES_DISAGREE, text))
    elif effective < _MIN_EFFECTIVE or pareto_k(log_weights) > _MAX_K:
        return []
    elif abs(mean - share) > 4 * error + _SLACK:  # (1)
        text = f"{name} find {mean / share:.4f} +- {error / share:.2g} of the sum"
        found.append(Finding(Reason.ROUTES_DISAGREE, text))
    return found
