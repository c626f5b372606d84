"""Every command that a page names can be given: target, script, module and path exist.

Commands are the lines of ``bash`` blocks, and code in the text that begins as one.
"""

import importlib.util
import re
import shlex
import sys

import pytest

from tests.test_docs import PAGES, ROOT, blocks, name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
#: What a release is made with; nothing here installs it.
ELSEWHERE = {"build"}
SPAN = re.compile(r"(?<!`)`((?:make|pip|pytest|python3?|\S+/python) [^`]+)`(?!`)")
SETTING = re.compile(r"[A-Z_]+=\S*")


def commands(text):
    """Yield each command of a page, in words, without the settings before it."""
    lines = [
        line
        for block in blocks(text)
        if block.info == "bash"
        for line in block.source.splitlines()
    ]
    for line in [*lines, *SPAN.findall(text)]:
        words = shlex.split(line, comments=True)
        while words and SETTING.fullmatch(words[0]):
            words.pop(0)
        if words:
            yield words


def fault(words):
    """What is wrong with a command, or ``None``."""
    tool, *rest = words
    if tool == "make":
        return missing(rest, TARGETS, "target of make")
    if tool == "pip" and rest[:1] == ["install"]:
        return fault_of_install(rest[1:])
    if tool in ("python", ".venv/bin/python") and rest:
        return fault_of_python(rest)
    return f"no rule for {tool}: test that what it names exists"


def missing(words, known, kind):
    wrong = [word for word in words if word not in known]
    return f"no {kind}: {', '.join(wrong)}" if wrong else None


def fault_of_install(words):
    """Of the project itself, as ``.`` or by name, with extras that it has."""
    (what,) = [word for word in words if word != "-e"]
    found = re.fullmatch(rf"(?:\.|{PROJECT['name']})(?:\[([\w,]+)\])?", what)
    if not found:
        return f"not this project: {what}"
    extras = found[1].split(",") if found[1] else []
    return missing(extras, PROJECT["optional-dependencies"], "extra")


def fault_of_python(words):
    """Of ``-m module`` with paths, or of a script with options."""
    if words[0] == "-m":
        module, *paths = words[1:]
        if module not in ELSEWHERE and importlib.util.find_spec(module) is None:
            return f"no module: {module}"
        return missing_paths(word for word in paths if not word.startswith("-"))
    script, *options = words
    if missing_paths([script]):
        return missing_paths([script])
    known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text("utf-8")))
    return missing((word for word in options if word[0] == "-"), known, "option")


def missing_paths(paths):
    wrong = [path for path in paths if not (ROOT / path).exists()]
    return f"no file: {', '.join(wrong)}" if wrong else None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_can_be_given(page):
    faults = [fault(words) for words in commands(page.read_text("utf-8"))]
    assert not any(faults), [text for text in faults if text]


def test_commands_are_found():
    text = """
Say `make docs`, or `pip install -e .`, not `make_it` or ``make x``.

```bash
make lint  # of all
A=1 .venv/bin/python -m pytest a.py

```
```text
make tea
```
"""
    expected = ["make lint", ".venv/bin/python -m pytest a.py", "make docs"]
    assert [*map(" ".join, commands(text))] == [*expected, "pip install -e ."]
    assert sum(len([*commands(page.read_text("utf-8"))]) for page in PAGES) > 10


@pytest.mark.parametrize(
    "line",
    [
        "make lint tea",
        "pip install pyro_ebm",
        "pip install 'pyro-ebm[tea]'",
        "python -m pytest tests/test_tea.py",
        "python -m no_such_module",
        "python examples/tea.py",
        "python examples/quickstart.py --tea",
        "brew tea",
    ],
)
def test_command_that_cannot_be_given_is_found(line):
    assert fault(shlex.split(line))
