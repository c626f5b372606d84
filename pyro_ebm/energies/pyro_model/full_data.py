r"""Run a Pyro model on all its data: missing rows latent, and no plate subsampled.

**Missing data**, ``pyro.sample(name, fn, obs=y, obs_mask=mask)``. Pyro makes two sites
of it: ``name_observed`` counts where the mask is true, the latent ``name_unobserved``
where it is false. The latent site has a coordinate for every row, and those of observed
rows have no density at all: they wander, and there is no evidence.

Nothing depends on them. Here they count too, with the density that the missing rows
have: it integrates to one whatever the other sites are, so the posterior of what is
used stays as it is, and the evidence is that of the observed rows:

.. math::
    p(y_{obs}) = \int p(z)\, p(y_{obs} \mid z)\, p(y_{mis} \mid z)\,
    p(u_{obs} \mid z)\; dz\, dy_{mis}\, du_{obs}                            \tag{1}

Classes that are summed out then sum to one there, too.

**Plates that subsample**. One of :math:`B` of :math:`N` rows scales what is inside by
:math:`N / B`, an unbiased guess at the sum over all rows. The energy is that sum:

.. math::
    f(z) = -\log p(z) - \sum_{k=1}^{\lceil N / B \rceil} \sum_{i \in I_k}
        \log p(y_i \mid z)                                                \tag{2}

over parts :math:`I_k` of :math:`B` rows each, the last of those that are left. Pyro
fixes the number of rows in a plate before a handler hears of it, but leaves open which
they are. So the model is run once for each :math:`I_k`; what is outside of the plate is
sampled in the first of these runs and given to the others.
"""

__all__ = ["check_rows", "has_whole_plates", "whole_plates", "with_missing_data"]

import itertools
import math
import warnings
from collections import Counter
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.energies.pyro_model.runs import Model, samples

_OBSERVED, _UNOBSERVED = "_observed", "_unobserved"


def with_missing_data(model: Model) -> Model:
    """A model with the density (1), in which observed rows may also hold ``nan``.

    Args:
        model: A Pyro model. Where it has no missing data, it stays as it is.
    """
    wrapped: Model = _MissingData()(model)
    return wrapped


class _MissingData(Messenger):
    """Takes the mask off the latent half of a site with missing data."""

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[str, Any] = {}  # of the observed halves, by name

    def __enter__(self) -> Any:
        self._masks.clear()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        name, mask = msg["name"], msg["mask"]
        if mask is None:
            return
        if msg["is_observed"] and name.endswith(_OBSERVED):
            self._masks[name.removesuffix(_OBSERVED)] = mask
            msg["value"] = _without_nan(msg["value"], mask, msg["fn"].event_dim)
        elif name.endswith(_UNOBSERVED):
            rest = self._masks.get(name.removesuffix(_UNOBSERVED))
            if rest is not None:  # what is left is the mask around both
                msg["mask"] = mask | rest


def _without_nan(value: Tensor, mask: Any, event_dim: int) -> Tensor:
    """Another row in place of what is nan and hidden, which has no gradient."""
    if not value.is_floating_point():
        return value
    rows = value.isnan().reshape(value.shape[: value.dim() - event_dim] + (-1,)).any(-1)
    hidden = rows & ~torch.as_tensor(mask, device=value.device)
    if not hidden.any() or rows.all():
        return value
    filler = value[~rows][0]
    return torch.where(hidden.reshape(hidden.shape + (1,) * event_dim), filler, value)


#: Most runs of a model in one.
_MAX_RUNS = 1000
#: Where a site says which it was before it got the name of its part.
_KEY = "_pyro_ebm_site"


def whole_plates(model: Model) -> Model:
    """A model with the density (2), in which no plate is subsampled.

    Sites in such a plate come once for each of its parts, as ``name[0]``, ``name[1]``;
    the others come once. With several such plates there is a run for each combination
    of parts of those that a site is in.

    Args:
        model: A Pyro model.

    Raises:
        NotImplementedError: When it is run, if a continuous latent site is in a plate
            that is subsampled, or there are too many parts.
    """

    def whole(*args: Any, **kwargs: Any) -> Any:
        parts = _Parts()
        with parts:
            result = model(*args, **kwargs)
        for numbers in parts.others():
            parts.current = numbers
            with parts:
                model(*args, **kwargs)
        return result

    return whole


def has_whole_plates(trace: Trace) -> bool:
    """Whether no plate of a run subsamples."""
    plates = [
        site["fn"]
        for site in trace.nodes.values()
        if site["type"] == "sample" and isinstance(site["fn"], _Subsample)
    ]
    return all((p.subsample_size or p.size) == p.size for p in plates)


def check_rows(trace: Trace) -> None:
    """Check that each part of a subsampled plate observes its own rows.

    Args:
        trace: Of a model that :func:`whole_plates` returned.

    Raises:
        ValueError: If a site has the same tensor for observation in every part.

    Warns:
        UnreliableWarning: If it has the same numbers, which may be chance.
    """
    sites: dict[str, list[Any]] = {}
    for _, site in samples(trace):
        is_counted = site["mask"] is None or bool(torch.as_tensor(site["mask"]).any())
        if site["is_observed"] and is_counted and _KEY in site["infer"]:
            sites.setdefault(site["infer"][_KEY], []).append(site)
    for name, parts in sites.items():
        values = [site["value"] for site in parts]
        is_one_tensor = len({value.data_ptr() for value in values}) == 1
        if not values[0].numel() or not (is_one_tensor or _is_repeated(values)):
            continue
        first, *others = [site["fn"].log_prob(site["value"]) for site in parts]
        if others and all(map(first.equal, others)):
            message = (
                f"site {name!r} must observe the rows that its plate chooses, and it "
                "observes the same in all parts of the plate. Give the model all the "
                "data, and index them by what the plate returns: with pyro.plate(...) "
                "as rows: ... obs=data[rows]."
            )
            if is_one_tensor:
                raise ValueError(message)
            warnings.warn(message, UnreliableWarning, stacklevel=2)


def _is_repeated(values: list[Tensor]) -> bool:
    """Whether the parts have the same rows, of which not all are one number."""
    first, *others = values
    is_constant = bool((first == first.flatten()[0]).all())
    return not is_constant and all(map(first.equal, others))


class _Parts(Messenger):
    """Chooses the rows of each plate, and lets each site count once.

    Attributes:
        current: Number of the part of each plate in this run; 0 where not named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, int] = {}
        self._plates: dict[str, _Subsample] = {}
        self._used: dict[tuple[str, ...], None] = {}  # plates around a site, in order
        self._renamed: dict[str, str] = {}
        self._values: dict[str, Tensor] = {}

    def others(self) -> list[dict[str, int]]:
        """The combinations of parts after the first, which was run."""
        parts = {
            name: math.ceil(plate.size / (plate.subsample_size or plate.size))
            for name, plate in self._plates.items()
        }
        number = sum(math.prod(parts[name] for name in names) for names in self._used)
        if number > _MAX_RUNS:
            raise NotImplementedError(
                f"the plates {list(parts)} subsample so few rows that the model would "
                f"run {number:,} times to see all of them; {_MAX_RUNS:,} times is the "
                "limit. Give a larger subsample_size, or None for all rows."
            )
        runs = {  # by the parts other than 0, as a run may serve several sites
            frozenset(
                (name, part) for name, part in zip(names, run, strict=True) if part
            ): None
            for names in self._used
            for run in itertools.product(*(range(parts[name]) for name in names))
        }
        return [dict(run) for run in runs if run]

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self._choose_rows(msg)
            return
        frames = [f for f in msg["cond_indep_stack"] if f.name in self._plates]
        inside = {frame.name for frame in frames}
        self._rename_scope(msg["infer"])
        if frames:
            self._name_part(msg, frames)
        if any(part for name, part in self.current.items() if name not in inside):
            # It has counted already, in a run that differs in other plates only.
            msg["stop"] = True
            if msg["value"] is None:
                msg["value"], msg["done"] = self._values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample):
            self._values[msg["name"]] = msg["value"]

    def _choose_rows(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        is_whole = fn.subsample_size is None or fn.subsample_size >= fn.size
        if is_whole or msg["value"] is not None:  # or its rows were given
            msg["stop"] = any(self.current.values())  # known since the first run
            return
        self._plates[name] = fn
        first = self.current.get(name, 0) * fn.subsample_size
        first = min(first, fn.size - fn.subsample_size)  # the last may overlap
        rows = torch.arange(first, first + fn.subsample_size, device=fn.device)
        msg["value"], msg["stop"] = rows, True  # no site of the whole model

    def _name_part(self, msg: Any, frames: list[CondIndepStackFrame]) -> None:
        """Make a site one of this part of its plates."""
        name = msg["name"]
        if not msg["is_observed"] and not msg["fn"].support.is_discrete:
            raise NotImplementedError(
                f"site {name!r} is latent in the plate {frames[0].name!r}, which "
                f"subsamples {frames[0].size} of {frames[0].full_size} rows, so most "
                "of its values would have no place. Build the plate without "
                "subsample_size: let the model take the size as an argument, and give "
                "None here."
            )
        self._used[tuple(frame.name for frame in frames)] = None
        for frame in frames:
            fn = self._plates[frame.name]
            msg["scale"] = msg["scale"] * frame.size / fn.size
            if msg["is_observed"]:  # discrete latent sites sum to one in any row
                self._mask_repeated(msg, frame)
        parts = ", ".join(str(self.current.get(frame.name, 0)) for frame in frames)
        msg["name"] = self._renamed[name] = f"{name}[{parts}]"
        msg["infer"] = {**msg["infer"], _KEY: name}
        msg["cond_indep_stack"] = tuple(map(self._whole, msg["cond_indep_stack"]))

    def _rename_scope(self, infer: dict[str, Any]) -> None:
        """Tell ``pyro.markov``'s bookkeeping, which knows sites by their old names."""
        scope = infer.get("_markov_scope")
        if scope is not None:
            new = {self._renamed.get(name, name): n for name, n in scope.items()}
            infer["_markov_scope"] = Counter(new)

    def _mask_repeated(self, msg: Any, frame: CondIndepStackFrame) -> None:
        """Hide the rows of the last part that the part before it has too."""
        size = self._plates[frame.name].size
        repeated = (self.current.get(frame.name, 0) + 1) * frame.size - size
        if repeated <= 0:
            return
        mask = torch.arange(frame.size, device=self._plates[frame.name].device)
        mask = mask >= repeated
        # Rows that come one after another are counted by their plate, from 1.
        mask = mask[frame.counter - 1] if frame.dim is None else mask
        mask = mask.reshape(mask.shape + (1,) * (-(frame.dim or -1) - 1))
        msg["mask"] = mask if msg["mask"] is None else mask & msg["mask"]

    def _whole(self, frame: CondIndepStackFrame) -> CondIndepStackFrame:
        if frame.name not in self._plates:
            return frame
        name = f"{frame.name}[{self.current.get(frame.name, 0)}]"
        return frame._replace(name=name, full_size=frame.size)
