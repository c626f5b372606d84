"""The worked examples of ``docs/contributing.md``, put into a copy of the package.

Each is one file, an import and a name in ``__all__``. Faults planted and found: an
import from a later layer (below), a class without docstring, an objective without
gradient.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import test_layers

ROOT = Path(__file__).resolve().parents[1]
CELL = re.compile(r"```\{code-cell\} python\n# (pyro_ebm/\S+\.py)\n(.*?)```", re.DOTALL)
USE = """
import torch
import pyro_ebm

energy = pyro_ebm.energies.LogCoshEnergy(2)
model = pyro_ebm.EnergyModel(energy)
kernel = pyro_ebm.mcmc.RandomWalk()
settings = {"num_steps": 5, "progress_bar": False}
for objective in (
    pyro_ebm.infer.MaximumLikelihood(kernel=kernel),
    pyro_ebm.infer.ProbabilityFlow(),
):
    before = energy.log_scale.detach().clone()
    pyro_ebm.fit(model, torch.randn(100, 2), objective, **settings)
    assert not torch.equal(energy.log_scale, before)
print(pyro_ebm.__file__)
"""


def examples():
    """Path and source of each file on the page."""
    page = (ROOT / "docs" / "contributing.md").read_text("utf-8")
    return dict(CELL.findall(page))


def add(root, path, source):
    """Write the file, and the two lines that make its class public."""
    (root / path).write_text(source, "utf-8")
    name = re.search(r'__all__ = \["(\w+)"\]', source)[1]
    package = (root / path).parent / "__init__.py"
    text = package.read_text("utf-8")
    start = text.index("__all__ = [\n") + len("__all__ = [\n")
    head, names, tail = text[:start], *text[start:].split("]", 1)
    names = "".join(sorted([*names.splitlines(keepends=True), f'    "{name}",\n']))
    module = path.removesuffix(".py").replace("/", ".")
    text = f"{head}{names}]{tail}\nfrom {module} import {name}\n"
    package.write_text(text, "utf-8")


@pytest.fixture
def root(tmp_path):
    """A folder with a copy of the package that has the examples in it."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pyro_ebm", tmp_path / "pyro_ebm", ignore=ignore)
    for path, source in examples().items():
        add(tmp_path, path, source)
    return tmp_path


def run(root, *command):
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True
    )


def test_the_page_has_one_file_of_each_kind():
    assert [path.split("/")[1] for path in examples()] == ["energies", "mcmc", "infer"]


def test_they_keep_the_rules(root):
    checks = (test_layers.check_layers, test_layers.check_all, test_layers.check_length)
    faults = [fault for check in checks for fault in check(root / "pyro_ebm")]
    assert not faults, "\n".join(faults)
    config = ROOT / "pyproject.toml"
    for command in ("check", "format --check"):
        ruff = ("-m", "ruff", *command.split(), "--config", str(config), "--no-cache")
        found = run(root, *ruff, *examples())
        assert found.returncode == 0, found.stdout.decode() + found.stderr.decode()


def test_they_work_in_the_package(root):
    found = run(root, "-c", USE)
    assert found.returncode == 0, found.stderr.decode()
    assert Path(found.stdout.decode().strip()).is_relative_to(root)


def test_an_import_from_a_later_layer_is_found(root):
    path = root / "pyro_ebm" / "energies" / "log_cosh.py"
    path.write_text(path.read_text("utf-8") + "from pyro_ebm.mcmc import HMC\n")
    assert any(
        "log_cosh" in fault for fault in test_layers.check_layers(root / "pyro_ebm")
    )
