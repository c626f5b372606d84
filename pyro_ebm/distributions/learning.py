r"""The gradient of log Z in the parameters, for a model that is being learned.

.. math::
    \partial_\theta \log Z = -\mathbb{E}_{x \sim q_\theta}[\partial_\theta f_\theta(x)]
                                                                            \tag{1}

With it ``log_prob`` has the gradient of the likelihood (1.16), and ``SVI`` learns an
energy as any other distribution. It is found once for each set of parameters, from
persistent chains or from weighted draws of the base, and given at each call.
"""

__all__ = ["KnownGradient", "an_objective_learns", "gradient_is_wanted"]

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

#: Whether an objective supplies the gradients, so that a model does not.
_BY_OBJECTIVE: ContextVar[bool] = ContextVar("by_objective", default=False)


@contextlib.contextmanager
def an_objective_learns() -> Iterator[None]:
    """Within it models give log Z as a number: an objective has the gradients."""
    token = _BY_OBJECTIVE.set(True)
    try:
        yield
    finally:
        _BY_OBJECTIVE.reset(token)


def gradient_is_wanted(model: nn.Module) -> bool:
    """Whether log Z of a model is to have a gradient: in ``train()``.

    Args:
        model: An energy model.
    """
    return model.training and not _BY_OBJECTIVE.get()


class KnownGradient:
    """A tensor of value zero with a gradient that is known, any number of times.

    Args:
        value: A scalar with a graph, of which the gradient is taken here.
        parameters: What it is taken in.
    """

    def __init__(self, value: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        found = torch.autograd.grad(value, self.parameters, allow_unused=True)
        self.gradients = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.parameters, found, strict=True)
        ]

    def is_of(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are the parameters."""
        pairs = zip(self.parameters, parameters, strict=False)
        return len(self.parameters) == len(parameters) and all(a is b for a, b in pairs)

    def __call__(self) -> Tensor:
        """The tensor, shape ``()``."""
        zero: Tensor = _Given.apply(
            len(self.parameters), *self.gradients, *self.parameters
        )
        return zero


class _Given(torch.autograd.Function):
    """Zero, with given gradients in the last arguments."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> Tensor:
        ctx.number = number
        ctx.save_for_backward(*tensors[:number])
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        given = [grad * part for part in ctx.saved_tensors]
        return (None, *[None] * ctx.number, *given)
