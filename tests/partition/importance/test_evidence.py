"""Log evidence of Pyro models by importance sampling."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value

from pyro_ebm.partition.importance.evidence import importance_sampling_of_model

DATA = torch.tensor([0.3, -0.2, 1.1, 0.8, 0.4], dtype=torch.float64)


def truth(data=DATA):
    """z ~ N(0, 1), y_i ~ N(z, 1): the data are jointly Gaussian."""
    covariance = torch.eye(len(data)) + 1
    zeros = torch.zeros(len(data))
    return dist.MultivariateNormal(zeros, covariance).log_prob(data).item()


def model(data=DATA):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)


def guide(data=DATA):
    pyro.sample("z", dist.Normal(0.4, 0.6))


def one_at_a_time(data=DATA):
    """The same, written so that it cannot be vectorised."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    offset = 0.0 if z.item() > 1e6 else z
    pyro.factor("y", dist.Normal(offset, 1.0).log_prob(data).sum())


def silently_wrong(data=DATA):
    """The same for one draw; among many, the sum goes over all draws too."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("y", dist.Normal(z[..., None], 1.0).log_prob(data).sum())


def assert_right(estimate, truth):
    assert estimate.status == "ok", estimate.reason
    assert estimate.lower <= truth <= estimate.upper
    assert estimate.std_error < 0.1


@pytest.mark.parametrize("proposal", [guide, None])
def test_conjugate_model(proposal):
    estimate = importance_sampling_of_model(model, proposal)
    assert_right(estimate, truth())
    assert estimate.num_evaluations == 10_000
    assert "vectorised" in estimate.method


def test_exact_posterior_as_guide_gives_the_evidence_without_error():
    """Planted fault: the guide's log-probability left out of single draws.

    Left out of many draws at once, the comparison with single draws finds it.
    """

    def posterior(data=DATA):
        precision = 1 + len(data)
        scale = precision**-0.5
        pyro.sample("z", dist.Normal(data.sum() / precision, scale))

    estimate = importance_sampling_of_model(model, posterior, num_samples=100)
    assert estimate.value == pytest.approx(truth(), abs=1e-10)
    assert estimate.std_error < 1e-10


def test_estimate_is_unbiased():
    """First and second moment over 100 runs of 200 draws."""
    runs = [
        importance_sampling_of_model(model, guide, num_samples=200).value
        for _ in range(100)
    ]
    ratio = (torch.tensor(runs) - truth()).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(100)
    big = importance_sampling_of_model(model, guide, num_samples=20_000)
    expected = big.std_error**2 * 20_000 / 200
    deviation = (ratio - 1) ** 2
    assert abs(deviation.mean() - expected) < 4 * deviation.std() / math.sqrt(100)


@pytest.mark.parametrize("written", [one_at_a_time, silently_wrong])
def test_code_that_cannot_be_vectorised(written):
    """Planted fault: no comparison with single draws; the second model is wrong."""
    estimate = importance_sampling_of_model(written, guide, num_samples=400)
    assert "one by one" in estimate.method
    assert_right(estimate, truth())
    with pytest.raises(ValueError, match="vectorized=True is not possible"):
        importance_sampling_of_model(written, guide, num_samples=50, vectorized=True)


def test_both_ways_agree():
    many = importance_sampling_of_model(model, guide, num_samples=2000)
    single = importance_sampling_of_model(
        model, guide, num_samples=500, vectorized=False
    )
    error = math.hypot(many.std_error, single.std_error)
    assert abs(many.value - single.value) < 4 * error


def test_arguments_are_passed_on():
    estimate = importance_sampling_of_model(model, guide, data=DATA[:3])
    assert_right(estimate, truth(DATA[:3]))
    estimate = importance_sampling_of_model(model, guide, DATA[:3], batch_size=999)
    assert_right(estimate, truth(DATA[:3]))


def test_nested_plates_and_several_sites():
    data = torch.randn(3, 4)

    def nested():
        scale = pyro.sample("scale", dist.Gamma(3.0, 3.0))
        columns = pyro.plate("columns", 4, dim=-1)
        with pyro.plate("rows", 3, dim=-2):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with columns:
                pyro.sample("y", dist.Normal(loc, scale + 0.5), obs=data)

    def proposal():
        pyro.sample("scale", dist.Gamma(4.0, 4.0))
        with pyro.plate("rows", 3, dim=-2):
            loc = 0.7 * data.mean(-1, keepdim=True)
            pyro.sample("loc", dist.Normal(loc, 0.6))

    many = importance_sampling_of_model(nested, proposal, num_samples=5000)
    single = importance_sampling_of_model(
        nested, None, num_samples=500, vectorized=False
    )
    assert "vectorised" in many.method
    assert abs(many.value - single.value) < 4 * math.hypot(
        many.std_error, single.std_error
    )


def test_autoguide():
    start = init_to_value(values={"z": torch.tensor(0.4)})
    auto = AutoNormal(model, init_loc_fn=start, init_scale=0.6)
    assert_right(importance_sampling_of_model(model, auto, num_samples=5000), truth())


def test_poor_guide_is_flagged():
    def far():
        pyro.sample("z", dist.Normal(6.0, 0.3))

    estimate = importance_sampling_of_model(lambda: model(), far)
    assert estimate.status == "unreliable"
    assert "k-hat" in estimate.reason


def test_guide_with_other_sites_is_refused():
    def other():
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"missing are \['z'\], not in the model"):
        importance_sampling_of_model(lambda: model(), other)


def test_subsampling_is_refused():
    def subsampled():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA[rows])

    def proposal():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="must hold all 5 rows, got a subsample of 2"):
        importance_sampling_of_model(subsampled, proposal)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="got 3 and 1000"):
        importance_sampling_of_model(model, guide, num_samples=3)


def test_batch_of_one_left_over():
    estimate = importance_sampling_of_model(model, guide, num_samples=1001)
    assert_right(estimate, truth())
