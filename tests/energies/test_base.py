"""What the base class of energies does for all of them."""

import torch
from torch import nn

from pyro_ebm.energies.base import live_or_parameter


def test_a_tensor_with_a_graph_stays_live():
    """Seen to fail with a copy of the value instead of the tensor itself."""
    module, latent = nn.Module(), torch.ones(2, requires_grad=True)
    live_or_parameter(module, "value", 2 * latent)
    module.double().value.sum().backward()
    assert latent.grad.equal(torch.full((2,), 2.0))
    assert not list(module.parameters())
    assert not module.state_dict()


def test_a_leaf_that_is_no_parameter_of_a_module_stays_live():
    """``pyro.param`` gives such."""
    module, leaf = nn.Module(), torch.ones(2, requires_grad=True)
    live_or_parameter(module, "value", leaf)
    assert module.value is leaf


def test_a_parameter_is_shared_and_a_plain_tensor_copied():
    module, parameter, plain = nn.Module(), nn.Parameter(torch.ones(2)), torch.ones(2)
    live_or_parameter(module, "shared", parameter)
    live_or_parameter(module, "own", plain)
    assert module.shared is parameter
    assert isinstance(module.own, nn.Parameter)
    plain.zero_()
    assert module.own.detach().equal(torch.ones(2))
    assert list(module.state_dict()) == ["shared", "own"]
