"""Checks at the first step of learning, for errors that would be silent."""

__all__ = ["points_of", "require_learnable", "require_objective"]

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.nn.module
import torch
from torch import Tensor

from pyro_ebm.core.errors import UnregisteredParameterWarning
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.energy import leaves
from pyro_ebm.energies.discrete.finite import finite_values
from pyro_ebm.energies.discrete.independent import IndependentSites
from pyro_ebm.infer.objectives.objective import Objective
from pyro_ebm.mcmc import IndependentChains


def require_objective(objective: Any) -> None:
    """Check that an objective is one.

    Raises:
        TypeError: If it is no :class:`Objective`.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            "objective must be an Objective such as MaximumLikelihood(), got "
            f"{objective!r}."
        )


@contextmanager
def points_of(distribution: EnergyDistribution, count: int = 64) -> Iterator[Tensor]:
    """Some points of the support, where chains would start, shape ``(N, *event)``.

    In the block gradients are on, and random numbers are those of a fork: a run that
    goes on from a ``state_dict`` checks again, and then draws what the first did.
    """
    energy = distribution.energy
    device = energy.tensor_options()["device"]
    devices = [device] if device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        if finite_values(energy.support) is not None:
            like = torch.empty(0, **energy.tensor_options())
            uniform = IndependentSites.uniform(energy.support, energy.event_shape, like)
            yield uniform.sample(torch.Size((count,)))
        else:
            sampler = distribution.sampler or IndependentChains()
            yield sampler.start(energy, count)


def require_learnable(
    name: str,
    distribution: EnergyDistribution,
    latents: list[Tensor],
    objective: Objective,
) -> None:
    """Check the energy at a site.

    Args:
        name: The site.
        distribution: What stands there.
        latents: Values of the latent sites that the model has drawn before.
        objective: What is put there; it makes checks of its own.

    Raises:
        NotImplementedError: If the energy depends on a latent variable.

    Warns:
        UnregisteredParameterWarning: If a parameter that the energy depends on is not
            the one in Pyro's parameter store.
    """
    energy = distribution.energy
    with points_of(distribution) as x:
        objective.check(distribution, x)
        value = energy(x).sum()
    if not value.requires_grad:
        return
    if latents:
        grads = torch.autograd.grad(
            value, latents, allow_unused=True, retain_graph=True
        )
        if any(grad is not None for grad in grads):
            raise NotImplementedError(
                f"the energy at site {name!r} depends on a latent variable, so its log "
                "Z does too: an objective is for one energy only. "
                "Make the energy a function of the pair (an energy of a larger event), "
                "or give an exact or amortised log_partition and no handler."
            )
    if not pyro.nn.module._is_module_local_param_enabled():
        _warn_unregistered(name, distribution, leaves(value, x))


def _warn_unregistered(
    site: str, distribution: EnergyDistribution, parameters: list[Tensor]
) -> None:
    store = pyro.get_param_store()
    names = {id(p): name for name, p in distribution.energy.named_parameters()}
    missing = [
        names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)} in a closure")
        for leaf in parameters
        if store.param_name(leaf) is None
    ]
    if missing:
        warnings.warn(
            f"the energy at site {site!r} has parameters that Pyro does not know, and "
            f"no optimiser will train: {', '.join(missing)}. Call pyro.module(name, "
            "energy_model) in the model, or make the energy an attribute of a "
            "PyroModule. If it was registered under a name in use before, "
            "pyro.clear_param_store() first.",
            UnregisteredParameterWarning,
            stacklevel=2,
        )
