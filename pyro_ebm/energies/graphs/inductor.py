"""Functions of tensors, traced to a graph of operators and compiled by inductor.

A graph has no Python in it: a call of it is one call of machine code, where eager torch
pays for every operator and for autograd. ``torch.compile`` would find the same graph,
but checks its guards at each call, which takes as long as a small energy; here only the
layouts of the inputs are compared.
"""

__all__ = ["CompiledFunction"]

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from pyro import validation_enabled
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.core.errors import CompilationWarning
from pyro_ebm.energies.graphs.products import PRODUCTS

_Outputs: TypeAlias = tuple[Tensor, ...]
_Function: TypeAlias = Callable[..., _Outputs]

#: Layouts of the inputs for which a compiled function is kept.
_MAX_LAYOUTS = 16


class CompiledFunction:
    """A function of tensors, compiled for each layout of its inputs.

    The first call with a layout runs eagerly, as it may be the last. The second
    compiles, in a second or more. What cannot be compiled, or gives other numbers then,
    runs eagerly for good, and a :class:`~pyro_ebm.core.errors.CompilationWarning` says
    why.

    Args:
        function: Maps tensors to a tuple of tensors, by torch operators.
        module: Whose parameters and buffers the function reads, at each call.
            Everything else is as it was when it was compiled, but tensors may be
            written into.
        options: Of inductor.
    """

    def __init__(
        self,
        function: _Function,
        module: nn.Module,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.function = function
        self.module = module
        self.options = options
        self._live: list[tuple[dict[str, Any], str]] | None = None
        # None for a layout that was seen once.
        self._functions: OrderedDict[Any, _Function | None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without machine code, which can be neither copied nor pickled."""
        return {**vars(self), "_live": None, "_functions": OrderedDict()}

    def __call__(self, *args: Tensor) -> _Outputs:
        """Evaluate the function at ``args``, without gradient."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(*args)
        inputs = (*self._tensors(), *[argument.contiguous() for argument in args])
        # The only check of shapes: a layout that is known has once run eagerly.
        key = (self.module.training, *map(_layout, inputs))
        compiled = self._functions.get(key)
        if compiled is not None:
            self._functions.move_to_end(key)
            return compiled(*inputs)
        wanted = self.function(*args)
        if key in self._functions:
            num_tensors = len(inputs) - len(args)
            self._functions[key] = self._compile(inputs, num_tensors, wanted)
        else:
            self._functions[key] = None
        if len(self._functions) > _MAX_LAYOUTS:
            self._functions.popitem(last=False)
        return wanted

    def _tensors(self) -> list[Tensor]:
        """The parameters and buffers as they are now."""
        if self._live is None:
            # By their dicts, as walking a module takes longer than a small energy.
            found = {
                id(tensor): (tensors, name)
                for module in self.module.modules()
                for tensors in (module._parameters, module._buffers)
                for name, tensor in tensors.items()
                if tensor is not None
            }
            self._live = list(found.values())
        return [tensors[name] for tensors, name in self._live]

    def _compile(
        self, inputs: _Outputs, num_tensors: int, wanted: _Outputs
    ) -> _Function:
        try:
            with warnings.catch_warnings(), validation_enabled(is_validate=False):
                warnings.simplefilter("ignore")  # torch's own, of no use to the caller
                graph, constants = self._trace(inputs, num_tensors)
                # Imported by this line only: that takes as long as torch itself.
                compiled: Any = torch._inductor.compile(
                    graph, [*constants, *inputs], options=self.options
                )
                got = compiled(*constants, *inputs)
            if not all(map(_agree, got, wanted)):
                raise RuntimeError("the graph gives other numbers than the energy")
        except Exception as error:  # compilers fail in many ways
            warnings.warn(_message(error), CompilationWarning, stacklevel=2)
            return lambda *inputs: self.function(*inputs[num_tensors:])
        return lambda *inputs: compiled(*constants, *inputs)

    def _trace(
        self, inputs: _Outputs, num_tensors: int
    ) -> tuple[fx.GraphModule, list[Tensor]]:
        """The graph, and the tensors that it takes before its inputs.

        They are those that are reached in other ways than as parameters or buffers.
        """
        # At other points than the caller's: a number that is read out of them and so
        # becomes part of the graph is then found out by the caller's results.
        elsewhere = [0.9 * argument + 0.123 for argument in inputs[num_tensors:]]
        graph = make_fx(
            # Parameters are known to the tracer by identity, so they need no passing.
            lambda *inputs: self.function(*inputs[num_tensors:]),
            decomposition_table=PRODUCTS,
        )(*inputs[:num_tensors], *elsewhere)
        for node in graph.graph.nodes:
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise RuntimeError(f"it draws random numbers by {node.target}")
        return graph, _lift_constants(graph)


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds its first inputs, and return them."""
    first, *others = graph.graph.nodes
    lifted: dict[str, fx.Node] = {}
    for node in others:
        if node.op == "get_attr":
            name = node.target
            if name not in lifted:
                with graph.graph.inserting_before(first):
                    lifted[name] = graph.graph.placeholder(name)
            node.replace_all_uses_with(lifted[name])
            graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name) for name in lifted]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results are equal up to rounding, and finite in the same places."""
    is_finite = second.isfinite()
    if first.shape != second.shape or not first.isfinite().equal(is_finite):
        return False
    first, second = first[is_finite], second[is_finite]
    tolerance = torch.finfo(second.dtype).eps ** 0.5
    scale = second.abs().max() if second.numel() else 0.0
    return bool(((first - second).abs() <= tolerance * scale).all())


def _message(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"the energy could not be compiled ({type(error).__name__}: {reason}), so it "
        "runs eagerly: right, but slower. See whether its Python code branches on "
        "values, whether a C++ compiler is installed, and, where a compiler was once "
        "interrupted, delete its cache, the directory TORCHINDUCTOR_CACHE_DIR or "
        "torchinductor_<user> among the temporary files."
    )
