r"""Latent sites of a Pyro model as one unconstrained vector, and their potential.

Discrete sites are summed out. Pyro eliminates them one after the other. Where they are
a chain, as under ``pyro.markov``, with log-factors :math:`M_t` between neighbours, the
sum is a product of matrices,

.. math::
    \log \sum_{k_1 \dots k_T} \prod_t e^{M_t(k_t, k_{t+1})}
        = \log \, \mathbf{1}^\top e^{M_1} \cdots e^{M_{T-1}} \mathbf{1}          \tag{1}

which is associative: half of the products at once, then half of what is left, as Pyro's
``DiscreteHMM`` does. What is no chain is left to Pyro.

References:
    Särkkä & García-Fernández (2021), IEEE Trans. Automatic Control 66, 299-306.
"""

__all__ = ["ModelSites", "check_log_partitions", "find_sites"]

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from opt_einsum import shared_intermediates
from pyro.distributions.hmm import _sequential_logmatmulexp
from pyro.distributions.util import sum_rightmost
from pyro.infer.mcmc.util import TraceEinsumEvaluator, initialize_model
from pyro.ops.contract import contract_to_tensor
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_ebm.energies.base import require_precision
from pyro_ebm.energies.corrections import support_of, without_independent
from pyro_ebm.energies.normalization import require_normalized, unnormalized_part
from pyro_ebm.energies.pyro_model.full_data import (
    check_rows,
    whole_plates,
    with_missing_data,
)
from pyro_ebm.energies.pyro_model.runs import (
    Model,
    WithoutValidation,
    initial_value,
    retried,
    run_model,
    samples,
)
from pyro_ebm.energies.views.unconstrained import same_support


class ModelSites(NamedTuple):
    """The continuous latent sites, in the order in which the model samples them.

    Attributes:
        shapes: Shape of each site's value.
        flat_shapes: The same in unconstrained space.
        transforms: From each site's unconstrained to its constrained values.
        potential: Pyro's potential: a dict of unconstrained values to minus the log
            joint density, shape ``()``.
        max_plate_nesting: Dimensions that the plates of the model take.
        example: A vector of zeros like the unconstrained values, shape ``(D,)``.
    """

    shapes: dict[str, torch.Size]
    flat_shapes: dict[str, torch.Size]
    transforms: dict[str, Transform]
    potential: Callable[[dict[str, Tensor]], Tensor]
    max_plate_nesting: int
    example: Tensor

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Each site's part of ``u``: ``(*batch, D)`` to ``(*batch, *flat_shape)``."""
        parts = u.split([shape.numel() for shape in self.flat_shapes.values()], -1)
        return {
            name: part.reshape(u.shape[:-1] + shape)
            for (name, shape), part in zip(self.flat_shapes.items(), parts, strict=True)
        }

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the sites: ``(*batch, D)`` to ``(*batch, *site_shape)``."""
        return {n: self.transforms[n](part) for n, part in self.split(u).items()}

    def unconstrain(
        self, values: Mapping[str, Tensor], known: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Inverse of :meth:`constrain`.

        Args:
            values: Of each site.
            known: Unconstrained values of some sites, in place of the inverse.
        """
        parts = []
        for name, shape in self.shapes.items():
            if name not in values:
                raise ValueError(
                    f"values must hold every latent site, {list(self.shapes)}; "
                    f"{name!r} is missing."
                )
            value = torch.as_tensor(values[name])
            batch_dim = value.dim() - len(shape)
            if batch_dim < 0 or value.shape[batch_dim:] != shape:
                raise ValueError(
                    f"site {name!r} must have shape (*batch, *{tuple(shape)}), got "
                    f"{tuple(value.shape)}."
                )
            flat = known.get(name) if known else None
            if flat is None:
                flat = self.transforms[name].inv(value)
            size = self.flat_shapes[name].numel()
            parts.append(flat.reshape(value.shape[:batch_dim] + (size,)))
        batch_shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([p.expand(*batch_shape, p.shape[-1]) for p in parts], -1)

    def log_abs_det(self, u: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Log-volume of :meth:`constrain` at ``u``, shape ``(*batch,)``."""
        total = u.new_zeros(u.shape[:-1])
        for name, part in self.split(u).items():
            volume = self.transforms[name].log_abs_det_jacobian(part, values[name])
            total = total + sum_rightmost(volume, volume.dim() - total.dim())
        return total

    def energy(self, u: Tensor) -> Tensor:
        """Pyro's potential at one ``u`` of shape ``(D,)``, shape ``()``."""
        with poutine.block(), WithoutValidation():
            return self.potential(self.split(u))


def find_sites(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelSites:
    """Find the latent sites by a few runs of the model, and check them.

    Raises:
        ValueError: If there is no continuous latent site, the sites differ from run to
            run, or an observed value is nan or the same for all rows of a plate that is
            subsampled.
        NotImplementedError: If a discrete site cannot be enumerated, a plate is
            subsampled in a way that cannot be undone, or a support depends on others.
    """
    model = whole_plates(with_missing_data(model))
    first = run_model(model, args, kwargs)
    check_rows(first)
    for name, site in samples(first):
        _check_site(name, site)
    _check_same(first, run_model(model, args, kwargs))
    sites = _continuous(first)
    transforms = {n: biject_to(support_of(s["fn"])) for n, s in sites.items()}
    nesting = _max_plate_nesting(first)
    _, potential, _, enumerated = retried(
        lambda: initialize_model(
            model,
            args,
            kwargs,
            transforms={name: transform.inv for name, transform in transforms.items()},
            max_plate_nesting=nesting,
            init_strategy=initial_value,
            initial_params={},  # else Pyro would look for some, in 100 runs at most
        )
    )
    _check_supports(first, enumerated)
    maker: Any = potential.__self__
    maker.trace_prob_evaluator = _ChainEvaluator(maker.trace_prob_evaluator)
    values = {name: site["value"].detach() for name, site in sites.items()}
    flat = {name: transforms[name].inv(value) for name, value in values.items()}
    return ModelSites(
        {name: value.shape for name, value in values.items()},
        {name: value.shape for name, value in flat.items()},
        transforms,
        potential,
        nesting,
        torch.zeros_like(torch.cat([value.reshape(-1) for value in flat.values()])),
    )


def _check_site(name: str, site: Any) -> None:
    """Check that a site is continuous, observed, or can be enumerated.

    Raises:
        ValueError: If it is observed to be nan, or of half precision.
        NotImplementedError: If it cannot, or is in a plate that is subsampled.
    """
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise NotImplementedError(
                f"plate {frame.name!r} holds {frame.size} of {frame.full_size} rows, "
                "which were chosen before the model ran, and an energy is that of all "
                "the data. Build the plate inside of the model and without the "
                "argument subsample."
            )
    value = site["value"]
    require_precision(value, f"the value of site {name!r}")
    if site["is_observed"]:
        num_nan = _num_nan(site)
        if num_nan:
            raise ValueError(
                f"obs of site {name!r} must not contain nan, got "
                f"{num_nan} in {value.numel()} numbers. Drop them, say that they are "
                "missing by obs_mask, or fill them with any number of the support and "
                "mask them with poutine.mask."
            )
    elif site["fn"].support.is_discrete:
        if not site["fn"].has_enumerate_support:
            raise NotImplementedError(
                f"site {name!r} is discrete and cannot be enumerated "
                f"({type(site['fn']).__name__}), so it cannot be summed out. Observe "
                "it, replace it by a distribution with finite support, or marginalise "
                "it by hand."
            )


def _check_same(first: Trace, second: Trace) -> None:
    """Check that two runs have the same sites.

    Raises:
        ValueError: If they do not.
        NotImplementedError: If a support is not the same in both.
    """
    sites, others = dict(samples(first)), dict(samples(second))
    if list(sites) != list(others):
        only = sorted(set(sites) ^ set(others)) or list(sites)
        raise ValueError(
            f"model must have the same sites at each run; {only} are not in every run "
            "or in another order. Sample them always, and let the values decide by "
            "poutine.mask or torch.where."
        )
    for name, site in sites.items():
        shape, other = site["value"].shape, others[name]["value"].shape
        if shape != other:
            raise ValueError(
                f"site {name!r} must have the same shape at each run, got "
                f"{tuple(shape)} and {tuple(other)}. Sample the largest shape, and "
                "mask what is not used."
            )
    _check_supports(first, second)


def _check_supports(first: Trace, second: Trace) -> None:
    """Check that the latent sites have the same supports in two runs.

    Raises:
        NotImplementedError: If they do not.
    """
    for name, site in samples(first):
        other: Any = second.nodes[name]["fn"]
        if site["is_observed"] or site["fn"].support.is_discrete:
            continue
        if not same_support(support_of(site["fn"]), support_of(other)):
            raise NotImplementedError(
                f"the support of site {name!r} depends on other sites: "
                f"{site['fn'].support}, then {other.support}. Sample a "
                "variable on a fixed support and map it to where it should be: "
                "low + (high - low) * pyro.sample(name, dist.Beta(1.0, 1.0))."
            )


def _continuous(trace: Trace) -> dict[str, Any]:
    latent = {n: site for n, site in samples(trace) if not site["is_observed"]}
    sites = {n: s for n, s in latent.items() if not s["fn"].support.is_discrete}
    if not sites:
        raise ValueError(
            "model must have at least one continuous latent site; it has "
            + (f"only discrete ones, {list(latent)}." if latent else "none at all.")
            + " Leave out the obs of what is to be inferred."
        )
    return sites


def _max_plate_nesting(trace: Trace) -> int:
    dims = [
        frame.dim
        for _, site in samples(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims, default=0)


#: Sites in a chain from which on products are worth it.
_MIN_LENGTH = 4


class _ChainEvaluator(TraceEinsumEvaluator):
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


def _num_nan(site: Any) -> int:
    """How many numbers of an observed value are nan, and not hidden by a mask."""
    is_nan = site["value"].isnan()
    if isinstance(without_independent(site["fn"]), dist.MaskedDistribution):
        return 0
    if site["mask"] is not None:
        mask = torch.as_tensor(site["mask"], device=is_nan.device)
        is_nan = is_nan & mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
    return int(is_nan.sum())


def check_log_partitions(trace: Trace) -> None:
    """Check that the energies at the sites of a model know their log Z.

    A posterior can do without, an evidence cannot.

    Raises:
        ValueError: If one does not.
    """
    for name, site in samples(trace):
        part = unnormalized_part(site["fn"])
        if hasattr(part, "is_normalized"):  # masks and improper priors are allowed
            require_normalized(part, f"site {name!r}")
