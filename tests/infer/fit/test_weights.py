"""Rows that count more than others: a whole weight is so many rows."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_ebm import EnergyModel, fit
from pyro_ebm.bases.rows import repetitions
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import MaximumLikelihood, log_likelihood
from pyro_ebm.infer.fit.points import Points, as_points
from pyro_ebm.infer.likelihood import mean_and_error

pytest.importorskip("sklearn")


def model():
    return EnergyModel(QuadraticEnergy(torch.zeros(2)))


def test_an_epoch_has_each_row_as_often_as_its_weight_says():
    """The objective over an epoch is that of repeated rows. Fault: one row too few."""
    rows, weights = torch.randn(60, 2), torch.randint(0, 4, (60,)).double()
    energy = NeuralEnergy((2,), (8,)).double()
    points = as_points("data", rows, EnergyModel(energy), weights)
    total = int(weights.sum())
    found = next(points.batches(total, None))
    repeated = rows.repeat_interleave(weights.long(), 0).double()
    assert len(found) == total
    assert abs(energy(found).mean() - energy(repeated).mean()) < 1e-6
    value, _ = mean_and_error(energy(rows.double()), weights)
    assert abs(value - energy(repeated).mean()) < 1e-6
    assert torch.equal(points.counted().sort(0).values, repeated.sort(0).values)


def test_other_weights_are_right_in_the_mean():
    weights = torch.tensor([0.1, 0.0, 2.5, 0.7])
    counts = torch.zeros(4)
    points = Points(torch.arange(4.0)[:, None], None, weights)
    for _ in range(4000):
        counts += torch.bincount(points.some(9)[:, 0].long(), minlength=4)
    torch.testing.assert_close(
        counts / counts.sum(), weights / weights.sum(), atol=0.01, rtol=0
    )
    assert repetitions(torch.tensor([1e6, 1.0])).tolist() == [0, 0]


def test_the_likelihood_of_weighted_points():
    """Mean and error; those of equal weights are as ever."""
    q, x = model().forward(), torch.randn(50, 2)
    whole = torch.randint(1, 5, (50,))
    found = log_likelihood(q, x, whole)
    repeated = log_likelihood(q, x.repeat_interleave(whole, 0))
    assert abs(found.value - repeated.value) < 1e-6
    assert found.std_error > 1.3 * repeated.std_error  # rows are no new data
    equal, plain = log_likelihood(q, x, torch.ones(50)), log_likelihood(q, x)
    assert equal.value == pytest.approx(plain.value)
    assert equal.std_error == pytest.approx(plain.std_error, rel=0.02)


def clusters(number=200):
    data = torch.randn(number, 2)
    data[: number // 2] -= 4
    return data, torch.where(data[:, 0] < -2, 3.0, 1.0)


@pytest.mark.slow
def test_the_fit_is_that_of_the_weighted_rows():
    """Three quarters of the mass where weights say so, in base and model."""
    data, weights = clusters()
    weights = weights.numpy().astype(np.float32)
    found = EnergyModel(NeuralEnergy((2,), (16,)))
    result = fit(found, data, weights=weights, num_steps=30, progress_bar=False)
    for draws in (found.base.sample((4000,)), result.distribution.sample((1000,))):
        assert abs((draws[:, 0] < -2).float().mean() - 0.75) < 0.09
    base = found.base.log_prob(data)
    assert result.validation.value > base.mean() - 0.5
    assert result.base.kind == "committee"


def test_an_estimator_learns_from_weighted_rows_too():
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return (x - self.loc).square() / 2

    data = torch.cat([torch.full((50,), -1.0), torch.full((50,), 1.0)])
    weights = torch.cat([torch.zeros(50), torch.ones(50)])
    found = EnergyModel(FunctionEnergy(Shifted(), ()))
    optim = torch.optim.Adam(found.parameters(), lr=0.05)
    objective = MaximumLikelihood(num_chains=64)
    settings = {"num_steps": 100, "optim": optim, "progress_bar": False}
    fit(found, data + 0.01 * torch.randn(100), objective, weights=weights, **settings)
    assert next(found.parameters()) > 0.4  # on its way from 0 to 1


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(3), r"weights must have shape \(10,\).*got \(3,\)"),
        (
            torch.tensor([1.0] * 9 + [-2.0]),
            "1 are not, the first of them -2.0 at",
        ),
        (torch.full((10,), torch.nan), "10 are not, the first of them nan at row 0"),
        (torch.tensor([0.0] * 9 + [1.0]), "positive for at least two rows, got 1"),
    ],
)
def test_bad_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        fit(model(), torch.randn(10, 2), weights=weights, progress_bar=False)


def test_a_stream_has_no_weights():
    loader = DataLoader(TensorDataset(torch.randn(20, 2)), batch_size=5)
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        as_points("data", loader, model(), torch.ones(20))
