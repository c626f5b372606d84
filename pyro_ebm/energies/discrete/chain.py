r"""Chains of finite sites: linear-chain random fields and hidden Markov models.

With a potential for each state and one for each step from state to state,

.. math::
    f(x) = -\sum_{t=1}^{T} u_t(x_t) - \sum_{t=1}^{T-1} a_t(x_t, x_{t+1})   \tag{1}

Messages from the left and from the right give :math:`\log Z` and all its derivatives,
the marginals, at a cost of :math:`T K^2`:

.. math::
    \alpha_t(j) &= e^{u_t(j)} \sum_i \alpha_{t-1}(i)\, e^{a_{t-1}(i, j)}, \qquad
        Z = \sum_j \alpha_T(j)                                             \tag{2} \\
    \beta_t(i) &= \sum_j e^{a_t(i, j) + u_{t+1}(j)} \beta_{t+1}(j)         \tag{3} \\
    p(x_t = i) &= \alpha_t(i)\, \beta_t(i) / Z                             \tag{4} \\
    p(x_t = i, x_{t+1} = j) &=
        \alpha_t(i)\, e^{a_t(i, j) + u_{t+1}(j)} \beta_{t+1}(j) / Z        \tag{5}

The messages are products of matrices where no potential is so extreme that a rescaled
product could lose a path, and log-sums elsewhere. Draws go back from the last site,
:math:`p(x_t \mid x_{t+1}) \propto \alpha_t(x_t)\, e^{a_t(x_t, x_{t+1})}`. With the
largest in place of the sum, (2) finds the most probable states.

References:
    Rabiner (1989), Proceedings of the IEEE 77, 257-286. Lafferty, McCallum & Pereira
    (2001), ICML (conditional random fields). Viterbi (1967), IEEE Transactions on
    Information Theory 13, 260-269.
"""

__all__ = ["ChainEnergy"]

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.energies.base import live_or_parameter, require_precision
from pyro_ebm.energies.discrete.exact.distribution import (
    ExactClosedForm,
    ExactDistribution,
    categorical,
)
from pyro_ebm.energies.discrete.exact.elimination import Factors
from pyro_ebm.energies.discrete.finite import AnnealingPath
from pyro_ebm.energies.discrete.sites import SiteEnergy, path_through, softened
from pyro_ebm.energies.graphs.recording import holds, is_variable

#: Nats below 1 down to which numbers keep their precision.
_RANGE = {torch.float64: 700.0, torch.float32: 85.0}


@final
class ChainEnergy(SiteEnergy):
    r"""The energy (1) of a chain, exact in all that is asked of it.

    Tensors that carry a graph (the output of a network, a latent variable,
    ``pyro.param``) stay live, a ``nn.Parameter`` is shared, any other tensor becomes a
    parameter; arrays and integers are converted. ``closed_form()`` has :math:`\log Z`
    with its gradient and a distribution with exact draws, ``marginals()``, ``mode`` and
    ``condition()``, at which a conditional random field is learned by plain ``SVI``.

    Args:
        unary: :math:`u_t(k)`, larger where a state is favoured; shape ``(T, K)``, or
            ``(*batch, T, K)`` for as many chains. ``-inf`` forbids a state.
        transition: :math:`a(i, j)` from state ``i`` to the next state ``j``, shape
            ``(K, K)`` for all steps, ``(T - 1, K, K)``, or ``(*batch, T - 1, K, K)``.
        mask: Which sites are there, shape ``(*batch, T)`` or what broadcasts with it:
            true up to the length of a chain, at least 1, then false. Sites that are not
            there hold the state 0.

    Raises:
        TypeError: If a potential is no array of real numbers.
        ValueError: If a shape does not fit, a potential is ``nan`` or ``+inf``, or the
            mask has gaps.

    Example:
        >>> energy = ChainEnergy(torch.zeros(50, 3), torch.eye(3))
        >>> round(energy.closed_form().log_partition.item(), 4)  # 3 (e + 2)^49
        77.1194
    """

    unary: Tensor
    transition: Tensor
    mask: Tensor | None

    def __init__(self, unary: Any, transition: Any, mask: Any = None) -> None:
        unary = _floating(unary, "unary")
        transition = _floating(transition, "transition", unary.dtype)
        mask = None if mask is None else torch.as_tensor(mask)
        _require_potentials(unary, transition)
        length, num_states = unary.shape[-2:]
        states = constraints.integer_interval(0, num_states - 1)
        blocks = torch.arange(length) % 2 == torch.arange(min(length, 2))[:, None]
        super().__init__(
            (length,),
            constraints.independent(states, 1),
            blocks,
            unary.detach(),
            unary.shape[:-2],
        )
        live_or_parameter(self, "unary", unary)
        live_or_parameter(self, "transition", transition)
        if mask is not None:
            _require_prefix(mask, unary)
            mask = mask.to(unary.device)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*sample, *batch, T)``."""
        index, is_outside = self._states(x)
        shape = torch.broadcast_shapes(x.shape, self.unary.shape[:-1])
        index = index.expand(shape)
        sites = self.unary.expand(*shape, -1).gather(-1, index[..., None]).squeeze(-1)
        steps = self._step_table(index[..., :-1], index[..., 1:])
        if self.mask is not None:
            sites = sites.where(self.mask, 0.0)
            steps = steps.where(self.mask[..., 1:], 0.0)
            is_outside = is_outside | (~self.mask & (index != 0))
        value = -sites.sum(-1) - steps.sum(-1)  # (1)
        # What is no number is no state: without this it would have an energy.
        return value.where(~is_outside.any(-1), torch.inf) + 0 * x.sum(-1)

    def site_logits(self, x: Tensor) -> Tensor:
        """Logits of each state of each site, shape ``(K, *batch, T)``."""
        index, _ = self._states(x)
        shape = torch.broadcast_shapes(x.shape, self.unary.shape[:-1])
        index = index.expand(shape)
        logits = self.unary.expand(*shape, -1).clone()
        steps = self.transition
        if steps.dim() == 2:
            before, after = steps[index[..., :-1]], steps.mT[index[..., 1:]]
        else:
            steps = steps.expand(*shape[:-1], *steps.shape[-3:])
            row = index[..., :-1, None, None].expand(
                *steps.shape[:-2], 1, steps.size(-1)
            )
            column = index[..., 1:, None, None].expand(*steps.shape[:-1], 1)
            before = steps.gather(-2, row).squeeze(-2)
            after = steps.gather(-1, column).squeeze(-1)
        if self.mask is not None:
            is_there = self.mask[..., 1:, None]
            before, after = before.where(is_there, 0.0), after.where(is_there, 0.0)
        logits[..., 1:, :] += before
        logits[..., :-1, :] += after
        if self.mask is not None:
            padding = _only_first(logits)
            logits = logits.where(self.mask[..., None], padding)
        return logits.movedim(-1, 0)

    def annealing_path(self) -> AnnealingPath:
        """From uniform sites to this energy; see :class:`FactorGraphEnergy`.

        What is forbidden is only unlikely until the end.
        """
        path = super().annealing_path()
        unary, transition = self.unary.detach(), self.transition.detach()
        if not (unary.isneginf().any() or transition.isneginf().any()):
            return path
        soft = ChainEnergy(softened(unary), softened(transition), self.mask)
        return path_through(soft, path)

    def closed_form(self) -> ExactClosedForm:
        r""":math:`\log Z` by (2), and the distribution. Exactness: *exact*."""
        solver = _Chain.of(self.unary, self.transition, self.mask)
        exact = ExactDistribution(self, solver, self.batch_shape)
        return ExactClosedForm.of(exact)

    def factors(self) -> Factors:
        """Log potentials of the sites and of the steps."""
        unary, steps = self.unary, self.transition
        if self.mask is not None:
            unary = unary.where(self.mask[..., None], _only_first(unary))
            steps = steps.where(self.mask[..., 1:, None, None], 0.0)
        sites = torch.arange(self.unary.shape[-2])
        found = [(sites[:, None], unary)]
        if len(sites) > 1:
            steps = steps[None] if steps.dim() == 2 else steps
            found.append((torch.stack([sites[:-1], sites[1:]], -1), steps))
        return found

    def _states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the states, and where there is no such state."""
        index = x.detach().nan_to_num(0.0).long().clamp(0, self.unary.shape[-1] - 1)
        return index, index != x

    def _step_table(self, i: Tensor, j: Tensor) -> Tensor:
        """The potentials of steps from states ``i`` to ``j``, in their shape."""
        if self.transition.dim() == 2:
            return self.transition[i, j]
        steps = self.transition.expand(*i.shape, *self.transition.shape[-2:]).flatten(
            -2
        )
        flat = i * self.transition.shape[-1] + j
        return steps.gather(-1, flat[..., None]).squeeze(-1)


def _only_first(logits: Tensor) -> Tensor:
    """Logits, along the last axis, of the first state alone."""
    only = torch.full_like(logits[(0,) * (logits.dim() - 1)], -torch.inf)
    only[0] = 0
    return only


@dataclass(frozen=True)
class _Chain:
    """The sums over the states of chains; time first, batches flat.

    Attributes:
        unary: Shape ``(T, B, K)``.
        transition: Shape ``(K, K)``, ``(T - 1, K, K)`` or ``(T - 1, B, K, K)``.
        mask: Shape ``(T, B)``, or ``None`` where all sites are there.
        batch_shape: Of ``B`` chains.
    """

    unary: Tensor
    transition: Tensor
    mask: Tensor | None
    batch_shape: torch.Size

    @classmethod
    def of(cls, unary: Tensor, transition: Tensor, mask: Tensor | None) -> "_Chain":
        """From tensors that have time in front of the states, batches first."""
        *batch, length, num_states = unary.shape
        flat = unary.reshape(-1, length, num_states).transpose(0, 1)
        if transition.dim() > 3:
            steps = transition.expand(*batch, *transition.shape[-3:])
            transition = steps.reshape(-1, *steps.shape[-3:]).transpose(0, 1)
        if mask is not None:
            mask = mask.expand(*batch, length).reshape(-1, length).mT
        return cls(flat, transition, mask, torch.Size(batch))

    def log_partition(self) -> Tensor:
        tensors = self.unary, self.transition, self.mask
        if any(is_variable(potential) for potential in tensors[:2]):
            _, value = _log_messages(*tensors)  # whatever the values are
        else:
            value = _LogPartition.apply(*tensors)
        return value.reshape(self.batch_shape)

    def marginals(self) -> Tensor:
        """Probabilities (4), the gradient of log Z."""
        is_live = self.unary.requires_grad or self.transition.requires_grad
        is_live &= torch.is_grad_enabled()
        unary, transition = self.unary, self.transition
        if not is_live:
            unary, transition = unary.detach(), transition.detach()
        with torch.enable_grad():
            unary = unary if unary.requires_grad else unary.requires_grad_()
            value: Any = _LogPartition.apply(unary, transition, self.mask)
            (probs,) = torch.autograd.grad(value.sum(), unary, create_graph=is_live)
        if self.mask is not None:
            probs = probs.where(self.mask[..., None], _only_first(probs).exp())
        return self._batch_first(probs)

    def mode(self) -> Tensor:
        best, back = self.unary[0], []
        for t in range(1, len(self.unary)):
            top, where = (best[..., None] + _step_to(t, self.transition)).max(-2)
            top = top + self.unary[t]
            if self.mask is not None:
                is_there = self.mask[t, :, None]
                same = torch.arange(top.shape[-1], device=top.device)
                top, where = top.where(is_there, best), where.where(is_there, same)
            best = top
            back.append(where)
        states = [best.argmax(-1)]
        for where in reversed(back):
            states.append(where.gather(-1, states[-1][:, None]).squeeze(-1))
        x = torch.stack(states[::-1])
        return self._batch_first(x if self.mask is None else x.where(self.mask, 0))

    def sample(self, num_draws: int) -> Tensor:
        unary, transition = self.unary.detach(), self.transition.detach()
        filtered, _ = _log_messages(unary, transition, self.mask)
        last = filtered[-1].expand(num_draws, *filtered[-1].shape)
        states = [categorical(last)]
        for t in range(len(unary) - 1, 0, -1):
            steps = _step_to(t, transition).mT.expand(*unary.shape[1:], -1)
            batch = torch.arange(unary.shape[1], device=unary.device)
            step = steps[batch, states[-1]]
            if self.mask is not None:
                step = step.where(self.mask[t, :, None], 0.0)
            states.append(categorical(filtered[t - 1] + step))
        x = torch.stack(states[::-1])  # (T, N, B)
        if self.mask is not None:
            x = x.where(self.mask[:, None], 0)
        return x.movedim(0, -1).reshape(num_draws, *self.batch_shape, -1)

    def given(self, observed: Mapping[int, Tensor]) -> "_Chain":
        unary = self.unary.clone()
        states = torch.arange(unary.shape[-1], device=unary.device)
        for site, state in observed.items():
            state = state.expand(self.batch_shape).reshape(-1, 1)
            unary[site] = unary[site].where(states == state, -torch.inf)
            if self.mask is not None:  # what is not there holds the state 0
                possible = self.mask[site, :, None] | (state == 0)
                unary[0] = unary[0].where(possible, -torch.inf)
        return replace(self, unary=unary)

    def _batch_first(self, rows: Tensor) -> Tensor:
        """From ``(T, B, *rest)`` to ``(*batch, T, *rest)``."""
        return rows.transpose(0, 1).reshape(
            *self.batch_shape, len(rows), *rows.shape[2:]
        )


class _LogPartition(torch.autograd.Function):
    """Log Z of chains, whose gradient is known: the marginals (4) and (5)."""

    @staticmethod
    def forward(
        ctx: Any, unary: Tensor, transition: Tensor, mask: Tensor | None
    ) -> Tensor:
        scaled = _Scaled.of(unary, transition, mask)
        ctx.save_for_backward(unary, transition, mask)
        ctx.scaled = scaled
        if scaled is not None:
            value, ctx.messages = scaled.forward()
            return value
        ctx.messages, value = _log_messages(unary, transition, mask)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        unary, transition, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            left, _ = _log_messages(unary, transition, mask)
            return (*_log_gradients(left, unary, transition, mask, grad), None)
        if ctx.scaled is not None:
            return (*ctx.scaled.gradients(ctx.messages, grad), None)
        return (*_log_gradients(ctx.messages, unary, transition, mask, grad), None)


@dataclass(frozen=True)
class _Scaled:
    """Messages as rescaled products, where nothing can be lost by that.

    Attributes:
        sites: The exponential of the unary potentials, the largest of a site at 1.
        steps: That of the transitions, the largest of all at 1.
        mask: Of the sites that are there.
        shift: Log of what was divided out, shape ``(B,)``, in double precision.
        every: Steps between two rescalings of the messages.
    """

    sites: Tensor
    steps: Tensor
    mask: Tensor | None
    shift: Tensor
    every: int

    @classmethod
    def of(
        cls, unary: Tensor, transition: Tensor, mask: Tensor | None
    ) -> "_Scaled | None":
        """``None`` where potentials differ by too much, or some are infinite."""
        if not transition.numel():
            return None
        low, high = unary.aminmax(dim=-1, keepdim=True)
        least, most = transition.aminmax()
        span = ((high - low).max() + most - least).item()
        # What a message may lose in a step; its product with one from the other side
        # must stay in range.
        span += math.log(unary.shape[-1]) + 1e-3
        every = (_RANGE.get(unary.dtype, 0.0) - span) / (2 * span)
        if not every >= 1:
            return None
        shift = high[1:, :, 0] + most
        shift = shift if mask is None else shift.where(mask[1:], 0.0)
        return cls(
            torch.sub(unary, high).contiguous().exp_(),
            torch.sub(transition, most).exp_(),
            mask,
            shift.sum(0, dtype=torch.float64) + high[0, :, 0],
            int(every),
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Log Z, and the messages (2) up to a factor, shape ``(T, B, K)``."""
        messages = torch.empty_like(self.sites)
        rows, sites = messages.unbind(), self.sites.unbind()
        rows[0].copy_(sites[0])
        totals = []
        for t in range(1, len(rows)):
            self._apply(t, rows[t - 1], rows[t], is_forward=True)
            rows[t].mul_(sites[t])  # (2)
            if self.mask is not None:
                rows[t].copy_(rows[t].where(self.mask[t, :, None], rows[t - 1]))
            if t % self.every == 0:
                totals.append(rows[t].sum(-1, keepdim=True))
                rows[t].div_(totals[-1])
        totals.append(rows[-1].sum(-1, keepdim=True))
        logs = torch.cat(totals, -1).log_().sum(-1, dtype=torch.float64)
        return logs.add_(self.shift).to(messages), messages

    def gradients(self, left: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Those in the unary potentials and in the transitions."""
        right = torch.empty_like(left)
        rows, sites = right.unbind(), self.sites.unbind()
        rows[-1].fill_(1.0)
        product = torch.empty_like(rows[-1])
        for t in range(len(rows) - 1, 0, -1):
            torch.mul(rows[t], sites[t], out=product)
            self._apply(t, product, rows[t - 1], is_forward=False)  # (3)
            if self.mask is not None:
                rows[t - 1].copy_(rows[t - 1].where(self.mask[t, :, None], rows[t]))
            if t % self.every == 0:
                rows[t - 1].div_(rows[t - 1].sum(-1, keepdim=True))
        both = left * right
        in_unary = both.mul_(grad[:, None] / both.sum(-1, keepdim=True))  # (4)
        if self.mask is not None:
            in_unary = in_unary.where(self.mask[..., None], 0.0)
        return in_unary, self._in_steps(left[:-1], right.mul_(self.sites)[1:], grad)

    def _in_steps(self, left: Tensor, right: Tensor, grad: Tensor) -> Tensor:
        """Sums of (5), in the shape of the transitions."""
        steps = self.steps
        if steps.dim() == 4:
            ahead = (left[..., None, :] @ steps).squeeze(-2)
        else:
            ahead = left @ steps
        weight = grad[:, None] / (ahead * right).sum(-1, keepdim=True)
        if self.mask is not None:
            weight = weight.where(self.mask[1:, :, None], 0.0)
        left = left * weight
        if steps.dim() == 4:
            return steps * left[..., None] * right[..., None, :]
        if steps.dim() == 3:
            return steps * (left.mT @ right)
        return steps * (left.flatten(0, 1).mT @ right.flatten(0, 1))

    def _apply(self, t: int, message: Tensor, out: Tensor, *, is_forward: bool) -> None:
        """Take a message over the step to site ``t``, or back over it."""
        steps = _step_to(t, self.steps)
        steps = steps if is_forward else steps.mT
        if steps.dim() == 2:
            torch.mm(message, steps, out=out)
        else:
            torch.bmm(message[:, None], steps, out=out[:, None])


def _step_to(t: int, transition: Tensor) -> Tensor:
    """Of the step to site ``t``."""
    return transition if transition.dim() == 2 else transition[t - 1]


def _log_messages(
    unary: Tensor, transition: Tensor, mask: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The logarithms of the messages (2), each of shape ``(B, K)``, and log Z.

    The largest of a message is 0: what was taken off is added up in double precision.
    """
    message, scale = _from_largest(unary[0])
    messages, scales = [message], [scale]
    for t in range(1, len(unary)):
        joint = message[..., None] + _step_to(t, transition)
        ahead = _logsumexp(joint, -2) + unary[t]  # (2)
        ahead, scale = _from_largest(ahead)
        if mask is not None:
            ahead = ahead.where(mask[t, :, None], message)
            scale = scale.where(mask[t], 0.0)
        message = ahead
        messages.append(message)
        scales.append(scale)
    total = torch.stack(scales).sum(0, dtype=torch.float64)
    return messages, (total + message.logsumexp(-1)).to(unary)


def _from_largest(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms with their largest at 0, and what was taken off, a constant."""
    scale = logs.detach().amax(-1)
    scale = scale.where(scale != -torch.inf, 0.0)
    return logs - scale[..., None], scale


def _log_behind(unary: Tensor, transition: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The logarithms of the messages (3), the largest of each at 0."""
    message = torch.zeros_like(unary[0])
    messages = [message]
    for t in range(len(unary) - 1, 0, -1):
        joint = _step_to(t, transition) + (unary[t] + message)[..., None, :]
        behind, _ = _from_largest(_logsumexp(joint, -1))  # (3)
        message = behind if mask is None else behind.where(mask[t, :, None], message)
        messages.append(message)
    return messages[::-1]


def _log_gradients(
    left: list[Tensor],
    unary: Tensor,
    transition: Tensor,
    mask: Tensor | None,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Those of log Z from (4) and (5), by log-sums; themselves differentiable."""
    right = _log_behind(unary, transition, mask)
    in_unary = (torch.stack(left) + torch.stack(right)).softmax(-1)  # (4)
    in_unary = in_unary * grad[:, None]
    if mask is not None:
        in_unary = in_unary.where(mask[..., None], 0.0)
    in_steps = [torch.zeros_like(transition)] if transition.dim() == 2 else []
    for t in range(1, len(unary)):
        steps = _step_to(t, transition)
        joint = left[t - 1][..., None] + steps + (unary[t] + right[t])[..., None, :]
        pairs = joint.flatten(-2).softmax(-1).reshape(joint.shape)  # (5)
        pairs = pairs * grad[:, None, None]
        if mask is not None:
            pairs = pairs.where(mask[t, :, None, None], 0.0)
        if transition.dim() == 2:
            in_steps[0] = in_steps[0] + pairs.sum(0)
        else:
            in_steps.append(pairs if transition.dim() == 4 else pairs.sum(0))
    if transition.dim() == 2:
        return in_unary, in_steps[0]
    if not in_steps:
        return in_unary, torch.zeros_like(transition)
    return in_unary, torch.stack(in_steps)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """Log of a sum of exponentials whose gradient is zero where all are zero."""
    is_nothing = x.detach().amax(dim, keepdim=True) == -torch.inf
    if not is_variable(x) and not is_nothing.any():
        return x.logsumexp(dim)
    value = x.where(~is_nothing, 0.0).logsumexp(dim)
    return value.where(~is_nothing.squeeze(dim), -torch.inf)


def _floating(numbers: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of floating point; what is of it already stays as it is."""
    found: Tensor | None = None
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        found = torch.as_tensor(numbers)
    if found is None or found.is_complex():
        raise TypeError(
            f"{name} must be a tensor or an array of real numbers, got "
            f"{type(numbers).__name__}. Convert it by torch.as_tensor."
        )
    if found.is_floating_point():
        return found
    return found.to(dtype or torch.get_default_dtype())


def _require_potentials(unary: Tensor, transition: Tensor) -> None:
    if unary.dim() < 2 or not unary.numel():
        raise ValueError(
            "unary must have shape (*batch, T, K) for chains of T sites with K states, "
            f"got {tuple(unary.shape)}."
        )
    require_precision(unary, "unary")
    *batch, length, states = unary.shape
    shape = (states, states)
    wanted = [shape, (length - 1, *shape), (*batch, length - 1, *shape)]
    if tuple(transition.shape) not in wanted or transition.dtype != unary.dtype:
        raise ValueError(
            f"transition must have the dtype {unary.dtype} of unary and one of the "
            f"shapes {wanted} to match unary of shape {tuple(unary.shape)}, got "
            f"{transition.dtype} and {tuple(transition.shape)}."
        )
    for name, potential in (("unary", unary), ("transition", transition)):
        if not holds(potential.detach() < torch.inf):
            raise ValueError(
                f"{name} must hold no nan and no +inf; -inf forbids a state. Look for "
                "an overflow in what it is computed from."
            )


def _require_prefix(mask: Tensor, unary: Tensor) -> None:
    shape = unary.shape[:-1]
    if (
        mask.dtype != torch.bool
        or mask.shape[-1:] != shape[-1:]
        or (torch.broadcast_shapes(mask.shape, shape) != shape)
    ):
        raise ValueError(
            f"mask must hold booleans in the shape {tuple(shape)}, or one that "
            f"broadcasts to it; got {mask.dtype} and {tuple(mask.shape)}."
        )
    if not mask[..., 0].all() or (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ValueError(
            "mask must be true up to the length of each chain, at least 1, and false "
            "from there on: torch.arange(T) < lengths[:, None]."
        )
