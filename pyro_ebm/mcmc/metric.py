r"""The scale matrix :math:`S` of a preconditioned kernel.

Such a kernel moves in whitened coordinates :math:`z = S^{-1} x`; :math:`S` is the
identity, a diagonal (``scale``, in the shape of the event) or a dense matrix
(``scale_tril``, for vectors). It is best where :math:`S S^\top` is near the covariance.
"""

__all__ = ["check_scales", "require_one_scale", "times_scale", "times_transposed"]

from torch import Tensor

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
