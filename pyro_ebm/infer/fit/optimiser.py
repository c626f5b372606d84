r"""The optimiser of a fit, the noise of its gradients, and how weights decay.

With gradients :math:`g_t = s + \varepsilon_t` of nearly the same mean, exponential
averages :math:`\bar g` and :math:`\overline{|g|^2}` of weights :math:`w_t` give

.. math::
    |s|^2 \approx \frac{|\bar g|^2 - w\, \overline{|g|^2}}{1 - w}, \quad
    \mathbb{E} |\varepsilon|^2 \approx \overline{|g|^2} - |s|^2, \quad
    w = \sum_t w_t^2                                                       \tag{1}

Where the likelihood of training rows is stationary but for a decay :math:`\lambda` of
the weights :math:`W`, that of held-out rows is stationary along :math:`W` for

.. math::
    \lambda = \frac{\langle W, \partial_W f \rangle_{\text{held out}}
        - \langle W, \partial_W f \rangle_{\text{train}}}{\lVert W \rVert^2}     \tag{2}

in which the expectation under the model, and its noise, cancel.
That the means of the sites differ between the rows by chance is left out of it.

The weights of a machine of two layers mean less where units are far from 0 on average:
then each also does what a bias does. With weights between units less their means,
:math:`\mu` of the visible statistics and :math:`\lambda` of the hidden units, and with
biases that make the same energy, gradients and steps are

.. math::
    \partial_{W'} = \partial_W - \mu \partial_c^\top - \partial_b \lambda^\top, \qquad
    \Delta b = \Delta b' - \Delta W' \lambda, \qquad
    \Delta c = \Delta c' - \Delta W'^\top \mu                             \tag{3}

References:
    Montavon & Mueller (2012), Deep Boltzmann machines and the centering trick.
    Melchior, Fischer & Wiskott (2016), How to center deep Boltzmann machines, JMLR 17.
"""

__all__ = [
    "Centring",
    "FitOptim",
    "GradientNoise",
    "contrast",
    "decay_by_gap",
    "require_parameters",
    "weights_of",
]

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_ebm.distributions import EnergyModel
from pyro_ebm.energies import Energy, RBMEnergy

#: Rows for each site from which on those held out are matched to the others.
_ROWS_A_SITE = 5


class GradientNoise:
    """Running moments (1) of the gradient, over about the last 50 steps.

    Args:
        parameters: Those of the energy.
    """

    #: Weight that the average so far keeps in a step.
    DECAY = 0.98

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.count = 0
        self.mean = self.square = torch.empty(0)

    @torch.no_grad()
    def observe(self) -> None:
        """Take note of the gradients as they are; no number leaves the device."""
        grads = [p.grad.flatten() for p in self.parameters if p.grad is not None]
        if not grads:
            return
        grad = torch.cat(grads)
        if self.mean.shape != grad.shape:
            self.mean, self.count = torch.zeros_like(grad), 0
            self.square = torch.zeros_like(grad[0])
        self.count += 1
        self.mean.lerp_(grad, 1 - self.DECAY)
        self.square.lerp_(grad.dot(grad), 1 - self.DECAY)

    def signal_to_noise(self) -> float | None:
        """Norm of the mean gradient over the root mean square of its noise.

        ``None`` before ten steps, or if it is not finite.
        """
        if self.count < 10:
            return None
        left = self.DECAY**self.count
        mean, square = self.mean / (1 - left), self.square / (1 - left)
        weight = (1 - self.DECAY) / (1 + self.DECAY) * (1 + left) / (1 - left)
        signal = (mean.dot(mean) - weight * square) / (1 - weight)  # (1)
        ratio = (signal.clamp(min=0) / (square - signal)).sqrt()
        return ratio.item() if ratio.isfinite() else None


class Centring:
    """Steps (3) of a machine with units less their means.

    Args:
        machine: Whose weights and biases are learned.
        rows: Data that say the means, shape ``(N, V)``.
    """

    #: Steps between two looks at the means.
    INTERVAL = 50

    def __init__(self, machine: RBMEnergy, rows: Tensor) -> None:
        self.machine, self.rows, self.count = machine, rows, 0
        self.means = torch.empty(0), torch.empty(0)

    @classmethod
    def of(cls, energy: Energy, rows: Tensor) -> "Centring | None":
        """That of a machine of which all is learned, else ``None``."""
        if not isinstance(energy, RBMEnergy):
            return None
        learned = {id(p) for p in energy.parameters() if p.requires_grad}
        parts = energy.weight, energy.visible_bias, energy.hidden_bias
        return cls(energy, rows) if learned >= {id(p) for p in parts} else None

    @torch.enable_grad()
    def look(self) -> None:
        """Take the means of the data: minus slopes of the energy in the biases."""
        biases = self.machine.visible_bias, self.machine.hidden_bias
        visible, hidden = torch.autograd.grad(self.machine(self.rows).mean(), biases)
        self.means = -visible, -hidden

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within it the optimiser moves what it knows as weights and biases."""
        machine = self.machine
        if self.count % self.INTERVAL == 0:
            self.look()
        self.count += 1
        visible, hidden = self.means
        weight, bias = machine.weight, machine.visible_bias
        by_bias, by_hidden = bias.grad, machine.hidden_bias.grad
        if weight.grad is None or by_bias is None or by_hidden is None:
            yield
            return
        with torch.no_grad():
            weight.grad -= visible[..., None] * by_hidden + by_bias[..., None] * hidden
            before = weight.clone()
            yield
            moved = weight - before
            bias -= moved @ hidden  # (3)
            machine.hidden_bias -= visible.flatten() @ moved.flatten(0, -2)


class FitOptim(pyro.optim.PyroOptim):
    """A common interface to optimisers and schedulers of torch and Pyro.

    Args:
        inner: A Pyro optimiser, a torch one, or a scheduler of either kind.
        energy_model: Whose parameters are moved.
        max_grad_norm: Largest norm of the gradient; longer ones are shortened.
        noise: Is shown each gradient before that.
    """

    def __init__(
        self,
        inner: Any,
        energy_model: EnergyModel,
        max_grad_norm: float | None,
        noise: GradientNoise,
    ) -> None:
        self.inner, self.max_grad_norm, self.noise = inner, max_grad_norm, noise
        self.torch_optim = inner.optimizer if isinstance(inner, LRScheduler) else inner
        self.plateau_mode = _plateau_mode(inner)
        self.moved = list(energy_model.parameters())
        self.added: list[nn.Parameter] = []
        self.centring: Centring | None = None

    @classmethod
    def of(
        cls, optim: Any, energy_model: EnergyModel, max_grad_norm: float | None
    ) -> "FitOptim":
        """Check an optimiser and wrap it, with the noise of the energy's gradients.

        Raises:
            TypeError: If it is none.
            ValueError: If it holds no parameters of the model.
        """
        if not isinstance(optim, pyro.optim.PyroOptim):
            _require_own_parameters(optim, energy_model)
        noise = GradientNoise(energy_model.energy.parameters())
        return cls(optim, energy_model, max_grad_norm, noise)

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Take a step; what ``SVI`` calls."""
        self.noise.observe()
        with nullcontext() if self.centring is None else self.centring.step():
            self._move(params)

    def _move(self, params: Any) -> None:
        if self.max_grad_norm is not None:
            # Of these, not of params: that is a set, without an order to reproduce.
            moved = [*self.moved, *self.added]
            torch.nn.utils.clip_grad_norm_(moved, self.max_grad_norm)
        if isinstance(self.inner, pyro.optim.PyroOptim):
            self.inner(params)
        else:
            self.torch_optim.step()

    def add(self, state: nn.Module) -> None:
        """Move the parameters of an objective's state, too."""
        self.added = [*state.parameters()]
        if isinstance(self.inner, pyro.optim.PyroOptim):
            return  # which takes what SVI gives it
        groups = self.torch_optim.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        self.added = [p for p in self.added if id(p) not in held]
        # In a group that is there: a scheduler knows of no other.
        groups[0]["params"].extend(self.added)

    def set_decay(self, value: float) -> None:
        """Let the weights, which are the last group, decay from now on."""
        self.torch_optim.param_groups[-1]["weight_decay"] = value

    def remove_added(self) -> None:
        """Leave a torch optimiser with the parameters that it came with."""
        if isinstance(self.inner, pyro.optim.PyroOptim):
            return
        group, gone = self.torch_optim.param_groups[0], {id(p) for p in self.added}
        group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in self.added:
            self.torch_optim.state.pop(parameter, None)

    def advance_schedule(self) -> None:
        """Count a parameter step."""
        is_scheduler = isinstance(self.inner, LRScheduler | pyro.optim.PyroLRScheduler)
        if is_scheduler and self.plateau_mode is None:
            self.inner.step()

    def note_record(self, value: float) -> None:
        """Show a log-likelihood to a scheduler that waits for a plateau."""
        if self.plateau_mode is not None:
            self.inner.step(value if self.plateau_mode == "max" else -value)


def _plateau_mode(inner: Any) -> str | None:
    """What a ReduceLROnPlateau waits for, ``"min"`` or ``"max"``."""
    if isinstance(inner, ReduceLROnPlateau):
        return str(inner.mode)
    if getattr(inner, "pt_scheduler_constructor", None) is ReduceLROnPlateau:
        return str(inner.kwargs.get("mode", "min"))
    return None


def weights_of(energy: Energy) -> list[nn.Parameter]:
    """Parameters of two dimensions or more: weights, but neither biases nor scales."""
    return [p for p in energy.parameters() if p.requires_grad and p.dim() > 1]


@torch.no_grad()
def contrast(train: Tensor, held_out: Tensor, weights: Tensor | None = None) -> Tensor:
    """Shares of held-out rows, and minus those of training rows, for the gap of (2).

    What a sum of functions of the sites differs by is chance, and more than the gap: so
    the shares are the nearest to equal ones in which no mean of a site differs. Few
    rows, less than five a site, have equal ones.

    Args:
        train: Rows that are learned from, shape ``(N, *event)``.
        held_out: Others, shape ``(M, *event)``.
        weights: Of these, shape ``(M,)``; default: all equal.

    Returns:
        Shape ``(N + M,)``, training rows first.
    """
    rows, number = torch.cat([train, held_out]).flatten(1).double(), len(train)
    mass = rows.new_ones(len(rows))
    if weights is not None:
        mass[number:] = weights
    shares = mass / mass[number:].sum()
    shares[:number] = -1 / number
    if len(rows) >= _ROWS_A_SITE * rows.shape[1]:
        off = rows - mass @ rows / mass.sum()
        square = off.mT @ (mass[:, None] * off)
        square.diagonal().add_(1e-6 * square.diagonal().mean().clamp(min=1e-9))
        shares -= mass * (off @ torch.linalg.solve(square, off.mT @ shares))
        shares /= shares[number:].sum()
    return shares


@torch.enable_grad()
def decay_by_gap(energy: Energy, rows: Tensor, shares: Tensor) -> float:
    """The decay (2) of the weights, at least 0; 0 where there are none.

    Args:
        energy: At its current parameters.
        rows: That it learns from, then others, shape ``(N + M, *event)``.
        shares: Of either, as :func:`contrast` has them.
    """
    learned = weights_of(energy)
    if not learned:
        return 0.0
    values = energy(rows)
    gap = shares.to(values) @ values
    found = torch.autograd.grad(gap, learned, allow_unused=True)
    pairs = [(p, g) for p, g in zip(learned, found, strict=True) if g is not None]
    with torch.no_grad():
        along = sum(float((p * g).sum()) for p, g in pairs)
        square = sum(float(p.square().sum()) for p, _ in pairs)
    return max(along / square, 0.0) if square else 0.0  # (2)


def require_parameters(energy_model: EnergyModel) -> None:
    """Check that there is something to learn.

    Raises:
        ValueError: If the model has no parameters.
    """
    if not any(True for _ in energy_model.parameters()):
        raise ValueError(
            "energy_model has no parameters to fit. A FunctionEnergy learns those of "
            "an nn.Module given as its fn."
        )


def _require_own_parameters(optim: Any, energy_model: EnergyModel) -> None:
    optimizer = optim.optimizer if isinstance(optim, LRScheduler) else optim
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optim must be a pyro.optim or torch.optim optimiser or learning-rate "
            f"scheduler, got {type(optim).__name__}."
        )
    own = {id(parameter) for parameter in energy_model.parameters()}
    groups = optimizer.param_groups
    if not any(id(p) in own for group in groups for p in group["params"]):
        raise ValueError(
            "optim must hold parameters of energy_model, and holds none of them. Build "
            "it as torch.optim.Adam(energy_model.parameters())."
        )
