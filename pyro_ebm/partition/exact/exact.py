r"""Exact :math:`\log Z`: closed forms, and quadrature for up to three dimensions.

Quadrature is the referee of all other estimators. The energy is moved to unconstrained
space and integrated there with

.. math::
    u_i = m_i + s_i \sinh(t_i), \qquad
    Z = \int e^{-f(u(t))} \prod_i s_i \cosh(t_i)\, dt                       \tag{1}

by the trapezoidal rule, whose error falls exponentially for a smooth integrand that
dies out at both ends; (1) makes power-law tails die out exponentially. The grid is
halved until two successive values agree.

References:
    Trefethen & Weideman (2014), SIAM Review 56, 385-458.
"""

__all__ = ["closed_form", "quadrature"]

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ebm.core.verdict import Finding, Reason, Status
from pyro_ebm.energies import Energy, UnconstrainedEnergy, unconstrained
from pyro_ebm.partition.base import LogPartitionEstimate

#: Points given to the energy at once.
_CHUNK = 2**18


def closed_form(energy: Energy) -> LogPartitionEstimate | None:
    r""":math:`\log Z` of an energy that knows it, else ``None``.

    Args:
        energy: Any energy.

    Returns:
        The estimate, of status ``"exact"`` and for no evaluation of the energy.

    Exactness: *exact*.

    Example:
        >>> round(
        ...     closed_form(pyro_ebm.energies.QuadraticEnergy(torch.zeros(2))).value, 4
        ... )
        1.8379
        >>> closed_form(pyro_ebm.energies.FunctionEnergy(lambda x: x**4, ())) is None
        True
    """
    known = energy.closed_form()
    if known is None:
        return None
    value = known.log_partition.item()
    return LogPartitionEstimate(
        value, 0.0, value, value, math.nan, Status.EXACT, "closed form", 0
    )


@torch.no_grad()
def quadrature(
    energy: Energy,
    loc: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    *,
    tolerance: float = 1e-6,
    max_points: int = 2**22,
    progress_bar: bool = True,
) -> LogPartitionEstimate:
    r"""Integrate ``e^-f`` over its support, for events of up to three numbers.

    Args:
        energy: Its support may be anything that ``biject_to`` knows.
        loc: About where the mass is, in unconstrained space; broadcast to the event.
        scale: About how far it reaches. Neither needs to be good.
        tolerance: Change in :math:`\log Z` on halving the grid that ends the search.
        max_points: Points of the finest grid.
        progress_bar: Whether to show the energy evaluations, if it takes more than a
            second.

    Returns:
        The estimate; ``"unreliable"`` if the last two grids disagree or mass is left
        beyond the largest box, ``"not_normalizable"`` if the integrand grows there.

    Raises:
        ValueError: If the event has more than three numbers.

    Exactness: *exact* up to ``tolerance`` where the status says so; the last change on
    halving the grid is reported as the standard error.

    Example:
        >>> f = pyro_ebm.energies.FunctionEnergy(lambda x: x**2 / 2, ())
        >>> quadrature(f).status, round(quadrature(f).value, 5)
        ('exact', 0.91894)
    """
    flat, _ = unconstrained(energy)
    dim = flat.event_shape.numel()
    if dim > 3:
        raise ValueError(
            f"energy must have an event of at most 3 numbers for quadrature, got {dim} "
            f"(event_shape {tuple(energy.event_shape)}). Use a sampling estimator such "
            "as pyro_ebm.partition.smc."
        )
    with tqdm(
        desc="log Z", unit="", unit_scale=True, delay=1, disable=not progress_bar
    ) as bar:
        integrand = _Integrand(flat, loc, scale, dim, bar)
        box = integrand.find_box()
        per_side, values, edge = 17, [], -math.inf
        while per_side**dim <= max_points:
            value, edge = integrand.integrate(box, per_side)
            values.append(value)
            if len(values) > 2 and abs(value - values[-2]) < tolerance:
                break
            per_side = 2 * per_side - 1
    change = abs(values[-1] - values[-2]) if len(values) > 1 else math.inf
    return _judge(values[-1], change, edge, tolerance, integrand.num_evaluations)


def _judge(
    value: float, change: float, edge: float, tolerance: float, num_evaluations: int
) -> LogPartitionEstimate:
    reasons: tuple[Finding, ...] = ()
    status = Status.UNRELIABLE
    if value == -math.inf:
        nowhere = "the energy is infinite or nan all over the grid"
        reasons = (Finding(Reason.NOT_FINITE, nowhere),)
    elif not edge < -8:
        status, value, change = Status.NOT_NORMALIZABLE, math.inf, math.nan
        heavy = f"the integrand does not vanish far out: e^{edge:.1f} of its peak"
        reasons = (Finding(Reason.DIVERGENT, heavy),)
    elif not change < tolerance:
        coarse = f"halving the grid still changes log Z by {change:.2g} nats"
        reasons = (Finding(Reason.NOT_CONVERGED, coarse),)
    else:
        status = Status.EXACT
    return LogPartitionEstimate(
        value, change, value - change, value + change, math.nan,
        status, "quadrature", num_evaluations, reasons,
    )  # fmt: skip


class _Integrand:
    """The integrand of (1) on boxes of ``t``, counted."""

    #: Log-density below the peak at which the integrand is taken for zero.
    CUT = 36.0
    #: sinh(60) is 6e25: beyond any tail that can be integrated.
    REACH = 60.0

    def __init__(
        self,
        energy: Energy,
        loc: Tensor | float,
        scale: Tensor | float,
        dim: int,
        bar: tqdm,
    ) -> None:
        self.energy, self.bar = energy, bar
        # The grid and the sum are in double precision, whatever the energy computes in.
        self.own = energy.tensor_options()
        self.options = {"dtype": torch.float64, "device": self.own["device"]}
        self.loc = torch.as_tensor(loc, **self.options).reshape(-1).expand(dim)
        self.scale = torch.as_tensor(scale, **self.options).reshape(-1).expand(dim)
        self.dim = dim
        self.num_evaluations = 0
        reach = torch.full((dim,), self.REACH, **self.options)
        if isinstance(energy, UnconstrainedEnergy):
            # Farther out a bijection such as exp has run out of numbers. The integrand
            # must have died out before.
            limit = math.log(torch.finfo(self.own["dtype"]).max) - 10
            room = (limit - self.loc.abs()).clamp(min=limit / 2)
            reach = torch.minimum(reach, (room / self.scale).asinh())
        self.largest_box = torch.stack([-reach, reach], -1)

    def __call__(self, t: Tensor) -> Tensor:
        """Log of the integrand at ``t`` of shape ``(N, dim)``."""
        self.num_evaluations += len(t)
        self.bar.update(len(t))
        u = self.loc + self.scale * t.sinh()
        log_jacobian = (self.scale.log() + log_cosh(t)).sum(-1)
        u = u.to(self.own["dtype"]).reshape(-1, *self.energy.event_shape)
        value = self.energy(u).to(torch.float64)
        log_integrand = log_jacobian - value
        return log_integrand.masked_fill(log_integrand.isnan(), -torch.inf)

    def on_grid(self, box: Tensor, per_side: int) -> Tensor:
        """Log of the integrand on a grid, shape ``(per_side,) * dim``."""
        unit = torch.linspace(0, 1, per_side, **self.options)
        axes = [low + (high - low) * unit for low, high in box]
        grid = torch.cartesian_prod(*axes).reshape(-1, self.dim)
        log_values = torch.cat([self(chunk) for chunk in grid.split(_CHUNK)])
        return log_values.reshape((per_side,) * self.dim)

    def find_box(self) -> Tensor:
        """A box of ``t`` outside of which the integrand is below the cut.

        It is grown from the largest box inwards: a coarse grid there finds the mass,
        and each axis is shrunk to what lies above the cut, with a margin of a cell.
        """
        box = self.largest_box
        per_side = {1: 2049, 2: 257, 3: 65}[self.dim]
        for _ in range(12):
            log_values = self.on_grid(box, per_side)
            if not log_values.max().isfinite():
                break
            indices = (log_values >= log_values.max() - self.CUT).nonzero()
            low, width = box[:, 0], box[:, 1] - box[:, 0]
            step = width / (per_side - 1)
            margins = [indices.amin(0) - 1, indices.amax(0) + 1]
            box = low[:, None] + step[:, None] * torch.stack(margins, -1)
            box = torch.clamp(box, self.largest_box[:, :1], self.largest_box[:, 1:])
            if ((box[:, 1] - box[:, 0]) / width).min() > 0.8:
                break
        return box

    def integrate(self, box: Tensor, per_side: int) -> tuple[float, float]:
        """Log of the trapezoidal sum, and the log-height of the edge below the peak."""
        log_values = self.on_grid(box, per_side)
        edge = max(
            log_values.select(axis, side).max().item()
            for axis in range(self.dim)
            for side in (0, -1)
        )
        cell = ((box[:, 1] - box[:, 0]) / (per_side - 1)).log().sum()
        # At the ends the integrand is nil: the sum over all nodes is the trapezoid.
        value = torch.logsumexp(log_values.flatten(), 0) + cell
        peak = log_values.max().item()
        return value.item(), edge - peak if math.isfinite(peak) else 0.0


def log_cosh(t: Tensor) -> Tensor:
    """Logarithm of cosh, without overflow."""
    return t.abs() + torch.nn.functional.softplus(-2 * t.abs()) - math.log(2)
