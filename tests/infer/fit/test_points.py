"""Data as people have them."""

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_ebm import EnergyModel
from pyro_ebm.energies import QuadraticEnergy
from pyro_ebm.infer.fit.points import as_points

ROWS = torch.randn(100, 2)


def model():
    return EnergyModel(QuadraticEnergy(torch.zeros(2)))


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        ROWS.numpy(),
        ROWS.double(),
        ROWS.tolist(),
        TensorDataset(ROWS),
        TensorDataset(ROWS, torch.zeros(100)),
    ],
)
def test_kinds_of_data(data):
    found = as_points("data", data, model())
    assert found.rows.dtype == torch.get_default_dtype()
    assert torch.allclose(found.rows, ROWS.to(found.rows))


def test_a_table_of_pandas():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(ROWS.numpy(), columns=["a", "b"])
    found = as_points("data", table, model()).rows
    assert torch.allclose(found, ROWS.to(found))
    mixed = pandas.DataFrame({"a": [True, False], "b": [3, 4]})
    assert as_points("data", mixed, model()).rows.tolist() == [[1, 3], [0, 4]]
    words = pandas.DataFrame({"a": ["x", "y"], "b": [3, 4]})
    with pytest.raises(TypeError, match=r"of numbers, got words .* \['a'\]\. Number"):
        as_points("data", words, model())
    words["a"] = pandas.Categorical(words["a"])
    with pytest.raises(TypeError, match="data must be a tensor, an array or a table"):
        as_points("data", words, model())


def test_an_array_of_objects():
    """Numbers are taken, with what is missing as nan; words are refused with a way out.
    Planted fault, seen to fail: torch's own complaint of the type of the array."""
    numbers = np.array([[1, 2.5], [None, 4]], dtype=object)
    found = as_points("data", numbers, model(), may_miss=True)
    assert found.missing.tolist() == [[False, False], [True, False]]
    for words in (
        np.array([["x", "3"], ["y", "4"]]),
        np.array([["x", 3], ["y", 4]], "O"),
    ):
        with pytest.raises(
            TypeError, match=r"of numbers, got words .* \[0\]\. .*unique"
        ):
            as_points("data", words, model())


def test_what_is_missing_for_pandas():
    """Seen to be refused: columns of which one holds pandas.NA are objects."""
    pandas = pytest.importorskip("pandas")
    column = pandas.array([1.5, pandas.NA, 2.0], dtype="Float64")
    table = pandas.DataFrame({"a": column, "b": [3, 4, 5]})
    found = as_points("data", table, model(), may_miss=True)
    assert found.missing.tolist() == [[False, False], [True, False], [False, False]]
    assert found.rows[:, 1].tolist() == [3, 4, 5]


def test_a_conversion_is_said_once(caplog):
    with caplog.at_level(logging.INFO, "pyro_ebm.infer.fit.points"):
        as_points("data", np.arange(20).reshape(10, 2), model())
    assert [r.getMessage() for r in caplog.records] == [
        f"data: converted from torch.int64 to {torch.get_default_dtype()}"
    ]


@pytest.mark.parametrize("data", [1e8 + ROWS.double(), 10**9 + torch.arange(200)])
def test_rows_that_a_type_does_not_tell_apart_are_refused(data):
    """Fault: three values in place of a hundred, and a density of these."""
    narrow = EnergyModel(QuadraticEnergy(torch.zeros(2, dtype=torch.float32)))
    data = data.reshape(100, 2)
    with pytest.raises(ValueError, match=r"column 0 has a .*learn in float64: Energy"):
        as_points("data", data, narrow)
    if data.is_floating_point():
        data[:, 0] = torch.nan
        with pytest.raises(ValueError, match=r"column 1 has a"):
            as_points("data", data, narrow)
    as_points("data", 1e6 + ROWS.double(), narrow)
    same = torch.full((100, 2), 0.1 + 0.2, dtype=torch.float64)
    same[::2] = 0.3  # rounding alone
    as_points("data", same, narrow)
    assert as_points("data", 1e8 + ROWS.double(), model()).rows.std() > 0.5


def test_batches_go_through_all_rows():
    points = as_points("data", ROWS, model())
    batches = points.batches(25, model())
    epoch = torch.cat([next(batches) for _ in range(4)])
    assert torch.equal(epoch.sort(0).values, ROWS.to(epoch).sort(0).values)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream(num_workers):
    loader = DataLoader(TensorDataset(ROWS), batch_size=20, num_workers=num_workers)
    points = as_points("data", loader, model())
    assert torch.equal(points.rows, ROWS.to(points.rows))
    batches = points.batches(7, model())
    seen = torch.cat([next(batches) for _ in range(10)])  # of two epochs
    assert torch.equal(seen, torch.cat([ROWS, ROWS]).to(seen))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("rows", TypeError, "data must be a tensor, an array or a table.*str"),
        (Stream(), TypeError, "data is an IterableDataset.*DataLoader"),
        (DataLoader(TensorDataset(ROWS[:0])), ValueError, "data must have batches"),
        (np.zeros((5, 3)), ValueError, r"data must have shape.*\(5, 3\)"),
        (np.full((5, 2), np.nan), ValueError, "5 points with 10 nan"),
    ],
)
def test_bad_data(data, error, message):
    with pytest.raises(error, match=message):
        as_points("data", data, model())
