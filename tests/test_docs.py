"""Every Python block of the README and of ``docs/`` runs, as a reader would run it."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
NOT_RUN = "<!-- not run -->"
FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<info>.*)")
PYTHON = re.compile(r"(python|py|\{code-block\} +python)\b|\{code-cell\}", re.I)
OPTION = re.compile(r":[\w-]+:.*")
FRONT_MATTER = """---
file_format: mystnb
kernelspec:
  name: python3
---
"""


def python_blocks(text):
    """Yield the first line number and the source of each Python block to be run."""
    lines = text.splitlines()
    above, number = "", 0
    while number < len(lines):
        fence = FENCE.fullmatch(lines[number])
        if fence:
            end = number + 1
            while end < len(lines) and lines[end].strip() != fence["ticks"]:
                end += 1
            if PYTHON.match(fence["info"]) and above != NOT_RUN:
                indent = len(fence["indent"])
                body = [line[indent:] for line in lines[number + 1 : end]]
                if "{code-cell}" in fence["info"]:
                    body = ["" if OPTION.fullmatch(line) else line for line in body]
                yield number + 2, "\n".join(body)
            number = end
        if lines[min(number, len(lines) - 1)].strip():
            above = lines[min(number, len(lines) - 1)].strip()
        number += 1


def run_blocks(page):
    """Run the blocks of ``page`` in order, in one namespace; return their count."""
    namespace = {"__name__": "__main__"}
    count = 0
    for number, source in python_blocks(page.read_text("utf-8")):
        # Blank lines above make a traceback show the page's own line numbers.
        exec(compile("\n" * (number - 1) + source, str(page), "exec"), namespace)
        count += 1
    return count


@pytest.mark.parametrize("dtype", [torch.float32])  # what a reader has
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, tmp_path, monkeypatch):
    assert page.exists(), f"{page.name} is missing: write it, its code is tested here"
    monkeypatch.chdir(tmp_path)  # pictures that a block saves stay out of the tree
    count = run_blocks(page)
    if page == README:
        assert count, "README.md shows no Python block that is run"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_page_is_executed_by_the_site(page):
    """Each Python block is a cell, none is excused, and no output is stored."""
    text = page.read_text("utf-8")
    cells = [line for line in text.splitlines() if "{code-cell}" in line]
    assert all(re.fullmatch(r"```\{code-cell\} python", line) for line in cells)
    if NOT_RUN not in text:
        found = len(list(python_blocks(text)))
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


def test_blocks_are_found_in_order():
    text = f"""
```python
a = 1
```
{NOT_RUN}

```python
never
```
```bash
never
```
- In a list:

  ~~~py
  if a:
      b = 2
  ~~~
````{{code-block}} python
c = '''
```
'''
````
```{{code-cell}}
:tags: [hide-input]
d = 4
```
"""
    expected = [(3, "a = 1"), (16, "if a:\n    b = 2"), (20, "c = '''\n```\n'''")]
    assert list(python_blocks(text)) == [*expected, (25, "\nd = 4")]


def test_fault_in_a_block_is_found_at_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\na = 0\n```\n\n```python\n1 / a\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno + 1 == 8
