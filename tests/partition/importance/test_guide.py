"""Weights of draws of a guide by runs of the model."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, AutoStructured, init_to_value

from pyro_ebm.partition.importance.guide import GuideRuns

DATA = torch.tensor([0.3, -0.2, 1.1, 0.8, 0.4], dtype=torch.float64)


def truth():
    zeros = torch.zeros(5)
    return dist.MultivariateNormal(zeros, torch.eye(5) + 1).log_prob(DATA).item()


def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(DATA)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=DATA)


def guide():
    pyro.sample("z", dist.Normal(0.4, 0.6))


def one_at_a_time():
    """The same, written so that it cannot be vectorised."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    offset = 0.0 if z.item() > 1e6 else z
    pyro.factor("y", dist.Normal(offset, 1.0).log_prob(DATA).sum())


def silently_wrong():
    """The same for one draw; among many, the sum goes over all draws too."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("y", dist.Normal(z[..., None], 1.0).log_prob(DATA).sum())


def mean_weight(log_weights):
    """Of Z, in units of the truth, and its standard error."""
    ratio = (log_weights - truth()).exp()
    return ratio.mean().item(), ratio.std().item() / math.sqrt(len(ratio))


@pytest.mark.parametrize("proposal", [guide, None])
@pytest.mark.parametrize(
    ("written", "is_vectorized"),
    [(model, True), (one_at_a_time, False), (silently_wrong, False)],
)
def test_weights_are_unbiased(written, proposal, is_vectorized):
    """Planted fault: no comparison with single draws; the last model is wrong."""
    runs = GuideRuns(written, proposal, (), {})
    assert runs.is_vectorized == is_vectorized
    assert bool(runs.why_not) != is_vectorized
    value, error = mean_weight(runs.draw(2000 if is_vectorized else 400))
    assert abs(value - 1) < 4 * error


def test_exact_posterior_as_guide_gives_the_evidence_without_error():
    """Planted fault: the guide's log-probability left out of single draws.

    Left out of many draws at once, the comparison with single draws finds it.
    """

    def posterior():
        pyro.sample("z", dist.Normal(DATA.sum() / 6, 6**-0.5))

    log_weights = GuideRuns(model, posterior, (), {}).draw(100)
    assert torch.allclose(log_weights, torch.tensor(truth()), atol=1e-10)


@pytest.mark.parametrize("auto", [AutoNormal, AutoStructured])
def test_autoguides_with_auxiliary_sites(auto):
    start = init_to_value(values={"z": torch.tensor(0.4)})
    runs = GuideRuns(model, auto(model, init_loc_fn=start, init_scale=0.6), (), {})
    value, error = mean_weight(runs.draw(500))
    assert abs(value - 1) < 4 * error


def test_one_draw_that_raises_is_one_draw_of_weight_zero():
    """At a covariance that is not positive definite, by the bad luck of one draw."""

    def sometimes():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        matrix = torch.eye(2) + torch.where(z > 2.5, -2.0, 0.0) * torch.eye(2)
        torch.linalg.cholesky(matrix)
        with pyro.plate("data", len(DATA)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA)

    torch.manual_seed(0)
    runs = GuideRuns(sometimes, None, (), {})
    log_weights = torch.cat([runs.draw(100) for _ in range(8)])
    assert 0 < runs.num_failed < 40
    assert (log_weights == -torch.inf).sum() == runs.num_failed
    value, error = mean_weight(log_weights)
    assert abs(value - 1) < 4 * error  # the posterior has nothing there


def test_a_model_that_always_raises_says_so():
    def broken():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        GuideRuns(broken, None, (), {})


def test_subsampling_is_refused():
    def subsampled():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(z, 1.0), obs=DATA[rows])

    with pytest.raises(ValueError, match="must hold all 5 rows, got a subsample of 2"):
        GuideRuns(subsampled, guide, (), {})
