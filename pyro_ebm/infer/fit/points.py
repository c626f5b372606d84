"""Data as people have them, as tensors of the model's dtype, and batches of them."""

__all__ = ["Points", "as_points"]

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_ebm.distributions import EnergyModel
from pyro_ebm.infer.fit.fit_checks import require_points

_LOG = logging.getLogger(__name__)
#: Rows of a stream that are kept, for the base and for the training curve.
_KEPT = 10_000


class Points(NamedTuple):
    """Data to learn from.

    Attributes:
        rows: All of them, or the first of a stream; shape ``(N, *event)``.
        loader: Where the batches come from, if they are a stream.
    """

    rows: Tensor
    loader: Any = None

    def batches(self, batch_size: int, model: EnergyModel) -> Iterator[Tensor]:
        """Batches without end, shape ``(B, *event)``; of a stream as it gives them.

        Args:
            batch_size: Of rows that are drawn without replacement within an epoch.
            model: What is fitted to them.
        """
        if self.loader is not None:
            while True:
                for batch in self.loader:
                    yield _of_batch(batch, model)
        while True:
            order = torch.randperm(len(self.rows), device=self.rows.device)
            whole = len(self.rows) // batch_size * batch_size
            for index in order[:whole].split(batch_size):
                yield self.rows[index]


def as_points(name: str, data: Any, model: EnergyModel) -> Points:
    """Data as tensors, checked.

    Args:
        name: Of the argument.
        data: A tensor, an array, a table of pandas, a ``Dataset``, or a ``DataLoader``,
            whose batches may be lists with the points first.
        model: What is to be fitted to them; numbers of another type are converted to
            its dtype, which a line of the log says.

    Raises:
        TypeError: If it is none of these.
        ValueError: If there are no rows, or they do not fit the model.
    """
    if isinstance(data, DataLoader):
        kept: list[Tensor] = []
        for batch in data:
            kept.append(_of_batch(batch, model))
            if sum(map(len, kept)) >= _KEPT:
                break
        if not kept:
            raise ValueError(f"{name} must have batches, and the DataLoader has none.")
        rows = torch.cat(kept)[:_KEPT]
        require_points(name, rows, model)
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
    require_points(name, rows, model)
    return Points(rows)


def _of_batch(batch: Any, model: EnergyModel) -> Tensor:
    return _as_tensor("a batch of the data", _first(batch), model)


def _first(item: Any) -> Any:
    """The points of an item that may come with labels."""
    return item[0] if isinstance(item, list | tuple) else item


def _as_tensor(name: str, data: Any, model: EnergyModel) -> Tensor:
    if hasattr(data, "to_numpy"):  # of pandas
        data = data.to_numpy()
    if not isinstance(data, Tensor):
        try:
            data = torch.tensor(data)  # a copy: an array may be read-only
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be a tensor, an array or a table of numbers, got "
                f"{type(data).__name__}: {error}."
            ) from error
    options = model.energy.tensor_options()
    if data.dtype != options["dtype"] and not data.is_complex():
        _LOG.info("%s: converted from %s to %s", name, data.dtype, options["dtype"])
        data = data.to(options["dtype"])
    return data.to(options["device"])
