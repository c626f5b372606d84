"""Bases survive torch.save, with weights_only."""

import io

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import bases
from pyro_ebm.bases.saving import from_state, to_state
from pyro_ebm.bases.stack import Stack

pytest.importorskip("sklearn")


def fitted(kind, data, support=None):
    settings = {"support": support}
    if kind == "flow":
        pytest.importorskip("zuko")
        settings |= {"max_seconds": 0.3, "progress_bar": False}
    return getattr(bases, kind)(data, **settings)


def again(base, support=None):
    stream = io.BytesIO()
    torch.save(to_state(base), stream)
    stream.seek(0)
    return from_state(torch.load(stream, weights_only=True), support)


@pytest.mark.parametrize(
    "kind", ["normal", "gaussian_mixture", "kernel_density", "independent", "flow"]
)
@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
def test_it_is_the_same_density(kind, shape):
    if kind == "flow" and shape == ():
        pytest.skip("a flow needs two dimensions")
    data = torch.randn(100, *shape) * 2 + 1
    base = fitted(kind, data)
    assert torch.equal(again(base).log_prob(data), base.log_prob(data))
    assert again(base).event_shape == data.shape[1:]


@pytest.mark.parametrize("kind", ["normal", "gaussian_mixture", "independent"])
def test_on_another_support(kind):
    support = dist.constraints.independent(dist.constraints.unit_interval, 1)
    data = torch.rand(100, 3)
    base = fitted(kind, data, support)
    assert torch.equal(again(base, support).log_prob(data), base.log_prob(data))
    assert (again(base, support).sample((50,)) < 1).all()


def test_counts_and_mixtures():
    counts = bases.independent(torch.randint(0, 3, (100, 2)))
    rows = torch.randint(0, 3, (10, 2))
    assert torch.equal(again(counts).log_prob(rows), counts.log_prob(rows))
    data = torch.randn(100, 2)
    mixture = Stack(
        [bases.normal(data), bases.independent(data)], torch.tensor([0.4, 0.6])
    )
    assert torch.equal(again(mixture).log_prob(data), mixture.log_prob(data))


def test_a_base_of_another_origin():
    with pytest.raises(TypeError, match="base must come from pyro_ebm.bases.*Gamma"):
        to_state(dist.Gamma(2.0, 1.0))
