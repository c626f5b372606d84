r"""The scale matrix :math:`S` of a preconditioned kernel.

Such a kernel moves in whitened coordinates :math:`z = S^{-1} x`; :math:`S` is the
identity, a diagonal (``scale``, in the shape of the event) or a dense matrix
(``scale_tril``, for vectors). It is best where :math:`S S^\top` is near the covariance.
"""

__all__ = [
    "PooledMoments",
    "check_scales",
    "require_one_scale",
    "times_scale",
    "times_transposed",
    "whiten",
]

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_ebm.energies import Energy


def require_one_scale(scale: Tensor | None, scale_tril: Tensor | None) -> None:
    """Check that at most one of the two is given.

    Raises:
        ValueError: If both are.
    """
    if scale is not None and scale_tril is not None:
        raise ValueError("give scale or scale_tril, not both.")


def check_scales(
    energy: Energy, scale: Tensor | None, scale_tril: Tensor | None
) -> None:
    """Check the shapes: others would broadcast along the chains without a word.

    Raises:
        ValueError: If one does not fit the event of the energy.
    """
    event = energy.event_shape
    if scale is not None and scale.shape != event:
        raise ValueError(
            f"scale must have the event_shape {tuple(event)} of the energy, got shape "
            f"{tuple(scale.shape)}."
        )
    if scale_tril is not None and scale_tril.shape != event * 2:
        raise ValueError(
            "scale_tril must have shape (D, D) for an energy over vectors of "
            f"shape (D,), got {tuple(scale_tril.shape)} for event_shape "
            f"{tuple(event)}. Other events take a diagonal scale."
        )


def times_scale(z: Tensor, scale_tril: Tensor | None) -> Tensor:
    """The dense :math:`S z` of each row, or ``z`` itself without one."""
    return z if scale_tril is None else z @ scale_tril.mT


def times_transposed(grad: Tensor, scale_tril: Tensor | None) -> Tensor:
    r"""The dense :math:`S^\top \nabla f` of each row, or the gradient itself."""
    return grad if scale_tril is None else grad @ scale_tril


def whiten(x: Tensor, scale: Tensor | None, scale_tril: Tensor | None) -> Tensor:
    r""":math:`z = S^{-1} x` of each row, for points and scales without event shape.

    Args:
        x: Shape ``(N, D)``.
        scale: As in a kernel, of ``D`` elements, or ``None``.
        scale_tril: Lower-triangular, shape ``(D, D)``, or ``None``.
    """
    if scale_tril is not None:
        return torch.linalg.solve_triangular(scale_tril.to(x), x.mT, upper=False).mT
    return x if scale is None else x / scale.to(x).flatten()


class PooledMoments(nn.Module):
    """Mean and covariance of draws that come a batch of chains at a time.

    The parallel form of Welford's recursion, which never subtracts large numbers.

    Args:
        event_shape: Of one draw.
        is_dense: Whether the whole covariance is kept, or its diagonal.

    Attributes:
        count: Draws so far, shape ``()``.

    References:
        Chan, Golub & LeVeque (1983), The American Statistician 37, 242-247.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, event_shape: Sequence[int], *, is_dense: bool = False) -> None:
        super().__init__()
        size = torch.Size(event_shape).numel()
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("mean", torch.zeros(size))
        shape = (size, size) if is_dense else (size,)
        self.register_buffer("scatter", torch.zeros(shape))

    def reset(self) -> None:
        """Forget all draws."""
        for name, buffer in self.named_buffers():
            setattr(self, name, torch.zeros_like(buffer))

    def update(self, x: Tensor) -> None:
        """Add draws of shape ``(*chains, *event)``."""
        rows = x.reshape(-1, len(self.mean)).to(self.mean)
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self.mean
        count = self.count + len(rows)
        between = self.count * len(rows) / count
        if self.scatter.dim() == 2:
            within, moved = centred.mT @ centred, shift.outer(shift)
        else:
            within, moved = centred.square().sum(0), shift.square()
        self.scatter = self.scatter + within + between * moved
        self.mean = self.mean + shift * (len(rows) / count)
        self.count = count

    def covariance(self) -> Tensor:
        """Shape ``(D, D)``, or its diagonal, shape ``(D,)``."""
        return self.scatter / self.count
