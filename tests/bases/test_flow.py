"""A spline flow as a base."""

import pytest
import torch
from pyro.distributions import constraints

from pyro_ebm.bases import flow, normal

pytest.importorskip("zuko")


def banana(number):
    x = torch.randn(number, 2)
    return torch.stack([3 * x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]], 1)


def test_it_learns_what_a_normal_cannot():
    data, others = banana(2000), banana(2000)
    settings = {"num_transforms": 2, "hidden_features": (32,), "max_seconds": 4.0}
    before = torch.get_rng_state()
    base = flow(data, **settings, progress_bar=False)
    assert torch.equal(torch.get_rng_state(), before)
    gain = base.log_prob(others).mean() - normal(data).log_prob(others).mean()
    assert gain > 0.4
    draws = base.sample((4000,))
    assert (draws.mean(0) - data.mean(0)).abs().max() < 0.3
    assert not any(p.requires_grad for p in base.module.parameters())


def test_on_a_support():
    data = torch.rand(200, 2)
    unit = constraints.unit_interval
    base = flow(data, support=unit, max_seconds=0.3, progress_bar=False)
    draws = base.sample((50,))
    assert ((draws > 0) & (draws < 1)).all()
    assert base.log_prob(draws).shape == (50,)
