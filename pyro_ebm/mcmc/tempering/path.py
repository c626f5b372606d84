r"""The geometric path from a base distribution to an energy.

.. math::
    f_\beta(x) = (1 - \beta)\, f_0(x) + \beta\, f(x), \qquad f_0 = -\log p_0 \tag{1}

with inverse temperature :math:`\beta`: 0 is the base, 1 is the model.
"""

__all__ = [
    "GeometricPath",
    "PathState",
    "advance",
    "joined",
    "real_path",
    "require_rising",
]

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, final

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.core.errors import DivergenceError
from pyro_ebm.energies import DistributionEnergy, Energy, unconstrained
from pyro_ebm.energies.base import require_no_batch
from pyro_ebm.energies.corrections import corrected, map_tensors
from pyro_ebm.energies.distribution import require_single
from pyro_ebm.energies.graphs.precision import wide
from pyro_ebm.energies.normalization import require_normalized
from pyro_ebm.energies.pyro_model.prior import ModelPrior
from pyro_ebm.energies.views.double import in_double
from pyro_ebm.energies.views.unconstrained import same_support
from pyro_ebm.mcmc.base import (
    ChainState,
    Kernel,
    StepInfo,
    evaluate,
    flat_event,
    replace_nonfinite,
)


class PathState(NamedTuple):
    """The points of chains, with the energies of both ends of the path.

    Any temperature of (1) follows from it without a further evaluation.

    Attributes:
        u: Points in unconstrained space, shape ``(*chains, *event)``.
        base: Energy of the base, shape ``(*chains,)``.
        base_grad: Its gradient, shape of ``u``.
        target: Energy of the target, shape ``(*chains,)``.
        target_grad: Its gradient, shape of ``u``.
    """

    u: Tensor
    base: Tensor
    base_grad: Tensor
    target: Tensor
    target_grad: Tensor

    def select(self, chains: tuple[Tensor | slice, ...]) -> "PathState":
        """The states of the chains that an index tuple selects."""
        return PathState(*(part[chains] for part in self))

    def replaced(self, accepted: Tensor, new: "PathState") -> "PathState":
        """These states, but the new ones of the chains in ``accepted``."""
        moved = []
        for new_part, part in zip(new, self, strict=True):
            shape = accepted.shape + (1,) * (part.dim() - accepted.dim())
            moved.append(torch.where(accepted.reshape(shape), new_part, part))
        return PathState(*moved)

    def chains(self) -> ChainState:
        """The chains as a kernel sees them at the end of the path."""
        return ChainState(self.u, self.target, self.target_grad)

    def at(self, beta: float | Tensor) -> ChainState:
        """The chains as a kernel sees them on the way, by (1).

        Args:
            beta: The inverse temperature, or one a chain, of a shape that broadcasts
                to that of the chains.
        """
        wide = beta
        if isinstance(beta, Tensor):
            wide = beta.reshape(beta.shape + (1,) * (self.u.dim() - self.base.dim()))
        value = _mixed(beta, self.base, self.target)
        return ChainState(self.u, value, _mixed(wide, self.base_grad, self.target_grad))

    def slope(self, beta: float) -> Tensor:
        """The derivative of the energy (1), the same at all temperatures."""
        return self.target - self.base

    def log_weight(self, low: float | Tensor, high: float | Tensor) -> Tensor:
        r"""Log-weight :math:`(\beta' - \beta) (f_0 - f)` of a step along the path.

        Upwards a point where the target is not finite has weight zero.

        Args:
            low: :math:`\beta`, a number or one a chain, as for :meth:`at`.
            high: :math:`\beta'`, alike.
        """
        step = high - low
        nowhere = -torch.inf * torch.as_tensor(step).sign()
        nowhere = nowhere.nan_to_num(0.0, torch.inf, -torch.inf)
        log_weight = step * (self.base - self.target)
        return torch.where(self.target.isfinite(), log_weight, nowhere.to(log_weight))


@final
class GeometricPath(Energy):
    """The energy (1) in unconstrained space, at a temperature that can be set.

    Args:
        energy: The target, on any support that ``biject_to`` knows.
        base: A normalised Pyro distribution over the same event and support.
        is_double: Whether both ends are evaluated in double precision, whatever the
            energy and the base are in.

    Attributes:
        inverse_temperature: Where on the path the energy is, in [0, 1].
        num_evaluations: Evaluations of the target so far, one a point.
        log_start: Log Z of the energy at 0, that of a normalised base.

    Raises:
        ValueError: If the base has a batch shape, another event or another support, or
            is not normalised.
    """

    log_start = 0.0

    def __init__(
        self,
        energy: Energy,
        base: dist.TorchDistribution,
        *,
        is_double: bool = False,
    ) -> None:
        require_no_batch(energy)
        require_single(base, "base")
        require_normalized(base, "base")
        base_energy = DistributionEnergy(base)
        if base.event_shape != energy.event_shape:
            raise ValueError(
                f"base must have event_shape {tuple(energy.event_shape)}, as the "
                f"energy; got {tuple(base.event_shape)}. Use .to_event() or "
                ".expand() on it."
            )
        if not same_support(base_energy.support, energy.support):
            raise ValueError(
                f"base must have the support of the energy, {energy.support}, got "
                f"{base_energy.support}. Choose a base on that support, or restrict "
                "the energy to the base's support when building it."
            )
        flat, transform = unconstrained(energy)
        where = flat.support if flat.support.is_discrete else None
        super().__init__(flat.event_shape, where)
        self.target, self.transform = flat, transform
        self.base, _ = unconstrained(base_energy)
        if is_double:
            self.target, self.base = in_double(self.target), in_double(self.base)
        base = corrected(base)
        self.distribution = _drawn_in_double(base) if is_double else base
        self.inverse_temperature = 1.0
        self.num_evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at unconstrained ``x`` of shape ``(*batch, *event)``."""
        beta = self.inverse_temperature
        if beta == 1:
            return self.target(x)
        return _mixed(beta, self.base(x), self.target(x))

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One evaluation of each end."""
        state = self.at_temperature(self.evaluate(x))
        return state.energy, state.grad

    def evaluate(self, u: Tensor) -> PathState:
        """Evaluate both ends at ``u`` of shape ``(*chains, *event)``."""
        base = evaluate(self.base, u)
        self.num_evaluations += base[0].numel()
        return PathState(u.detach(), *base, *evaluate(self.target, u))

    def sample_base(self, *shape: int) -> PathState:
        """Exact draws of the base, evaluated; ``shape`` is that of the chains."""
        with torch.no_grad():
            return self.evaluate(self.draw_base(*shape))

    @torch.no_grad()
    def draw_base(self, *shape: int) -> Tensor:
        """Draws of the base in unconstrained space, not evaluated."""
        x = self.distribution.sample(torch.Size(shape))
        return self.transform.inv(x.to(self.target.tensor_options(x)["dtype"]))

    def start(self, *shape: int) -> PathState:
        """Go to the base; exact draws of it, evaluated, with chains of this shape.

        Raises:
            DivergenceError: If the energy is finite at none of them.
        """
        self.inverse_temperature = 0.0
        state = self.sample_base(*shape)
        if not state.target.isfinite().any():
            raise DivergenceError(
                f"energy is finite at none of {state.target.numel()} draws of the base:"
                f" the first has energy {state.target.flatten()[0]}. Choose a base "
                "whose draws fall where the energy is finite."
            )
        return state

    def with_finite_chains(self, state: PathState) -> PathState:
        """Chains where the target is not finite put where others are.

        Args:
            state: Chain shape ``(C, K)``.

        Raises:
            DivergenceError: If there is no chain with a finite energy and gradient.
        """
        flat = ChainState(*(part.flatten(0, 1) for part in state.chains()))
        moved = replace_nonfinite(flat)
        return state if moved is flat else self.evaluate(moved.x.reshape(state.u.shape))

    def at_temperature(self, state: PathState) -> ChainState:
        """The chains as seen by a kernel at the current temperature."""
        return state.at(self.inverse_temperature)

    def joined(self, states: Sequence[PathState]) -> PathState:
        """See :func:`joined`."""
        return joined(states)

    def step(self, kernel: Kernel, state: PathState) -> tuple[PathState, StepInfo]:
        """One transition of a kernel at the current temperature, see :func:`advance`.

        Args:
            kernel: Any.
            state: Chain shape ``(*chains,)``.
        """
        return advance(kernel, self, state, self.evaluate, self.at_temperature)


def real_path(
    energy: Energy, base: dist.TorchDistribution, *, is_double: bool = False
) -> GeometricPath:
    """The path of :class:`GeometricPath`, for kernels that move through real space.

    Args:
        energy: The target.
        base: As for :class:`GeometricPath`.
        is_double: Alike.

    Raises:
        NotImplementedError: If the support is discrete.
        ValueError: If the base does not fit.
    """
    if energy.support.is_discrete:
        raise NotImplementedError(
            "energy must have a continuous support for chains that follow a gradient, "
            f"got the discrete {energy.support}. Over finite supports chains move by "
            "pyro_ebm.mcmc.Gibbs or DiscreteLangevin, and log Z comes from "
            "pyro_ebm.partition.estimate, gibbs_annealing or smc."
        )
    return GeometricPath(energy, base, is_double=is_double)


def joined(states: Iterable[PathState]) -> PathState:
    """Concatenate states of chain shapes ``(C, K_i)`` to ``(C, sum(K_i))``."""
    return PathState(*(torch.cat(parts, 1) for parts in zip(*states, strict=True)))


def require_rising(inverse_temperatures: Sequence[float]) -> None:
    """Check that a schedule leads from the base to the energy.

    Raises:
        ValueError: If it does not.
    """
    betas = list(inverse_temperatures)
    rising = all(a < b for a, b in zip(betas[:-1], betas[1:], strict=True))
    if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not rising:
        shown = betas if len(betas) < 6 else [*betas[:2], "...", *betas[-2:]]
        raise ValueError(
            f"inverse_temperatures must rise from 0 to 1, got {shown}. "
            "torch.linspace(0, 1, n).tolist() does."
        )


def _mixed(beta: float | Tensor, base: Tensor, target: Tensor) -> Tensor:
    """Either side of (1), at whose end the base may be infinite, the target not."""
    if not isinstance(beta, Tensor):
        return target if beta == 1 else (1 - beta) * base + beta * target  # (1)
    return torch.where(beta == 1, target, (1 - beta) * base + beta * target)


def _drawn_in_double(base: dist.TorchDistribution) -> dist.TorchDistribution:
    """The base with draws of double precision, where it can be had."""
    if isinstance(base, ModelPrior):
        return base.with_energy(in_double(base.energy))
    wider: dist.TorchDistribution = map_tensors(base, wide)
    try:
        with torch.random.fork_rng(devices=[]):
            is_double = wider.sample().dtype is torch.float64
    except (RuntimeError, TypeError, ValueError):  # it holds a module, say
        return base
    return wider if is_double else base


def advance(
    kernel: Kernel,
    energy: Energy,
    state: PathState,
    evaluate: Callable[[Tensor], PathState],
    view: Callable[[PathState], ChainState],
) -> tuple[PathState, StepInfo]:
    """One transition of a kernel, with both ends of the path at its outcome.

    What the kernel evaluates last is mostly where it leads. The ends are taken from
    there for the chains that are at that very point, and evaluated anew where one is at
    neither that point nor its old one.

    Args:
        kernel: Any.
        energy: What it sees, for its shape and type.
        state: Chain shape ``(*chains,)``.
        evaluate: Both ends of the path at the points that the kernel moves.
        view: The chains as the kernel sees them.
    """
    recorder, old = _Recorder(energy, evaluate, view), view(state)
    chains, info = kernel.step(recorder, old)
    if recorder.last is not None:
        x, last = recorder.last
        if x.shape == chains.x.shape:
            is_new, is_old = (
                flat_event(chains.x == y, old.energy.dim()).all(-1) for y in (x, old.x)
            )
            if (is_new | is_old).all():
                return state.replaced(is_new, last), info
    return evaluate(chains.x), info


class _Recorder(Energy):
    """An energy along a path that keeps the evaluation made last in one transition."""

    def __init__(
        self,
        energy: Energy,
        evaluate: Callable[[Tensor], PathState],
        view: Callable[[PathState], ChainState],
    ) -> None:
        super().__init__(energy.event_shape)
        self.tensor_options = energy.tensor_options  # type: ignore[method-assign]
        self.evaluate, self.view = evaluate, view
        self.last: tuple[Tensor, PathState] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the energy."""
        return self.view(self.evaluate(x)).energy

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate both ends of the path."""
        self.last = x, self.evaluate(x)
        state = self.view(self.last[1])
        return state.energy, state.grad
