r"""Sum out chains of discrete sites by matrix products, in a number of levels.

Pyro eliminates enumerated sites one after the other. Where they are a chain, as under
``pyro.markov``, with log-factors :math:`M_t` between neighbours, the sum is a product
of matrices,

.. math::
    \log \sum_{k_1 \dots k_T} \prod_t e^{M_t(k_t, k_{t+1})}
        = \log \, \mathbf{1}^\top e^{M_1} \cdots e^{M_{T-1}} \mathbf{1}          \tag{1}

which is associative: half of the products at once, then half of what is left, as Pyro's
``DiscreteHMM`` does. What is no chain is left to Pyro.

References:
    Särkkä & García-Fernández (2021), IEEE Trans. Automatic Control 66, 299-306.
"""

__all__ = ["ChainEvaluator"]

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from opt_einsum import shared_intermediates
from pyro.distributions.hmm import _sequential_logmatmulexp
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.poutine import Trace
from torch import Tensor

#: Sites in a chain from which on products are worth it.
_MIN_LENGTH = 4


class ChainEvaluator(TraceEinsumEvaluator):
    """Pyro's evaluator of a trace with enumerated sites, which does chains by (1).

    Args:
        other: The evaluator in whose place it stands.
    """

    def __init__(self, other: TraceEinsumEvaluator) -> None:
        vars(self).update(vars(other))

    def log_prob(self, model_trace: Trace) -> Any:
        """Log density of a trace, enumerated sites summed out: a tensor ``()``."""
        if not self.has_enumerable_sites:
            return super().log_prob(model_trace)
        factors = self._get_log_factors(model_trace)
        left = set(self._enum_dims)
        for ordinal, terms in factors.items():
            elsewhere = [ts for other, ts in factors.items() if other != ordinal]
            others = {s for ts in elsewhere for term in ts for s in _dims(term)}
            for chain in _chains(terms, left - others):
                terms[:] = [t for t in terms if all(t is not u for u in chain.terms)]
                terms.append(_summed(chain, "".join(sorted(ordinal))))
                left -= set(chain.symbols)
        with shared_intermediates() as cache:
            return contract_to_tensor(factors, left, cache=cache)


class _Chain(NamedTuple):
    """Symbols of a chain of sites, from one end to the other, and all their terms."""

    symbols: list[str]
    terms: list[Tensor]


def _dims(term: Tensor) -> str:
    """The symbols of a packed tensor's axes."""
    packed_term: Any = term
    dims: str = packed_term._pyro_dims
    return dims


def _chains(terms: list[Tensor], summed: set[str]) -> list[_Chain]:
    """Chains among the symbols that are to be summed out, all of one size."""
    touched: OrderedDict[str, list[Tensor]] = OrderedDict()
    near: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for term in terms:
        mine = [symbol for symbol in _dims(term) if symbol in summed]
        sizes.update(zip(_dims(term), term.shape, strict=True))
        for symbol in mine:
            touched.setdefault(symbol, []).append(term)
            near.setdefault(symbol, set()).update(s for s in mine if s != symbol)
    chains, seen = [], set[str]()
    for symbol in touched:
        if symbol in seen:
            continue
        component = _component(symbol, near)
        seen.update(component)
        ends = [s for s in component if len(near[s]) == 1]
        if len(component) < _MIN_LENGTH or len(ends) != 2:
            continue
        is_path = all(len(near[s]) <= 2 for s in component)
        if is_path and len({sizes[s] for s in component}) == 1:
            path = _path(ends[0], near)
            held = {id(t): t for s in path for t in touched[s]}
            chains.append(_Chain(path, list(held.values())))
    return chains


def _component(start: str, near: dict[str, set[str]]) -> list[str]:
    found, queue = {start: None}, [start]
    while queue:
        for other in sorted(near[queue.pop()]):
            if other not in found:
                found[other] = None
                queue.append(other)
    return list(found)


def _path(end: str, near: dict[str, set[str]]) -> list[str]:
    path, before = [end], ""
    while True:
        onward = near[path[-1]] - {before}
        if not onward:
            return path
        before = path[-1]
        path.append(onward.pop())


def _summed(chain: _Chain, plates: str) -> Tensor:
    """The sum (1), over the plates that a term has, as a packed tensor."""
    sizes = {
        symbol: size
        for term in chain.terms
        for symbol, size in zip(_dims(term), term.shape, strict=True)
    }
    plates = "".join(symbol for symbol in plates if symbol in sizes)
    place = {symbol: number for number, symbol in enumerate(chain.symbols)}
    steps: list[list[Tensor]] = [[] for _ in chain.symbols[1:]]
    for term in chain.terms:
        # A term of one site goes with the step from it; that of the last, to it.
        first = min(place[symbol] for symbol in _dims(term) if symbol in place)
        step = min(first, len(steps) - 1)
        dims = plates + chain.symbols[step] + chain.symbols[step + 1]
        steps[step].append(_aligned(term, dims))
    matrices = [sum(parts[1:], parts[0]) for parts in steps]
    shape = torch.Size(sizes[s] for s in plates + chain.symbols[0] + chain.symbols[1])
    stacked = torch.stack([matrix.expand(shape) for matrix in matrices], -3)
    value: Any = _sequential_logmatmulexp(stacked).logsumexp((-2, -1))  # (1)
    value._pyro_dims = plates
    result: Tensor = value
    return result


def _aligned(term: Tensor, dims: str) -> Tensor:
    """A packed tensor with an axis for each symbol, of size one where it has none."""
    own = _dims(term)
    order = [own.index(symbol) for symbol in dims if symbol in own]
    index = tuple(slice(None) if symbol in own else None for symbol in dims)
    return term.permute(order)[index]
