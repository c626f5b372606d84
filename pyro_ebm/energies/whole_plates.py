r"""Run a model that subsamples its plates so that it sees all of their rows.

A plate that subsamples :math:`B` of :math:`N` rows scales what is inside by
:math:`N / B`, an unbiased guess at the sum over all rows. The energy is that sum:

.. math::
    f(z) = -\log p(z) - \sum_{k=1}^{\lceil N / B \rceil} \sum_{i \in I_k}
        \log p(y_i \mid z)                                                \tag{1}

over parts :math:`I_k` of :math:`B` rows each, the last of those that are left.

Pyro fixes the number of rows in a plate before a handler hears of it, but leaves open
which they are. So the model is run once for each :math:`I_k`; what is outside of the
plate is sampled in the first of these runs and given to the others.
"""

__all__ = ["check_rows", "whole_plates"]

import itertools
import math
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_ebm.energies.model_runs import Model, samples

#: Most runs of a model in one.
_MAX_RUNS = 1000
#: Where a site says which it was before it got the name of its part.
_KEY = "_pyro_ebm_site"


def whole_plates(model: Model) -> Model:
    """A model with the density (1), in which no plate is subsampled.

    Sites in such a plate come once for each of its parts, as ``name[0]``, ``name[1]``;
    the others come once. With several such plates there is a run for each combination
    of their parts.

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


def check_rows(trace: Trace) -> None:
    """Check that other rows of a plate brought other data.

    Args:
        trace: Of a model that :func:`whole_plates` returned.

    Raises:
        ValueError: If a site has the same tensor for observation in every part.
    """
    sites: dict[str, list[Any]] = {}
    for _, site in samples(trace):
        is_counted = site["mask"] is None or bool(torch.as_tensor(site["mask"]).any())
        if site["is_observed"] and is_counted and _KEY in site["infer"]:
            sites.setdefault(site["infer"][_KEY], []).append(site)
    for name, parts in sites.items():
        values = [site["value"] for site in parts]
        if len({value.data_ptr() for value in values}) > 1 or not values[0].numel():
            continue
        first, *others = [site["fn"].log_prob(site["value"]) for site in parts]
        if others and all(map(first.equal, others)):
            raise ValueError(
                f"site {name!r} must observe the rows that its plate chooses, and it "
                "observes the same in all parts of the plate. Give the model all the "
                "data, and index them by what the plate returns: with pyro.plate(...) "
                "as rows: ... obs=data[rows]."
            )


class _Parts(Messenger):
    """Chooses the rows of each plate, and lets each site count once.

    Attributes:
        current: Number of the part of each plate in this run; 0 where not named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current: dict[str, int] = {}
        self._plates: dict[str, _Subsample] = {}
        self._used: dict[str, int] = {}  # plates with sites, and their parts
        self._values: dict[str, Tensor] = {}

    def others(self) -> list[dict[str, int]]:
        """The combinations of parts after the first, which was run."""
        number = math.prod(self._used.values())
        if number > _MAX_RUNS:
            raise NotImplementedError(
                f"the plates {list(self._used)} subsample so few rows that the model "
                f"would run {number:,} times to see all of them; {_MAX_RUNS:,} times "
                "is the limit. Give a larger subsample_size, or None for all rows."
            )
        runs = itertools.product(*map(range, self._used.values()))
        return [dict(zip(self._used, numbers, strict=True)) for numbers in runs][1:]

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self._choose_rows(msg)
            return
        frames = [f for f in msg["cond_indep_stack"] if f.name in self._plates]
        inside = {frame.name for frame in frames}
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
        for frame in frames:
            fn = self._plates[frame.name]
            self._used[frame.name] = math.ceil(fn.size / frame.size)
            msg["scale"] = msg["scale"] * frame.size / fn.size
            if msg["is_observed"]:  # discrete latent sites sum to one in any row
                self._mask_repeated(msg, frame)
        parts = ", ".join(str(self.current.get(frame.name, 0)) for frame in frames)
        msg["name"] = f"{name}[{parts}]"
        msg["infer"] = {**msg["infer"], _KEY: name}
        msg["cond_indep_stack"] = tuple(map(self._whole, msg["cond_indep_stack"]))

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
