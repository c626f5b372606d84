"""HTML tables for notebooks, without styles of their own, and what stands in them.

There is no script in them and no colour, so that they are readable on light and dark
pages alike.
"""

__all__ = ["columns_table", "rows_table", "with_error"]

import html
from collections.abc import Iterable, Mapping, Sequence

_LEFT = ' style="text-align: left"'
_CAPTION = "color: inherit; text-align: left"


def columns_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], note: str = ""
) -> str:
    """A table with a line of headings.

    Args:
        header: Of the columns.
        rows: Their cells, as many each.
        note: A line below.

    Example:
        >>> columns_table(["site"], [["a < b"]])
        '<table>...<th>site</th>...<td>a &lt; b</td>...</table>'
    """
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    below = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def rows_table(title: str, rows: Mapping[str, str]) -> str:
    """A table of names and values, one a line; empty values are left out.

    Args:
        title: Above it.
        rows: The value of each name.

    Example:
        >>> "<td" in rows_table("Estimate", {"log Z": "1.2"})
        True
    """
    body = "".join(
        f'<tr><th scope="row"{_LEFT}>{html.escape(name)}</th>'
        f"<td{_LEFT}>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
        if value
    )
    caption = f'<caption style="{_CAPTION}">{html.escape(title)}</caption>'
    return f"<table>{caption}<tbody>{body}</tbody></table>"


def with_error(value: float, error: float) -> str:
    """A value with its error, which is left out where it is 0."""
    return f"{value:.4f}" + (f" +- {error:.4f}" if error else "")
