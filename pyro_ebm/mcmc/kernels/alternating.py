r"""One kernel for each part of an event, in turn.

With the coordinates split into parts :math:`x = (x_1, \dots, x_P)`, a step moves each
part by a kernel that leaves its conditional invariant, the others held where they are,

.. math::
    x_p' \sim K_p(\,\cdot \mid x_p), \qquad
    K_p \text{ leaves } e^{-f(x_1', \dots, x_{p-1}', \,\cdot\,, x_{p+1}, \dots, x_P)}
    \text{ invariant}                                                      \tag{1}

and so leaves :math:`e^{-f}` invariant. It is for mixed events: a kernel that follows
the gradient moves the real columns, a kernel for finite sites the others. In the
warm-up the step size, the metric and what a kernel itself adapts are found for each
part on its own; elsewhere the steps of all parts have a common factor.

References:
    Tierney (1994), Annals of Statistics 22, 1701-1728 (cycles of kernels).
    Zhang, Ghahramani, Storkey & Sutton (2012), NIPS (gradients beside finite sites).
"""

__all__ = ["Alternating"]

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from pyro_ebm.core.spaces import MixedSupport, support_at
from pyro_ebm.energies import Energy
from pyro_ebm.energies.views.clamped import chosen_numbers
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo
from pyro_ebm.mcmc.kernels.metric import (
    MAX_DENSE,
    GroupMoments,
    dense_metric,
    diagonal_metrics,
    typical,
)
from pyro_ebm.mcmc.warmup.adaptation import (
    KernelAdaptation,
    StepSizeAdaptation,
    find_step_size,
)

#: Transitions of a window that tell nothing of the metric, and draws that it must have,
#: in all and for each column of a dense one.
_SKIPPED, _MIN_DRAWS, _MIN_DENSE = 5, 10, 5


@final
@dataclass(frozen=True)
class Alternating(Kernel):
    """Move each part of an event by a kernel of its own, eq. (1).

    Args:
        parts: Pairs of a part and its kernel, or a mapping. A part is ``"real"`` or
            ``"finite"``, the two of a mixed event, or an index as in ``x[index]``: a
            number, a slice, a tuple of these or a boolean mask; or the name of a site
            of a factor graph. Each coordinate is in exactly one part.
            (Slices are hashable, as keys must be, from Python 3.12 on.)
        factor: Of the step sizes of all parts.

    Raises:
        TypeError: If there is something else than a :class:`Kernel`.
        ValueError: If there is no part, or ``factor`` is not positive.

    The state's ``grad`` is that of each part when it was last moved.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> real, bit = dist.constraints.real, dist.constraints.boolean
        >>> energy = pyro_ebm.energies.FunctionEnergy(
        ...     lambda x: (x[..., 0] - 3 * x[..., 1]).square() / 2,
        ...     (2,),
        ...     dist.constraints.cat([real, bit], dim=-1),
        ... )
        >>> parts = {"real": pyro_ebm.mcmc.HMC(0.5), "finite": pyro_ebm.mcmc.Gibbs()}
        >>> kernel = Alternating(parts)
        >>> state = kernel.init(energy, torch.zeros(500, 2))
        >>> for _ in range(100):
        ...     state, info = kernel.step(energy, state)
        >>> 0.35 < state.x[:, 1].mean() < 0.65
        tensor(True)
    """

    parts: "Mapping[Any, Kernel] | Iterable[tuple[Any, Kernel]]"
    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        given = self.parts.items() if isinstance(self.parts, Mapping) else self.parts
        pairs = tuple((part, kernel) for part, kernel in given)
        object.__setattr__(self, "parts", pairs)
        if not pairs:
            raise ValueError("parts must hold at least one pair, got none.")
        for part, kernel in pairs:
            if not isinstance(kernel, Kernel):
                raise TypeError(
                    f"parts must give each part a kernel such as HMC(), got {kernel!r} "
                    f"for {part!r}."
                )
        if not isinstance(self.factor, Tensor) and not self.factor > 0:
            raise ValueError(f"factor must be positive, got {self.factor}.")

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Those of the parts, in their order."""
        return tuple(kernel for _, kernel in self.parts)

    @property
    def has_step_size(self) -> bool:  # type: ignore[override]
        """Whether a part has one."""
        return any(kernel.has_step_size for kernel in self.kernels)

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        """Whether all parts are."""
        return all(kernel.is_exact for kernel in self.kernels)

    @property
    def step_size(self) -> float | Tensor:  # type: ignore[override]
        """The common factor, which samplers adapt that know nothing of parts."""
        return self.factor

    @property
    def target_accept_prob(self) -> float:  # type: ignore[override]
        """Mean over the parts with a step size, 1 if there is none."""
        targets = [k.target_accept_prob for k in self.kernels if k.has_step_size]
        return sum(targets) / len(targets) if targets else 1.0

    @property
    def num_gradients(self) -> int:
        """Those of the parts, and one more of each for where the others have moved."""
        return sum(kernel.num_gradients + 1 for kernel in self.kernels)

    def with_step_size(self, step_size: float | Tensor) -> "Alternating":
        """The kernel with another common factor."""
        return dataclasses.replace(self, factor=step_size)

    def adaptation(self) -> "_Adaptation":
        """Of each part on its own."""
        return _Adaptation(self)

    @torch.no_grad()
    def init(self, energy: Energy, x: Tensor) -> ChainState:
        """Evaluate energy and gradients at the chains' points.

        Args:
            energy: Where chains move, see :func:`~pyro_ebm.energies.unconstrained`.
            x: Points of the support, shape ``(*chains, *event)``.

        Raises:
            ValueError: If a part is not in the event, coordinates are in two parts or
                in none, a kernel is not for the support of its part, or a point is
                outside.
        """
        x = x.detach()
        grad = torch.zeros_like(x)
        for place, kernel in self._places(energy):
            part = _Conditional(energy, x, place)
            state = kernel.init(part, part.part_of(x))
            grad = part.filled(state.grad, grad)
        return ChainState(x, state.energy, grad)

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every part of every chain once; see :meth:`Kernel.step`."""
        x, grad, moves = state.x, state.grad, []
        for place, kernel in self._places(energy):
            part = _Conditional(energy, x, place)
            start = kernel.init(part, part.part_of(x))
            scaled = kernel
            if kernel.has_step_size:
                scaled = kernel.with_step_size(kernel.step_size * self.factor)
            end, info = scaled.step(part, start)  # (1)
            x, grad = part.filled(end.x), part.filled(end.grad, grad)
            moves.append(_Move(part, start, end, info))
        infos = [move.info for move in moves]
        adapted = [
            info.accept_prob
            for info, kernel in zip(infos, self.kernels, strict=True)
            if kernel.has_step_size
        ]
        accept_prob = torch.stack(adapted or [infos[0].accept_prob]).mean(0)
        accepted = torch.stack([info.accepted for info in infos]).all(0)
        is_finite = torch.stack([info.is_finite for info in infos]).all(0)
        found = _Info(accept_prob, accepted, is_finite)
        found.moves = moves
        return ChainState(x, end.energy, grad), found

    def _places(self, energy: Energy) -> list[tuple[Tensor, Kernel]]:
        """Coordinates of each part in the flattened event, and its kernel."""
        found = [_place(energy, part) for part, _ in self.parts]
        counts = torch.cat(found).bincount(minlength=energy.event_shape.numel())
        if (counts != 1).any():
            number = int((counts != 1).nonzero()[0])
            raise ValueError(
                "parts must have each coordinate of the event in exactly one part, and "
                f"number {number} of the flattened event is in {int(counts[number])}. "
                f"The event has shape {tuple(energy.event_shape)}, the support is "
                f"{energy.support}."
            )
        return list(zip(found, self.kernels, strict=True))


def _place(energy: Energy, part: Any) -> Tensor:
    is_name = isinstance(part, str) and part in ("real", "finite")
    if is_name and isinstance(energy.support, MixedSupport):
        device = energy.tensor_options()["device"]
        return torch.tensor(getattr(energy.support, part), device=device)
    if is_name and part not in (getattr(energy, "names", None) or ()):
        raise ValueError(
            f"the part {part!r} is one of a mixed event, and the support of the energy "
            f"is {energy.support}. Take one kernel for all of it, or give indices."
        )
    if isinstance(part, str) and part not in (getattr(energy, "names", None) or ()):
        raise ValueError(
            "parts must be named 'real' and 'finite', or as sites of a factor graph "
            f"are, or be indices; got {part!r}."
        )
    return chosen_numbers(energy, part).reshape(-1)


class _Conditional(Energy):
    """The energy of some coordinates of each chain, the others as they are there.

    Args:
        energy: Of whole events.
        x: Where the chains are, shape ``(*chains, *event)``.
        place: Of the coordinates in the flattened event, shape ``(U,)``.
    """

    def __init__(self, energy: Energy, x: Tensor, place: Tensor) -> None:
        support = support_at(energy.support, energy.event_shape, place)
        super().__init__((len(place),), support)
        # In a tuple: it is no part of this throw-away view, nor are its parameters.
        self._whole, self._x, self._place = (energy,), x, place

    def part_of(self, x: Tensor) -> Tensor:
        """The coordinates, shape ``(*chains, U)``."""
        event_dim = self._whole[0].event_dim
        flat = x.reshape(*x.shape[: x.dim() - event_dim], -1)
        return flat[..., self._place]

    def filled(self, u: Tensor, into: Tensor | None = None) -> Tensor:
        """Whole events with these coordinates, shape ``(*batch, *event)``."""
        x = self._x if into is None else into
        event = self._whole[0].event_shape
        flat = x.reshape(*x.shape[: x.dim() - len(event)], -1)
        flat = flat.expand(*u.shape[:-1], flat.shape[-1])
        return flat.index_copy(-1, self._place, u.to(flat)).reshape(
            *u.shape[:-1], *event
        )

    def forward(self, u: Tensor) -> Tensor:
        return self._whole[0](self.filled(u))

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self._whole[0].value_and_grad(self.filled(x.detach()))
        return value, self.part_of(grad)


class _Move(NamedTuple):
    """What a step did to one part."""

    part: _Conditional
    start: ChainState
    end: ChainState
    info: StepInfo


class _Info(StepInfo):
    """A step info with the moves of the parts, for the adaptation."""

    moves: list[_Move]


class _Adaptation(KernelAdaptation[Alternating]):
    """Of each part on its own, by what the steps tell.

    Args:
        kernel: As it was given.
    """

    def __init__(self, kernel: Alternating) -> None:
        super().__init__()
        self.parts = nn.ModuleList([_PartAdaptation(k) for k in kernel.kernels])

    def reset(self) -> None:
        """Take the metrics of the draws since the last time, and begin anew in them."""
        for part in self._each():
            part.reset(self.spread)

    def current(self, kernel: Alternating) -> Alternating:
        """The kernel of the next transition."""
        return self._with(kernel, [part.current() for part in self._each()])

    def frozen(self, kernel: Alternating) -> Alternating:
        """The kernel after the warm-up."""
        return self._with(kernel, [part.frozen() for part in self._each()])

    def update(self, kernel: Alternating, info: StepInfo) -> None:
        """Learn from a transition."""
        if not isinstance(info, _Info):
            raise TypeError(
                "info must be what the kernel of the warm-up returned, got "
                f"{type(info).__name__}."
            )
        trio = zip(self._each(), kernel.kernels, info.moves, strict=True)
        for part, moved_by, move in trio:
            part.update(moved_by, move)

    def _each(self) -> list[Any]:
        return list(self.parts)

    @staticmethod
    def _with(kernel: Alternating, kernels: list[Kernel]) -> Alternating:
        names = [name for name, _ in kernel.parts]
        return dataclasses.replace(kernel, parts=zip(names, kernels, strict=True))


class _PartAdaptation(nn.Module):
    """Step size, metric and the rest of one kernel.

    Args:
        kernel: As it was given.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._given = kernel
        names = {field.name for field in dataclasses.fields(kernel)}
        self._has_scale, self._may_be_dense = "scale" in names, "scale_tril" in names
        self.step = StepSizeAdaptation(1.0)
        self.own: KernelAdaptation[Any] | None = None
        if hasattr(kernel, "adaptation"):
            self.own = kernel.adaptation()
        self._metric: dict[str, Tensor | None] = {}
        # In a list: by chains, and where a dense metric is tried of all together.
        self._moments: list[GroupMoments] = []
        self._num_updates, self._dtype = 0, torch.get_default_dtype()

    def get_extra_state(self) -> dict[str, Any]:
        """The metric, the counter and the moments of the window."""
        moments = [dict(each.state_dict()) for each in self._moments]
        counter = {"updates": self._num_updates, "moments": moments}
        return {"metric": dict(self._metric), **counter}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load them."""
        self._metric, self._num_updates = dict(state["metric"]), state["updates"]
        self._moments = []
        for saved in state["moments"]:
            number, size = saved["mean"].shape
            each = GroupMoments((size,), number, is_dense=saved["scatter"].dim() == 3)
            self._moments.append(each.to(saved["mean"]))
            each.load_state_dict(saved)

    def reset(self, spread: float | Tensor) -> None:
        """Take the metric of the draws so far, and begin anew."""
        count = self._num_updates - _SKIPPED
        if self._moments and count >= _MIN_DRAWS:
            by_chain, *joint = self._moments
            scale = typical(diagonal_metrics(*by_chain.covariance().chunk(2)))
            scale = scale.where(scale.isfinite(), 1.0)
            factor = None
            if joint and count * len(by_chain.count) / 2 >= _MIN_DENSE * len(scale):
                draws, grads = joint[0].covariance().split(1)
                factor = dense_metric(draws, grads, scale)
            self._set(scale, factor)
        self._moments = []
        self._num_updates = 0
        if self.own is not None:
            self.own.spread = spread
            self.own.reset()

    def _set(self, scale: Tensor, factor: Tensor | None) -> None:
        self._metric = {"scale": None if factor is not None else scale.to(self._dtype)}
        if self._may_be_dense:
            factor = factor if factor is None else factor.to(self._dtype)
            self._metric["scale_tril"] = factor
        if hasattr(self._given, "low_rank"):
            self._metric["low_rank"] = None

    def _with_metric(self) -> Any:
        if not self._metric:
            return self._given
        return dataclasses.replace(self._given, **self._metric)

    def current(self) -> Any:
        """The kernel of the next transition."""
        kernel = self._with_metric()
        if self._num_updates:
            kernel = kernel.with_step_size(self.step.step_size)
        return kernel if self.own is None else self.own.current(kernel)

    def frozen(self) -> Any:
        """The kernel after the warm-up."""
        kernel = self._with_metric()
        if kernel.has_step_size and self._num_updates:
            kernel = kernel.with_step_size(self.step.averaged_step_size.item())
        return kernel if self.own is None else self.own.frozen(kernel)

    def update(self, kernel: Kernel, move: _Move) -> None:
        """Learn from a move of the part; the first tells the size of the steps."""
        if kernel.has_step_size and not self._num_updates:
            trial = self._with_metric()
            self.step.reset(find_step_size(trial, move.part, move.start))
        elif kernel.has_step_size:
            self.step.update(kernel, move.info)
        if self.own is not None and self._num_updates:
            self.own.update(kernel, move.info)
        self._num_updates += 1
        if self._has_scale and self._num_updates > _SKIPPED:
            self._note(move.end)

    def _note(self, state: ChainState) -> None:
        """Draws and gradients, for the metric."""
        rows = torch.stack([state.x, state.grad]).flatten(1, -2)
        (number, size), self._dtype = rows.shape[1:], rows.dtype
        if not self._moments:
            self._moments = [GroupMoments((size,), 2 * number)]
            if self._may_be_dense and 1 < size <= MAX_DENSE:
                self._moments.append(GroupMoments((size,), 2, is_dense=True))
        for each in self._moments:
            each.to(rows.device, torch.float64).update(rows)
