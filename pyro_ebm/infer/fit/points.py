"""Data as people have them, as tensors of the model's dtype, and batches of them."""

__all__ = ["Points", "as_points"]

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_ebm.bases.conditional import as_mixture, conditional_draws
from pyro_ebm.bases.rows import repetitions
from pyro_ebm.core.spaces import MixedSupport
from pyro_ebm.core.validation import as_tensor
from pyro_ebm.distributions import EnergyModel
from pyro_ebm.energies.views.unconstrained import is_unconstrained
from pyro_ebm.infer.fit.missing import Candidates

_LOG = logging.getLogger(__name__)
#: Rows of a stream that are kept, for the base and for the training curve.
_KEPT = 10_000
#: Steps between neighbouring numbers that a standard deviation must have, and that, by
#: the size of the numbers, which is rounding alone.
_TOLD_APART, _ROUNDING = 4.0, 1e-12
#: Steps after which the candidates for missing entries are weighed again.
_WEIGH_EVERY = 50


class Points(NamedTuple):
    """Data to learn from.

    Attributes:
        rows: All of them, or the first of a stream; shape ``(N, *event)``.
        loader: Where the batches come from, if they are a stream.
        weights: Of the rows, shape ``(N,)``; ``None`` where all count the same.
        missing: Which entries are missing, shape ``(N, D)``, or ``None``.
        candidates: For these, once there is a base.
    """

    rows: Tensor
    loader: Any = None
    weights: Tensor | None = None
    missing: Tensor | None = None
    candidates: Candidates | None = None

    def batches(self, batch_size: int, model: EnergyModel) -> Iterator[Tensor]:
        """Batches without end, shape ``(B, *event)``; of a stream as it gives them.

        Args:
            batch_size: Of rows that are drawn without replacement within an epoch, in
                which each comes as often as its weight says; missing entries are drawn
                anew each time.
            model: What is fitted to them.
        """
        if self.loader is not None:
            while True:
                for batch in self.loader:
                    yield _of_batch(batch, model)
        count = 0
        while True:
            order = self._epoch()
            size = min(batch_size, len(order))
            whole = len(order) // size * size
            for index in order[:whole].split(size):
                rows = self.rows.index_select(0, index)  # three times as fast
                if self.candidates is not None:
                    if count % _WEIGH_EVERY == 0:
                        self.candidates.weigh(model.energy)
                    rows = self.candidates.fill(rows, index)
                    count += 1
                yield rows

    def _epoch(self) -> Tensor:
        """Indices of rows in a random order."""
        if self.weights is None:
            return torch.randperm(len(self.rows), device=self.rows.device)
        index = repetitions(self.weights, float(torch.rand(())))
        return index[torch.randperm(len(index), device=index.device)]

    def counted(self) -> Tensor:
        """The rows, each as often as its weight says."""
        if self.weights is None:
            return self.rows
        return self.rows[repetitions(self.weights)]

    def some(self, number: int) -> Tensor:
        """Rows that stand for all of them, each as often as its weight says."""
        return self.rows[self._epoch()[:number]]

    def at(self, index: Tensor) -> "Points":
        """Some of the rows, with their weights."""
        index = index.to(self.rows.device)
        weights = None if self.weights is None else self.weights[index]
        missing = None if self.missing is None else self.missing[index]
        return Points(self.rows[index], self.loader, weights, missing)

    def filled_by(self, base: Any) -> "Points":
        """With missing entries drawn from the conditional of a base."""
        if self.missing is None or not self.missing.any():
            return self
        mixture = as_mixture(base)
        return self._replace(
            rows=conditional_draws(mixture, self.rows, self.missing, 1)[0]
        )

    def with_candidates(self, model: EnergyModel) -> "Points":
        """With candidates for missing entries, drawn from the base of a model."""
        if self.missing is None or not self.missing.any():
            return self
        found = Candidates(model.base, model.energy, self.rows, self.missing)
        return self._replace(candidates=found)


def as_points(
    name: str,
    data: Any,
    model: EnergyModel,
    weights: Any = None,
    *,
    may_miss: bool = False,
) -> Points:
    """Data as tensors, checked.

    Args:
        name: Of the argument.
        data: A tensor, an array, a table of pandas, a ``Dataset``, or a ``DataLoader``,
            whose batches may be lists with the points first.
        model: What is to be fitted to them; numbers of another type are converted to
            its dtype, which a line of the log says.
        weights: Of the rows, ``(N,)``.
        may_miss: Whether ``nan`` is an entry that is missing. Rows of nothing else are
            dropped, which a line of the log says.

    Raises:
        TypeError: If it is none of these.
        ValueError: If there are no rows, or they do not fit the model, or their
            weights do not fit them.
    """
    if isinstance(data, DataLoader):
        if weights is not None:
            raise ValueError(
                "weights must be left out with a DataLoader, whose rows are not known "
                "beforehand: give it torch.utils.data.WeightedRandomSampler(weights)."
            )
        rows = _first_rows(name, data, model)
        _require_points(name, rows, model)
        return Points(rows, data)
    if isinstance(data, Dataset):
        if isinstance(data, IterableDataset):
            raise TypeError(
                f"{name} is an IterableDataset, which has no batches: give "
                "torch.utils.data.DataLoader(dataset, batch_size=256)."
            )
        items = [data[index] for index in range(len(data))]  # type: ignore[arg-type]
        data = torch.stack([_first(item) for item in items])
    rows = _as_tensor(name, data, model)
    if weights is not None:
        weights = _require_weights(weights, len(rows)).to(rows.device)
    points = Points(rows, None, weights)
    if may_miss and rows.dim() and bool(rows.isnan().any()):
        points = _incomplete(name, points, model)
    filled = points.rows
    if points.missing is not None:
        support, inside = model.energy.support, torch.zeros_like(filled[0])
        if isinstance(support, MixedSupport):
            inside = support.bijection()(support.two_points(filled))[0]
        filled = filled.where(~points.missing, inside)
    _require_points(name, filled, model)
    return points


def _incomplete(name: str, points: Points, model: EnergyModel) -> Points:
    """Rows with their missing entries marked, without those that have no others."""
    rows, missing = points.rows, points.rows.isnan()
    event = model.energy.event_shape
    support = model.energy.support
    is_mixed = isinstance(support, MixedSupport)
    is_vector = is_mixed or (len(event) == 1 and is_unconstrained(support))
    if not is_vector or rows.shape[1:] != event:
        _require_points(name, rows, model)  # which says what else is wrong
    empty = missing.all(0)
    if bool(empty.any()):
        raise ValueError(
            f"{name} has no entry at all in column(s) "
            f"{empty.nonzero().flatten().tolist()}. Leave them out."
        )
    nothing = missing.all(1)
    if bool(nothing.any()):
        _LOG.warning(
            "%s: %d rows without any entry are dropped", name, int(nothing.sum())
        )
    points = points._replace(missing=missing).at((~nothing).nonzero()[:, 0])
    _LOG.info("%s: %d entries of %d rows are missing", name, missing.sum(), len(rows))
    return points


def _first_rows(name: str, loader: Any, model: EnergyModel) -> Tensor:
    kept: list[Tensor] = []
    for batch in loader:
        kept.append(_of_batch(batch, model))
        if sum(map(len, kept)) >= _KEPT:
            break
    if not kept:
        raise ValueError(f"{name} must have batches, and the DataLoader has none.")
    return torch.cat(kept)[:_KEPT]


def _of_batch(batch: Any, model: EnergyModel) -> Tensor:
    return _as_tensor("a batch of the data", _first(batch), model)


def _first(item: Any) -> Any:
    """The points of an item that may come with labels."""
    return item[0] if isinstance(item, list | tuple) else item


def _as_tensor(name: str, data: Any, model: EnergyModel) -> Tensor:
    data = as_tensor(name, data)
    options = model.energy.tensor_options()
    if data.dtype != options["dtype"] and not data.is_complex():
        _LOG.info("%s: converted from %s to %s", name, data.dtype, options["dtype"])
        converted = data.to(options["dtype"])
        _require_told_apart(name, data, converted)
        data = converted
    return data.to(options["device"])


def _require_told_apart(name: str, data: Tensor, converted: Tensor) -> None:
    """Check that rows are told apart by numbers of the model's type, too.

    Raises:
        ValueError: If a column varies by less than neighbouring numbers differ by.
    """
    if data.dim() == 0 or not len(data) or not converted.is_floating_point():
        return
    x = data.reshape(len(data), -1).double()
    mean, largest = x.nanmean(0), x.abs().nan_to_num(0.0).amax(0)
    spread = (x - mean).square().nanmean(0).sqrt()
    step = torch.finfo(converted.dtype).eps * largest
    is_lost = (spread < _TOLD_APART * step) & (spread > _ROUNDING * largest)
    if is_lost.any():
        column = int(is_lost.nonzero()[0])
        raise ValueError(
            f"{name} must vary by more than {converted.dtype} tells apart; column "
            f"{column} has a standard deviation of {spread[column]:.3g} at "
            f"{mean[column]:.6g}, where numbers are {step[column]:.2g} apart. Subtract "
            "each column's mean, or learn in float64: EnergyModel(energy.double())."
        )


def _require_points(name: str, points: Tensor, energy_model: EnergyModel) -> None:
    """Check data.

    Args:
        name: Of the argument.
        points: What was given.
        energy_model: What is to be fitted to them.

    Raises:
        TypeError: If they are no tensor.
        ValueError: If they have another dtype or shape, are not finite, or outside of
            the support.
    """
    event_shape = energy_model.energy.event_shape
    dtype = energy_model.energy.tensor_options()["dtype"]
    if not isinstance(points, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(points).__name__}. Convert it: "
            f"torch.as_tensor({name}, dtype={dtype})."
        )
    if points.dtype != dtype:
        raise ValueError(
            f"{name} must have the dtype {dtype} of the energy, got {points.dtype}. "
            f"Convert it: {name}.to({dtype}); or the model, by energy_model.to(dtype)."
        )
    if points.dim() != len(event_shape) + 1 or points.shape[1:] != event_shape:
        raise ValueError(
            f"{name} must have shape (N, *event), event_shape {tuple(event_shape)}, "
            f"got {tuple(points.shape)}."
        )
    if len(points) < 2:
        raise ValueError(
            f"{name} must hold at least two points, got {len(points)}: nothing can be "
            "learned from fewer."
        )
    if not points.isfinite().all():
        raise ValueError(
            f"{name} must hold finite numbers; got {len(points)} points with "
            f"{int((~points.isfinite()).sum())} nan or infinite numbers. Drop those "
            "rows. Where fit chooses the estimator, and the energy is one of vectors "
            "of real numbers, or with categorical columns, nan counts as missing."
        )
    inside = energy_model.energy.support.check(points)
    if not inside.all():
        raise ValueError(
            f"{name} must lie in the support {energy_model.energy.support}; "
            f"{int((~inside).sum())} of {len(points)} points do not. Transform the "
            "data, or give the energy their support."
        )


def _require_weights(weights: Any, number: int) -> Tensor:
    """Check the weights of rows.

    Args:
        weights: What was given.
        number: Of rows.

    Returns:
        Shape ``(number,)``, double.

    Raises:
        ValueError: If there is not one for each row, or one is negative or not finite,
            or fewer than two are positive.
    """
    found = torch.as_tensor(
        weights.to_numpy() if hasattr(weights, "to_numpy") else weights
    )
    if found.shape != (number,):
        raise ValueError(
            f"weights must have shape ({number},), one for each row of the data, got "
            f"{tuple(found.shape)}."
        )
    found = found.detach().double()
    is_bad = ~(found.isfinite() & (found >= 0))
    if bool(is_bad.any()):
        at = int(is_bad.nonzero()[0])
        raise ValueError(
            f"weights must be finite and not negative; {int(is_bad.sum())} are not, "
            f"the first of them {float(found[at])} at row {at}."
        )
    if int((found > 0).sum()) < 2:
        raise ValueError(
            "weights must be positive for at least two rows, got "
            f"{int((found > 0).sum())}. Leave weights out for rows that count the same."
        )
    return found
