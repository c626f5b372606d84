r"""The gradient of log Z in the parameters, for a model that is being learned.

.. math::
    \partial_\theta \log Z = -\mathbb{E}_{x \sim q_\theta}[\partial_\theta f_\theta(x)]
                                                                            \tag{1}

With it ``log_prob`` has the gradient of the likelihood (1.16), and ``SVI`` learns an
energy as any other distribution. It is found by the first backward pass of each set of
parameters, from persistent chains or from weighted draws of the base, and kept.
"""

__all__ = ["an_objective_learns", "gradient_is_wanted", "with_gradient"]

import contextlib
from collections.abc import Callable, Iterator, Sequence
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


def with_gradient(
    find: Callable[[], Sequence[Tensor]], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """A tensor of value zero whose gradient is found when it is asked for.

    So what is only evaluated, or differentiated in other things, costs nothing and
    changes nothing.

    Args:
        find: Gives the gradient in each parameter.
        parameters: Of which there is at least one.

    Returns:
        Shape ``()``.
    """
    zero: Tensor = _Found.apply(find, *parameters)
    return zero


class _Found(torch.autograd.Function):
    """Zero, with a gradient that a function finds."""

    @staticmethod
    def forward(ctx: Any, find: Any, *parameters: Tensor) -> Tensor:
        ctx.find = find
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None, *[grad * part for part in ctx.find()])
