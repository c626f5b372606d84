r"""Many flips at once, proposed by the gradient: for any energy over finite sites.

With the difference :math:`d_{iv}` of the log density between the value :math:`v` of a
site and its own, to first order or exact, every site makes a move of its own,

.. math::
    q_i(v) &= (1 - \epsilon)\, [v = x_i] +
        \epsilon\, \frac{e^{d_{iv}}}{\sum_w e^{d_{iw}}}
                                                                           \tag{1} \\
    q_i(\text{flip}) &= \sigma(d_i)
        \left(1 - e^{-2 t \cosh(d_i / 2)}\right)                          \tag{2} \\
    \log\alpha &= f(x) - f(y) + \sum_i \log \frac{q_i^{(y)}(x_i)}{q_i^{(x)}(y_i)}
                                                                           \tag{3}

and all moves are accepted as one. Of two values (2) is a jump process of rates
:math:`e^{\pm d_i / 2}` that runs for the time :math:`t`; of more, (1) draws a site anew
from its conditional, the others frozen, with :math:`\epsilon = 1 - e^{-t}`. Each site
moves or not for itself, so the number of flips is not fixed, nor even.

References:
    Zhang, Liu & Liu (2022), ICML (a discrete Langevin proposal). Sun, Dai, Dai, Zhou &
    Schuurmans (2022), ICLR (the jump process). Grathwohl, Swersky, Hashemi, Duvenaud &
    Maddison (2021), ICML (first-order differences).
"""

__all__ = ["DiscreteLangevin", "kernel_for"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.energies import Energy
from pyro_ebm.energies.discrete.finite import finite_values, num_states
from pyro_ebm.energies.discrete.sites import SiteEnergy
from pyro_ebm.energies.views.clamped import ClampedEnergy
from pyro_ebm.mcmc.base import ChainState, Kernel, StepInfo, accept
from pyro_ebm.mcmc.kernels.alternating import Alternating
from pyro_ebm.mcmc.kernels.gibbs import Gibbs, checked_points, has_blocks

#: So few sites are drawn one by one.
_FEW_SITES = 16
#: Halves of differences beyond which a flip is certain, in nats.
_STEEP = 40.0


@final
@dataclass(frozen=True)
class DiscreteLangevin(Kernel):
    """Flip many sites at once by (1) or (2), and accept or reject the whole.

    For energies of which no blocks are known: a network over bits or integers, at one
    gradient a step however many sites there are. Where blocks are known
    :class:`Gibbs` is the faster by far.

    Args:
        step_size: The time :math:`t`; above ``max_step`` it is taken for that.
        target_accept_prob: Mean acceptance that adaptation aims at. Where the sites are
            almost independent it cannot be got down to, and the step ends at its bound.
        max_step: Bound of the step; at the default every site is drawn anew.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bits = dist.constraints.independent(dist.constraints.boolean, 1)
        >>> net = pyro_ebm.energies.FunctionEnergy(
        ...     lambda x: (x.sum(-1) - 5).square() / 8, (20,), bits
        ... )
        >>> kernel = DiscreteLangevin(0.3)
        >>> state = kernel.init(net, torch.zeros(100, 20))
        >>> state, info = kernel.step(net, state)
        >>> state.x.shape, bool(info.accept_prob.mean() > 0.2)
        (torch.Size([100, 20]), True)
    """

    step_size: float | Tensor = 0.5
    target_accept_prob: float = 0.574
    max_step: float = 10.0

    def __post_init__(self) -> None:
        """Check the settings."""
        self._check()
        if not 0 < self.max_step < math.inf:
            raise ValueError(
                f"max_step must be positive and finite, got {self.max_step}."
            )

    @property
    def num_gradients(self) -> int:
        """One gradient a step."""
        return 1

    @torch.no_grad()
    def init(self, energy: Energy, x: Tensor) -> ChainState:
        """Evaluate energy and gradient at the chains' points, once.

        Args:
            energy: Over a finite support, differentiable in ``x`` unless it is a
                ``SiteEnergy``, which knows the conditionals of its sites.
            x: Points of the support, shape ``(*chains, *event)``.

        Raises:
            ValueError: If the support is not finite, a point is outside of it, or there
                is no gradient.
        """
        return self._evaluated(energy, checked_points(energy, x, type(self).__name__))

    @torch.no_grad()
    def step(self, energy: Energy, state: ChainState) -> tuple[ChainState, StepInfo]:
        """Move every chain once; see :meth:`Kernel.step`."""
        time = torch.as_tensor(self.step_size).to(state.energy).clamp(max=self.max_step)
        # Steps of their own for the chains come with the shape of these.
        time = time.reshape(time.shape + (1,) * (energy.event_dim if time.dim() else 0))
        values = finite_values(energy.support) or ()
        if len(values) == 2:
            there = _flip_probs(energy, state, time, values)
            moved = torch.rand_like(there) < there
            x = torch.where(moved, sum(values) - state.x, state.x)
            new = self._evaluated(energy, x)
            back = _flip_probs(energy, new, time, values)
            log_q = (_outcome(back, moved) / _outcome(there, moved)).log()
            log_q = sum_rightmost(log_q, energy.event_dim)
            return accept(state.energy - new.energy + log_q, state, new)  # (3)
        return self._redrawn(energy, state, time)

    def _redrawn(
        self, energy: Energy, state: ChainState, time: Tensor
    ) -> tuple[ChainState, StepInfo]:
        """A step of sites with more than two values."""
        there = _Moves.of(energy, state, time)
        index = there.draw()
        new = self._evaluated(energy, there.values[index])
        back = _Moves.of(energy, new, time)
        log_q = back.log_prob(there.own) - there.log_prob(index)
        log_q = sum_rightmost(log_q, energy.event_dim)
        return accept(state.energy - new.energy + log_q, state, new)  # (3)

    def _evaluated(self, energy: Energy, x: Tensor) -> ChainState:
        if isinstance(energy, SiteEnergy):
            return ChainState(x, energy(x), torch.zeros_like(x))
        return ChainState(x, *energy.value_and_grad(x))


def kernel_for(energy: Energy, kernel: Kernel) -> Kernel:
    """A kernel for real space, one for a finite support, or of a mixed event both.

    On a finite support it is :class:`Gibbs` where blocks are known, where the sites are
    few, and where there is no gradient; else :class:`DiscreteLangevin`.

    Args:
        energy: That it is to move on.
        kernel: For real space.
    """
    support = energy.support
    if isinstance(support, MixedSupport):
        x = support.two_points(torch.empty(0, **energy.tensor_options()))
        x = support.bijection()(x)[0].tolist()
        finite = ClampedEnergy(energy, [(number, x[number]) for number in support.real])
        return Alternating({"real": kernel, "finite": kernel_for(finite, kernel)})
    if not energy.support.is_discrete:
        return kernel
    if has_blocks(energy) or energy.event_shape.numel() <= _FEW_SITES:
        return Gibbs()
    low = (finite_values(energy.support) or (0.0,))[0]
    first = torch.full((1, *energy.event_shape), low)
    try:
        energy.value_and_grad(first.to(**energy.tensor_options(first)))
    except ValueError:
        return Gibbs()
    return DiscreteLangevin()


def _flip_probs(
    energy: Energy, state: ChainState, time: Tensor, values: Sequence[float]
) -> Tensor:
    """Probability (2) that each site of two values takes the other."""
    low, high = values
    towards = (low + high) - 2 * state.x  # the other value less the own
    if isinstance(energy, SiteEnergy):
        logits = energy.site_logits(state.x)
        d = towards / (high - low) * (logits[1] - logits[0])
    else:
        d = -towards * state.grad
    root = d.div_(2).clamp_(-_STEEP, _STEEP).exp_()
    rate = root + 1 / root
    flip = root.div_(rate).mul_(-torch.expm1(-time * rate))  # (2)
    states = num_states(energy.support, energy.event_shape)
    return flip if states is None else flip.masked_fill(states.to(flip.device) < 2, 0.0)


def _outcome(flip: Tensor, moved: Tensor) -> Tensor:
    """Probability of what the sites did."""
    return torch.where(moved, flip, 1 - flip)


class _Moves(NamedTuple):
    """What each site of more than two values may do.

    Attributes:
        log_probs: Of each value, shape ``(q, *chains, *event)``.
        own: Index of the present value, shape ``(*chains, *event)``.
        values: Shape ``(q,)``.
    """

    log_probs: Tensor
    own: Tensor
    values: Tensor

    @classmethod
    def of(cls, energy: Energy, state: ChainState, time: Tensor) -> "_Moves":
        """The proposal (1) from a state."""
        x = state.x
        values = torch.tensor(finite_values(energy.support)).to(x)
        own = torch.searchsorted(values, x.contiguous())
        wide = values.reshape(-1, *(1,) * x.dim())
        if isinstance(energy, SiteEnergy):
            logits = energy.site_logits(x)
            differences = logits - logits.gather(0, own[None])
        else:
            differences = (x - wide) * state.grad
            states = num_states(energy.support, energy.event_shape)
            if states is not None:
                index = torch.arange(len(values), device=x.device).reshape(wide.shape)
                lacking = index >= states.to(x.device)
                differences = differences.masked_fill(lacking, -torch.inf)
        return cls(_redraws(differences, own, time), own, values)

    def draw(self) -> Tensor:
        """Indices of new values, shape ``(*chains, *event)``."""
        noise = torch.empty_like(self.log_probs).exponential_()
        return (self.log_probs.exp() / noise).argmax(0)

    def log_prob(self, index: Tensor) -> Tensor:
        """Log-probability of a move of each site, shape of ``index``."""
        return self.log_probs.gather(0, index[None])[0]


def _redraws(differences: Tensor, own: Tensor, time: Tensor) -> Tensor:
    """Log-probabilities (1)."""
    epsilon = -torch.expm1(-time)
    probs = epsilon * differences.softmax(0)
    index = torch.arange(len(probs), device=own.device)
    is_own = index.reshape(-1, *(1,) * own.dim()) == own
    return (probs + is_own * (1 - epsilon)).log()  # (1)
