"""Every Python block of the texts and of ``docs/`` runs, as a reader would run it.

Pages that take over five seconds are marked as slow: ``make docs`` runs every page of
the site as well. And every other block is of a kind that is known to be no code, or is
looked at elsewhere: commands in ``test_commands.py``, the tables of benchmarks by the
site.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pyro_ebm.infer.fit import fit

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SITE = sorted((ROOT / "docs").rglob("*.md"))
SITE = [page for page in SITE if "_build" not in page.parts]
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *SITE]
SLOW = {  # pages of the site
    "docs/guide/discrete_learning.md",
    "docs/guide/distributions.md",
    "docs/guide/infer.md",
    "docs/guide/partition.md",
    "docs/howto/custom_energy.md",
    "docs/start.md",
    "docs/tutorials/latent_prior.md",
    "docs/tutorials/many_chains.md",
    "docs/tutorials/maximum_likelihood.md",
    "docs/tutorials/own_energy.md",
    "docs/tutorials/tilt_a_density.md",
    "docs/tutorials/which_estimator.md",
}
FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<info>.*)")
PYTHON = re.compile(r"(python|py|\{code-block\} +python)\b|\{code-cell\}", re.I)
NO_CODE = re.compile(r"bash|text|\{(benchmark|bibliography|image|include|toctree)\}.*")
OPTION = re.compile(r":[\w-]+:.*")
NUMBER = re.compile(r"-?(\d[\d,]*(\.\d+)?|\.\d+)")
BASE = re.compile(r"base: \w+:")
FRONT_MATTER = """---
file_format: mystnb
kernelspec:
  name: python3
---
"""


def name(page):
    """What a test of a page is called by."""
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    number: int  # of its first line within the page
    info: str  # what follows the ticks
    source: str

    @property
    def is_python(self):
        return bool(PYTHON.match(self.info))


def blocks(text):
    """Yield the fenced blocks, in order."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.fullmatch(lines[number])
        if fence:
            end = number + 1
            while end < len(lines) and lines[end].strip() != fence["ticks"]:
                end += 1
            indent = len(fence["indent"])
            body = [line[indent:] for line in lines[number + 1 : end]]
            if "{code-cell}" in fence["info"]:
                body = ["" if OPTION.fullmatch(line) else line for line in body]
            yield Block(number + 2, fence["info"].strip(), "\n".join(body))
            number = end
        number += 1


def run_blocks(page):
    """Run the blocks of ``page`` one after another; return what each prints."""
    namespace = {"__name__": "__main__"}
    printed = []
    for block in blocks(page.read_text("utf-8")):
        if block.is_python:
            # Blank lines above make a traceback show the page's own line numbers.
            source = "\n" * (block.number - 1) + block.source
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(source, str(page), "exec"), namespace)
            printed.append(output.getvalue())
    return printed


def shape(text):
    """The text with a sign for each number, and without its alignment.

    Which base a fit takes is a number's matter as well: of the time that it has.
    """
    text = BASE.sub("base: #:", NUMBER.sub("#", text))
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def is_shown(shown, printed):
    """Whether the output on a page is what is printed, up to numbers and ``...``."""
    pattern = re.escape(shape(shown)).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, shape(printed), re.DOTALL) is not None


def shown_outputs(text):
    """For each Python block the text right below that shows its output, or ``None``."""
    found = list(blocks(text))
    below = [block.source if block.info == "text" else None for block in found[1:]]
    pairs = zip(found, [*below, None], strict=True)
    return [output for block, output in pairs if block.is_python]


def marked(page):
    """The page as a parameter, marked if it takes long."""
    marks = [pytest.mark.slow] if name(page) in SLOW else []
    return pytest.param(page, marks=marks, id=name(page))


@pytest.mark.parametrize("dtype", [torch.float32])  # what a reader has
@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_page(page, tmp_path, monkeypatch):
    assert page.exists(), f"{page.name} is missing: write it, its code is tested here"
    monkeypatch.chdir(tmp_path)  # pictures that a block saves stay out of the tree
    # A fit that names no limit fits bases as long as it may, for a better likelihood.
    monkeypatch.setattr(fit, "_SECONDS", 6.0)
    printed = run_blocks(page)
    if page == README:
        assert printed, "README.md shows no Python block that is run"
        outputs = shown_outputs(page.read_text("utf-8"))
        assert sum(output is not None for output in outputs) == 2
        for shown, output in zip(outputs, printed, strict=True):
            assert shown is None or is_shown(shown, output), output


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_known_kind(page):
    """No code hides in a block that nothing runs."""
    for block in blocks(page.read_text("utf-8")):
        assert block.is_python or NO_CODE.fullmatch(block.info), (
            f"line {block.number - 1}: {block.info!r} is run by no test; write python "
            "for code, bash for commands, text for what is neither"
        )


@pytest.mark.parametrize("page", SITE, ids=name)
def test_page_is_executed_by_the_site(page):
    """Each Python block is a cell, none is excused, and no output is stored."""
    text = page.read_text("utf-8")
    cells = [line for line in text.splitlines() if "{code-cell}" in line]
    assert all(re.fullmatch(r"```\{code-cell\} python", line) for line in cells)
    found = sum(block.is_python for block in blocks(text))
    assert found == len(cells), "write ```{code-cell} python for what is run"
    assert not cells or text.startswith(FRONT_MATTER)
    assert not re.search(r"raises-exception|skip-execution|remove-stderr", text)


@pytest.mark.parametrize(
    "fault",
    [
        "```python\n1\n```",
        "````{note}\n```{code-cell} python\n1\n```\n````",
        "```{code-cell} python\n:tags: [raises-exception]\n1 / 0\n```",
        "  ```{code-cell} python\n  1\n  ```",
    ],
)
def test_page_that_is_not_executed_is_found(tmp_path, fault):
    page = tmp_path / "page.md"
    page.write_text(f"{FRONT_MATTER}\n# Title\n\n{fault}\n")
    with pytest.raises(AssertionError):
        test_page_is_executed_by_the_site(page)


@pytest.mark.parametrize(
    "info", ["", "pycon", "sh", "console", "ipython", "{note}", "{doctest}"]
)
def test_block_that_nothing_looks_at_is_found(tmp_path, info):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n```{info}\n>>> 1 / 0\n```\n")
    with pytest.raises(AssertionError, match="line 3"):
        test_every_block_is_of_a_known_kind(page)


def test_slow_pages_are_pages_of_the_site():
    """Which another command runs, and where a page that is gone is not kept."""
    assert {name(page) for page in SITE} >= SLOW


def test_blocks_are_found_in_order():
    text = """
```python
a = 1
```
```bash
never
```
- In a list:

  ~~~py
  if a:
      b = 2
  ~~~
````{code-block} python
c = '''
```
'''
````
```{code-cell}
:tags: [hide-input]
d = 4
```
"""
    expected = [(3, "a = 1"), (11, "if a:\n    b = 2"), (15, "c = '''\n```\n'''")]
    found = [(b.number, b.source) for b in blocks(text) if b.is_python]
    assert found == [*expected, (20, "\nd = 4")]


def test_output_that_is_not_what_is_printed_is_found():
    printed = "log Z = -31.3117 +- 0.0044 [ok], 50,000 of them\nmu  1\ntau 2\n"
    assert is_shown("log Z = 2 +- .1 [ok], 7 of them\nmu 3\n...", printed)
    for wrong in ("log Z = 2 [ok]\n...", "log Z = 2 +- .1 [ok], 7 of them\nmu 3"):
        assert not is_shown(wrong, printed)
    page = "```python\n1\n```\n```text\n2\n```\n```bash\n```\n```text\nno\n```\n"
    assert shown_outputs(page) == ["2"]


def test_fault_in_a_block_is_found_at_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\na = 0\n```\n\n```python\n1 / a\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno + 1 == 8
