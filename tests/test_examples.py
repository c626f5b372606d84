"""Every example runs to its end under ``--smoke-test``."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.test_docs import README, shape

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Run a script as the main program, in a folder of its own for what it saves.

    In this process, as torch, Pyro and the library take seconds to import.
    """

    def run(path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), "--smoke-test"])
        runpy.run_path(str(path), run_name="__main__")

    return run


def test_examples_are_found():
    assert EXAMPLES, "examples/ holds no *.py file"


@pytest.mark.parametrize("dtype", [torch.float32])  # what a user has
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, run_example, capsys):
    run_example(path)
    if path.name == "quickstart.py":  # the README shows its last line
        last = capsys.readouterr().out.splitlines()[-1]
        assert shape(last) in shape(README.read_text("utf-8"))


def test_failing_example_is_seen(run_example, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import sys\n\nassert sys.argv[1:] == ['--smoke-test']\n1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        run_example(path)
