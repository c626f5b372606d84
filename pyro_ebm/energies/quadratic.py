r"""The quadratic energy, whose distribution is the Gaussian.

.. math::
    f(x)   &= \tfrac12 (x - m)^\top A\, (x - m), \qquad A = L L^\top      \tag{1} \\
    \log Z &= \tfrac d2 \log 2\pi - \tfrac12 \log\det A                   \tag{2}
"""

__all__ = ["QuadraticEnergy"]

import math
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from pyro_ebm.energies.base import (
    ClosedForm,
    Energy,
    live_or_parameter,
    require_precision,
)
from pyro_ebm.energies.graphs.recording import is_variable


@final
class QuadraticEnergy(Energy):
    r"""Quadratic energy (1) over vectors, with gradient and :math:`\log Z` known.

    The Cholesky factor of the precision is the parameter, its diagonal on the log
    scale, so that any optimiser step leaves the precision positive definite. Tensors
    that carry a graph (latent variables, ``pyro.param``, outputs of a network) stay
    live, and a ``nn.Parameter`` is shared.

    Args:
        loc: The mean :math:`m`, shape ``(*batch, D)``.
        precision: The matrix :math:`A`, shape ``(*batch, D, D)``; default: the
            identity. The batch shapes are broadcast.

    Raises:
        ValueError: If ``precision`` is not a positive-definite matrix of ``loc``'s
            size.

    Example:
        >>> f = QuadraticEnergy(torch.zeros(2), torch.eye(2) * 4)
        >>> f(torch.ones(2)).item()
        4.0
        >>> round(f.closed_form().log_partition.item(), 4)
        0.4516
    """

    loc: Tensor
    given_precision: Tensor
    log_diagonal: Tensor
    lower: Tensor

    def __init__(self, loc: Tensor, precision: Tensor | None = None) -> None:
        if loc.dim() < 1:
            raise ValueError(
                f"loc must have shape (*batch, D), got {tuple(loc.shape)}. A number is "
                "a vector of one: loc[None]."
            )
        require_precision(loc, "loc")
        dim = loc.shape[-1]
        if precision is None:
            precision = torch.eye(dim, dtype=loc.dtype, device=loc.device)
        try:
            shapes = loc.shape[:-1], precision.shape[:-2]
            batch_shape = broadcast_shape(*shapes)
        except ValueError:
            batch_shape = None
        if precision.shape[-2:] != (dim, dim) or batch_shape is None:
            raise ValueError(
                f"precision must have shape (*batch, {dim}, {dim}) to match loc of "
                f"shape {tuple(loc.shape)}, got {tuple(precision.shape)}."
            )
        super().__init__((dim,), None, batch_shape)
        live_or_parameter(self, "loc", loc)
        if is_variable(precision):  # no value to look at
            live_or_parameter(self, "given_precision", precision)
            return
        factor, info = torch.linalg.cholesky_ex(precision.detach())
        if info.any() or not torch.allclose(precision, precision.mT):
            raise ValueError(
                "precision must be symmetric positive definite; its Cholesky "
                f"factorisation fails or it differs from its transpose: {precision}."
            )
        if precision.requires_grad:
            live_or_parameter(self, "given_precision", precision)
        else:
            diagonal = factor.diagonal(dim1=-2, dim2=-1)
            live_or_parameter(self, "log_diagonal", diagonal.log())
            live_or_parameter(self, "lower", factor.tril(-1))

    @property
    def scale_tril_of_precision(self) -> Tensor:
        """Cholesky factor :math:`L` of the precision, shape ``(*batch, D, D)``."""
        if hasattr(self, "given_precision"):
            return torch.linalg.cholesky(self.given_precision)
        return self.lower.tril(-1) + self.log_diagonal.exp().diag_embed()

    @property
    def precision(self) -> Tensor:
        """The matrix :math:`A`, shape ``(*batch, D, D)``."""
        factor = self.scale_tril_of_precision
        return factor @ factor.mT

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate (1) at ``x`` of shape ``(*sample, *batch, D)``."""
        whitened = _row_times(x - self.loc, self.scale_tril_of_precision)
        return whitened.square().sum(-1) / 2  # (1)

    @torch.no_grad()
    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient ``A (x - m)``, without autograd."""
        self.batch_shape_of(x)
        residual = x - self.loc
        grad = _row_times(residual, self.precision)
        return (residual * grad).sum(-1) / 2, grad

    def closed_form(self) -> ClosedForm:
        r"""The Gaussian with :math:`\log Z` of (2). Exactness: *exact*."""
        pivots = self.scale_tril_of_precision.diagonal(dim1=-2, dim2=-1)
        half_dim = self.event_shape.numel() / 2
        log_partition = half_dim * math.log(2 * math.pi) - pivots.log().sum(-1)  # (2)
        gaussian = dist.MultivariateNormal(
            self.loc, precision_matrix=self.precision, validate_args=False
        )
        return ClosedForm(log_partition.expand(self.batch_shape), gaussian)


def _row_times(row: Tensor, matrix: Tensor) -> Tensor:
    """The product of row vectors and a matrix, or a matrix each."""
    if matrix.dim() == 2:
        return row @ matrix
    return (row.unsqueeze(-2) @ matrix).squeeze(-2)
