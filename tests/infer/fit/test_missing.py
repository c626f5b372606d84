"""Missing entries while an energy learns, and after."""

import logging

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyModel, bases, fit
from pyro_ebm.bases.conditional import conditional_draws
from pyro_ebm.energies import NeuralEnergy
from pyro_ebm.infer import MaximumLikelihood, log_likelihood
from pyro_ebm.infer.fit.missing import Candidates, imputed

pytest.importorskip("sklearn")


class Tilted(NeuralEnergy):
    """A normal base, and the energy of another normal as its correction."""

    def __init__(self, base, to):
        super().__init__((2,), (4,), base=base)
        self.to = to

    def correction(self, x):
        return self.base.log_prob(x) - self.to.log_prob(x)


def normals():
    cov = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    base = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) * 1.5)
    return base, dist.MultivariateNormal(torch.tensor([0.3, 0.0]), cov)


def test_weights_make_of_the_bases_conditional_that_of_the_model():
    """In closed form. Fault: draws of the base as they come."""
    base, model = normals()
    energy = Tilted(base, model)
    x = torch.tensor([[1.0, torch.nan], [0.2, -0.4]]).repeat(500, 1)
    found = imputed(base, energy, x, 4, 400)
    mean = 0.8 * (1.0 - 0.3)
    draws = found.draws[:, ::2, 1]
    assert abs(draws.mean() - mean) < 0.05
    assert abs(draws.std() - 0.6) < 0.05
    assert abs(found.mean[::2, 1].mean() - mean) < 0.01
    assert torch.equal(found.draws[0, 1::2], x[1::2])
    assert (found.effective[1::2] == 400).all()
    assert 50 < found.effective[::2].mean() < 390


def test_candidates_are_chosen_by_the_energy_as_it_is_now():
    """Of batches, too. Fault: rows that get the candidates of others."""
    base, model = normals()
    energy = Tilted(base, base)  # no correction yet
    x = torch.stack([torch.arange(600.0) / 600, torch.full((600,), torch.nan)], 1)
    x[::3, 1] = 9.0  # seen
    found = Candidates(base, energy, x.nan_to_num(), x.isnan())
    index = torch.randperm(600)
    gone = index % 3 != 0
    filled = found.fill(x[index], index)
    assert torch.equal(filled[:, 0], x[index, 0])
    assert (filled[~gone, 1] == 9).all()
    assert abs(filled[gone, 1].mean()) < 0.25
    energy.to = model
    found.weigh(energy)
    filled = found.fill(x[index], index)[gone]
    slope = filled[:, 0].sub(0.3).mul(0.8)
    assert abs((filled[:, 1] - slope).mean()) < 0.1
    assert abs((filled[:, 1] - slope).std() - 0.6) < 0.06


def rows(number):
    x = torch.randn(number, 1)
    return torch.cat([x, x.square() - 1 + 0.3 * torch.randn(number, 1)], 1)


@pytest.mark.slow
def test_a_fit_learns_from_rows_of_which_a_part_is_missing(caplog):
    """Nearly what it learns from whole rows, and imputes better than a normal."""
    data, test = rows(400), rows(500)
    gone = torch.rand(400, 2) < 0.15
    data = data.where(~gone, torch.nan)
    data[3] = torch.nan
    with caplog.at_level(logging.INFO, "pyro_ebm.infer.fit.points"):
        model = EnergyModel(NeuralEnergy((2,), (32,)))
        result = fit(model, data.numpy(), num_steps=200, progress_bar=False)
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "rows without any entry are dropped" in text
    assert "entries of" in text
    whole = bases.committee(data[~data.isnan().any(1)])
    learned = log_likelihood(result.distribution, test).value
    assert learned > whole.log_prob(test).mean() - 0.1
    assert result.status == "ok"
    hidden, test = test[:100].clone(), test[:100]
    hidden[:, 1] = torch.nan
    error = (result.impute(hidden).mean - test)[:, 1].square().mean().sqrt()
    line = bases.normal(test)
    mixture = bases.conditional.as_mixture(line)
    guess = conditional_draws(mixture, hidden, hidden.isnan(), 200).mean(0)
    assert error < 0.5 * (guess - test)[:, 1].square().mean().sqrt()
    assert result.impute(hidden, 3).draws.shape == (3, 100, 2)


def settings(**others):
    return {"num_steps": 5, "progress_bar": False, **others}


def test_what_cannot_be_filled_is_refused():
    gone = rows(60)
    gone[5, 0] = torch.nan
    base = bases.normal(rows(60))
    with pytest.raises(ValueError, match=r"EnergyModel\(energy\). Or drop the rows"):
        fit(EnergyModel(NeuralEnergy((2,), (4,)), base), gone, **settings())
    model = EnergyModel(NeuralEnergy((2,), (4,)))
    with pytest.raises(ValueError, match="finite numbers; got 60 points with 1 nan"):
        fit(model, gone, MaximumLikelihood(), **settings())
    with pytest.raises(ValueError, match="finite numbers; got 60 points with 1 nan"):
        fit(model, rows(60), validation_data=gone, **settings())
    gone[:, 0] = torch.nan
    with pytest.raises(ValueError, match=r"no entry at all in column\(s\) \[0\]"):
        fit(EnergyModel(NeuralEnergy((2,), (4,))), gone, **settings())


def test_without_complete_rows_nothing_is_held_out(caplog):
    data = rows(60)
    data[torch.arange(60), torch.arange(60) % 2] = torch.nan
    with caplog.at_level(logging.WARNING, "pyro_ebm.infer.fit.automatic"):
        result = fit(EnergyModel(NeuralEnergy((2,), (4,))), data, **settings())
    assert result.validation is None
    assert "too few to hold out" in caplog.text


def test_impute_says_what_it_cannot():
    data = rows(60)
    result = fit(EnergyModel(NeuralEnergy((2,), (4,))), data, **settings())
    with pytest.raises(ValueError, match=r"shape \(N, \*event\).*\(2,\), got \(2,\)"):
        result.impute(data[0])
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        result.impute(data, 0)
    with pytest.raises(TypeError, match="the base, NoneType, is no mixture"):
        result._replace(base=None).impute(data.where(data > 0, torch.nan))
    array = data.where(data > 0, torch.nan).double().numpy()
    assert result.impute(array).mean.isfinite().all()
