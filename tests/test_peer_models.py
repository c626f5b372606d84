"""The models that chains are compared on: one density in Pyro and in NumPyro."""

import json
import sys
from pathlib import Path

import pyro
import pyro.poutine as poutine
import pytest
import torch

from pyro_ebm.energies import PyroModelEnergy

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import report  # noqa: E402
from bench_peers import LIMIT, main, rate, summarise  # noqa: E402
from peer_models import MODELS, numpyro_language, pyro_language  # noqa: E402


@pytest.fixture(autouse=True)
def double():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def log_density(model, sites):
    return poutine.trace(poutine.condition(model, sites)).get_trace().log_prob_sum()


@pytest.mark.parametrize("name", MODELS)
def test_recorded_density_is_the_models(name):
    """Its energy and the model itself differ by the Jacobian alone."""
    model = MODELS[name].model(pyro_language())
    energy = PyroModelEnergy(model)
    pyro.set_rng_seed(0)
    points = energy.initial_points(2)
    sites = energy.constrain(points)
    direct = [log_density(model, {k: v[i] for k, v in sites.items()}) for i in (0, 1)]
    found = -energy(points) - energy.log_abs_det(points)
    torch.testing.assert_close(found, torch.stack(direct), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_numpyro_has_the_same_density(name):
    numpyro = pytest.importorskip("numpyro")
    numpyro.enable_x64()
    from numpyro.infer.util import log_density as theirs

    model = MODELS[name].model(pyro_language())
    energy = PyroModelEnergy(model)
    pyro.set_rng_seed(1)
    sites = {k: v[0] for k, v in energy.constrain(energy.initial_points(1)).items()}
    other = MODELS[name].model(numpyro_language())
    found = theirs(other, (), {}, {k: v.numpy() for k, v in sites.items()})[0]
    assert float(found) == pytest.approx(float(log_density(model, sites)), rel=1e-9)


def run(method, seed, cpu, ess, r_hat=1.0, compiling=0.0):
    row = {"model": "line", "method": method, "seed": seed, "num_draws": 1}
    return row | {"cpu": cpu, "compiling": compiling, "ess": ess, "r_hat": r_hat}


def test_rates_and_ratios():
    runs = [
        run("pyro_ebm", 0, 2.0, 400.0),
        run("pyro_ebm", 1, 2.0, 600.0),
        run("numpyro", 0, 10.0, 500.0, compiling=5.0),
        run("numpyro", 1, 10.0, 500.0, compiling=5.0),
        run("blackjax", 0, 1.0, 500.0, r_hat=1.3),  # drew something else
        run("blackjax", 1, LIMIT, 0.0, r_hat=9.0),
    ]
    ((ratios,), rows) = summarise(runs)
    assert ratios["over numpyro"] == pytest.approx((200 / 50 + 300 / 50) / 2)
    assert ratios["over numpyro, not compiling"] == pytest.approx(2.5)
    assert ratios["over blackjax"] == float("inf")
    assert ratios["over nutpie"] == ""
    assert [row["rounds"] for row in rows] == [2, 2, 2]
    assert rate(runs[4]) == 0


def test_smoke(tmp_path, monkeypatch):
    """The script runs where no peer is installed, and touches no result."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", "--smoke-test"])
    main()
    tables = json.loads((tmp_path / "peers-smoke.json").read_text("utf-8"))["tables"]
    (row,) = tables["Runs"]
    assert row["method"] == "pyro_ebm"
    assert row["cpu"] > 0
    assert row["ess"] > 0
