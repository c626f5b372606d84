r"""The table of a fit that a notebook shows."""

__all__ = ["fit_html"]

from typing import Any

from pyro_ebm.core.html import columns_table, rows_table
from pyro_ebm.core.verdict import in_words

#: Records of the history in the table: the last ones, and the first.
_MAX_RECORDS = 6
_HEADER = ("step", "loss", "train", "held out", "log Z", "verdict")


def fit_html(result: Any) -> str:
    r"""How a fit ended, its :math:`\log Z` with the verdict, and how it went.

    Args:
        result: A :class:`~pyro_ebm.infer.FitResult`.
    """
    estimate = result.log_partition
    held_out = result.validation
    summary = {
        "model": repr(result.distribution),
        "ended": f"{result.stopped} after {result.num_steps:,} steps",
        "log Z": f"{estimate.value:.4f} +- {estimate.std_error:.4f} nats",
        "log Z verdict": in_words(estimate.status, estimate.reasons),
        "train log-likelihood": f"{result.train} nats a point",
        "held-out log-likelihood": f"{held_out} nats a point" if held_out else "",
        "verdict": ": ".join([result.verdict, *map(str, result.reasons)]),
    }
    table = rows_table("Fit", summary)
    if not result.history:
        return table
    rows = [_cells(record) for record in _shown(result.history)]
    note = f"{len(result.history):,} records, in nats; +- is one standard error"
    return table + columns_table(_HEADER, rows, note)


def _shown(history: Any) -> list[Any]:
    records = list(history)
    if len(records) <= _MAX_RECORDS:
        return records
    return [records[0], *records[-_MAX_RECORDS + 1 :]]


def _cells(record: Any) -> list[str]:
    held_out, estimate = record.validation, record.log_partition
    return [
        f"{record.step:,}",
        f"{record.loss:.4f}",
        str(record.train),
        "" if held_out is None else str(held_out),
        f"{estimate.value:.4f} +- {estimate.std_error:.4f}",
        str(estimate.status),
    ]
