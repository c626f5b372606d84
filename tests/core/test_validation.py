"""Arguments as people have them, and the checks of distributions that come back."""

import contextlib
import sys

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import Distribution

from pyro_ebm.bases.flow import Flow
from pyro_ebm.core.validation import as_tensor, without_validation
from pyro_ebm.energies.pyro_model.runs import WithoutValidation


def switches():
    flags = (pyro.infer, pyro.distributions, pyro.poutine)
    return [f.is_validation_enabled() for f in flags] + [Distribution._validate_args]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("block", [without_validation, WithoutValidation])
def test_blocks_leave_all_switches_as_they_were(block, before):
    """Fault: torch's default became that of Pyro's flag."""
    Distribution.set_default_validate_args(before)
    found = switches()
    with contextlib.suppress(ArithmeticError), block():
        with block():
            assert not any(switches())
        assert not any(switches())
        raise ArithmeticError
    assert switches() == found


def test_the_first_import_of_zuko_leaves_the_checks_on(monkeypatch):
    """Fault: zuko switches off the checks of all of torch, and they stayed off."""
    pytest.importorskip("zuko")
    Distribution.set_default_validate_args(True)
    for name in [n for n in sys.modules if n.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    empty = {"sizes": [2, 1, 4], "loc": torch.zeros(2), "scale": torch.ones(2)}
    with pytest.raises(RuntimeError, match="state_dict"):
        Flow.restored({**empty, "module": {}})
    assert all(switches())


@pytest.mark.parametrize("kind", ["tensor", "array", "table", "lists"])
def test_numbers_become_a_tensor(kind):
    """Floating-point tensors stay as they are; all else has the type asked for."""
    numbers = torch.tensor([[1.0, 2.5], [3.0, -1.0]], dtype=torch.float64)
    given = {
        "tensor": lambda: numbers,
        "array": numbers.numpy,
        "table": lambda: pytest.importorskip("pandas").DataFrame(numbers.numpy()),
        "lists": numbers.tolist,
    }[kind]()
    found = as_tensor("x", given, dtype=torch.float32)
    assert found.dtype == (torch.float64 if kind == "tensor" else torch.float32)
    torch.testing.assert_close(found.double(), numbers)
    whole = as_tensor("x", torch.tensor([1, 2]), dtype=torch.float32)
    assert whole.dtype == torch.float32


def test_dates_and_words_are_no_numbers():
    """Fault: beside a column of numbers, dates were counted in microseconds."""
    pandas = pytest.importorskip("pandas")
    days = pandas.Series(pandas.date_range("2020-01-01", periods=3))
    table = pandas.DataFrame(
        {"a": [1.0, 2.0, 3.0], "day": days, "since": days - days[0]}
    )
    with pytest.raises(
        TypeError, match=r"x must be .* dates .*\['day', 'since'\]. Count"
    ):
        as_tensor("x", table)
    with pytest.raises(TypeError, match=r"dates or times in the column\(s\) \[0\]"):
        as_tensor("x", days)
    with pytest.raises(TypeError, match=r"dates or times in the column\(s\) \[0, 1\]"):
        as_tensor("x", np.stack([days, days], 1))
    with pytest.raises(TypeError, match=r"x must be .* got list: .*None"):
        as_tensor("x", [[1.0, None]])
