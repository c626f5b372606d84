"""Tables of results: markdown to read, JSON to compute with."""

import json
import platform
from pathlib import Path

import pyro
import torch

import pyro_ebm

RESULTS = Path(__file__).resolve().parent / "results"


def save(name, rows, summary, *, smoke_test=False):
    """Write ``rows`` (of equal keys) and ``summary`` under ``benchmarks/results``."""
    name = f"{name}-smoke" if smoke_test else name
    versions = {
        "pyro_ebm": pyro_ebm.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
    }
    text = "\n\n".join(
        [
            f"# {name}",
            table(rows),
            table([{"summary": key, "value": value} for key, value in summary.items()]),
            ", ".join(f"{key} {value}" for key, value in versions.items()),
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n", "utf-8")
    content = {"rows": rows, "summary": summary, "versions": versions}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1), "utf-8")
    print(text)


def table(rows):
    """Rows of equal keys as a markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
