"""The directive ``benchmark``: what a script measured, from its committed JSON.

``{benchmark} partition`` shows what ``benchmarks/bench_partition.py`` says of itself
and the tables of ``benchmarks/results/partition.json``: no number is copied by hand.
"""

import ast
import importlib
import json
import sys
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from report import as_markdown  # noqa: E402

MOST_ROWS = 40  # longer tables are for computing with, not for reading


class Benchmark(SphinxDirective):
    """A description and its tables."""

    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        script = BENCHMARKS / f"bench_{name}.py"
        results = BENCHMARKS / "results" / f"{name}.json"
        self.env.note_dependency(str(script))
        self.env.note_dependency(str(results))
        description = ast.get_docstring(ast.parse(script.read_text("utf-8")))
        content = json.loads(results.read_text("utf-8"))
        parts = [description.partition("\n")[2].strip()]
        if isinstance(content, list):  # runs, of which the script makes its table
            parts.append(importlib.import_module(script.stem).table(content))
        else:
            for title, rows in content["tables"].items():
                if rows and len(rows) <= MOST_ROWS:
                    parts += [f"**{title}**", as_markdown(rows)]
            versions = (f"{key} {value}" for key, value in content["versions"].items())
            parts.append(f"Measured with {', '.join(versions)}.")
        return self.parse("\n\n".join(parts))

    def parse(self, text):
        node = nodes.container(classes=["benchmark"])
        node.document = self.state.document
        self.state.nested_parse(text.splitlines(), self.content_offset, node)
        return [node]


def setup(app):
    app.add_directive("benchmark", Benchmark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
