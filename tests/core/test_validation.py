"""The checks of distributions are as they were after whatever switched them off."""

import contextlib
import sys

import pyro
import pytest
import torch
from torch.distributions import Distribution

from pyro_ebm.bases.flow import new_flow
from pyro_ebm.core.validation import without_validation
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
        new_flow({**empty, "module": {}})
    assert all(switches())
