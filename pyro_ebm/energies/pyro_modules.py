"""Parameters of an energy: names and copies of Pyro modules, leaves of a graph.

A ``PyroModule`` finds its parameters in Pyro's store by name, and one that is handed to
an energy, with no module of Pyro around it, has no name. Two of them would share one
``"w"``, and a copy (an average, or one in double precision) would take over that of the
original.
"""

__all__ = ["apart_from_store", "leaves_of", "name_pyro_modules"]

from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

from pyro.nn import PyroModule
from pyro.nn.module import _Context
from torch import Tensor, nn

#: Who has which name. What is gone has none, so that a name can come back.
_NAMED: "WeakValueDictionary[str, PyroModule]" = WeakValueDictionary()


def name_pyro_modules(module: nn.Module) -> None:
    """Give every ``PyroModule`` at the top of a module a name of its own.

    The first keeps the empty name, so that its parameter ``w`` is ``"w"`` in Pyro's
    store; the next is called after its class, ``"Linear_1"``, with ``"Linear_1.w"``.

    Args:
        module: An energy, or a part of one. Modules with a name keep it.

    Example:
        >>> first, second = PyroModule(), PyroModule()
        >>> for each in (first, second):
        ...     name_pyro_modules(each)
        >>> first._pyro_name != second._pyro_name
        True
    """
    for top in _tops(module):
        if top._pyro_name and _NAMED.get(top._pyro_name, top) is top:
            continue
        name, number = "", 0
        while _NAMED.get(name, top) is not top:
            number += 1
            name = f"{type(top).__name__}_{number}"
        _NAMED[name] = top
        if name:
            top._pyro_context.used = False  # a copy of a module that was
            top._pyro_set_supermodule(name, _Context())


def apart_from_store(module: Any) -> Any:
    """Separate a copy of an energy from Pyro's parameter store.

    Args:
        module: Is changed. A Pyro model with ``PyroSample`` sites needs its handlers,
            and stays as it is.

    Returns:
        The module.
    """
    for top in _tops(module):
        parts = [part for part in top.modules() if isinstance(part, PyroModule)]
        if not any(part._pyro_samples for part in parts):
            for part in parts:
                part._pyro_context = _NoContext()
    return module


class _NoContext(_Context):
    """A context that is never active: parameters are those of the module."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def _tops(module: nn.Module) -> Iterator[PyroModule]:
    """The outermost modules of Pyro."""
    if isinstance(module, PyroModule):
        yield module
        return
    for part in module.children():
        yield from _tops(part)


def leaves_of(value: Tensor, x: Tensor) -> list[Tensor]:
    """Leaf tensors that a value depends on, other than through ``x``."""
    seen: set[Any] = {x.grad_fn}
    found, stack = [], [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return found
