"""Modes and their curvature, found by descent."""

import math

import torch

from pyro_ebm.partition.exact.modes import find_modes


class Target:
    def __init__(self, function):
        self.function = function

    def value(self, u):
        with torch.no_grad():
            return self.function(u)

    def value_and_grad(self, u):
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self.function(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    def may_go_on(self):
        return True


def test_a_gaussian_is_its_mode():
    root = torch.tensor([[2.0, 0.0], [30.0, 0.1]])
    matrix = (root @ root.mT).inverse()
    target = Target(lambda u: (((u - 7) @ matrix) * (u - 7)).sum(-1) / 2 + 3)
    modes = find_modes(target, 5 * torch.randn(50, 2))
    assert len(modes.loc) == 1
    assert torch.allclose(modes.loc[0], torch.tensor([7.0, 7.0]), atol=1e-3)
    assert torch.allclose(modes.root[0] @ modes.root[0].mT, root @ root.mT, rtol=1e-3)
    expected = math.log(2 * math.pi) + torch.logdet(root).item() - 3
    assert math.isclose(modes.log_mass[0].item(), expected, abs_tol=1e-4)


def test_each_mode_once_and_none_without_mass():
    def function(u):
        parts = torch.tensor([-3.0, 0.0, 4.0])
        height = torch.tensor([0.0, 50.0, 1.0])
        return -(-((u - parts) ** 2) / 0.02 - height).logsumexp(-1)

    modes = find_modes(Target(function), 10 * torch.rand(200, 1) - 5)
    assert torch.allclose(modes.loc.flatten(), torch.tensor([-3.0, 4.0]), atol=1e-6)
    assert (modes.hits > 10).all()


def test_no_curvature_no_mode():
    flat = Target(lambda u: u.sum(-1) * 0)
    assert find_modes(flat, torch.randn(20, 2)) is None
    downhill = Target(lambda u: u.sum(-1))
    assert find_modes(downhill, torch.randn(20, 2)) is None
