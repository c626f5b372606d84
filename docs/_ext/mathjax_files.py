"""MathJax from an installed package, and formulas in the form in which it can tag them.

Of ``sphinx-mathjax-offline`` only the part that sets TeX is copied, 2 of its 24 MB.
"""

from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx.util.fileutil import copy_asset

PARTS = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions")


def copy_mathjax(app, exception):
    if exception is not None or app.builder.format != "html":
        return
    [package] = find_spec("sphinx-mathjax-offline").submodule_search_locations
    for part in PARTS:
        source = Path(package) / "static/mathjax" / part
        target = app.outdir / "_static/mathjax" / part
        copy_asset(source, target if source.is_dir() else target.parent)


def allow_tags(app, doctree):
    r"""Put formulas of several lines that carry ``\tag`` into an ``align*``.

    Sphinx would put them into a ``split``, where TeX has room for one number only.
    """
    for node in doctree.findall(nodes.math_block):
        text = node.astext()
        is_whole = node.get("no-wrap", node.get("nowrap", False))
        if r"\tag" in text and r"\\" in text and not is_whole:
            aligned = rf"\begin{{align*}}{text.strip()}\end{{align*}}"
            node.children = [nodes.Text(aligned)]
            node["no-wrap"] = True


def setup(app):
    app.connect("build-finished", copy_mathjax)
    app.connect("doctree-read", allow_tags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
