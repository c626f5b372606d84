"""Test set-up shared by ``tests/`` and the doctests of ``pyro_ebm``."""

import doctest
import os
import sys

os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm.energies.closed_form import products


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device, for instance cuda")


#: Files of the longest tests, which come first, so that all workers end together.
_LONGEST = {"test_docs.py", "test_examples.py"}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture
def device(request):
    """The device that ``--device`` names."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def dtype(request):
    """Default dtype of the test: float64, but float32, as users have it, in doctests.

    ``@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])`` asks for
    others, whether or not the test takes ``dtype`` as an argument.
    """
    doctest = isinstance(request.node, pytest.DoctestItem)
    return torch.float32 if doctest else torch.float64


@pytest.fixture(autouse=True)
def fresh_state(dtype, monkeypatch):
    """Give each test the same random numbers, and nothing that another left behind."""
    rules = list(products._RULES)  # to which a test or an example may add
    monkeypatch.setattr(products, "_RULES", rules)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(before)
    if plt := sys.modules.get("matplotlib.pyplot"):
        plt.close("all")  # else the next test draws into what this one left


@pytest.fixture(autouse=True)
def doctest_names(request, doctest_namespace, fresh_state):
    """Names that an example in a docstring may use without importing them.

    Those of a function may also use what the example of its module has defined, which
    stands above it on the page and in the source.
    """
    names = {"torch": torch, "pyro": pyro, "dist": dist, "pyro_ebm": pyro_ebm}
    doctest_namespace.update(names)
    if isinstance(request.node, pytest.DoctestItem):
        test = request.node.dtest
        if test.name != test.globs["__name__"]:
            test.globs.update(names)
            run_examples(test.globs["__doc__"] or "", test.globs)


def run_examples(text, namespace):
    """Execute the examples in a docstring for the names that they define."""
    for example in doctest.DocTestParser().get_examples(text):
        exec(example.source, namespace)
