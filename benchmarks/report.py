"""Tables of results: markdown to read, JSON to compute with."""

import json
import platform
import re
from pathlib import Path

import pyro
import torch

import pyro_ebm

RESULTS = Path(__file__).resolve().parent / "results"
NUMBER = re.compile(r"[-+.,\de]*( of \d+)?|-?inf|nan")


def save(name, description, tables, *, smoke_test=False):
    """Write tables, by title and as rows of equal keys, to ``benchmarks/results``.

    Those longer than 40 rows are in the JSON file only. Returns the markdown.
    """
    name = f"{name}-smoke" if smoke_test else name
    versions = {
        "pyro_ebm": pyro_ebm.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
    }
    parts = [f"# {name}", description.strip()]
    for title, rows in tables.items():
        parts += [f"## {title}", as_markdown(rows)] if len(rows) <= 40 else []
    parts.append(", ".join(f"{key} {value}" for key, value in versions.items()))
    text = "\n\n".join(parts)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n", "utf-8")
    content = {"tables": tables, "versions": versions}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1), "utf-8")
    return text


def as_markdown(rows):
    """Rows of equal keys as a markdown table, with columns of numbers to the right."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    columns = zip(*cells, strict=True)
    rule = ["---:" if all(map(NUMBER.fullmatch, c)) else "---" for c in columns]
    lines = [list(rows[0]), rule, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)
