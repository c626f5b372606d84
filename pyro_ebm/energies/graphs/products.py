"""Matrix products in the form that a compiler makes most of.

* Small ones become sums, which fuse with what is around them.
* Onto few columns the second factor is stored transposed: five times faster in MKL.
* Large ones in single precision go to oneDNN on a CPU: as fast as MKL on Intel's
  processors, and twice as fast on others.

The other products stay as they are.
"""

__all__ = ["PRODUCTS"]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: A product is small up to this number of rows and columns of its second factor,
_SMALL = 16
#: narrow up to this number of columns,
_NARROW = 4
#: and large from this number of multiplications on.
_LARGE = 2**22

# Inductor takes only constant weights to oneDNN; through an operator of our own they
# may be learned.
_library = torch.library.Library("pyro_ebm", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight) -> Tensor")


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _linear_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear_shape, "Meta")


def _mm(first: Tensor, second: Tensor) -> Tensor:
    num_rows, num_columns = second.shape
    if max(num_rows, num_columns) <= _SMALL:
        if not second.is_contiguous():
            # As a sum it is computed once; as a view it would be gathered each time.
            second = (second[:, :, None] * torch.eye(num_columns).to(second)).sum(1)
        return (first[:, :, None] * second).sum(1)
    if num_columns <= _NARROW and not second.mT.is_contiguous():
        transposed = second.mT.clone(memory_format=torch.contiguous_format)
        return aten.mm.default(first, transposed.mT)
    if _is_for_onednn(first) and first.numel() * num_columns >= _LARGE:
        linear: Tensor = torch.ops.pyro_ebm.linear(first, second.mT.contiguous())
        return linear
    return NotImplemented


def _addmm(
    bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = _mm(first, second) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else product + bias


def _is_for_onednn(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return on_cpu and x.dtype is torch.float32


#: An operator, and what ``make_fx`` traces instead, unless NotImplemented.
PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
}
