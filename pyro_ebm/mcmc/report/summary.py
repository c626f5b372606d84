"""Summary table of a run of MCMC."""

__all__ = ["SiteSummary", "Summary", "coordinate_names"]

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from pyro_ebm.core.html import columns_table
from pyro_ebm.mcmc.report.results import Diagnostics

#: Rows of a site in a printed table.
_MAX_ROWS = 40
#: Of the columns of a row, in order.
_FORMATS = (".4g", ".4g", ".2g", ".4g", ".4g", ".4g", ",.0f", ",.0f", ".3f")


class SiteSummary(NamedTuple):
    """The row of each coordinate of a site, tensors of the site's shape.

    Attributes:
        mean: Posterior mean.
        sd: Standard deviation.
        mean_std_error: Monte Carlo standard error of the mean.
        median: Median; ``nan`` where draws were not kept, as the next two.
        lower: Lower end of the central interval.
        upper: Upper end of the central interval.
        bulk_ess: Effective sample size of the centre.
        tail_ess: Effective sample size of the tails.
        r_hat: R-hat, nested where there are superchains.
    """

    mean: Tensor
    sd: Tensor
    mean_std_error: Tensor
    median: Tensor
    lower: Tensor
    upper: Tensor
    bulk_ess: Tensor
    tail_ess: Tensor
    r_hat: Tensor


class Summary(NamedTuple):
    """A table of all sites: print it, or let a notebook show it.

    Attributes:
        sites: Rows of each site.
        prob: Probability of the central interval.
        diagnostics: Of the run, with the verdict.
    """

    sites: dict[str, SiteSummary]
    prob: float
    diagnostics: Diagnostics

    def __str__(self) -> str:
        header, *rows = self._cells()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            )
            for row in (header, *rows)
        ]
        return "\n".join([*lines, "", str(self.diagnostics)])

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        return columns_table(header, rows, str(self.diagnostics))

    def _cells(self) -> list[list[str]]:
        tail = (1 - self.prob) / 2
        r_hat = "nested r_hat" if self.diagnostics.is_nested else "r_hat"
        ends = [f"{100 * end:.4g}%" for end in (tail, 1 - tail)]
        names = ["mean", "sd", "mcse", "median", *ends, "bulk_ess", "tail_ess", r_hat]
        cells = [["", *names]]
        for site, summary in self.sites.items():
            columns = [value.flatten()[:_MAX_ROWS].tolist() for value in summary]
            rows = zip(
                coordinate_names(site, summary.mean.shape), *columns, strict=False
            )
            for name, *row in rows:
                text = [f"{v:{form}}" for v, form in zip(row, _FORMATS, strict=True)]
                cells.append([name, *text])
            left = summary.mean.numel() - _MAX_ROWS
            if left > 0:
                cells.append([f"{site}: {left:,} more", *[""] * 9])
        return cells


def coordinate_names(site: str, shape: tuple[int, ...]) -> Iterator[str]:
    """``site``, or ``site[0, 1]`` of each coordinate in order."""
    if not shape:
        yield site
        return
    for index in itertools.product(*map(range, shape)):
        yield f"{site}[{', '.join(map(str, index))}]"
