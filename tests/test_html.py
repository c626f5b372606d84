"""What a notebook shows: well-formed, escaped, with value, error and verdict."""

import math
from html.parser import HTMLParser
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_ebm
from pyro_ebm import EnergyDistribution, EnergyModel
from pyro_ebm.core import Finding, Reason, Status
from pyro_ebm.core.errors import UnreliableWarning
from pyro_ebm.core.html import columns_table, rows_table
from pyro_ebm.distributions import MixtureOfExperts, ProductOfExperts
from pyro_ebm.energies import FunctionEnergy, NeuralEnergy, QuadraticEnergy
from pyro_ebm.infer import FitRecord, LogLikelihood
from pyro_ebm.infer.fit.fit_result import FitResult
from pyro_ebm.mcmc import HMC, MCMC, ReplicaExchange
from pyro_ebm.partition import LogPartitionEstimate

ESTIMATE = LogPartitionEstimate(
    1.25, 0.125, 0.85, 1.65, 900.0, Status.OK, "walkers", 1_000
)
BAD = ESTIMATE._replace(
    status=Status.UNRELIABLE,
    reasons=(Finding(Reason.HEAVY_WEIGHTS, "k-hat > 0.7 & more"),),
)
ALLOWED = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


class Page(HTMLParser):
    """Reads a page, and fails where tags are not closed in order."""

    def __init__(self, source):
        super().__init__()
        self.stack, self.tags, self.cells, self.styles = [], set(), [], set()
        self.feed(source)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.stack.append(tag)
        self.tags.add(tag)
        self.styles |= {value for name, value in attrs if name == "style"}
        if tag in ("th", "td", "p", "caption"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        assert self.stack, f"text outside of the table: {data!r}"
        self.cells[-1] += data

    def __getitem__(self, name):
        """The cell to the right of a name."""
        return self.cells[self.cells.index(name) + 1]


def read(shown):
    page = Page(shown if isinstance(shown, str) else shown._repr_html_())
    assert page.tags <= ALLOWED, "neither scripts nor styles"
    # No colour of its own: it would be unreadable on one of light and dark.
    assert page.styles <= {"text-align: left", "color: inherit; text-align: left"}
    return page


def ring():
    return FunctionEnergy(lambda x: 8 * (x.norm(dim=-1) - 2) ** 2, (2,))


def wide(size=2):
    return dist.Normal(torch.zeros(size), 1.5).to_event(1)


def test_page_finds_what_is_not_closed():
    with pytest.raises(AssertionError):
        Page("<table><tr></table>")
    with pytest.raises(AssertionError):
        Page("<table>")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a & b", '"q"', "<b>"])
def test_names_are_escaped(name):
    assert read(rows_table(name, {name: name})).cells == [name] * 3
    assert read(columns_table([name], [[name]], name)).cells == [name] * 3


def test_empty_values_are_left_out():
    assert read(rows_table("title", {"a": "", "b": "1"})).cells == ["title", "b", "1"]
    assert "p" not in read(columns_table(["a"], [["1"]])).tags


def test_estimate():
    page = read(ESTIMATE)
    assert page["log Z"] == "1.2500 +- 0.1250 nats"
    assert page["95 % interval"] == "0.8500 to 1.6500"
    assert (page["verdict"], page["method"]) == ("ok", "walkers")
    assert read(BAD)["verdict"] == "unreliable: k-hat > 0.7 & more"
    exact = ESTIMATE._replace(ess=math.nan, status="exact")
    assert "effective sample size" not in read(exact).cells


def test_distribution_with_log_z():
    q = EnergyDistribution(ring(), ESTIMATE).expand([3])
    page = read(q)
    assert page.cells[0] == "EnergyDistribution"
    assert page["density"] == "exp(-f(x)) / Z, f: FunctionEnergy"
    assert (page["batch shape"], page["event shape"]) == ("(3,)", "(2,)")
    assert page["log Z"] == "1.2500 +- 0.1250 nats"
    assert page["verdict"] == "known"
    assert repr(q) == (
        "EnergyDistribution(FunctionEnergy, batch_shape: (3,), event_shape: (2,), "
        "log Z: 1.2500 +- 0.1250)"
    )


def test_distribution_without_reliable_log_z():
    unknown = EnergyDistribution(ring())
    assert read(unknown)["log Z"] == "unknown"
    assert read(unknown)["verdict"] == "not known"
    assert repr(unknown).endswith("log Z: unknown)")
    with pytest.warns(UnreliableWarning, match="k-hat"):
        q = EnergyDistribution(ring(), BAD)
    assert read(q)["log Z"] == "unknown (1.2500 +- 0.1250 is unreliable)"
    assert read(q)["verdict"] == "unreliable"
    assert "log Z: unknown (1.2500 +- 0.1250 is unreliable)" in repr(q)


def test_a_log_z_with_a_gradient_is_shown_without_a_warning():
    energy = QuadraticEnergy(torch.zeros(2))
    q = EnergyDistribution(energy, energy.closed_form().log_partition)
    assert q.log_partition.requires_grad
    assert read(q)["log Z"] == "1.8379 nats"


def test_product():
    product = ProductOfExperts([ring(), wide()], [1.0, 0.5])
    page = read(product)
    assert page["density"] == "FunctionEnergy(...) * Normal(...) ** 0.5 / Z"
    assert page["verdict"] == "not known"
    assert page["support"] == str(product.support)


def test_product_without_a_partition_function():
    page = read(ProductOfExperts([wide(), wide()], [1.0, -1.5]))
    assert page["verdict"].startswith("not normalizable: ")
    assert page["log Z"] == "unknown"


def test_mixture_and_conditional():
    mixture = MixtureOfExperts([EnergyDistribution(ring(), ESTIMATE), wide()])
    assert read(mixture)["density"] == "0.5 FunctionEnergy + 0.5 Normal"
    assert read(mixture)["log Z"] == "0.0000 +- 0.0625 nats"
    given = EnergyDistribution(ring()).condition({0: 1.0})
    assert (
        read(given)["density"] == "exp(-f(u, v)) / Z_v, f: FunctionEnergy | 1 observed"
    )


def test_model():
    model = EnergyModel(NeuralEnergy((2,), (4,), base=wide()), wide())
    page = read(model)
    assert (page["energy"], page["log Z"]) == ("NeuralEnergy", "unknown")
    assert page["verdict"].startswith("unreliable: ")
    assert (
        page["parameters"]
        == "17"
        == str(sum(p.numel() for p in model.energy.parameters()))
    )
    model.log_partition.refresh(model.energy)
    tracked = model.log_partition
    assert page["base"] == str(model.base)
    assert read(model)["log Z"] == (
        f"{tracked.value.item():.4f} +- {tracked.std_error.item():.4f} nats"
    )
    assert read(model)["verdict"] == tracked.status
    assert f"log Z: {tracked.value.item():.4f} +- " in repr(model)


def test_model_with_a_closed_form_knows_log_z_at_once():
    model = EnergyModel(QuadraticEnergy(torch.zeros(2)), wide())
    assert read(model)["log Z"] == "1.8379 nats"
    assert read(model)["verdict"] == "exact"
    assert "log Z: 1.8379 [exact]" in repr(model)


def test_run_of_chains():
    mcmc = MCMC(HMC(), 20, 20, 8, progress_bar=False)
    with pytest.warns(UnreliableWarning):
        mcmc.run(QuadraticEnergy(torch.zeros(2)))
    page = read(mcmc.diagnostics())
    assert page["chains"] == "8 of 20 draws"
    assert page["verdict"] == f"unreliable: {mcmc.diagnostics().reason}"
    summary = read(mcmc.summary())
    assert {"mean", "sd", "mcse", "x[0]", "x[1]"} < set(summary.cells)
    assert summary.cells[-1] == str(mcmc.diagnostics())


def test_names_of_sites_are_escaped():
    mcmc = MCMC(HMC(), 20, 20, 8, progress_bar=False)
    with pytest.warns(UnreliableWarning):
        mcmc.run(lambda: pyro.sample("<i>a</i>", dist.Normal(0.0, 1.0)))
    assert "<i>a</i>" in read(mcmc.summary()).cells


def test_replica_exchange():
    energy = FunctionEnergy(lambda x: x**2 / 2, ())
    sampler = ReplicaExchange(dist.Normal(torch.tensor(0.0), 2.0), HMC(), 3)
    found = sampler.run(energy, 20, 16)
    page = read(found)
    assert page["draws"] == "16 chains of 20"
    assert page["verdict"] == found.status
    assert page["log Z"] == (
        f"{found.log_partition:.4f} +- {found.log_partition_std_error:.4f} nats"
    )
    assert "verdict: ok" in str(found)
    assert "tensor" not in str(found)


@pytest.mark.parametrize("num_records", [0, 2, 9])
def test_fit(num_records):
    value = LogLikelihood(-2.0, 0.41, 0.4, 0.1, True)
    history = [
        FitRecord(100 * k, 2.0, value, value, ESTIMATE)
        for k in range(1, num_records + 1)
    ]
    q = EnergyDistribution(ring(), ESTIMATE)
    result = SimpleNamespace(
        distribution=q,
        log_partition=BAD,
        history=history,
        num_steps=900,
        stopped="early stopping",
        train=value,
        validation=value if num_records else None,
        verdict="not at equilibrium",
        reasons=("the chains <lag>",),
    )
    page = read(FitResult._repr_html_(result))
    assert page["log Z"] == "1.2500 +- 0.1250 nats"
    assert page["log Z verdict"] == "unreliable: k-hat > 0.7 & more"
    assert page["ended"] == "early stopping after 900 steps"
    assert page["model"] == repr(q)
    assert page.cells.count("ok") == min(num_records, 6)
    if num_records:
        assert page["held-out log-likelihood"] == "-2.0000 +- 0.4100 nats a point"
        assert {"100", f"{100 * num_records}"} < set(page.cells)
    else:
        assert "held-out log-likelihood" not in page.cells
    assert page["verdict"] == "not at equilibrium: the chains <lag>"


def test_a_real_fit():
    model = EnergyModel(NeuralEnergy((2,), (4,), base=wide()), wide())
    data = torch.randn(50, 2)
    settings = {"num_steps": 4, "record_interval": 2, "progress_bar": False}
    result = pyro_ebm.fit(model, data, validation_data=data, **settings)
    page = read(result._repr_html_())
    assert page["ended"] == "finished after 4 steps"
    assert "+-" in page["held-out log-likelihood"]
    assert f"{result.log_partition.value:.4f} +- " in page["log Z"]
