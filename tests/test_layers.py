"""The package's architecture, read from its source: layers, cycles, form and tests.

Each rule is a function from the package's root to the faults found there, so that the
tests below can plant one fault at a time in a small tree and see it found.
"""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "pyro_ebm"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
LAYERS = (
    "core",
    "diagnostics",
    "bases",
    "energies",
    "mcmc",
    "partition",
    "distributions",
    "infer",
)
LEAVES = ("datasets", "plots", "testing")
MAX_LINES = 700


class Module(NamedTuple):
    name: str  # dotted, as imported
    path: Path
    tree: ast.Module

    @property
    def line(self):
        """The first name below the package: the layer, or "" at the top level."""
        return line_of(self.name)


class Import(NamedTuple):
    target: str  # the module meant: `from pyro_ebm.mcmc import base` means base
    number: int
    nested: bool  # inside a function
    star: bool


def line_of(name):
    return name.partition(".")[2].partition(".")[0]


@functools.cache
def modules(root):
    """Every module below ``root``, parsed once."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        name = ".".join((PACKAGE, *parts))
        found.append(Module(name, path, ast.parse(path.read_text("utf-8"))))
    return found


def imports(module, known):
    """Every import in ``module``; names that are modules themselves are resolved."""
    inside = {
        id(node)
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            full = [(f"{source}.{a.name}", a.name == "*") for a in node.names]
            targets = [(f if f in known else source, star) for f, star in full]
        else:
            continue
        for target, star in targets:
            yield Import(target, node.lineno, id(node) in inside, star)


def absolute(module, node):
    """The module that a ``from`` import reads, with leading dots resolved."""
    if not node.level:
        return node.module
    parts = module.name.split(".")
    keep = len(parts) - node.level + (module.path.name == "__init__.py")
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


@functools.cache
def own_imports(root):
    """Pairs of a module and an import of this package in it."""
    found = modules(root)
    known = {module.name for module in found}
    return [
        (module, item)
        for module in found
        for item in imports(module, known)
        if item.target.split(".")[0] == PACKAGE
    ]


def check_known(root):
    """Every module belongs to a layer or is a leaf."""
    for module in modules(root):
        if module.line not in ("", *LAYERS, *LEAVES):
            yield f"{module.name}: {module.line!r} is neither a layer nor a leaf"


def check_layers(root):
    """A module imports from its own layer or from those before it."""
    for module, item in own_imports(root):
        target = line_of(item.target)
        if module.line == "" or target == module.line:
            continue
        where = f"{module.name}:{item.number}"
        if target == "":
            yield f"{where} imports the top level"
        elif target in LEAVES:
            yield f"{where} imports the leaf {item.target}"
        elif module.line in LAYERS and target in LAYERS:
            if LAYERS.index(target) > LAYERS.index(module.line):
                yield f"{where} imports {item.target} from a later layer"


def check_cycles(root):
    """No module imports itself, directly or through others."""
    graph = {}
    for module, item in own_imports(root):
        graph.setdefault(module.name, set()).add(item.target)
    for start in sorted(graph):
        reached, frontier = set(), {start}
        while frontier:
            frontier = set().union(*(graph.get(f, ()) for f in frontier)) - reached
            reached |= frontier
        if start in reached:
            yield f"{start} is in an import cycle"


def check_nested_imports(root):
    """No module of the package is imported inside a function."""
    for module, item in own_imports(root):
        if item.nested:
            yield f"{module.name}:{item.number} imports {item.target} in a function"


def check_star_imports(root):
    """No ``from ... import *``, of whatever package."""
    for module in modules(root):
        for item in imports(module, known=set()):
            if item.star:
                yield f"{module.name}:{item.number} has a star import"


def check_all(root):
    """``__all__`` is a sorted list of strings directly under the docstring."""
    for module in modules(root):
        if ast.get_docstring(module.tree) is None:
            yield f"{module.name} has no docstring"
            continue
        body = [node for node in module.tree.body[1:] if not is_future(node)]
        names = all_names(body[0]) if body else None
        if names is None:
            yield f"{module.name} has no __all__ directly under its docstring"
        elif names != sorted(set(names)):
            yield f"{module.name}: __all__ is not sorted or repeats a name"


def is_future(node):
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def all_names(node):
    """The names in ``__all__ = [...]``, or None if ``node`` is something else."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return None
    if [ast.unparse(target) for target in targets] != ["__all__"]:
        return None
    try:
        return list(ast.literal_eval(node.value))
    except ValueError:
        return None


def check_length(root):
    """No module is longer than ``MAX_LINES``."""
    for module in modules(root):
        count = len(module.path.read_text("utf-8").splitlines())
        if count > MAX_LINES:
            yield f"{module.name} has {count} lines, more than {MAX_LINES}"


def check_names(root):
    """A helper lives beside what it helps, not in a drawer."""
    for module in modules(root):
        if module.name.rpartition(".")[2] in ("util", "utils"):
            yield f"{module.name}: name a module after what it does"


CHECKS = (
    check_known,
    check_layers,
    check_cycles,
    check_nested_imports,
    check_star_imports,
    check_all,
    check_length,
    check_names,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package(check):
    assert modules(ROOT), f"no modules under {ROOT}"
    faults = list(check(ROOT))
    assert not faults, "\n".join(faults)


HEAD = '"""A module."""\n\n__all__ = ["A"]\n\n'
CLEAN = {
    "__init__.py": "from pyro_ebm import energies, plots\n",
    "core/errors.py": "",
    "energies/__init__.py": "from pyro_ebm.energies.base import A\n",
    "energies/base.py": "import math\n\nfrom pyro_ebm.core.errors import A\n",
    "mcmc/__init__.py": "from .base import A\n",
    "mcmc/base.py": "from pyro_ebm.energies import A\n",
    "infer/__init__.py": "from pyro_ebm import energies, mcmc\n",
    "plots.py": "from pyro_ebm import infer\n\ndef a():\n    import json\n",
}
PLANTED = [
    # (rule, module, its source below HEAD; a source with a docstring stands alone)
    (check_known, "models.py", ""),
    (check_known, "models/__init__.py", ""),
    (check_layers, "energies/late.py", "from pyro_ebm.mcmc import A"),
    (check_layers, "energies/late.py", "from pyro_ebm import mcmc"),
    (check_layers, "energies/late.py", "import pyro_ebm.mcmc.base"),
    (check_layers, "energies/late.py", "from ..mcmc.base import A"),
    (check_layers, "energies/late.py", "from .. import mcmc"),
    (check_layers, "energies/late.py", "if A:\n    from pyro_ebm.mcmc import A"),
    (check_layers, "core/errors.py", "from pyro_ebm.energies.base import A"),
    (check_layers, "infer/top.py", "from pyro_ebm import A"),
    (check_layers, "infer/top.py", "import pyro_ebm"),
    (check_layers, "infer/leaf.py", "from pyro_ebm import plots"),
    (check_layers, "infer/leaf.py", "from pyro_ebm.plots import A"),
    (check_layers, "testing/leaf.py", "from pyro_ebm.plots import A"),
    (check_cycles, "mcmc/base.py", "from pyro_ebm.mcmc import A"),
    (check_cycles, "core/errors.py", "from pyro_ebm.energies import base"),
    (
        check_nested_imports,
        "mcmc/a.py",
        "def a():\n    from pyro_ebm.energies import A",
    ),
    (check_nested_imports, "mcmc/a.py", "async def a():\n    import pyro_ebm.energies"),
    (
        check_nested_imports,
        "mcmc/a.py",
        "class A:\n    def a(self):\n        if self:\n            from . import base",
    ),
    (check_star_imports, "mcmc/a.py", "from math import *"),
    (check_star_imports, "mcmc/a.py", "from pyro_ebm.energies import *"),
    (check_all, "mcmc/a.py", '"""No list."""\n\nimport math\n'),
    (check_all, "mcmc/a.py", '"""Only this."""\n'),
    (check_all, "mcmc/a.py", '"""Late."""\n\nimport math\n\n__all__ = ["A"]\n'),
    (check_all, "mcmc/a.py", '"""Unsorted."""\n\n__all__ = ["B", "A"]\n'),
    (check_all, "mcmc/a.py", '"""Twice."""\n\n__all__ = ["A", "A"]\n'),
    (check_all, "mcmc/a.py", '"""Computed."""\n\n__all__ = sorted(globals())\n'),
    (check_all, "mcmc/a.py", '__all__ = ["A"]\n"""Not a docstring."""\n'),
    (check_length, "mcmc/a.py", "\n" * MAX_LINES),
    (check_names, "mcmc/utils.py", ""),
    (check_names, "mcmc/utils/__init__.py", ""),
]


def plant(root, files):
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if '"""' in source else HEAD + source, "utf-8")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_false_alarm(check, tmp_path):
    plant(tmp_path, CLEAN)
    assert len(modules(tmp_path)) == len(CLEAN)
    assert list(check(tmp_path)) == []


@pytest.mark.parametrize(("check", "name", "source"), PLANTED)
def test_planted_fault_is_found(check, name, source, tmp_path):
    plant(tmp_path, {**CLEAN, name: source})
    faults = list(check(tmp_path))
    assert faults
    planted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert any(f"{PACKAGE}.{planted}" in fault for fault in faults)


def test_every_rule_has_a_planted_fault():
    assert {check for check, _, _ in PLANTED} == set(CHECKS)


def test_future_import_may_stand_above_all(tmp_path):
    source = '"""A."""\n\nfrom __future__ import annotations\n\n__all__ = ["A"]\n'
    plant(tmp_path, {"errors.py": source})
    assert list(check_all(tmp_path)) == []


#: Tests in folders that are of no one module, and what they hold together.
ACROSS = {
    "distributions/test_pyro_inference.py": "energies under each of Pyro's algorithms",
    "energies/test_contract.py": "the contract of all energies",
    "infer/fit/test_bad_data.py": "fit, told data that it must refuse",
    "infer/fit/test_finite.py": "fit over finite supports",
    "infer/fit/test_mixed.py": "fit over mixed supports",
    "infer/fit/test_weights.py": "fit with weighted rows",
    "infer/test_consistency.py": "the limits of all objectives",
    "infer/test_estimators.py": "what is known of each objective",
    "infer/test_objectives.py": "the contract of all objectives",
    "mcmc/test_calibration.py": "posteriors by the whole of MCMC",
    "mcmc/test_contract.py": "the contract of all kernels",
    "mcmc/test_invariance.py": "the law of all kernels",
}


def unmirrored(root):
    """Tests in the folders of ``root`` that stand where no module of the package is."""
    for path in sorted(root.glob("*/**/test_*.py")):
        place = path.relative_to(root)
        module = ROOT / place.with_name(place.name.removeprefix("test_"))
        if not module.exists() and place.as_posix() not in ACROSS:
            yield f"tests/{place} is a test of no module: name it after one"


def test_tests_mirror_the_package(tmp_path):
    """Planted: a test of a module that is gone, and one of a module that is there."""
    tests = Path(__file__).parent
    assert list(unmirrored(tests)) == []
    assert all((tests / name).exists() for name in ACROSS)
    for name in ("test_gone.py", "test_base.py"):
        (tmp_path / "mcmc" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mcmc" / name).touch()
    assert [fault.split()[0] for fault in unmirrored(tmp_path)] == [
        "tests/mcmc/test_gone.py"
    ]
