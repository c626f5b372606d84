"""Every example runs to its end under ``--smoke-test``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import README, shape

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_SECONDS = 300


def run_example(path, folder):
    """Run ``path`` in ``folder``, so that what it saves stays out of the tree."""
    return subprocess.run(
        [sys.executable, str(path), "--smoke-test"],
        cwd=folder,
        env={
            **os.environ,
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
        check=False,
    )


def test_examples_are_found():
    assert EXAMPLES, "examples/ holds no *.py file"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    result = run_example(path, tmp_path)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    if path.name == "quickstart.py":  # the README shows its last line
        last = result.stdout.splitlines()[-1]
        assert shape(last) in shape(README.read_text("utf-8"))


def test_failing_example_is_seen(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise SystemExit(3)\n")
    assert run_example(path, tmp_path).returncode == 3
